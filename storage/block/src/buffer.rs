//! Scatter/gather buffers that can point into guest memory or into memory of their own.

#![allow(unsafe_code)] // Buffers are raw address ranges shared with guests and with the kernel.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;

/// The alignment of buffers that this module allocates: enough for direct I/O on any usual device.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// One contiguous piece of a buffer. The layout is that of `struct iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// The first byte.
    pub address: *mut u8,
    /// The length in bytes.
    pub length: usize,
}

// SAFETY: a segment is only an address; who dereferences it must hold the buffer's keep-alive.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// What keeps the memory of a buffer valid while the buffer lives.
pub type KeepAlive = Arc<dyn Any + Send + Sync>;

/// A scatter/gather list for one transfer.
///
/// Cloning and slicing share the memory; nothing is copied. The memory stays valid as long as any clone
/// lives, also while the kernel works on it, because operations in flight hold a clone.
///
/// The memory may be guest memory: others may change it at any time. Code that computes on data
/// (compression, encryption, checks) must copy it out first, with [`IoBuf::to_vec`] or
/// [`IoBuf::copy_to`]; nothing here hands out references into it.
#[derive(Clone)]
pub struct IoBuf {
    segments: SmallVec<[Segment; 2]>,
    length: usize,
    keep: KeepAlive,
}

/// Zeroed memory of our own, aligned for direct I/O.
struct OwnedMemory {
    address: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain bytes, accessed through raw pointers only.
unsafe impl Send for OwnedMemory {}
// SAFETY: as above.
unsafe impl Sync for OwnedMemory {}

impl Drop for OwnedMemory {
    fn drop(&mut self) {
        // SAFETY: the address came from `alloc_zeroed` with this layout and is freed once.
        unsafe { dealloc(self.address.as_ptr(), self.layout) }
    }
}

impl IoBuf {
    /// A zeroed buffer of `length` bytes of its own, aligned to [`BUFFER_ALIGNMENT`].
    pub fn zeroed(length: usize) -> Self {
        let layout = Layout::from_size_align(length.max(1), BUFFER_ALIGNMENT)
            .expect("a buffer is smaller than the address space");
        // SAFETY: the layout's size is not zero.
        let address = unsafe { alloc_zeroed(layout) };
        let Some(address) = NonNull::new(address) else {
            handle_alloc_error(layout)
        };
        let segment = Segment {
            address: address.as_ptr(),
            length,
        };
        Self {
            segments: SmallVec::from_slice(&[segment]),
            length,
            keep: Arc::new(OwnedMemory { address, layout }),
        }
    }

    /// A buffer of its own with a copy of `bytes`.
    pub fn from_slice(bytes: &[u8]) -> Self {
        let buffer = Self::zeroed(bytes.len());
        buffer.copy_from(bytes);
        buffer
    }

    /// A buffer over memory that somebody else owns, for example a guest's.
    ///
    /// # Safety
    ///
    /// Every segment must stay mapped, readable and writable (readable is enough if the buffer is only
    /// ever the source of writes) as long as `keep` lives. No Rust reference to the memory may exist
    /// while the buffer lives, other than to atomics.
    pub unsafe fn from_raw(segments: &[Segment], keep: KeepAlive) -> Self {
        let length = segments.iter().map(|s| s.length).sum();
        Self {
            segments: SmallVec::from_slice(segments),
            length,
            keep,
        }
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The pieces in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Whether every segment's address and length is a multiple of `alignment` (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.segments
            .iter()
            .all(|s| (s.address.addr() | s.length) & mask == 0)
    }

