//! The seam between a network card and its link.
//!
//! # Who runs what
//!
//! A backend has no thread of its own. The card's queue thread (one for all queues or one for each, as the card likes)
//! drives a [`NetQueue`] and sleeps in `poll` on the queue's one file descriptor together with the card's own doorbells.
//! A frame then goes from the guest to a host socket, or back, on one thread: no hand-over, no lock, no second wake-up.
//!
//! The card's loop:
//!
//! ```text
//! loop {
//!     wait on: the guest's doorbells, queue.poll_fd() for queue.interest(guest_has_receive_buffers)
//!     if poll_fd was ready:        queue.process()
//!     while guest has frames:      match queue.transmit(header, frame) { Accepted => complete it, WouldBlock => stop }
//!     while guest has buffers:     match queue.receive(buffers) { Some => give it to the guest, None => stop }
//!     signal the guest's used rings once; tell the guest if link() has changed
//! }
//! ```
//!
//! `receive` must be called after a batch of `transmit` even if `poll_fd` was not ready: answers (an acknowledgement, an
//! ARP reply) wait in the queue until they are pulled, which also lets one acknowledgement stand for a whole batch.
//! A backend that has more to do than one pass should take keeps its descriptor ready.
//!
//! # Back-pressure
//!
//! Nothing is dropped for want of room on the other side. A guest without receive buffers simply is not served:
//! the card doesn't call `receive`, and asks `interest(false)` so that a waiting frame doesn't wake it. When
//! the guest gives buffers, the card calls `receive` again. In the other direction `WouldBlock` tells the card to
//! leave the frame (and those behind it) in the guest's queue and to try again after `poll_fd` became ready.
//!
//! # Memory that changes
//!
//! The slices may lie in guest memory that the guest writes at the same time (a card may also copy frames to memory of
//! its own). A backend copies what it decides upon before it looks at it, and never trusts a byte to be the
//! same twice.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use crate::offload::{OffloadHeader, Offloads};

/// A link: the control side, and the maker of queues. Shared between the card and the monitor.
///
/// All methods take effect at once on queues that have been taken already, and may be called from any thread.
pub trait NetBackend: Send + Sync + fmt::Debug {
    /// What it is, for messages and monitors: `user`, `tap,ifname=tap0`.
    fn describe(&self) -> String;

    /// How many queue pairs it can serve. At least 1.
    fn max_queue_pairs(&self) -> u16;

    /// What a card may leave undone in the frames that it transmits. A card offers its guest no more than this.
    fn transmit_offloads(&self) -> Offloads;

    /// What the backend could leave undone in frames that it delivers.
    fn receive_offloads(&self) -> Offloads;

    /// Says what the guest accepts, after negotiation, on `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`, and with the empty set at reset.
    /// `receive` leaves undone only what is in this set (and in [`receive_offloads`](Self::receive_offloads)).
    /// The backend starts with the empty set.
    fn set_offloads(&self, accepted: Offloads) -> Result<(), NetError>;

    /// Gives out the queues, one for each queue pair of the card: `pairs` of them, 1 to
    /// [`max_queue_pairs`](Self::max_queue_pairs). Queues can be taken once; they outlive resets of the card.
    fn take_queues(&self, pairs: u16) -> Result<Vec<Box<dyn NetQueue>>, NetError>;

    /// Says that the guest uses the first `pairs` queues now (`VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`); frames come on those only.
    /// All that were taken are in use at first.
    fn set_active_queues(&self, pairs: u16) -> Result<(), NetError>;

    /// The link's own state. It changes within a call of one of the first queue's methods, so the card asks again after each
    /// pass of its loop.
    fn link(&self) -> LinkState;
}

/// One queue pair of a link. Used by one thread at a time.
pub trait NetQueue: Send {
    /// The descriptor that the card waits on. The same for the queue's life.
    fn poll_fd(&self) -> BorrowedFd<'_>;

    /// What to wait for on [`poll_fd`](Self::poll_fd) now; `has_room` says whether the guest has receive buffers.
    /// Asked before each wait. May be none: then the card waits for its doorbells only.
    fn interest(&self, has_room: bool) -> Interest;

    /// Does what `poll_fd` became ready for: reads sockets, runs timers. Bounded work; never blocks.
    fn process(&mut self) -> Result<(), NetError>;

    /// Sends one frame, which starts with the Ethernet header. Never blocks.
    ///
    /// A frame that makes no sense (too short, a bad checksum offset, a broken header) is accepted and counted as
    /// dropped, as on a wire. An error means that the link is broken for good.
    fn transmit(
        &mut self,
        header: &OffloadHeader,
        frame: &[IoSlice<'_>],
    ) -> Result<Transmit, NetError>;

    /// Fetches the next frame for the guest into `buffers`, which together hold at least [`Offloads::max_frame`] bytes of
    /// the accepted set. Returns the header and the frame's length, or `None` if there is none now. Never blocks.
    /// With less room, frames that don't fit are dropped and counted, as a card drops what is too long for it.
    fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(OffloadHeader, usize)>, NetError>;
}

/// The answer to [`NetQueue::transmit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Transmit {
    /// The frame is the backend's now; its memory may be reused.
    Accepted,
    /// Not now. Try this frame again after the descriptor became ready.
    WouldBlock,
}

/// What to wait for on a queue's descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    /// Wait until it can be read (`POLLIN`).
    pub readable: bool,
    /// Wait until it can be written (`POLLOUT`).
    pub writable: bool,
}

/// Whether the link carries frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// Frames pass.
    Up,
    /// Frames are accepted and lost; none come.
    Down,
}

/// Why a link can't be made or used.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The queues have been taken.
    #[error("the queues of {0} are in use by another card")]
    QueuesTaken(String),
    /// More queues than the backend has, or none.
    #[error("{link} can serve 1 to {max} queue pairs, not {asked}")]
    QueueCount {
        /// The backend.
        link: String,
        /// What was asked for.
        asked: u16,
        /// What it can do.
        max: u16,
    },
    /// The operating system refused something.
    #[error("{what}")]
    Os {
        /// What was tried, with its object.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A value in the configuration is not possible.
    #[error("{option}={value}: {expected}")]
    Config {
        /// The option's name.
        option: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: String,
    },
}

impl NetError {
    /// An [`Os`](Self::Os) error; `what` says what was tried.
    pub fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os {
            what: what.into(),
            source: source.into(),
        }
    }
}
