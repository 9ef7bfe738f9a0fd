//! A medium in memory.

use std::cell::RefCell;
use std::rc::Rc;

use crate::backend::{BlockFuture, ZeroFlags};
use crate::buffer::IoBuf;
use crate::error::Result;
use crate::medium::{Medium, SparseRange};

/// Bytes in memory, for tests and throw-away disks. Grows on writes past its end.
pub struct MemoryMedium {
    bytes: RefCell<Vec<u8>>,
}

impl MemoryMedium {
    /// `length` zero bytes.
    pub fn new(length: usize) -> Self {
        Self {
            bytes: RefCell::new(vec![0; length]),
        }
    }

    /// These bytes.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        Self {
            bytes: RefCell::new(bytes),
        }
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
            let mut bytes = self.bytes.borrow_mut();
            let start = usize::try_from(offset).expect("an offset in memory");
            if bytes.len() < start + buf.len() {
                bytes.resize(start + buf.len(), 0);
            }
            buf.copy_to(&mut bytes[start..start + buf.len()]);
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, _flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let mut bytes = self.bytes.borrow_mut();
            let start = usize::try_from(offset).expect("an offset in memory");
            let end = start + usize::try_from(length).expect("a length in memory");
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[start..end].fill(0);
            Ok(())
        })
    }

    fn discard(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let mut bytes = self.bytes.borrow_mut();
            let end = usize::try_from(offset + length).expect("a length in memory");
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            Ok(())
        })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let length = usize::try_from(length).expect("a length in memory");
            self.bytes.borrow_mut().resize(length, 0);
            Ok(())
        })
    }

    fn sparse_range(&self, _offset: u64, length: u64) -> Result<SparseRange> {
        Ok(SparseRange { data: true, length })
    }
}
