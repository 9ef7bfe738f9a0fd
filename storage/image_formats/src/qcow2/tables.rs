//! Looking up and changing cluster mappings: L1 and L2 tables.

use std::rc::Rc;

use block::{IoBuf, Result};

use super::Qcow2;
use super::cache::Piece;
use super::layout::{COPIED, L2Entry, Mapping, OFFSET_MASK, Part};

/// The largest piece of an L2 table that is read at once.
pub(crate) const SLICE_SIZE: u64 = 4096;

/// A stretch of the disk that is one kind of thing in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) part: Part,
    pub(crate) length: u64,
    /// Writes may go in place (meaningful for `Data`).
    pub(crate) copied: bool,
}

impl Qcow2 {
    pub(crate) fn slice_size(&self) -> u64 {
        SLICE_SIZE.min(self.geometry.cluster_size())
    }

    /// The entries in a slice.
    fn slice_entries(&self) -> u64 {
        self.slice_size() / 8 / self.geometry.entry_words() as u64
    }

    /// The place of the active L2 table for `offset`; 0 if there is none.
    pub(crate) async fn l2_table(&self, offset: u64) -> Result<u64> {
        let index = self.geometry.l1_index(offset) as usize;
        let entry = self.l1.borrow().get(index).copied().unwrap_or(0) & OFFSET_MASK;
        if self.geometry.in_cluster(entry) != 0 {
            let message = format!("an L2 table cannot be at {entry:#x}");
            return Err(self.corrupt(message).await);
        }
        Ok(entry)
    }

    /// The slice of `table` that has entry `index`, and the entry's first word in it.
    async fn slice(&self, table: u64, index: u64) -> Result<(Rc<Piece<Vec<u64>>>, usize)> {
        let words = self.geometry.entry_words();
        let within = (index % self.slice_entries()) as usize * words;
        let place = table + index / self.slice_entries() * self.slice_size();
        if let Some(slice) = self.l2.get(place) {
            return Ok((slice, within));
        }
        if !self.l2.make_room() {
            self.sync().await?;
            self.l2.make_room();
        }
        let buffer = IoBuf::zeroed(self.slice_size() as usize);
        self.medium.read(place, buffer.clone()).await?;
        let bytes = buffer.to_vec();
        let words = bytes.chunks_exact(8);
        let words = words.map(|b| u64::from_be_bytes(b.try_into().unwrap_or([0; 8])));
        Ok((self.l2.insert(place, words.collect()), within))
    }

    fn entry_at(&self, words: &[u64], at: usize) -> L2Entry {
        let bitmap = if self.geometry.subclusters {
            words[at + 1]
        } else {
            0
        };
        L2Entry {
            word: words[at],
            bitmap,
        }
    }

    /// What the cluster of `offset` is.
    pub(crate) async fn mapping(&self, offset: u64) -> Result<Mapping> {
        let table = self.l2_table(offset).await?;
        if table == 0 {
            return Ok(Mapping::Plain { zero: 0 });
        }
        let (slice, at) = self.slice(table, self.geometry.l2_index(offset)).await?;
        let entry = slice.get(|words| self.entry_at(words, at));
        self.decode(entry).await
    }

    /// Decodes an entry; corruption is noted in the image.
    async fn decode(&self, entry: L2Entry) -> Result<Mapping> {
        match self.decode_quietly(entry) {
            Ok(mapping) => Ok(mapping),
            Err(error) => Err(self.corrupt(error.message().to_owned()).await),
        }
    }

    pub(crate) fn decode_quietly(&self, entry: L2Entry) -> Result<Mapping> {
        let mapping = self.geometry.decode(entry)?;
        Ok(match mapping {
            // Data files have no refcounts, so nothing in them is shared.
            Mapping::Host {
                offset, data, zero, ..
            } if self.external_data => Mapping::Host {
                offset,
                copied: true,
                data,
                zero,
            },
            other => other,
        })
    }

