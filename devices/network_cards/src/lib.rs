//! What a network card is plugged into: the seam between a card and its link, and the links themselves.
//!
//! * [`backend`]: the seam. A card (virtio-net, e1000) sees [`NetBackend`] and [`NetQueue`] only.
//! * [`offload`]: the per-frame description of work left to the other side (checksums, segmentation).
//! * [`user`]: a network without privileges, in this process.
//! * [`tap`]: an interface of the host's kernel.
//! * [`crossover`]: a cable between two cards in one process.

pub mod backend;
pub mod crossover;
pub mod offload;
pub mod tap;
pub mod user;

pub use backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
pub use offload::{Checksum, GsoKind, OffloadHeader, Offloads};
pub use tap::{Tap, TapConfig};
pub use user::{UserNet, UserNetConfig};
