//! Refcounts and the allocation of clusters.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use block::{BlockError, ErrorKind, IoBuf, Result, ZeroFlags};

use super::Qcow2;
use super::cache::{Cache, Piece};
use super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::layout::{OFFSET_MASK, get_refcount, set_refcount};

/// The refcount table and the blocks in use.
pub(crate) struct Refcounts {
    /// The table in memory; may be longer than on the medium until the next write-out.
    pub(crate) table: RefCell<Vec<u64>>,
    /// How many entries the table on the medium has room for.
    pub(crate) table_room: Cell<usize>,
    /// Entries that are newer than the medium.
    pub(crate) table_dirty: RefCell<BTreeSet<usize>>,
    pub(crate) blocks: Cache<Vec<u8>>,
    /// No cluster below this one is free.
    hint: Cell<u64>,
    /// Where the next compressed cluster may go, inside a cluster that others share.
    tail: Cell<Option<u64>>,
}

/// Clusters fresh from the allocator, one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allocation {
    pub(crate) offset: u64,
    pub(crate) count: u64,
    /// They lie behind the end of the file and so read as zeroes.
    pub(crate) fresh: bool,
}

/// How a run of clusters is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    /// All of them together.
    Whole,
    /// As many as there are at the first free place.
    UpTo,
}

impl Refcounts {
    pub(crate) fn new(table: Vec<u64>, cached_blocks: usize) -> Self {
        let room = table.len();
        Self {
            table: RefCell::new(table),
            table_room: Cell::new(room),
            table_dirty: RefCell::default(),
            blocks: Cache::new(cached_blocks),
            hint: Cell::new(0),
            tail: Cell::new(None),
        }
    }

    fn entry(&self, index: u64) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.table
            .borrow()
            .get(index)
            .map_or(0, |entry| entry & OFFSET_MASK)
    }

    /// Forgets what is cached about free space, after somebody else has changed the refcounts.
    pub(crate) fn reset_hints(&self) {
        self.hint.set(0);
        self.tail.set(None);
    }
}

impl Qcow2 {
    /// The refcount block that counts for `cluster`, if there is one.
    async fn refcount_block(&self, cluster: u64) -> Result<Option<Rc<Piece<Vec<u8>>>>> {
        let number = cluster / self.geometry.refcounts_per_block();
        if let Some(block) = self.refcounts.blocks.get(number) {
            return Ok(Some(block));
        }
        let offset = self.refcounts.entry(number);
        if offset == 0 {
            return Ok(None);
        }
        if self.geometry.in_cluster(offset) != 0 {
            let message = format!("a refcount block cannot be at {offset:#x}");
            return Err(self.corrupt(message).await);
        }
        if !self.refcounts.blocks.make_room() {
            self.sync_refcounts().await?;
            self.refcounts.blocks.make_room();
        }
        let buffer = IoBuf::zeroed(self.geometry.cluster_size() as usize);
        self.medium.read(offset, buffer.clone()).await?;
        Ok(Some(self.refcounts.blocks.insert(number, buffer.to_vec())))
    }

