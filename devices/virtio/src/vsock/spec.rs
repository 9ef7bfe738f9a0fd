//! The socket device's numbers (section 5.10).

/// `VIRTIO_VSOCK_F_STREAM` (section 5.10.3).
pub const F_STREAM: u64 = 1;

/// The host's context ID (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The first context ID that a guest can have.
pub const FIRST_GUEST_CID: u64 = 3;

/// The queues (section 5.10.2).
pub mod queue {
    /// Packets to the driver.
    pub const RECEIVE: u16 = 0;
    /// Packets from the driver.
    pub const TRANSMIT: u16 = 1;
    /// Events to the driver.
    pub const EVENT: u16 = 2;
}

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;

/// Operations (section 5.10.6).
pub mod op {
    /// `VIRTIO_VSOCK_OP_REQUEST`.
    pub const REQUEST: u16 = 1;
    /// `VIRTIO_VSOCK_OP_RESPONSE`.
    pub const RESPONSE: u16 = 2;
    /// `VIRTIO_VSOCK_OP_RST`.
    pub const RST: u16 = 3;
    /// `VIRTIO_VSOCK_OP_SHUTDOWN`.
    pub const SHUTDOWN: u16 = 4;
    /// `VIRTIO_VSOCK_OP_RW`.
    pub const RW: u16 = 5;
    /// `VIRTIO_VSOCK_OP_CREDIT_UPDATE`.
    pub const CREDIT_UPDATE: u16 = 6;
    /// `VIRTIO_VSOCK_OP_CREDIT_REQUEST`.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet sends no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// Bytes of `struct virtio_vsock_hdr` (section 5.10.6).
pub const HEADER: usize = 44;
