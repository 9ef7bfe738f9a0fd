//! Translation buffers: their layout, the look-ups of the hot paths, and what flushes empty.
//!
//! Buffers exist for each *kind* of access rights. Those for user privilege belong to one of several address spaces, named by
//! PCID, so that a switch of CR3 need not throw them away. Those for supervisor privilege are shared by all address spaces:
//! kernels map themselves by global pages; what is not global in them goes with a switch of CR3. Each is one table with
//! one base pointer, so that translated code looks an address up without asking which half of the address space it is in.

use std::sync::atomic::AtomicU8;

use guest_memory::PAGE_SIZE;

use super::recent::RecentPages;

/// Entries of a data buffer.
pub(crate) const DATA_ENTRIES: usize = 8192;
/// Entries of an instruction buffer.
pub(crate) const FETCH_ENTRIES: usize = 1024;
/// Address spaces whose user pages are kept. Linux uses six PCIDs at a time.
const SPACES: usize = 6;
/// More filled slots than this are not remembered one by one.
const JOURNAL: usize = 4096;
/// Number of the data buffers in the journal; larger numbers are instruction buffers.
const DATA_KINDS: u8 = 2;

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

/// The tag that no access hits in this slot: an address that belongs to another slot. Zero nearly everywhere, so that fresh
/// memory is an empty buffer.
const fn invalid(slot: usize) -> u64 {
    if slot == 0 { PAGE_SIZE } else { 0 }
}

/// Rotation of an address by which higher bits are mixed into its slot, so that copies between places which are a multiple of
/// the buffer's reach apart do not drive one another out.
pub(crate) const SLOT_ROTATION: u32 = 13;

/// The slot of an address in a data buffer. Translated code does the same.
#[inline(always)]
const fn data_slot(linear: u64) -> usize {
    ((linear ^ linear.rotate_right(SLOT_ROTATION)) >> 12) as usize & (DATA_ENTRIES - 1)
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

    /// The number of the buffer among those of its domain.
    fn index(self) -> u8 {
        u8::from(self == Self::Guarded)
    }
}

/// One buffer of data pages.
struct DataBuffer {
    entries: Box<[DataEntry]>,
    /// Physical addresses of the pages, which the hot paths do not look at.
    physical: Box<[u64]>,
}

/// A zeroed array that takes memory only as it is touched.
fn zeroed<T: Copy>(count: usize) -> Box<[T]> {
    let layout = std::alloc::Layout::array::<T>(count).expect("a small array");
    // SAFETY: used for integers, and for entries of integers and raw pointers, of which all-zero bytes are a value; the box
    // takes over an allocation of exactly its layout.
    unsafe {
        let at = std::alloc::alloc_zeroed(layout).cast::<T>();
        if at.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Box::from_raw(std::ptr::slice_from_raw_parts_mut(at, count))
    }
}

impl DataBuffer {
    fn new() -> Self {
        let mut new = Self {
            entries: zeroed(DATA_ENTRIES),
            physical: zeroed(DATA_ENTRIES),
        };
        new.clear(0);
        new
    }

    fn clear(&mut self, slot: usize) {
        let entry = &mut self.entries[slot];
        entry.read = invalid(slot);
        entry.write = invalid(slot);
    }
}

/// The buffers that go with one set of translations: the user pages of an address space, or the supervisor's pages.
struct Domain {
    data: Vec<DataBuffer>,
    fetch: Box<[FetchEntry]>,
    /// Filled slots of global pages: buffer and slot. Full: nobody knows which.
    journal: Vec<(u8, u16)>,
    /// The same of pages that are not global.
    local: Vec<(u8, u16)>,
    /// Pages that were fetched from under the current version, by a hash of their address.
    fetched: [u64; 64],
    /// What was learnt from fetching is good while this number is the same. Never used for another domain or again.
    version: u64,
}

/// The bit of a page in [`Domain::fetched`].
fn fetched_bit(linear: u64) -> (usize, u64) {
    let hash = (linear >> 12 ^ linear >> 24) as usize & 0xfff;
    (hash / 64, 1 << (hash % 64))
}

impl Domain {
    fn new(kinds: usize) -> Self {
        let mut new = Self {
            data: (0..kinds).map(|_| DataBuffer::new()).collect(),
            fetch: zeroed(FETCH_ENTRIES),
            journal: Vec::new(),
            local: Vec::new(),
            fetched: [0; 64],
            version: 0,
        };
        new.clear(DATA_KINDS, 0);
        new
    }

