//! One TCP connection: the guest's side of it ends here, and its data goes on through a socket of the host.
//!
//! The connection never builds frames itself. It is told what happens ([`Connection::on_segment`], [`Connection::on_socket`],
//! [`Connection::on_timer`]) and asked for what it has to say ([`Connection::next_segment`]) when the guest has room.
//! Section numbers are those of RFC 9293.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown};

use super::ring::{Budget, Ring};
use super::segment::{Flags, Segment, before};
use crate::user::timers::Millis;
use crate::user::wire::{Mac, slices_of};

/// The largest window offered to the guest, and so the most that waits for a slow host, in bytes.
pub(crate) const WINDOW: usize = 1 << 20;
/// The most that is kept until the guest acknowledges it, in bytes.
const IN_FLIGHT: usize = 1 << 20;
/// Our window's scale: 64 KiB << 7 holds [`WINDOW`].
const WINDOW_SCALE: u8 = 7;
/// The socket is read again when less than this is left unsent, in bytes.
const LOW_WATER: usize = 64 << 10;
/// How much is read at once, in bytes.
const READ_AHEAD: usize = 128 << 10;
/// The kernel takes no more pieces in one call.
const IOV_MAX: usize = 1024;

/// Section 3.8.1 and RFC 6298; the lower bound is Linux's.
const RTO_FIRST: Millis = 1000;
const RTO_MIN: Millis = 200;
const RTO_MAX: Millis = 60_000;
const RETRIES: u8 = 15;
const SYN_RETRIES: u8 = 6;
/// A guest that is gone is found by probes, after this time without a segment.
const IDLE_OPEN: Millis = 7_200_000;
const IDLE_HALF_CLOSED: Millis = 120_000;
/// Empty queues give their memory back after this time.
const IDLE_MEMORY: Millis = 10_000;
const PROBE_INTERVAL: Millis = 75_000;
const PROBES: u8 = 9;
const TIME_WAIT: Millis = 2000;
/// How long a connection waits for memory that others hold.
const MEMORY_WAIT: Millis = 50;

/// Where a connection stands. Once [`Open`](Phase::Open), the closing states of section 3.3.2 follow from which sides have
/// sent FIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The guest's SYN has come; the host's socket is connecting.
    Connecting,
    /// SYN-ACK is to be sent or acknowledged.
    SynReceived,
    /// A connection from outside: our SYN is to be sent or answered.
    SynSent,
    /// Data flows.
    Open,
    /// All is said; the last FIN may have to be acknowledged again.
    TimeWait,
    /// RST is to be sent.
    Resetting,
    /// To be removed.
    Dead,
}

/// What the guest can take in one frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Payload of one frame, in bytes.
    pub(crate) payload: usize,
    /// Frames may hold more than one segment's payload.
    pub(crate) segmentation: bool,
}

/// A segment to be sent; its payload lies in the connection ([`Connection::data`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing {
    pub(crate) segment: Segment,
    /// Where the payload starts in the connection's data.
    pub(crate) data_at: usize,
}

/// What became ready on a socket.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Readiness {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other side has finished or an error is pending: a short read is not the end of the news.
    pub(crate) hang_up: bool,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) guest: SocketAddr,
    /// As the guest sees it.
    pub(crate) peer: SocketAddr,
    /// Where frames to the guest go; unknown for connections from outside at first.
    pub(crate) mac: Option<Mac>,
    socket: Option<OwnedFd>,
    phase: Phase,
    /// For the table: it stands in the queue of those that have something to say.
    pub(crate) queued: bool,
    /// For the table: the earliest timer that is set.
    pub(crate) timer_at: Option<Millis>,

    // From the guest to the host.
    rcv_nxt: u32,
    /// The right edge of the window that was told last.
    rcv_edge: u32,
    rcv_scale: u8,
    to_host: Ring,
    guest_fin: bool,
    /// The guest's FIN has been passed on.
    host_shut: bool,
    ack_due: bool,

    // From the host to the guest.
    iss: u32,
    una: u32,
    nxt: u32,
    max: u32,
    snd_wnd: u32,
    /// The sequence number of the segment that told the window.
    wl1: u32,
    snd_scale: u8,
    mss: u16,
    /// From `una` on.
    from_host: Ring,
    host_eof: bool,
    fin_acked: bool,
    fin_was_first: bool,
    syn_due: bool,
    probe_due: bool,

    // The socket, by edges.
    ready: Readiness,

    // Loss recovery: RFC 6298, RFC 5681 section 3.2, RFC 6582.
    srtt: Option<(Millis, Millis)>,
    rto: Millis,
    retries: u8,
    timer: Option<Millis>,
    /// A retransmission waits for the guest to have room.
    resend_waits: bool,
    timed: Option<(u32, Millis)>,
    dup_acks: u8,
    recover: Option<u32>,
    resend_head: bool,

    last_heard: Millis,
    probes: u8,
}

