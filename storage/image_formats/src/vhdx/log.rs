//! The log: changes of metadata that a writer may not have brought to their places ([MS-VHDX] 2.3).

use block::{BlockError, IoBuf, Medium, Result, ZeroFlags};

use super::header::{Guid, checksum};
use crate::fields::{Fields, put};

/// The unit of the log.
pub(crate) const SECTOR: usize = 4096;
const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;

/// A change that the log holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// These bytes belong here.
    Data { offset: u64, bytes: Vec<u8> },
    /// Zeroes belong here.
    Zero { offset: u64, length: u64 },
}

/// The changes to make, in order, and how long the file is to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Replay {
    pub(crate) changes: Vec<Change>,
    /// The length that the file is to have at least.
    pub(crate) file_length: u64,
    /// The length that the file had for certain; a shorter one has been cut off.
    pub(crate) flushed_length: u64,
}

/// A valid entry.
struct Entry {
    /// Its place in the log.
    place: usize,
    length: usize,
    sequence: u64,
    /// The place of the oldest entry of its sequence.
    tail: usize,
    file_length: u64,
    flushed_length: u64,
    changes: Vec<Change>,
}

/// A log whose file would become larger than this is damaged.
const MAX_FILE: u64 = 128 << 40;

/// Bytes of the log from `at` on, going round its end.
fn take(log: &[u8], at: usize, length: usize) -> Vec<u8> {
    let at = at % log.len();
    let first = length.min(log.len() - at);
    let mut bytes = log[at..at + first].to_vec();
    bytes.extend_from_slice(&log[..length - first]);
    bytes
}

/// Reads the entry at `place`; `None` if there is no valid one, or `budget` does not allow reading it.
fn entry_at(log: &[u8], place: usize, id: &Guid, budget: &mut usize) -> Option<Entry> {
    let head = &log[place..place + ENTRY_HEADER];
    let f = Fields(head);
    let (length, tail) = (f.le32(8) as usize, f.le32(12) as usize);
    let count = f.le32(24) as usize;
    let sound = head.starts_with(b"loge")
        && f.bytes::<16>(32) == *id
        && f.le64(16) > 0
        && length > 0
        && length.is_multiple_of(SECTOR)
        && length <= log.len()
        && tail.is_multiple_of(SECTOR)
        && tail < log.len()
        && count <= length / DESCRIPTOR
        && f.le64(48) <= MAX_FILE
        && f.le64(56) <= MAX_FILE;
    if !sound || length > *budget {
        return None;
    }
    *budget -= length;
    let bytes = take(log, place, length);
    let f = Fields(&bytes);
    if checksum(&bytes, 4) != f.le32(4) {
        return None;
    }
    let sequence = f.le64(16);
    let mut data = (ENTRY_HEADER + count * DESCRIPTOR).next_multiple_of(SECTOR);
    let mut changes = Vec::with_capacity(count);
    for n in 0..count {
        let at = ENTRY_HEADER + n * DESCRIPTOR;
        let offset = f.le64(at + 16);
        if f.le64(at + 24) != sequence
            || !offset.is_multiple_of(SECTOR as u64)
            || offset >= MAX_FILE
        {
            return None;
        }
        match &f.bytes::<4>(at) {
            b"zero" => {
                let length = f.le64(at + 8);
                if !length.is_multiple_of(SECTOR as u64) || length > 1 << 40 {
                    return None;
                }
                changes.push(Change::Zero { offset, length });
            }
            b"desc" => {
                changes.push(data_sector(&f, at, data, sequence, offset)?);
                data += SECTOR;
            }
            _ => return None,
        }
    }
    Some(Entry {
        place,
        length,
        sequence,
        tail,
        flushed_length: f.le64(48),
        file_length: f.le64(56),
        changes,
    })
}

