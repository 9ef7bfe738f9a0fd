//! The guest's data of an encrypted image, as it is on the medium.
//!
//! Source: the qcow2 specification, sections "Full disk encryption header pointer" and "Data encryption": sectors are numbered by
//! where they are in the file, not in the disk. Compressed clusters, tables and the header are not encrypted.

use std::rc::Rc;

use block::{BlockError, BlockFuture, IoBuf, Medium, Result, SparseRange, ZeroFlags};

use crate::luks::Encryption;

/// What is encrypted in one piece of memory.
const PIECE: usize = 1 << 20;

/// A medium whose content is encrypted sector by sector.
pub(super) struct Encrypted {
    pub(super) inner: Rc<dyn Medium>,
    pub(super) encryption: Rc<Encryption>,
}

impl Encrypted {
    async fn read_part(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let length = (buf.len() - done).min(PIECE);
            let at = offset + done as u64;
            // Others may look at the caller's memory, or change it, while it holds what is encrypted.
            let piece = IoBuf::zeroed(length);
            self.inner.read(at, piece.clone()).await?;
            let mut bytes = piece.to_vec();
            self.encryption.decrypt(at, &mut bytes)?;
            buf.slice(done, length).copy_from(&bytes);
            done += length;
        }
        Ok(())
    }

    async fn write_part(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let length = (buf.len() - done).min(PIECE);
            let at = offset + done as u64;
            let mut bytes = buf.slice(done, length).to_vec();
            self.encryption.encrypt(at, &mut bytes)?;
            self.inner.write(at, IoBuf::from_slice(&bytes)).await?;
            done += length;
        }
        Ok(())
    }
}

impl Medium for Encrypted {
    fn name(&self) -> Rc<str> {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn alignment(&self) -> u32 {
        self.inner.alignment()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.read_part(offset, buf))
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.write_part(offset, buf))
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _flags: ZeroFlags) -> BlockFuture<'_, ()> {
        let message = "zeroes are stored encrypted, as data";
        Box::pin(async move { Err(BlockError::unsupported(message)) })
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        self.inner.discard(offset, length)
    }

    fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        self.inner.preallocate(offset, length)
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        self.inner.flush()
    }

    fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
        self.inner.set_len(length)
    }

    fn sparse_range(&self, offset: u64, length: u64) -> Result<SparseRange> {
        self.inner.sparse_range(offset, length)
    }
}
