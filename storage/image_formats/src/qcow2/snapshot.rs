//! Internal snapshots.
//!
//! Source: the qcow2 specification, section "Snapshots". Each step leaves the image right if the power
//! fails after it: first the refcounts are raised, then references are made, then the header changes
//! in one sector, then old references are given back.

use block::{BlockError, ErrorKind, IoBuf, Medium, Result};

use super::layout::{COPIED, L2Entry, Mapping, OFFSET_MASK};
use super::{Header, Qcow2, read_table};

/// The fixed part of an entry of the snapshot table.
const FIXED: usize = 40;
/// The extra data that this program writes: VM state size, disk size, instruction count.
const EXTRA: usize = 24;
/// More extra data than this is taken for garbage.
const MAX_EXTRA: usize = 1024;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique in the image; a number in text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made: seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the VM had run, in nanoseconds.
    pub vm_clock: u64,
    /// The VM state's size in bytes; 0 if there is only the disk.
    pub vm_state_size: u64,
    /// The disk's size then, in bytes.
    pub disk_size: u64,
    /// Instructions executed, if they were counted.
    pub instructions: Option<u64>,
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u32,
    unknown_extra: Vec<u8>,
}

fn invalid(message: impl Into<String>) -> BlockError {
    BlockError::invalid_image(message)
}

/// Reads the snapshot table's entries.
fn parse_table(
    bytes: &[u8],
    count: u32,
    version: u32,
    size: u64,
) -> Result<(Vec<Snapshot>, usize)> {
    let mut snapshots = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let entry = bytes.get(at..).unwrap_or_default();
        let (snapshot, length) = parse_entry(entry, version, size)
            .ok_or_else(|| invalid("the snapshot table is cut short or damaged"))?;
        snapshots.push(snapshot);
        at += length.next_multiple_of(8);
    }
    Ok((snapshots, at))
}

fn parse_entry(bytes: &[u8], version: u32, size: u64) -> Option<(Snapshot, usize)> {
    let be16 = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let be32 = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let be64 = |at: usize| Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (id_length, name_length) = (usize::from(be16(12)?), usize::from(be16(14)?));
    let extra_length = be32(36)? as usize;
    if extra_length > MAX_EXTRA || (version >= 3 && extra_length < 16) {
        return None;
    }
    let extra = bytes.get(FIXED..FIXED + extra_length)?;
    let has = |length: usize| extra.len() >= length;
    let id_at = FIXED + extra_length;
    let end = id_at + id_length + name_length;
    let text =
        |from: usize, to: usize| Some(String::from_utf8_lossy(bytes.get(from..to)?).into_owned());
    let snapshot = Snapshot {
        id: text(id_at, id_at + id_length)?,
        name: text(id_at + id_length, end)?,
        seconds: be32(16)?,
        nanoseconds: be32(20)?,
        vm_clock: be64(24)?,
        vm_state_size: if has(8) {
            be64(FIXED)?
        } else {
            u64::from(be32(32)?)
        },
        disk_size: if has(16) { be64(FIXED + 8)? } else { size },
        instructions: if has(24) {
            be64(FIXED + 16).filter(|n| *n != u64::MAX)
        } else {
            None
        },
        l1_offset: be64(0)?,
        l1_size: be32(8)?,
        unknown_extra: extra.get(EXTRA..).unwrap_or_default().to_vec(),
    };
    Some((snapshot, end))
}

