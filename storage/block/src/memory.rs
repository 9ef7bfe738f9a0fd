//! A medium in memory.

use std::cell::RefCell;
use std::rc::Rc;

use crate::backend::{BlockFuture, ZeroFlags};
use crate::buffer::IoBuf;
use crate::error::{BlockError, ErrorKind, Result};
use crate::medium::{Medium, SparseRange};

/// Bytes in memory, for tests and throw-away disks. Grows on writes past its end.
pub struct MemoryMedium {
    bytes: RefCell<Vec<u8>>,
    limit: u64,
}

/// It grows no larger than this, unless told otherwise.
const DEFAULT_LIMIT: u64 = 1 << 30;

impl MemoryMedium {
    /// `length` zero bytes.
    pub fn new(length: usize) -> Self {
        Self::from_vec(vec![0; length])
    }

    /// These bytes.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self {
            bytes: RefCell::new(bytes),
            limit: DEFAULT_LIMIT,
        }
    }

    /// The same, but it grows to at most `limit` bytes.
    #[must_use]
    pub fn with_limit(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    /// Makes it at least `offset + length` bytes long; returns the range as indices.
    fn grow(&self, offset: u64, length: u64) -> Result<std::ops::Range<usize>> {
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= self.limit)
            .ok_or_else(|| {
                let message =
                    format!("{length} bytes at {offset} are too far for a disk in memory");
                BlockError::new(ErrorKind::NoSpace, message)
            })?;
        let mut bytes = self.bytes.borrow_mut();
        let end = usize::try_from(end).unwrap_or(usize::MAX);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(usize::try_from(offset).unwrap_or(0)..end)
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }
}

impl Medium for MemoryMedium {
    fn name(&self) -> Rc<str> {
        "memory".into()
    }

    fn len(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let bytes = self.bytes.borrow();
            let start = usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(bytes.len());
            let stored = buf.len().min(bytes.len() - start);
            buf.copy_from(&bytes[start..start + stored]);
            buf.fill_at(stored, buf.len() - stored, 0);
            Ok(())
        })
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let range = self.grow(offset, buf.len() as u64)?;
            buf.copy_to(&mut self.bytes.borrow_mut()[range]);
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, _flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let range = self.grow(offset, length)?;
            self.bytes.borrow_mut()[range].fill(0);
            Ok(())
        })
    }

    fn discard(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move { self.grow(offset, length).map(|_| ()) })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let range = self.grow(0, length)?;
            self.bytes.borrow_mut().truncate(range.end);
            Ok(())
        })
    }

    fn sparse_range(&self, _offset: u64, length: u64) -> Result<SparseRange> {
        Ok(SparseRange { data: true, length })
    }
}
