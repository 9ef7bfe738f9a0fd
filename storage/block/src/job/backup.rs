//! A copy of a disk as it was at one moment.

use std::cell::RefCell;
use std::rc::Rc;

use super::control::{ErrorAction, IoSide, Job};
use super::copy::{CopyError, Layers, copy_range, extents};
use crate::backend::BlockFuture;
use crate::bitmap::{BitmapRun, DirtyBitmap};
use crate::disk::Disk;
use crate::error::{BlockError, Result};
use crate::executor::{self, yield_now};
use crate::watch::{Change, StandStill, WriteWatcher};

/// Bytes that are copied in one go.
const CHUNK: u64 = 1 << 20;
/// Bytes that are looked at in one go before they are copied.
const LOOK: u64 = 64 << 20;

/// How a backup is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupOptions {
    /// Bytes that are copied together: a power of two from 512 up.
    pub granularity: u32,
    /// What is copied: with [`Layers::None`] only what is about to change.
    pub layers: Layers,
    /// The target reads as zeroes, so zeroes need no copy.
    pub target_is_zero: bool,
}

/// A job that backs a disk up.
pub struct Backup {
    job: Rc<Job>,
    source: Rc<Disk>,
    options: BackupOptions,
    keeper: Rc<Keeper>,
}

/// Copies what is about to change.
struct Keeper {
    job: Rc<Job>,
    source: Rc<Disk>,
    target: Rc<Disk>,
    /// What the target does not have yet.
    missing: DirtyBitmap,
    /// Why the backup can't be complete any more.
    broken: RefCell<Option<CopyError>>,
}

impl WriteWatcher for Keeper {
    fn granularity(&self) -> u64 {
        u64::from(self.missing.granularity())
    }

    fn before(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let block = self.granularity();
            let end = (offset + length)
                .next_multiple_of(block)
                .min(self.missing.size());
            let mut at = offset / block * block;
            while at < end && self.broken.borrow().is_none() {
                let BitmapRun { dirty, length } = self.missing.run_at(at, CHUNK.min(end - at));
                // The guest's data is worth more than the backup: its write goes on, the job fails.
                if dirty && let Err(error) = self.copy(at, length).await {
                    *self.broken.borrow_mut() = Some(error);
                    self.job.wake();
                }
                at += length;
            }
            Ok(())
        })
    }

    fn after<'a>(
        &'a self,
        _offset: u64,
        _length: u64,
        _change: &'a Change,
        _done: bool,
    ) -> BlockFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

impl Keeper {
    /// Copies a range that is held, of whole blocks.
    async fn copy(&self, offset: u64, length: u64) -> Result<(), CopyError> {
        copy_range(&self.source, &self.target, offset, length).await?;
        self.has(offset, length);
        Ok(())
    }

    /// The target has this range.
    fn has(&self, offset: u64, length: u64) {
        self.missing.clear(offset, length);
        self.job.did(length);
        let missing = self.missing.dirty_bytes().min(self.missing.size());
        if self.job.progress().1 > self.job.progress().0 {
            self.job.set_remaining(missing);
        }
    }
}

impl Backup {
    /// Begins: the backup will hold what `source`, which stands still, holds now; with `changed`, only what is dirty there.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a granularity that cannot be, or a target of another size.
    pub fn begin(
        job: Rc<Job>,
        source: Rc<Disk>,
        target: Rc<Disk>,
        still: &StandStill,
        changed: Option<&DirtyBitmap>,
        options: BackupOptions,
    ) -> Result<Self> {
        let size = source.size();
        if target.size() != size {
            let message = "Source and target image have different sizes";
            return Err(BlockError::invalid_argument(message));
        }
        let missing = DirtyBitmap::new("", size, options.granularity)?;
        match changed {
            Some(changed) => missing.merge(changed),
            None => missing.set(0, size),
        }
        if options.layers != Layers::None {
            job.set_remaining(missing.dirty_bytes().min(size));
        }
        let keeper = Rc::new(Keeper {
            job: job.clone(),
            source: source.clone(),
            target,
            missing,
            broken: RefCell::default(),
        });
        source.watch(still, keeper.clone());
        Ok(Self {
            job,
            source,
            options,
            keeper,
        })
    }

    /// Copies until the backup is complete.
    ///
    /// # Errors
    ///
    /// What ended the job, or that it was cancelled; without that, a backup of [`Layers::None`] does not end.
    pub async fn run(&self) -> Result<()> {
        let result = self.copy_all().await;
        let watcher: Rc<dyn WriteWatcher> = self.keeper.clone();
        self.source.unwatch(&watcher);
        // Changes that began before may still copy to the target.
        drop(self.source.stand_still().await);
        result?;
        self.check_broken()?;
        self.keeper.target.flush().await
    }

    fn check_broken(&self) -> Result<()> {
        match self.keeper.broken.borrow_mut().take() {
            Some((error, side)) => {
                // It is too late for another policy than to report it.
                self.job.failure(&error, side);
                Err(error)
            }
            None => Ok(()),
        }
    }

    async fn copy_all(&self) -> Result<()> {
        let mut at = 0;
        loop {
            self.job.pace().await?;
            self.check_broken()?;
            if self.options.layers == Layers::None {
                self.job.wait().await;
                continue;
            }
            let Some((offset, length)) = self.keeper.missing.next_dirty(at, LOOK) else {
                return Ok(());
            };
            match self.copy_some(offset, length).await {
                Ok(end) => at = end,
                Err((error, side)) => {
                    if self.keeper.broken.borrow().is_some() {
                        return self.check_broken();
                    }
                    match self.job.failure(&error, side) {
                        ErrorAction::Report => return Err(error),
                        ErrorAction::Stop => self.job.breathe().await?,
                        // As with QEMU, what cannot be copied is tried again.
                        ErrorAction::Ignore => {
                            executor::sleep(std::time::Duration::from_millis(10)).await?
                        }
                    }
                }
            }
        }
    }

    /// Copies from a missing range, or finds that it need not be; returns how far it came.
    async fn copy_some(&self, offset: u64, length: u64) -> Result<u64, CopyError> {
        let block = u64::from(self.options.granularity);
        // Between this look and the copy a write may come; it copies what was there, and a block that is not missing any
        // more is not looked at again.
        let unneeded = self.unneeded(offset, length).await?;
        if unneeded > 0 {
            let _held = self.source.ranges().lock(offset, unneeded).await;
            if self.unneeded(offset, unneeded).await? == unneeded {
                self.keeper.has(offset, unneeded);
                yield_now().await;
                return Ok(offset + unneeded);
            }
        }
        let length = length.min(CHUNK.max(block));
        let _held = self.source.ranges().lock(offset, length).await;
        let BitmapRun { dirty, length } = self.keeper.missing.run_at(offset, length);
        if dirty {
            self.keeper.copy(offset, length).await?;
        }
        Ok(offset + length)
    }

    /// How many bytes from `offset` on, in whole blocks, need no copy.
    async fn unneeded(&self, offset: u64, length: u64) -> Result<u64, CopyError> {
        if self.options.layers == Layers::All && !self.options.target_is_zero {
            return Ok(0);
        }
        let found = extents(&self.source, offset, length).await;
        let mut end = offset;
        for extent in found.map_err(|error| (error, IoSide::Source))? {
            let zero = self.options.target_is_zero && extent.reads_as_zero();
            if self.options.layers.hold(&extent) && !zero {
                break;
            }
            end = extent.end();
        }
        if end == offset + length {
            return Ok(length);
        }
        let block = u64::from(self.options.granularity);
        Ok((end / block * block).saturating_sub(offset))
    }
}
