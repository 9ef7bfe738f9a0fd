//! The table of indirect jumps: from a guest address to the translated code of what is there.
//!
//! Translated code looks itself up in it. A key stands for the mode and the translations that an entry is good for; its upper
//! 16 bits are an even number that is not zero, the low 16 spread the entries of equal addresses. An entry is found by the low
//! bits of address and key, added up; its tag is the negative of the sum. Sums of different keys differ by more than two
//! canonical addresses can, so that no two are equal and none is zero.

use std::collections::HashMap;

/// Entries.
const ENTRIES: usize = 1 << 16;
/// Keys that are found without a search.
const RECENT: usize = 16;

/// What is found: a tag, and where the code is. They share a line of the host's cache.
pub(crate) type Jump = [u64; 2];

/// Bytes from a tag to the address of the code.
pub(crate) const CODE: i32 = 8;

/// See the module.
pub(crate) struct Jumps {
    entries: Box<[Jump]>,
    keys: HashMap<(u16, u64), u64>,
    /// Keys that were asked for lately, by the low bits of what they stand for.
    recent: [((u16, u64), u64); RECENT],
    /// Translated code mixes the bits of addresses.
    mixes: bool,
}

impl Jumps {
    /// An empty table.
    pub(crate) fn new() -> Self {
        Self {
            entries: vec![[0; 2]; ENTRIES].into_boxed_slice(),
            keys: HashMap::new(),
            recent: [((0, 0), 0); RECENT],
            mixes: super::stubs::has_rorx(),
        }
    }

    /// Where translated code looks.
    pub(crate) fn as_ptr(&self) -> *const Jump {
        self.entries.as_ptr()
    }

    /// The key of a mode and of a version of the translations.
    pub(crate) fn key(&mut self, of: (u16, u64)) -> u64 {
        let recent = (u64::from(of.0) ^ of.1) as usize % RECENT;
        if self.recent[recent].0 == of && self.recent[recent].1 != 0 {
            return self.recent[recent].1;
        }
        let key = self.find_key(of);
        self.recent[recent] = (of, key);
        key
    }

    fn find_key(&mut self, of: (u16, u64)) -> u64 {
        if let Some(key) = self.keys.get(&of) {
            return *key;
        }
        if self.keys.len() == 0x7ffe {
            self.clear();
        }
        let number = 2 * (self.keys.len() as u64 + 1);
        let key = number << 48 | number.wrapping_mul(0x9e37) & 0xffff;
        self.keys.insert(of, key);
        key
    }

    /// Enters code.
    pub(crate) fn enter(&mut self, rip: u64, key: u64, code: u64) {
        let sum = rip.wrapping_add(key);
        let mixed = if self.mixes {
            sum.wrapping_add(sum.rotate_right(16))
        } else {
            sum
        };
        let at = mixed as usize & (ENTRIES - 1);
        self.entries[at] = [sum.wrapping_neg(), code];
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.fill([0; 2]);
        self.keys.clear();
        self.recent = [((0, 0), 0); RECENT];
    }
}
