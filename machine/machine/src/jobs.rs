//! Jobs on the machine's disks. Each runs on its disk's thread; a disk has one at a time.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::executor::{sleep, spawn_local};
use block::job::{
    Backup, BackupOptions, CopyMode, Job, JobEvent, JobStatus, Layers, Mirror, MirrorOptions,
};
use block::{BlockError, DirtyBitmap, Disk, Result};
use image_formats::ImageOptions;
use image_formats::chain::{self, Commit, NewTarget, Stream};
use parking_lot::Mutex;
use qmp::{BitmapVerb, JobReport, JobRequest, JobVerb, JobWork, Sync, Target};

use crate::lifecycle::{Lifecycle, Request};

/// Bytes that are copied together at least, if nobody says otherwise.
const GRANULARITY: u32 = 64 << 10;

thread_local! {
    /// The job of this thread's disk.
    static HERE: RefCell<Option<Rc<Job>>> = const { RefCell::new(None) };
}

/// The jobs of all disks: the disk's name by the job's.
pub(crate) type Registry = Arc<Mutex<BTreeMap<String, String>>>;

/// What a job needs of the machine.
pub(crate) struct Surroundings {
    pub(crate) registry: Registry,
    pub(crate) lifecycle: Arc<Lifecycle>,
    /// How the disk's image was opened.
    pub(crate) options: ImageOptions,
}

type Work = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Makes everything ready and begins; on the disk's thread.
pub(crate) async fn begin(disk: Rc<Disk>, request: JobRequest, around: Surroundings) -> Result<()> {
    let Surroundings {
        registry,
        lifecycle,
        options,
    } = around;
    let make_job = move || {
        let tell = move |job: &Job, event: JobEvent| {
            if event == JobEvent::Status(JobStatus::Null) {
                registry.lock().remove(&job.options().id);
                HERE.take();
            }
            let report = report(job);
            lifecycle.post(Request::Job { report, event });
        };
        let job = Rc::new(Job::new(request.options, tell));
        HERE.replace(Some(job.clone()));
        job.start();
        job
    };
    let (job, work): (Rc<Job>, Work) = match request.work {
        JobWork::Mirror {
            target,
            granularity,
            blocking,
        } => {
            let copy = open(&disk, &target, &options).await?;
            let mirror = MirrorOptions {
                granularity: copy.granularity.max(granularity.unwrap_or(GRANULARITY)),
                layers: copy.layers,
                target_is_zero: copy.is_zero,
                copy_mode: if blocking {
                    CopyMode::WriteBlocking
                } else {
                    CopyMode::Background
                },
            };
            let job = make_job();
            let work = mirror_to(job.clone(), disk, copy.target, mirror, options);
            (job, Box::pin(work))
        }
        JobWork::Backup { target, bitmap } => {
            let bitmap = match bitmap {
                Some((name, clears)) => Some((usable_bitmap(&disk, &name)?, clears)),
                None => None,
            };
            let copy = open(&disk, &target, &options).await?;
            let job = make_job();
            let work = back_up(job.clone(), disk, copy, bitmap).await;
            (job, work)
        }
        JobWork::Stream { base, backing_file } => {
            let what = Stream {
                base: base.map(|base| layer(&disk, &base)).transpose()?,
                backing_file,
            };
            let job = make_job();
            let running = job.clone();
            let work = async move { chain::stream(&running, &disk, &what).await };
            (job, Box::pin(work))
        }
        JobWork::Commit {
            top,
            base,
            backing_file,
        } => {
            let what = commit(&disk, top, base, backing_file)?;
            let job = make_job();
            let running = job.clone();
            let work = async move {
                if what.top == 0 {
                    chain::commit_active(&running, &disk, &what, &options).await
                } else {
                    chain::commit_below(&running, &disk, &what, &options).await
                }
            };
            (job, Box::pin(work))
        }
    };
    spawn_local(async move {
        let result = work.await;
        job.end(result).await;
    });
    Ok(())
}

fn layer(disk: &Disk, name: &str) -> Result<usize> {
    chain::find_layer(&disk.backend(), name).ok_or_else(|| {
        BlockError::invalid_argument(format!("Can't find '{name}' in the backing chain"))
    })
}

