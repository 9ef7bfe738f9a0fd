//! The map of guest-physical memory.

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::{Backing, BackingOptions, GuestSlice, GuestSlices, MemoryError, PAGE_SIZE};

/// A stretch of guest-physical memory.
#[derive(Debug, Clone)]
pub struct Region {
    /// Guest-physical address of the first byte.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// The host memory behind it; several regions may show the same.
    pub backing: Arc<Backing>,
    /// Where in the backing the region starts, in bytes.
    pub offset: u64,
    /// Guest writes do not change it (ROM); they reach the device space instead.
    pub read_only: bool,
}

impl Region {
    /// Guest-physical address just past the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.size
    }
}

/// Who must follow changes of the map: accelerators.
pub trait MemoryListener: Send + Sync {
    /// A region is about to appear.
    ///
    /// # Errors
    /// A reason for which the region can't be; the map then stays as it was.
    fn region_added(&self, region: &Region) -> Result<(), String>;
    /// A region has gone: nothing may use its translation when this returns.
    fn region_removed(&self, region: &Region);
}

/// Where a guest-physical address lies in the host.
#[derive(Debug, Clone)]
pub struct Translation {
    /// The backing; its page is `offset >> 12`.
    pub backing: Arc<Backing>,
    /// Byte offset in the backing.
    pub offset: u64,
    /// Bytes from there to the end of the region.
    pub remaining: u64,
    /// The region is read-only to the guest.
    pub read_only: bool,
}

#[derive(Default)]
struct Inner {
    map: ArcSwap<Vec<Region>>,
    change: Mutex<Vec<Weak<dyn MemoryListener>>>,
    generation: AtomicU64,
}

/// The memory of a virtual machine. Clones are handles to the same map.
#[derive(Clone, Default)]
pub struct GuestMemory(Arc<Inner>);

impl GuestMemory {
    /// A map with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allocates `size` bytes of RAM and places them at `base`. A convenience over [`Self::add`].
    ///
    /// # Errors
    /// As [`Backing::new`] and [`Self::add`].
    pub fn add_ram(
        &self,
        base: u64,
        size: u64,
        options: BackingOptions,
    ) -> Result<Arc<Backing>, MemoryError> {
        let backing = Arc::new(Backing::new(size, options)?);
        self.add(Region {
            base,
            size,
            backing: backing.clone(),
            offset: 0,
            read_only: false,
        })?;
        Ok(backing)
    }