    fn clear(&mut self, which: u8, slot: usize) {
        if which < DATA_KINDS {
            self.data[usize::from(which)].clear(slot);
        } else {
            self.fetch[slot].tag = invalid(slot);
        }
    }

    fn clear_all(&mut self) {
        self.journal.clear();
        self.local.clear();
        for which in 0..self.data.len() as u8 {
            (0..DATA_ENTRIES).for_each(|slot| self.clear(which, slot));
        }
        (0..FETCH_ENTRIES).for_each(|slot| self.clear(DATA_KINDS, slot));
    }

    fn flush(&mut self, next: &mut u64) {
        self.stale_code(next);
        if self.journal.len() >= JOURNAL || self.local.len() >= JOURNAL {
            return self.clear_all();
        }
        while let Some((which, slot)) = self.journal.pop().or_else(|| self.local.pop()) {
            self.clear(which, usize::from(slot));
        }
    }

    /// Forgets what is not global.
    fn flush_local(&mut self, next: &mut u64) {
        if self.local.len() >= JOURNAL {
            return self.flush(next);
        }
        let mut code = false;
        while let Some((which, slot)) = self.local.pop() {
            code |= which >= DATA_KINDS;
            self.clear(which, usize::from(slot));
        }
        if code {
            self.stale_code(next);
        }
    }

    /// What was learnt from fetching is no longer sure.
    fn stale_code(&mut self, next: &mut u64) {
        if self.version == 0 || self.fetched.iter().any(|word| *word != 0) {
            *next += 1;
            self.version = *next;
            self.fetched = [0; 64];
        }
    }

    fn flush_page(&mut self, page: u64, next: &mut u64) {
        let slot = data_slot(page);
        for buffer in &mut self.data {
            let entry = &buffer.entries[slot];
            if entry.read == page || entry.write == page {
                buffer.clear(slot);
            }
        }
        let slot = fetch_slot(page);
        if self.fetch[slot].tag == page {
            self.clear(DATA_KINDS, slot);
        }
        let (word, bit) = fetched_bit(page);
        if self.fetched[word] & bit != 0 {
            self.stale_code(next);
        }
    }

    fn note(&mut self, which: u8, slot: usize, global: bool) {
        let journal = if global {
            &mut self.journal
        } else {
            &mut self.local
        };
        if journal.len() < JOURNAL {
            journal.push((which, slot as u16));
        }
    }
}

/// The user pages of an address space.
struct Space {
    domain: Domain,
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
#[repr(C)]
pub(crate) struct Tlb {
    /// The data buffer in use. Translated code reads this.
    pub(crate) data: *const DataEntry,
    /// The instruction buffer in use.
    fetch: *const FetchEntry,
    /// A number for the translations that instructions are fetched by: what was learnt from a fetch holds while it is the
    /// same, and again when it is the same again.
    pub(crate) version: u64,
    /// The pages that translated code has touched last.
    pub(crate) recent: RecentPages,
    all: Box<All>,
}

/// What the hot paths do not look at.
struct All {
    kind: Kind,
    supervisor: Domain,
    spaces: Vec<Space>,
    /// Index of the space in use.
    current: usize,
    switches: u64,
    /// User pages of some space are global: invalidating one concerns all spaces.
    user_global: bool,
    /// Pages of 2 or 4 MiB that were entered, by a hash of their address: invalidating one concerns all its parts.
    large: [u64; 64],
    /// Pages of 1 GiB, likewise.
    huge: u64,
    /// The last version given out.
    last_version: u64,
}

/// The bit of a 2 MiB stretch in [`All::large`].
fn large_bit(linear: u64) -> (usize, u64) {
    let hash = (linear >> 21) as usize & 0xfff;
    (hash / 64, 1 << (hash % 64))
}

/// The bit of a 1 GiB stretch in [`All::huge`].
fn huge_bit(linear: u64) -> u64 {
    1 << (linear >> 30 & 63)
}

impl All {
    fn note(&mut self, user: bool, page: &Entered) {
        self.user_global |= user && page.global;
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

    fn domain(&mut self, user: bool) -> &mut Domain {
        if user {
            &mut self.spaces[self.current].domain
        } else {
            &mut self.supervisor
        }
    }

    fn space_to_reuse(&mut self) -> usize {
        if self.spaces.len() < SPACES {
            self.spaces.push(Space {
                domain: Domain::new(1),
                pcid: None,
                used: 0,
            });
            return self.spaces.len() - 1;
        }
        let all = self.spaces.iter().enumerate();
        all.min_by_key(|(_, s)| s.used).map_or(0, |(i, _)| i)
    }
}

impl Tlb {
    /// Empty buffers.
    pub(crate) fn new() -> Self {
        let first = Space {
            domain: Domain::new(1),
            pcid: Some(0),
            used: 0,
        };
        let mut tlb = Self {
            data: std::ptr::null(),
            fetch: std::ptr::null(),
            version: 0,
            recent: RecentPages::new(),
            all: Box::new(All {
                kind: Kind::Supervisor,
                supervisor: Domain::new(2),
                spaces: vec![first],
                current: 0,
                switches: 0,
                user_global: false,
                large: [0; 64],
                huge: 0,
                last_version: 0,
            }),
        };
        tlb.flush_all();
        tlb
    }