/// Puts a sector together: its first 8 and last 4 bytes stand in the descriptor.
fn data_sector(
    f: &Fields<'_>,
    at: usize,
    data: usize,
    sequence: u64,
    offset: u64,
) -> Option<Change> {
    let sector = f.slice(data, SECTOR);
    let s = Fields(sector);
    let stored = u64::from(s.le32(4)) << 32 | u64::from(s.le32(SECTOR - 4));
    if sector.len() < SECTOR || !sector.starts_with(b"data") || stored != sequence {
        return None;
    }
    let mut bytes = f.bytes::<8>(at + 8).to_vec();
    bytes.extend_from_slice(&sector[8..SECTOR - 4]);
    bytes.extend_from_slice(&f.bytes::<4>(at + 4));
    Some(Change::Data { offset, bytes })
}

/// Finds the active sequence in a log (a multiple of 4 KiB long) and what it says.
///
/// # Errors
///
/// `InvalidImage` if there is none: the header says that there is a log to replay.
pub(crate) fn replay(log: &[u8], id: &Guid) -> Result<Replay> {
    let mut best: Option<Vec<Entry>> = None;
    let mut start = 0;
    // Entries that all claim to be long must not make this take forever.
    let mut budget = 8 * log.len();
    // Each valid entry is looked at once as the beginning of a sequence; its successors are skipped.
    while start + SECTOR <= log.len() {
        let Some(first) = entry_at(log, start, id, &mut budget) else {
            start += SECTOR;
            continue;
        };
        let (mut sequence, mut total) = (vec![first], 0);
        let mut next_start = start + SECTOR;
        while let Some(last) = sequence.last() {
            total += last.length;
            next_start = next_start.max(start + total);
            if total >= log.len() {
                break;
            }
            let next = (last.place + last.length) % log.len();
            let follows = |e: &Entry| last.sequence.checked_add(1) == Some(e.sequence);
            match entry_at(log, next, id, &mut budget).filter(follows) {
                Some(entry) => sequence.push(entry),
                None => break,
            }
        }
        let head = |s: &[Entry]| s.last().map_or(0, |e| e.sequence);
        let tail = sequence.last().map_or(0, |e| e.tail);
        // The sequence is whole if it has the entry that its head calls the oldest.
        let oldest = sequence.iter().position(|e| e.place == tail);
        if let Some(oldest) = oldest
            && best.as_ref().is_none_or(|b| head(b) < head(&sequence))
        {
            best = Some(sequence.split_off(oldest));
        }
        start = next_start;
    }
    let Some(sequence) = best else {
        return Err(BlockError::invalid_image(
            "the log that is to be replayed is damaged",
        ));
    };
    let file_length = sequence.iter().map(|e| e.file_length).max().unwrap_or(0);
    let flushed_length = sequence.last().map_or(0, |e| e.flushed_length);
    let changes = sequence.into_iter().flat_map(|e| e.changes).collect();
    Ok(Replay {
        changes,
        file_length,
        flushed_length,
    })
}

impl Replay {
    /// Makes the changes.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub(crate) async fn apply(&self, medium: &dyn Medium) -> Result<()> {
        if self.file_length > medium.len() {
            medium.set_len(self.file_length).await?;
        }
        for change in &self.changes {
            match change {
                Change::Data { offset, bytes } => {
                    medium.write(*offset, IoBuf::from_slice(bytes)).await?;
                }
                Change::Zero { offset, length } => {
                    // What lies past the end is zero already.
                    let length = (*length).min(medium.len().saturating_sub(*offset));
                    if length > 0 {
                        let flags = ZeroFlags::empty();
                        medium.write_zeroes(*offset, length, flags).await?;
                    }
                }
            }
        }
        medium.flush().await
    }
}

/// How an entry begins.
pub(crate) struct EntryHead {
    pub(crate) id: Guid,
    pub(crate) sequence: u64,
    /// Where the oldest entry of the sequence lies in the log.
    pub(crate) tail: u32,
    /// The file's length, which is on stable storage.
    pub(crate) file_length: u64,
}

