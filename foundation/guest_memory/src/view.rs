//! A reader's own copy of the map, for hot paths.

use std::sync::Arc;

use crate::{GuestMemory, GuestSlice, MemoryError, Region};

/// The map as it was at the last [`refresh`](Self::refresh): translating with it costs no atomic operation but the
/// reference count of the slice that comes out. One thread's own; a device thread refreshes it once for a batch.
#[derive(Clone)]
pub struct MemoryView {
    memory: GuestMemory,
    regions: Arc<Vec<Region>>,
    generation: u64,
    /// Index of the region that was found last.
    last: usize,
}

impl std::fmt::Debug for MemoryView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryView")
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl MemoryView {
    /// A view of the map as it is now.
    pub fn new(memory: &GuestMemory) -> Self {
        // The number first: the map is then at least as new as it.
        let generation = memory.generation();
        Self {
            memory: memory.clone(),
            regions: memory.regions(),
            generation,
            last: 0,
        }
    }

    /// The memory that this is a view of.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Follows changes of the map. Returns true if there were any: slices made before may show what is no longer there.
    pub fn refresh(&mut self) -> bool {
        let generation = self.memory.generation();
        if generation == self.generation {
            return false;
        }
        self.generation = generation;
        self.regions = self.memory.regions();
        self.last = 0;
        true
    }

    fn find(&mut self, addr: u64) -> Option<&Region> {
        let hit = self
            .regions
            .get(self.last)
            .is_some_and(|r| r.base <= addr && addr < r.end());
        if !hit {
            let after = self.regions.partition_point(|r| r.base <= addr);
            let at = after.checked_sub(1)?;
            if addr >= self.regions[at].end() {
                return None;
            }
            self.last = at;
        }
        self.regions.get(self.last)
    }

    /// The range as one slice, or `None` unless one region covers it all (and is not ROM, when `writable`).
    pub fn slice(&mut self, addr: u64, len: usize, writable: bool) -> Option<GuestSlice> {
        let region = self.find(addr)?;
        let into = addr - region.base;
        if region.size - into < len as u64 || writable && region.read_only {
            return None;
        }
        Some(GuestSlice {
            backing: region.backing.clone(),
            offset: region.offset + into,
            len,
        })
    }

    /// Calls `f` with the slices that the range is made of, in order.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`] when a byte of it is not memory, [`MemoryError::ReadOnly`] when `writable` is asked
    /// for and a byte of it is ROM. `f` may have been called for a part then.
    pub fn for_each(
        &mut self,
        addr: u64,
        len: usize,
        writable: bool,
        mut f: impl FnMut(GuestSlice),
    ) -> Result<(), MemoryError> {
        let whole = len as u64;
        let missing = || MemoryError::NotMemory { addr, len: whole };
        let mut done = 0usize;
        while done < len {
            let at = addr.checked_add(done as u64).ok_or_else(missing)?;
            let region = self.find(at).ok_or_else(missing)?;
            if writable && region.read_only {
                return Err(MemoryError::ReadOnly { addr, len: whole });
            }
            let into = at - region.base;
            let n = (region.size - into).min((len - done) as u64) as usize;
            f(GuestSlice {
                backing: region.backing.clone(),
                offset: region.offset + into,
                len: n,
            });
            done += n;
        }
        Ok(())
    }

    /// Copies guest memory into `to`.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`]; `to` may then be half filled.
    pub fn read(&mut self, addr: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let mut at = 0;
        let len = to.len();
        self.for_each(addr, len, false, |slice| {
            at += slice.read_at(0, &mut to[at..]);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BackingOptions;

    #[test]
    fn a_view_stands_still_until_it_is_refreshed() {
        let memory = GuestMemory::new();
        let mut view = MemoryView::new(&memory);
        for base in [0x1000, 0x2000] {
            memory
                .add_ram(base, 0x1000, BackingOptions::default())
                .unwrap();
        }
        assert!(view.slice(0x1000, 4, true).is_none());
        assert!(view.refresh());
        assert!(!view.refresh());
        memory.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        view.read(0x1ffe, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        assert!(view.slice(0x1ffe, 4, true).is_none());
        assert!(view.slice(0x2ffe, 2, true).is_some());
        assert!(view.read(0x2ffe, &mut back).is_err());
        assert!(view.read(u64::MAX, &mut back).is_err());
        assert!(view.slice(0xfff, 1, false).is_none());
    }

    #[test]
    fn slices_load_and_store_values_in_one_access() {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, 0x1000, BackingOptions::default())
            .unwrap();
        let slice = memory.slice(0x10, 16).unwrap();
        assert!(slice.store_u64(8, 0x0102_0304_0506_0708));
        assert_eq!(slice.load_u16(8), Some(0x0708));
        assert_eq!(slice.load_u32(12), Some(0x0102_0304));
        assert!(slice.store_u16(0, 7) && slice.store_u32(4, 9));
        assert_eq!(slice.load_u64(0), Some(7 | 9 << 32));
        assert_eq!(slice.load_u64(4), None);
        assert_eq!(slice.load_u16(15), None);
        assert_eq!(slice.load_u32(usize::MAX), None);
        assert!(!slice.store_u32(14, 1));
    }
}
