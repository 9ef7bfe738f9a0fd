//! A file that others have opened, read without an executor's help: for a process that may do little else.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::fs::SeekFrom;

use crate::backend::{BlockFuture, ZeroFlags};
use crate::buffer::IoBuf;
use crate::error::{BlockError, ErrorKind, Result};
use crate::medium::{Medium, SparseRange};

/// An open file or block device that is read only, with system calls that the caller waits for.
#[derive(Debug)]
pub struct PlainFile {
    file: OwnedFd,
    name: Rc<str>,
    length: u64,
}

impl PlainFile {
    /// Takes an open file, which messages call `name`.
    ///
    /// # Errors
    ///
    /// If its length can't be told.
    pub fn new(file: OwnedFd, name: Rc<str>) -> Result<Self> {
        let length = rustix::fs::seek(&file, SeekFrom::End(0))
            .map_err(|e| BlockError::io(format!("cannot open '{name}'"), e.into()))?;
        Ok(Self { file, name, length })
    }

    fn read_fully(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let mut bytes = vec![0; buf.len()];
        let mut done = 0;
        while done < bytes.len() {
            let (rest, at) = (&mut bytes[done..], offset + done as u64);
            let read = rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut *rest, at));
            match read {
                // The file ends; what follows is zeroes.
                Ok(0) => break,
                Ok(count) => done += count,
                Err(e) => {
                    let what = format!("cannot read at {at} of '{}'", self.name);
                    return Err(BlockError::io(what, e.into()));
                }
            }
        }
        buf.copy_from(&bytes);
        Ok(())
    }

    fn refuse(&self) -> BlockFuture<'_, ()> {
        let message = format!("'{}' is read-only", self.name);
        Box::pin(async move { Err(BlockError::new(ErrorKind::ReadOnly, message)) })
    }
}

impl Medium for PlainFile {
    fn name(&self) -> Rc<str> {
        self.name.clone()
    }

    fn len(&self) -> u64 {
        self.length
    }

    fn read_only(&self) -> bool {
        true
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move { self.read_fully(offset, &buf) })
    }

    fn write(&self, _offset: u64, _buf: IoBuf) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _flags: ZeroFlags) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn discard(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn preallocate(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_len(&self, _length: u64) -> BlockFuture<'_, ()> {
        self.refuse()
    }

    fn sparse_range(&self, _offset: u64, length: u64) -> Result<SparseRange> {
        Ok(SparseRange { data: true, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::block_on;
    use std::io::Write;

    #[test]
    fn it_is_read_and_never_written() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let plain = PlainFile::new(file.into(), "x".into()).unwrap();
        assert_eq!((plain.len(), plain.read_only()), (10, true));
        block_on(async {
            let buf = IoBuf::from_slice(&[0xFF; 8]);
            plain.read(6, buf.clone()).await.unwrap();
            assert_eq!(buf.to_vec(), b"6789\0\0\0\0");
            let error = plain.write(0, buf).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReadOnly);
        })
        .unwrap();
    }
}
