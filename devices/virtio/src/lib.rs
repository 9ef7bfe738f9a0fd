//! Virtio devices (Virtual I/O Device, version 1.2).
//!
//! * [`queue`]: virtqueues, split and packed.
//! * [`device`]: what a device is to its transport.
//! * [`transport`]: modern virtio over PCI.
//! * The devices: [`blk`], [`net`], [`console`], [`balloon`], [`vsock`], [`rng`].
//! * [`spec`]: numbers that all devices share.
//!
//! A vCPU's access to a device's registers is handled on the vCPU's thread, under the transport's lock; doorbells only signal
//! an eventfd. Everything that touches a queue happens on the device's own threads, which signal back through
//! [`device::DeviceEvents`] without a lock.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
mod doorbell;
mod guest_io;
#[cfg(test)]
mod hostile;
pub mod net;
pub mod queue;
pub mod rng;
pub mod spec;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
mod worker;
