//! The transports' numbers: PCI (section 4.1) and memory-mapped (section 4.2).

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

/// Memory-mapped registers (section 4.2.2, table 4.1).
pub mod mmio {
    /// Bytes of a device's registers, its configuration space included.
    pub const SIZE: u64 = 0x200;
    /// `MagicValue`.
    pub const MAGIC_VALUE: u64 = 0x000;
    /// What it reads: "virt".
    pub const MAGIC: u32 = u32::from_le_bytes(*b"virt");
    /// `Version`.
    pub const VERSION: u64 = 0x004;
    /// What it reads: not the legacy interface.
    pub const VERSION_MODERN: u32 = 2;
    /// `DeviceID`: the device type.
    pub const DEVICE_ID: u64 = 0x008;
    /// `VendorID`.
    pub const VENDOR_ID: u64 = 0x00c;
    /// What it reads.
    pub const VENDOR: u32 = super::VENDOR as u32;
    /// `DeviceFeatures`.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// `DeviceFeaturesSel`.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// `DriverFeatures`.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// `DriverFeaturesSel`.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// `QueueSel`.
    pub const QUEUE_SEL: u64 = 0x030;
    /// `QueueNumMax`.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// `QueueNum`.
    pub const QUEUE_NUM: u64 = 0x038;
    /// `QueueReady`.
    pub const QUEUE_READY: u64 = 0x044;
    /// `QueueNotify`.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// `InterruptStatus`.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// `InterruptACK`.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// `Status`.
    pub const STATUS: u64 = 0x070;
    /// `QueueDescLow`.
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    /// `QueueDescHigh`.
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    /// `QueueDriverLow`.
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    /// `QueueDriverHigh`.
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    /// `QueueDeviceLow`.
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    /// `QueueDeviceHigh`.
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// `SHMLenLow`, the first of the shared memory region's registers.
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    /// `SHMBaseHigh`, the last of them.
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    /// `QueueReset`.
    pub const QUEUE_RESET: u64 = 0x0c0;
    /// `ConfigGeneration`.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// `Config`: the device's own configuration space.
    pub const CONFIG: u64 = 0x100;
}
