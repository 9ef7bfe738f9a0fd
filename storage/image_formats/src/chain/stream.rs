//! Brings the data of backing files into the image on top, which then needs them no more.

use std::rc::Rc;

use block::executor;
use block::job::{ErrorAction, IoSide, Job};
use block::{
    BlockBackend, BlockError, BlockFuture, Change, Disk, Extent, ExtentKind, ExtentQuery, IoBuf,
    Result, Scope, WriteWatcher, ZeroFlags,
};

use super::{file_of, layers, name_for, need_writable, qcow2_layer};
use crate::qcow2::Qcow2;

/// Bytes that are copied in one go.
const CHUNK: u64 = 1 << 20;
/// Bytes whose extents are looked at in one go.
const LOOK: u64 = 64 << 20;

/// What is streamed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stream {
    /// The number of the image that stays below; `None`: none.
    pub base: Option<usize>,
    /// What the header shall call that image, instead of its name.
    pub backing_file: Option<String>,
}

/// Sees nothing, but makes changes hold their ranges.
struct Holder(u64);

impl WriteWatcher for Holder {
    fn granularity(&self) -> u64 {
        self.0
    }

    fn before(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn after<'a>(&'a self, _: u64, _: u64, _: &'a Change, _: bool) -> BlockFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// Streams until the top image needs nothing between it and the base.
///
/// # Errors
///
/// `Unsupported` if the top image is not qcow2, what ended the job, or that it was cancelled; what has been copied by then
/// stays where it is, which changes nothing that a guest sees.
pub async fn stream(job: &Job, disk: &Rc<Disk>, what: &Stream) -> Result<()> {
    need_writable(disk)?;
    let top = qcow2_layer(disk, 0)?;
    let count = layers(&disk.backend()).len();
    if what.base.is_some_and(|base| base == 0 || base >= count) {
        let message = "the base is no backing file of the disk";
        return Err(BlockError::invalid_argument(message));
    }
    let block = top.cluster_size();
    let holder: Rc<dyn WriteWatcher> = Rc::new(Holder(block));
    let still = disk.stand_still().await;
    disk.watch(&still, holder.clone());
    drop(still);
    let streamer = Streamer {
        job,
        disk,
        top: &top,
        base: what.base.and_then(|base| u32::try_from(base).ok()),
    };
    let copied = streamer.copy_all().await;
    disk.unwatch(&holder);
    copied?;
    job.settle().await?;
    cut(disk, &top, what).await
}

struct Streamer<'a> {
    job: &'a Job,
    disk: &'a Disk,
    top: &'a Rc<Qcow2>,
    base: Option<u32>,
}

impl Streamer<'_> {
    /// Whether the top image must take an extent over.
    fn needs(&self, extent: &Extent) -> bool {
        let between = extent.depth >= 1 && self.base.is_none_or(|base| extent.depth < base);
        // Without a base, what is nowhere reads as zeroes anyway.
        let is_zero = self.base.is_none() && extent.reads_as_zero();
        between && extent.kind != ExtentKind::Unallocated && !is_zero
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>> {
        let query = ExtentQuery {
            offset,
            length,
            scope: Scope::Chain,
            limit: 256,
        };
        self.disk.backend().extents(query).await
    }

    async fn copy_all(&self) -> Result<()> {
        let size = self.disk.size();
        self.job.set_remaining(size);
        let mut at = 0;
        while at < size {
            self.job.breathe().await?;
            let found = self.extents(at, LOOK.min(size - at)).await;
            for extent in self
                .deal_with(found, IoSide::Source)
                .await?
                .unwrap_or_default()
            {
                let end = extent.end();
                while at < end {
                    let length = CHUNK.min(end - at);
                    if self.needs(&extent) {
                        self.job.pace().await?;
                        let copied = self.copy(at, length).await;
                        if self.deal_with(copied, IoSide::Source).await?.is_none() {
                            continue;
                        }
                        self.job.did(length);
                    } else {
                        self.job.count_skipped(length);
                    }
                    at += length;
                }
            }
        }
        Ok(())
    }

    /// Takes a range over. What the guest has written meanwhile is newer and stays.
    async fn copy(&self, offset: u64, length: u64) -> Result<()> {
        let block = self.top.cluster_size();
        let start = offset / block * block;
        let end = (offset + length).next_multiple_of(block);
        let _held = self.disk.ranges().lock(start, end - start).await;
        let mut at = offset;
        while at < offset + length {
            for extent in self.extents(at, offset + length - at).await? {
                if self.needs(&extent) {
                    self.take_over(&extent).await?;
                }
                at = extent.end();
            }
        }
        Ok(())
    }

    async fn take_over(&self, extent: &Extent) -> Result<()> {
        let (offset, length) = (extent.offset, extent.length);
        if extent.reads_as_zero() {
            let flags = ZeroFlags::MAY_UNMAP;
            return self.top.write_zeroes(offset, length, flags).await;
        }
        let buf = IoBuf::zeroed(usize::try_from(length).unwrap_or(0));
        self.top.read(offset, buf.clone()).await?;
        self.top.write(offset, buf).await
    }

    /// The result, or `None` where it is to be tried again.
    async fn deal_with<T>(&self, result: Result<T>, side: IoSide) -> Result<Option<T>> {
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        match self.job.failure(&error, side) {
            ErrorAction::Report => return Err(error),
            ErrorAction::Stop => self.job.breathe().await?,
            ErrorAction::Ignore => {
                self.job.breathe().await?;
                executor::sleep(std::time::Duration::from_millis(10)).await?;
            }
        }
        Ok(None)
    }
}

/// Lets the top image stand on the base alone.
async fn cut(disk: &Disk, top: &Rc<Qcow2>, what: &Stream) -> Result<()> {
    let _still = disk.stand_still().await;
    let images = layers(&disk.backend());
    // Everything is in the top image before its header forgets the others.
    top.flush().await?;
    let Some(base) = what
        .base
        .and_then(|base| Some((base, images.get(base)?.clone())))
    else {
        top.change_backing_name(None, None).await?;
        top.set_backing(None);
        return Ok(());
    };
    let (number, base) = base;
    if number == 1 {
        return Ok(());
    }
    let name = match &what.backing_file {
        Some(name) => name.clone(),
        None => match images.get(number - 1).and_then(super::as_qcow2) {
            Some(above) => name_for(top, &above, &file_of(&base)),
            None => super::lasting_name(&file_of(&base)),
        },
    };
    let format = base.format_name().to_owned();
    top.change_backing_name(Some(name), Some(format)).await?;
    top.set_backing(Some(base));
    Ok(())
}