fn commit(
    disk: &Disk,
    top: Option<String>,
    base: Option<String>,
    backing_file: Option<String>,
) -> Result<Commit> {
    let lowest = chain::layers(&disk.backend()).len() - 1;
    let what = Commit {
        top: top.map_or(Ok(0), |top| layer(disk, &top))?,
        base: base.map_or(Ok(lowest), |base| layer(disk, &base))?,
        backing_file,
    };
    what.check(disk)?;
    Ok(what)
}

/// A target that is ready.
struct Copy {
    target: Rc<Disk>,
    is_zero: bool,
    layers: Layers,
    /// The least that is copied together: whole clusters, as nothing is below the target yet.
    granularity: u32,
}

async fn open(disk: &Rc<Disk>, target: &Target, options: &ImageOptions) -> Result<Copy> {
    let images = chain::layers(&disk.backend());
    let (layers, below) = match target.sync {
        Sync::Full => (Layers::All, None),
        // Without a backing file the top image is all there is.
        Sync::Top if images.len() == 1 => (Layers::All, None),
        Sync::Top => (Layers::Upper(1), images.get(1)),
        Sync::None => (Layers::None, images.first()),
    };
    let backing = below.and_then(|image| {
        let name = image.file_name()?.to_string();
        Some((name, image.format_name().to_owned()))
    });
    let new = NewTarget {
        file: target.file.clone(),
        format: target.format.clone(),
        existing: target.existing,
        backing,
    };
    drop(images);
    let (target, is_zero) = chain::open_target(disk, &new, options).await?;
    if target.size() != disk.size() {
        let message = "Source and target image have different sizes";
        return Err(BlockError::invalid_argument(message));
    }
    let cluster = chain::as_qcow2(&target.backend()).map_or(0, |image| image.cluster_size());
    Ok(Copy {
        target,
        is_zero,
        layers,
        granularity: u32::try_from(cluster).unwrap_or(0).max(512),
    })
}

async fn mirror_to(
    job: Rc<Job>,
    disk: Rc<Disk>,
    target: Rc<Disk>,
    how: MirrorOptions,
    options: ImageOptions,
) -> Result<()> {
    let mirror = Mirror::new(job.clone(), disk.clone(), target.clone(), how)?;
    let mirrored = async {
        let end = mirror.run().await?;
        job.settle().await?;
        Ok(end)
    };
    let end = match mirrored.await {
        Ok(end) => end,
        Err(error) => {
            // What is there of it stays.
            let _ = target.close().await;
            return Err(error);
        }
    };
    if end.pivot {
        return chain::pivot(&disk, &end.still, target.backend(), &options).await;
    }
    drop(end);
    target.close().await
}

fn usable_bitmap(disk: &Disk, name: &str) -> Result<Rc<DirtyBitmap>> {
    let bitmap = disk
        .bitmap(name)
        .ok_or_else(|| BlockError::invalid_argument(format!("Dirty bitmap '{name}' not found")))?;
    if bitmap.is_busy() {
        let message =
            format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
        return Err(BlockError::invalid_argument(message));
    }
    Ok(bitmap)
}

