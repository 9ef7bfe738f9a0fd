//! Bounded caches of metadata: pieces of L2 tables and refcount blocks.
//!
//! An entry is clean (as on the medium), dirty (newer than the medium), or being written; only clean
//! ones may be dropped. Writing out and its order are [`super::sync`]'s.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

/// Offsets are well mixed by one multiplication.
#[derive(Default)]
pub(crate) struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

/// One cached piece.
pub(crate) struct Piece<T> {
    content: RefCell<T>,
    dirty: Cell<bool>,
    writing: Cell<bool>,
    used: Cell<u64>,
}

impl<T> Piece<T> {
    /// Looks at the content.
    pub(crate) fn get<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        f(&self.content.borrow())
    }

    /// Changes the content; it is dirty from now on.
    ///
    /// The piece must have been taken from its cache without an `await` in between: a clean piece may
    /// leave the cache meanwhile, and the change with it.
    pub(crate) fn change<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        self.dirty.set(true);
        f(&mut self.content.borrow_mut())
    }

    /// Takes the piece for writing out: it is clean unless it changes again.
    pub(crate) fn begin_write(&self) {
        self.dirty.set(false);
        self.writing.set(true);
    }

    /// The end of writing out; after a failure the piece is dirty again.
    pub(crate) fn end_write(&self, succeeded: bool) {
        self.writing.set(false);
        if !succeeded {
            self.dirty.set(true);
        }
    }

    fn is_clean(&self) -> bool {
        !self.dirty.get() && !self.writing.get()
    }
}

/// A cache of pieces by number or offset.
pub(crate) struct Cache<T> {
    pieces: RefCell<HashMap<u64, Rc<Piece<T>>, BuildHasherDefault<OffsetHasher>>>,
    capacity: usize,
    clock: Cell<u64>,
}

impl<T> Cache<T> {
    /// Room for `capacity` pieces, at least 4.
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = capacity.max(4);
        Self {
            pieces: RefCell::default(),
            capacity,
            clock: Cell::new(0),
        }
    }

    pub(crate) fn get(&self, key: u64) -> Option<Rc<Piece<T>>> {
        let pieces = self.pieces.borrow();
        let piece = pieces.get(&key)?;
        self.clock.set(self.clock.get() + 1);
        piece.used.set(self.clock.get());
        Some(piece.clone())
    }

    /// Adds what was read from the medium; if somebody was quicker, theirs counts.
    pub(crate) fn insert(&self, key: u64, content: T) -> Rc<Piece<T>> {
        if let Some(piece) = self.get(key) {
            return piece;
        }
        self.clock.set(self.clock.get() + 1);
        let piece = Rc::new(Piece {
            content: RefCell::new(content),
            dirty: Cell::new(false),
            writing: Cell::new(false),
            used: Cell::new(self.clock.get()),
        });
        self.pieces.borrow_mut().insert(key, piece.clone());
        piece
    }

    /// Makes room if the cache is full. Returns false if nothing can be dropped because all is dirty.
    pub(crate) fn make_room(&self) -> bool {
        let mut pieces = self.pieces.borrow_mut();
        if pieces.len() < self.capacity {
            return true;
        }
        let mut clean: Vec<(u64, u64)> = pieces
            .iter()
            .filter(|(_, piece)| piece.is_clean())
            .map(|(key, piece)| (piece.used.get(), *key))
            .collect();
        if clean.is_empty() {
            return false;
        }
        // Several at once, so that the search does not happen for each miss.
        let victims = (self.capacity / 8 + 1).min(clean.len());
        clean.select_nth_unstable(victims - 1);
        for (_, key) in &clean[..victims] {
            pieces.remove(key);
        }
        true
    }

    /// Forgets a piece, whatever its state.
    pub(crate) fn remove(&self, key: u64) {
        self.pieces.borrow_mut().remove(&key);
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.pieces.borrow_mut().clear();
    }

    /// Whether any piece is dirty.
    pub(crate) fn has_dirty(&self) -> bool {
        self.pieces.borrow().values().any(|piece| piece.dirty.get())
    }

    /// All dirty pieces, by ascending key.
    pub(crate) fn dirty(&self) -> Vec<(u64, Rc<Piece<T>>)> {
        let pieces = self.pieces.borrow();
        let mut dirty: Vec<_> = pieces
            .iter()
            .filter(|(_, piece)| piece.dirty.get())
            .map(|(key, piece)| (*key, piece.clone()))
            .collect();
        dirty.sort_unstable_by_key(|(key, _)| *key);
        dirty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clean_pieces_leave() {
        let cache = Cache::new(4);
        for key in 0..4 {
            cache.insert(key, 0u8);
        }
        for key in 1..4 {
            cache.get(key).unwrap().change(|v| *v = 1);
        }
        assert!(cache.make_room());
        assert!(cache.get(0).is_none());
        cache.insert(9, 0).change(|v| *v = 2);
        assert!(!cache.make_room());
        assert_eq!(
            cache.dirty().iter().map(|(k, _)| *k).collect::<Vec<_>>(),
            [1, 2, 3, 9]
        );
        let piece = cache.get(2).unwrap();
        piece.begin_write();
        assert!(!cache.make_room());
        piece.end_write(true);
        assert!(cache.make_room());
        assert!(cache.get(2).is_none());
    }

    #[test]
    fn least_recently_used_leaves_first() {
        let cache = Cache::new(4);
        for key in 0..4 {
            cache.insert(key, ());
        }
        cache.get(0);
        assert!(cache.make_room());
        assert!(cache.get(0).is_some() && cache.get(1).is_none());
    }
}
