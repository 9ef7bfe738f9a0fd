//! Translation buffers: their layout, the look-ups of the hot paths, and what flushes empty.
//!
//! Buffers exist for each *kind* of access rights, and twice: those for the upper half of the linear address space are
//! shared by all address spaces (kernels map global pages there), those for the lower half belong to one of several
//! address spaces, named by PCID, so that a switch of CR3 need not throw them away.

use std::sync::atomic::AtomicU8;

use guest_memory::PAGE_SIZE;

/// Entries of a data buffer.
pub(crate) const DATA_ENTRIES: usize = 1024;
/// Entries of an instruction buffer.
pub(crate) const FETCH_ENTRIES: usize = 512;
/// Data buffers: user, supervisor, supervisor kept from user pages (SMAP).
const DATA_KINDS: usize = 3;
/// Address spaces whose lower halves are kept.
const SPACES: usize = 8;
/// More filled slots than this are not remembered one by one.
const JOURNAL: usize = 1024;

/// A page that data accesses may hit. A tag is the linear address of the page, or [`invalid`] of the slot. An access at
/// `a` of `n` bytes hits when `a - tag <= 4096 - n` (as unsigned numbers), which is also false for one that crosses a page.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct DataEntry {
    /// Tag of a page that may be read.
    pub(crate) read: u64,
    /// Tag of a page that may be written (and is dirty in the page table).
    pub(crate) write: u64,
    /// Host address of the page.
    pub(crate) host: *mut u8,
    /// The page's flag byte: a writer loads it after its store.
    pub(crate) flag: *const AtomicU8,
}

/// A page that instructions may be fetched from.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(crate) struct FetchEntry {
    /// Tag, as in [`DataEntry`].
    pub(crate) tag: u64,
    /// Host address of the page.
    pub(crate) host: *const u8,
}

/// What the hot paths do not look at, by slot of a data buffer.
#[derive(Clone, Copy, Default)]
struct Cold {
    /// Physical address of the page.
    physical: u64,
}

/// The tag that no access hits in this slot: an address that belongs to another slot.
const fn invalid(slot: usize) -> u64 {
    ((slot ^ 1) as u64) << 12
}

/// The slot of an address in a data buffer. Higher bits are mixed in, so that copies between places which are a multiple of
/// the buffer's reach apart do not drive one another out.
#[inline(always)]
const fn data_slot(linear: u64) -> usize {
    (linear >> 12 ^ linear >> 22) as usize & (DATA_ENTRIES - 1)
}

/// The slot of an address in an instruction buffer.
#[inline(always)]
const fn fetch_slot(linear: u64) -> usize {
    (linear >> 12) as usize & (FETCH_ENTRIES - 1)
}

/// The rights that a data buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// User privilege.
    User = 0,
    /// Supervisor privilege; user pages may be touched.
    Supervisor = 1,
    /// Supervisor privilege; user pages may not be touched (SMAP).
    Guarded = 2,
}

impl Kind {
    /// By privilege and whether SMAP is in force.
    pub(crate) fn new(user: bool, smap: bool) -> Self {
        match (user, smap) {
            (true, _) => Self::User,
            (false, false) => Self::Supervisor,
            (false, true) => Self::Guarded,
        }
    }
}

type DataBuffers = [[DataEntry; DATA_ENTRIES]; DATA_KINDS];
type FetchBuffers = [[FetchEntry; FETCH_ENTRIES]; 2];

/// The buffers of one half of an address space.
struct Buffers {
    data: Box<DataBuffers>,
    cold: Box<[[Cold; DATA_ENTRIES]; DATA_KINDS]>,
    fetch: Box<FetchBuffers>,
    /// Filled slots: kind (3 and 4: instructions) and slot. Full: nobody knows which.
    journal: Vec<(u8, u16)>,
}

/// A zeroed array on the heap that never was on the stack.
fn boxed<T: Copy, const N: usize, const M: usize>(value: T) -> Box<[[T; N]; M]> {
    let all = vec![[value; N]; M].into_boxed_slice();
    all.try_into().map_err(|_| ()).expect("M elements")
}

impl Buffers {
    fn new() -> Self {
        let mut new = Self {
            data: boxed(DataEntry {
                read: 0,
                write: 0,
                host: std::ptr::null_mut(),
                flag: std::ptr::null(),
            }),
            cold: boxed(Cold::default()),
            fetch: boxed(FetchEntry {
                tag: 0,
                host: std::ptr::null(),
            }),
            journal: Vec::new(),
        };
        new.clear_all();
        new
    }

