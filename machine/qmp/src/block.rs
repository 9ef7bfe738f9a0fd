//! Disks (QEMU `qapi/block-core.json`).

use block::{CacheMode, DetectZeroes, DiskStatistics, Operations, Rate, ThrottleLimits};
use serde_json::{Map, Value, json};

use crate::commands::{Arguments, Control, DEVICE_NOT_FOUND, Refusal};

/// Whether the host could do what a disk's requests asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// It could.
    #[default]
    Ok,
    /// A request has stopped the guest.
    Failed,
    /// A request has stopped the guest, because the host has no space left.
    NoSpace,
}

/// A disk as a client hears of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReport {
    /// Its name.
    pub name: String,
    /// The image's name as it was given.
    pub file: String,
    /// The image's format.
    pub format: &'static str,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Bytes that the image takes on the host, where that is known.
    pub allocated: Option<u64>,
    /// How many images lie below it.
    pub backing_depth: u32,
    /// The guest can't write.
    pub read_only: bool,
    /// What is stored can't be read without a password.
    pub encrypted: bool,
    /// How the host caches.
    pub cache: CacheMode,
    /// What writes of zeroes become.
    pub detect_zeroes: DetectZeroes,
    /// Whether requests fail.
    pub io_status: IoStatus,
    /// The group for its limits.
    pub group: String,
    /// Limits on its rate.
    pub limits: ThrottleLimits,
    /// What it has done.
    pub statistics: DiskStatistics,
    /// The bitmaps that record what is written.
    pub bitmaps: Vec<BitmapReport>,
}

/// A bitmap as a client hears of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapReport {
    /// Its name.
    pub name: String,
    /// Bytes that are dirty.
    pub count: u64,
    /// Bytes for each bit.
    pub granularity: u32,
    /// It records.
    pub recording: bool,
    /// A job uses it.
    pub busy: bool,
}

fn not_found(name: &str) -> Refusal {
    Refusal {
        class: DEVICE_NOT_FOUND,
        text: format!("Device '{name}' not found"),
    }
}

/// QEMU's names of limits in the protocol, in the order of [`ThrottleLimits::named`].
const LIMITS: [&str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];

/// The limits as `query-block` shows them: bursts only where there are some.
fn put_limits(disk: &DiskReport, object: &mut Map<String, Value>) {
    let mut limits = disk.limits;
    for (name, (_, rate)) in LIMITS.iter().zip(limits.named()) {
        object.insert((*name).into(), rate.average.into());
        if rate.max != 0 {
            object.insert(format!("{name}_max"), rate.max.into());
            let length = rate.max_length.max(1);
            object.insert(format!("{name}_max_length"), length.into());
        }
    }
    if disk.limits.iops_size != 0 {
        object.insert("iops_size".into(), disk.limits.iops_size.into());
    }
    if !disk.limits.is_unlimited() {
        object.insert("group".into(), disk.group.clone().into());
    }
}

fn image(disk: &DiskReport) -> Value {
    let mut image =
        json!({ "filename": disk.file, "format": disk.format, "virtual-size": disk.size });
    if let (Some(bytes), Some(object)) = (disk.allocated, image.as_object_mut()) {
        object.insert("actual-size".into(), bytes.into());
    }
    image
}

fn inserted(disk: &DiskReport) -> Value {
    let direct = matches!(disk.cache, CacheMode::None | CacheMode::DirectSync);
    let zeroes = match disk.detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    let mut object = Map::new();
    for (key, value) in [
        ("file", json!(disk.file)),
        ("drv", json!(disk.format)),
        ("ro", json!(disk.read_only)),
        ("detect_zeroes", json!(zeroes)),
        ("write_threshold", json!(0)),
        ("backing_file_depth", json!(disk.backing_depth)),
        ("encrypted", json!(disk.encrypted)),
        (
            "cache",
            json!({
                "writeback": !matches!(disk.cache, CacheMode::Writethrough | CacheMode::DirectSync),
                "direct": direct,
                "no-flush": disk.cache == CacheMode::Unsafe,
            }),
        ),
        ("image", image(disk)),
    ] {
        object.insert(key.into(), value);
    }
    put_limits(disk, &mut object);
    if !disk.bitmaps.is_empty() {
        let bitmaps = disk.bitmaps.iter().map(bitmap).collect();
        object.insert("dirty-bitmaps".into(), bitmaps);
    }
    Value::Object(object)
}

fn bitmap(bitmap: &BitmapReport) -> Value {
    json!({
        "name": bitmap.name,
        "count": bitmap.count,
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        "busy": bitmap.busy,
        "persistent": false,
    })
}

