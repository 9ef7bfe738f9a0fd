//! Jobs on disks that are in use: they move data while a guest reads and writes.
//!
//! A [`Job`] is what people see and steer: its state, progress, speed, and what it tells. The work is done by a
//! [`Mirror`] or a [`Backup`] here, or by a format's own means above.

mod backup;
mod control;
mod copy;
mod mirror;
mod speed;

pub use backup::{Backup, BackupOptions};
pub use control::{
    ErrorAction, IoSide, IoStatus, Job, JobEvent, JobKind, JobOptions, JobStatus, OnError,
};
pub use copy::{CopyError, Layers, copy_range};
pub use mirror::{CopyMode, Mirror, MirrorEnd, MirrorOptions};
