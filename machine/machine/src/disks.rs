//! Disks from the specification, and what monitors ask of them.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;
use std::sync::Arc;

use block::executor::{EngineKind, IoThread};
use block::{
    BlockError, CacheMode, DetectZeroes, DirtyBitmap, Disk, DiskOptions, ThrottleGroup,
    ThrottleLimits,
};
use image_formats::chain::{self, Overlay};
use image_formats::luks::Secret;
use image_formats::{External, ImageOptions, open_image};
use parking_lot::Mutex;
use qmp::{BitmapReport, BlockCall, DiskReport, IoStatus, JobReport, JobRequest};
use virtio::blk::{Blk, BlkHandle, BlkOptions, ErrorAction, ErrorPolicy, IoFailure};
use vm_spec::{Aio, Discard, DiskSpec, SecretSpec};

use crate::MachineError;
use crate::jobs::{self, Registry, Surroundings};
use crate::lifecycle::{Lifecycle, Request};

/// Most request queues that a disk gets by itself.
const MAX_QUEUES: u32 = 8;

fn options(spec: &DiskSpec) -> DiskOptions {
    DiskOptions {
        cache: match spec.cache {
            vm_spec::CacheMode::Writeback => CacheMode::Writeback,
            vm_spec::CacheMode::Writethrough => CacheMode::Writethrough,
            vm_spec::CacheMode::None => CacheMode::None,
            vm_spec::CacheMode::Directsync => CacheMode::DirectSync,
            vm_spec::CacheMode::Unsafe => CacheMode::Unsafe,
        },
        discard: spec.discard == Discard::Unmap,
        detect_zeroes: match spec.detect_zeroes {
            vm_spec::DetectZeroes::Off => DetectZeroes::Off,
            vm_spec::DetectZeroes::On => DetectZeroes::On,
            vm_spec::DetectZeroes::Unmap => DetectZeroes::Unmap,
        },
        read_only: spec.read_only,
        logical_block_size: Some(spec.logical_block_size),
        physical_block_size: None,
    }
}

fn policy(policy: vm_spec::ErrorPolicy) -> ErrorPolicy {
    match policy {
        vm_spec::ErrorPolicy::Report => ErrorPolicy::Report,
        vm_spec::ErrorPolicy::Ignore => ErrorPolicy::Ignore,
        vm_spec::ErrorPolicy::Stop => ErrorPolicy::Stop,
        vm_spec::ErrorPolicy::Enospc => ErrorPolicy::Enospc,
    }
}

/// How a disk's image is opened.
fn image_options(spec: &DiskSpec, secret: Option<Secret>) -> ImageOptions {
    let options = options(spec);
    ImageOptions {
        format: spec.format.map(|format| format.as_str().to_owned()),
        write: !spec.read_only,
        cache: options.cache,
        discard: options.discard,
        detect_zeroes: options.detect_zeroes,
        external: External::Follow,
        snapshot: spec.snapshot,
        secret,
        ..ImageOptions::default()
    }
}

/// Opens a disk on the thread that will serve it.
async fn open(
    spec: DiskSpec,
    secret: Option<Secret>,
    throttle: Arc<ThrottleGroup>,
) -> block::Result<Disk> {
    let image = image_options(&spec, secret);
    let name = spec.path.to_string_lossy();
    let image = open_image(&name, &image).await?;
    if !spec.read_only && image.backend.limits().read_only {
        return Err(BlockError::invalid_argument(format!(
            "'{name}' can only be read: expected readonly=on or snapshot=on"
        )));
    }
    Ok(Disk::throttled(image.backend, options(&spec), throttle))
}

/// A disk of the machine, for monitors.
struct Controlled {
    name: String,
    spec: DiskSpec,
    handle: BlkHandle,
    throttle: Mutex<Arc<ThrottleGroup>>,
    io_status: Mutex<IoStatus>,
}

/// All disks of the machine, and the groups for their limits.
#[derive(Clone, Default)]
pub(crate) struct Disks {
    disks: Vec<Arc<Controlled>>,
    groups: Arc<Mutex<BTreeMap<String, Arc<ThrottleGroup>>>>,
    /// Files with passwords, by the ids that disks name.
    secrets: Vec<SecretSpec>,
    jobs: Registry,
}

impl Disks {
    /// No disk yet, and the passwords that there are.
    pub(crate) fn new(secrets: &[SecretSpec]) -> Self {
        Self {
            secrets: secrets.to_vec(),
            ..Self::default()
        }
    }

    /// The password that a disk names.
    fn secret(&self, spec: &DiskSpec) -> Result<Option<Secret>, MachineError> {
        let Some(id) = &spec.key_secret else {
            return Ok(None);
        };
        let Some(secret) = self.secrets.iter().find(|secret| secret.id == *id) else {
            let text = format!("--disk: key-secret={id}: there is no secret with that id");
            return Err(MachineError::Spec(text));
        };
        Ok(Some(Secret::read(&secret.file)?))
    }

