//! Address spaces of device registers.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

/// The access sizes in bytes that a handler understands. Wider and misaligned accesses are split for it; narrower reads
/// are cut out of a read of [`Self::min`]; a narrower write is widened with zeros at an address that is a multiple of
/// [`Self::min`], and lost elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// Narrowest: 1, 2, 4 or 8.
    pub min: u8,
    /// Widest: 1, 2, 4 or 8, and at least `min`.
    pub max: u8,
}

impl Widths {
    /// Bytes only.
    pub const BYTE: Self = Self { min: 1, max: 1 };
    /// One to four bytes.
    pub const UP_TO_DWORD: Self = Self { min: 1, max: 4 };
    /// Four bytes only.
    pub const DWORD: Self = Self { min: 4, max: 4 };
    /// Four or eight bytes.
    pub const DWORD_OR_QWORD: Self = Self { min: 4, max: 8 };
    /// One to eight bytes.
    pub const ANY: Self = Self { min: 1, max: 8 };
}

/// Registers in an address space. Called from any vCPU's thread, from several at once.
pub trait IoHandler: Send + Sync {
    /// The access sizes that [`Self::read`] and [`Self::write`] are called with. Asked once, when the region is added.
    fn widths(&self) -> Widths;
    /// A read of `data.len()` bytes, a power of two within [`Self::widths`], at a multiple of its size. `offset` counts
    /// from the start of the region. Fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// A write; as [`Self::read`].
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a region can't be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// It lies on a region that is there.
    #[error("{bus} region {base:#x}+{len:#x} ({name}) overlaps {other}")]
    Overlap {
        /// The address space.
        bus: &'static str,
        /// First address.
        base: u64,
        /// Addresses.
        len: u64,
        /// Whose it is.
        name: String,
        /// Whose region is there.
        other: String,
    },
    /// It is empty, or ends past the end of the space.
    #[error("{bus} region {base:#x}+{len:#x} ({name}) is not in the address space")]
    BadRange {
        /// The address space.
        bus: &'static str,
        /// First address.
        base: u64,
        /// Addresses.
        len: u64,
        /// Whose it is.
        name: String,
    },
}

#[derive(Clone)]
struct Entry {
    id: u64,
    base: u64,
    /// Last address.
    last: u64,
    fixed: bool,
    name: Arc<str>,
    widths: Widths,
    handler: Arc<dyn IoHandler>,
}

/// A piece of the address space in which one handler answers.
#[derive(Clone)]
struct Piece {
    first: u64,
    last: u64,
    region_base: u64,
    widths: Widths,
    handler: Arc<dyn IoHandler>,
}

#[derive(Default)]
struct Entries {
    next_id: u64,
    list: Vec<Entry>,
}

struct Inner {
    name: &'static str,
    last: u64,
    entries: Mutex<Entries>,
    view: ArcSwap<Vec<Piece>>,
}

/// An address space: the ports, or the guest-physical addresses that are not memory. Clones are handles to the same space.
///
/// Accesses take no lock. What no region claims reads as all ones, and swallows writes.
#[derive(Clone)]
pub struct IoBus(Arc<Inner>);

/// A region of an [`IoBus`]. Dropping it removes the region; an access that has begun may still be under way.
#[must_use = "the region is removed when this is dropped"]
pub struct IoRegion {
    bus: Arc<Inner>,
    id: u64,
    base: u64,
    len: u64,
}

impl IoBus {
    /// The port space: 65536 ports.
    pub fn ports() -> Self {
        Self::new("port", 0xffff)
    }

    /// The memory space: 52 bits.
    pub fn memory() -> Self {
        Self::new("memory", (1 << 52) - 1)
    }

    fn new(name: &'static str, last: u64) -> Self {
        Self(Arc::new(Inner {
            name,
            last,
            entries: Mutex::default(),
            view: ArcSwap::default(),
        }))
    }

    /// Adds a region at a place that the board defines.
    ///
    /// # Errors
    /// [`IoError`] when the range is not in the space, or another such region lies in it.
    pub fn add(
        &self,
        base: u64,
        len: u64,
        name: &str,
        handler: Arc<dyn IoHandler>,
    ) -> Result<IoRegion, IoError> {
        self.insert(base, len, name, true, handler)
    }

