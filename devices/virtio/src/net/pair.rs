//! A pair of queues at work, and the queue of the link that belongs to it: one thread.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use network_cards::offload::{HEADER_LEN, MAX_FRAME};
use network_cards::{GsoKind, NetQueue, OffloadHeader, Offloads, Transmit};
use rustix::event::PollFlags;
use smallvec::SmallVec;

use super::filter::LOOKED_AT;
use super::spec::{HEADER, feature};
use super::{Shared, control};
use crate::device::ActiveQueue;
use crate::doorbell;
use crate::guest_io::{io_slices, io_slices_mut};
use crate::queue::{Chain, QueueError};
use crate::worker::{Service, WaitSet};

/// Frames in one direction before the other has its turn.
const TURN: usize = 128;

const RX: u64 = 0;
const TX: u64 = 1;
const CONTROL: u64 = 2;
const LINK: u64 = 3;

/// One pair of queues.
pub(super) struct Pair {
    // Configuration.
    /// Its number, from 0.
    number: u16,
    shared: Arc<Shared>,
    // Runtime.
    link: Box<dyn NetQueue>,
    /// The link has failed for good.
    broken: bool,
    pub(super) rx: Option<ActiveQueue>,
    pub(super) tx: Option<ActiveQueue>,
    /// The control queue; the first pair's thread serves it.
    pub(super) control: Option<ActiveQueue>,
    /// Receive buffers that have been taken from the queue.
    ready: VecDeque<Chain>,
    /// Their bytes.
    ready_bytes: usize,
    /// The most buffers that the guest has had with us at a time when its queue was empty.
    all_buffers: usize,
    /// The guest has no receive buffers left: its doorbell tells of new ones.
    starved: bool,
    /// The link takes no more frames now: its descriptor tells when it does.
    blocked: bool,
    link_ready: bool,
    again: bool,
}

impl Pair {
    pub(super) fn new(number: u16, shared: Arc<Shared>, link: Box<dyn NetQueue>) -> Self {
        Self {
            number,
            shared,
            link,
            broken: false,
            rx: None,
            tx: None,
            control: None,
            ready: VecDeque::new(),
            ready_bytes: 0,
            all_buffers: 0,
            starved: false,
            blocked: false,
            link_ready: false,
            again: false,
        }
    }

    /// Takes over a queue: `role` 0 receives, 1 transmits, 2 controls.
    pub(super) fn start(&mut self, role: u16, queue: ActiveQueue) {
        match role {
            0 => self.rx = Some(queue),
            1 => self.tx = Some(queue),
            _ => self.control = Some(queue),
        }
        self.starved = false;
        self.blocked = false;
        self.again = true;
    }

    /// Gives a queue up.
    pub(super) fn stop(&mut self, role: u16) {
        match role {
            0 => {
                self.rx = None;
                self.ready.clear();
                self.ready_bytes = 0;
                self.all_buffers = 0;
            }
            1 => self.tx = None,
            _ => self.control = None,
        }
    }

    /// Something that decides whether frames pass has changed.
    pub(super) fn look_again(&mut self) {
        self.again = true;
    }

    fn is_receiving(&self) -> bool {
        !self.broken
            && self.rx.is_some()
            && self.shared.is_up()
            && self.number < self.shared.active_pairs.load(Ordering::Acquire)
    }

    fn run(&mut self) {
        self.again = false;
        if std::mem::take(&mut self.link_ready) && !self.broken {
            self.blocked = false;
            self.broken = self.link.process().is_err();
        }
        if self.number == 0 {
            self.shared.follow_link(self.broken);
            self.serve_control();
        }
        self.transmit();
        self.receive();
    }

    fn serve_control(&mut self) {
        let Some(active) = &mut self.control else {
            return;
        };
        let queue = &mut active.queue;
        for _ in 0..TURN {
            let Some(chain) = queue.pop() else {
                queue.commit();
                if queue.enable_doorbell() {
                    continue;
                }
                return;
            };
            match control::serve(&self.shared, &chain) {
                Ok(written) => queue.push(chain.token, written),
                Err(what) => queue.fail(QueueError::Request(what)),
            }
        }
        queue.commit();
        self.again = true;
    }

