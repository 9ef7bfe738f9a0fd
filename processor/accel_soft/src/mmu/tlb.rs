//! Translation buffers: their layout and the look-ups of the hot paths.

use std::sync::atomic::AtomicU8;

use guest_memory::PAGE_SIZE;

/// Entries of a data buffer.
pub(crate) const DATA_ENTRIES: usize = 1024;
/// Entries of an instruction buffer.
pub(crate) const FETCH_ENTRIES: usize = 512;
/// Data buffers: user, supervisor, supervisor kept from user pages (SMAP).
const DATA_KINDS: usize = 3;

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

/// The tag that no access hits in this slot: an address that belongs to another slot.
const fn invalid(slot: usize) -> u64 {
    ((slot ^ 1) as u64) << 12
}

/// The buffers of a vCPU.
pub(crate) struct Tlb {
    /// The data buffer in use.
    data: *const DataEntry,
    /// The instruction buffer in use.
    fetch: *const FetchEntry,
    /// Rises whenever an entry goes or the buffers in use change: what was learnt from a fetch under an older number is no
    /// longer sure.
    pub(crate) epoch: u64,
    data_entries: Box<[[DataEntry; DATA_ENTRIES]; DATA_KINDS]>,
    fetch_entries: Box<[[FetchEntry; FETCH_ENTRIES]; 2]>,
}

impl Tlb {
    /// Empty buffers.
    pub(crate) fn new() -> Self {
        let data_entries = Box::new(
            [[DataEntry {
                read: 0,
                write: 0,
                host: std::ptr::null_mut(),
                flag: std::ptr::null(),
            }; DATA_ENTRIES]; DATA_KINDS],
        );
        let fetch_entries = Box::new(
            [[FetchEntry {
                tag: 0,
                host: std::ptr::null(),
            }; FETCH_ENTRIES]; 2],
        );
        let mut tlb = Self {
            data: data_entries[0].as_ptr(),
            fetch: fetch_entries[0].as_ptr(),
            epoch: 0,
            data_entries,
            fetch_entries,
        };
        tlb.flush_all();
        tlb
    }

    /// Chooses the buffers for accesses with the current privilege. `smap` keeps supervisor accesses from user pages.
    pub(crate) fn select(&mut self, user: bool, smap: bool) {
        let kind = match (user, smap) {
            (true, _) => 0,
            (false, false) => 1,
            (false, true) => 2,
        };
        let fetch = self.fetch_entries[usize::from(!user)].as_ptr();
        self.fetch = fetch;
        self.data = self.data_entries[kind].as_ptr();
    }

    /// Empties all buffers.
    pub(crate) fn flush_all(&mut self) {
        self.epoch += 1;
        for entries in self.data_entries.iter_mut() {
            for (slot, entry) in entries.iter_mut().enumerate() {
                entry.read = invalid(slot);
                entry.write = invalid(slot);
            }
        }
        for entries in self.fetch_entries.iter_mut() {
            for (slot, entry) in entries.iter_mut().enumerate() {
                entry.tag = invalid(slot);
            }
        }
    }

    #[inline(always)]
    fn data(&self, linear: u64) -> &DataEntry {
        // SAFETY: `data` points to one of our own arrays of DATA_ENTRIES.
        unsafe { &*self.data.add((linear >> 12) as usize & (DATA_ENTRIES - 1)) }
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

    /// The host address of the page that an instruction is fetched from, if the page is there.
    #[inline(always)]
    pub(crate) fn fetch_hit(&self, linear: u64) -> Option<*const u8> {
        // SAFETY: `fetch` points to one of our own arrays of FETCH_ENTRIES.
        let entry = unsafe {
            &*self
                .fetch
                .add((linear >> 12) as usize & (FETCH_ENTRIES - 1))
        };
        (entry.tag == linear & !(PAGE_SIZE - 1)).then_some(entry.host)
    }
}