    /// Adds a region at a place that the guest chose (a base address register). It may lie on others: a region of the
    /// board's wins over it, and of two that guests placed the older one.
    ///
    /// # Errors
    /// [`IoError::BadRange`] when the range is not in the space.
    pub fn add_movable(
        &self,
        base: u64,
        len: u64,
        name: &str,
        handler: Arc<dyn IoHandler>,
    ) -> Result<IoRegion, IoError> {
        self.insert(base, len, name, false, handler)
    }

    fn insert(
        &self,
        base: u64,
        len: u64,
        name: &str,
        fixed: bool,
        handler: Arc<dyn IoHandler>,
    ) -> Result<IoRegion, IoError> {
        let bus = self.0.name;
        let last = len
            .checked_sub(1)
            .and_then(|l| base.checked_add(l))
            .filter(|last| *last <= self.0.last)
            .ok_or_else(|| IoError::BadRange {
                bus,
                base,
                len,
                name: name.to_owned(),
            })?;
        let mut entries = self.0.entries.lock();
        let there = entries
            .list
            .iter()
            .find(|e| fixed && e.fixed && e.base <= last && base <= e.last);
        if let Some(other) = there {
            return Err(IoError::Overlap {
                bus,
                base,
                len,
                name: name.to_owned(),
                other: other.name.to_string(),
            });
        }
        let id = entries.next_id;
        entries.next_id += 1;
        entries.list.push(Entry {
            id,
            base,
            last,
            fixed,
            name: name.into(),
            widths: handler.widths(),
            handler,
        });
        self.0.view.store(Arc::new(flatten(&entries.list)));
        Ok(IoRegion {
            bus: self.0.clone(),
            id,
            base,
            len,
        })
    }

    /// Reads `data.len()` bytes, 1 to 8.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        let view = self.0.view.load();
        let mut done = 0;
        while done < data.len() {
            let Some(at) = addr.checked_add(done as u64) else {
                data[done..].fill(0xff);
                return;
            };
            let rest = &mut data[done..];
            match find(&view, at) {
                Some(piece) => done += piece.read(at, rest),
                None => {
                    rest[0] = 0xff;
                    done += 1;
                }
            }
        }
    }

    /// Writes `data.len()` bytes, 1 to 8.
    pub fn write(&self, addr: u64, data: &[u8]) {
        let view = self.0.view.load();
        let mut done = 0;
        while done < data.len() {
            let Some(at) = addr.checked_add(done as u64) else {
                return;
            };
            match find(&view, at) {
                Some(piece) => done += piece.write(at, &data[done..]),
                None => done += 1,
            }
        }
    }

    /// The name of the region that answers at an address.
    pub fn owner(&self, addr: u64) -> Option<String> {
        let entries = self.0.entries.lock();
        by_precedence(&entries.list)
            .into_iter()
            .find(|e| (e.base..=e.last).contains(&addr))
            .map(|e| e.name.to_string())
    }

    /// All regions as (first address, length, name), by address.
    pub fn regions(&self) -> Vec<(u64, u64, String)> {
        let mut list: Vec<_> = self
            .0
            .entries
            .lock()
            .list
            .iter()
            .map(|e| (e.base, e.last - e.base + 1, e.name.to_string()))
            .collect();
        list.sort();
        list
    }
}

impl fmt::Debug for IoBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBus")
            .field("space", &self.0.name)
            .finish()
    }
}

impl IoRegion {
    /// First address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Addresses.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.len
    }
}

impl fmt::Debug for IoRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IoRegion({} {:#x}+{:#x})",
            self.bus.name, self.base, self.len
        )
    }
}

impl Drop for IoRegion {
    fn drop(&mut self) {
        let mut entries = self.bus.entries.lock();
        let at = entries.list.iter().position(|e| e.id == self.id);
        let removed = at.map(|at| entries.list.remove(at));
        let view = self.bus.view.swap(Arc::new(flatten(&entries.list)));
        drop(entries);
        // Without the lock: the last reference to a handler may own regions of this bus itself.
        drop((removed, view));
    }
}

