//! The commands.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value, json};

use ::block::ThrottleLimits;

use crate::block::{self, DiskReport};
use crate::jobs::{self, BlockCall, JobReport};
use crate::statistics::{self, Meaning, Statistics};

/// QEMU's names of run states (`qapi/run-state.json`) that the machine can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// The guest runs.
    Running,
    /// The guest was stopped by a person.
    Paused,
    /// The guest was stopped, because the host could not read or write a disk.
    IoError,
    /// The guest has not run yet.
    Prelaunch,
    /// The guest has powered off.
    Shutdown,
    /// The machine can't go on.
    InternalError,
}

impl RunState {
    fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::IoError => "io-error",
            Self::Prelaunch => "prelaunch",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
        }
    }
}

/// What the protocol asks of the machine. The calls come on the server's threads. Events that follow from them come back
/// through [`Server::event`](crate::Server::event).
pub trait Control: Send + Sync {
    /// The machine's state.
    fn status(&self) -> RunState;
    /// Stops the guest. Returns when it stands still.
    fn stop(&self);
    /// Lets the guest go on.
    fn cont(&self);
    /// Resets the machine.
    fn system_reset(&self);
    /// Presses the power button.
    fn system_powerdown(&self);
    /// Ends the machine.
    fn quit(&self);
    /// Asks the guest to make do with `target` bytes of memory. False when there is no balloon.
    fn balloon(&self, target: u64) -> bool;
    /// The memory that the guest has left, in bytes; `None` when there is no balloon.
    fn query_balloon(&self) -> Option<u64>;
    /// Plugs the cable of the card of this name in or pulls it. False when there is none.
    fn set_link(&self, name: &str, up: bool) -> bool;
    /// The disks.
    fn disks(&self) -> Vec<DiskReport>;
    /// Gives a disk's group other limits; with `group`, puts it into that one first.
    fn set_throttle(&self, disk: &str, group: Option<&str>, limits: ThrottleLimits);
    /// Gives a disk another size in bytes.
    ///
    /// # Errors
    /// Why it can't have that.
    fn resize_disk(&self, disk: &str, size: u64) -> Result<(), String>;
    /// The jobs on disks.
    fn jobs(&self) -> Vec<JobReport>;
    /// Does something with disks; the names of disks and of jobs to be steered are there.
    ///
    /// # Errors
    /// Why it can't be done.
    fn block(&self, call: BlockCall) -> Result<(), String>;
    /// What the machine and its vCPUs have done so far. The figures of the machine and of each vCPU have the names of
    /// [`Self::statistics_names`].
    fn statistics(&self) -> Statistics;
    /// Every name that figures may have, and what it means.
    fn statistics_names(&self) -> &'static [(&'static str, Meaning)];
}

/// QEMU's error classes.
pub(crate) const GENERIC: &str = "GenericError";
pub(crate) const NOT_FOUND: &str = "CommandNotFound";
pub(crate) const DEVICE_NOT_ACTIVE: &str = "DeviceNotActive";
pub(crate) const DEVICE_NOT_FOUND: &str = "DeviceNotFound";

/// An error as it goes over the wire.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) class: &'static str,
    pub(crate) text: String,
}

impl Refusal {
    pub(crate) fn generic(text: impl Into<String>) -> Self {
        Self {
            class: GENERIC,
            text: text.into(),
        }
    }

    pub(crate) fn not_found(text: impl Into<String>) -> Self {
        Self {
            class: NOT_FOUND,
            text: text.into(),
        }
    }
}

/// A client's request, checked for form.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: Option<Value>,
    pub(crate) name: String,
    pub(crate) arguments: Map<String, Value>,
}

impl Request {
    /// Checks the form; the ID is given back with a refusal too.
    pub(crate) fn parse(value: Value) -> Result<Self, (Option<Value>, Refusal)> {
        let Value::Object(mut object) = value else {
            return Err((None, Refusal::generic("QMP input must be a JSON object")));
        };
        let id = object.remove("id");
        let refuse = |text: &str| Err((id.clone(), Refusal::generic(text)));
        let arguments = match object.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return refuse("QMP input member 'arguments' must be an object"),
        };
        let name = match object.remove("execute") {
            Some(Value::String(name)) => name,
            Some(_) => return refuse("QMP input member 'execute' must be a string"),
            None if object.contains_key("exec-oob") => {
                return refuse("QMP input member 'exec-oob' is unexpected");
            }
            None => return refuse("QMP input lacks member 'execute'"),
        };
        if let Some(key) = object.keys().next() {
            return refuse(&format!("QMP input member '{key}' is unexpected"));
        }
        Ok(Self {
            id,
            name,
            arguments,
        })
    }
}