    fn clear_all(&mut self) {
        self.journal.clear();
        for kind in 0..DATA_KINDS as u8 {
            (0..DATA_ENTRIES).for_each(|slot| self.clear(kind, slot));
        }
        for kind in [3, 4] {
            (0..FETCH_ENTRIES).for_each(|slot| self.clear(kind, slot));
        }
    }

    fn clear(&mut self, kind: u8, slot: usize) {
        match kind {
            0..=2 => {
                let entry = &mut self.data[usize::from(kind)][slot];
                entry.read = invalid(slot);
                entry.write = invalid(slot);
            }
            _ => self.fetch[usize::from(kind) - 3][slot].tag = invalid(slot),
        }
    }

    fn flush(&mut self) {
        if self.journal.len() >= JOURNAL {
            self.clear_all();
            return;
        }
        while let Some((kind, slot)) = self.journal.pop() {
            self.clear(kind, usize::from(slot));
        }
    }

    fn flush_page(&mut self, page: u64) {
        let slot = data_slot(page);
        for kind in 0..DATA_KINDS {
            let entry = &self.data[kind][slot];
            if entry.read == page || entry.write == page {
                self.clear(kind as u8, slot);
            }
        }
        let slot = fetch_slot(page);
        for kind in 0..2 {
            if self.fetch[kind][slot].tag == page {
                self.clear(kind as u8 + 3, slot);
            }
        }
    }

    fn note(&mut self, kind: u8, slot: usize) {
        if self.journal.len() < JOURNAL {
            self.journal.push((kind, slot as u16));
        }
    }
}

/// The lower half of an address space.
struct Space {
    buffers: Buffers,
    /// The PCID that it is of, if it is of any.
    pcid: Option<u16>,
    /// When it was last switched to.
    used: u64,
}

/// A page to enter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entered {
    /// Any linear address in the page.
    pub(crate) linear: u64,
    /// Physical address of the page.
    pub(crate) physical: u64,
    /// Host address of the page.
    pub(crate) host: *mut u8,
    /// The page's flag byte.
    pub(crate) flag: *const AtomicU8,
    /// It is global.
    pub(crate) global: bool,
    /// Base-two logarithm of the size of the guest's page that it is part of.
    pub(crate) shift: u32,
}

/// The buffers of a vCPU.
pub(crate) struct Tlb {
    /// The data buffers in use: for the lower and the upper half of the address space.
    data: [*const DataEntry; 2],
    /// The instruction buffers in use.
    fetch: [*const FetchEntry; 2],
    /// Rises whenever an entry is told to go or the address space changes: what was learnt from a fetch under an older number
    /// is no longer sure.
    pub(crate) epoch: u64,
    kind: Kind,
    high: Buffers,
    spaces: Vec<Space>,
    /// Index of the space in use.
    current: usize,
    switches: u64,
    /// The upper half holds pages that are not global: they go with a change of CR3.
    high_local: bool,
    /// The lower half of some space holds global pages: invalidating one concerns all spaces.
    low_global: bool,
    /// Pages of 2 or 4 MiB that were entered, by a hash of their address: invalidating one concerns all its parts.
    large: [u64; 64],
    /// Pages of 1 GiB, likewise.
    huge: u64,
}

/// The bit of a 2 MiB stretch in [`Tlb::large`].
fn large_bit(linear: u64) -> (usize, u64) {
    let hash = (linear >> 21) as usize & 0xfff;
    (hash / 64, 1 << (hash % 64))
}

/// The bit of a 1 GiB stretch in [`Tlb::huge`].
fn huge_bit(linear: u64) -> u64 {
    1 << (linear >> 30 & 63)
}

impl Tlb {
    /// Empty buffers.
    pub(crate) fn new() -> Self {
        let first = Space {
            buffers: Buffers::new(),
            pcid: Some(0),
            used: 0,
        };
        let mut tlb = Self {
            data: [std::ptr::null(); 2],
            fetch: [std::ptr::null(); 2],
            epoch: 0,
            kind: Kind::Supervisor,
            high: Buffers::new(),
            spaces: vec![first],
            current: 0,
            switches: 0,
            high_local: false,
            low_global: false,
            large: [0; 64],
            huge: 0,
        };
        tlb.point();
        tlb
    }