pub(crate) fn query_block(machine: &dyn Control) -> Value {
    let one = |disk: &DiskReport| {
        let status = match disk.io_status {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        };
        json!({
            "device": disk.name,
            "type": "unknown",
            "locked": false,
            "removable": false,
            "io-status": status,
            "inserted": inserted(disk),
        })
    };
    machine.disks().iter().map(one).collect()
}

pub(crate) fn query_blockstats(machine: &dyn Control) -> Value {
    let one = |disk: &DiskReport| json!({ "device": disk.name, "stats": stats(&disk.statistics) });
    machine.disks().iter().map(one).collect()
}

/// Requests are never merged, and no histogram is kept.
fn stats(of: &DiskStatistics) -> Value {
    let mut stats = Map::new();
    for (name, kind) in [
        ("rd", of.reads),
        ("wr", of.writes),
        ("flush", of.flushes),
        ("unmap", of.discards),
    ] {
        let Operations {
            done,
            bytes,
            nanoseconds,
            failed,
        } = kind;
        if name != "flush" {
            stats.insert(format!("{name}_bytes"), bytes.into());
            stats.insert(format!("{name}_merged"), 0.into());
        }
        stats.insert(format!("{name}_operations"), done.into());
        stats.insert(format!("{name}_total_time_ns"), nanoseconds.into());
        stats.insert(format!("failed_{name}_operations"), failed.into());
        stats.insert(format!("invalid_{name}_operations"), 0.into());
    }
    stats.insert("wr_highest_offset".into(), of.highest_written.into());
    stats.insert("account_invalid".into(), false.into());
    stats.insert("account_failed".into(), false.into());
    stats.insert("timed_stats".into(), json!([]));
    Value::Object(stats)
}

/// The disk that `device` or `id` names.
fn take_disk(machine: &dyn Control, arguments: &mut Arguments) -> Result<DiskReport, Refusal> {
    let text = |v: &Value| v.as_str().map(str::to_owned);
    let device = arguments.take_if_there("device", "string", text)?;
    let id = arguments.take_if_there("id", "string", text)?;
    let ((Some(name), None) | (None, Some(name))) = (device, id) else {
        return Err(Refusal::generic("Need exactly one of 'device' and 'id'"));
    };
    let disk = machine.disks().into_iter().find(|disk| disk.name == name);
    disk.ok_or_else(|| not_found(&name))
}

pub(crate) fn block_set_io_throttle(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    let disk = take_disk(machine, arguments)?;
    let mut limits = ThrottleLimits::default();
    for (name, (_, rate)) in LIMITS.iter().zip(limits.named()) {
        let mut optional = |name: String| {
            let value = arguments.take_if_there(&name, "integer", Value::as_u64)?;
            Ok::<u64, Refusal>(value.unwrap_or(0))
        };
        let (max, max_length) = (
            optional(format!("{name}_max"))?,
            optional(format!("{name}_max_length"))?,
        );
        let average = arguments.take(name, "integer", Value::as_i64)?;
        // What is below zero is refused with what is too large.
        *rate = Rate {
            average: u64::try_from(average).unwrap_or(u64::MAX),
            max,
            max_length,
        };
    }
    let size = arguments.take_if_there("iops_size", "integer", Value::as_u64)?;
    limits.iops_size = size.unwrap_or(0);
    let group = arguments.take_if_there("group", "string", |v| v.as_str().map(str::to_owned))?;
    arguments.finish()?;
    limits.check().map_err(Refusal::generic)?;
    machine.set_throttle(&disk.name, group.as_deref(), limits);
    Ok(json!({}))
}

pub(crate) fn block_resize(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    let device = arguments.take_if_there("device", "string", |v| v.as_str().map(str::to_owned))?;
    let size = arguments.take("size", "integer", Value::as_i64)?;
    arguments.finish()?;
    let device = device.unwrap_or_default();
    if !machine.disks().iter().any(|disk| disk.name == device) {
        let text = format!("Cannot find device='{device}' nor node-name=''");
        return Err(Refusal::generic(text));
    }
    let size =
        u64::try_from(size).map_err(|_| Refusal::generic("Parameter 'size' expects a >0 size"))?;
    if !size.is_multiple_of(512) {
        let text = "The new size must be a multiple of 512";
        return Err(Refusal::generic(text));
    }
    let done = machine.resize_disk(&device, size);
    done.map_err(Refusal::generic)?;
    Ok(json!({}))
}
