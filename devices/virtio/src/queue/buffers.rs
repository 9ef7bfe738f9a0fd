//! Guest buffers: the memory that a descriptor chain names.

use guest_memory::GuestSlice;
use smallvec::SmallVec;

/// One side of a chain, readable or writable: pieces of guest memory in order.
#[derive(Debug, Clone, Default)]
pub struct Buffers {
    slices: SmallVec<[GuestSlice; 3]>,
    len: usize,
}

impl Buffers {
    /// Adds a piece at the end.
    pub fn push(&mut self, slice: GuestSlice) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces; none is empty.
    pub fn slices(&self) -> &[GuestSlice] {
        &self.slices
    }

    /// Calls `f` with the parts of the pieces that lie in `[at, at + len)`, and their distance from `at`.
    fn for_each(&self, at: usize, len: usize, mut f: impl FnMut(&GuestSlice, usize, usize, usize)) {
        let (mut skip, mut left, mut done) = (at, len, 0);
        for slice in &self.slices {
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            if left == 0 {
                return;
            }
            let n = left.min(slice.len() - skip);
            f(slice, skip, n, done);
            (skip, left, done) = (0, left - n, done + n);
        }
    }

    /// Copies out, from `at` on; returns how many bytes there were.
    pub fn read_at(&self, at: usize, to: &mut [u8]) -> usize {
        let mut total = 0;
        self.for_each(at, to.len(), |slice, skip, n, done| {
            total += slice.read_at(skip, &mut to[done..done + n]);
        });
        total
    }

    /// Copies in, from `at` on; returns how many bytes there was room for.
    pub fn write_at(&self, at: usize, from: &[u8]) -> usize {
        let mut total = 0;
        self.for_each(at, from.len(), |slice, skip, n, done| {
            total += slice.write_at(skip, &from[done..done + n]);
        });
        total
    }

    /// The `N` bytes from `at` on, if there are so many.
    pub fn array_at<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read_at(at, &mut bytes) == N).then_some(bytes)
    }

    /// The part of at most `len` bytes from `at` on, sharing the memory.
    #[must_use]
    pub fn part(&self, at: usize, len: usize) -> Self {
        let mut part = Self::default();
        self.for_each(at, len, |slice, skip, n, _| part.push(slice.part(skip, n)));
        part
    }

    /// All bytes, copied, but no more than `limit`.
    pub fn to_vec(&self, limit: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.len.min(limit)];
        self.read_at(0, &mut bytes);
        bytes
    }

    /// Takes note that the first `len` bytes have been written through the pieces' host addresses.
    pub fn written(&self, len: usize) {
        self.for_each(0, len, |slice, skip, n, _| {
            slice.part(skip, n).written(n);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::{BackingOptions, GuestMemory};

    #[test]
    fn pieces_read_and_write_as_one() {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, 0x1000, BackingOptions::default())
            .unwrap();
        let mut buffers = Buffers::default();
        for (at, len) in [(0x10, 3), (0x100, 0), (0x40, 4), (0x20, 2)] {
            buffers.push(memory.slice(at, len).unwrap());
        }
        assert_eq!((buffers.len(), buffers.slices().len()), (9, 3));
        assert_eq!(buffers.write_at(2, &[1, 2, 3, 4, 5, 6, 7, 8, 9]), 7);
        assert_eq!(buffers.array_at::<4>(1), Some([0, 1, 2, 3]));
        assert_eq!(buffers.array_at::<4>(6), None);
        let part = buffers.part(2, 6);
        assert_eq!(part.to_vec(100), [1, 2, 3, 4, 5, 6]);
        assert_eq!(part.part(5, 9).to_vec(100), [6]);
        assert!(buffers.part(9, 1).is_empty());
        let mut byte = [0];
        memory.read(0x21, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }
}
