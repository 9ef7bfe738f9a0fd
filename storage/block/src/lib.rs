//! The block layer: the seam between disks and their storage, I/O engines and executors, host files,
//! image locks.
//!
//! A disk is a stack of three: a [`Medium`] holds an image file's bytes; a format on top of it is a
//! [`BlockBackend`]; a [`Disk`] wraps that, checks every request, and applies the policies that do not
//! depend on the format (cache mode, discard, zero detection). Devices and tools see the [`Disk`].
//!
//! All of it lives on one thread with an [`executor`]: a device's queue handler reaches its disk by
//! running there too.
//!
//! ```
//! use block::{Disk, DiskOptions, IoBuf, Medium, MemoryMedium, RawBackend, executor};
//! use std::rc::Rc;
//!
//! executor::block_on(async {
//!     let medium = Rc::new(MemoryMedium::new(1 << 20));
//!     let backend = RawBackend::open(medium).await.unwrap();
//!     let disk = Disk::new(Rc::new(backend), DiskOptions::default());
//!     disk.write(4096, IoBuf::from_slice(&[7; 512]), false).await.unwrap();
//!     let buffer = IoBuf::zeroed(512);
//!     disk.read(4096, buffer.clone()).await.unwrap();
//!     assert_eq!(buffer.to_vec(), [7; 512]);
//! })
//! .unwrap();
//! ```

mod backend;
mod bitmap;
mod buffer;
mod bytes;
mod disk;
mod error;
pub mod executor;
mod file;
mod gate;
pub mod job;
mod lock;
mod medium;
mod memory;
mod plain_file;
mod raw;
pub mod sync;
mod throttle;
mod watch;

pub use backend::{
    BlockBackend, BlockFuture, Extent, ExtentKind, ExtentQuery, HostRange, Limits, Scope,
    ZeroFlags, push_merged,
};
pub use bitmap::{BitmapRun, DirtyBitmap};
pub use buffer::{BUFFER_ALIGNMENT, IoBuf, KeepAlive, Segment, bytes_are_zero};
pub use bytes::ByteDisk;
pub use disk::{CacheMode, DetectZeroes, Disk, DiskOptions, DiskStatistics, Operations};
pub use error::{BlockError, ErrorKind, Result};
pub use file::{FileOptions, HostFile, open_to_read};
pub use gate::{ImplicitFile, OpenGate, Refusing};
pub use lock::LockMode;
pub use medium::{Medium, SparseRange};
pub use memory::MemoryMedium;
pub use plain_file::PlainFile;
pub use raw::RawBackend;
pub use throttle::{Direction, Rate, ThrottleGroup, ThrottleLimits};
pub use watch::{Change, StandStill, WriteWatcher};