impl Connection {
    /// A connection whose SYN came from the guest; the socket is connecting.
    pub(crate) fn from_guest(
        (guest, peer): (SocketAddr, SocketAddr),
        mac: Mac,
        syn: &Segment,
        socket: OwnedFd,
        (iss, budget): (u32, &Budget),
        now: Millis,
    ) -> Self {
        let mut connection = Self::new(guest, peer, socket, iss, budget, now);
        connection.mac = Some(mac);
        connection.take_syn(syn);
        connection
    }

    /// A connection that was accepted on a forwarded port.
    pub(crate) fn from_host(
        (guest, peer): (SocketAddr, SocketAddr),
        mac: Option<Mac>,
        socket: OwnedFd,
        (iss, budget): (u32, &Budget),
        now: Millis,
    ) -> Self {
        let mut connection = Self::new(guest, peer, socket, iss, budget, now);
        connection.mac = mac;
        connection.phase = Phase::SynSent;
        connection.rcv_scale = WINDOW_SCALE;
        connection.ready.writable = true;
        connection.syn_due = true;
        connection
    }

    fn new(
        guest: SocketAddr,
        peer: SocketAddr,
        socket: OwnedFd,
        iss: u32,
        budget: &Budget,
        now: Millis,
    ) -> Self {
        Self {
            guest,
            peer,
            mac: None,
            socket: Some(socket),
            phase: Phase::Connecting,
            queued: false,
            timer_at: None,
            rcv_nxt: 0,
            rcv_edge: 0,
            rcv_scale: 0,
            to_host: Ring::new(budget.clone()),
            guest_fin: false,
            host_shut: false,
            ack_due: false,
            iss,
            una: iss,
            nxt: iss,
            max: iss,
            snd_wnd: 0,
            wl1: 0,
            snd_scale: 0,
            mss: if guest.is_ipv4() { 536 } else { 1220 },
            from_host: Ring::new(budget.clone()),
            host_eof: false,
            fin_acked: false,
            fin_was_first: false,
            syn_due: false,
            probe_due: false,
            ready: Readiness::default(),
            srtt: None,
            rto: RTO_FIRST,
            retries: 0,
            timer: None,
            resend_waits: false,
            timed: None,
            dup_acks: 0,
            recover: None,
            resend_head: false,
            last_heard: now,
            probes: 0,
        }
    }

