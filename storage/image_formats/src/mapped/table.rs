//! A table of places whose changes are held back until what they refer to is on stable storage.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use block::{IoBuf, Medium, Result};

/// The byte order of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Big,
    Little,
}

/// Entries with the values that they had when a write-out began.
pub(crate) type Changes = BTreeMap<usize, u64>;

/// A table in memory, newer than the medium until it is written.
pub(crate) struct Table {
    place: Cell<u64>,
    /// Bytes of an entry: 4 or 8.
    width: usize,
    order: Order,
    now: RefCell<Vec<u64>>,
    /// Entries that differ from the medium, with what the medium has.
    pending: RefCell<BTreeMap<usize, u64>>,
}

/// Table sectors are written whole or not at all.
const SECTOR: usize = 512;

impl Table {
    /// Reads `entries` entries of `width` bytes at `place`.
    pub(crate) async fn read(
        medium: &dyn Medium,
        place: u64,
        entries: usize,
        width: usize,
        order: Order,
    ) -> Result<Self> {
        let buffer = IoBuf::zeroed(entries * width);
        if entries > 0 {
            medium.read(place, buffer.clone()).await?;
        }
        let bytes = buffer.to_vec();
        let now = bytes.chunks_exact(width).map(|b| decode(b, order));
        Ok(Self::new(place, now.collect(), width, order))
    }

    /// A table that is on the medium with these entries.
    pub(crate) fn new(place: u64, now: Vec<u64>, width: usize, order: Order) -> Self {
        Self {
            place: Cell::new(place),
            width,
            order,
            now: RefCell::new(now),
            pending: RefCell::default(),
        }
    }

    /// The number of entries.
    pub(crate) fn len(&self) -> usize {
        self.now.borrow().len()
    }

    /// Where the table begins on the medium.
    pub(crate) fn place(&self) -> u64 {
        self.place.get()
    }

    /// An entry, if there is one with that number.
    pub(crate) fn get(&self, index: usize) -> Option<u64> {
        self.now.borrow().get(index).copied()
    }

    /// Changes an entry in memory.
    pub(crate) fn set(&self, index: usize, value: u64) {
        if let Some(entry) = self.now.borrow_mut().get_mut(index) {
            let before = std::mem::replace(entry, value);
            self.pending.borrow_mut().entry(index).or_insert(before);
        }
    }

    /// All entries.
    pub(crate) fn entries(&self) -> Vec<u64> {
        self.now.borrow().clone()
    }

    /// Makes the table longer or shorter, in memory and (by the caller's promise) on the medium.
    pub(crate) fn resize(&self, length: usize, value: u64) {
        self.now.borrow_mut().resize(length, value);
        self.pending.borrow_mut().retain(|index, _| *index < length);
    }

    /// Says that the table now is at another place, where the caller has written it.
    pub(crate) fn moved(&self, place: u64) {
        self.place.set(place);
    }

    /// Whether there is anything to write.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.pending.borrow().is_empty()
    }

    /// The changes to write now: what is changed later must not go with them.
    pub(crate) fn begin(&self) -> Changes {
        let now = self.now.borrow();
        let pending = self.pending.borrow();
        pending
            .keys()
            .filter_map(|n| now.get(*n).map(|v| (*n, *v)))
            .collect()
    }

    /// The sectors of `size` bytes that `changes` touch, with their places and bytes; entries that have
    /// changed since are in them as they were. Behind the table's end there are zeroes.
    pub(crate) fn sectors(&self, changes: &Changes, size: usize) -> Vec<(u64, Vec<u8>)> {
        let mut sectors = self.parts(changes, size);
        for (_, bytes) in &mut sectors {
            bytes.resize(size, 0);
        }
        sectors
    }

    /// The same, without what is behind the end.
    fn parts(&self, changes: &Changes, size: usize) -> Vec<(u64, Vec<u8>)> {
        let per_sector = size / self.width;
        let touched: BTreeSet<usize> = changes.keys().map(|n| n / per_sector).collect();
        let (now, pending) = (self.now.borrow(), self.pending.borrow());
        let sector = |number: usize| {
            let first = number * per_sector;
            let last = (first + per_sector).min(now.len());
            let bytes: Vec<u8> = (first..last)
                .flat_map(|n| {
                    let value = changes.get(&n).or(pending.get(&n)).unwrap_or(&now[n]);
                    encode(*value, self.width, self.order)
                })
                .collect();
            (self.place.get() + (first * self.width) as u64, bytes)
        };
        touched.into_iter().map(sector).collect()
    }

    /// Writes changes; the caller has made durable what they refer to.
    pub(crate) async fn write(&self, medium: &dyn Medium, changes: &Changes) -> Result<()> {
        let sectors = self.parts(changes, SECTOR);
        let mut at = 0;
        while at < sectors.len() {
            // Neighbours go together.
            let mut end = at + 1;
            while end < sectors.len()
                && sectors[end].0 == sectors[end - 1].0 + sectors[end - 1].1.len() as u64
            {
                end += 1;
            }
            let bytes: Vec<u8> = sectors[at..end]
                .iter()
                .flat_map(|(_, b)| b.iter().copied())
                .collect();
            medium
                .write(sectors[at].0, IoBuf::from_slice(&bytes))
                .await?;
            at = end;
        }
        self.end(changes);
        Ok(())
    }

    /// Notes that `changes` are on the medium.
    pub(crate) fn end(&self, changes: &Changes) {
        let now = self.now.borrow();
        let mut pending = self.pending.borrow_mut();
        for (index, written) in changes {
            if now.get(*index) == Some(written) {
                pending.remove(index);
            } else {
                pending.insert(*index, *written);
            }
        }
    }
}

/// An entry's bytes.
pub(crate) fn encode(value: u64, width: usize, order: Order) -> Vec<u8> {
    match (width, order) {
        (4, Order::Big) => (value as u32).to_be_bytes().to_vec(),
        (4, Order::Little) => (value as u32).to_le_bytes().to_vec(),
        (_, Order::Big) => value.to_be_bytes().to_vec(),
        (_, Order::Little) => value.to_le_bytes().to_vec(),
    }
}

fn decode(bytes: &[u8], order: Order) -> u64 {
    let add = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
    match order {
        Order::Big => bytes.iter().fold(0, add),
        Order::Little => bytes.iter().rev().fold(0, add),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryMedium;
    use block::executor::block_on;

    #[test]
    fn entries_that_change_meanwhile_are_written_as_they_were() {
        block_on(async {
            let medium = MemoryMedium::new(1024);
            let table = Table::read(&medium, 512, 8, 4, Order::Big).await.unwrap();
            table.set(1, 10);
            table.set(2, 20);
            let changes = table.begin();
            table.set(2, 21);
            table.set(3, 30);
            table.write(&medium, &changes).await.unwrap();
            let stored = |n: usize| medium.to_vec()[512 + n * 4 + 3];
            assert_eq!((stored(1), stored(2), stored(3)), (10, 20, 0));
            let rest = table.begin();
            assert_eq!(rest, BTreeMap::from([(2, 21), (3, 30)]));
            table.write(&medium, &rest).await.unwrap();
            assert_eq!((stored(1), stored(2), stored(3)), (10, 21, 30));
            assert!(!table.is_dirty());
        })
        .unwrap();
    }
}
