//! Virtio devices (Virtual I/O Device, version 1.2).
//!
//! * [`queue`]: virtqueues, split and packed.
//! * [`spec`]: numbers that all devices share.

pub mod queue;
pub mod spec;
