//! The PCI transport's numbers (section 4.1).

/// The vendor ID of virtio devices (section 4.1.2).
pub const VENDOR: u16 = 0x1af4;
/// Device IDs are this plus the device type (section 4.1.2).
pub const DEVICE_BASE: u16 = 0x1040;
/// The subsystem device ID, which the specification leaves free above 0x40.
pub const SUBSYSTEM: u16 = 0x1100;

/// "No vector" (section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status: a queue has used buffers (section 4.1.4.5).
pub const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration has changed.
pub const ISR_CONFIG: u8 = 2;

/// `cfg_type` of the vendor capabilities (section 4.1.4).
pub mod capability {
    /// `VIRTIO_PCI_CAP_COMMON_CFG`.
    pub const COMMON: u8 = 1;
    /// `VIRTIO_PCI_CAP_NOTIFY_CFG`.
    pub const NOTIFY: u8 = 2;
    /// `VIRTIO_PCI_CAP_ISR_CFG`.
    pub const ISR: u8 = 3;
    /// `VIRTIO_PCI_CAP_DEVICE_CFG`.
    pub const DEVICE: u8 = 4;
    /// `VIRTIO_PCI_CAP_PCI_CFG`.
    pub const PCI: u8 = 5;
}

/// Offsets in `struct virtio_pci_common_cfg` (section 4.1.4.3).
pub mod common {
    /// `device_feature_select`.
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    /// `device_feature`.
    pub const DEVICE_FEATURE: usize = 4;
    /// `driver_feature_select`.
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    /// `driver_feature`.
    pub const DRIVER_FEATURE: usize = 12;
    /// `config_msix_vector`.
    pub const CONFIG_VECTOR: usize = 16;
    /// `num_queues`.
    pub const NUM_QUEUES: usize = 18;
    /// `device_status`.
    pub const STATUS: usize = 20;
    /// `config_generation`.
    pub const GENERATION: usize = 21;
    /// `queue_select`.
    pub const QUEUE_SELECT: usize = 22;
    /// `queue_size`.
    pub const QUEUE_SIZE: usize = 24;
    /// `queue_msix_vector`.
    pub const QUEUE_VECTOR: usize = 26;
    /// `queue_enable`.
    pub const QUEUE_ENABLE: usize = 28;
    /// `queue_notify_off`.
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    /// `queue_desc`.
    pub const QUEUE_DESC: usize = 32;
    /// `queue_driver`.
    pub const QUEUE_DRIVER: usize = 40;
    /// `queue_device`.
    pub const QUEUE_DEVICE: usize = 48;
    /// `queue_notify_data`.
    pub const QUEUE_NOTIFY_DATA: usize = 56;
    /// `queue_reset`.
    pub const QUEUE_RESET: usize = 58;
    /// Bytes in all.
    pub const SIZE: usize = 64;
}
