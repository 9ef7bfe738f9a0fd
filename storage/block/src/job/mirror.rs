//! A copy that follows its disk until it can take its place.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use super::control::{ErrorAction, IoSide, Job};
use super::copy::{CopyError, Layers, copy_range, extents};
use crate::backend::BlockFuture;
use crate::bitmap::DirtyBitmap;
use crate::disk::Disk;
use crate::error::{BlockError, Result};
use crate::executor::{self, JoinHandle, spawn_local};
use crate::watch::{Change, StandStill, WriteWatcher};

/// Bytes that are copied in one go.
const CHUNK: u64 = 1 << 20;
/// As many copies are under way at once.
const PARALLEL: usize = 8;
/// Bytes whose extents are looked at in one go.
const LOOK: u64 = 1 << 30;
/// How long writes to a disk whose copy is complete are gathered.
const GATHER: Duration = Duration::from_millis(10);
/// After as many rounds that leave hardly less to do than those before, writes wait for their copy.
const PATIENCE: u32 = 3;

/// What a write to the disk waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CopyMode {
    /// Nothing; it is copied later. Where a guest writes faster than that goes on for long, its writes wait all the same.
    #[default]
    Background,
    /// Its copy.
    WriteBlocking,
}

/// How a mirror is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MirrorOptions {
    /// Bytes that are copied if one of them has changed: a power of two from 512 up.
    pub granularity: u32,
    /// What is copied at first.
    pub layers: Layers,
    /// The target reads as zeroes, so zeroes need no copy.
    pub target_is_zero: bool,
    /// What writes wait for.
    pub copy_mode: CopyMode,
}

/// A job that mirrors a disk.
pub struct Mirror {
    job: Rc<Job>,
    source: Rc<Disk>,
    options: MirrorOptions,
    follower: Rc<Follower>,
}

/// How a mirror has ended.
pub struct MirrorEnd {
    /// The disk, which stands still: source and target hold the same.
    pub still: StandStill,
    /// Whether the disk shall go over to the target.
    pub pivot: bool,
}

/// What sees the changes of the source.
struct Follower {
    job: Rc<Job>,
    target: Rc<Disk>,
    dirty: DirtyBitmap,
    /// Writes go to the target too before they end.
    blocking: Cell<bool>,
}

impl WriteWatcher for Follower {
    fn granularity(&self) -> u64 {
        u64::from(self.dirty.granularity())
    }

    fn before(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn after<'a>(
        &'a self,
        offset: u64,
        length: u64,
        change: &'a Change,
        done: bool,
    ) -> BlockFuture<'a, ()> {
        Box::pin(async move {
            // What fails here is copied later, where failures are dealt with.
            if !(done && self.blocking.get() && self.repeat(offset, length, change).await) {
                self.dirty.set(offset, length);
                self.job.wake();
            }
            Ok(())
        })
    }
}

impl Follower {
    fn remaining(&self) -> u64 {
        self.dirty.dirty_bytes().min(self.dirty.size())
    }

    /// Makes a change on the target too.
    async fn repeat(&self, offset: u64, length: u64, change: &Change) -> bool {
        let result = match change {
            Change::Data(buf) => self.target.write(offset, buf.clone(), false).await,
            Change::Zeroes(flags) => {
                let zeroed = self.target.write_zeroes(offset, length, *flags, false);
                zeroed.await
            }
            // What was given back reads as it did or as zeroes, the same on both sides only if it is copied.
            Change::Discard => return false,
        };
        result.is_ok()
    }
}

impl Mirror {
    /// Mirrors `source` to `target`, which is as large.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a granularity that cannot be, or a target of another size.
    pub fn new(
        job: Rc<Job>,
        source: Rc<Disk>,
        target: Rc<Disk>,
        options: MirrorOptions,
    ) -> Result<Self> {
        if source.size() != target.size() {
            let message = "Source and target image have different sizes";
            return Err(BlockError::invalid_argument(message));
        }
        let follower = Follower {
            job: job.clone(),
            target,
            dirty: DirtyBitmap::new("", source.size(), options.granularity)?,
            blocking: Cell::new(options.copy_mode == CopyMode::WriteBlocking),
        };
        Ok(Self {
            job,
            source,
            options,
            follower: Rc::new(follower),
        })
    }

    /// Mirrors until the job is told to end.
    ///
    /// # Errors
    ///
    /// What ended the job, or that it was cancelled.
    pub async fn run(&self) -> Result<MirrorEnd> {
        let watcher: Rc<dyn WriteWatcher> = self.follower.clone();
        let still = self.source.stand_still().await;
        self.source.watch(&still, watcher.clone());
        drop(still);
        let result = self.follow().await;
        self.source.unwatch(&watcher);
        result
    }