/// Begins the backup of this moment; what is left to do is returned.
async fn back_up(
    job: Rc<Job>,
    disk: Rc<Disk>,
    copy: Copy,
    bitmap: Option<(Rc<DirtyBitmap>, bool)>,
) -> Work {
    let how = BackupOptions {
        granularity: copy.granularity.max(GRANULARITY),
        layers: copy.layers,
        target_is_zero: copy.is_zero,
    };
    let still = disk.stand_still().await;
    let taken = bitmap.map(|(bitmap, clears)| Taken::take(bitmap, clears));
    let changed = match &taken {
        Some(Ok(taken)) => Some(&taken.content),
        _ => None,
    };
    let target = copy.target.clone();
    let begun = Backup::begin(job.clone(), disk.clone(), target, &still, changed, how);
    drop(still);
    Box::pin(async move {
        let taken = taken.transpose()?;
        let result = match begun {
            Ok(backup) => match backup.run().await {
                Ok(()) => job.settle().await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        if let Some(taken) = taken {
            taken.give_back(result.is_ok());
        }
        let closed = copy.target.close().await;
        result.and(closed)
    })
}

/// A bitmap as it was when a backup began.
struct Taken {
    bitmap: Rc<DirtyBitmap>,
    content: DirtyBitmap,
    clears: bool,
}

impl Taken {
    fn take(bitmap: Rc<DirtyBitmap>, clears: bool) -> Result<Self> {
        let content = DirtyBitmap::new("", bitmap.size(), bitmap.granularity())?;
        content.merge(&bitmap);
        bitmap.set_busy(true);
        if clears {
            bitmap.clear(0, bitmap.size());
        }
        Ok(Self {
            bitmap,
            content,
            clears,
        })
    }

    fn give_back(self, done: bool) {
        if self.clears && !done {
            self.bitmap.merge(&self.content);
        }
        self.bitmap.set_busy(false);
    }
}

/// What the job of this thread's disk is.
pub(crate) fn here() -> Option<JobReport> {
    HERE.with_borrow(|job| job.as_deref().map(report))
}

fn report(job: &Job) -> JobReport {
    let (done, total) = job.progress();
    let options = job.options();
    JobReport {
        id: options.id.clone(),
        kind: options.kind,
        status: job.status(),
        paused: job.is_paused(),
        io_status: job.io_status(),
        speed: job.speed(),
        done,
        total,
        error: job.error(),
        auto_finalize: options.auto_finalize,
        auto_dismiss: options.auto_dismiss,
    }
}

/// Steers the job of this thread's disk.
pub(crate) fn steer(verb: JobVerb) -> Result<()> {
    let Some(job) = HERE.with_borrow(Clone::clone) else {
        return Err(BlockError::invalid_argument("Job not found"));
    };
    match verb {
        JobVerb::Pause => job.pause(),
        JobVerb::Resume => job.resume(),
        JobVerb::Cancel { force } => job.cancel(force),
        JobVerb::Complete => job.complete(),
        JobVerb::Finalize => job.finalize(),
        JobVerb::Dismiss => job.dismiss(),
        JobVerb::SetSpeed(speed) => job.set_speed(speed),
    }
}

/// Ends the job of this thread's disk, and waits for that.
pub(crate) async fn end() {
    if let Some(job) = HERE.with_borrow(Clone::clone) {
        job.abandon();
    }
    while HERE.with_borrow(Option::is_some) {
        if sleep(Duration::from_millis(1)).await.is_err() {
            return;
        }
    }
}

/// Does something with a bitmap of the disk.
pub(crate) fn bitmap(disk: &Disk, name: &str, verb: BitmapVerb) -> Result<()> {
    if let BitmapVerb::Add {
        granularity,
        disabled,
    } = verb
    {
        return add_bitmap(disk, name, granularity, disabled);
    }
    let bitmap = usable_bitmap(disk, name)?;
    match verb {
        BitmapVerb::Add { .. } => {}
        BitmapVerb::Remove => disk.remove_bitmap(&bitmap),
        BitmapVerb::Clear => bitmap.clear(0, bitmap.size()),
        BitmapVerb::Enable => bitmap.set_enabled(true),
        BitmapVerb::Disable => bitmap.set_enabled(false),
        BitmapVerb::Merge(names) => {
            let others = names.iter().map(|name| usable_bitmap(disk, name));
            // All of them or none.
            for other in others.collect::<Result<Vec<_>>>()? {
                bitmap.merge(&other);
            }
        }
    }
    Ok(())
}

fn add_bitmap(disk: &Disk, name: &str, granularity: Option<u32>, disabled: bool) -> Result<()> {
    if name.is_empty() || name.len() > 1023 {
        let message = "Bitmap name must have 1 to 1023 bytes";
        return Err(BlockError::invalid_argument(message));
    }
    if disk.bitmap(name).is_some() {
        let message = format!("Bitmap already exists: {name}");
        return Err(BlockError::invalid_argument(message));
    }
    // QEMU's rule: the cluster size, but between 4 KiB and 64 KiB.
    let cluster = chain::as_qcow2(&disk.backend()).map_or(u64::from(GRANULARITY), |image| {
        image.cluster_size().clamp(4096, u64::from(GRANULARITY))
    });
    let granularity = granularity.unwrap_or(u32::try_from(cluster).unwrap_or(GRANULARITY));
    let bitmap = DirtyBitmap::new(name, disk.size(), granularity)?;
    bitmap.set_enabled(!disabled);
    disk.add_bitmap(Rc::new(bitmap));
    Ok(())
}
