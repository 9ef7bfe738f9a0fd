//! Disk image formats. Each has its parsers apart from I/O, so that they can be fuzzed.

// Sizes and offsets in memory are at most a few MiB, checked where they come in; a 64-bit host is assumed.
#![allow(clippy::cast_possible_truncation)]

pub mod bochs;
pub mod chain;
pub mod cloop;
pub mod copy;
pub mod deflate;
mod details;
pub mod dmg;
mod fields;
mod identity;
pub mod luks;
mod mapped;
mod names;
mod new;
mod open;
pub mod parallels;
mod probe;
pub mod qcow2;
pub mod qed;
mod read_only;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

pub use details::{Compression, Description, ImageFormat, Property, Value};

pub use new::NewImage;
pub use open::{
    External, Files, Image, ImageOptions, Opener, create_file, local_path, open_disk, open_image,
    resolve_name,
};
pub use probe::{probe, probe_bytes};
pub use read_only::ReadOnlyImage;
