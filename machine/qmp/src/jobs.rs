//! Jobs on disks, and their bitmaps (QEMU `qapi/block-core.json`, `qapi/job.json`).

use ::block::job::{IoStatus, JobEvent, JobKind, JobOptions, JobStatus, OnError};
use serde_json::{Map, Value, json};

use crate::commands::{Arguments, Control, DEVICE_NOT_ACTIVE, Refusal};

/// What is asked of the disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockCall {
    /// A job is to begin.
    Begin(JobRequest),
    /// A job is to do something else.
    Steer {
        /// Its name.
        id: String,
        /// What it is to do.
        verb: JobVerb,
    },
    /// A new image goes on top of a disk.
    Overlay {
        /// The disk.
        disk: String,
        /// The image's file.
        file: String,
        /// Somebody has made the image.
        existing: bool,
    },
    /// Something is done with a bitmap.
    Bitmap {
        /// The disk.
        disk: String,
        /// The bitmap.
        name: String,
        /// What is done.
        verb: BitmapVerb,
    },
}

/// A job that is to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRequest {
    /// The disk.
    pub disk: String,
    /// How it is begun, with its name.
    pub options: JobOptions,
    /// What it does.
    pub work: JobWork,
}

/// What is copied at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// All that the guest sees.
    Full,
    /// What the top image holds.
    Top,
    /// Nothing.
    None,
}

/// Where a copy goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The file.
    pub file: String,
    /// Its format; `None`: that of the disk.
    pub format: Option<String>,
    /// Somebody has made the image.
    pub existing: bool,
    /// What is copied at first.
    pub sync: Sync,
}

/// What a job does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobWork {
    /// `drive-mirror`.
    Mirror {
        /// Where to.
        target: Target,
        /// Bytes that are copied together; `None`: what suits the images.
        granularity: Option<u32>,
        /// Writes wait for their copy.
        blocking: bool,
    },
    /// `drive-backup`.
    Backup {
        /// Where to.
        target: Target,
        /// Only what this bitmap says is copied, and whether it begins anew when that has succeeded.
        bitmap: Option<(String, bool)>,
    },
    /// `block-stream`.
    Stream {
        /// The file of the image that stays below; `None`: none.
        base: Option<String>,
        /// What the header calls it.
        backing_file: Option<String>,
    },
    /// `block-commit`.
    Commit {
        /// The file of the uppermost image that is committed; `None`: the top.
        top: Option<String>,
        /// The file of the image that takes it all; `None`: the lowest.
        base: Option<String>,
        /// What the header above calls it.
        backing_file: Option<String>,
    },
}

impl JobWork {
    /// The kind of job.
    pub fn kind(&self) -> JobKind {
        match self {
            Self::Mirror { .. } => JobKind::Mirror,
            Self::Backup { .. } => JobKind::Backup,
            Self::Stream { .. } => JobKind::Stream,
            Self::Commit { .. } => JobKind::Commit,
        }
    }
}

/// A command to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobVerb {
    /// Do nothing for now.
    Pause,
    /// Go on.
    Resume,
    /// End; with `force` at once, else a mirror that is ready ends with a complete copy.
    Cancel {
        /// At once.
        force: bool,
    },
    /// Let a ready job end.
    Complete,
    /// Do the last step.
    Finalize,
    /// Go away.
    Dismiss,
    /// Keep to so many bytes a second.
    SetSpeed(u64),
}

/// What is done with a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapVerb {
    /// It is made.
    Add {
        /// Bytes for each bit; `None`: what suits the image.
        granularity: Option<u32>,
        /// It does not record yet.
        disabled: bool,
    },
    /// It goes away.
    Remove,
    /// It begins anew.
    Clear,
    /// It records.
    Enable,
    /// It does not record.
    Disable,
    /// What these say is added to it.
    Merge(Vec<String>),
}

/// A job as a client hears of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobReport {
    /// Its name.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Where it is on its way.
    pub status: JobStatus,
    /// It was told to pause.
    pub paused: bool,
    /// Whether it stands because of an error.
    pub io_status: IoStatus,
    /// Bytes in a second; 0: no limit.
    pub speed: u64,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// Its last step needs no command.
    pub auto_finalize: bool,
    /// It goes away by itself.
    pub auto_dismiss: bool,
}