    fn transmit(&mut self) {
        let Some(active) = &mut self.tx else {
            return;
        };
        if self.blocked {
            return;
        }
        let queue = &mut active.queue;
        queue.disable_doorbell();
        let lost = self.broken || !self.shared.is_up();
        for _ in 0..TURN {
            let Some(chain) = queue.pop() else {
                queue.commit();
                if queue.enable_doorbell() {
                    continue;
                }
                return;
            };
            if chain.readable.len() < HEADER {
                queue.fail(QueueError::Request("a frame without its header"));
                return;
            }
            if !lost {
                match send(&self.shared, &mut *self.link, &chain) {
                    Ok(Transmit::Accepted) => {}
                    Ok(Transmit::WouldBlock) => {
                        queue.unpop(chain);
                        queue.commit();
                        self.blocked = true;
                        return;
                    }
                    Err(_) => self.broken = true,
                }
            }
            queue.push(chain.token, 0);
        }
        queue.commit();
        self.again = true;
    }

    fn receive(&mut self) {
        if !self.is_receiving() {
            return;
        }
        let mut frames = 0;
        while frames < TURN {
            if !self.gather() {
                break;
            }
            match self.receive_one() {
                Some(true) => frames += 1,
                Some(false) => break,
                None => {
                    self.broken = true;
                    break;
                }
            }
        }
        if let Some(active) = &mut self.rx {
            active.queue.commit();
        }
        self.again |= frames == TURN;
    }

    /// Takes receive buffers until a frame has room, as far as it can have. False when there are none.
    fn gather(&mut self) -> bool {
        let Some(active) = &mut self.rx else {
            return false;
        };
        let mergeable = self.shared.features.load(Ordering::Acquire) & feature::MRG_RXBUF != 0;
        let wanted = HEADER + self.shared.accepted().max_frame();
        let enough = |bytes: usize, count: usize| {
            if mergeable {
                bytes >= wanted
            } else {
                count > 0
            }
        };
        let queue = &mut active.queue;
        while !enough(self.ready_bytes, self.ready.len()) {
            let Some(chain) = queue.pop() else {
                queue.commit();
                if queue.enable_doorbell() {
                    continue;
                }
                // A guest whose buffers together are too few for the largest frame gets the smaller ones; else we wait
                // for those that it has not given back yet.
                let count = self.ready.len();
                self.starved = count == 0 || count < self.all_buffers;
                self.all_buffers = self.all_buffers.max(count);
                return !self.starved;
            };
            if chain.writable.len() < HEADER {
                queue.fail(QueueError::Request(
                    "a receive buffer smaller than the header",
                ));
                return false;
            }
            self.ready_bytes += chain.writable.len();
            self.ready.push_back(chain);
        }
        self.starved = false;
        queue.disable_doorbell();
        true
    }

    /// Fetches a frame. `Some(false)` when there is none, `None` when the link has failed.
    fn receive_one(&mut self) -> Option<bool> {
        let mergeable = self.shared.features.load(Ordering::Acquire) & feature::MRG_RXBUF != 0;
        let count = if mergeable { self.ready.len() } else { 1 };
        let (header, len) = {
            let mut space: SmallVec<[IoSliceMut<'_>; 48]> = SmallVec::new();
            for (i, chain) in self.ready.iter_mut().take(count).enumerate() {
                let skip = if i == 0 { HEADER } else { 0 };
                io_slices_mut(&mut chain.writable, skip, &mut space);
            }
            match self.link.receive(&mut space) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Some(false),
                Err(_) => return None,
            }
        };
        if self.wants_frame(len) {
            self.give(header, HEADER + len);
        }
        Some(true)
    }

    /// Whether the frame in the first buffers passes the filter.
    fn wants_frame(&self, len: usize) -> bool {
        let mut start = [0; LOOKED_AT];
        let mut have = 0;
        for (i, chain) in self.ready.iter().enumerate() {
            let skip = if i == 0 { HEADER } else { 0 };
            have += chain.writable.read_at(skip, &mut start[have..]);
            if have == LOOKED_AT {
                break;
            }
        }
        if have > len {
            start[len..].fill(0);
        }
        self.shared.filter.read().passes(&start)
    }