    async fn follow(&self) -> Result<MirrorEnd> {
        self.find_work().await?;
        self.catch_up().await?;
        self.job.ready();
        loop {
            self.job.breathe().await?;
            if let Some(pivot) = self.job.wants_end() {
                return self.finish(pivot).await;
            }
            if self.follower.dirty.dirty_bytes() == 0 {
                self.job.wait().await;
                continue;
            }
            executor::sleep(GATHER).await?;
            self.round().await?;
        }
    }

    /// Copies until both sides hold the same and nothing is written.
    async fn finish(&self, pivot: bool) -> Result<MirrorEnd> {
        loop {
            self.catch_up().await?;
            let still = self.source.stand_still().await;
            if self.follower.dirty.dirty_bytes() == 0 {
                match self.follower.target.flush().await {
                    Ok(()) => return Ok(MirrorEnd { still, pivot }),
                    Err(error) => {
                        drop(still);
                        self.deal_with((error, IoSide::Target)).await?;
                    }
                }
            }
        }
    }

    /// Copies until nothing is left, if need be by letting writes wait.
    async fn catch_up(&self) -> Result<()> {
        let dirty = &self.follower.dirty;
        let (mut least, mut in_vain) = (u64::MAX, 0);
        let result = loop {
            let left = dirty.dirty_bytes();
            if left == 0 {
                break Ok(());
            }
            let is_less = left <= least / 4 * 3;
            in_vain = if is_less { 0 } else { in_vain + 1 };
            least = least.min(left);
            if in_vain >= PATIENCE {
                self.follower.blocking.set(true);
            }
            if let Err(error) = self.round().await {
                break Err(error);
            }
        };
        let blocking = self.options.copy_mode == CopyMode::WriteBlocking;
        // Who is about to end keeps writes waiting until that is done.
        if self.job.wants_end().is_none() {
            self.follower.blocking.set(blocking);
        }
        result
    }

    /// Marks what is to be copied at first.
    async fn find_work(&self) -> Result<()> {
        let size = self.source.size();
        let mut at = 0;
        while at < size {
            self.job.breathe().await?;
            let length = LOOK.min(size - at);
            let found = match extents(&self.source, at, length).await {
                Ok(found) => found,
                Err(error) => {
                    self.deal_with((error, IoSide::Source)).await?;
                    continue;
                }
            };
            for extent in found {
                let skipped = self.options.target_is_zero && extent.reads_as_zero();
                if self.options.layers.hold(&extent) && !skipped {
                    self.follower.dirty.set(extent.offset, extent.length);
                }
            }
            at += length;
        }
        self.job.set_remaining(self.follower.remaining());
        Ok(())
    }

    /// Copies what is dirty, once from the beginning to the end.
    async fn round(&self) -> Result<()> {
        let mut under_way: VecDeque<JoinHandle<Result<(), CopyError>>> = VecDeque::new();
        let mut at = 0;
        let mut result = Ok(());
        while let Some((offset, length)) = self.follower.dirty.next_dirty(at, CHUNK) {
            result = self.job.pace().await;
            if result.is_err() {
                break;
            }
            under_way.push_back(self.copy(offset, length));
            at = offset + length;
            if under_way.len() >= PARALLEL
                && let Some(Err(error)) = next(&mut under_way).await
            {
                result = self.deal_with(error).await;
                if result.is_err() {
                    break;
                }
            }
        }
        // Nothing may be under way when the job ends.
        while let Some(ended) = next(&mut under_way).await {
            if let (Ok(()), Err(error)) = (&result, ended) {
                result = self.deal_with(error).await;
            }
        }
        result
    }

    fn copy(&self, offset: u64, length: u64) -> JoinHandle<Result<(), CopyError>> {
        let (source, follower, job) =
            (self.source.clone(), self.follower.clone(), self.job.clone());
        // A change from now on is found dirty afterwards, or else was there to be copied.
        follower.dirty.clear(offset, length);
        spawn_local(async move {
            let _held = source.ranges().lock(offset, length).await;
            let copied = copy_range(&source, &follower.target, offset, length).await;
            if copied.is_err() {
                follower.dirty.set(offset, length);
            } else {
                job.did(length);
                job.set_remaining(follower.remaining());
            }
            copied
        })
    }

    /// Ends the job because of a failure, or goes on: what failed is still marked as dirty.
    async fn deal_with(&self, (error, side): CopyError) -> Result<()> {
        match self.job.failure(&error, side) {
            ErrorAction::Report => Err(error),
            ErrorAction::Stop => self.job.breathe().await,
            ErrorAction::Ignore => executor::sleep(GATHER).await,
        }
    }
}

async fn next<T>(under_way: &mut VecDeque<JoinHandle<T>>) -> Option<T> {
    match under_way.pop_front() {
        Some(handle) => Some(handle.await),
        None => None,
    }
}
