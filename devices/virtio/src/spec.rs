//! Numbers of Virtual I/O Device (VIRTIO) version 1.2 that all devices share. Section numbers are that specification's.

use bitflags::bitflags;

bitflags! {
    /// Device status (section 2.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Status: u8 {
        /// The guest has seen the device.
        const ACKNOWLEDGE = 1;
        /// The guest has a driver for it.
        const DRIVER = 2;
        /// The driver is set up.
        const DRIVER_OK = 4;
        /// Negotiation has ended.
        const FEATURES_OK = 8;
        /// The device can't go on.
        const DEVICE_NEEDS_RESET = 0x40;
        /// The driver has given up.
        const FAILED = 0x80;
    }
}

/// Feature bits that are not a device's own (section 6), as masks.
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: descriptors may point to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: each side says at which entry it wants to be notified.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_ACCESS_PLATFORM`: addresses go through an IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// `VIRTIO_F_RING_PACKED`: the packed ring format.
    pub const RING_PACKED: u64 = 1 << 34;
    /// `VIRTIO_F_IN_ORDER`: buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// `VIRTIO_F_ORDER_PLATFORM`: memory barriers must hold for a device in hardware.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// `VIRTIO_F_NOTIFICATION_DATA`: doorbells carry the ring's position.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    /// `VIRTIO_F_RING_RESET`: single queues can be reset.
    pub const RING_RESET: u64 = 1 << 40;
}

/// Descriptor flags, split and packed (sections 2.7.5 and 2.8).
pub mod descriptor {
    /// `VIRTQ_DESC_F_NEXT`: the chain goes on.
    pub const NEXT: u16 = 1;
    /// `VIRTQ_DESC_F_WRITE`: the device writes the buffer.
    pub const WRITE: u16 = 2;
    /// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// Packed rings: the driver's wrap counter when it made the descriptor available.
    pub const AVAIL: u16 = 1 << 7;
    /// Packed rings: the device's wrap counter when it used the descriptor.
    pub const USED: u16 = 1 << 15;
    /// Bytes of a descriptor in either format.
    pub const SIZE: usize = 16;
}

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (section 2.7.6).
pub const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY` (section 2.7.8).
pub const USED_NO_NOTIFY: u16 = 1;

/// Packed rings: event suppression (section 2.8.10).
pub mod event {
    /// `RING_EVENT_FLAGS_ENABLE`.
    pub const ENABLE: u16 = 0;
    /// `RING_EVENT_FLAGS_DISABLE`.
    pub const DISABLE: u16 = 1;
    /// `RING_EVENT_FLAGS_DESC`: at one descriptor.
    pub const DESC: u16 = 2;
}

/// The largest queue that the specification allows (section 2.6).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Device types (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
}