    /// Takes over what a SYN says.
    fn take_syn(&mut self, syn: &Segment) {
        self.rcv_nxt = syn.seq.wrapping_add(1);
        self.rcv_edge = self.rcv_nxt;
        if let Some(mss) = syn.mss {
            // The lower bound is that of common systems; without one a guest could ask for a frame per byte.
            self.mss = mss.max(88);
        }
        // Scaling is on only if both sides say so (RFC 7323, section 2.2).
        self.snd_scale = syn.window_scale.unwrap_or(0);
        self.rcv_scale = if syn.window_scale.is_some() {
            WINDOW_SCALE
        } else {
            0
        };
        // The window of a SYN is never scaled.
        self.snd_wnd = syn.window.into();
        self.wl1 = syn.seq;
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// The host's socket, as long as it is needed.
    pub(crate) fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// The payload of an [`Outgoing`] segment, in two pieces.
    pub(crate) fn data(&self, outgoing: &Outgoing) -> [&[u8]; 2] {
        self.from_host
            .range(outgoing.data_at, outgoing.segment.payload_len)
    }

    /// The largest segment that the guest takes, in bytes of payload.
    pub(crate) fn mss(&self) -> u16 {
        self.mss
    }

    /// True for a SYN that may take the place of this connection (section 3.6.1).
    pub(crate) fn yields_to(&self, syn: &Segment) -> bool {
        self.phase == Phase::TimeWait && before(self.rcv_nxt, syn.seq)
    }

    // What happens.

    /// The socket became ready.
    pub(crate) fn on_socket(&mut self, ready: Readiness, now: Millis) {
        self.ready.readable |= ready.readable;
        self.ready.writable |= ready.writable;
        self.ready.hang_up |= ready.hang_up;
        if self.phase == Phase::Connecting && (ready.writable || ready.hang_up) {
            let Some(socket) = &self.socket else { return };
            match rustix::net::sockopt::socket_error(socket) {
                Ok(Ok(())) => self.connected(),
                Ok(Err(_)) | Err(_) => self.refuse(),
            }
        }
        if self.phase == Phase::Open && ready.writable {
            self.flush_to_host();
            self.settle(now);
        }
    }

    /// The host's socket is connected: the guest's SYN can be answered.
    pub(crate) fn connected(&mut self) {
        self.phase = Phase::SynReceived;
        self.ready.writable = true;
        self.syn_due = true;
    }

    /// The host's socket could not connect.
    fn refuse(&mut self) {
        self.socket = None;
        self.phase = Phase::Resetting;
    }

    /// Ends the connection on both sides at once.
    pub(crate) fn abort(&mut self) {
        self.drop_socket_with_reset();
        if !matches!(self.phase, Phase::Dead | Phase::TimeWait) {
            self.phase = Phase::Resetting;
        }
    }

    /// A closed socket with a linger time of zero resets its connection.
    fn drop_socket_with_reset(&mut self) {
        if let Some(socket) = self.socket.take() {
            // If that fails the other side sees an orderly end instead.
            let _ = rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
        }
    }

    /// A segment came from the guest; its payload is the part of `frame` from `payload_at` on.
    pub(crate) fn on_segment(
        &mut self,
        segment: &Segment,
        frame: &[IoSlice<'_>],
        payload_at: usize,
        now: Millis,
    ) {
        self.last_heard = now;
        self.probes = 0;
        match self.phase {
            Phase::Dead | Phase::Resetting => {}
            Phase::Connecting => {
                if segment.flags.contains(Flags::RST) && segment.seq == self.rcv_nxt {
                    self.reset_by_guest();
                }
            }
            Phase::SynSent => self.on_syn_answer(segment),
            Phase::SynReceived | Phase::Open | Phase::TimeWait => {
                self.on_synchronized(segment, frame, payload_at, now);
            }
        }
    }

    /// Section 3.10.7.3.
    fn on_syn_answer(&mut self, segment: &Segment) {
        let flags = segment.flags;
        let acceptable = flags.contains(Flags::ACK) && segment.ack == self.iss.wrapping_add(1);
        if flags.contains(Flags::RST) {
            if acceptable {
                self.reset_by_guest();
            }
            return;
        }
        if !acceptable || !flags.contains(Flags::SYN) {
            return;
        }
        self.take_syn(segment);
        if segment.window_scale.is_none() {
            self.rcv_scale = 0;
        }
        self.syn_acked();
        self.ack_due = true;
    }

    fn syn_acked(&mut self) {
        self.una = self.iss.wrapping_add(1);
        self.nxt = self.una;
        self.max = self.una;
        self.phase = Phase::Open;
        self.syn_due = false;
        self.retries = 0;
        self.rto = RTO_FIRST;
        self.timer = None;
        self.resend_waits = false;
    }

    fn reset_by_guest(&mut self) {
        self.drop_socket_with_reset();
        self.phase = Phase::Dead;
    }

    /// Section 3.10.7.4, in its order.
    fn on_synchronized(
        &mut self,
        segment: &Segment,
        frame: &[IoSlice<'_>],
        payload_at: usize,
        now: Millis,
    ) {
        let behind = self.rcv_nxt.wrapping_sub(segment.seq);
        let ahead = before(self.rcv_nxt, segment.seq);
        if segment.flags.contains(Flags::RST) {
            // RFC 5961, section 3: only the exact number resets, one in the window is questioned.
            if behind == 0 {
                self.reset_by_guest();
            } else if ahead && before(segment.seq, self.rcv_edge) {
                self.ack_due = true;
            }
            return;
        }
        if segment.flags.contains(Flags::SYN) {
            let again = self.phase == Phase::SynReceived && behind == 1;
            (self.syn_due, self.ack_due) = (self.syn_due || again, self.ack_due || !again);
            return;
        }
        if !segment.flags.contains(Flags::ACK) {
            return;
        }
        if before(self.max, segment.ack) {
            self.ack_due = true;
            return;
        }
        if self.phase == Phase::SynReceived {
            if segment.ack != self.iss.wrapping_add(1) {
                return;
            }
            self.syn_acked();
            self.snd_wnd = u32::from(segment.window) << self.snd_scale;
            self.wl1 = segment.seq;
        } else {
            self.on_ack(segment, now);
        }
        if self.phase == Phase::Open && !ahead {
            self.on_payload(segment, behind, frame, payload_at);
        } else if segment.sequence_len() > 0 || !before(segment.seq, self.rcv_edge) {
            // Out of order, or a FIN again: say what is expected. Not to bare acknowledgements, or two sides that have
            // both lost something would answer each other without end.
            self.ack_due = true;
        }
        self.settle(now);
    }

    /// Takes the bytes from `behind` on, and the FIN after them.
    fn on_payload(
        &mut self,
        segment: &Segment,
        behind: u32,
        frame: &[IoSlice<'_>],
        payload_at: usize,
    ) {
        if segment.sequence_len() == 0 && behind == 0 {
            return;
        }
        self.ack_due = true;
        if behind >= segment.sequence_len() || self.guest_fin {
            return;
        }
        let skip = behind as usize;
        let want = segment.payload_len.saturating_sub(skip);
        let took = self.take_payload(&slices_of(frame, payload_at + skip, want));
        self.rcv_nxt = self.rcv_nxt.wrapping_add(took as u32);
        if took == want && segment.flags.contains(Flags::FIN) {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.guest_fin = true;
        }
    }

    /// Gives bytes to the socket, and what it doesn't take to the queue before it. Answers how many found room.
    fn take_payload(&mut self, payload: &[IoSlice<'_>]) -> usize {
        let want: usize = payload.iter().map(|p| p.len()).sum();
        let mut took = 0;
        if self.to_host.is_empty() && self.ready.writable && want > 0 {
            let parts = &payload[..payload.len().min(IOV_MAX)];
            match send(self.socket.as_ref(), &mut self.ready, parts) {
                Ok(n) => took = n,
                Err(_) => self.abort(),
            }
        }
        if self.phase != Phase::Open || took == want {
            return took;
        }
        let room = self.to_host.make_room(want - took, WINDOW);
        let until = (took + room).min(want);
        for part in slices_of(payload, took, until - took) {
            took += self.to_host.push(&part);
        }
        took
    }

    fn flush_to_host(&mut self) {
        let before = self.to_host.len();
        while !self.to_host.is_empty() && self.ready.writable {
            match send(
                self.socket.as_ref(),
                &mut self.ready,
                &self.to_host.as_io_slices(),
            ) {
                Ok(n) => self.to_host.consume(n),
                Err(_) => return self.abort(),
            }
        }
        if self.to_host.len() < before {
            self.offer_window();
        }
    }

    /// Sends a window update when the window has grown by a good part (section 3.8.6.2.2).
    fn offer_window(&mut self) {
        let left = self.rcv_edge.wrapping_sub(self.rcv_nxt);
        let window = self.window();
        let gain = window.saturating_sub(left);
        let squeezed = left < u32::from(self.mss) * 2 && gain >= u32::from(self.mss);
        self.ack_due |= gain >= WINDOW as u32 / 4 || squeezed;
    }

    /// The window to offer, in bytes: a multiple of its scale's unit, and never less than was offered before.
    fn window(&self) -> u32 {
        let free = WINDOW.saturating_sub(self.to_host.len()) as u32;
        let free = (free >> self.rcv_scale).min(0xffff) << self.rcv_scale;
        let promised = self.rcv_edge.wrapping_sub(self.rcv_nxt);
        // More than the guest was told is possible after an overrun, which moved `rcv_nxt` past the edge.
        if promised > WINDOW as u32 {
            free
        } else {
            free.max(promised)
        }
    }

    /// Takes an acknowledgement, of something that was sent.
    fn on_ack(&mut self, segment: &Segment, now: Millis) {
        let acked = segment.ack.wrapping_sub(self.una);
        let in_flight = self.max != self.una;
        if acked == 0 || before(segment.ack, self.una) {
            let window = u32::from(segment.window) << self.snd_scale;
            let pure = segment.sequence_len() == 0 && window == self.snd_wnd;
            if acked == 0 && pure && in_flight {
                self.on_duplicate_ack();
            }
        } else {
            self.on_progress(segment.ack, acked, now);
        }
        if !in_flight {
            self.retries = 0;
        }
        // As Linux does it: a window goes with the acknowledgement that it came with, so one that advances counts always,
        // even on a segment that was sent again, and an older one never. (Section 3.10.7.4 goes by sequence numbers alone.)
        let window = u32::from(segment.window) << self.snd_scale;
        let advances = acked != 0 && self.una == segment.ack;
        let same = acked == 0
            && (before(self.wl1, segment.seq)
                || (self.wl1 == segment.seq && window > self.snd_wnd));
        let newer = advances || same;
        if newer {
            let was_closed = self.snd_wnd == 0;
            (self.snd_wnd, self.wl1) = (window, segment.seq);
            if was_closed && self.snd_wnd > 0 {
                self.rto = self.base_rto();
                self.timer = (self.una != self.max).then_some(now + self.rto);
            }
        }
    }

    fn on_progress(&mut self, ack: u32, acked: u32, now: Millis) {
        let bytes = (acked as usize).min(self.from_host.len());
        self.from_host.consume(bytes);
        // What was sent beyond the data can only be the FIN.
        self.fin_acked |= acked as usize > bytes;
        self.una = ack;
        if before(self.nxt, ack) {
            self.nxt = ack;
        }
        if let Some((end, sent)) = self.timed
            && !before(ack, end)
        {
            self.timed = None;
            self.sample(now.saturating_sub(sent));
        }
        self.dup_acks = 0;
        match self.recover {
            Some(recover) if before(ack, recover) => self.resend_head = true,
            _ => (self.recover, self.resend_head) = (None, false),
        }
        self.retries = 0;
        self.resend_waits = false;
        self.rto = self.base_rto();
        self.timer = (self.una != self.max).then_some(now + self.rto);
    }

    fn on_duplicate_ack(&mut self) {
        self.dup_acks = self.dup_acks.saturating_add(1);
        if self.dup_acks == 3 && self.recover.is_none() {
            self.recover = Some(self.max);
            self.resend_head = true;
            self.timed = None;
        }
    }

    /// RFC 6298, section 2.
    fn sample(&mut self, rtt: Millis) {
        self.srtt = Some(match self.srtt {
            None => (rtt, rtt / 2),
            Some((srtt, var)) => ((7 * srtt + rtt) / 8, (3 * var + srtt.abs_diff(rtt)) / 4),
        });
    }

    fn base_rto(&self) -> Millis {
        match self.srtt {
            None => RTO_FIRST,
            Some((srtt, var)) => (srtt + (4 * var).max(1)).clamp(RTO_MIN, RTO_MAX),
        }
    }

    /// Passes the guest's FIN on, and finds the end.
    fn settle(&mut self, now: Millis) {
        if self.phase != Phase::Open {
            return;
        }
        if self.guest_fin && self.to_host.is_empty() && !self.host_shut {
            self.host_shut = true;
            if let Some(socket) = &self.socket {
                // Fails if the other side has reset the connection, which reading will tell.
                let _ = rustix::net::shutdown(socket, Shutdown::Write);
            }
        }
        if self.fin_acked && self.host_shut {
            self.socket = None;
            self.from_host.trim();
            self.timer = None;
            self.last_heard = now;
            self.phase = if self.fin_was_first {
                Phase::TimeWait
            } else {
                Phase::Dead
            };
        }
    }

    /// Where the guest is became known: the SYN is due if it has not been answered.
    pub(crate) fn ask_again(&mut self) {
        self.syn_due |= self.phase == Phase::SynSent;
    }

    /// Nobody could be told: a connection that is to be reset is gone, one that starts tries again later.
    pub(crate) fn unheard(&mut self, now: Millis) {
        if self.phase == Phase::Resetting {
            self.phase = Phase::Dead;
        }
        self.syn_due = false;
        self.sent(now);
    }

    // Time.

    /// When [`on_timer`](Self::on_timer) wants to be called.
    pub(crate) fn deadline(&self) -> Option<Millis> {
        let idle = match self.phase {
            Phase::TimeWait => Some(self.last_heard + TIME_WAIT),
            Phase::Open => Some(self.idle_at()),
            Phase::SynReceived | Phase::SynSent => None,
            Phase::Connecting | Phase::Resetting | Phase::Dead => return None,
        };
        [self.timer, idle].into_iter().flatten().min()
    }

    fn holds_spare_memory(&self) -> bool {
        self.from_host.is_spare() || self.to_host.is_spare()
    }

    fn idle_at(&self) -> Millis {
        if self.holds_spare_memory() {
            return self.last_heard + IDLE_MEMORY;
        }
        let half_closed = self.guest_fin || self.host_eof;
        let first = if half_closed {
            IDLE_HALF_CLOSED
        } else {
            IDLE_OPEN
        };
        self.last_heard + first + u64::from(self.probes) * PROBE_INTERVAL
    }

    /// Does what is due by `now`.
    pub(crate) fn on_timer(&mut self, now: Millis) {
        if self.deadline().is_none() {
            return;
        }
        if self.timer.is_some_and(|at| at <= now) {
            self.on_retransmit_timer(now);
        }
        if self.phase == Phase::TimeWait && self.last_heard + TIME_WAIT <= now {
            self.phase = Phase::Dead;
        }
        if self.phase == Phase::Open && self.holds_spare_memory() && self.idle_at() <= now {
            self.from_host.trim();
            self.to_host.trim();
        } else if self.phase == Phase::Open && self.idle_at() <= now {
            self.probes += 1;
            self.probe_due = true;
            if self.probes > PROBES {
                self.abort();
            }
        }
    }

    fn on_retransmit_timer(&mut self, now: Millis) {
        if self.phase == Phase::Open && self.max == self.una && self.snd_wnd > 0 {
            self.timer = None;
            return;
        }
        self.timer = Some(now + self.rto);
        // A guest that fetches no frames (it may be stopped) is not a guest that doesn't answer.
        if self.resend_waits {
            return;
        }
        self.retries += 1;
        let limit = if self.phase == Phase::Open {
            RETRIES
        } else {
            SYN_RETRIES
        };
        if self.retries > limit {
            self.abort();
            return;
        }
        self.rto = (self.rto * 2).min(RTO_MAX);
        self.timer = Some(now + self.rto);
        self.timed = None;
        self.resend_waits = true;
        match self.phase {
            Phase::SynReceived | Phase::SynSent => self.syn_due = true,
            _ if self.snd_wnd > 0 && self.retries == 1 => {
                // Perhaps the guest is only slow: one frame will tell.
                self.recover = Some(self.max);
                (self.resend_head, self.dup_acks) = (true, 0);
            }
            _ => {
                self.nxt = self.una;
                (self.recover, self.resend_head, self.dup_acks) = (None, false, 0);
                self.probe_due |= self.snd_wnd == 0;
            }
        }
    }

    // What there is to say.

    /// True if [`next_segment`](Self::next_segment) is worth a call.
    pub(crate) fn has_output(&self) -> bool {
        match self.phase {
            Phase::Dead | Phase::Connecting => false,
            Phase::Resetting => true,
            Phase::SynReceived | Phase::SynSent => self.syn_due,
            Phase::TimeWait => self.ack_due,
            Phase::Open => {
                self.ack_due
                    || self.probe_due
                    || self.resend_head
                    || self.wants_to_read()
                    || self
                        .plan(&Limits {
                            payload: usize::MAX,
                            segmentation: true,
                        })
                        .is_some()
            }
        }
    }

    fn unsent(&self) -> usize {
        self.from_host
            .len()
            .saturating_sub(self.nxt.wrapping_sub(self.una) as usize)
    }

    fn wants_to_read(&self) -> bool {
        self.ready.readable
            && !self.host_eof
            && self.unsent() < LOW_WATER
            && self.from_host.len() < IN_FLIGHT
    }

    /// The next segment, if there is one. The caller delivers it.
    pub(crate) fn next_segment(&mut self, limits: &Limits, now: Millis) -> Option<Outgoing> {
        match self.phase {
            Phase::Dead | Phase::Connecting => None,
            Phase::Resetting => {
                self.phase = Phase::Dead;
                Some(self.outgoing(self.nxt, Flags::RST | Flags::ACK, 0, 0))
            }
            Phase::SynReceived | Phase::SynSent => self.next_syn(now),
            Phase::TimeWait => self.next_ack(),
            Phase::Open => self.next_data(limits, now).or_else(|| self.next_ack()),
        }
    }

    fn next_syn(&mut self, now: Millis) -> Option<Outgoing> {
        if !std::mem::take(&mut self.syn_due) {
            return None;
        }
        let answer = self.phase == Phase::SynReceived;
        let flags = if answer {
            Flags::SYN | Flags::ACK
        } else {
            Flags::SYN
        };
        self.nxt = self.iss.wrapping_add(1);
        self.max = self.nxt;
        self.sent(now);
        self.ack_due = false;
        let window = self.window().min(0xffff) as u16;
        self.rcv_edge = self.rcv_nxt.wrapping_add(window.into());
        let mut out = self.outgoing(self.iss, flags, 0, 0);
        out.segment.window = window;
        out.segment.ack = if answer { self.rcv_nxt } else { 0 };
        let scaling = !answer || self.rcv_scale != 0;
        out.segment.window_scale = scaling.then_some(WINDOW_SCALE);
        // The caller puts its link's size here.
        out.segment.mss = Some(0);
        Some(out)
    }

    fn next_ack(&mut self) -> Option<Outgoing> {
        self.ack_due
            .then(|| self.outgoing(self.nxt, Flags::ACK, 0, 0))
    }

    fn next_data(&mut self, limits: &Limits, now: Millis) -> Option<Outgoing> {
        if self.wants_to_read() {
            self.fill(now);
            if self.phase != Phase::Open {
                return self.next_segment(limits, now);
            }
        }
        if std::mem::take(&mut self.probe_due) {
            self.resend_waits = false;
            return Some(self.outgoing(self.una.wrapping_sub(1), Flags::ACK, 0, 0));
        }
        if std::mem::take(&mut self.resend_head) {
            return self.resend(limits, now);
        }
        let Some((len, fin)) = self.plan(limits) else {
            // Data behind a closed window is asked for again and again (section 3.8.6.1).
            if self.unsent() > 0 && self.max == self.una && self.timer.is_none() {
                self.timer = Some(now + self.rto);
            }
            return None;
        };
        let at = self.nxt.wrapping_sub(self.una) as usize;
        let out = self.data_segment(at, len, fin);
        self.nxt = self.nxt.wrapping_add(len as u32).wrapping_add(fin.into());
        self.fin_was_first |= fin && !self.guest_fin;
        if before(self.max, self.nxt) {
            self.max = self.nxt;
            if self.timed.is_none() && self.retries == 0 {
                self.timed = Some((self.nxt, now));
            }
        }
        self.sent(now);
        Some(out)
    }

    /// How many bytes to send now, and whether FIN goes with them.
    fn plan(&self, limits: &Limits) -> Option<(usize, bool)> {
        let in_flight = self.nxt.wrapping_sub(self.una) as usize;
        let queued = self.from_host.len();
        if in_flight > queued || self.fin_acked {
            return None;
        }
        let mss = usize::from(self.mss);
        let unsent = queued - in_flight;
        let usable = (self.snd_wnd as usize).saturating_sub(in_flight);
        let largest = if limits.segmentation {
            limits.payload
        } else {
            limits.payload.min(mss)
        };
        let mut len = unsent.min(usable).min(largest);
        if len > mss && len < unsent {
            len -= len % mss;
        }
        // Sender's silly window avoidance (section 3.8.6.2.1).
        if len < unsent && len < mss.min(largest) && in_flight > 0 {
            return None;
        }
        let fin = self.host_eof && len == unsent;
        (len > 0 || fin).then_some((len, fin))
    }

    /// The first frame in flight once more.
    fn resend(&mut self, limits: &Limits, now: Millis) -> Option<Outgoing> {
        let sent = self.max.wrapping_sub(self.una) as usize;
        let largest = if limits.segmentation {
            limits.payload
        } else {
            limits.payload.min(self.mss.into())
        };
        let len = sent.min(self.from_host.len()).min(largest);
        let fin = sent > self.from_host.len() && len == self.from_host.len();
        if len == 0 && !fin {
            return None;
        }
        self.sent(now);
        Some(self.data_segment(0, len, fin))
    }

    fn data_segment(&mut self, at: usize, len: usize, fin: bool) -> Outgoing {
        let mut flags = Flags::ACK;
        flags.set(Flags::FIN, fin);
        flags.set(Flags::PSH, len > 0 && at + len == self.from_host.len());
        self.outgoing(self.una.wrapping_add(at as u32), flags, at, len)
    }

    /// Notes that something was sent that must be acknowledged.
    fn sent(&mut self, now: Millis) {
        self.resend_waits = false;
        if self.timer.is_none() {
            self.timer = Some(now + self.rto);
        }
    }

    fn outgoing(&mut self, seq: u32, flags: Flags, data_at: usize, len: usize) -> Outgoing {
        let window = self.window();
        self.ack_due = false;
        self.rcv_edge = self.rcv_nxt.wrapping_add(window);
        let segment = Segment {
            src_port: self.peer.port(),
            dst_port: self.guest.port(),
            seq,
            ack: self.rcv_nxt,
            flags,
            window: (window >> self.rcv_scale).min(0xffff) as u16,
            mss: None,
            window_scale: None,
            header_len: 0,
            payload_len: len,
        };
        Outgoing { segment, data_at }
    }

    /// Reads from the socket.
    fn fill(&mut self, now: Millis) {
        let Some(socket) = &self.socket else { return };
        let room = self.from_host.make_room(READ_AHEAD, IN_FLIGHT);
        if room == 0 {
            // All memory is in use by other connections.
            self.timer = self.timer.or(Some(now + MEMORY_WAIT));
            return;
        }
        let want = room.min(READ_AHEAD);
        match rustix::io::readv(socket, &mut self.from_host.spare(want)) {
            Ok(0) => self.host_eof = true,
            Ok(n) => {
                self.from_host.commit(n);
                self.ready.readable = n >= want || self.ready.hang_up;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => self.ready.readable = false,
            Err(_) => self.abort(),
        }
    }
}

/// Writes to a socket. Answers how much it took; less than all means that it is not writable any more.
fn send(
    socket: Option<&OwnedFd>,
    ready: &mut Readiness,
    parts: &[IoSlice<'_>],
) -> Result<usize, Errno> {
    let socket = socket.ok_or(Errno::NOTCONN)?;
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let want: usize = parts.iter().map(|p| p.len()).sum();
    loop {
        match rustix::net::sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), flags) {
            Ok(n) => {
                ready.writable = n >= want;
                return Ok(n);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                ready.writable = false;
                return Ok(0);
            }
            Err(error) => return Err(error),
        }
    }
}