    /// Gives the frame of `total` bytes (its header among them) in the first buffers to the guest.
    fn give(&mut self, mut header: OffloadHeader, total: usize) {
        let Some(active) = &mut self.rx else {
            return;
        };
        if !self.shared.accepted().contains(Offloads::CSUM) {
            header.data_valid = false;
        }
        let mut used: SmallVec<[(Chain, usize); 4]> = SmallVec::new();
        let mut left = total;
        while left > 0 {
            let Some(chain) = self.ready.pop_front() else {
                break;
            };
            self.ready_bytes -= chain.writable.len();
            let n = left.min(chain.writable.len());
            left -= n;
            used.push((chain, n));
        }
        let mut bytes = [0; HEADER];
        bytes[..HEADER_LEN].copy_from_slice(&header.encode());
        bytes[HEADER_LEN..].copy_from_slice(&(used.len() as u16).to_le_bytes());
        for (i, (chain, n)) in used.iter().enumerate() {
            chain.writable.written(*n);
            if i == 0 {
                chain.writable.write_at(0, &bytes);
            }
            active.queue.push(chain.token, *n as u32);
        }
    }
}

/// Hands a frame to the link. One that makes no sense, or leaves undone what was not negotiated, is lost as on a wire.
fn send(
    shared: &Shared,
    link: &mut dyn NetQueue,
    chain: &Chain,
) -> Result<Transmit, network_cards::NetError> {
    let Some(bytes) = chain.readable.array_at::<HEADER_LEN>(0) else {
        return Ok(Transmit::Accepted);
    };
    let length = chain.readable.len() - HEADER;
    let Ok(header) = OffloadHeader::decode(&bytes) else {
        return Ok(Transmit::Accepted);
    };
    let features = shared.features.load(Ordering::Acquire);
    if length > MAX_FRAME || !may_leave(&header, features) {
        return Ok(Transmit::Accepted);
    }
    let mut frame: SmallVec<[IoSlice<'_>; 24]> = SmallVec::new();
    io_slices(&chain.readable, HEADER, &mut frame);
    link.transmit(&header, &frame)
}

/// Whether the driver may leave this undone.
fn may_leave(header: &OffloadHeader, features: u64) -> bool {
    let segmentation = match header.gso {
        GsoKind::None => 0,
        GsoKind::Tcp4 => feature::HOST_TSO4,
        GsoKind::Tcp6 => feature::HOST_TSO6,
        GsoKind::Udp => feature::HOST_UFO,
        GsoKind::UdpL4 => feature::HOST_USO,
    };
    let checksum = if header.needs_csum.is_some() {
        feature::CSUM
    } else {
        0
    };
    let ecn = if header.ecn { feature::HOST_ECN } else { 0 };
    let needed = segmentation | checksum | ecn;
    features & needed == needed
}

impl Service for Pair {
    fn wait_for<'a>(&'a self, set: &mut WaitSet<'a>) {
        if self.again {
            set.at_most(Duration::ZERO);
        }
        let queues = [(RX, &self.rx), (TX, &self.tx), (CONTROL, &self.control)];
        for (token, active) in queues {
            if let Some(active) = active {
                set.add(active.doorbell.as_fd(), PollFlags::IN, token);
            }
        }
        if self.broken {
            return;
        }
        let interest = self.link.interest(self.is_receiving() && !self.starved);
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, interest.readable);
        events.set(PollFlags::OUT, interest.writable);
        if !events.is_empty() {
            set.add(self.link.poll_fd(), events, LINK);
        }
    }

    fn ready(&mut self, token: u64, _: PollFlags) {
        self.again = true;
        let active = match token {
            RX => &self.rx,
            TX => &self.tx,
            CONTROL => &self.control,
            _ => {
                self.link_ready = true;
                return;
            }
        };
        if let Some(active) = active {
            doorbell::take(&active.doorbell);
        }
    }

    fn end_of_batch(&mut self) {
        if self.again {
            self.run();
        }
    }
}