    /// The group of this name, made when there is none yet.
    fn group(&self, name: &str) -> Arc<ThrottleGroup> {
        let mut groups = self.groups.lock();
        let make = || Arc::new(ThrottleGroup::new(name, ThrottleLimits::default()));
        groups.entry(name.to_owned()).or_insert_with(make).clone()
    }

    /// Makes the virtio disk number `number`, with an I/O thread of its own; returns its name with it.
    pub(crate) fn add(
        &mut self,
        spec: &DiskSpec,
        number: usize,
        cpus: u32,
        lifecycle: &Arc<Lifecycle>,
    ) -> Result<(String, Box<Blk>), MachineError> {
        let name = spec.id.clone().unwrap_or_else(|| format!("disk{number}"));
        if self.find(&name).is_some() {
            let text = format!("--disk: id={name}: another disk has that name");
            return Err(MachineError::Spec(text));
        }
        let group = self.group(spec.throttle.group.as_ref().unwrap_or(&name));
        if !spec.throttle.limits.is_unlimited() {
            group.set_limits(spec.throttle.limits);
        }
        let secret = self.secret(spec)?;
        let (device, handle) = virtio_disk(spec, number, cpus, secret, group.clone())?;
        let disk = Arc::new(Controlled {
            name: name.clone(),
            spec: spec.clone(),
            handle,
            throttle: Mutex::new(group),
            io_status: Mutex::default(),
        });
        let (lifecycle, told) = (lifecycle.clone(), Arc::downgrade(&disk));
        disk.handle.on_failure(Arc::new(move |failure| {
            if let Some(disk) = told.upgrade() {
                disk.note(&failure);
                let device = disk.name.clone();
                lifecycle.post(Request::DiskFailed { device, failure });
            }
        }));
        self.disks.push(disk);
        Ok((name, Box::new(device)))
    }

    fn find(&self, name: &str) -> Option<&Arc<Controlled>> {
        self.disks.iter().find(|disk| disk.name == name)
    }

    /// Tries again what failures have stopped.
    pub(crate) fn retry(&self) {
        for disk in &self.disks {
            if std::mem::take(&mut *disk.io_status.lock()) != IoStatus::Ok {
                disk.handle.retry();
            }
        }
    }

    /// What all disks are and have done.
    pub(crate) fn report(&self) -> Vec<DiskReport> {
        self.disks.iter().filter_map(|disk| disk.report()).collect()
    }

    /// Gives a disk's group other limits; with `group`, puts it into that one first.
    pub(crate) fn set_throttle(&self, name: &str, group: Option<&str>, limits: ThrottleLimits) {
        let Some(disk) = self.find(name) else {
            return;
        };
        let mut current = disk.throttle.lock();
        if let Some(group) = group {
            *current = self.group(group);
            disk.handle.set_throttle(current.clone());
        }
        current.set_limits(limits);
    }

    /// Gives a disk another size in bytes.
    pub(crate) fn resize(&self, name: &str, size: u64) -> Result<(), String> {
        let disk = self.find(name).ok_or("there is no such disk")?;
        self.check_idle(name)?;
        disk.handle.resize(size).map_err(|why| why.to_string())
    }
}

/// Jobs.
impl Disks {
    /// What all jobs are.
    pub(crate) fn jobs(&self) -> Vec<JobReport> {
        let names: Vec<String> = self.jobs.lock().values().cloned().collect();
        let disks = names.iter().filter_map(|name| self.find(name));
        disks
            .filter_map(|disk| disk.handle.on_disk(|_| async { jobs::here() }).flatten())
            .collect()
    }

    fn check_idle(&self, disk: &str) -> Result<(), String> {
        let jobs = self.jobs.lock();
        match jobs.iter().find(|(_, on)| *on == disk) {
            Some((job, _)) => Err(format!(
                "Node '{disk}' is busy: block device is in use by block job '{job}'"
            )),
            None => Ok(()),
        }
    }

    /// Does something with a disk, as a monitor asks.
    pub(crate) fn block(&self, call: BlockCall, lifecycle: &Arc<Lifecycle>) -> Result<(), String> {
        let find = |name: &str| self.find(name).ok_or("there is no such disk");
        match call {
            BlockCall::Begin(request) => self.begin(request, lifecycle),
            BlockCall::Steer { id, verb } => {
                let disk = self.jobs.lock().get(&id).cloned();
                let disk = disk.ok_or("Job not found")?;
                find(&disk)?.on_thread(move |_| async move { jobs::steer(verb) })
            }
            BlockCall::Overlay {
                disk,
                file,
                existing,
            } => {
                self.check_idle(&disk)?;
                let disk = find(&disk)?;
                let options = self.permanent(disk)?;
                disk.on_thread(move |disk| async move {
                    let overlay = Overlay { file, existing };
                    chain::put_overlay(&disk, &overlay, &options).await
                })
            }
            BlockCall::Bitmap { disk, name, verb } => {
                find(&disk)?.on_thread(move |disk| async move { jobs::bitmap(&disk, &name, verb) })
            }
        }
    }