    /// Chooses the buffers for accesses with the current privilege. `smap` keeps supervisor accesses from user pages.
    pub(crate) fn select(&mut self, user: bool, smap: bool) {
        let kind = Kind::new(user, smap);
        if kind != self.kind {
            self.kind = kind;
            self.point();
        }
    }

    /// Derives the pointers of the hot paths.
    fn point(&mut self) {
        let low = &self.spaces[self.current].buffers;
        let (data, fetch) = (self.kind as usize, usize::from(self.kind != Kind::User));
        self.data = [low.data[data].as_ptr(), self.high.data[data].as_ptr()];
        self.fetch = [low.fetch[fetch].as_ptr(), self.high.fetch[fetch].as_ptr()];
    }

    /// Empties all buffers.
    pub(crate) fn flush_all(&mut self) {
        self.epoch += 1;
        self.high.flush();
        self.high_local = false;
        self.spaces.iter_mut().for_each(|s| s.buffers.flush());
        self.low_global = false;
        self.large = [0; 64];
        self.huge = 0;
    }

    /// Forgets what is not global (INVPCID type 3).
    pub(crate) fn flush_local(&mut self) {
        if self.low_global {
            return self.flush_all();
        }
        self.epoch += 1;
        self.spaces.iter_mut().for_each(|s| s.buffers.flush());
        self.flush_high_local();
    }

    fn flush_high_local(&mut self) {
        if self.high_local {
            self.high.flush();
            self.high_local = false;
        }
    }

