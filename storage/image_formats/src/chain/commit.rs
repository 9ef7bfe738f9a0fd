//! Brings the data of images into a backing file of theirs.

use std::rc::Rc;

use block::executor;
use block::job::{CopyMode, ErrorAction, IoSide, Job, Layers, Mirror, MirrorOptions, copy_range};
use block::{BlockError, Disk, DiskOptions, Extent, ExtentQuery, Result, Scope, StandStill};

use super::{
    as_qcow2, cache_of, file_of, layers, name_for, need_writable, qcow2_layer, reopen_below,
};
use crate::ImageOptions;

/// Bytes that are copied in one go.
const CHUNK: u64 = 1 << 20;
/// Bytes that are copied together at least.
const GRANULARITY: u32 = 64 << 10;

/// What is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The number of the uppermost image whose data goes down.
    pub top: usize,
    /// The number of the image that takes it.
    pub base: usize,
    /// What the header of the image above `top` shall call the base, instead of its name.
    pub backing_file: Option<String>,
}

impl Commit {
    /// Whether it can be done.
    ///
    /// # Errors
    ///
    /// One line that says why not.
    pub fn check(&self, disk: &Disk) -> Result<()> {
        need_writable(disk)?;
        let images = layers(&disk.backend());
        if self.top >= self.base || self.base >= images.len() {
            let message = "the base is no backing file of the image that is committed";
            return Err(BlockError::invalid_argument(message));
        }
        let (top, base) = (&images[self.top], &images[self.base]);
        if base.limits().size > top.limits().size {
            let (base, top) = (file_of(base), file_of(top));
            let message = format!("'{base}' is larger than '{top}', so its end would show up");
            return Err(BlockError::unsupported(message));
        }
        Ok(())
    }
}

/// The base, open for writing and as large as what is committed to it.
async fn open_base(
    disk: &Disk,
    still: &StandStill,
    what: &Commit,
    options: &ImageOptions,
) -> Result<Rc<Disk>> {
    let size = layers(&disk.backend())[what.top].limits().size;
    let base = reopen_below(disk, still, what.base - 1, true, options).await?;
    if base.limits().size < size {
        base.resize(size).await?;
    }
    let policies = DiskOptions {
        cache: cache_of(disk),
        discard: true,
        ..DiskOptions::default()
    };
    Ok(Rc::new(Disk::new(base, policies)))
}

/// Commits everything that is above the base, and what is written meanwhile; then the disk goes over to the base.
///
/// # Errors
///
/// What ended the job, or that it was cancelled; then the disk is as it was, and the base is for reading again.
pub async fn commit_active(
    job: &Rc<Job>,
    disk: &Rc<Disk>,
    what: &Commit,
    options: &ImageOptions,
) -> Result<()> {
    what.check(disk)?;
    let still = disk.stand_still().await;
    let opened = open_base(disk, &still, what, options).await;
    drop(still);
    let result = match opened {
        Ok(base) => mirror_down(job, disk, &base, what).await,
        Err(error) => Err(error),
    };
    if !matches!(result, Ok(true)) {
        let still = disk.stand_still().await;
        // Where this fails, the base only stays writable.
        let _ = reopen_below(disk, &still, what.base - 1, false, options).await;
    }
    result.map(drop)
}

/// Whether the disk has gone over to the base.
async fn mirror_down(
    job: &Rc<Job>,
    disk: &Rc<Disk>,
    base: &Rc<Disk>,
    what: &Commit,
) -> Result<bool> {
    let images = layers(&disk.backend());
    let clusters = images.iter().filter_map(as_qcow2);
    let granularity = clusters.map(|image| image.cluster_size() as u32).max();
    let mirror = MirrorOptions {
        granularity: granularity.unwrap_or(0).max(GRANULARITY),
        layers: Layers::Upper(u32::try_from(what.base).unwrap_or(u32::MAX)),
        target_is_zero: false,
        copy_mode: CopyMode::Background,
    };
    drop(images);
    let mirror = Mirror::new(job.clone(), disk.clone(), base.clone(), mirror)?;
    let end = mirror.run().await?;
    job.settle().await?;
    if !end.pivot {
        return Ok(false);
    }
    let above = qcow2_layer(disk, what.base - 1)?;
    let old = disk.replace_backend(&end.still, base.backend());
    // Nothing is lost if the old image cannot be closed in order: the base has it all.
    let _ = old.close().await;
    above.set_backing(None);
    Ok(true)
}

