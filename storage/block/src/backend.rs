//! The seam between disks and image formats.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use bitflags::bitflags;

use crate::buffer::IoBuf;
use crate::error::Result;

/// What the asynchronous methods of [`BlockBackend`] and [`crate::Medium`] return: a future of the
/// disk's own thread.
pub type BlockFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

bitflags! {
    /// How zeroes may be written.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ZeroFlags: u8 {
        /// The space may be given back to the file system.
        const MAY_UNMAP = 1;
        /// Fail with `Unsupported` rather than write zeroes as data.
        const NO_FALLBACK = 2;
    }
}

/// What a disk can do and how it wants to be used. All sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The size of the disk.
    pub size: u64,
    /// Offsets and lengths of requests are multiples of this (512 or 4096; tools may get 1).
    pub logical_block_size: u32,
    /// Writes that are multiples of this, and aligned to it, cost no read.
    pub physical_block_size: u32,
    /// The address alignment of buffers that spares a copy (1 if any will do).
    pub buffer_alignment: u32,
    /// Discards of this size, aligned to it, have an effect; 0 if discarding has none.
    pub discard_granularity: u32,
    /// Zero-writes of this size, aligned to it, are quick; 0 if they are written as data.
    pub zero_granularity: u32,
    /// The largest transfer in one request.
    pub max_transfer: u32,
    /// Writes are refused.
    pub read_only: bool,
}

/// A place in a host file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRange {
    /// The file's name as it was opened.
    pub file: Rc<str>,
    /// The offset in the file, in bytes.
    pub offset: u64,
}

/// What a part of a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored as it is, at this place if there is one place.
    Data(Option<HostRange>),
    /// Reads as zeroes and says so in the image's metadata; with the place of the space that is
    /// reserved for it, if any.
    Zero(Option<HostRange>),
    /// Stored compressed.
    Compressed,
    /// Not stored in any layer that was looked at. With the whole chain in view it reads as zeroes.
    Unallocated,
}

/// One piece of the answer to "where are the bytes?".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins on the disk, in bytes.
    pub offset: u64,
    /// Its length in bytes; never 0.
    pub length: u64,
    /// What it is.
    pub kind: ExtentKind,
    /// The layer that decided: 0 is the image itself, 1 its backing file, and so on.
    pub depth: u32,
}

impl Extent {
    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// Whether it is known to read as zeroes (if the whole chain was in view).
    pub fn reads_as_zero(&self) -> bool {
        matches!(self.kind, ExtentKind::Zero(_) | ExtentKind::Unallocated)
    }

    /// Lengthens `self` by `next` if both together are one extent, else returns `next`.
    pub fn merge(&mut self, next: Self) -> Option<Self> {
        let follows = |a: &Option<HostRange>, b: &Option<HostRange>| match (a, b) {
            (None, None) => true,
            (Some(a), Some(b)) => a.file == b.file && a.offset + self.length == b.offset,
            _ => false,
        };
        let same = match (&self.kind, &next.kind) {
            (ExtentKind::Data(a), ExtentKind::Data(b))
            | (ExtentKind::Zero(a), ExtentKind::Zero(b)) => follows(a, b),
            (ExtentKind::Compressed, ExtentKind::Compressed)
            | (ExtentKind::Unallocated, ExtentKind::Unallocated) => true,
            _ => false,
        };
        if same && self.depth == next.depth && self.end() == next.offset {
            self.length += next.length;
            None
        } else {
            Some(next)
        }
    }
}

/// Adds `next` to a list of extents, joined with the last one where both are one.
pub fn push_merged(extents: &mut Vec<Extent>, next: Extent) {
    let rest = match extents.last_mut() {
        Some(last) => last.merge(next),
        None => Some(next),
    };
    extents.extend(rest);
}

/// How deep a query looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The image alone; what its backing file would say is `Unallocated`.
    Layer,
    /// The whole backing chain.
    Chain,
}

/// A question for an extent map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentQuery {
    /// Where to begin, in bytes.
    pub offset: u64,
    /// How far to look, in bytes.
    pub length: u64,
    /// How deep to look.
    pub scope: Scope,
    /// At most this many extents are returned (at least one is, if `length` is not 0).
    pub limit: usize,
}

/// An image format, or anything else that stores a disk.
///
/// The caller, [`crate::Disk`], guarantees: `offset + length` is at most the size, offset and length are
/// multiples of the logical block size, no length is 0, no transfer is larger than the limit, and no
/// write comes to a read-only disk. Several requests may be in flight; overlapping ones without an
/// order between them leave old or new data of each block.
pub trait BlockBackend: std::any::Any {
    /// Size, alignments and abilities. The size may change by [`BlockBackend::resize`] only.
    fn limits(&self) -> Limits;

    /// The format's name as people write it: `raw`, `qcow2`.
    fn format_name(&self) -> &'static str;

    /// The file that it is in, as it was opened; `None` if it is in no file of its own.
    fn file_name(&self) -> Option<Rc<str>> {
        None
    }

    /// The image below it, which says what unallocated parts read as.
    fn backing(&self) -> Option<Rc<dyn BlockBackend>> {
        None
    }

    /// How many images lie below it.
    fn backing_depth(&self) -> u32 {
        self.backing()
            .map_or(0, |backing| backing.backing_depth() + 1)
    }

    /// Fills `buf` from `offset` on.
    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()>;

    /// Writes `buf` at `offset`. Not on stable storage before the next flush.
    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()>;

    /// Makes the range read as zeroes.
    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()>;

    /// Gives the range's space back where that is possible in whole; what it reads as afterwards is
    /// its old content or zeroes.
    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()>;

    /// When this returns, every write that ended before it began survives a power cut.
    fn flush(&self) -> BlockFuture<'_, ()>;

    /// Where the bytes are: extents in order, without gaps, beginning at the query's offset; less than
    /// the whole range if the limit was met.
    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>>;

    /// Changes the disk's size. New space reads as zeroes.
    fn resize(&self, size: u64) -> BlockFuture<'_, ()>;

    /// Brings everything to the file and marks it as cleanly closed. No request may follow.
    fn close(&self) -> BlockFuture<'_, ()>;
}