/// The protocol's version is that of the QEMU whose commands these are.
pub(crate) fn version() -> Value {
    let package = concat!("corten-", env!("CARGO_PKG_VERSION"));
    json!({ "qemu": { "micro": 0, "minor": 0, "major": 10 }, "package": package })
}

/// How a command runs.
#[derive(Clone, Copy)]
enum Run {
    /// It answers.
    Ask(fn(&dyn Control) -> Value),
    /// It does something.
    Do(fn(&dyn Control)),
    /// It takes arguments, or may refuse.
    With(fn(&dyn Control, &mut Arguments) -> Result<Value, Refusal>),
}

/// The arguments of a command, with QEMU's words for what is wrong with them.
pub(crate) struct Arguments(pub(crate) Map<String, Value>);

impl Arguments {
    pub(crate) fn take<T>(
        &mut self,
        name: &str,
        kind: &str,
        read: fn(&Value) -> Option<T>,
    ) -> Result<T, Refusal> {
        let value = self
            .0
            .remove(name)
            .ok_or_else(|| Refusal::generic(format!("Parameter '{name}' is missing")))?;
        read(&value).ok_or_else(|| {
            let text = format!("Invalid parameter type for '{name}', expected: {kind}");
            Refusal::generic(text)
        })
    }

    /// An argument that may be left out.
    pub(crate) fn take_if_there<T>(
        &mut self,
        name: &str,
        kind: &str,
        read: fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, Refusal> {
        if !self.0.contains_key(name) {
            return Ok(None);
        }
        self.take(name, kind, read).map(Some)
    }

    pub(crate) fn finish(&self) -> Result<(), Refusal> {
        match self.0.keys().next() {
            Some(key) => Err(Refusal::generic(format!("Parameter '{key}' is unexpected"))),
            None => Ok(()),
        }
    }
}

fn no_balloon() -> Refusal {
    Refusal {
        class: DEVICE_NOT_ACTIVE,
        text: "No balloon device has been activated".into(),
    }
}

fn balloon(machine: &dyn Control, arguments: &mut Arguments) -> Result<Value, Refusal> {
    let target = arguments.take("value", "integer", Value::as_i64)?;
    arguments.finish()?;
    if machine.query_balloon().is_none() {
        return Err(no_balloon());
    }
    match u64::try_from(target) {
        Ok(target @ 1..) if machine.balloon(target) => Ok(json!({})),
        _ => Err(Refusal::generic("Parameter 'target' expects a size")),
    }
}

fn query_balloon(machine: &dyn Control, arguments: &mut Arguments) -> Result<Value, Refusal> {
    arguments.finish()?;
    let actual = machine.query_balloon().ok_or_else(no_balloon)?;
    Ok(json!({ "actual": actual }))
}

fn set_link(machine: &dyn Control, arguments: &mut Arguments) -> Result<Value, Refusal> {
    let name = arguments.take("name", "string", |v| v.as_str().map(str::to_owned))?;
    let up = arguments.take("up", "boolean", Value::as_bool)?;
    arguments.finish()?;
    if machine.set_link(&name, up) {
        return Ok(json!({}));
    }
    Err(Refusal {
        class: DEVICE_NOT_FOUND,
        text: format!("Device '{name}' not found"),
    })
}

/// Every command that runs after negotiation.
const COMMANDS: &[(&str, Run)] = &[
    ("query-version", Run::Ask(|_| version())),
    (
        "query-commands",
        Run::Ask(|_| {
            let names = COMMANDS
                .iter()
                .map(|(name, _)| *name)
                .chain(["qmp_capabilities"]);
            names.map(|name| json!({ "name": name })).collect()
        }),
    ),
    (
        "query-status",
        Run::Ask(|machine| {
            let state = machine.status();
            json!({ "status": state.as_str(), "running": state == RunState::Running })
        }),
    ),
    ("stop", Run::Do(|machine| machine.stop())),
    ("cont", Run::Do(|machine| machine.cont())),
    ("system_reset", Run::Do(|machine| machine.system_reset())),
    (
        "system_powerdown",
        Run::Do(|machine| machine.system_powerdown()),
    ),
    ("quit", Run::Do(|machine| machine.quit())),
    ("balloon", Run::With(balloon)),
    ("query-balloon", Run::With(query_balloon)),
    ("set_link", Run::With(set_link)),
    ("query-block", Run::Ask(block::query_block)),
    ("query-blockstats", Run::Ask(block::query_blockstats)),
    (
        "block_set_io_throttle",
        Run::With(block::block_set_io_throttle),
    ),
    ("block_resize", Run::With(block::block_resize)),
    ("query-block-jobs", Run::Ask(jobs::query_block_jobs)),
    ("query-jobs", Run::Ask(jobs::query_jobs)),
    ("drive-mirror", Run::With(jobs::drive_mirror)),
    ("drive-backup", Run::With(jobs::drive_backup)),
    ("block-stream", Run::With(jobs::block_stream)),
    ("block-commit", Run::With(jobs::block_commit)),
    ("blockdev-snapshot-sync", Run::With(jobs::snapshot_sync)),
    ("block-job-cancel", Run::With(jobs::block_job_cancel)),
    ("block-job-complete", Run::With(jobs::block_job_complete)),
    ("block-job-dismiss", Run::With(jobs::block_job_dismiss)),
    ("block-job-finalize", Run::With(jobs::block_job_finalize)),
    ("block-job-pause", Run::With(jobs::block_job_pause)),
    ("block-job-resume", Run::With(jobs::block_job_resume)),
    ("block-job-set-speed", Run::With(jobs::block_job_set_speed)),
    ("job-cancel", Run::With(jobs::job_cancel)),
    ("job-complete", Run::With(jobs::job_complete)),
    ("job-dismiss", Run::With(jobs::job_dismiss)),
    ("job-finalize", Run::With(jobs::job_finalize)),
    ("job-pause", Run::With(jobs::job_pause)),
    ("job-resume", Run::With(jobs::job_resume)),
    ("block-dirty-bitmap-add", Run::With(jobs::bitmap_add)),
    ("block-dirty-bitmap-clear", Run::With(jobs::bitmap_clear)),
    (
        "block-dirty-bitmap-disable",
        Run::With(jobs::bitmap_disable),
    ),
    ("block-dirty-bitmap-enable", Run::With(jobs::bitmap_enable)),
    ("block-dirty-bitmap-merge", Run::With(jobs::bitmap_merge)),
    ("block-dirty-bitmap-remove", Run::With(jobs::bitmap_remove)),
    ("query-stats", Run::With(statistics::query)),
    ("query-stats-schemas", Run::With(statistics::schemas)),
];

/// A client's state in the protocol.
#[derive(Debug, Default)]
pub(crate) struct Session {
    negotiated: AtomicBool,
}

impl Session {
    /// True once the client may hear events.
    pub(crate) fn is_negotiated(&self) -> bool {
        self.negotiated.load(Ordering::SeqCst)
    }

