//! Events (QEMU `qapi/run-state.json`, `qapi/block-core.json`).

use std::time::{SystemTime, UNIX_EPOCH};

use ::block::job::JobEvent;
use serde_json::{Value, json};

use crate::jobs::JobReport;

/// What was done about a failure of the host's to read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoErrorAction {
    /// The guest was told.
    Report,
    /// The guest was not told.
    Ignore,
    /// The guest was stopped.
    Stop,
}

/// Something that happened to the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guest was stopped.
    Stop,
    /// The guest goes on.
    Resume,
    /// The power button was pressed for a person.
    Powerdown,
    /// The machine was reset.
    Reset {
        /// The guest did it.
        guest: bool,
        /// One of QEMU's `ShutdownCause` names.
        reason: &'static str,
    },
    /// The machine ends.
    Shutdown {
        /// The guest did it.
        guest: bool,
        /// One of QEMU's `ShutdownCause` names.
        reason: &'static str,
    },
    /// The guest's kernel panicked.
    GuestPanicked,
    /// The guest has given memory up or taken it back.
    BalloonChange {
        /// Bytes that it has left.
        actual: u64,
    },
    /// The host could not read or write a disk.
    BlockIoError {
        /// The disk's name.
        device: String,
        /// It was to be written; else it was to be read.
        write: bool,
        /// What was done.
        action: IoErrorAction,
        /// The host has no space left.
        no_space: bool,
        /// What happened, in a line.
        reason: String,
    },
    /// A job tells something.
    Job {
        /// The job at that moment.
        report: JobReport,
        /// What it tells.
        event: JobEvent,
    },
}

impl Event {
    /// The event as it goes over the wire, stamped with the wall clock.
    pub(crate) fn to_json(&self) -> Value {
        let (name, data) = match self {
            Self::Stop => ("STOP", None),
            Self::Resume => ("RESUME", None),
            Self::Powerdown => ("POWERDOWN", None),
            Self::Reset { guest, reason } => {
                ("RESET", Some(json!({ "guest": guest, "reason": reason })))
            }
            Self::Shutdown { guest, reason } => (
                "SHUTDOWN",
                Some(json!({ "guest": guest, "reason": reason })),
            ),
            Self::BalloonChange { actual } => ("BALLOON_CHANGE", Some(json!({ "actual": actual }))),
            Self::BlockIoError {
                device,
                write,
                action,
                no_space,
                reason,
            } => {
                let action = match action {
                    IoErrorAction::Report => "report",
                    IoErrorAction::Ignore => "ignore",
                    IoErrorAction::Stop => "stop",
                };
                let data = json!({
                    "device": device,
                    "operation": if *write { "write" } else { "read" },
                    "action": action,
                    "nospace": no_space,
                    "reason": reason,
                });
                ("BLOCK_IO_ERROR", Some(data))
            }
            Self::Job { report, event } => {
                let (name, data) = report.event(*event);
                (name, Some(data))
            }
            Self::GuestPanicked => ("GUEST_PANICKED", Some(json!({ "action": "run" }))),
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
        match data {
            None => json!({ "timestamp": timestamp, "event": name }),
            Some(data) => json!({ "timestamp": timestamp, "event": name, "data": data }),
        }
    }
}
