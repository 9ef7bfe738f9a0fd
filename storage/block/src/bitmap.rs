//! Dirty bitmaps: which parts of a disk have been written since somebody last looked.

use std::cell::{Cell, RefCell};

use crate::error::{BlockError, Result};

/// The most memory that one bitmap may take, in bytes.
const MAX_BYTES: u64 = 512 << 20;

/// One bit for each granule of a disk; a set bit says that the granule may have changed.
///
/// Bitmaps are shared with `Rc` and changed through shared references; all on the disk's thread.
pub struct DirtyBitmap {
    name: String,
    shift: u32,
    size: Cell<u64>,
    words: RefCell<Vec<u64>>,
    dirty: Cell<u64>,
    enabled: Cell<bool>,
    /// A job uses it: nobody else may change or remove it.
    busy: Cell<bool>,
    /// What it says cannot be trusted: the image was not closed since it was last in use.
    inconsistent: Cell<bool>,
    persistent: Cell<bool>,
}

/// A stretch of a disk whose granules are all dirty or all clean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapRun {
    /// Whether they are dirty.
    pub dirty: bool,
    /// How far it goes from the place that was asked about, in bytes.
    pub length: u64,
}

impl DirtyBitmap {
    /// A clean bitmap for a disk of `size` bytes, with a bit for each `granularity` bytes.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if the granularity is no power of two from 512 bytes to 2 GiB, or the bitmap
    /// would take more than 512 MiB.
    pub fn new(name: impl Into<String>, size: u64, granularity: u32) -> Result<Self> {
        if !granularity.is_power_of_two() || granularity < 512 {
            let message = "Granularity must be power of 2 and at least 512";
            return Err(BlockError::invalid_argument(message));
        }
        let shift = granularity.trailing_zeros();
        let words = Self::words_for(size, shift)?;
        Ok(Self {
            name: name.into(),
            shift,
            size: Cell::new(size),
            words: RefCell::new(vec![0; words]),
            dirty: Cell::new(0),
            enabled: Cell::new(true),
            busy: Cell::new(false),
            inconsistent: Cell::new(false),
            persistent: Cell::new(false),
        })
    }

    fn words_for(size: u64, shift: u32) -> Result<usize> {
        let words = size.div_ceil(1 << shift).div_ceil(64);
        if words > MAX_BYTES / 8 {
            let message = "the dirty bitmap would be too large: use a larger granularity";
            return Err(BlockError::invalid_argument(message));
        }
        Ok(usize::try_from(words).unwrap_or(0))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes for each bit.
    pub fn granularity(&self) -> u32 {
        1 << self.shift
    }

    /// The size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// Whether it records writes.
    pub fn is_enabled(&self) -> bool {
        self.enabled.get()
    }

    /// Lets it record writes, or not.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.set(enabled);
    }

    /// Whether a job uses it.
    pub fn is_busy(&self) -> bool {
        self.busy.get()
    }

    /// Marks it as used by a job.
    pub fn set_busy(&self, busy: bool) {
        self.busy.set(busy);
    }

