//! Guest-physical memory.
//!
//! A [`GuestMemory`] is the map of a virtual machine's memory: [`Region`]s of a [`Backing`] placed at
//! guest-physical addresses. Everything that is not in the map is device space. The map can change while
//! the machine runs (hot-plug, firmware shadowing); readers see either the old or the new map.
//!
//! The processor, the devices and the loaders all reach guest memory through this crate, and all of the
//! `unsafe` that mapping memory needs lives here. The guest may write any byte at any time, so the crate never
//! forms a Rust reference to guest memory: bytes are copied in and out, or named by raw pointers.
//!
//! Each page of a backing carries flags ([`PageFlags`]) that a writer must look at *after* it has written:
//! a set flag means that somebody wants to know (decoded code lies in the page, or dirty pages are logged).

#![allow(unsafe_code)] // maps memory and copies from and to memory that a guest changes under us

mod backing;
mod map;
mod slice;
mod view;

pub use backing::{
    Backing, BackingOptions, CodeListener, PageFlags, barrier_for_new_code, code_writes,
};
pub use map::{GuestMemory, MemoryListener, Region, Translation};
pub use slice::{GuestSlice, GuestSlices};
pub use view::MemoryView;

/// Size of a page of the page flags and of dirty logs, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Base-two logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host would not give the memory.
    #[error("cannot map {size} bytes of guest memory: {source}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A region that is not made of whole pages, is empty, or ends past the address space.
    #[error("guest memory region {base:#x}+{size:#x} is not made of whole pages in range")]
    BadRegion {
        /// Guest-physical address of the first byte.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions would lie on one another.
    #[error("guest memory region {base:#x}+{size:#x} overlaps one that is there")]
    Overlap {
        /// Guest-physical address of the first byte.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// No region covers all of the range.
    #[error("guest-physical range {addr:#x}+{len:#x} is not in memory")]
    NotMemory {
        /// Guest-physical address of the first byte.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The range is memory that the guest's devices may not write (ROM).
    #[error("guest-physical range {addr:#x}+{len:#x} is read-only")]
    ReadOnly {
        /// Guest-physical address of the first byte.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// A file that was to be put into memory can't be read.
    #[error("{0}")]
    File(std::io::Error),
    /// An accelerator could not follow a change of the map.
    #[error("the accelerator refused a change of the memory map: {0}")]
    Listener(String),
}
