//! Disks from the specification.

use block::executor::{EngineKind, IoThread};
use block::{BlockError, CacheMode, DetectZeroes, Disk, DiskOptions};
use image_formats::{External, ImageOptions, open_image};
use virtio::blk::{Blk, BlkOptions};
use vm_spec::{Aio, Discard, DiskSpec};

use crate::MachineError;

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

/// Opens a disk on the thread that will serve it.
async fn open(spec: DiskSpec) -> block::Result<Disk> {
    let options = options(&spec);
    let image = ImageOptions {
        format: spec.format.map(|format| format.as_str().to_owned()),
        write: !spec.read_only,
        cache: options.cache,
        discard: options.discard,
        detect_zeroes: options.detect_zeroes,
        external: External::Follow,
        snapshot: spec.snapshot,
        ..ImageOptions::default()
    };
    let name = spec.path.to_string_lossy();
    let image = open_image(&name, &image).await?;
    if !spec.read_only && image.backend.limits().read_only {
        return Err(BlockError::invalid_argument(format!(
            "'{name}' can only be read: expected readonly=on or snapshot=on"
        )));
    }
    Ok(Disk::new(image.backend, options))
}

/// Makes the virtio disk number `number`, with an I/O thread of its own.
pub(crate) fn virtio_disk(
    spec: &DiskSpec,
    number: usize,
    cpus: u32,
) -> Result<Box<Blk>, MachineError> {
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
    let serial = spec.serial.clone().unwrap_or_default();
    let options = BlkOptions {
        queues,
        serial,
        ..BlkOptions::default()
    };
    let spec = spec.clone();
    let (device, _handle) = Blk::new(thread, options, move || open(spec))?;
    Ok(Box::new(device))
}