    /// Places a region in the map.
    ///
    /// # Errors
    /// For a region that is not whole pages inside its backing, that overlaps another, or that a listener refuses.
    pub fn add(&self, region: Region) -> Result<(), MemoryError> {
        let Region {
            base, size, offset, ..
        } = region;
        let fits = offset
            .checked_add(size)
            .is_some_and(|end| end <= region.backing.len());
        let aligned = (base | size | offset) & (PAGE_SIZE - 1) == 0;
        if size == 0 || !fits || !aligned || base.checked_add(size).is_none_or(|e| e > 1 << 52) {
            return Err(MemoryError::BadRegion { base, size });
        }
        let listeners = self.0.change.lock();
        let mut map = Vec::clone(&self.0.map.load());
        if map.iter().any(|r| r.base < region.end() && base < r.end()) {
            return Err(MemoryError::Overlap { base, size });
        }
        let mut told: Vec<Arc<dyn MemoryListener>> = Vec::new();
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            if let Err(why) = listener.region_added(&region) {
                told.iter().for_each(|l| l.region_removed(&region));
                return Err(MemoryError::Listener(why));
            }
            told.push(listener);
        }
        let at = map.partition_point(|r| r.base < base);
        map.insert(at, region);
        self.0.map.store(Arc::new(map));
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Takes the region that starts at `base` out of the map and returns it.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`] when none starts there.
    pub fn remove(&self, base: u64) -> Result<Region, MemoryError> {
        let listeners = self.0.change.lock();
        let mut map = Vec::clone(&self.0.map.load());
        let at = map
            .iter()
            .position(|r| r.base == base)
            .ok_or(MemoryError::NotMemory { addr: base, len: 1 })?;
        let region = map.remove(at);
        self.0.map.store(Arc::new(map));
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        listeners
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|l| l.region_removed(&region));
        Ok(region)
    }

    /// Registers a listener; it is told at once of the regions that are there.
    ///
    /// # Errors
    /// [`MemoryError::Listener`] when it refuses one of them.
    pub fn listen(&self, listener: &Arc<dyn MemoryListener>) -> Result<(), MemoryError> {
        let mut listeners = self.0.change.lock();
        for region in self.0.map.load().iter() {
            listener
                .region_added(region)
                .map_err(MemoryError::Listener)?;
        }
        listeners.push(Arc::downgrade(listener));
        Ok(())
    }

    /// The regions, by rising address.
    pub fn regions(&self) -> Arc<Vec<Region>> {
        self.0.map.load_full()
    }

    /// Rises with every change of the map.
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::SeqCst)
    }

    /// Bytes of writable memory in all.
    pub fn ram_size(&self) -> u64 {
        self.0
            .map
            .load()
            .iter()
            .filter(|r| !r.read_only)
            .map(|r| r.size)
            .sum()
    }

    pub(crate) fn find(map: &[Region], addr: u64) -> Option<&Region> {
        let at = map.partition_point(|r| r.base <= addr);
        map.get(at.checked_sub(1)?).filter(|r| addr < r.end())
    }

    /// Where an address lies in the host, or `None` for device space.
    pub fn translate(&self, addr: u64) -> Option<Translation> {
        let map = self.0.map.load();
        let region = Self::find(&map, addr)?;
        let into = addr - region.base;
        Some(Translation {
            backing: region.backing.clone(),
            offset: region.offset + into,
            remaining: region.size - into,
            read_only: region.read_only,
        })
    }

    /// The range as one slice.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`] unless one region covers it all.
    pub fn slice(&self, addr: u64, len: usize) -> Result<GuestSlice, MemoryError> {
        let missing = MemoryError::NotMemory {
            addr,
            len: len as u64,
        };
        let t = self
            .translate(addr)
            .filter(|t| t.remaining >= len as u64)
            .ok_or(missing)?;
        Ok(GuestSlice {
            backing: t.backing,
            offset: t.offset,
            len,
        })
    }

    /// The range as the slices that it is made of, in order.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`] when a byte of it is not memory; [`MemoryError::ReadOnly`] when `writable`
    /// is asked for and a byte of it is ROM.
    pub fn slices(
        &self,
        addr: u64,
        len: usize,
        writable: bool,
    ) -> Result<GuestSlices, MemoryError> {
        let mut slices = GuestSlices::new();
        self.for_each(addr, len, writable, |slice, _| slices.push(slice))?;
        Ok(slices)
    }

    fn for_each(
        &self,
        addr: u64,
        len: usize,
        writable: bool,
        mut f: impl FnMut(GuestSlice, usize),
    ) -> Result<(), MemoryError> {
        let map = self.0.map.load();
        let mut done = 0usize;
        while done < len {
            let missing = MemoryError::NotMemory {
                addr,
                len: len as u64,
            };
            let Some(at) = addr.checked_add(done as u64) else {
                return Err(missing);
            };
            let Some(region) = Self::find(&map, at) else {
                return Err(missing);
            };
            if writable && region.read_only {
                return Err(MemoryError::ReadOnly {
                    addr,
                    len: len as u64,
                });
            }
            let into = at - region.base;
            let n = (region.size - into).min((len - done) as u64) as usize;
            let offset = region.offset + into;
            f(
                GuestSlice {
                    backing: region.backing.clone(),
                    offset,
                    len: n,
                },
                done,
            );
            done += n;
        }
        Ok(())
    }

    /// Copies guest memory into `to`.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`]; `to` may then be half filled.
    pub fn read(&self, addr: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        self.for_each(addr, to.len(), false, |slice, at| {
            slice.read_at(0, &mut to[at..]);
        })
    }

    /// Copies `from` into guest memory, as a device does: ROM is refused.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`] or [`MemoryError::ReadOnly`]; the range may then be half written.
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.for_each(addr, from.len(), true, |slice, at| {
            slice.write_at(0, &from[at..]);
        })
    }

    /// Copies `from` into guest memory whether it is ROM or not, as a loader does.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`]; the range may then be half written.
    pub fn load(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.for_each(addr, from.len(), false, |slice, at| {
            slice.write_at(0, &from[at..]);
        })
    }

    /// Puts `len` bytes of a file, from `offset` in it, into guest memory, as a loader does. Whole pages are shown as
    /// [`Backing::show_file`] describes where that is possible, and all else is copied.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`]; [`MemoryError::File`] when the file can't be read or ends too early.
    pub fn load_file(
        &self,
        addr: u64,
        len: usize,
        file: &std::fs::File,
        offset: u64,
    ) -> Result<(), MemoryError> {
        let mut done = 0;
        for slice in self.slices(addr, len, false)? {
            let (at, from) = (slice.offset, offset + done);
            done += slice.len() as u64;
            let first = (at.next_multiple_of(PAGE_SIZE) - at).min(slice.len() as u64);
            let whole = (slice.len() as u64 - first) & !(PAGE_SIZE - 1);
            let shown = whole != 0
                && slice
                    .backing
                    .show_file(at + first, whole, file.as_fd(), from + first)
                    .is_ok();
            let copied = if shown {
                [0..first, first + whole..slice.len() as u64]
            } else {
                [0..slice.len() as u64, 0..0]
            };
            for range in copied {
                copy_file(&slice, range, file, from).map_err(MemoryError::File)?;
            }
        }
        Ok(())
    }

    /// Reads a little-endian 16-bit value in one access with acquire ordering; the address must be even.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`], also for an odd address.
    pub fn load_u16(&self, addr: u64) -> Result<u16, MemoryError> {
        let slice = self.aligned(addr, 2, false)?;
        // SAFETY: the slice is two live, aligned bytes; other access to them is atomic or raw.
        let value = unsafe { AtomicU16::from_ptr(slice.as_ptr().cast()) }.load(Ordering::Acquire);
        Ok(u16::from_le(value))
    }

    /// Writes a little-endian 16-bit value in one access with release ordering; the address must be even.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`], also for an odd address; [`MemoryError::ReadOnly`].
    pub fn store_u16(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        let slice = self.aligned(addr, 2, true)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(slice.as_ptr().cast()) }
            .store(value.to_le(), Ordering::Release);
        slice.written(2);
        Ok(())
    }

    /// Reads a little-endian 32-bit value in one access with acquire ordering; the address must be a multiple of 4.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`], also for a misaligned address.
    pub fn load_u32(&self, addr: u64) -> Result<u32, MemoryError> {
        let slice = self.aligned(addr, 4, false)?;
        // SAFETY: as in `load_u16`, with four bytes.
        let value = unsafe { AtomicU32::from_ptr(slice.as_ptr().cast()) }.load(Ordering::Acquire);
        Ok(u32::from_le(value))
    }

    /// Writes a little-endian 32-bit value in one access with release ordering; the address must be a multiple of 4.
    ///
    /// # Errors
    /// [`MemoryError::NotMemory`], also for a misaligned address; [`MemoryError::ReadOnly`].
    pub fn store_u32(&self, addr: u64, value: u32) -> Result<(), MemoryError> {
        let slice = self.aligned(addr, 4, true)?;
        // SAFETY: as in `load_u16`, with four bytes.
        unsafe { AtomicU32::from_ptr(slice.as_ptr().cast()) }
            .store(value.to_le(), Ordering::Release);
        slice.written(4);
        Ok(())
    }

    fn aligned(&self, addr: u64, len: usize, writable: bool) -> Result<GuestSlice, MemoryError> {
        let bad = || MemoryError::NotMemory {
            addr,
            len: len as u64,
        };
        if !addr.is_multiple_of(len as u64) {
            return Err(bad());
        }
        let map = self.0.map.load();
        let region = Self::find(&map, addr).ok_or_else(bad)?;
        if writable && region.read_only {
            return Err(MemoryError::ReadOnly {
                addr,
                len: len as u64,
            });
        }
        // Regions are whole pages, so an aligned access never leaves its region.
        let offset = region.offset + (addr - region.base);
        Ok(GuestSlice {
            backing: region.backing.clone(),
            offset,
            len,
        })
    }
}

