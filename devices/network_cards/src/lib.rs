//! What a network card is plugged into: the seam between a card and its link, and the links themselves.
//!
//! * [`backend`]: the seam. A card (virtio-net, e1000) sees [`NetBackend`] and [`NetQueue`] only.
//! * [`offload`]: the per-frame description of work left to the other side (checksums, segmentation).
//! * [`user`]: a network without privileges, in this process.
//! * [`tap`]: an interface of the host's kernel.
//! * [`stream`]: a socket of another program, by streams or datagrams.
//! * [`capture`]: records what passes over a link.
//! * [`crossover`]: a cable between two cards in one process.

pub mod backend;
pub mod capture;
pub mod crossover;
pub mod offload;
pub mod stream;
pub mod tap;
pub mod user;

pub use backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
pub use capture::{CaptureConfig, Captured};
pub use offload::{Checksum, GsoKind, OffloadHeader, Offloads};
pub use stream::{DgramConfig, DgramNet, SocketAddress, StreamConfig, StreamNet};
pub use tap::{Tap, TapConfig};
pub use user::{UserNet, UserNetConfig};
