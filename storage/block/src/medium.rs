//! Where an image file's bytes are.

use std::rc::Rc;

use crate::backend::{BlockFuture, ZeroFlags};
use crate::buffer::IoBuf;
use crate::error::Result;

/// A part of a medium that is stored, or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseRange {
    /// Whether the bytes are stored; a hole reads as zeroes.
    pub data: bool,
    /// How far it reaches, in bytes from the offset that was asked about; never 0.
    pub length: u64,
}

/// A file of bytes under an image format: a host file, memory, a recording one in tests.
///
/// Reads past the end give zeroes; writes past the end make it longer (formats check guest ranges
/// before). Any offset and length is allowed.
pub trait Medium {
    /// What to call it in messages and maps.
    fn name(&self) -> Rc<str>;

    /// The length in bytes.
    fn len(&self) -> u64;

    /// Whether the length is 0.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Offsets and lengths that are multiples of this need no read-modify-write.
    fn alignment(&self) -> u32;

    /// Fills `buf` from `offset` on; with zeroes past the end.
    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()>;

    /// Writes `buf` at `offset`.
    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()>;

    /// Makes the range read as zeroes; its space is given back if the flags allow it.
    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()>;

    /// Gives the range's space back, if the medium can; otherwise does nothing.
    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()>;

    /// Reserves space for the range, without changing what it reads as.
    fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()>;

    /// When this returns, every write that ended before it began survives a power cut.
    fn flush(&self) -> BlockFuture<'_, ()>;

    /// Changes the length; new bytes read as zeroes.
    fn set_len(&self, length: u64) -> BlockFuture<'_, ()>;

    /// Whether the bytes at `offset` (before the end) are stored, and how far that goes, looking no
    /// further than `length`.
    ///
    /// # Errors
    ///
    /// If the host cannot say.
    fn sparse_range(&self, offset: u64, length: u64) -> Result<SparseRange>;
}
