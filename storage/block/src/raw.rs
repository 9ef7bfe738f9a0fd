//! The raw format: the medium is the disk.

use std::cell::Cell;
use std::rc::Rc;

use crate::backend::{
    BlockBackend, BlockFuture, Extent, ExtentKind, ExtentQuery, HostRange, Limits, ZeroFlags,
    push_merged,
};
use crate::buffer::IoBuf;
use crate::error::{BlockError, ErrorKind, Result};
use crate::medium::Medium;

/// A disk that is stored byte for byte in its medium.
pub struct RawBackend {
    medium: Rc<dyn Medium>,
    size: Cell<u64>,
    guard: Option<fn(&[u8]) -> bool>,
}

/// The largest transfer that is passed on in one piece.
pub(crate) const MAX_TRANSFER: u32 = 1 << 30;

impl RawBackend {
    /// Takes the whole medium as a disk. A last block that is not whole reads as if filled up with
    /// zeroes.
    ///
    /// # Errors
    ///
    /// None today; formats share this shape.
    pub async fn open(medium: Rc<dyn Medium>) -> Result<Self> {
        let size = medium.len().next_multiple_of(512);
        Ok(Self {
            medium,
            size: Cell::new(size),
            guard: None,
        })
    }

    /// Refuses writes after which `allowed` would say no to the first sector: a disk whose format was
    /// guessed must not become one that is guessed differently next time.
    #[must_use]
    pub fn guarded(mut self, allowed: fn(&[u8]) -> bool) -> Self {
        self.guard = Some(allowed);
        self
    }

    /// The medium below.
    pub fn medium(&self) -> &Rc<dyn Medium> {
        &self.medium
    }
}

impl BlockBackend for RawBackend {
    fn limits(&self) -> Limits {
        let alignment = self.medium.alignment();
        Limits {
            size: self.size.get(),
            logical_block_size: 512,
            physical_block_size: alignment.max(512),
            buffer_alignment: alignment,
            discard_granularity: 4096,
            zero_granularity: 4096,
            max_transfer: MAX_TRANSFER,
            read_only: self.medium.read_only(),
        }
    }

    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.medium.name())
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        self.medium.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        if let Some(allowed) = self.guard.filter(|_| offset == 0) {
            let mut first = [0; 512];
            let length = first.len().min(buf.len());
            buf.copy_to(&mut first[..length]);
            if !allowed(&first[..length]) {
                let message = "this write would turn a disk whose format was guessed as raw into an \
                               image of another format: name the format to allow it";
                return Box::pin(async move { Err(BlockError::new(ErrorKind::Refused, message)) });
            }
            // What was checked is what is written, whatever the guest does meanwhile.
            let rest = buf.slice(length, buf.len() - length);
            let checked = IoBuf::from_slice(&first[..length]);
            let whole = if rest.is_empty() {
                checked
            } else {
                IoBuf::concat(&[checked, rest])
            };
            return self.medium.write(offset, whole);
        }
        self.medium.write(offset, buf)
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        self.medium.write_zeroes(offset, length, flags)
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        self.medium.discard(offset, length)
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        self.medium.flush()
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        Box::pin(async move {
            let mut found: Vec<Extent> = Vec::new();
            let end = query.offset + query.length;
            let mut offset = query.offset;
            while offset < end && found.len() < query.limit {
                let stored_end = self.medium.len().min(end);
                let (data, length) = if offset < stored_end {
                    let range = self.medium.sparse_range(offset, stored_end - offset)?;
                    (range.data, range.length)
                } else {
                    (false, end - offset)
                };
                let place = Some(HostRange {
                    file: self.medium.name(),
                    offset,
                });
                let kind = if data {
                    ExtentKind::Data(place)
                } else {
                    ExtentKind::Zero(place)
                };
                let extent = Extent {
                    offset,
                    length,
                    kind,
                    depth: 0,
                };
                offset += length;
                push_merged(&mut found, extent);
            }
            Ok(found)
        })
    }

    fn resize(&self, size: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.medium.set_len(size).await?;
            self.size.set(size);
            Ok(())
        })
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        self.medium.flush()
    }
}