    /// How often `cluster` (a cluster number) is referred to.
    pub(crate) async fn refcount(&self, cluster: u64) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let index = (cluster % self.geometry.refcounts_per_block()) as usize;
        let block = self.refcount_block(cluster).await?;
        Ok(block.map_or(0, |b| b.get(|bytes| get_refcount(bytes, order, index))))
    }

    /// Adds `delta` to the refcount of `cluster`; returns the new one.
    pub(crate) async fn change_refcount(&self, cluster: u64, delta: i64) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let index = (cluster % self.geometry.refcounts_per_block()) as usize;
        let Some(block) = self.refcount_block(cluster).await? else {
            let message = format!("cluster {cluster} is in use but has no refcount block");
            return Err(self.corrupt(message).await);
        };
        let old = block.get(|bytes| get_refcount(bytes, order, index));
        let Some(new) = old.checked_add_signed(delta) else {
            let message = format!("cluster {cluster} is freed more often than it is used");
            return Err(self.corrupt(message).await);
        };
        if new > self.geometry.max_refcount() {
            let bits = 1 << order;
            return Err(BlockError::new(
                ErrorKind::NoSpace,
                format!("cluster {cluster} is used more often than {bits} refcount bits can count"),
            ));
        }
        block.change(|bytes| set_refcount(bytes, order, index, new));
        if new == 0 {
            self.refcounts
                .hint
                .set(self.refcounts.hint.get().min(cluster));
            let tail = self.refcounts.tail.get();
            if tail.is_some_and(|t| t >> self.geometry.cluster_bits == cluster) {
                self.refcounts.tail.set(None);
            }
        }
        Ok(new)
    }

    /// Takes free clusters: refcount 1 for each.
    pub(crate) async fn allocate(&self, count: u64, run: Run) -> Result<Allocation> {
        let _turn = self.allocating.lock(0, 1).await;
        self.allocate_in_turn(count, run).await
    }

    async fn allocate_in_turn(&self, count: u64, run: Run) -> Result<Allocation> {
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcounts_per_block();
        let mut cluster = self.refcounts.hint.get();
        let mut first_free = None;
        let mut start = cluster;
        // Clusters from `start` to `cluster` are free.
        // A sound image counts no clusters far behind the end of its file; a hostile one could make
        // this search go on for days.
        let slack = (1 << 30) >> self.geometry.cluster_bits;
        let limit = self.geometry.clusters(self.medium.len()) + slack + count;
        'search: while cluster - start < count {
            if cluster > limit {
                let message = format!("cluster {cluster} is in use behind the end of the file");
                return Err(self.corrupt(message).await);
            }
            let Some(block) = self.refcount_block(cluster).await? else {
                cluster = self.add_refcount_block(cluster, start).await? + 1;
                start = cluster;
                continue;
            };
            let end = (cluster / per_block + 1) * per_block;
            while cluster < end && cluster - start < count {
                let index = (cluster % per_block) as usize;
                if block.get(|bytes| get_refcount(bytes, order, index)) == 0 {
                    first_free.get_or_insert(cluster);
                    cluster += 1;
                    continue;
                }
                if cluster > start && run == Run::UpTo {
                    break 'search;
                }
                cluster += 1;
                start = cluster;
            }
        }
        for taken in start..cluster {
            self.change_refcount(taken, 1).await?;
        }
        // Smaller holes that did not do are still free.
        let hint = first_free.filter(|first| *first < start).unwrap_or(cluster);
        self.refcounts.hint.set(hint);
        let offset = start << self.geometry.cluster_bits;
        let fresh = offset >= self.medium.len();
        Ok(Allocation {
            offset,
            count: cluster - start,
            fresh,
        })
    }

    /// Makes the refcount block for `cluster`, in a cluster of its own that it may count itself.
    /// `free` to `cluster` are known to be free. Returns the cluster it took.
    async fn add_refcount_block(&self, cluster: u64, free: u64) -> Result<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let number = cluster / per_block;
        let limit = MAX_REFCOUNT_TABLE_BYTES / 8;
        if number >= limit {
            return Err(BlockError::new(
                ErrorKind::NoSpace,
                "the image cannot grow any further",
            ));
        }
        let place = free;
        if !self.refcounts.blocks.make_room() {
            self.sync_refcounts().await?;
            self.refcounts.blocks.make_room();
        }
        {
            let mut table = self.refcounts.table.borrow_mut();
            let index = number as usize;
            if table.len() <= index {
                table.resize(index + 1, 0);
            }
            table[index] = place << self.geometry.cluster_bits;
            self.refcounts.table_dirty.borrow_mut().insert(index);
        }
        let bytes = vec![0; self.geometry.cluster_size() as usize];
        self.refcounts.blocks.insert(number, bytes).change(|_| ());
        self.change_refcount(place, 1).await?;
        Ok(place)
    }

    /// Room for `length` bytes of compressed data (at most a cluster), perhaps in clusters that other
    /// compressed data shares.
    pub(crate) async fn allocate_bytes(&self, length: u64) -> Result<u64> {
        let _turn = self.allocating.lock(0, 1).await;
        let bits = self.geometry.cluster_bits;
        if let Some(tail) = self.refcounts.tail.get() {
            let room = self.geometry.cluster_size() - self.geometry.in_cluster(tail);
            let cluster = tail >> bits;
            let shareable = self.refcount(cluster).await? < self.geometry.max_refcount();
            if shareable && room >= length {
                self.change_refcount(cluster, 1).await?;
                self.set_tail(tail + length);
                return Ok(tail);
            }
            let has_block = self.refcount_block(cluster + 1).await?.is_some();
            if shareable && has_block && self.refcount(cluster + 1).await? == 0 {
                self.change_refcount(cluster, 1).await?;
                self.change_refcount(cluster + 1, 1).await?;
                self.set_tail(tail + length);
                return Ok(tail);
            }
        }
        let allocation = self.allocate_in_turn(1, Run::Whole).await?;
        self.set_tail(allocation.offset + length);
        Ok(allocation.offset)
    }

    fn set_tail(&self, tail: u64) {
        let full = self.geometry.in_cluster(tail) == 0;
        self.refcounts.tail.set((!full).then_some(tail));
    }

    /// Gives clusters back that nothing on the medium refers to.
    pub(crate) async fn free_now(&self, offset: u64, count: u64) -> Result<()> {
        let first = offset >> self.geometry.cluster_bits;
        for cluster in first..first + count {
            self.change_refcount(cluster, -1).await?;
        }
        Ok(())
    }

    /// Gives a reference back once the medium has forgotten it.
    pub(crate) fn free_later(&self, offset: u64, length: u64) {
        let first = offset >> self.geometry.cluster_bits;
        let last = (offset + length.max(1) - 1) >> self.geometry.cluster_bits;
        self.to_free.borrow_mut().extend(first..=last);
    }

    /// Gives back what has been forgotten; the medium may punch holes.
    pub(crate) async fn free_forgotten(&self, clusters: &[u64]) -> Result<()> {
        self.decompressed.borrow_mut().take();
        let size = self.geometry.cluster_size();
        let mut hole: Option<(u64, u64)> = None;
        for cluster in clusters {
            if self.refcount(*cluster).await? == 1 && self.discards_medium {
                // Before it can be taken by somebody else.
                match &mut hole {
                    Some((_, end)) if *end == *cluster => *end += 1,
                    _ => {
                        self.punch(hole.replace((*cluster, cluster + 1)), size)
                            .await?;
                    }
                }
            }
        }
        self.punch(hole, size).await?;
        for cluster in clusters {
            self.change_refcount(*cluster, -1).await?;
        }
        Ok(())
    }

    async fn punch(&self, hole: Option<(u64, u64)>, size: u64) -> Result<()> {
        match hole {
            Some((start, end)) => {
                self.medium
                    .discard(start * size, (end - start) * size)
                    .await
            }
            None => Ok(()),
        }
    }

    /// Room for a table of `bytes` bytes, zeroed.
    pub(crate) async fn allocate_table(&self, bytes: u64) -> Result<u64> {
        let clusters = self.geometry.clusters(bytes).max(1);
        let allocation = self.allocate(clusters, Run::Whole).await?;
        if !allocation.fresh {
            let length = clusters * self.geometry.cluster_size();
            self.medium
                .write_zeroes(allocation.offset, length, ZeroFlags::empty())
                .await?;
        }
        Ok(allocation.offset)
    }
}
