//! The QEMU machine protocol: its server and its commands.
//!
//! A [`Server`] listens on a Unix socket and speaks the protocol (QEMU `docs/interop/qmp-spec.rst`) with any number of
//! clients. What the commands do is the machine's: the server asks it through [`Control`].

mod block;
mod client;
mod commands;
mod event;
mod jobs;
mod server;
mod statistics;

pub use block::{BitmapReport, DiskReport, IoStatus};
pub use commands::{Control, RunState};
pub use event::{Event, IoErrorAction};
pub use jobs::{BitmapVerb, BlockCall, JobReport, JobRequest, JobVerb, JobWork, Sync, Target};
pub use server::{Server, ServerError};
pub use statistics::{Figure, Meaning, Statistics};