    /// Something is learnt from fetching from a page that is in the buffer in use, under the current version.
    #[inline]
    pub(crate) fn note_fetched(&mut self, linear: u64) {
        let user = self.all.kind == Kind::User;
        let (word, bit) = fetched_bit(linear);
        self.all.domain(user).fetched[word] |= bit;
    }

    /// Chooses the buffers for accesses with the current privilege. `smap` keeps supervisor accesses from user pages.
    pub(crate) fn select(&mut self, user: bool, smap: bool) {
        let kind = Kind::new(user, smap);
        if kind != self.all.kind {
            self.recent.forget_supervisor();
            self.all.kind = kind;
            self.point();
        }
    }

    /// Some translations are no longer good: derives what the hot paths go by.
    fn forget_and_point(&mut self) {
        self.recent.forget();
        self.point();
    }

    /// Derives what the hot paths go by.
    fn point(&mut self) {
        let kind = self.all.kind;
        let domain = self.all.domain(kind == Kind::User);
        let data = domain.data[usize::from(kind.index())].entries.as_ptr();
        let (fetch, version) = (domain.fetch.as_ptr(), domain.version);
        self.data = data;
        self.fetch = fetch;
        self.version = version;
    }

    /// What was learnt from fetching is no longer sure, for another reason than a change of translations.
    pub(crate) fn stale_code(&mut self) {
        let all = &mut *self.all;
        let next = &mut all.last_version;
        for domain in all
            .spaces
            .iter_mut()
            .map(|s| &mut s.domain)
            .chain([&mut all.supervisor])
        {
            *next += 1;
            domain.version = *next;
        }
        self.forget_and_point();
    }

    /// Empties all buffers.
    pub(crate) fn flush_all(&mut self) {
        let all = &mut *self.all;
        let next = &mut all.last_version;
        all.supervisor.flush(next);
        all.spaces.iter_mut().for_each(|s| s.domain.flush(next));
        all.user_global = false;
        all.large = [0; 64];
        all.huge = 0;
        self.forget_and_point();
    }

    /// Forgets what is not global (INVPCID type 3).
    pub(crate) fn flush_local(&mut self) {
        let all = &mut *self.all;
        let next = &mut all.last_version;
        all.spaces
            .iter_mut()
            .for_each(|s| s.domain.flush_local(next));
        all.supervisor.flush_local(next);
        self.forget_and_point();
    }

    /// Forgets what is not global of one PCID (INVPCID type 1).
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        let all = &mut *self.all;
        let next = &mut all.last_version;
        for space in &mut all.spaces {
            if space.pcid == Some(pcid) {
                space.domain.flush_local(next);
            }
        }
        all.supervisor.flush_local(next);
        self.forget_and_point();
    }

    /// CR3 has been loaded: the address space is now that of `pcid` (0 where there are none), whose entries are kept or not.
    pub(crate) fn switch(&mut self, pcid: u16, keep: bool) {
        let all = &mut *self.all;
        all.switches += 1;
        all.supervisor.flush_local(&mut all.last_version);
        let known = all.spaces.iter().position(|s| s.pcid == Some(pcid));
        let index = known.unwrap_or_else(|| all.space_to_reuse());
        let space = &mut all.spaces[index];
        if known.is_none() || !keep {
            space.domain.flush(&mut all.last_version);
        }
        space.pcid = Some(pcid);
        space.used = all.switches;
        all.current = index;
        self.forget_and_point();
    }