    /// Forgets what is not global of one PCID (INVPCID type 1).
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.epoch += 1;
        for space in &mut self.spaces {
            if space.pcid == Some(pcid) {
                space.buffers.flush();
            }
        }
        self.flush_high_local();
    }

    /// CR3 has been loaded: the address space is now that of `pcid` (0 where there are none), whose entries are kept or not.
    pub(crate) fn switch(&mut self, pcid: u16, keep: bool) {
        self.epoch += 1;
        self.switches += 1;
        self.flush_high_local();
        let known = self.spaces.iter().position(|s| s.pcid == Some(pcid));
        let index = known.unwrap_or_else(|| self.space_to_reuse());
        let space = &mut self.spaces[index];
        if known.is_none() || !keep {
            space.buffers.flush();
        }
        space.pcid = Some(pcid);
        space.used = self.switches;
        self.current = index;
        self.point();
    }

    fn space_to_reuse(&mut self) -> usize {
        if self.spaces.len() < SPACES {
            self.spaces.push(Space {
                buffers: Buffers::new(),
                pcid: None,
                used: 0,
            });
            return self.spaces.len() - 1;
        }
        let all = self.spaces.iter().enumerate();
        all.min_by_key(|(_, s)| s.used).map_or(0, |(i, _)| i)
    }

    /// Forgets one page in the current address space and, if it is global, in all (INVLPG); `pcid` names another space than
    /// the current one (INVPCID type 0).
    pub(crate) fn flush_page(&mut self, linear: u64, pcid: Option<u16>) {
        let (word, bit) = large_bit(linear);
        if self.large[word] & bit != 0 || self.huge & huge_bit(linear) != 0 {
            return self.flush_all();
        }
        self.epoch += 1;
        let page = linear & !(PAGE_SIZE - 1);
        if linear >> 63 != 0 {
            self.high.flush_page(page);
            return;
        }
        let current = self.spaces[self.current].pcid;
        let pcid = pcid.or(current);
        for space in &mut self.spaces {
            if self.low_global || space.pcid == pcid {
                space.buffers.flush_page(page);
            }
        }
    }

    fn note(&mut self, page: &Entered) {
        if page.linear >> 63 != 0 {
            self.high_local |= !page.global;
        } else {
            self.low_global |= page.global;
        }
        if page.shift >= 30 {
            self.huge |= huge_bit(page.linear);
        } else if page.shift >= 21 {
            // A 4 MiB page is two stretches of 2 MiB, and both may be asked for.
            let mask = (1u64 << page.shift) - 1;
            let base = page.linear & !mask;
            for part in (0..=mask).step_by(1 << 21) {
                let (word, bit) = large_bit(base + part);
                self.large[word] |= bit;
            }
        }
    }

    fn half(&mut self, linear: u64) -> &mut Buffers {
        if linear >> 63 != 0 {
            &mut self.high
        } else {
            &mut self.spaces[self.current].buffers
        }
    }

    /// Enters a page for data accesses. `read` and `write` say which ones may hit from now on; a right that an entry of the
    /// same page has already stays.
    pub(crate) fn enter_data(&mut self, kind: Kind, page: &Entered, read: bool, write: bool) {
        self.note(page);
        let slot = data_slot(page.linear);
        let tag = page.linear & !(PAGE_SIZE - 1);
        let buffers = self.half(page.linear);
        let entry = &mut buffers.data[kind as usize][slot];
        let same = (entry.read == tag || entry.write == tag) && entry.host == page.host;
        if !same {
            entry.read = invalid(slot);
            entry.write = invalid(slot);
        }
        if read {
            entry.read = tag;
        }
        if write {
            entry.write = tag;
        }
        entry.host = page.host;
        entry.flag = page.flag;
        buffers.cold[kind as usize][slot] = Cold {
            physical: page.physical,
        };
        buffers.note(kind as u8, slot);
    }

    /// Enters a page for instruction fetches.
    pub(crate) fn enter_fetch(&mut self, user: bool, page: &Entered) {
        self.note(page);
        let slot = fetch_slot(page.linear);
        let buffers = self.half(page.linear);
        let tag = page.linear & !(PAGE_SIZE - 1);
        let which = usize::from(!user);
        buffers.fetch[which][slot] = FetchEntry {
            tag,
            host: page.host,
        };
        buffers.note(which as u8 + 3, slot);
    }

    #[inline(always)]
    fn data(&self, linear: u64) -> &DataEntry {
        // SAFETY: both pointers are to arrays of DATA_ENTRIES of our own boxes, which live and stay where they are.
        unsafe { &*self.data[(linear >> 63) as usize].add(data_slot(linear)) }
    }

    /// The host address for a read of `size` bytes, if the page is there.
    #[inline(always)]
    pub(crate) fn read_hit(&self, linear: u64, size: usize) -> Option<*mut u8> {
        let entry = self.data(linear);
        let offset = linear.wrapping_sub(entry.read);
        (offset <= PAGE_SIZE - size as u64).then(|| entry.host.wrapping_add(offset as usize))
    }

    /// The host address and the page's flag for a write of `size` bytes, if the page is there.
    #[inline(always)]
    pub(crate) fn write_hit(&self, linear: u64, size: usize) -> Option<(*mut u8, *const AtomicU8)> {
        let entry = self.data(linear);
        let offset = linear.wrapping_sub(entry.write);
        (offset <= PAGE_SIZE - size as u64)
            .then(|| (entry.host.wrapping_add(offset as usize), entry.flag))
    }

    /// Everything that is known of a page: physical address, host address, flag byte. `None` unless the access would hit with
    /// the rights of `kind`.
    #[inline]
    pub(crate) fn data_page(&self, kind: Kind, linear: u64, write: bool) -> Option<Entered> {
        let slot = data_slot(linear);
        let high = linear >> 63 != 0;
        let buffers = if high {
            &self.high
        } else {
            &self.spaces[self.current].buffers
        };
        let entry = &buffers.data[kind as usize][slot];
        let tag = if write { entry.write } else { entry.read };
        (tag == linear & !(PAGE_SIZE - 1)).then(|| Entered {
            linear: tag,
            physical: buffers.cold[kind as usize][slot].physical,
            host: entry.host,
            flag: entry.flag,
            global: false,
            shift: 12,
        })
    }

    /// The rights in use.
    #[inline]
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The host address of the page that an instruction is fetched from, if the page is there.
    #[inline(always)]
    pub(crate) fn fetch_hit(&self, linear: u64) -> Option<*const u8> {
        // SAFETY: as in `data`, with FETCH_ENTRIES.
        let entry = unsafe { &*self.fetch[(linear >> 63) as usize].add(fetch_slot(linear)) };
        (entry.tag == linear & !(PAGE_SIZE - 1)).then_some(entry.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIGH: u64 = 0xffff_8880_0000_0000;

    fn page(linear: u64, global: bool, shift: u32) -> Entered {
        Entered {
            linear,
            physical: 0x5000,
            host: 0x7000_0000 as *mut u8,
            flag: std::ptr::null(),
            global,
            shift,
        }
    }

    fn enter(tlb: &mut Tlb, linear: u64, global: bool, shift: u32) {
        tlb.enter_data(Kind::Supervisor, &page(linear, global, shift), true, true);
    }

    #[test]
    fn hits_inside_the_page_and_nowhere_else() {
        let mut t = Tlb::new();
        for fresh in [0, 0x1000, 0x40_0000, HIGH, u64::MAX - 7] {
            assert!(t.read_hit(fresh, 1).is_none() && t.fetch_hit(fresh).is_none());
        }
        enter(&mut t, 0x1234, false, 12);
        assert_eq!(t.read_hit(0x1ff8, 8), Some(0x7000_0ff8 as *mut u8));
        assert!(t.read_hit(0x1ff9, 8).is_none());
        assert!(t.read_hit(0xfff, 1).is_none() && t.read_hit(0x2000, 1).is_none());
        assert!(t.read_hit(0x40_1000, 1).is_none());
        assert!(t.read_hit(0x8000_0000_0000_1000, 1).is_none());
        t.select(true, false);
        assert!(t.read_hit(0x1000, 1).is_none());
        t.enter_data(Kind::User, &page(0x1000, false, 12), true, false);
        assert!(t.read_hit(0x1000, 1).is_some() && t.write_hit(0x1000, 1).is_none());
        t.enter_fetch(true, &page(0x1000, false, 12));
        assert!(t.fetch_hit(0x1abc).is_some());
        t.select(false, true);
        assert!(t.fetch_hit(0x1abc).is_none() && t.read_hit(0x1000, 1).is_none());
    }

    #[test]
    fn address_spaces_are_kept_by_pcid() {
        let mut t = Tlb::new();
        t.switch(1, false);
        enter(&mut t, 0x1000, false, 12);
        enter(&mut t, HIGH, true, 12);
        t.switch(2, true);
        assert!(t.read_hit(0x1000, 1).is_none());
        assert!(t.read_hit(HIGH, 1).is_some());
        t.switch(1, true);
        assert!(t.read_hit(0x1000, 1).is_some());
        t.switch(1, false);
        assert!(t.read_hit(0x1000, 1).is_none());
        // Pages of the upper half that are not global go.
        enter(&mut t, HIGH + 0x1000, false, 12);
        t.switch(1, true);
        assert!(t.read_hit(HIGH + 0x1000, 1).is_none());
        // More spaces than there is room for.
        t.switch(1, true);
        enter(&mut t, 0x3000, false, 12);
        for pcid in 2..20 {
            t.switch(pcid, true);
            assert!(t.read_hit(0x3000, 1).is_none());
        }
        t.switch(1, true);
        assert!(t.read_hit(0x3000, 1).is_none());
    }

    #[test]
    fn invalidation_of_pages_and_contexts() {
        let mut t = Tlb::new();
        t.switch(1, false);
        enter(&mut t, 0x1000, false, 12);
        enter(&mut t, 0x2000, false, 12);
        t.switch(2, true);
        enter(&mut t, 0x1000, false, 12);
        t.flush_page(0x1fff, None);
        assert!(t.read_hit(0x1000, 1).is_none());
        t.switch(1, true);
        assert!(t.read_hit(0x1000, 1).is_some());
        t.switch(2, true);
        t.flush_page(0x1000, Some(1));
        t.switch(1, true);
        assert!(t.read_hit(0x1000, 1).is_none() && t.read_hit(0x2000, 1).is_some());
        t.switch(2, true);
        t.flush_pcid(1);
        t.switch(1, true);
        assert!(t.read_hit(0x2000, 1).is_none());
        // A global page of the lower half is invalidated in all spaces.
        enter(&mut t, 0x5000, true, 12);
        t.switch(2, true);
        enter(&mut t, 0x5000, true, 12);
        t.flush_page(0x5000, None);
        t.switch(1, true);
        assert!(t.read_hit(0x5000, 1).is_none());
    }

    #[test]
    fn parts_of_large_pages_go_together() {
        for shift in [21, 22, 30] {
            let mut t = Tlb::new();
            enter(&mut t, HIGH + 0x3000, true, shift);
            enter(&mut t, HIGH + (1 << shift) - 0x1000, true, shift);
            enter(&mut t, 0x1000, false, 12);
            t.flush_page(HIGH + 0x8000, None);
            assert!(t.read_hit(HIGH + 0x3000, 1).is_none());
            assert!(t.read_hit(HIGH + (1 << shift) - 0x1000, 1).is_none());
        }
    }

    #[test]
    fn a_long_journal_is_as_good_as_a_short_one() {
        let mut t = Tlb::new();
        for n in 0..3 * JOURNAL as u64 {
            enter(&mut t, n << 12, false, 12);
        }
        t.flush_local();
        for n in 0..3 * JOURNAL as u64 {
            assert!(t.read_hit(n << 12, 1).is_none());
        }
    }
}