fn find(view: &[Piece], addr: u64) -> Option<&Piece> {
    let at = view.partition_point(|p| p.first <= addr);
    view.get(at.checked_sub(1)?).filter(|p| addr <= p.last)
}

/// The entries with the winning ones first: the board's before the guest's, older before newer.
fn by_precedence(list: &[Entry]) -> Vec<&Entry> {
    let mut order: Vec<&Entry> = list.iter().collect();
    order.sort_by_key(|e| (!e.fixed, e.id));
    order
}

/// Lays the entries on one another: pieces that don't overlap, by rising address.
fn flatten(list: &[Entry]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(list.len());
    for entry in by_precedence(list) {
        let mut next = Some(entry.base);
        while let Some(from) = next.filter(|n| *n <= entry.last) {
            let at = pieces.partition_point(|p| p.last < from);
            let covering = pieces.get(at).map(|p| (p.first, p.last));
            if let Some((_, last)) = covering.filter(|(first, _)| *first <= from) {
                next = last.checked_add(1);
                continue;
            }
            let last = match covering {
                Some((first, _)) if first <= entry.last => first - 1,
                _ => entry.last,
            };
            pieces.insert(
                at,
                Piece {
                    first: from,
                    last,
                    region_base: entry.base,
                    widths: entry.widths,
                    handler: entry.handler.clone(),
                },
            );
            next = last.checked_add(1);
        }
    }
    pieces
}

impl Piece {
    /// The size of the next naturally aligned access at `addr` of at most `len` bytes.
    fn step(&self, addr: u64, len: usize) -> usize {
        let room = (self.last - addr).saturating_add(1);
        let mut size = usize::from(self.widths.max);
        while size > 1
            && (size > len
                || !(addr - self.region_base).is_multiple_of(size as u64)
                || size as u64 > room)
        {
            size /= 2;
        }
        size
    }

    /// Reads from the start of `data` and returns how many bytes it has filled.
    fn read(&self, addr: u64, data: &mut [u8]) -> usize {
        let size = self.step(addr, data.len());
        let offset = addr - self.region_base;
        let min = usize::from(self.widths.min);
        if size >= min {
            self.handler.read(offset, &mut data[..size]);
        } else {
            let into = (offset % min as u64) as usize;
            let mut whole = [0xff; 8];
            self.handler.read(offset - into as u64, &mut whole[..min]);
            data[..size].copy_from_slice(&whole[into..into + size]);
        }
        size
    }