    /// Carries a request out.
    pub(crate) fn execute(
        &self,
        request: &Request,
        machine: &dyn Control,
    ) -> Result<Value, Refusal> {
        if request.name == "qmp_capabilities" {
            return self.negotiate(request);
        }
        if !self.is_negotiated() {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(Refusal::not_found(text));
        }
        let Some((_, run)) = COMMANDS.iter().find(|(name, _)| *name == request.name) else {
            let text = format!("The command {} has not been found", request.name);
            return Err(Refusal::not_found(text));
        };
        let mut arguments = Arguments(request.arguments.clone());
        match run {
            Run::With(run) => run(machine, &mut arguments),
            Run::Ask(ask) => {
                arguments.finish()?;
                Ok(ask(machine))
            }
            Run::Do(act) => {
                arguments.finish()?;
                act(machine);
                Ok(json!({}))
            }
        }
    }

    fn negotiate(&self, request: &Request) -> Result<Value, Refusal> {
        if self.is_negotiated() {
            let text = "Capabilities negotiation is already complete, command ignored";
            return Err(Refusal::not_found(text));
        }
        for (key, value) in &request.arguments {
            if key != "enable" {
                return Err(Refusal::generic(format!("Parameter '{key}' is unexpected")));
            }
            let Some(wanted) = value.as_array() else {
                let text = "Invalid parameter type for 'enable', expected: array";
                return Err(Refusal::generic(text));
            };
            if let Some(capability) = wanted.first() {
                let name = capability.as_str().unwrap_or_default();
                return Err(Refusal::generic(format!(
                    "Capability {name} is not available"
                )));
            }
        }
        self.negotiated.store(true, Ordering::SeqCst);
        Ok(json!({}))
    }
}