/// Commits images that lie below the top; then the image above them stands on the base.
///
/// # Errors
///
/// What ended the job, or that it was cancelled; then the chain is as it was.
pub async fn commit_below(
    job: &Rc<Job>,
    disk: &Rc<Disk>,
    what: &Commit,
    options: &ImageOptions,
) -> Result<()> {
    what.check(disk)?;
    if what.top == 0 {
        let message = "the top image is committed in another way";
        return Err(BlockError::invalid_argument(message));
    }
    qcow2_layer(disk, what.top - 1)?;
    let still = disk.stand_still().await;
    let opened = open_base(disk, &still, what, options).await;
    drop(still);
    let result = match opened {
        Ok(base) => match copy_down(job, disk, &base, what).await {
            Ok(()) => cut_out(job, disk, &base, what, options).await,
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    let above = if result.is_ok() {
        what.top - 1
    } else {
        what.base - 1
    };
    let still = disk.stand_still().await;
    let _ = reopen_below(disk, &still, above, false, options).await;
    result
}

/// Copies what the images above the base hold.
async fn copy_down(job: &Rc<Job>, disk: &Rc<Disk>, base: &Rc<Disk>, what: &Commit) -> Result<()> {
    let top = layers(&disk.backend())[what.top].clone();
    let held = Layers::Upper(u32::try_from(what.base - what.top).unwrap_or(u32::MAX));
    let size = top.limits().size;
    let source = Disk::new(top, DiskOptions::default());
    job.set_remaining(size);
    let mut at = 0;
    while at < size {
        job.pace().await?;
        let query = ExtentQuery {
            offset: at,
            length: size - at,
            scope: Scope::Chain,
            limit: 1,
        };
        let found = match source.extents(query).await {
            Ok(found) => found,
            Err(error) => {
                deal_with(job, error, IoSide::Source).await?;
                continue;
            }
        };
        let Some(extent) = found.into_iter().next() else {
            break;
        };
        if !held.hold(&extent) {
            job.count_skipped(extent.length);
            at = extent.end();
            continue;
        }
        let length = chunk(&extent);
        match copy_range(&source, base, at, length).await {
            Ok(()) => {
                job.did(length);
                at += length;
            }
            Err((error, side)) => deal_with(job, error, side).await?,
        }
    }
    base.flush().await
}

/// How much of an extent is copied in one go: zeroes cost nothing.
fn chunk(extent: &Extent) -> u64 {
    if extent.reads_as_zero() {
        extent.length.min(1 << 30)
    } else {
        extent.length.min(CHUNK)
    }
}

async fn deal_with(job: &Job, error: BlockError, side: IoSide) -> Result<()> {
    match job.failure(&error, side) {
        ErrorAction::Report => Err(error),
        ErrorAction::Stop => job.breathe().await,
        ErrorAction::Ignore => {
            job.breathe().await?;
            executor::sleep(std::time::Duration::from_millis(10)).await
        }
    }
}

/// Lets the image above those that were committed stand on the base.
async fn cut_out(
    job: &Job,
    disk: &Rc<Disk>,
    base: &Rc<Disk>,
    what: &Commit,
    options: &ImageOptions,
) -> Result<()> {
    job.settle().await?;
    let still = disk.stand_still().await;
    let above = what.top - 1;
    // The header of an image below the top can be written only if it is open for that.
    if above > 0 {
        reopen_below(disk, &still, above - 1, true, options).await?;
    }
    let changed = rename(disk, base, what).await;
    if above > 0 {
        let _ = reopen_below(disk, &still, above - 1, false, options).await;
    }
    changed
}

async fn rename(disk: &Disk, base: &Disk, what: &Commit) -> Result<()> {
    let overlay = qcow2_layer(disk, what.top - 1)?;
    let on_base = qcow2_layer(disk, what.base - 1)?;
    let backend = base.backend();
    let name = match &what.backing_file {
        Some(name) => name.clone(),
        None => name_for(&overlay, &on_base, &file_of(&backend)),
    };
    let format = backend.format_name().to_owned();
    overlay
        .change_backing_name(Some(name), Some(format))
        .await?;
    overlay.set_backing(Some(backend));
    on_base.set_backing(None);
    Ok(())
}
