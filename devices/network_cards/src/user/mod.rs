//! The user-mode network: a whole network for the guest without any privilege on the host.
//!
//! The guest sees an Ethernet with a gateway that serves DHCP, answers ARP and neighbour discovery, and stands for the host. Its TCP
//! connections end in this process and go on through sockets of the host, its datagrams likewise:
//!
//! ```text
//! guest  10.0.2.15, fec0::/64 by router advertisement
//!   |
//! stack  10.0.2.2  fec0::2   gateway; stands for the host's 127.0.0.1 and ::1
//!   |    10.0.2.3  fec0::3   the host's name server, port 53
//! host's sockets
//! ```
//!
//! Data between the guest's memory and sockets is copied once at most, in frames of up to 64 KiB where the guest can take
//! them. All runs on the card's thread, see [`backend`](crate::backend). All tables are bounded, and nothing that the guest
//! sends is trusted.

mod checksum;
mod config;
mod dhcp;
mod dns;
mod fragments;
#[cfg(test)]
mod hostile;
mod icmp;
mod link;
mod neighbours;
mod slab;
mod stack;
mod tcp;
mod timers;
mod udp;
mod wire;

use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

pub use config::{HostForward, Transport, UserNetConfig};

use crate::backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
use crate::offload::{OffloadHeader, Offloads};
use stack::Stack;

/// What the guest may leave to the stack: everything, as sockets need no checksums and no segments.
const TRANSMIT_OFFLOADS: Offloads = Offloads::all();
/// What the stack leaves to a guest that accepts it.
const RECEIVE_OFFLOADS: Offloads = Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6);

/// The user-mode network.
#[derive(Debug)]
pub struct UserNet {
    accepted: Arc<AtomicU32>,
    queue: Mutex<Option<Box<UserQueue>>>,
    forwards: Vec<SocketAddr>,
}

impl UserNet {
    /// Makes the network and opens its forwarded ports.
    ///
    /// # Errors
    ///
    /// Settings that make no sense, and forwarded ports that can't be opened (in use, not permitted).
    pub fn new(config: UserNetConfig) -> Result<Self, NetError> {
        let (stack, forwards) = Stack::new(config)?;
        let accepted = Arc::new(AtomicU32::new(0));
        let queue = UserQueue {
            stack,
            accepted: accepted.clone(),
        };
        Ok(Self {
            accepted,
            queue: Mutex::new(Some(Box::new(queue))),
            forwards,
        })
    }

    /// Where the forwarded ports are on the host, in the order of the settings: tells what port 0 became.
    pub fn forwarded_ports(&self) -> &[SocketAddr] {
        &self.forwards
    }
}

impl NetBackend for UserNet {
    fn describe(&self) -> String {
        "user".into()
    }

    fn max_queue_pairs(&self) -> u16 {
        1
    }

    fn transmit_offloads(&self) -> Offloads {
        TRANSMIT_OFFLOADS
    }

    fn receive_offloads(&self) -> Offloads {
        RECEIVE_OFFLOADS
    }

    fn set_offloads(&self, accepted: Offloads) -> Result<(), NetError> {
        let usable = accepted.consistent() & RECEIVE_OFFLOADS;
        self.accepted.store(usable.bits(), Ordering::Release);
        Ok(())
    }

    fn take_queues(&self, pairs: u16) -> Result<Vec<Box<dyn NetQueue>>, NetError> {
        self.set_active_queues(pairs)?;
        match self.queue.lock().take() {
            Some(queue) => Ok(vec![queue]),
            None => Err(NetError::QueuesTaken(self.describe())),
        }
    }

    fn set_active_queues(&self, pairs: u16) -> Result<(), NetError> {
        if pairs == 1 {
            return Ok(());
        }
        Err(NetError::QueueCount {
            link: self.describe(),
            asked: pairs,
            max: 1,
        })
    }

    fn link(&self) -> LinkState {
        LinkState::Up
    }
}

/// The network driven by hand, for tests with wild guests: whoever calls says what time it is, and there is one address
/// only that the guest reaches.
#[derive(Debug)]
pub struct SteppedNet(Stack);

impl SteppedNet {
    /// Makes the network and opens its forwarded ports; the second value says where they are. Of the addresses that the
    /// guest names only those lead anywhere that stand for `only_target`.
    ///
    /// # Errors
    /// As [`UserNet::new`].
    pub fn new(
        config: UserNetConfig,
        only_target: SocketAddr,
    ) -> Result<(Self, Vec<SocketAddr>), NetError> {
        let (mut stack, forwards) = Stack::new(config)?;
        stack.link.only_target = Some(only_target);
        Ok((Self(stack), forwards))
    }

    /// As [`NetBackend::set_offloads`].
    pub fn set_offloads(&mut self, accepted: Offloads) {
        self.0.link.accepted = accepted.consistent() & RECEIVE_OFFLOADS;
    }

    /// As [`NetQueue::transmit`], at `now` in milliseconds, which never falls.
    pub fn transmit(&mut self, header: &OffloadHeader, frame: &[IoSlice<'_>], now: u64) {
        self.0.transmit(header, frame, now);
    }

    /// As [`NetQueue::process`].
    ///
    /// # Errors
    /// When the host refuses to wait for sockets.
    pub fn process(&mut self, now: u64) -> Result<(), NetError> {
        self.0.process(now)
    }

    /// As [`NetQueue::receive`].
    pub fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
        now: u64,
    ) -> Option<(OffloadHeader, usize)> {
        self.0.receive(buffers, now)
    }
}

/// The one queue pair of a user-mode network.
#[derive(Debug)]
struct UserQueue {
    stack: Stack,
    accepted: Arc<AtomicU32>,
}

impl NetQueue for UserQueue {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.stack.link.epoll().as_fd()
    }

    fn interest(&self, _has_room: bool) -> Interest {
        // Sockets report edges, so what the guest has no room for doesn't keep the descriptor ready.
        Interest {
            readable: true,
            writable: false,
        }
    }

    fn process(&mut self) -> Result<(), NetError> {
        let now = self.stack.link.timers.now();
        self.stack.process(now)
    }

    fn transmit(
        &mut self,
        header: &OffloadHeader,
        frame: &[IoSlice<'_>],
    ) -> Result<Transmit, NetError> {
        let now = self.stack.link.timers.now();
        self.stack.transmit(header, frame, now);
        Ok(Transmit::Accepted)
    }

    fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(OffloadHeader, usize)>, NetError> {
        let accepted = self.accepted.load(Ordering::Acquire);
        self.stack.link.accepted = Offloads::from_bits_truncate(accepted);
        let now = self.stack.link.timers.now();
        Ok(self.stack.receive(buffers, now))
    }
}
