//! An image whose log cannot be replayed because it is open for reading alone.

use std::rc::Rc;

use block::{BlockError, BlockFuture, IoBuf, Medium, Result, SparseRange, ZeroFlags};

use super::log::{Change, Replay};

/// A medium as it will be once the log is replayed, for readers who may not write.
pub(crate) struct Replayed {
    pub(crate) below: Rc<dyn Medium>,
    pub(crate) replay: Replay,
}

impl Replayed {
    fn overlay(&self, at: u64, buf: &IoBuf) {
        let end = at + buf.len() as u64;
        for change in &self.replay.changes {
            let (offset, length) = match change {
                Change::Data { offset, bytes } => (*offset, bytes.len() as u64),
                Change::Zero { offset, length } => (*offset, *length),
            };
            let (from, to) = (offset.max(at), (offset + length).min(end));
            if from >= to {
                continue;
            }
            let (place, count) = ((from - at) as usize, (to - from) as usize);
            match change {
                Change::Data { bytes, .. } => {
                    let skip = (from - offset) as usize;
                    buf.copy_from_at(place, &bytes[skip..skip + count]);
                }
                Change::Zero { .. } => buf.fill_at(place, count, 0),
            }
        }
    }
}

fn read_only<'a>() -> BlockFuture<'a, ()> {
    Box::pin(async {
        let message = "the image is open for reading alone";
        Err(BlockError::new(block::ErrorKind::ReadOnly, message))
    })
}

impl Medium for Replayed {
    fn name(&self) -> Rc<str> {
        self.below.name()
    }

    fn len(&self) -> u64 {
        self.below.len().max(self.replay.file_length)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn alignment(&self) -> u32 {
        self.below.alignment()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.below.read(offset, buf.clone()).await?;
            self.overlay(offset, &buf);
            Ok(())
        })
    }

    fn write(&self, _offset: u64, _buf: IoBuf) -> BlockFuture<'_, ()> {
        read_only()
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _flags: ZeroFlags) -> BlockFuture<'_, ()> {
        read_only()
    }

    fn discard(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        read_only()
    }

    fn preallocate(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        read_only()
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_len(&self, _length: u64) -> BlockFuture<'_, ()> {
        read_only()
    }

    fn sparse_range(&self, _offset: u64, length: u64) -> Result<SparseRange> {
        Ok(SparseRange { data: true, length })
    }
}
