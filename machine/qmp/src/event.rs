//! Events (QEMU `qapi/run-state.json`).

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

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