    /// Forgets one page in the current address space and, if it is global, in all (INVLPG); `pcid` names another space than
    /// the current one (INVPCID type 0).
    pub(crate) fn flush_page(&mut self, linear: u64, pcid: Option<u16>) {
        let (word, bit) = large_bit(linear);
        if self.all.large[word] & bit != 0 || self.all.huge & huge_bit(linear) != 0 {
            return self.flush_all();
        }
        let all = &mut *self.all;
        let next = &mut all.last_version;
        let page = linear & !(PAGE_SIZE - 1);
        all.supervisor.flush_page(page, next);
        let pcid = pcid.or(all.spaces[all.current].pcid);
        for space in &mut all.spaces {
            if all.user_global || space.pcid == pcid {
                space.domain.flush_page(page, next);
            }
        }
        self.forget_and_point();
    }

    /// Enters a page for data accesses. `read` and `write` say which ones may hit from now on; a right that an entry of the
    /// same page has already stays.
    pub(crate) fn enter_data(&mut self, kind: Kind, page: &Entered, read: bool, write: bool) {
        let user = kind == Kind::User;
        self.all.note(user, page);
        let slot = data_slot(page.linear);
        let tag = page.linear & !(PAGE_SIZE - 1);
        let domain = self.all.domain(user);
        let buffer = &mut domain.data[usize::from(kind.index())];
        let entry = &mut buffer.entries[slot];
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
        buffer.physical[slot] = page.physical;
        domain.note(kind.index(), slot, page.global);
    }

    /// Enters a page for instruction fetches.
    pub(crate) fn enter_fetch(&mut self, user: bool, page: &Entered) {
        self.all.note(user, page);
        let slot = fetch_slot(page.linear);
        let tag = page.linear & !(PAGE_SIZE - 1);
        let domain = self.all.domain(user);
        domain.fetch[slot] = FetchEntry {
            tag,
            host: page.host,
        };
        let (word, bit) = fetched_bit(tag);
        domain.fetched[word] |= bit;
        domain.note(DATA_KINDS, slot, page.global);
    }

    #[inline(always)]
    fn entry(&self, linear: u64) -> &DataEntry {
        // SAFETY: the pointer is to DATA_ENTRIES entries of our own boxes, which live and stay where they are.
        unsafe { &*self.data.add(data_slot(linear)) }
    }

    /// The host address for a read of `size` bytes, if the page is there.
    #[inline(always)]
    pub(crate) fn read_hit(&self, linear: u64, size: usize) -> Option<*mut u8> {
        let entry = self.entry(linear);
        let offset = linear.wrapping_sub(entry.read);
        (offset <= PAGE_SIZE - size as u64).then(|| entry.host.wrapping_add(offset as usize))
    }

    /// The host address and the page's flag for a write of `size` bytes, if the page is there.
    #[inline(always)]
    pub(crate) fn write_hit(&self, linear: u64, size: usize) -> Option<(*mut u8, *const AtomicU8)> {
        let entry = self.entry(linear);
        let offset = linear.wrapping_sub(entry.write);
        (offset <= PAGE_SIZE - size as u64)
            .then(|| (entry.host.wrapping_add(offset as usize), entry.flag))
    }

    /// Everything that is known of a page: physical address, host address, flag byte. `None` unless the access would hit with
    /// the rights of `kind`.
    #[inline]
    pub(crate) fn data_page(&self, kind: Kind, linear: u64, write: bool) -> Option<Entered> {
        let slot = data_slot(linear);
        let domain = if kind == Kind::User {
            &self.all.spaces[self.all.current].domain
        } else {
            &self.all.supervisor
        };
        let buffer = &domain.data[usize::from(kind.index())];
        let entry = &buffer.entries[slot];
        let tag = if write { entry.write } else { entry.read };
        (tag == linear & !(PAGE_SIZE - 1)).then(|| Entered {
            linear: tag,
            physical: buffer.physical[slot],
            host: entry.host,
            flag: entry.flag,
            global: false,
            shift: 12,
        })
    }

    /// The rights in use.
    #[inline]
    pub(crate) fn kind(&self) -> Kind {
        self.all.kind
    }

