//! What a network card is plugged into: the seam between a card and its link, and the links themselves.
//!
//! * [`backend`]: the seam. A card (virtio-net, e1000) sees [`NetBackend`] and [`NetQueue`] only.
//! * [`offload`]: the per-frame description of work left to the other side (checksums, segmentation).
//! * [`crossover`]: a cable between two cards in one process.

pub mod backend;
pub mod crossover;
pub mod offload;

pub use backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
pub use offload::{Checksum, GsoKind, OffloadHeader, Offloads};