fn encode_table(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for s in snapshots {
        let short = |length: usize| u16::try_from(length).unwrap_or(0).to_be_bytes();
        bytes.extend(s.l1_offset.to_be_bytes());
        bytes.extend(s.l1_size.to_be_bytes());
        bytes.extend(short(s.id.len()));
        bytes.extend(short(s.name.len()));
        bytes.extend(s.seconds.to_be_bytes());
        bytes.extend(s.nanoseconds.to_be_bytes());
        bytes.extend(s.vm_clock.to_be_bytes());
        bytes.extend(u32::try_from(s.vm_state_size).unwrap_or(0).to_be_bytes());
        let extra = EXTRA + s.unknown_extra.len();
        bytes.extend(u32::try_from(extra).unwrap_or(0).to_be_bytes());
        bytes.extend(s.vm_state_size.to_be_bytes());
        bytes.extend(s.disk_size.to_be_bytes());
        bytes.extend(s.instructions.unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend(&s.unknown_extra);
        bytes.extend(s.id.as_bytes());
        bytes.extend(s.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// The largest snapshot table that is read.
const MAX_TABLE: u64 = 16 << 20;

/// Reads an image's snapshots.
pub(crate) async fn read_all(medium: &dyn Medium, header: &Header) -> Result<Vec<Snapshot>> {
    if header.snapshot_count == 0 {
        return Ok(Vec::new());
    }
    let room = medium
        .len()
        .saturating_sub(header.snapshots_offset)
        .min(MAX_TABLE);
    let buffer = IoBuf::zeroed(room as usize);
    medium.read(header.snapshots_offset, buffer.clone()).await?;
    let bytes = buffer.to_vec();
    let (snapshots, _) = parse_table(&bytes, header.snapshot_count, header.version, header.size)?;
    for s in &snapshots {
        let aligned = s.l1_offset & ((1 << header.cluster_bits) - 1) == 0;
        if u64::from(s.l1_size) * 8 > super::header::MAX_L1_BYTES || !aligned {
            return Err(invalid(format!(
                "the L1 table of snapshot '{}' is impossible",
                s.id
            )));
        }
    }
    Ok(snapshots)
}

/// The length in bytes of a snapshot table.
pub(crate) fn table_length(snapshots: &[Snapshot]) -> u64 {
    encode_table(snapshots).len() as u64
}

impl Qcow2 {
    /// The snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Finds a snapshot by its identifier, else by its name.
    pub fn find_snapshot(&self, which: &str) -> Option<Snapshot> {
        let snapshots = self.snapshots.borrow();
        let by_id = snapshots.iter().find(|s| s.id == which);
        by_id
            .or_else(|| snapshots.iter().find(|s| s.name == which))
            .cloned()
    }

    /// Shows a snapshot's content instead of the disk's. Only for images opened read-only.
    ///
    /// # Errors
    ///
    /// `NotFound`; `InvalidArgument` if the image is open for writing.
    pub async fn view_snapshot(&self, which: &str) -> Result<()> {
        if self.writable {
            return Err(BlockError::invalid_argument(
                "the image is open for writing",
            ));
        }
        let snapshot = self.find_snapshot(which).ok_or_else(|| not_found(which))?;
        let entries = snapshot.l1_size as usize;
        let l1 = read_table(&*self.medium, snapshot.l1_offset, entries).await?;
        if (entries as u64) < self.header.borrow().l1_entries_for(snapshot.disk_size) {
            return Err(invalid(format!(
                "the L1 table of snapshot '{which}' is too small"
            )));
        }
        *self.l1.borrow_mut() = l1;
        self.size.set(snapshot.disk_size);
        Ok(())
    }

    /// Keeps the disk's present content under `name`. `time` is seconds and nanoseconds since 1970.
    ///
    /// # Errors
    ///
    /// `Unsupported` with an external data file; `NoSpace` if refcounts are too narrow.
    pub async fn create_snapshot(&self, name: &str, time: (u32, u32)) -> Result<()> {
        let _held = self.ranges.lock(0, u64::MAX).await;
        if self.external_data {
            let message = "images with a data file cannot have internal snapshots";
            return Err(BlockError::unsupported(message));
        }
        if name.len() > 255 {
            return Err(BlockError::invalid_argument(
                "a snapshot's name has at most 255 bytes",
            ));
        }
        self.sync_all().await?;
        let l1 = self.l1.borrow().clone();
        let place = self.allocate_references(&l1).await?;
        self.set_copied_flags().await?;
        self.sync_all().await?;
        let copy: Vec<u8> = self
            .l1
            .borrow()
            .iter()
            .flat_map(|e| e.to_be_bytes())
            .collect();
        self.medium.write(place, IoBuf::from_slice(&copy)).await?;
        let mut snapshots = self.snapshots();
        let number = snapshots
            .iter()
            .filter_map(|s| s.id.parse::<u64>().ok())
            .max()
            .unwrap_or(0)
            + 1;
        snapshots.push(Snapshot {
            id: number.to_string(),
            name: name.to_owned(),
            seconds: time.0,
            nanoseconds: time.1,
            vm_clock: 0,
            vm_state_size: 0,
            disk_size: self.size.get(),
            instructions: None,
            l1_offset: place,
            l1_size: u32::try_from(l1.len()).unwrap_or(u32::MAX),
            unknown_extra: Vec::new(),
        });
        self.replace_snapshots(snapshots).await
    }

    /// Makes the disk what it was in a snapshot (found by identifier or name).
    ///
    /// # Errors
    ///
    /// `NotFound`, or what the host reports.
    pub async fn apply_snapshot(&self, which: &str) -> Result<()> {
        let _held = self.ranges.lock(0, u64::MAX).await;
        let snapshot = self.find_snapshot(which).ok_or_else(|| not_found(which))?;
        if !self.bitmaps().is_empty() {
            // They would have to say what changes by it.
            return Err(BlockError::unsupported("Device has active dirty bitmaps"));
        }
        self.sync_all().await?;
        let entries = snapshot.l1_size as usize;
        let mut l1 = read_table(&*self.medium, snapshot.l1_offset, entries).await?;
        let needed = self.header.borrow().l1_entries_for(snapshot.disk_size);
        if (entries as u64) < needed {
            return Err(invalid(format!(
                "the L1 table of snapshot '{which}' is too small"
            )));
        }
        for entry in &mut l1 {
            *entry &= !COPIED;
        }
        let place = self.allocate_references(&l1).await?;
        let old_l1 = self.l1.borrow().clone();
        let old_place = self.header.borrow().l1_offset;
        self.header.borrow_mut().size = snapshot.disk_size;
        self.replace_l1(place, l1).await?;
        self.size.set(snapshot.disk_size);
        self.drop_references(&old_l1).await?;
        if old_place != 0 {
            self.free_later(old_place, old_l1.len() as u64 * 8);
        }
        self.sync_all().await?;
        self.set_copied_flags().await?;
        self.sync_all().await
    }

    /// Deletes a snapshot (found by identifier or name).
    ///
    /// # Errors
    ///
    /// `NotFound`, or what the host reports.
    pub async fn delete_snapshot(&self, which: &str) -> Result<()> {
        let _held = self.ranges.lock(0, u64::MAX).await;
        let snapshot = self.find_snapshot(which).ok_or_else(|| not_found(which))?;
        self.sync_all().await?;
        let l1 = read_table(&*self.medium, snapshot.l1_offset, snapshot.l1_size as usize).await?;
        let mut snapshots = self.snapshots();
        snapshots.retain(|s| s.id != snapshot.id || s.l1_offset != snapshot.l1_offset);
        self.replace_snapshots(snapshots).await?;
        self.drop_references(&l1).await?;
        self.free_later(snapshot.l1_offset, l1.len() as u64 * 8);
        self.sync_all().await?;
        self.set_copied_flags().await?;
        self.sync_all().await
    }

    /// Writes a new snapshot table and makes the header point to it.
    async fn replace_snapshots(&self, snapshots: Vec<Snapshot>) -> Result<()> {
        let bytes = encode_table(&snapshots);
        let old_length = table_length(&self.snapshots.borrow());
        let place = if bytes.is_empty() {
            0
        } else {
            let place = self.allocate_table(bytes.len() as u64).await?;
            self.medium.write(place, IoBuf::from_slice(&bytes)).await?;
            place
        };
        self.sync_all().await?;
        let old_place = {
            let mut header = self.header.borrow_mut();
            header.snapshot_count = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
            std::mem::replace(&mut header.snapshots_offset, place)
        };
        self.write_header_fields().await?;
        *self.snapshots.borrow_mut() = snapshots;
        if old_place != 0 && old_length > 0 {
            self.free_later(old_place, old_length);
        }
        self.sync_all().await
    }

    /// The mappings of an L2 table that lies on the medium, which must be up to date.
    pub(crate) async fn read_mappings(&self, table: u64) -> Result<Vec<Mapping>> {
        let size = self.geometry.cluster_size() as usize;
        let words = read_table(&*self.medium, table, size / 8).await?;
        let step = self.geometry.entry_words();
        let mut mappings = Vec::with_capacity(words.len() / step);
        for entry in words.chunks_exact(step) {
            let bitmap = entry.get(1).copied().unwrap_or(0);
            match self.geometry.decode(L2Entry {
                word: entry[0],
                bitmap,
            }) {
                Ok(mapping) => mappings.push(mapping),
                Err(error) => return Err(self.corrupt(error.message().to_owned()).await),
            }
        }
        Ok(mappings)
    }

    /// The clusters that a mapping refers to, by number.
    pub(crate) fn referred(&self, mapping: Mapping) -> std::ops::RangeInclusive<u64> {
        let bits = self.geometry.cluster_bits;
        match mapping {
            Mapping::Host { offset, .. } if !self.external_data => offset >> bits..=offset >> bits,
            Mapping::Compressed { offset, length } => {
                offset >> bits..=(offset + length - 1) >> bits
            }
            _ => std::ops::RangeInclusive::new(1, 0),
        }
    }

    /// Room for a copy of an L1 table, which counts for everything it leads to; on an error nothing has changed.
    async fn allocate_references(&self, l1: &[u64]) -> Result<u64> {
        let length = l1.len() as u64 * 8;
        let place = self.allocate_table(length).await?;
        if let Err(error) = self.add_references(l1).await {
            let count = self.geometry.clusters(length).max(1);
            self.free_now(place, count).await?;
            return Err(error);
        }
        Ok(place)
    }

    /// Counts one more reference to everything that an L1 table leads to, or changes nothing.
    ///
    /// A cluster may be counted many times, as compressed data shares it, so whether there is room
    /// for all references is known only when they have been counted.
    async fn add_references(&self, l1: &[u64]) -> Result<()> {
        let mut counted = 0;
        let result = self.change_references(l1, 1, u64::MAX, &mut counted).await;
        if result.is_err() && counted > 0 {
            self.change_references(l1, -1, counted, &mut 0).await?;
        }
        result
    }

    /// Changes the refcounts behind the first `limit` references of an L1 table; counts the references in `done`.
    async fn change_references(
        &self,
        l1: &[u64],
        delta: i64,
        limit: u64,
        done: &mut u64,
    ) -> Result<()> {
        for entry in l1.iter().map(|e| e & OFFSET_MASK).filter(|e| *e != 0) {
            let table = entry >> self.geometry.cluster_bits;
            let data = self.read_mappings(entry).await?;
            let data = data.into_iter().flat_map(|mapping| self.referred(mapping));
            for cluster in std::iter::once(table).chain(data) {
                if *done == limit {
                    return Ok(());
                }
                if delta > 0 && self.refcount(cluster).await? == self.geometry.max_refcount() {
                    let message = "the refcounts are too narrow for one more snapshot";
                    return Err(BlockError::new(ErrorKind::NoSpace, message));
                }
                self.change_refcount(cluster, delta).await?;
                *done += 1;
            }
        }
        Ok(())
    }

    /// Gives back every reference of an L1 table that nothing on the medium points to any more.
    async fn drop_references(&self, l1: &[u64]) -> Result<()> {
        for entry in l1.iter().map(|e| e & OFFSET_MASK).filter(|e| *e != 0) {
            for mapping in self.read_mappings(entry).await? {
                self.to_free.borrow_mut().extend(self.referred(mapping));
            }
            self.free_later(entry, self.geometry.cluster_size());
        }
        Ok(())
    }

    /// Makes the "exactly one reference" flags of the active tables agree with the refcounts.
    pub(crate) async fn set_copied_flags(&self) -> Result<()> {
        let l1 = self.l1.borrow().clone();
        let span = 1u64 << (self.geometry.cluster_bits + self.geometry.l2_bits);
        for (index, entry) in l1.iter().enumerate() {
            let table = entry & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            let own = self.refcount(table >> self.geometry.cluster_bits).await? == 1;
            for (number, mapping) in self.read_mappings(table).await?.into_iter().enumerate() {
                let Mapping::Host {
                    offset,
                    copied,
                    data,
                    zero,
                } = mapping
                else {
                    continue;
                };
                if self.external_data {
                    continue;
                }
                let single = self.refcount(offset >> self.geometry.cluster_bits).await? == 1;
                if single != copied {
                    let guest =
                        index as u64 * span + ((number as u64) << self.geometry.cluster_bits);
                    let new = Mapping::Host {
                        offset,
                        copied: single,
                        data,
                        zero,
                    };
                    self.set_mapping(guest, new).await?;
                }
            }
            let flagged = table | if own { COPIED } else { 0 };
            if flagged != *entry {
                self.l1.borrow_mut()[index] = flagged;
                self.l1_dirty.borrow_mut().insert(index);
            }
        }
        Ok(())
    }
}

fn not_found(which: &str) -> BlockError {
    BlockError::new(
        ErrorKind::NotFound,
        format!("there is no snapshot '{which}'"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tables_read_back(names in prop::collection::vec("[a-z]{0,30}", 0..5)) {
            let snapshots: Vec<Snapshot> = names
                .iter()
                .enumerate()
                .map(|(n, name)| Snapshot {
                    id: n.to_string(),
                    name: name.clone(),
                    seconds: 5,
                    nanoseconds: 6,
                    vm_clock: 7,
                    vm_state_size: 8,
                    disk_size: 9,
                    instructions: (n % 2 == 0).then_some(10),
                    l1_offset: 65536,
                    l1_size: 1,
                    unknown_extra: vec![1; n],
                })
                .collect();
            let bytes = encode_table(&snapshots);
            let count = snapshots.len() as u32;
            let (found, length) = parse_table(&bytes, count, 3, 0).unwrap();
            prop_assert_eq!(found, snapshots);
            prop_assert_eq!(length, bytes.len());
        }

        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), count in 0u32..9) {
            let _ = parse_table(&bytes, count, 3, 0);
        }
    }
}
