//! Checking and repairing.
//!
//! Every structure is walked from the header, counting references; then the counts are compared with
//! the refcounts. A refcount that is too high is a leak and harmless; one that is too low is an error.
//! Repair lowers leaked refcounts in place; for errors it writes the refcounts anew behind the end of
//! the file and switches to them with one write of the header.

use std::collections::{BTreeMap, HashMap};

use block::{BlockError, IoBuf, Result};

use super::header::Incompatible;
use super::layout::{COPIED, L2Entry, Mapping, OFFSET_MASK, get_refcount, set_refcount};
use super::{Qcow2, read_table, snapshot};

/// What may be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Clusters that nothing refers to are given back.
    Leaks,
    /// Wrong refcounts and flags too.
    All,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Errors that mean lost or endangered data.
    pub corruptions: u64,
    /// Clusters that are counted but not used.
    pub leaks: u64,
    /// Errors that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters that are allocated, compressed ones included.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Compressed clusters.
    pub compressed_clusters: u64,
    /// The end of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// What was found, one line each; at most [`CheckReport::MAX_MESSAGES`].
    pub messages: Vec<String>,
}

impl CheckReport {
    /// More findings than this are counted, not described.
    pub const MAX_MESSAGES: usize = 10_000;

    pub(crate) fn say(&mut self, message: String) {
        if self.messages.len() < Self::MAX_MESSAGES {
            self.messages.push(message);
        }
    }

    pub(crate) fn corruption(&mut self, message: String) {
        self.corruptions += 1;
        self.say(format!("ERROR {message}"));
    }
}

const PAGE: u64 = 4096;
/// Bounds the memory for counts: 2^15 pages of 16 KiB.
const MAX_PAGES: usize = 1 << 15;

/// How often each cluster is referred to; sparse.
#[derive(Default)]
struct Counts(HashMap<u64, Box<[u32; PAGE as usize]>>);

impl Counts {
    fn get(&self, cluster: u64) -> u64 {
        let page = self.0.get(&(cluster / PAGE));
        page.map_or(0, |page| u64::from(page[(cluster % PAGE) as usize]))
    }

    fn add(&mut self, cluster: u64, count: u32) -> Result<()> {
        if !self.0.contains_key(&(cluster / PAGE)) && self.0.len() >= MAX_PAGES {
            let message = "the image is spread too widely to be checked";
            return Err(BlockError::unsupported(message));
        }
        let page = self
            .0
            .entry(cluster / PAGE)
            .or_insert_with(|| Box::new([0; PAGE as usize]));
        let slot = &mut page[(cluster % PAGE) as usize];
        *slot = slot.saturating_add(count);
        Ok(())
    }

    /// One more than the last cluster in use.
    fn end(&self) -> u64 {
        let ends = self.0.iter().filter_map(|(number, page)| {
            page.iter()
                .rposition(|c| *c > 0)
                .map(|p| number * PAGE + p as u64 + 1)
        });
        ends.max().unwrap_or(0)
    }
}

/// The result of one pass.
struct Findings {
    report: CheckReport,
    /// Clusters whose refcounts are too high, and what to add.
    leaks: Vec<(u64, i64)>,
    /// References, without those of the refcount structures.
    counts: Counts,
    flag_errors: u64,
}

struct Walk<'a> {
    image: &'a Qcow2,
    counts: Counts,
    report: CheckReport,
    file_clusters: u64,
    /// Corruptions that are wrong flags alone.
    flag_errors: u64,
}

