//! What a virtual machine is.
//!
//! The command line, QMP and Domain XML all become a [`VmSpec`], and a machine is built from the spec alone. The types here
//! are plain data with no live handles: they can be printed, stored, compared and read back as JSON.

mod accel;
mod char_spec;
mod cpu;
mod disk;
mod net;
mod options;
mod size;
mod spec;
mod throttle;

pub use accel::{AccelChoice, SoftSpec, parse_accel};
pub use char_spec::CharSpec;
pub use cpu::{CpuSpec, MAX_CPUS};
pub use disk::{Aio, CacheMode, DetectZeroes, Discard, DiskBus, DiskFormat, DiskSpec, ErrorPolicy};
pub use net::{Forward, MacAddress, NetLink, NetSpec, Protocol, TapLink, UserLink};
pub use options::{OptionError, Options};
pub use size::{format_size, parse_size};
pub use spec::{BalloonSpec, KernelSpec, MachineType, MemorySpec, SecretSpec, VmSpec, VsockSpec};
pub use throttle::ThrottleSpec;