impl JobReport {
    fn data(&self) -> Map<String, Value> {
        let mut data = Map::new();
        for (key, value) in [
            ("device", json!(self.id)),
            ("type", json!(self.kind.word())),
            ("len", json!(self.total)),
            ("offset", json!(self.done)),
            ("speed", json!(self.speed)),
        ] {
            data.insert(key.into(), value);
        }
        data
    }

    /// The event's name and data.
    pub(crate) fn event(&self, event: JobEvent) -> (&'static str, Value) {
        let mut data = self.data();
        match event {
            JobEvent::Status(status) => (
                "JOB_STATUS_CHANGE",
                json!({ "status": status.word(), "id": self.id }),
            ),
            JobEvent::Ready => ("BLOCK_JOB_READY", data.into()),
            JobEvent::Pending => (
                "BLOCK_JOB_PENDING",
                json!({ "type": self.kind.word(), "id": self.id }),
            ),
            JobEvent::Error(side, action) => {
                let operation = match side {
                    ::block::job::IoSide::Source => "read",
                    ::block::job::IoSide::Target => "write",
                };
                let action = action.word();
                let data = json!({ "device": self.id, "operation": operation, "action": action });
                ("BLOCK_JOB_ERROR", data)
            }
            JobEvent::Completed => {
                if let Some(error) = &self.error {
                    data.insert("error".into(), error.clone().into());
                }
                ("BLOCK_JOB_COMPLETED", data.into())
            }
            JobEvent::Cancelled => ("BLOCK_JOB_CANCELLED", data.into()),
        }
    }
}

pub(crate) fn query_block_jobs(machine: &dyn Control) -> Value {
    let one = |job: &JobReport| {
        let mut object = job.data();
        let ready = matches!(job.status, JobStatus::Ready | JobStatus::Standby);
        let busy = matches!(job.status, JobStatus::Running | JobStatus::Ready) && !job.paused;
        for (key, value) in [
            ("busy", json!(busy)),
            ("paused", json!(job.paused)),
            ("io-status", json!(job.io_status.word())),
            ("ready", json!(ready)),
            ("status", json!(job.status.word())),
            ("auto-finalize", json!(job.auto_finalize)),
            ("auto-dismiss", json!(job.auto_dismiss)),
        ] {
            object.insert(key.into(), value);
        }
        if let Some(error) = &job.error {
            object.insert("error".into(), error.clone().into());
        }
        Value::Object(object)
    };
    machine.jobs().iter().map(one).collect()
}

pub(crate) fn query_jobs(machine: &dyn Control) -> Value {
    let one = |job: &JobReport| {
        let mut object = json!({
            "id": job.id,
            "type": job.kind.word(),
            "status": job.status.word(),
            "current-progress": job.done,
            "total-progress": job.total,
        });
        if let (Some(error), Some(object)) = (&job.error, object.as_object_mut()) {
            object.insert("error".into(), error.clone().into());
        }
        object
    };
    machine.jobs().iter().map(one).collect()
}

fn text(arguments: &mut Arguments, name: &str) -> Result<Option<String>, Refusal> {
    arguments.take_if_there(name, "string", |v| v.as_str().map(str::to_owned))
}

fn needed(arguments: &mut Arguments, name: &str) -> Result<String, Refusal> {
    arguments.take(name, "string", |v| v.as_str().map(str::to_owned))
}

fn flag(arguments: &mut Arguments, name: &str, other: bool) -> Result<bool, Refusal> {
    let value = arguments.take_if_there(name, "boolean", Value::as_bool)?;
    Ok(value.unwrap_or(other))
}

fn number(arguments: &mut Arguments, name: &str) -> Result<Option<u64>, Refusal> {
    let value = arguments.take_if_there(name, "integer", Value::as_i64)?;
    let to_u64 = |value| {
        u64::try_from(value).map_err(|_| {
            Refusal::generic(format!("Parameter '{name}' expects a non-negative value"))
        })
    };
    value.map(to_u64).transpose()
}

