//! The console device's numbers (section 5.3).

/// Feature bits (section 5.3.3), as masks.
pub mod feature {
    /// `VIRTIO_CONSOLE_F_SIZE`.
    pub const SIZE: u64 = 1;
    /// `VIRTIO_CONSOLE_F_MULTIPORT`.
    pub const MULTIPORT: u64 = 1 << 1;
    /// `VIRTIO_CONSOLE_F_EMERG_WRITE`.
    pub const EMERG_WRITE: u64 = 1 << 2;
}

/// Offsets in `struct virtio_console_config` (section 5.3.4).
pub mod config {
    /// `cols`.
    pub const COLS: usize = 0;
    /// `rows`.
    pub const ROWS: usize = 2;
    /// `max_nr_ports`.
    pub const MAX_PORTS: usize = 4;
    /// `emerg_wr`.
    pub const EMERGENCY_WRITE: usize = 8;
    /// Bytes in all.
    pub const SIZE: usize = 12;
}

/// The queues of the control channel (section 5.3.2).
pub mod queue {
    /// Messages to the driver.
    pub const CONTROL_RECEIVE: u16 = 2;
    /// Messages from the driver.
    pub const CONTROL_TRANSMIT: u16 = 3;
}

/// Control messages (section 5.3.6.2).
pub mod event {
    /// `VIRTIO_CONSOLE_DEVICE_READY`.
    pub const DEVICE_READY: u16 = 0;
    /// `VIRTIO_CONSOLE_DEVICE_ADD`.
    pub const DEVICE_ADD: u16 = 1;
    /// `VIRTIO_CONSOLE_PORT_READY`.
    pub const PORT_READY: u16 = 3;
    /// `VIRTIO_CONSOLE_CONSOLE_PORT`.
    pub const CONSOLE_PORT: u16 = 4;
    /// `VIRTIO_CONSOLE_RESIZE`.
    pub const RESIZE: u16 = 5;
    /// `VIRTIO_CONSOLE_PORT_OPEN`.
    pub const PORT_OPEN: u16 = 6;
    /// `VIRTIO_CONSOLE_PORT_NAME`.
    pub const PORT_NAME: u16 = 7;
    /// Bytes of a message without its tail: port, event, value.
    pub const SIZE: usize = 8;
}
