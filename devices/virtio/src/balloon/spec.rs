//! The memory balloon's numbers (section 5.5).

/// Feature bits (section 5.5.3), as masks.
pub mod feature {
    /// `VIRTIO_BALLOON_F_STATS_VQ`.
    pub const STATS_VQ: u64 = 1 << 1;
    /// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// `VIRTIO_BALLOON_F_PAGE_POISON`.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// Offsets in `struct virtio_balloon_config` (section 5.5.4).
pub mod config {
    /// `num_pages`: what the host wants.
    pub const NUM_PAGES: usize = 0;
    /// `actual`: what the guest has given.
    pub const ACTUAL: usize = 4;
    /// `poison_val`.
    pub const POISON: usize = 12;
    /// Bytes in all.
    pub const SIZE: usize = 16;
}

/// Pages of the interface in bytes, whatever the guest's own.
pub const PAGE: u64 = 4096;
/// Bytes of a statistic: tag and value (section 5.5.6.3).
pub const STATISTIC: usize = 10;

/// The tags of statistics (section 5.5.6.4), with the names that QEMU's monitor has for them.
pub const TAGS: [(u16, &str); 10] = [
    (0, "stat-swap-in"),
    (1, "stat-swap-out"),
    (2, "stat-major-faults"),
    (3, "stat-minor-faults"),
    (4, "stat-free-memory"),
    (5, "stat-total-memory"),
    (6, "stat-available-memory"),
    (7, "stat-disk-caches"),
    (8, "stat-htlb-pgalloc"),
    (9, "stat-htlb-pgfail"),
];