    /// What is at `offset`, and how far (at most `limit`) it goes on like that in one place.
    pub(crate) async fn stretch(&self, offset: u64, limit: u64) -> Result<Stretch> {
        let table = self.l2_table(offset).await?;
        if table == 0 {
            let span = 1u64 << (self.geometry.cluster_bits + self.geometry.l2_bits);
            let length = (span - offset % span).min(limit);
            return Ok(Stretch {
                part: Part::Unallocated,
                length,
                copied: false,
            });
        }
        let index = self.geometry.l2_index(offset);
        let (slice, at) = self.slice(table, index).await?;
        let result = slice.get(|words| self.stretch_in_slice(words, at, offset, limit));
        match result {
            Ok(stretch) => Ok(stretch),
            Err(error) => Err(self.corrupt(error.message().to_owned()).await),
        }
    }

    fn stretch_in_slice(
        &self,
        words: &[u64],
        at: usize,
        offset: u64,
        limit: u64,
    ) -> Result<Stretch> {
        let geometry = &self.geometry;
        let step = geometry.entry_words();
        let size = geometry.subcluster_size();
        let parts = (geometry.cluster_size() / size) as u32;
        let within = geometry.in_cluster(offset);
        let mut mapping = self.decode_quietly(self.entry_at(words, at))?;
        let mut number = (within / size) as u32;
        let skip = within % size;
        let first = geometry.part(mapping, number);
        let copied = is_copied(mapping);
        let mut length = size - skip;
        let mut at = at;
        loop {
            number += 1;
            if number == parts {
                number = 0;
                at += step;
                if at >= words.len() || first == Part::Compressed {
                    break;
                }
                match self.decode_quietly(self.entry_at(words, at)) {
                    Ok(next) => mapping = next,
                    Err(_) => break,
                }
            }
            let expected = first.moved(skip + length);
            let same = geometry.part(mapping, number) == expected && is_copied(mapping) == copied;
            if length >= limit || !same {
                break;
            }
            length += size;
        }
        Ok(Stretch {
            part: first.moved(skip),
            length: length.min(limit),
            copied,
        })
    }

    /// Changes the mapping of the cluster of `offset`, whose L2 table must be the active layer's own.
    pub(crate) async fn set_mapping(&self, offset: u64, mapping: Mapping) -> Result<()> {
        let table = self.l2_table(offset).await?;
        let (slice, at) = self.slice(table, self.geometry.l2_index(offset)).await?;
        let entry = self.geometry.encode(mapping);
        // No await between `slice` and this change.
        slice.change(|words| {
            words[at] = entry.word;
            if self.geometry.subclusters {
                words[at + 1] = entry.bitmap;
            }
        });
        Ok(())
    }

    /// Makes sure that there is an L2 table for `offset` that only the active layer uses.
    pub(crate) async fn own_l2_table(&self, offset: u64) -> Result<()> {
        let index = self.geometry.l1_index(offset) as usize;
        if self.l1.borrow()[index] & COPIED != 0 {
            return Ok(());
        }
        let _turn = self.growing.lock(0, 1).await;
        let old = self.l1.borrow()[index];
        if old & COPIED != 0 {
            return Ok(());
        }
        let old = old & OFFSET_MASK;
        let size = self.geometry.cluster_size();
        let table = self.allocate_table(size).await?;
        let mut place = table;
        while place < table + size {
            // What an earlier use of the cluster left in the cache.
            self.l2.remove(place);
            place += self.slice_size();
        }
        if old != 0 {
            // Shared with a snapshot, so never dirty: the medium has its content.
            let buffer = IoBuf::zeroed(size as usize);
            self.medium.read(old, buffer.clone()).await?;
            self.medium.write(table, buffer).await?;
        }
        self.l1.borrow_mut()[index] = table | COPIED;
        self.l1_dirty.borrow_mut().insert(index);
        if old != 0 {
            self.free_later(old, size);
        }
        Ok(())
    }
}

impl Part {
    /// The part that follows `by` bytes later if it is stored in one piece.
    fn moved(self, by: u64) -> Self {
        match self {
            Self::Data(place) => Self::Data(place + by),
            Self::Zero(Some(place)) => Self::Zero(Some(place + by)),
            other => other,
        }
    }
}

fn is_copied(mapping: Mapping) -> bool {
    matches!(mapping, Mapping::Host { copied: true, .. })
}
