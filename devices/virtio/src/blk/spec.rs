//! The block device's numbers (section 5.2).

/// Feature bits (section 5.2.3), as masks.
pub mod feature {
    /// `VIRTIO_BLK_F_SEG_MAX`.
    pub const SEG_MAX: u64 = 1 << 2;
    /// `VIRTIO_BLK_F_RO`.
    pub const RO: u64 = 1 << 5;
    /// `VIRTIO_BLK_F_BLK_SIZE`.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// `VIRTIO_BLK_F_FLUSH`.
    pub const FLUSH: u64 = 1 << 9;
    /// `VIRTIO_BLK_F_TOPOLOGY`.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `VIRTIO_BLK_F_CONFIG_WCE`.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `VIRTIO_BLK_F_MQ`.
    pub const MQ: u64 = 1 << 12;
    /// `VIRTIO_BLK_F_DISCARD`.
    pub const DISCARD: u64 = 1 << 13;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types (section 5.2.6).
pub mod request {
    /// `VIRTIO_BLK_T_IN`: read.
    pub const IN: u32 = 0;
    /// `VIRTIO_BLK_T_OUT`: write.
    pub const OUT: u32 = 1;
    /// `VIRTIO_BLK_T_FLUSH`.
    pub const FLUSH: u32 = 4;
    /// `VIRTIO_BLK_T_GET_ID`.
    pub const GET_ID: u32 = 8;
    /// `VIRTIO_BLK_T_DISCARD`.
    pub const DISCARD: u32 = 11;
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    pub const WRITE_ZEROES: u32 = 13;
    /// Bytes of the header: type, reserved, sector.
    pub const HEADER: usize = 16;
    /// Bytes of a range in discard and write-zeroes requests.
    pub const RANGE: usize = 16;
    /// The `unmap` flag of a range.
    pub const UNMAP: u32 = 1;
}

/// Request status (section 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`.
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported = 2,
}

/// Sectors of the interface, whatever the block size, in bytes.
pub const SECTOR: u64 = 512;
/// Bytes of the ID string.
pub const ID_SIZE: usize = 20;

/// Offsets in `struct virtio_blk_config` (section 5.2.4).
pub mod config {
    /// `capacity`, in sectors.
    pub const CAPACITY: usize = 0;
    /// `seg_max`.
    pub const SEG_MAX: usize = 12;
    /// `blk_size`.
    pub const BLK_SIZE: usize = 20;
    /// `topology.physical_block_exp`.
    pub const PHYSICAL_BLOCK_EXP: usize = 24;
    /// `writeback`.
    pub const WRITEBACK: usize = 32;
    /// `num_queues`.
    pub const NUM_QUEUES: usize = 34;
    /// `max_discard_sectors`.
    pub const MAX_DISCARD_SECTORS: usize = 36;
    /// `max_discard_seg`.
    pub const MAX_DISCARD_SEG: usize = 40;
    /// `discard_sector_alignment`.
    pub const DISCARD_ALIGNMENT: usize = 44;
    /// `max_write_zeroes_sectors`.
    pub const MAX_ZEROES_SECTORS: usize = 48;
    /// `max_write_zeroes_seg`.
    pub const MAX_ZEROES_SEG: usize = 52;
    /// `write_zeroes_may_unmap`.
    pub const ZEROES_MAY_UNMAP: usize = 56;
    /// Bytes in all.
    pub const SIZE: usize = 60;
}
