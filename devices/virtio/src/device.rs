//! What every virtio device is to its transport.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use guest_memory::GuestMemory;

use crate::queue::{Queue, QueueEvents};
use crate::spec::DeviceType;

/// Signals from a device to its driver, implemented by the transport. May be called from any thread, at any time; never
/// blocks.
pub trait DeviceEvents: QueueEvents {
    /// The device's configuration space has changed.
    fn config_changed(&self);
}

/// A queue that the driver has enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The queue.
    pub queue: Queue,
    /// An eventfd that is signalled when the driver rings the queue's doorbell. One reader at a time.
    pub doorbell: OwnedFd,
}

/// What a device is given when its driver is ready (`DRIVER_OK`).
pub struct Activation {
    /// The features negotiated.
    pub features: u64,
    /// The queues that are enabled, by rising index.
    pub queues: Vec<ActiveQueue>,
    /// Guest memory.
    pub memory: GuestMemory,
}

/// A device behind a transport.
///
/// The transport calls it with its own lock held, on a vCPU's thread: the device's threads may not wait for the
/// transport. The order of calls: `connect` once; then any number of times `activate`, `start_queue` and
/// `stop_queue`, `reset`.
pub trait VirtioDevice: Send {
    /// The type.
    fn device_type(&self) -> DeviceType;

    /// The greatest size of each queue: their number is the device's number of queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device type's own feature bits that it offers. The transport adds those of rings and transport.
    fn features(&self) -> u64;

    /// Whether these features can go together; asked before `FEATURES_OK` is granted. They are a part of those offered.
    fn accepts(&self, features: u64) -> bool;

    /// Takes the way to the driver. Called once, before the guest sees the device.
    fn connect(&mut self, events: Arc<dyn DeviceEvents>);

    /// Reads the device's configuration space. Bytes past its end are 0; `data` is so filled before.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes the device's configuration space. What is read-only is ignored.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// The driver is ready: go.
    fn activate(&mut self, activation: Activation);

    /// A queue has been enabled while the device is active (`VIRTIO_F_RING_RESET`).
    fn start_queue(&mut self, queue: ActiveQueue);

    /// A single queue is reset. When this returns nothing touches it any more.
    fn stop_queue(&mut self, index: u16);

    /// The device is reset: when this returns, no thread of it touches a queue or guest memory.
    fn reset(&mut self);
}

/// Copies the part of `space` that starts at `offset` into `data`, as far as there is one.
pub(crate) fn read_space(space: &[u8], offset: usize, data: &mut [u8]) {
    if let Some(rest) = space.get(offset..) {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}