    /// The part `[offset, offset + length)`, sharing the memory.
    ///
    /// # Panics
    ///
    /// If the part reaches past the end.
    #[must_use]
    pub fn slice(&self, offset: usize, length: usize) -> Self {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.length),
            "slice {offset}+{length} of a buffer of {} bytes",
            self.length
        );
        if offset == 0 && length == self.length {
            return self.clone();
        }
        let mut segments = SmallVec::new();
        self.for_each_piece(offset, length, |address, length| {
            segments.push(Segment { address, length });
        });
        Self {
            segments,
            length,
            keep: self.keep.clone(),
        }
    }

    /// One buffer of `parts`, in order, sharing their memory.
    pub fn concat(parts: &[Self]) -> Self {
        let segments: SmallVec<[Segment; 2]> = parts
            .iter()
            .flat_map(|part| part.segments.iter().copied())
            .collect();
        let keeps: Vec<KeepAlive> = parts.iter().map(|part| part.keep.clone()).collect();
        let length = parts.iter().map(Self::len).sum();
        Self {
            segments,
            length,
            keep: Arc::new(keeps),
        }
    }

    /// Copies `target.len()` bytes from `offset` on into `target`.
    ///
    /// # Panics
    ///
    /// If the buffer is too short.
    pub fn copy_to_at(&self, offset: usize, target: &mut [u8]) {
        assert!(
            offset
                .checked_add(target.len())
                .is_some_and(|end| end <= self.length)
        );
        let mut done = 0;
        self.for_each_piece(offset, target.len(), |address, length| {
            // SAFETY: the piece lies in memory that `keep` holds; `target` has room for all pieces
            // together (asserted) and is ours alone, so they cannot overlap.
            unsafe { std::ptr::copy_nonoverlapping(address, target[done..].as_mut_ptr(), length) };
            done += length;
        });
    }

    /// Copies `source` into the buffer from `offset` on.
    ///
    /// # Panics
    ///
    /// If the buffer is too short.
    pub fn copy_from_at(&self, offset: usize, source: &[u8]) {
        assert!(
            offset
                .checked_add(source.len())
                .is_some_and(|end| end <= self.length)
        );
        let mut done = 0;
        self.for_each_piece(offset, source.len(), |address, length| {
            // SAFETY: as in `copy_to_at`.
            unsafe { std::ptr::copy_nonoverlapping(source[done..].as_ptr(), address, length) };
            done += length;
        });
    }

    /// Copies the beginning of the buffer into `target`, which must not be longer.
    pub fn copy_to(&self, target: &mut [u8]) {
        self.copy_to_at(0, target);
    }

    /// Copies `source` into the beginning of the buffer.
    pub fn copy_from(&self, source: &[u8]) {
        self.copy_from_at(0, source);
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        self.copy_to(&mut bytes);
        bytes
    }

    /// Sets `length` bytes from `offset` on to `value`.
    ///
    /// # Panics
    ///
    /// If the range reaches past the end.
    pub fn fill_at(&self, offset: usize, length: usize, value: u8) {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.length)
        );
        self.for_each_piece(offset, length, |address, length| {
            // SAFETY: the piece lies in memory that `keep` holds.
            unsafe { std::ptr::write_bytes(address, value, length) };
        });
    }

    /// Whether all bytes were zero when they were looked at.
    pub fn is_zero(&self) -> bool {
        let mut chunk = [0u8; 4096];
        self.segments.iter().all(|segment| {
            let mut done = 0;
            while done < segment.length {
                let n = (segment.length - done).min(chunk.len());
                // SAFETY: inside the segment, which `keep` holds; copied because a guest may
                // change the memory meanwhile.
                unsafe {
                    let from = segment.address.add(done);
                    std::ptr::copy_nonoverlapping(from, chunk.as_mut_ptr(), n);
                }
                if !bytes_are_zero(&chunk[..n]) {
                    return false;
                }
                done += n;
            }
            true
        })
    }

    fn for_each_piece(&self, offset: usize, length: usize, mut f: impl FnMut(*mut u8, usize)) {
        let mut skip = offset;
        let mut left = length;
        for segment in &self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.length {
                skip -= segment.length;
                continue;
            }
            let n = (segment.length - skip).min(left);
            f(segment.address.wrapping_add(skip), n);
            skip = 0;
            left -= n;
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuf")
            .field("length", &self.length)
            .field("segments", &self.segments.len())
            .finish_non_exhaustive()
    }
}

/// Whether all of `bytes` are zero.
pub fn bytes_are_zero(bytes: &[u8]) -> bool {
    // Wide blocks without early exit inside let the compiler use vector instructions.
    let mut blocks = bytes.chunks_exact(64);
    blocks
        .by_ref()
        .all(|block| block.iter().fold(0, |a, b| a | b) == 0)
        && blocks.remainder().iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_piece_buffer() -> IoBuf {
        let whole = IoBuf::from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let pieces = [
            whole.segments()[0].address,
            whole.segments()[0].address.wrapping_add(5),
        ];
        let segments = [
            Segment {
                address: pieces[0],
                length: 3,
            },
            Segment {
                address: pieces[1],
                length: 3,
            },
        ];
        // SAFETY: both segments lie in `whole`, which the keep-alive owns.
        unsafe { IoBuf::from_raw(&segments, Arc::new(whole)) }
    }

    #[test]
    fn slices_and_copies_cross_segments() {
        let buffer = two_piece_buffer();
        assert_eq!(buffer.to_vec(), [1, 2, 3, 6, 7, 8]);
        let part = buffer.slice(2, 3);
        assert_eq!(part.to_vec(), [3, 6, 7]);
        part.copy_from_at(1, &[9, 9]);
        assert_eq!(buffer.to_vec(), [1, 2, 3, 9, 9, 8]);
        part.fill_at(0, 3, 0);
        assert!(part.is_zero());
        assert!(!buffer.is_zero());
    }

    #[test]
    fn own_memory_is_aligned_and_zero() {
        let buffer = IoBuf::zeroed(10_000);
        assert!(buffer.is_zero());
        assert!(
            buffer.segments()[0]
                .address
                .addr()
                .is_multiple_of(BUFFER_ALIGNMENT)
        );
        assert!(!buffer.is_aligned(512));
        assert!(IoBuf::zeroed(8192).is_aligned(4096));
    }

    #[test]
    #[should_panic(expected = "slice")]
    fn slice_past_the_end_panics() {
        let _ = IoBuf::zeroed(10).slice(5, 6);
    }
}