impl Walk<'_> {
    /// Counts references to the clusters of a range.
    fn count(&mut self, what: &str, offset: u64, length: u64, weight: u32) -> Result<bool> {
        if length == 0 {
            return Ok(true);
        }
        let geometry = &self.image.geometry;
        let Some(last) = offset.checked_add(length - 1) else {
            self.report
                .corruption(format!("{what} at {offset:#x} is beyond any file"));
            return Ok(false);
        };
        let (first, last) = (
            offset >> geometry.cluster_bits,
            last >> geometry.cluster_bits,
        );
        if last >= self.file_clusters {
            self.report.corruption(format!(
                "{what} at {offset:#x} reaches past the end of the file"
            ));
            if first >= self.file_clusters {
                return Ok(false);
            }
        }
        for cluster in first..=last.min(self.file_clusters - 1) {
            self.counts.add(cluster, weight)?;
        }
        Ok(true)
    }

    async fn everything(&mut self) -> Result<()> {
        let header = self.image.header();
        let cluster = self.image.geometry.cluster_size();
        self.count("the header", 0, cluster, 1)?;
        if let Some(luks) = header.encryption() {
            self.count("the LUKS header", luks.offset, luks.length, 1)?;
        }
        let mut l1_tables: BTreeMap<(u64, u32), u32> = BTreeMap::new();
        *l1_tables
            .entry((header.l1_offset, header.l1_size))
            .or_default() += 1;
        let snapshots = self.image.snapshots();
        for s in &snapshots {
            *l1_tables.entry((s.l1_offset, s.l1_size)).or_default() += 1;
        }
        let length = snapshot::table_length(&snapshots);
        self.count("the snapshot table", header.snapshots_offset, length, 1)?;
        // Tables that several snapshots share are read once and counted often.
        let mut l2_tables: BTreeMap<u64, u32> = BTreeMap::new();
        for ((offset, size), weight) in l1_tables {
            if size == 0 || !self.count("an L1 table", offset, u64::from(size) * 8, weight)? {
                continue;
            }
            let table = read_table(&*self.image.medium, offset, size as usize).await?;
            for entry in table.iter().map(|e| e & OFFSET_MASK).filter(|e| *e != 0) {
                let slot = l2_tables.entry(entry).or_default();
                *slot = slot.saturating_add(weight);
            }
        }
        let active: Vec<u64> = self
            .image
            .l1
            .borrow()
            .iter()
            .map(|e| e & OFFSET_MASK)
            .collect();
        for (table, weight) in l2_tables {
            self.l2_table(table, weight, !active.contains(&table))
                .await?;
        }
        self.statistics(&active).await?;
        self.bitmaps().await
    }

    async fn l2_table(&mut self, table: u64, weight: u32, only_snapshots: bool) -> Result<()> {
        let geometry = self.image.geometry;
        if geometry.in_cluster(table) != 0 {
            self.report
                .corruption(format!("L2 table at {table:#x} is not aligned"));
            return Ok(());
        }
        if !self.count("an L2 table", table, geometry.cluster_size(), weight)? {
            return Ok(());
        }
        let words = (geometry.cluster_size() / 8) as usize;
        let words = read_table(&*self.image.medium, table, words).await?;
        for entry in words.chunks_exact(geometry.entry_words()) {
            let bitmap = entry.get(1).copied().unwrap_or(0);
            let entry = L2Entry {
                word: entry[0],
                bitmap,
            };
            match geometry.decode(entry) {
                Err(error) => {
                    let word = entry.word;
                    self.report
                        .corruption(format!("L2 entry {word:#x}: {error}"));
                }
                Ok(Mapping::Compressed { offset, length }) => {
                    // The last sector may lie past the end of the file.
                    let end = self.file_clusters << geometry.cluster_bits;
                    let length = length.min(end.saturating_sub(offset)).max(1);
                    self.count("compressed data", offset, length, weight)?;
                    if entry.word & COPIED != 0 && !only_snapshots {
                        let message = "compressed cluster has the copied flag set".to_owned();
                        self.report.corruption(message);
                    }
                }
                Ok(Mapping::Host { offset, .. }) if !self.image.external_data => {
                    self.count("a data cluster", offset, geometry.cluster_size(), weight)?;
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Counts what people want to know of the active layer.
    async fn statistics(&mut self, active: &[u64]) -> Result<()> {
        let geometry = self.image.geometry;
        self.report.total_clusters = geometry.clusters(self.image.size.get());
        let mut next = 0;
        let mut seen = std::collections::HashSet::new();
        for table in active
            .iter()
            .filter(|t| **t != 0 && geometry.in_cluster(**t) == 0)
        {
            if !seen.insert(*table) || table >> geometry.cluster_bits >= self.file_clusters {
                continue;
            }
            let words = (geometry.cluster_size() / 8) as usize;
            let words = read_table(&*self.image.medium, *table, words).await?;
            for entry in words.chunks_exact(geometry.entry_words()) {
                let bitmap = entry.get(1).copied().unwrap_or(0);
                match geometry.decode(L2Entry {
                    word: entry[0],
                    bitmap,
                }) {
                    Ok(Mapping::Compressed { .. }) => {
                        self.report.allocated_clusters += 1;
                        self.report.compressed_clusters += 1;
                        // Compressed clusters count as fragmented, because they are not in place.
                        self.report.fragmented_clusters += 1;
                    }
                    Ok(Mapping::Host { offset, .. }) => {
                        self.report.allocated_clusters += 1;
                        if next != 0 && offset != next {
                            self.report.fragmented_clusters += 1;
                        }
                        next = offset + geometry.cluster_size();
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Counts the clusters of persistent bitmaps.
    async fn bitmaps(&mut self) -> Result<()> {
        let Some(extension) = self.image.header().bitmaps() else {
            return Ok(());
        };
        let (place, length) = (extension.directory_offset, extension.directory_size);
        if extension.count > 65_535 || length > 1 << 26 {
            self.report
                .corruption("the bitmap directory is impossibly large".to_owned());
            return Ok(());
        }
        if !self.count("the bitmap directory", place, length, 1)? {
            return Ok(());
        }
        let buffer = IoBuf::zeroed(length as usize);
        self.image.medium.read(place, buffer.clone()).await?;
        let directory = buffer.to_vec();
        let mut at = 0;
        for _ in 0..extension.count {
            let Some(entry) = directory.get(at..at + 24) else {
                self.report
                    .corruption("the bitmap directory is cut short".to_owned());
                return Ok(());
            };
            let field = |from: usize, to: usize| {
                entry[from..to]
                    .iter()
                    .fold(0u64, |v, b| v << 8 | u64::from(*b))
            };
            let (table, entries) = (field(0, 8), field(8, 12));
            let (name, extra) = (field(18, 20), field(20, 24));
            at += (24 + name + extra).next_multiple_of(8) as usize;
            if entries > 1 << 22 || self.image.geometry.in_cluster(table) != 0 {
                self.report
                    .corruption(format!("the bitmap table at {table:#x} is impossible"));
                continue;
            }
            if !self.count("a bitmap table", table, entries * 8, 1)? {
                continue;
            }
            for entry in read_table(&*self.image.medium, table, entries as usize).await? {
                let place = entry & OFFSET_MASK;
                if place != 0 {
                    self.count("bitmap data", place, self.image.geometry.cluster_size(), 1)?;
                }
            }
        }
        Ok(())
    }

    /// Counts the refcount table and its blocks.
    fn refcount_structures(&mut self) -> Result<()> {
        let header = self.image.header();
        let bits = self.image.geometry.cluster_bits;
        let length = u64::from(header.refcount_table_clusters) << bits;
        self.count(
            "the refcount table",
            header.refcount_table_offset,
            length,
            1,
        )?;
        let table = self.image.refcounts.table.borrow().clone();
        for entry in table.iter().map(|e| e & OFFSET_MASK).filter(|e| *e != 0) {
            if self.image.geometry.in_cluster(entry) != 0 {
                self.report
                    .corruption(format!("refcount block at {entry:#x} is not aligned"));
            } else {
                self.count("a refcount block", entry, 1, 1)?;
            }
        }
        Ok(())
    }

    /// Compares counts with refcounts. Returns the leaked clusters and by how much.
    async fn compare(&mut self) -> Result<Vec<(u64, i64)>> {
        let geometry = self.image.geometry;
        let per_block = geometry.refcounts_per_block();
        let table = self.image.refcounts.table.borrow().clone();
        let mut leaks = Vec::new();
        let mut compared = std::collections::HashSet::new();
        for (number, entry) in table.iter().enumerate() {
            let place = entry & OFFSET_MASK;
            let usable = place != 0
                && geometry.in_cluster(place) == 0
                && place >> geometry.cluster_bits < self.file_clusters
                && compared.insert(place);
            let first = number as u64 * per_block;
            let block = if usable {
                let buffer = IoBuf::zeroed(geometry.cluster_size() as usize);
                self.image.medium.read(place, buffer.clone()).await?;
                Some(buffer.to_vec())
            } else {
                None
            };
            let end = if block.is_some() {
                per_block
            } else {
                per_block.min(self.counts.end().saturating_sub(first))
            };
            for index in 0..end {
                let found = block.as_ref().map_or(0, |bytes| {
                    get_refcount(bytes, geometry.refcount_order, index as usize)
                });
                self.compare_one(first + index, found, &mut leaks);
            }
        }
        for cluster in table.len() as u64 * per_block..self.counts.end() {
            self.compare_one(cluster, 0, &mut leaks);
        }
        Ok(leaks)
    }

    fn compare_one(&mut self, cluster: u64, found: u64, leaks: &mut Vec<(u64, i64)>) {
        let expected = self.counts.get(cluster);
        if found > expected {
            self.report.leaks += 1;
            let message = format!("Leaked cluster {cluster} refcount={found} reference={expected}");
            self.report.say(message);
            let difference = i64::try_from(found - expected).unwrap_or(i64::MAX);
            leaks.push((cluster, -difference));
        } else if found < expected {
            self.report.corruption(format!(
                "cluster {cluster} refcount={found} reference={expected}"
            ));
        }
    }

    /// Compares the copied flags of the active layer with the counts.
    async fn copied_flags(&mut self) -> Result<()> {
        let l1 = self.image.l1.borrow().clone();
        let geometry = self.image.geometry;
        let bits = geometry.cluster_bits;
        let mut seen = std::collections::HashSet::new();
        for entry in l1.iter().filter(|e| **e & OFFSET_MASK != 0) {
            let table = entry & OFFSET_MASK;
            // The flag speaks of the refcount as it is stored, whether or not that is right.
            let single = self.image.refcount(table >> bits).await? == 1;
            if single != (entry & COPIED != 0) {
                self.flag_errors += 1;
                self.report
                    .corruption(format!("OFLAG_COPIED L2 cluster: l1_entry={entry:x}"));
            }
            let readable = geometry.in_cluster(table) == 0 && table >> bits < self.file_clusters;
            if self.image.external_data || !readable || !seen.insert(table) {
                continue;
            }
            let words = (geometry.cluster_size() / 8) as usize;
            for entry in read_table(&*self.image.medium, table, words)
                .await?
                .chunks_exact(geometry.entry_words())
            {
                let bitmap = entry.get(1).copied().unwrap_or(0);
                let mapping = geometry.decode(L2Entry {
                    word: entry[0],
                    bitmap,
                });
                let Ok(Mapping::Host { offset, copied, .. }) = mapping else {
                    continue;
                };
                if (self.image.refcount(offset >> bits).await? == 1) != copied {
                    self.flag_errors += 1;
                    let word = entry[0];
                    self.report
                        .corruption(format!("OFLAG_COPIED data cluster: l2_entry={word:x}"));
                }
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Checks the whole image, and repairs what `repair` allows. Nothing else may use it meanwhile.
    ///
    /// # Errors
    ///
    /// If the image cannot be read or written; what is wrong inside it is in the report.
    pub async fn check(&self, repair: Repair) -> Result<CheckReport> {
        let Findings {
            mut report,
            leaks,
            counts,
            flag_errors,
        } = self.check_once().await?;
        if repair == Repair::None || (report.corruptions == 0 && report.leaks == 0) {
            return Ok(report);
        }
        if report.corruptions > flag_errors && repair == Repair::All {
            self.rebuild_refcounts(&counts).await?;
            self.set_copied_flags_quietly().await?;
        } else if report.corruptions == 0 || repair == Repair::All {
            for (cluster, delta) in leaks {
                self.change_refcount(cluster, delta).await?;
            }
            // Clusters that have one reference left may be written in place again.
            self.set_copied_flags_quietly().await?;
        } else {
            return Ok(report);
        }
        self.refcounts.reset_hints();
        let after = self.check_once().await?.report;
        report.leaks_fixed = report.leaks.saturating_sub(after.leaks);
        report.corruptions_fixed = report.corruptions.saturating_sub(after.corruptions);
        (report.leaks, report.corruptions) = (after.leaks, after.corruptions);
        report.image_end_offset = after.image_end_offset;
        if after.corruptions == 0 {
            self.header.borrow_mut().incompatible -= Incompatible::CORRUPT | Incompatible::DIRTY;
            self.write_header_fields().await?;
        }
        Ok(report)
    }

    async fn check_once(&self) -> Result<Findings> {
        // Refcounts are compared as they are stored, not as they were cached before.
        if !self.writable {
            self.refcounts.blocks.clear();
        }
        let file_clusters = self.geometry.clusters(self.medium.len());
        let mut walk = Walk {
            image: self,
            counts: Counts::default(),
            report: CheckReport::default(),
            file_clusters,
            flag_errors: 0,
        };
        walk.everything().await?;
        let counts_without_refcounts = Counts(walk.counts.0.clone());
        walk.refcount_structures()?;
        let leaks = walk.compare().await?;
        walk.copied_flags().await?;
        let last = walk.counts.end();
        walk.report.image_end_offset = last << self.geometry.cluster_bits;
        Ok(Findings {
            report: walk.report,
            leaks,
            counts: counts_without_refcounts,
            flag_errors: walk.flag_errors,
        })
    }

    /// Writes all refcounts anew, behind the end of the file, and switches to them.
    async fn rebuild_refcounts(&self, counts: &Counts) -> Result<()> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        let per_block = geometry.refcounts_per_block();
        let start = geometry.clusters(self.medium.len()).max(counts.end());
        let (mut blocks, mut table_clusters) = (1u64, 1u64);
        loop {
            let end = start + blocks + table_clusters;
            let needed = end.div_ceil(per_block);
            let needed_table = (needed * 8).div_ceil(cluster);
            if needed <= blocks && needed_table <= table_clusters {
                break;
            }
            (blocks, table_clusters) = (needed.max(blocks), needed_table.max(table_clusters));
        }
        let max = geometry.max_refcount();
        let mut table = vec![0u64; (table_clusters * cluster / 8) as usize];
        for number in 0..blocks {
            let mut bytes = vec![0; cluster as usize];
            for index in 0..per_block {
                let at = number * per_block + index;
                let own = at >= start && at < start + blocks + table_clusters;
                let count = if own { 1 } else { counts.get(at).min(max) };
                set_refcount(&mut bytes, geometry.refcount_order, index as usize, count);
            }
            let place = (start + number) * cluster;
            self.medium.write(place, IoBuf::from_slice(&bytes)).await?;
            table[number as usize] = place;
        }
        let place = (start + blocks) * cluster;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.medium.write(place, IoBuf::from_slice(&bytes)).await?;
        self.medium.flush().await?;
        {
            let mut header = self.header.borrow_mut();
            header.refcount_table_offset = place;
            header.refcount_table_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        }
        self.write_header_fields().await?;
        self.refcounts.blocks.clear();
        self.refcounts.table_dirty.borrow_mut().clear();
        self.refcounts.table_room.set(table.len());
        *self.refcounts.table.borrow_mut() = table;
        Ok(())
    }

    /// [`Self::set_copied_flags`], leaving out tables that cannot be read.
    async fn set_copied_flags_quietly(&self) -> Result<()> {
        match self.set_copied_flags().await {
            Err(e) if e.kind() == block::ErrorKind::InvalidImage => Ok(()),
            Err(e) => Err(e),
            Ok(()) => self.sync_all().await,
        }
    }
}