    /// The host address of the page that an instruction is fetched from, if the page is there.
    #[inline(always)]
    pub(crate) fn fetch_hit(&self, linear: u64) -> Option<*const u8> {
        // SAFETY: as in `entry`, with FETCH_ENTRIES.
        let entry = unsafe { &*self.fetch.add(fetch_slot(linear)) };
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
        let kind = tlb.kind();
        tlb.enter_data(kind, &page(linear, global, shift), true, true);
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
        assert!(t.read_hit(0x200_1000, 1).is_none());
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

    /// User and supervisor entries of one address space.
    fn both(t: &Tlb, linear: u64) -> [bool; 2] {
        [Kind::User, Kind::Supervisor].map(|kind| t.data_page(kind, linear, false).is_some())
    }

    fn enter_both(t: &mut Tlb, linear: u64, global: bool) {
        for kind in [Kind::User, Kind::Supervisor] {
            t.enter_data(kind, &page(linear, global, 12), true, true);
        }
    }

    #[test]
    fn address_spaces_are_kept_by_pcid() {
        let mut t = Tlb::new();
        t.switch(1, false);
        enter_both(&mut t, 0x1000, false);
        t.enter_data(Kind::Supervisor, &page(HIGH, true, 12), true, true);
        t.switch(2, true);
        assert_eq!(both(&t, 0x1000), [false, false]);
        assert_eq!(both(&t, HIGH), [false, true]);
        t.switch(1, true);
        assert_eq!(both(&t, 0x1000), [true, false]);
        t.switch(1, false);
        assert_eq!(both(&t, 0x1000), [false, false]);
        // The supervisor's pages that are not global go.
        enter_both(&mut t, HIGH + 0x1000, false);
        t.switch(1, true);
        assert_eq!(both(&t, HIGH + 0x1000), [true, false]);
        // More spaces than there is room for.
        t.switch(1, true);
        enter_both(&mut t, 0x3000, false);
        for pcid in 2..20 {
            t.switch(pcid, true);
            assert_eq!(both(&t, 0x3000), [false, false]);
        }
        t.switch(1, true);
        assert_eq!(both(&t, 0x3000), [false, false]);
    }

    #[test]
    fn invalidation_of_pages_and_contexts() {
        let mut t = Tlb::new();
        t.switch(1, false);
        enter_both(&mut t, 0x1000, false);
        enter_both(&mut t, 0x2000, false);
        t.switch(2, true);
        enter_both(&mut t, 0x1000, false);
        t.flush_page(0x1fff, None);
        assert_eq!(both(&t, 0x1000), [false, false]);
        t.switch(1, true);
        assert_eq!(both(&t, 0x1000), [true, false]);
        t.switch(2, true);
        t.flush_page(0x1000, Some(1));
        t.switch(1, true);
        assert_eq!(both(&t, 0x1000), [false, false]);
        assert_eq!(both(&t, 0x2000), [true, false]);
        t.switch(2, true);
        t.flush_pcid(1);
        t.switch(1, true);
        assert_eq!(both(&t, 0x2000), [false, false]);
        // A global user page is invalidated in all spaces.
        enter_both(&mut t, 0x5000, true);
        t.switch(2, true);
        enter_both(&mut t, 0x5000, true);
        t.flush_page(0x5000, None);
        t.switch(1, true);
        assert_eq!(both(&t, 0x5000), [false, false]);
    }

    #[test]
    fn versions_change_only_for_what_was_fetched_and_come_back() {
        let mut t = Tlb::new();
        let fetch = |t: &mut Tlb, user, linear, global| {
            t.enter_fetch(user, &page(linear, global, 12));
        };
        fetch(&mut t, false, HIGH, true);
        let supervisor = t.version;
        t.select(true, false);
        let fresh = t.version;
        assert_ne!(fresh, supervisor);
        fetch(&mut t, true, 0x1000, false);
        t.switch(7, true);
        let other = t.version;
        assert_ne!(other, fresh);
        t.switch(0, true);
        assert_eq!(t.version, fresh);
        t.flush_page(0x2000, None);
        assert_eq!(t.version, fresh);
        t.flush_page(0x1000, None);
        assert_ne!(t.version, fresh);
        t.select(false, false);
        assert_eq!(t.version, supervisor);
        fetch(&mut t, false, 0x1000, false);
        t.switch(7, true);
        assert_ne!(t.version, supervisor);
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