    /// Writes from the start of `data` and returns how many bytes it has taken.
    fn write(&self, addr: u64, data: &[u8]) -> usize {
        let size = self.step(addr, data.len());
        let offset = addr - self.region_base;
        let min = usize::from(self.widths.min);
        if size >= min {
            self.handler.write(offset, &data[..size]);
        } else if offset.is_multiple_of(min as u64) {
            let mut whole = [0; 8];
            whole[..size].copy_from_slice(&data[..size]);
            self.handler.write(offset, &whole[..min]);
        }
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Notes each access; reads give the offset of each byte plus a constant.
    struct Probe {
        widths: Widths,
        plus: u8,
        log: Mutex<Vec<(bool, u64, usize)>>,
    }

    impl IoHandler for Probe {
        fn widths(&self) -> Widths {
            self.widths
        }
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.log.lock().push((false, offset, data.len()));
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = (offset as u8).wrapping_add(i as u8).wrapping_add(self.plus);
            }
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.log.lock().push((true, offset, data.len()));
        }
    }

    fn probe(widths: Widths, plus: u8) -> Arc<Probe> {
        Arc::new(Probe {
            widths,
            plus,
            log: Mutex::default(),
        })
    }

    fn read4(bus: &IoBus, addr: u64) -> [u8; 4] {
        let mut data = [0; 4];
        bus.read(addr, &mut data);
        data
    }

    #[test]
    fn unclaimed_addresses_read_as_ones() {
        let bus = IoBus::ports();
        assert_eq!(read4(&bus, 0x80), [0xff; 4]);
        bus.write(0xffff, &[1, 2, 3, 4]);
        let mut data = [0; 8];
        IoBus::memory().read(u64::MAX - 2, &mut data);
        assert_eq!(data, [0xff; 8]);
    }

    #[test]
    fn accesses_are_split_at_the_handlers_width_and_at_its_end() {
        let bus = IoBus::ports();
        let bytes = probe(Widths::BYTE, 0);
        let dwords = probe(Widths::DWORD, 0x40);
        let _a = bus.add(0x100, 4, "bytes", bytes.clone()).unwrap();
        let _b = bus.add(0x104, 4, "dwords", dwords.clone()).unwrap();
        assert_eq!(read4(&bus, 0x102), [2, 3, 0x40, 0x41]);
        assert_eq!(*bytes.log.lock(), [(false, 2, 1), (false, 3, 1)]);
        assert_eq!(*dwords.log.lock(), [(false, 0, 4)]);
        assert_eq!(read4(&bus, 0x106), [0x42, 0x43, 0xff, 0xff]);
        dwords.log.lock().clear();
        bus.write(0x104, &[1]);
        bus.write(0x105, &[1]);
        assert_eq!(*dwords.log.lock(), [(true, 0, 4)]);
    }

    #[test]
    fn misaligned_accesses_become_aligned_ones() {
        let bus = IoBus::memory();
        let any = probe(Widths::ANY, 0);
        let _r = bus.add(0x1000, 0x1000, "any", any.clone()).unwrap();
        let mut data = [0; 8];
        bus.read(0x1003, &mut data);
        assert_eq!(data, [3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(
            *any.log.lock(),
            [(false, 3, 1), (false, 4, 4), (false, 8, 2), (false, 10, 1)]
        );
    }

    #[test]
    fn the_board_may_not_overlap_and_regions_go_with_their_handle() {
        let bus = IoBus::ports();
        let a = bus
            .add(0x60, 5, "keyboard", probe(Widths::BYTE, 0))
            .unwrap();
        let again = bus.add(0x64, 1, "other", probe(Widths::BYTE, 0));
        assert_eq!(
            again.unwrap_err().to_string(),
            "port region 0x64+0x1 (other) overlaps keyboard"
        );
        assert!(matches!(
            bus.add(0xffff, 2, "x", probe(Widths::BYTE, 0)),
            Err(IoError::BadRange { .. })
        ));
        assert_eq!(bus.owner(0x61).as_deref(), Some("keyboard"));
        drop(a);
        assert_eq!(bus.owner(0x61), None);
        assert_eq!(read4(&bus, 0x60), [0xff; 4]);
    }

    #[test]
    fn a_handler_may_own_regions_of_its_own() {
        struct Owner(Mutex<Option<IoRegion>>);
        impl IoHandler for Owner {
            fn widths(&self) -> Widths {
                Widths::BYTE
            }
            fn read(&self, _offset: u64, data: &mut [u8]) {
                data.fill(u8::from(self.0.lock().is_some()));
            }
            fn write(&self, _offset: u64, _data: &[u8]) {}
        }
        let bus = IoBus::ports();
        let inner = bus.add(1, 1, "inner", probe(Widths::BYTE, 0)).unwrap();
        let owner = Arc::new(Owner(Mutex::new(Some(inner))));
        drop(bus.add(2, 1, "outer", owner).unwrap());
        assert!(bus.regions().is_empty());
    }

    #[test]
    fn what_the_guest_placed_yields_and_comes_back() {
        let bus = IoBus::memory();
        let old = bus
            .add_movable(0x1000, 0x3000, "old", probe(Widths::ANY, 0))
            .unwrap();
        let _new = bus
            .add_movable(0x0, 0x8000, "new", probe(Widths::ANY, 0x80))
            .unwrap();
        let board = bus
            .add(0x2000, 0x1000, "board", probe(Widths::ANY, 0x40))
            .unwrap();
        let owners = |bus: &IoBus| [0u64, 0x1000, 0x2000, 0x3000, 0x4000].map(|a| read4(bus, a)[0]);
        assert_eq!(owners(&bus), [0x80, 0, 0x40, 0, 0x80]);
        drop(board);
        assert_eq!(owners(&bus), [0x80, 0, 0, 0, 0x80]);
        drop(old);
        assert_eq!(owners(&bus), [0x80; 5]);
        assert_eq!(bus.regions().len(), 1);
    }
}
