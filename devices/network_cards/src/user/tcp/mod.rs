//! TCP: the table of connections, between frames of the guest and sockets of the host.

mod connection;
mod ring;
mod segment;
#[cfg(test)]
mod simulation;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use connection::{Connection, Limits, Phase, Readiness};
use ring::Budget;
use segment::{Flags, Segment};

use super::config::HostForward;
use super::icmp;
use super::link::{Blocked, Link, Sink, Source};
use super::neighbours;
use super::slab::{Slab, Token};
use super::timers::Owner;
use super::wire::{ETHERNET_LEN, Ip, Mac, protocol};
use crate::backend::NetError;
use crate::offload::{Checksum, GsoKind, OffloadHeader, Offloads};

/// How many connections there can be. Each takes a descriptor of the process.
const CONNECTIONS: usize = 4096;
/// Memory for data in flight of all connections, in bytes.
const MEMORY: usize = 256 << 20;
/// The largest IP packet, in bytes.
const LARGEST_PACKET: usize = 65_535;
/// Where the checksum lies in a TCP header.
const CHECKSUM_AT: usize = 16;
/// How long listeners wait after the process ran out of descriptors or the table was full.
const LISTENER_PAUSE: u64 = 100;

/// The two ends of a connection as the guest sees them: its own and the other.
type Key = (SocketAddr, SocketAddr);

/// A forwarded port.
#[derive(Debug)]
struct Listener {
    socket: OwnedFd,
    guest: SocketAddr,
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Tcp {
    connections: Slab<Connection>,
    by_key: HashMap<Key, Token>,
    /// Connections that may have something to say.
    ready: VecDeque<Token>,
    listeners: Vec<Listener>,
    budget: Budget,
    secret: RandomState,
    header: Vec<u8>,
}

impl Tcp {
    pub(crate) fn new() -> Self {
        Self {
            connections: Slab::new(CONNECTIONS),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            listeners: Vec::new(),
            budget: Budget::new(MEMORY),
            secret: RandomState::new(),
            header: Vec::with_capacity(128),
        }
    }

    /// Opens a forwarded port.
    pub(crate) fn listen(
        &mut self,
        link: &Link,
        forward: &HostForward,
    ) -> Result<SocketAddr, NetError> {
        let failed = |e: Errno| NetError::os(format!("can't listen for hostfwd={forward}"), e);
        let family = family_of(forward.host);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(failed)?;
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).map_err(failed)?;
        rustix::net::bind(&socket, &forward.host).map_err(failed)?;
        rustix::net::listen(&socket, 128).map_err(failed)?;
        let index = u32::try_from(self.listeners.len()).unwrap_or(u32::MAX);
        let events = EventFlags::IN | EventFlags::ET;
        link.watch(&socket, Source::Listener(index), events)
            .map_err(failed)?;
        let bound = rustix::net::getsockname(&socket)
            .and_then(|a| SocketAddr::try_from(a).map_err(|_| Errno::AFNOSUPPORT))
            .map_err(failed)?;
        let ip = forward
            .guest_addr
            .unwrap_or(link.addresses.dhcp_start.into());
        self.listeners.push(Listener {
            socket,
            guest: (ip, forward.guest_port).into(),
        });
        Ok(bound)
    }

    // From the guest.