/// An entry's bytes.
pub(crate) fn encode_entry(head: &EntryHead, changes: &[Change]) -> Vec<u8> {
    let table = (ENTRY_HEADER + changes.len() * DESCRIPTOR).next_multiple_of(SECTOR);
    let mut bytes = vec![0; table];
    put(&mut bytes, 0, b"loge");
    put(&mut bytes, 12, &head.tail.to_le_bytes());
    put(&mut bytes, 16, &head.sequence.to_le_bytes());
    put(&mut bytes, 24, &(changes.len() as u32).to_le_bytes());
    put(&mut bytes, 32, &head.id);
    put(&mut bytes, 48, &head.file_length.to_le_bytes());
    put(&mut bytes, 56, &head.file_length.to_le_bytes());
    for (n, change) in changes.iter().enumerate() {
        let at = ENTRY_HEADER + n * DESCRIPTOR;
        put(&mut bytes, at + 24, &head.sequence.to_le_bytes());
        match change {
            Change::Zero { offset, length } => {
                put(&mut bytes, at, b"zero");
                put(&mut bytes, at + 8, &length.to_le_bytes());
                put(&mut bytes, at + 16, &offset.to_le_bytes());
            }
            Change::Data {
                offset,
                bytes: data,
            } => {
                put(&mut bytes, at, b"desc");
                put(&mut bytes, at + 4, &data[SECTOR - 4..]);
                put(&mut bytes, at + 8, &data[..8]);
                put(&mut bytes, at + 16, &offset.to_le_bytes());
                let mut sector = vec![0; SECTOR];
                put(&mut sector, 0, b"data");
                put(
                    &mut sector,
                    4,
                    &((head.sequence >> 32) as u32).to_le_bytes(),
                );
                put(&mut sector, 8, &data[8..SECTOR - 4]);
                put(
                    &mut sector,
                    SECTOR - 4,
                    &(head.sequence as u32).to_le_bytes(),
                );
                bytes.extend(sector);
            }
        }
    }
    let length = bytes.len() as u32;
    put(&mut bytes, 8, &length.to_le_bytes());
    let sum = checksum(&bytes, 4);
    put(&mut bytes, 4, &sum.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(offset: u64, value: u8) -> Change {
        let bytes = (0..SECTOR).map(|n| value.wrapping_add(n as u8)).collect();
        Change::Data { offset, bytes }
    }

    #[test]
    fn the_newest_whole_sequence_is_replayed_round_the_end() {
        let id = [7; 16];
        let mut log = vec![0; 16 * SECTOR];
        let mut place = |at: usize, entry: Vec<u8>| {
            for (n, byte) in entry.into_iter().enumerate() {
                log[(at + n) % (16 * SECTOR)] = byte;
            }
        };
        let last = 14 * SECTOR;
        let encode = |sequence, tail: usize, changes: &[Change]| {
            let tail = tail as u32;
            let file_length = 1 << 20;
            let head = EntryHead {
                id,
                sequence,
                tail,
                file_length,
            };
            encode_entry(&head, changes)
        };
        // An older sequence that a newer one has overtaken.
        place(4 * SECTOR, encode(3, 4 * SECTOR, &[data(0, 9)]));
        place(last, encode(10, last, &[data(4096, 1)]));
        let zero = Change::Zero {
            offset: 8192,
            length: 4096,
        };
        let changes = [zero, data(4096, 2)];
        place(0, encode(11, last, &changes));
        let found = replay(&log, &id).unwrap();
        assert_eq!(found.changes, [&[data(4096, 1)][..], &changes].concat());
        assert!(replay(&log, &[8; 16]).is_err());
        // Without its oldest entry the sequence is not whole, and the older one is what counts.
        log[last + 100] ^= 1;
        assert_eq!(replay(&log, &id).unwrap().changes, [data(0, 9)]);
    }
}
