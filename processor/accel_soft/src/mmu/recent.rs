//! The pages that translated code has touched last, one for each way in which instructions name memory.
//!
//! Two instructions that name memory by the same base register mostly touch the same page. So translated code first compares
//! an address with the page that was found the last time for the same register, which takes a few cycles less than a look-up in
//! the translation buffer, and goes to the buffer only when it is another. That holds for programs; a kernel goes from object to
//! object, and only its stack is found this way.
//!
//! An entry here is a copy of one in the buffer that is in use, and may stay longer than that, as a buffer of a processor may
//! keep what it likes until it is told to forget. All entries are forgotten whenever any translation is.

use std::sync::atomic::AtomicU8;

use super::tlb::DataEntry;

/// Entries.
pub(crate) const RECENT_PAGES: usize = 50;

/// How an instruction names memory: the number of an entry.
pub(crate) mod way {
    /// By a base register, of this number, and a displacement. The stack of programs is that of register 4.
    pub(crate) const BASE: usize = 0;
    /// By a base register and an index.
    pub(crate) const INDEXED: usize = 16;
    /// By the place of the instruction, or without any base: one of [`PLAIN_WAYS`] for the number of the page, which is known.
    pub(crate) const PLAIN: usize = 32;
    pub(crate) const PLAIN_WAYS: usize = 16;
    /// Without a base in a segment that has one of its own.
    pub(crate) const SEGMENT: usize = 48;
    /// By the stack pointer, with supervisor privilege.
    pub(crate) const SUPERVISOR_STACK: usize = 49;
}

/// See the module.
#[repr(C)]
pub(crate) struct RecentPages {
    /// The entries. Translated code looks here: that for user privilege at all but the last.
    pub(crate) now: [DataEntry; RECENT_PAGES],
    /// An entry that no access hits.
    none: DataEntry,
    /// What an access would touch that hit `none`: memory of nobody.
    _nobody: Box<[u8; 8192]>,
}

impl RecentPages {
    /// Nothing is known.
    pub(crate) fn new() -> Self {
        use std::hash::{BuildHasher, RandomState};
        static NOBODY_WATCHES: AtomicU8 = AtomicU8::new(0);
        let mut nobody = Box::new([0; 8192]);
        // An address that is not canonical, as bits 47 and 63 differ, and that nobody can guess.
        let random = RandomState::new().hash_one(0);
        let tag = 1 << 63 | random >> 17 & !0xfff;
        let none = DataEntry {
            read: tag,
            write: tag,
            host: nobody.as_mut_ptr(),
            flag: &raw const NOBODY_WATCHES,
        };
        Self {
            now: [none; RECENT_PAGES],
            none,
            _nobody: nobody,
        }
    }

    /// Forgets all.
    pub(crate) fn forget(&mut self) {
        self.now = [self.none; RECENT_PAGES];
    }

    /// Forgets what other supervisor rights than those in use from now on have found.
    pub(crate) fn forget_supervisor(&mut self) {
        self.now[way::SUPERVISOR_STACK] = self.none;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_found_before_it_was_entered_and_after_it_was_forgotten() {
        let mut recent = RecentPages::new();
        let nothing = recent.now[way::BASE].read;
        assert!(nothing >> 47 & 1 != nothing >> 63);
        for way in [way::BASE, way::SUPERVISOR_STACK] {
            recent.now[way].read = 0x1000;
        }
        recent.forget_supervisor();
        assert_eq!(recent.now[way::BASE].read, 0x1000);
        assert_eq!(recent.now[way::SUPERVISOR_STACK].read, nothing);
        recent.forget();
        assert_eq!(recent.now[way::BASE].read, nothing);
    }
}