/// Copies the file's bytes from `offset + range.start` to the range of the slice.
fn copy_file(
    slice: &GuestSlice,
    range: Range<u64>,
    file: &std::fs::File,
    offset: u64,
) -> std::io::Result<()> {
    const PIECE: u64 = 1 << 20;
    let mut buffer = vec![0; (range.end - range.start).min(PIECE) as usize];
    let mut at = range.start;
    while at < range.end {
        let piece = &mut buffer[..(range.end - at).min(PIECE) as usize];
        file.read_exact_at(piece, offset + at)?;
        slice.write_at(at as usize, piece);
        at += piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageFlags;

    #[test]
    fn a_file_in_memory_is_private_and_gone_after_a_discard() {
        const PAGES: usize = 8;
        let page = PAGE_SIZE as usize;
        let content: Vec<u8> = (0..PAGES * page).map(|n| (n / 7 + 1) as u8 | 1).collect();
        let dir = std::env::temp_dir().join(format!("guest-memory-{}", std::process::id()));
        std::fs::write(&dir, &content).unwrap();
        let file = std::fs::File::open(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        for shared in [false, true] {
            let memory = GuestMemory::new();
            let options = BackingOptions {
                shared,
                ..BackingOptions::default()
            };
            let backing = memory.add_ram(0x1_0000, 0x2_0000, options).unwrap();
            // With the page offsets of file and memory alike (shown), and not alike (copied).
            for (addr, offset) in [(0x1_1010u64, 16u64), (0x1_9123, 7)] {
                let len = content.len() - 3 * page;
                memory.load_file(addr, len, &file, offset).unwrap();
                let mut back = vec![0; len + 2];
                memory.read(addr - 1, &mut back).unwrap();
                assert!(back[1..=len] == content[offset as usize..][..len]);
                assert_eq!((back[0], back[len + 1]), (0, 0));
                memory.write(addr + 5000, b"guest").unwrap();
                backing.discard(addr + 4096 - 0x1_0000, 8192);
                let kept = addr.next_multiple_of(PAGE_SIZE) + 4096;
                memory.read(kept, &mut back[..4096]).unwrap();
                assert!(back[..4096].iter().all(|b| *b == 0));
            }
            let past = content.len() as u64 - 5;
            assert!(matches!(
                memory.load_file(0x1_0000, 20, &file, past),
                Err(MemoryError::File(_))
            ));
            let mut whole = vec![0; content.len()];
            file.read_exact_at(&mut whole, 0).unwrap();
            assert!(whole == content, "the file itself is never written");
        }
    }

    fn memory() -> GuestMemory {
        let memory = GuestMemory::new();
        memory
            .add_ram(0, 0x2000, BackingOptions::default())
            .unwrap();
        memory
            .add_ram(
                0x2000,
                0x1000,
                BackingOptions {
                    shared: true,
                    ..Default::default()
                },
            )
            .unwrap();
        memory
    }

    #[test]
    fn reads_and_writes_across_regions() {
        let memory = memory();
        let data: Vec<u8> = (0..=255).collect();
        memory.write(0x1f80, &data).unwrap();
        let mut back = vec![0; 256];
        memory.read(0x1f80, &mut back).unwrap();
        assert_eq!(back, data);
        assert_eq!(memory.slices(0x1f80, 256, true).unwrap().len(), 2);
        assert!(memory.slice(0x1f80, 256).is_err());
    }

    #[test]
    fn refuses_what_is_not_memory() {
        let memory = memory();
        assert!(memory.write(0x2fff, &[1, 2]).is_err());
        assert!(memory.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(memory.load_u16(1).is_err());
        assert!(memory.translate(0x3000).is_none());
        assert!(matches!(
            memory.add_ram(0x1000, 0x1000, BackingOptions::default()),
            Err(MemoryError::Overlap { .. })
        ));
        assert!(Backing::new(5, BackingOptions::default()).is_err());
    }

    #[test]
    fn rom_takes_loads_but_not_writes() {
        let memory = GuestMemory::new();
        let backing = Arc::new(Backing::new(0x1000, BackingOptions::default()).unwrap());
        memory
            .add(Region {
                base: 0xf000,
                size: 0x1000,
                backing,
                offset: 0,
                read_only: true,
            })
            .unwrap();
        memory.load(0xf000, &[7]).unwrap();
        assert!(matches!(
            memory.write(0xf000, &[8]),
            Err(MemoryError::ReadOnly { .. })
        ));
        let mut byte = [0];
        memory.read(0xf000, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn writes_are_noted_where_somebody_asked() {
        let memory = memory();
        let t = memory.translate(0x1000).unwrap();
        let (generation, new) = t.backing.mark_code(1);
        assert!(new);
        memory.write(0xfff, &[1]).unwrap();
        assert_eq!(
            t.backing.code_generation(1).load(Ordering::SeqCst),
            generation
        );
        memory.write(0xfff, &[1, 2]).unwrap();
        assert_eq!(
            t.backing.code_generation(1).load(Ordering::SeqCst),
            generation + 1
        );
        t.backing.start_log();
        memory.store_u16(0x1ffe, 3).unwrap();
        assert_eq!(t.backing.take_log(), [0b10]);
        assert_eq!(t.backing.take_log(), [0]);
        memory.write(0x1ffe, &[1]).unwrap();
        assert_eq!(t.backing.take_log(), [0b10]);
        t.backing.stop_log();
        assert_eq!(
            t.backing.page_flag(0).load(Ordering::SeqCst) & PageFlags::LOG,
            0
        );
    }

    #[test]
    fn discarded_pages_read_as_zero() {
        let memory = memory();
        for base in [0x1000, 0x2000] {
            memory.write(base, &[9; 64]).unwrap();
            let t = memory.translate(base).unwrap();
            t.backing.discard(t.offset, 0x1000);
            let mut back = [1; 64];
            memory.read(base, &mut back).unwrap();
            assert_eq!(back, [0; 64]);
        }
    }

    #[test]
    fn listeners_follow_and_can_refuse() {
        struct Refuse(Mutex<Vec<u64>>);
        impl MemoryListener for Refuse {
            fn region_added(&self, region: &Region) -> Result<(), String> {
                if region.base >= 0x10000 {
                    return Err("too high".into());
                }
                self.0.lock().push(region.base);
                Ok(())
            }
            fn region_removed(&self, region: &Region) {
                self.0.lock().retain(|b| *b != region.base);
            }
        }
        let memory = memory();
        let listener = Arc::new(Refuse(Mutex::default()));
        let dynamic: Arc<dyn MemoryListener> = listener.clone();
        memory.listen(&dynamic).unwrap();
        assert!(
            memory
                .add_ram(0x10000, 0x1000, BackingOptions::default())
                .is_err()
        );
        memory
            .add_ram(0x8000, 0x1000, BackingOptions::default())
            .unwrap();
        memory.remove(0).unwrap();
        assert_eq!(*listener.0.lock(), [0x2000, 0x8000]);
        assert!(memory.remove(0x9000).is_err());
    }
}
