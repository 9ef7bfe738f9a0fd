//! The network device's numbers (section 5.1).

/// Feature bits (section 5.1.3), as masks.
pub mod feature {
    /// `VIRTIO_NET_F_CSUM`.
    pub const CSUM: u64 = 1;
    /// `VIRTIO_NET_F_GUEST_CSUM`.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// `VIRTIO_NET_F_MTU`.
    pub const MTU: u64 = 1 << 3;
    /// `VIRTIO_NET_F_MAC`.
    pub const MAC: u64 = 1 << 5;
    /// `VIRTIO_NET_F_GUEST_TSO4`.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_GUEST_TSO6`.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// `VIRTIO_NET_F_GUEST_ECN`.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// `VIRTIO_NET_F_GUEST_UFO`.
    pub const GUEST_UFO: u64 = 1 << 10;
    /// `VIRTIO_NET_F_HOST_TSO4`.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_HOST_TSO6`.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// `VIRTIO_NET_F_HOST_ECN`.
    pub const HOST_ECN: u64 = 1 << 13;
    /// `VIRTIO_NET_F_HOST_UFO`.
    pub const HOST_UFO: u64 = 1 << 14;
    /// `VIRTIO_NET_F_MRG_RXBUF`.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `VIRTIO_NET_F_STATUS`.
    pub const STATUS: u64 = 1 << 16;
    /// `VIRTIO_NET_F_CTRL_VQ`.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// `VIRTIO_NET_F_CTRL_RX`.
    pub const CTRL_RX: u64 = 1 << 18;
    /// `VIRTIO_NET_F_CTRL_VLAN`.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// `VIRTIO_NET_F_CTRL_RX_EXTRA`.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// `VIRTIO_NET_F_GUEST_ANNOUNCE`.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// `VIRTIO_NET_F_MQ`.
    pub const MQ: u64 = 1 << 22;
    /// `VIRTIO_NET_F_CTRL_MAC_ADDR`.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// `VIRTIO_NET_F_GUEST_USO4`.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// `VIRTIO_NET_F_GUEST_USO6`.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// `VIRTIO_NET_F_HOST_USO`.
    pub const HOST_USO: u64 = 1 << 56;
}

/// Offsets in `struct virtio_net_config` (section 5.1.4).
pub mod config {
    /// `mac`.
    pub const MAC: usize = 0;
    /// `status`.
    pub const STATUS: usize = 6;
    /// `max_virtqueue_pairs`.
    pub const MAX_PAIRS: usize = 8;
    /// `mtu`.
    pub const MTU: usize = 10;
    /// Bytes in all.
    pub const SIZE: usize = 12;
}

/// `VIRTIO_NET_S_LINK_UP`.
pub const LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`.
pub const ANNOUNCE: u16 = 2;

/// Bytes of `struct virtio_net_hdr` with `num_buffers` (section 5.1.6).
pub const HEADER: usize = 12;

/// Control commands: class and command (section 5.1.6.5).
pub mod control {
    /// `VIRTIO_NET_CTRL_RX`.
    pub const RX: u8 = 0;
    /// `VIRTIO_NET_CTRL_MAC`.
    pub const MAC: u8 = 1;
    /// `VIRTIO_NET_CTRL_MAC_TABLE_SET`.
    pub const MAC_TABLE_SET: u8 = 0;
    /// `VIRTIO_NET_CTRL_MAC_ADDR_SET`.
    pub const MAC_ADDR_SET: u8 = 1;
    /// `VIRTIO_NET_CTRL_VLAN`.
    pub const VLAN: u8 = 2;
    /// `VIRTIO_NET_CTRL_VLAN_ADD`.
    pub const VLAN_ADD: u8 = 0;
    /// `VIRTIO_NET_CTRL_VLAN_DEL`.
    pub const VLAN_DEL: u8 = 1;
    /// `VIRTIO_NET_CTRL_ANNOUNCE`.
    pub const ANNOUNCE: u8 = 3;
    /// `VIRTIO_NET_CTRL_MQ`.
    pub const MQ: u8 = 4;
    /// `VIRTIO_NET_CTRL_GUEST_OFFLOADS`.
    pub const GUEST_OFFLOADS: u8 = 5;
    /// `VIRTIO_NET_OK`.
    pub const OK: u8 = 0;
    /// `VIRTIO_NET_ERR`.
    pub const ERR: u8 = 1;
}
