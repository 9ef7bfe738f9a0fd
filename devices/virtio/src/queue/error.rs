//! What a guest can do wrong with a queue.

/// Why a queue has stopped. The device then needs a reset (`DEVICE_NEEDS_RESET`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A queue size that the format doesn't allow.
    #[error("queue size {0} is not possible")]
    Size(u16),
    /// A ring at an odd address.
    #[error("{part} at {addr:#x} is misaligned")]
    Misaligned {
        /// Which part of the ring.
        part: &'static str,
        /// Its guest-physical address.
        addr: u64,
    },
    /// A ring that is not in memory.
    #[error("{part} at {addr:#x} is not in memory")]
    RingNotMemory {
        /// Which part of the ring.
        part: &'static str,
        /// Its guest-physical address.
        addr: u64,
    },
    /// The available index is further ahead than the ring is long.
    #[error("available index {index} is more than {size} entries ahead of {next}")]
    AvailableIndex {
        /// The index that the driver wrote.
        index: u16,
        /// The next entry to be taken.
        next: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor number that the table has not got.
    #[error("descriptor {index} of a table of {size}")]
    DescriptorIndex {
        /// The number.
        index: u16,
        /// Descriptors of the table.
        size: u32,
    },
    /// A chain with more descriptors than may be, which a loop has as well.
    #[error("a chain of more than {0} descriptors")]
    ChainTooLong(u32),
    /// A chain of 4 GiB or more.
    #[error("a chain of more than 4 GiB")]
    TooManyBytes,
    /// A chain without descriptors.
    #[error("an indirect table of {0} bytes")]
    IndirectSize(u32),
    /// An indirect descriptor that may not be: not negotiated, inside a table, or with a successor.
    #[error("an indirect descriptor {0}")]
    Indirect(&'static str),
    /// A readable descriptor behind a writable one.
    #[error("a readable descriptor behind a writable one")]
    ReadableBehindWritable,
    /// A buffer that is not in memory (or is ROM, where it should be written).
    #[error("a buffer {addr:#x}+{len:#x} that is not in memory")]
    Buffer {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// More buffers made available than the ring has descriptors.
    #[error("more buffers in flight than the queue of {0} has entries")]
    TooManyInFlight(u16),
    /// A buffer whose form the device type's section of the specification forbids.
    #[error("a malformed request: {0}")]
    Request(&'static str),
}