    /// Whether what it says cannot be trusted.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent.get()
    }

    /// Marks it as not to be trusted.
    pub fn set_inconsistent(&self) {
        self.inconsistent.set(true);
    }

    /// Whether it is to be stored in the image.
    pub fn is_persistent(&self) -> bool {
        self.persistent.get()
    }

    /// Lets it be stored in the image, or not.
    pub fn set_persistent(&self, persistent: bool) {
        self.persistent.set(persistent);
    }

    /// Bytes in dirty granules (the last one may reach past the disk's end).
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.get() << self.shift
    }

    fn granules(&self) -> u64 {
        self.size.get().div_ceil(1 << self.shift)
    }

    /// The granules that a range touches.
    fn span(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        if length == 0 || offset >= self.size.get() {
            return 0..0;
        }
        let end = offset.saturating_add(length).min(self.size.get());
        let first = offset >> self.shift;
        first..end.div_ceil(1 << self.shift).max(first)
    }

    fn change(&self, span: std::ops::Range<u64>, set: bool) {
        let mut words = self.words.borrow_mut();
        let mut changed = 0;
        let mut at = span.start;
        while at < span.end {
            let count = (64 - at % 64).min(span.end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            if let Some(word) = usize::try_from(at / 64).ok().and_then(|n| words.get_mut(n)) {
                let new = if set { *word | mask } else { *word & !mask };
                changed += u64::from((*word ^ new).count_ones());
                *word = new;
            }
            at += count;
        }
        let dirty = self.dirty.get();
        self.dirty.set(if set {
            dirty + changed
        } else {
            dirty - changed
        });
    }

    /// Marks every granule that the range touches as dirty.
    pub fn set(&self, offset: u64, length: u64) {
        self.change(self.span(offset, length), true);
    }

    /// Marks as clean every granule that lies in the range (the last granule of the disk counts as far
    /// as the disk goes).
    pub fn clear(&self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.size.get());
        let first = offset.div_ceil(1 << self.shift);
        let last = if end == self.size.get() {
            self.granules()
        } else {
            end >> self.shift
        };
        self.change(first..last.max(first), false);
    }

    /// Whether the granule at `offset` is dirty.
    pub fn is_dirty(&self, offset: u64) -> bool {
        let granule = offset >> self.shift;
        let words = self.words.borrow();
        let word = usize::try_from(granule / 64)
            .ok()
            .and_then(|n| words.get(n));
        word.is_some_and(|w| w >> (granule % 64) & 1 != 0)
    }

    /// The first granule from number `from` on, below `limit`, whose bit is `value`.
    fn find(&self, from: u64, limit: u64, value: bool) -> u64 {
        let words = self.words.borrow();
        let mut at = from;
        while at < limit {
            let word = usize::try_from(at / 64).ok().and_then(|n| words.get(n));
            let word = word.copied().unwrap_or(0);
            let looked = if value { word } else { !word } >> (at % 64);
            if looked != 0 {
                return (at + u64::from(looked.trailing_zeros())).min(limit);
            }
            at = (at / 64 + 1) * 64;
        }
        limit
    }

    /// What is at `offset`, and how far that goes, looking no further than `length` bytes.
    pub fn run_at(&self, offset: u64, length: u64) -> BitmapRun {
        let dirty = self.is_dirty(offset);
        let span = self.span(offset, length);
        let end = self.find(span.start, span.end, !dirty) << self.shift;
        BitmapRun {
            dirty,
            length: (end - offset).min(length),
        }
    }

    /// The first dirty range from `offset` on: its beginning, and its length which is `limit` bytes at
    /// most.
    pub fn next_dirty(&self, offset: u64, limit: u64) -> Option<(u64, u64)> {
        if offset >= self.size.get() {
            return None;
        }
        let granules = self.granules();
        let first = self.find(offset >> self.shift, granules, true);
        if first == granules {
            return None;
        }
        let last = first
            .saturating_add((limit >> self.shift).max(1))
            .min(granules);
        let end = self.find(first, last, false);
        let start = (first << self.shift).max(offset);
        Some((start, (end << self.shift).min(self.size.get()) - start))
    }

    /// Adds what is dirty in `other`, whose granularity may differ.
    pub fn merge(&self, other: &Self) {
        let mut at = 0;
        while let Some((start, length)) = other.next_dirty(at, u64::MAX >> 1) {
            self.set(start, length);
            at = start + length;
        }
    }

    /// Follows a change of the disk's size; new space is clean.
    ///
    /// # Errors
    ///
    /// If it would become too large.
    pub fn resize(&self, size: u64) -> Result<()> {
        let words = Self::words_for(size, self.shift)?;
        let old = self.granules();
        self.size.set(size);
        let new = self.granules();
        if new < old {
            self.change(new..old, false);
        }
        self.words.borrow_mut().resize(words, 0);
        Ok(())
    }

    /// The bits of all granules in order, the first in the lowest bit of the first byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = self.words.borrow();
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Replaces the bits by what [`Self::to_bytes`] gave; bits past the end are ignored.
    pub fn load_bytes(&self, bytes: &[u8]) {
        self.change(0..self.granules(), false);
        {
            let mut words = self.words.borrow_mut();
            for (word, bytes) in words.iter_mut().zip(bytes.chunks(8)) {
                let mut whole = [0; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_le_bytes(whole);
            }
            let used = self.granules() % 64;
            if used != 0
                && let Some(last) = words.last_mut()
            {
                *last &= u64::MAX >> (64 - used);
            }
        }
        let words = self.words.borrow();
        self.dirty
            .set(words.iter().map(|w| u64::from(w.count_ones())).sum());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Set(u64, u64),
        Clear(u64, u64),
        Resize(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range = || (0..200_000u64, 1..80_000u64);
        let step = prop_oneof![
            3 => range().prop_map(|(a, b)| Step::Set(a, b)),
            2 => range().prop_map(|(a, b)| Step::Clear(a, b)),
            1 => (1..200_000u64).prop_map(Step::Resize),
        ];
        proptest::collection::vec(step, 1..20)
    }

    proptest! {
        /// Against one flag for each granule.
        #[test]
        fn a_bitmap_is_a_list_of_flags(steps in steps(), shift in 9..14u32) {
            let bitmap = DirtyBitmap::new("b", 150_001, 1 << shift).unwrap();
            let granule = 1u64 << shift;
            let mut flags = vec![false; 150_001usize.div_ceil(1 << shift)];
            for step in steps {
                let size = bitmap.size();
                match step {
                    Step::Set(offset, length) => {
                        bitmap.set(offset, length);
                        for (n, flag) in flags.iter_mut().enumerate() {
                            let start = n as u64 * granule;
                            *flag |= start < offset + length && offset < start + granule && offset < size;
                        }
                    }
                    Step::Clear(offset, length) => {
                        bitmap.clear(offset, length);
                        for (n, flag) in flags.iter_mut().enumerate() {
                            let start = n as u64 * granule;
                            let end = (start + granule).min(size);
                            *flag &= !(offset <= start && end <= offset + length);
                        }
                    }
                    Step::Resize(size) => {
                        bitmap.resize(size).unwrap();
                        flags.resize((size as usize).div_ceil(1 << shift), false);
                    }
                }
                let count = flags.iter().filter(|f| **f).count() as u64;
                prop_assert_eq!(bitmap.dirty_bytes(), count << shift);
                // Run by run, and dirty range by dirty range.
                let mut at = 0;
                while at < bitmap.size() {
                    let run = bitmap.run_at(at, bitmap.size() - at);
                    prop_assert!(run.length > 0);
                    for n in at / granule..(at + run.length).div_ceil(granule) {
                        prop_assert_eq!(flags[n as usize], run.dirty);
                    }
                    at += run.length;
                }
                let copy = DirtyBitmap::new("c", bitmap.size(), 1 << shift).unwrap();
                copy.load_bytes(&bitmap.to_bytes());
                let merged = DirtyBitmap::new("m", bitmap.size(), 512).unwrap();
                merged.merge(&copy);
                let mut at = 0;
                let mut found = 0;
                while let Some((start, length)) = merged.next_dirty(at, 1 << 15) {
                    prop_assert!(length > 0 && length <= 1 << 15);
                    found += length;
                    at = start + length;
                }
                let expected: u64 = flags.iter().enumerate().filter(|(_, f)| **f)
                    .map(|(n, _)| granule.min(bitmap.size() - n as u64 * granule)).sum();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