    /// A TCP segment came. `head` is the copied start of `frame`.
    pub(crate) fn input(
        &mut self,
        link: &mut Link,
        mac: Mac,
        ip: &Ip,
        (head, frame): (&[u8], &[IoSlice<'_>]),
        offload: &OffloadHeader,
    ) {
        let bytes = head.get(ip.payload_at..).unwrap_or(&[]);
        let Some(segment) = Segment::parse(bytes, ip.payload_len) else {
            link.dropped += 1;
            return;
        };
        let finished = offload.needs_csum.is_none() && !offload.data_valid;
        if finished && !ip.checksum(frame, protocol::TCP).is_valid() {
            link.dropped += 1;
            return;
        }
        let guest = SocketAddr::new(ip.src, segment.src_port);
        let peer = SocketAddr::new(ip.dst, segment.dst_port);
        let mut token = self.by_key.get(&(guest, peer)).copied();
        let syn_only = segment.flags & (Flags::SYN | Flags::ACK | Flags::RST) == Flags::SYN;
        if syn_only
            && let Some(old) = token
            && self
                .connections
                .get_mut(old)
                .is_some_and(|c| c.yields_to(&segment))
        {
            self.remove(link, old);
            token = None;
        }
        match token {
            Some(token) => {
                let Some(connection) = self.connections.get_mut(token) else {
                    return;
                };
                connection.mac = Some(mac);
                let payload_at = ip.payload_at + segment.header_len;
                connection.on_segment(&segment, frame, payload_at, link.now);
                self.update(link, token);
            }
            None if syn_only => self.open(link, mac, (guest, peer), &segment, (head, ip)),
            None => self.refuse(link, mac, (guest, peer), &segment),
        }
    }

    /// The guest wants a connection.
    fn open(
        &mut self,
        link: &mut Link,
        mac: Mac,
        key: Key,
        syn: &Segment,
        (head, ip): (&[u8], &Ip),
    ) {
        let target = match link.translate(key.1) {
            Ok(target) => target,
            Err(Blocked::Restricted) => return self.refuse(link, mac, key, syn),
            Err(Blocked::Nowhere) => return icmp::unreachable(link, mac, ip, head),
        };
        if self.connections.is_full() {
            // The guest tries again.
            link.dropped += 1;
            return;
        }
        let (socket, connected) = match connect(target) {
            Ok(pair) => pair,
            Err(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ADDRNOTAVAIL) => {
                return icmp::unreachable(link, mac, ip, head);
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::AGAIN) => {
                link.dropped += 1;
                return;
            }
            Err(_) => return self.refuse(link, mac, key, syn),
        };
        let iss = self.initial_sequence(&key, link.now);
        let mut connection =
            Connection::from_guest(key, mac, syn, socket, (iss, &self.budget), link.now);
        if connected {
            connection.connected();
        }
        self.insert(link, key, connection);
    }

    fn insert(&mut self, link: &mut Link, key: Key, connection: Connection) {
        let Some(token) = self.connections.insert(connection) else {
            return;
        };
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let watched = self
            .connections
            .get_mut(token)
            .and_then(|c| c.socket())
            .is_some_and(|s| link.watch(s, Source::Tcp(token), events).is_ok());
        if !watched {
            self.connections.remove(token);
            link.dropped += 1;
            return;
        }
        self.by_key.insert(key, token);
        self.update(link, token);
    }

    /// RFC 6528: a keyed hash of the ends, and a clock.
    fn initial_sequence(&self, key: &Key, now: u64) -> u32 {
        (self.secret.hash_one(key) as u32).wrapping_add((now as u32).wrapping_mul(250))
    }

    /// Answers a segment that belongs to no connection (RFC 9293, section 3.10.7.1).
    fn refuse(&mut self, link: &mut Link, mac: Mac, (guest, peer): Key, segment: &Segment) {
        if segment.flags.contains(Flags::RST) {
            return;
        }
        let (seq, ack, flags) = if segment.flags.contains(Flags::ACK) {
            (segment.ack, 0, Flags::RST)
        } else {
            let end = segment.seq.wrapping_add(segment.sequence_len());
            (0, end, Flags::RST | Flags::ACK)
        };
        let reset = Segment {
            src_port: peer.port(),
            dst_port: guest.port(),
            seq,
            ack,
            flags,
            ..Default::default()
        };
        self.header.clear();
        reset.write(&mut self.header, peer, guest);
        let sum = super::checksum::of(&self.header);
        self.header[CHECKSUM_AT..CHECKSUM_AT + 2].copy_from_slice(&sum);
        let route = link.route(mac, peer.ip(), guest.ip());
        link.send_ip(&route, protocol::TCP, &self.header);
    }

    // From the host.

    /// A connection's socket became ready.
    pub(crate) fn on_socket(&mut self, link: &mut Link, token: Token, events: EventFlags) {
        let Some(connection) = self.connections.get_mut(token) else {
            return;
        };
        let hang_up = events.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP);
        let ended = events.intersects(EventFlags::HUP | EventFlags::ERR);
        let ready = Readiness {
            readable: hang_up || events.contains(EventFlags::IN),
            writable: ended || events.contains(EventFlags::OUT),
            hang_up,
        };
        connection.on_socket(ready, link.now);
        self.update(link, token);
    }

    /// A forwarded port has connections.
    pub(crate) fn on_listener(&mut self, link: &mut Link, index: u32) {
        loop {
            let Some(listener) = self.listeners.get(index as usize) else {
                return;
            };
            if self.connections.is_full() {
                return link.timers.set(link.now + LISTENER_PAUSE, Owner::Listeners);
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let guest = listener.guest;
            match rustix::net::acceptfrom_with(&listener.socket, flags) {
                Ok((socket, Some(peer))) => {
                    if let Ok(peer) = SocketAddr::try_from(peer) {
                        self.accepted(link, socket, peer, guest);
                    }
                }
                Ok((_, None)) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => return link.timers.set(link.now + LISTENER_PAUSE, Owner::Listeners),
            }
        }
    }

    /// Listeners that had to pause go on.
    pub(crate) fn on_listener_timer(&mut self, link: &mut Link) {
        for index in 0..self.listeners.len() {
            self.on_listener(link, index as u32);
        }
    }

    fn accepted(&mut self, link: &mut Link, socket: OwnedFd, peer: SocketAddr, guest: SocketAddr) {
        // Nothing depends on it but latency.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        let mut seen = link.as_seen_by_guest(peer, guest.is_ipv4());
        // Two peers can look the same to the guest; there are more ports than connections.
        while seen.port() == 0 || self.by_key.contains_key(&(guest, seen)) {
            seen.set_port(seen.port().wrapping_add(1));
        }
        let key = (guest, seen);
        let iss = self.initial_sequence(&key, link.now);
        let mac = link.neighbour(guest.ip());
        if mac.is_none() {
            neighbours::solicit(link, guest.ip());
        }
        let connection = Connection::from_host(key, mac, socket, (iss, &self.budget), link.now);
        self.insert(link, key, connection);
    }

    /// The guest's place on the link became known: connections that wait for it can start.
    pub(crate) fn on_neighbour(&mut self) {
        let waiting: Vec<_> = self
            .connections
            .iter_mut()
            .filter(|(_, c)| c.mac.is_none() && !c.queued)
            .map(|(token, connection)| {
                connection.ask_again();
                connection.queued = true;
                token
            })
            .collect();
        for token in waiting {
            self.connections.enqueue(&mut self.ready, token);
        }
    }

    /// A deadline of a connection has passed.
    pub(crate) fn on_timer(&mut self, link: &mut Link, token: Token) {
        let Some(connection) = self.connections.get_mut(token) else {
            return;
        };
        connection.timer_at = None;
        if connection.deadline().is_some_and(|at| at <= link.now) {
            connection.on_timer(link.now);
        }
        self.update(link, token);
    }

    // To the guest.

    /// Delivers the next segment, if there is one.
    pub(crate) fn pull(
        &mut self,
        link: &mut Link,
        sink: &mut Sink<'_, '_>,
    ) -> Option<OffloadHeader> {
        // Each connection stands in the queue once, and comes back only after it has sent something.
        while let Some(token) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(token) else {
                continue;
            };
            connection.queued = false;
            let Some(mac) = connection
                .mac
                .or_else(|| link.neighbour(connection.guest.ip()))
            else {
                neighbours::solicit(link, connection.guest.ip());
                connection.unheard(link.now);
                self.update_timer(link, token);
                continue;
            };
            connection.mac = Some(mac);
            let header = emit(connection, &mut self.header, link, mac, sink);
            match header {
                Some(_) => self.update(link, token),
                None => self.update_timer(link, token),
            }
            if header.is_some() {
                return header;
            }
        }
        None
    }

    // The table.

    /// Brings queue, timers and table up to date with a connection.
    fn update(&mut self, link: &mut Link, token: Token) {
        let Some(connection) = self.connections.get_mut(token) else {
            return;
        };
        if !connection.queued && connection.has_output() {
            connection.queued = true;
            self.connections.enqueue(&mut self.ready, token);
        }
        self.update_timer(link, token);
    }

    fn update_timer(&mut self, link: &mut Link, token: Token) {
        let Some(connection) = self.connections.get_mut(token) else {
            return;
        };
        if connection.phase() == Phase::Dead {
            return self.remove(link, token);
        }
        if let Some(at) = connection.deadline()
            && connection.timer_at.is_none_or(|set| at < set)
        {
            if let Some(later) = connection.timer_at.replace(at) {
                link.timers.cancel(later, Owner::Tcp(token));
            }
            link.timers.set(at, Owner::Tcp(token));
        }
    }

    fn remove(&mut self, link: &mut Link, token: Token) {
        if let Some(connection) = self.connections.remove(token) {
            if let Some(at) = connection.timer_at {
                link.timers.cancel(at, Owner::Tcp(token));
            }
            self.by_key.remove(&(connection.guest, connection.peer));
        }
    }
}

/// Writes a connection's next segment as a frame.
fn emit(
    connection: &mut Connection,
    header: &mut Vec<u8>,
    link: &Link,
    mac: Mac,
    sink: &mut Sink<'_, '_>,
) -> Option<OffloadHeader> {
    let route = link.route(mac, connection.peer.ip(), connection.guest.ip());
    let (v4, ip_at) = (connection.guest.is_ipv4(), route.headers_len());
    let overhead = ip_at + segment::TCP_LEN;
    let tso = if v4 { Offloads::TSO4 } else { Offloads::TSO6 };
    let largest = LARGEST_PACKET - (if v4 { ip_at - ETHERNET_LEN } else { 0 }) - segment::TCP_LEN;
    let limits = Limits {
        payload: sink.room().saturating_sub(overhead).min(largest),
        segmentation: link.accepted.contains(tso),
    };
    // A SYN with its options must fit at least.
    if limits.payload < 64 {
        return None;
    }
    let mut out = connection.next_segment(&limits, link.now)?;
    let link_mss = (usize::from(link.config.mtu) + ETHERNET_LEN).saturating_sub(overhead);
    out.segment.mss = out.segment.mss.map(|_| link_mss.min(0xffff) as u16);
    let tcp_len = out.segment.written_len();
    let len = out.segment.payload_len;
    header.clear();
    route.write(header, protocol::TCP, tcp_len + len);
    out.segment.write(header, connection.peer, connection.guest);
    let data = connection.data(&out);
    let mut offload = OffloadHeader::default();
    if link.accepted.contains(Offloads::CSUM) {
        offload.needs_csum = Some(Checksum {
            start: ip_at as u16,
            offset: CHECKSUM_AT as u16,
        });
    } else {
        let mut sum = super::checksum::Sum::default();
        sum.add(&header[ip_at..]);
        data.iter().for_each(|part| sum.add(part));
        header[ip_at + CHECKSUM_AT..ip_at + CHECKSUM_AT + 2].copy_from_slice(&sum.finish());
    }
    if len > usize::from(connection.mss()) {
        offload.gso = if v4 { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
        offload.gso_size = connection.mss();
        offload.hdr_len = (ip_at + tcp_len) as u16;
    }
    sink.write(header);
    data.iter().for_each(|part| sink.write(part));
    Some(offload)
}

fn family_of(addr: SocketAddr) -> AddressFamily {
    if addr.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
}

/// Starts a connection; the second value says that it is there already.
fn connect(target: SocketAddr) -> rustix::io::Result<(OwnedFd, bool)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family_of(target), SocketType::STREAM, flags, None)?;
    // The guest has its own Nagle's algorithm.
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(socket.as_fd(), &target) {
        Ok(()) => Ok((socket, true)),
        Err(Errno::INPROGRESS | Errno::INTR) => Ok((socket, false)),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
impl Tcp {
    pub(crate) fn queued_tokens(&self) -> usize {
        self.ready.len()
    }
}