    /// How a disk was opened whose images have names.
    fn permanent(&self, disk: &Controlled) -> Result<ImageOptions, String> {
        if disk.spec.snapshot {
            let name = &disk.name;
            return Err(format!(
                "'{name}' is temporary: expected a disk without snapshot=on"
            ));
        }
        let secret = self.secret(&disk.spec).map_err(|e| e.to_string())?;
        Ok(image_options(&disk.spec, secret))
    }

    fn begin(&self, request: JobRequest, lifecycle: &Arc<Lifecycle>) -> Result<(), String> {
        let disk = self.find(&request.disk).ok_or("there is no such disk")?;
        let options = self.permanent(disk)?;
        let (id, name) = (request.options.id.clone(), request.disk.clone());
        if self.jobs.lock().contains_key(&id) {
            return Err(format!("Job ID '{id}' already in use"));
        }
        self.check_idle(&name)?;
        self.jobs.lock().insert(id.clone(), name);
        let around = Surroundings {
            registry: self.jobs.clone(),
            lifecycle: lifecycle.clone(),
            options,
        };
        let begun = disk.on_thread(move |disk| jobs::begin(disk, request, around));
        if begun.is_err() {
            self.jobs.lock().remove(&id);
        }
        begun
    }

    /// Ends all jobs, because the machine ends.
    pub(crate) fn end_jobs(&self) {
        for disk in &self.disks {
            disk.handle.on_disk(|_| jobs::end());
        }
    }
}

impl Controlled {
    /// Runs something on the disk's thread.
    fn on_thread<F, Fut>(&self, f: F) -> Result<(), String>
    where
        F: FnOnce(Rc<Disk>) -> Fut + Send + 'static,
        Fut: Future<Output = block::Result<()>> + 'static,
    {
        let done = self.handle.on_disk(f);
        let done = done.ok_or("the disk has been closed")?;
        done.map_err(|error| error.one_line())
    }

    fn note(&self, failure: &IoFailure) {
        if failure.action == ErrorAction::Stop {
            *self.io_status.lock() = if failure.no_space {
                IoStatus::NoSpace
            } else {
                IoStatus::Failed
            };
        }
    }

    fn report(&self) -> Option<DiskReport> {
        let state = self.handle.state()?;
        let options = options(&self.spec);
        let group = self.throttle.lock().clone();
        // A job may have brought the disk to another file.
        let named = state.file.filter(|_| !self.spec.snapshot);
        let file = named.unwrap_or_else(|| self.spec.path.to_string_lossy().into_owned());
        let metadata = std::fs::metadata(&file).ok();
        let stored = metadata.filter(std::fs::Metadata::is_file);
        Some(DiskReport {
            name: self.name.clone(),
            file,
            format: state.format,
            size: state.limits.size,
            allocated: stored.map(|file| file.blocks() * 512),
            backing_depth: state.backing_depth,
            read_only: state.limits.read_only,
            encrypted: self.spec.key_secret.is_some(),
            cache: options.cache,
            detect_zeroes: options.detect_zeroes,
            io_status: *self.io_status.lock(),
            group: group.name().to_owned(),
            limits: group.limits(),
            statistics: state.statistics,
            bitmaps: self.handle.on_disk(bitmaps).unwrap_or_default(),
        })
    }
}

async fn bitmaps(disk: Rc<Disk>) -> Vec<BitmapReport> {
    let report = |bitmap: &Rc<DirtyBitmap>| BitmapReport {
        name: bitmap.name().to_owned(),
        count: bitmap.dirty_bytes(),
        granularity: bitmap.granularity(),
        recording: bitmap.is_enabled(),
        busy: bitmap.is_busy(),
    };
    disk.bitmaps().iter().map(report).collect()
}

fn virtio_disk(
    spec: &DiskSpec,
    number: usize,
    cpus: u32,
    secret: Option<Secret>,
    throttle: Arc<ThrottleGroup>,
) -> Result<(Blk, BlkHandle), MachineError> {
    let engine = match spec.aio {
        Aio::IoUring => EngineKind::Auto,
        Aio::Threads => EngineKind::Threads,
    };
    let thread = IoThread::start(&format!("disk-{number}"), engine)?;
    let queues = if spec.queues == 0 {
        cpus.min(MAX_QUEUES) as u16
    } else {
        spec.queues
    };
    let options = BlkOptions {
        queues,
        serial: spec.serial.clone().unwrap_or_default(),
        read_errors: policy(spec.rerror),
        write_errors: policy(spec.werror),
        ..BlkOptions::default()
    };
    let spec = spec.clone();
    Ok(Blk::new(thread, options, move || {
        open(spec, secret, throttle)
    })?)
}
