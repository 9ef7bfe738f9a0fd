//! The table of indirect jumps: from a guest address to the translated code of what is there.
//!
//! Translated code looks itself up in it. An entry is found by the low 16 bits of the address. Its tag is the negative of the
//! address and the key of the mode and translations that it is good for, added up; keys are multiples of 2^48 that are not
//! zero, so that no tag of a canonical address is zero and no two are equal.

use std::collections::HashMap;

/// Entries.
const ENTRIES: usize = 1 << 16;
/// Keys that are found without a search.
const RECENT: usize = 16;
/// Bytes from a tag to the address of the code.
pub(crate) const CODES: i32 = (ENTRIES * 8) as i32;

/// See the module.
pub(crate) struct Jumps {
    words: Box<[u64]>,
    keys: HashMap<(u16, u64), u64>,
    /// Keys that were asked for lately, by the low bits of what they stand for.
    recent: [((u16, u64), u64); RECENT],
}

impl Jumps {
    /// An empty table.
    pub(crate) fn new() -> Self {
        Self {
            words: vec![0; 2 * ENTRIES].into_boxed_slice(),
            keys: HashMap::new(),
            recent: [((0, 0), 0); RECENT],
        }
    }

    /// Where translated code looks.
    pub(crate) fn as_ptr(&self) -> *const u64 {
        self.words.as_ptr()
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
        if self.keys.len() == 0xfffe {
            self.clear();
        }
        let key = (self.keys.len() as u64 + 1) << 48;
        self.keys.insert(of, key);
        key
    }

    /// Enters code.
    pub(crate) fn enter(&mut self, rip: u64, key: u64, code: u64) {
        let at = rip as usize & (ENTRIES - 1);
        self.words[at] = rip.wrapping_add(key).wrapping_neg();
        self.words[ENTRIES + at] = code;
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
        self.keys.clear();
        self.recent = [((0, 0), 0); RECENT];
    }
}