/// A parameter that is one of some words.
fn word<T>(
    arguments: &mut Arguments,
    name: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, Refusal> {
    let Some(given) = text(arguments, name)? else {
        return Ok(None);
    };
    let wrong = || {
        Refusal::generic(format!(
            "Parameter '{name}' does not accept value '{given}'"
        ))
    };
    read(&given).map(Some).ok_or_else(wrong)
}

/// Options of QEMU's that are refused rather than passed over.
fn refuse(arguments: &Arguments, names: &[&str]) -> Result<(), Refusal> {
    match names.iter().find(|name| arguments.0.contains_key(**name)) {
        Some(name) => Err(Refusal::generic(format!(
            "Parameter '{name}' is not supported"
        ))),
        None => Ok(()),
    }
}

fn policy(arguments: &mut Arguments, name: &str) -> Result<OnError, Refusal> {
    let found = word(arguments, name, |text| {
        Some(match text {
            "report" => OnError::Report,
            "ignore" => OnError::Ignore,
            "stop" => OnError::Stop,
            "enospc" => OnError::Enospc,
            _ => return None,
        })
    });
    Ok(found?.unwrap_or_default())
}

fn existing(arguments: &mut Arguments) -> Result<bool, Refusal> {
    let mode = word(arguments, "mode", |text| match text {
        "existing" => Some(true),
        "absolute-paths" => Some(false),
        _ => None,
    });
    Ok(mode?.unwrap_or(false))
}

/// The disk that is named, if it is there.
fn disk(machine: &dyn Control, arguments: &mut Arguments, key: &str) -> Result<String, Refusal> {
    let name = needed(arguments, key)?;
    if machine.disks().iter().any(|disk| disk.name == name) {
        return Ok(name);
    }
    let text = format!("Cannot find device='{name}' nor node-name='{name}'");
    Err(Refusal::generic(text))
}

/// What all jobs can be told, around what one does.
fn begin(
    machine: &dyn Control,
    arguments: &mut Arguments,
    work: impl FnOnce(&mut Arguments) -> Result<JobWork, Refusal>,
) -> Result<Value, Refusal> {
    let id = text(arguments, "job-id")?;
    let disk = disk(machine, arguments, "device")?;
    let work = work(arguments)?;
    // Streams and commits have one policy for both sides.
    let both = policy(arguments, "on-error")?;
    let sided = matches!(work.kind(), JobKind::Mirror | JobKind::Backup);
    let side = |arguments: &mut Arguments, name| {
        if sided {
            policy(arguments, name)
        } else {
            Ok(both)
        }
    };
    let options = JobOptions {
        id: id.unwrap_or_else(|| disk.clone()),
        kind: work.kind(),
        speed: number(arguments, "speed")?.unwrap_or(0),
        auto_finalize: flag(arguments, "auto-finalize", true)?,
        auto_dismiss: flag(arguments, "auto-dismiss", true)?,
        on_source_error: side(arguments, "on-source-error")?,
        on_target_error: side(arguments, "on-target-error")?,
    };
    arguments.finish()?;
    if !is_id(&options.id) {
        let text = format!("Invalid job ID '{}'", options.id);
        return Err(Refusal::generic(text));
    }
    let request = JobRequest {
        disk,
        options,
        work,
    };
    machine
        .block(BlockCall::Begin(request))
        .map_err(Refusal::generic)?;
    Ok(json!({}))
}

/// QEMU's rule for names: a letter, then letters, digits, `-`, `.` and `_`.
fn is_id(id: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(rest)
}

fn target(arguments: &mut Arguments, sync: Sync) -> Result<Target, Refusal> {
    Ok(Target {
        file: needed(arguments, "target")?,
        format: text(arguments, "format")?,
        existing: existing(arguments)?,
        sync,
    })
}

pub(crate) fn drive_mirror(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    begin(machine, arguments, |arguments| {
        refuse(arguments, &["node-name", "replaces"])?;
        let sync = word(arguments, "sync", |text| match text {
            "full" => Some(Sync::Full),
            "top" => Some(Sync::Top),
            "none" => Some(Sync::None),
            _ => None,
        });
        let missing = || Refusal::generic("Parameter 'sync' is missing");
        let sync = sync?.ok_or_else(missing)?;
        let granularity = number(arguments, "granularity")?.filter(|g| *g != 0);
        let granularity = granularity.map(|g| u32::try_from(g).unwrap_or(u32::MAX));
        if granularity.is_some_and(|g| !g.is_power_of_two() || !(512..=64 << 20).contains(&g)) {
            let text = "Parameter 'granularity' expects a value in range [512B, 64MB]";
            return Err(Refusal::generic(text));
        }
        let blocking = word(arguments, "copy-mode", |text| match text {
            "background" => Some(false),
            "write-blocking" => Some(true),
            _ => None,
        })?;
        // How much is under way at once, and whether zeroes give space back, is decided here.
        number(arguments, "buf-size")?;
        flag(arguments, "unmap", true)?;
        Ok(JobWork::Mirror {
            target: target(arguments, sync)?,
            granularity,
            blocking: blocking.unwrap_or(false),
        })
    })
}

pub(crate) fn drive_backup(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    begin(machine, arguments, |arguments| {
        if !flag(arguments, "compress", false)? {
            refuse(arguments, &["x-perf", "filter-node-name"])?;
        } else {
            return Err(Refusal::generic("Parameter 'compress' is not supported"));
        }
        let sync = word(arguments, "sync", |text| match text {
            "full" => Some((Sync::Full, None)),
            "top" => Some((Sync::Top, None)),
            "none" => Some((Sync::None, None)),
            "incremental" => Some((Sync::Full, Some(true))),
            "bitmap" => Some((Sync::Full, Some(false))),
            _ => None,
        });
        let missing = || Refusal::generic("Parameter 'sync' is missing");
        let (sync, by_bitmap) = sync?.ok_or_else(missing)?;
        let bitmap = text(arguments, "bitmap")?;
        let clears = word(arguments, "bitmap-mode", |text| match text {
            "on-success" => Some(true),
            "never" => Some(false),
            _ => None,
        })?;
        let bitmap = match (by_bitmap, bitmap, clears) {
            (None, None, None) => None,
            (Some(true), Some(name), None | Some(true)) => Some((name, true)),
            (Some(false), Some(name), Some(clears)) => Some((name, clears)),
            (Some(_), None, _) => {
                let text = "must provide a valid bitmap name for 'incremental' and 'bitmap' sync";
                return Err(Refusal::generic(text));
            }
            (Some(true), Some(_), Some(false)) => {
                let text =
                    "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'";
                return Err(Refusal::generic(text));
            }
            (Some(false), Some(_), None) => {
                let text = "Bitmap sync mode must be given when providing a bitmap";
                return Err(Refusal::generic(text));
            }
            (None, _, _) => {
                let text = "a bitmap goes with sync mode 'incremental' or 'bitmap'";
                return Err(Refusal::generic(text));
            }
        };
        Ok(JobWork::Backup {
            target: target(arguments, sync)?,
            bitmap,
        })
    })
}

pub(crate) fn block_stream(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    begin(machine, arguments, |arguments| {
        refuse(arguments, &["base-node", "bottom", "filter-node-name"])?;
        Ok(JobWork::Stream {
            base: text(arguments, "base")?,
            backing_file: text(arguments, "backing-file")?,
        })
    })
}

pub(crate) fn block_commit(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    begin(machine, arguments, |arguments| {
        refuse(arguments, &["base-node", "top-node", "filter-node-name"])?;
        Ok(JobWork::Commit {
            top: text(arguments, "top")?,
            base: text(arguments, "base")?,
            backing_file: text(arguments, "backing-file")?,
        })
    })
}

pub(crate) fn snapshot_sync(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    refuse(arguments, &["node-name", "snapshot-node-name"])?;
    let disk = disk(machine, arguments, "device")?;
    let file = needed(arguments, "snapshot-file")?;
    let format = text(arguments, "format")?;
    let existing = existing(arguments)?;
    arguments.finish()?;
    if let Some(format) = format.filter(|format| format != "qcow2") {
        let text = format!("Parameter 'format' expects 'qcow2', not '{format}'");
        return Err(Refusal::generic(text));
    }
    let call = BlockCall::Overlay {
        disk,
        file,
        existing,
    };
    machine.block(call).map_err(Refusal::generic)?;
    Ok(json!({}))
}

/// Steers a job; `id` is how the command calls it.
fn steer(
    machine: &dyn Control,
    arguments: &mut Arguments,
    key: &str,
    verb: impl FnOnce(&mut Arguments) -> Result<JobVerb, Refusal>,
) -> Result<Value, Refusal> {
    let id = needed(arguments, key)?;
    let verb = verb(arguments)?;
    arguments.finish()?;
    let job = machine.jobs().into_iter().find(|job| job.id == id);
    let Some(job) = job else {
        return Err(match key {
            "device" => Refusal {
                class: DEVICE_NOT_ACTIVE,
                text: format!("Block job '{id}' not found"),
            },
            _ => Refusal::generic("Job not found"),
        });
    };
    if key == "device" && job.paused && verb == (JobVerb::Cancel { force: false }) {
        let text = format!("The block job for device '{id}' is currently paused");
        return Err(Refusal::generic(text));
    }
    machine
        .block(BlockCall::Steer { id, verb })
        .map_err(Refusal::generic)?;
    Ok(json!({}))
}

/// A command that takes nothing but the job's name.
macro_rules! steering {
    ($($name:ident, $key:literal, $verb:expr;)*) => {$(
        pub(crate) fn $name(machine: &dyn Control, arguments: &mut Arguments) -> Result<Value, Refusal> {
            steer(machine, arguments, $key, |_| Ok($verb))
        }
    )*};
}

steering! {
    block_job_pause, "device", JobVerb::Pause;
    block_job_resume, "device", JobVerb::Resume;
    block_job_complete, "device", JobVerb::Complete;
    block_job_finalize, "id", JobVerb::Finalize;
    block_job_dismiss, "id", JobVerb::Dismiss;
    job_pause, "id", JobVerb::Pause;
    job_resume, "id", JobVerb::Resume;
    job_cancel, "id", JobVerb::Cancel { force: true };
    job_complete, "id", JobVerb::Complete;
    job_finalize, "id", JobVerb::Finalize;
    job_dismiss, "id", JobVerb::Dismiss;
}

pub(crate) fn block_job_cancel(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    steer(machine, arguments, "device", |arguments| {
        let force = flag(arguments, "force", false)?;
        Ok(JobVerb::Cancel { force })
    })
}

pub(crate) fn block_job_set_speed(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    steer(machine, arguments, "device", |arguments| {
        let speed = number(arguments, "speed")?;
        let missing = || Refusal::generic("Parameter 'speed' is missing");
        Ok(JobVerb::SetSpeed(speed.ok_or_else(missing)?))
    })
}

fn bitmap(
    machine: &dyn Control,
    arguments: &mut Arguments,
    key: &str,
    verb: impl FnOnce(&mut Arguments) -> Result<BitmapVerb, Refusal>,
) -> Result<Value, Refusal> {
    let disk = disk(machine, arguments, "node")?;
    let name = needed(arguments, key)?;
    let verb = verb(arguments)?;
    arguments.finish()?;
    let call = BlockCall::Bitmap { disk, name, verb };
    machine.block(call).map_err(Refusal::generic)?;
    Ok(json!({}))
}

pub(crate) fn bitmap_add(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    bitmap(machine, arguments, "name", |arguments| {
        if flag(arguments, "persistent", false)? {
            return Err(Refusal::generic("Parameter 'persistent' is not supported"));
        }
        let granularity = number(arguments, "granularity")?;
        Ok(BitmapVerb::Add {
            granularity: granularity.map(|g| u32::try_from(g).unwrap_or(u32::MAX)),
            disabled: flag(arguments, "disabled", false)?,
        })
    })
}

pub(crate) fn bitmap_merge(
    machine: &dyn Control,
    arguments: &mut Arguments,
) -> Result<Value, Refusal> {
    bitmap(machine, arguments, "target", |arguments| {
        let read = |value: &Value| {
            let names = value.as_array()?.iter();
            names.map(|name| name.as_str().map(str::to_owned)).collect()
        };
        Ok(BitmapVerb::Merge(arguments.take("bitmaps", "array", read)?))
    })
}

macro_rules! bitmaps {
    ($($name:ident, $verb:expr;)*) => {$(
        pub(crate) fn $name(machine: &dyn Control, arguments: &mut Arguments) -> Result<Value, Refusal> {
            bitmap(machine, arguments, "name", |_| Ok($verb))
        }
    )*};
}

bitmaps! {
    bitmap_remove, BitmapVerb::Remove;
    bitmap_clear, BitmapVerb::Clear;
    bitmap_enable, BitmapVerb::Enable;
    bitmap_disable, BitmapVerb::Disable;
}
