//! UDP: one socket for each port that the guest sends from, forwarded ports, and the way to the host's name server.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::config::HostForward;
use super::icmp;
use super::link::{Blocked, Link, Source};
use super::neighbours;
use super::slab::{Slab, Token};
use super::timers::{Millis, Owner};
use super::wire::{Ip, Mac, UDP_LEN, be16, protocol, udp_datagram};
use crate::backend::NetError;
use crate::offload::{GsoKind, OffloadHeader};

/// How many ports of the guest can be in use; the one that was quiet for longest gives way.
const FLOWS: usize = 1024;
/// How many hosts can talk to one forwarded port.
const PEERS: usize = 256;
/// RFC 4787, section 4.3, asks for two minutes or more.
const TIMEOUT: Millis = 240_000;
const TIMEOUT_DNS: Millis = 10_000;
/// A name server that says nothing for this long is passed over.
const DNS_PATIENCE: Millis = 2000;
/// How many errors in a row a socket may have to tell before it is left alone.
const ERRORS: usize = 16;
/// The longest datagram, in bytes.
const LONGEST: usize = 65_535;

#[derive(Debug)]
enum Kind {
    /// To wherever the guest sends.
    Nat,
    /// To a name server; since when a question waits.
    Dns(SocketAddr, Option<Millis>),
    /// A forwarded port: the hosts that have sent, by the address that the guest sees.
    Forward(HashMap<SocketAddr, (SocketAddr, Millis)>),
}

#[derive(Debug)]
struct Flow {
    guest: SocketAddr,
    mac: Option<Mac>,
    socket: OwnedFd,
    kind: Kind,
    last_used: Millis,
    queued: bool,
    timer_at: Millis,
}

impl Flow {
    fn timeout(&self) -> Millis {
        match self.kind {
            Kind::Dns(..) => TIMEOUT_DNS,
            _ => TIMEOUT,
        }
    }

    fn is_dns(&self) -> bool {
        matches!(self.kind, Kind::Dns(..))
    }
}

/// All flows.
#[derive(Debug)]
pub(crate) struct Udp {
    flows: Slab<Flow>,
    /// By the guest's address, and whether it is the flow to the name server.
    by_key: HashMap<(SocketAddr, bool), Token>,
    forwards: Vec<Token>,
    ready: VecDeque<Token>,
    scratch: Vec<u8>,
}

fn open_socket(like: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if like.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    if like.is_ipv6() {
        rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
    }
    Ok(socket)
}

impl Udp {
    pub(crate) fn new() -> Self {
        Self {
            flows: Slab::new(FLOWS),
            by_key: HashMap::new(),
            forwards: Vec::new(),
            ready: VecDeque::new(),
            scratch: vec![0; LONGEST],
        }
    }

    /// Opens a forwarded port.
    pub(crate) fn listen(
        &mut self,
        link: &Link,
        forward: &HostForward,
    ) -> Result<SocketAddr, NetError> {
        let failed = |e: Errno| NetError::os(format!("can't listen for hostfwd={forward}"), e);
        let socket = open_socket(forward.host).map_err(failed)?;
        rustix::net::bind(&socket, &forward.host).map_err(failed)?;
        let bound = rustix::net::getsockname(&socket)
            .and_then(|a| SocketAddr::try_from(a).map_err(|_| Errno::AFNOSUPPORT))
            .map_err(failed)?;
        let ip = forward
            .guest_addr
            .unwrap_or(link.addresses.dhcp_start.into());
        let guest = SocketAddr::new(ip, forward.guest_port);
        let kind = Kind::Forward(HashMap::new());
        let token = self
            .insert(link, Flow::new(guest, None, socket, kind, 0))
            .map_err(failed)?;
        self.forwards.push(token);
        Ok(bound)
    }

    fn insert(&mut self, link: &Link, flow: Flow) -> rustix::io::Result<Token> {
        let token = self.flows.insert(flow).ok_or(Errno::NOBUFS)?;
        let events = EventFlags::IN | EventFlags::ET;
        let flow = self.flows.get_mut(token).ok_or(Errno::NOBUFS)?;
        if let Err(error) = link.watch(&flow.socket, Source::Udp(token), events) {
            self.flows.remove(token);
            return Err(error);
        }
        Ok(token)
    }

    // From the guest.

    /// Takes a UDP packet that is not for the DHCP server. `message` starts with the UDP header, and `head` is the start of the frame.
    pub(crate) fn input(
        &mut self,
        link: &mut Link,
        mac: Mac,
        ip: &Ip,
        (message, head): (&[u8], &[u8]),
        offload: &OffloadHeader,
    ) {
        let Some((src, dst, payload)) = parse(ip, message, offload) else {
            link.dropped += 1;
            return;
        };
        if let Some((token, target)) = self.forward_for(src, dst, link.now) {
            return self.send(link, token, payload, target, offload, || ());
        }
        let target = match link.translate(dst) {
            Ok(target) => target,
            Err(Blocked::Restricted) => return,
            Err(Blocked::Nowhere) if is_broadcast(link, dst.ip()) => return,
            Err(Blocked::Nowhere) => return icmp::unreachable(link, mac, ip, head),
        };
        let dns = link.addresses.is_own(dst.ip()) && is_dns_address(link, dst.ip());
        match self.flow(link, mac, src, target, dns) {
            Ok(token) => {
                let mut lost = false;
                self.send(link, token, payload, target, offload, || lost = true);
                if lost {
                    icmp::unreachable(link, mac, ip, head);
                }
            }
            Err(_) => link.dropped += 1,
        }
    }

    /// The forwarded port, if this is an answer to somebody who uses one.
    fn forward_for(
        &mut self,
        src: SocketAddr,
        dst: SocketAddr,
        now: Millis,
    ) -> Option<(Token, SocketAddr)> {
        for token in &self.forwards {
            if let Some(flow) = self.flows.get_mut(*token)
                && flow.guest == src
                && let Kind::Forward(peers) = &mut flow.kind
                && let Some((real, seen)) = peers.get_mut(&dst)
            {
                *seen = now;
                return Some((*token, *real));
            }
        }
        None
    }

    /// The guest's flow for a port, opened if there is none.
    fn flow(
        &mut self,
        link: &mut Link,
        mac: Mac,
        guest: SocketAddr,
        target: SocketAddr,
        dns: bool,
    ) -> rustix::io::Result<Token> {
        if let Some(token) = self.by_key.get(&(guest, dns)).copied() {
            if !self.is_stale(link, token) {
                return Ok(token);
            }
            self.remove(link, token);
        }
        if self.flows.is_full() {
            self.evict(link);
        }
        // The name server may have changed after the question: ask for it again.
        let target = if dns {
            link.resolver.server(link.now)
        } else {
            target
        };
        let socket = open_socket(target)?;
        let kind = if dns {
            rustix::net::connect(&socket, &target)?;
            Kind::Dns(target, None)
        } else {
            Kind::Nat
        };
        let flow = Flow::new(guest, Some(mac), socket, kind, link.now);
        let ends = link.now + flow.timeout();
        let token = self.insert(link, flow)?;
        self.by_key.insert((guest, dns), token);
        self.set_timer(link, token, ends);
        Ok(token)
    }

    /// True for a flow to a name server that doesn't answer.
    fn is_stale(&mut self, link: &mut Link, token: Token) -> bool {
        let Some(Flow {
            kind: Kind::Dns(server, Some(since)),
            ..
        }) = self.flows.get_mut(token)
        else {
            return false;
        };
        let stale = *since + DNS_PATIENCE <= link.now;
        if stale {
            link.resolver.failed(*server);
        }
        stale
    }

    fn set_timer(&mut self, link: &mut Link, token: Token, at: Millis) {
        if let Some(flow) = self.flows.get_mut(token) {
            flow.timer_at = at;
            link.timers.set(at, Owner::Udp(token));
        }
    }

    fn evict(&mut self, link: &mut Link) {
        let by_key = &self.by_key;
        let quiet = self
            .flows
            .iter_mut()
            .filter(|(token, flow)| by_key.get(&(flow.guest, flow.is_dns())) == Some(token))
            .min_by_key(|(_, flow)| flow.last_used)
            .map(|(token, _)| token);
        if let Some(token) = quiet {
            self.remove(link, token);
        }
    }

    fn send(
        &mut self,
        link: &mut Link,
        token: Token,
        payload: &[u8],
        target: SocketAddr,
        offload: &OffloadHeader,
        unreachable: impl FnOnce(),
    ) {
        let Some(flow) = self.flows.get_mut(token) else {
            return;
        };
        flow.last_used = link.now;
        if let Kind::Dns(_, waits) = &mut flow.kind {
            waits.get_or_insert(link.now);
        }
        // Several datagrams of one size can come in one frame.
        let size = match offload.gso {
            GsoKind::UdpL4 => usize::from(offload.gso_size).max(1),
            _ => payload.len().max(1),
        };
        let empty = payload.is_empty().then_some(payload);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        for piece in payload.chunks(size).chain(empty) {
            let sent = match flow.kind {
                Kind::Dns(..) => rustix::net::send(&flow.socket, piece, flags),
                _ => rustix::net::sendto(&flow.socket, piece, flags, &target),
            };
            match sent {
                Ok(_) => {}
                Err(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ADDRNOTAVAIL) => {
                    return unreachable();
                }
                // A full socket loses datagrams, as UDP does.
                Err(_) => link.dropped += 1,
            }
        }
    }

    // From the host.

    /// A flow's socket has something.
    pub(crate) fn on_socket(&mut self, token: Token) {
        if let Some(flow) = self.flows.get_mut(token)
            && !flow.queued
        {
            flow.queued = true;
            self.flows.enqueue(&mut self.ready, token);
        }
    }

    /// Closes a flow that has been idle for long enough.
    pub(crate) fn on_timer(&mut self, link: &mut Link, token: Token) {
        let Some(flow) = self.flows.get_mut(token) else {
            return;
        };
        let ends = flow.last_used + flow.timeout();
        if ends > link.now {
            self.set_timer(link, token, ends);
        } else {
            self.remove(link, token);
        }
    }

    fn remove(&mut self, link: &mut Link, token: Token) {
        if let Some(flow) = self.flows.remove(token) {
            link.timers.cancel(flow.timer_at, Owner::Udp(token));
            self.by_key.remove(&(flow.guest, flow.is_dns()));
        }
    }

    /// Queues the next datagram for the guest, in fragments if it is long. Answers false if there is none.
    pub(crate) fn pull(&mut self, link: &mut Link) -> bool {
        let mut errors = 0;
        while let Some(&token) = self.ready.front() {
            let Some(flow) = self.flows.get_mut(token) else {
                self.ready.pop_front();
                continue;
            };
            let buffer = &mut self.scratch[..];
            match rustix::net::recvfrom(&flow.socket, buffer, RecvFlags::DONTWAIT) {
                Ok((len, _, from)) => {
                    let from = from.and_then(|a| SocketAddr::try_from(a).ok());
                    // One flow after the other, so that none has to wait for a busy one.
                    self.ready.rotate_left(1);
                    if let Some(src) = source(flow, link, from)
                        && deliver(flow, link, src, &self.scratch[..len])
                    {
                        return true;
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    if error != Errno::AGAIN
                        && let Kind::Dns(server, _) = flow.kind
                    {
                        link.resolver.failed(server);
                        flow.last_used = 0;
                    }
                    // An error about one datagram leaves the others readable; one that stays must not keep us here.
                    errors += 1;
                    if error == Errno::AGAIN || errors > ERRORS {
                        flow.queued = false;
                        self.ready.pop_front();
                    }
                }
            }
        }
        false
    }
}

impl Flow {
    fn new(
        guest: SocketAddr,
        mac: Option<Mac>,
        socket: OwnedFd,
        kind: Kind,
        last_used: Millis,
    ) -> Self {
        Self {
            guest,
            mac,
            socket,
            kind,
            last_used,
            queued: false,
            timer_at: 0,
        }
    }
}

/// Who the guest sees as the sender of a datagram that came from `from`.
fn source(flow: &mut Flow, link: &Link, from: Option<SocketAddr>) -> Option<SocketAddr> {
    let v4 = flow.guest.is_ipv4();
    match &mut flow.kind {
        Kind::Dns(_, waits) => {
            *waits = None;
            let dns: IpAddr = if v4 {
                link.addresses.dns.into()
            } else {
                link.addresses.dns6.into()
            };
            Some(SocketAddr::new(dns, 53))
        }
        Kind::Nat => from.map(|from| link.as_seen_by_guest(from, v4)),
        Kind::Forward(peers) => {
            let from = from?;
            let seen = link.as_seen_by_guest(from, v4);
            if peers.len() >= PEERS && !peers.contains_key(&seen) {
                let oldest = peers
                    .iter()
                    .min_by_key(|(_, (_, at))| *at)
                    .map(|(seen, _)| *seen)?;
                peers.remove(&oldest);
            }
            peers.insert(seen, (from, link.now));
            Some(seen)
        }
    }
}

/// Queues a datagram. Answers false if it is not known where the guest is.
fn deliver(flow: &mut Flow, link: &mut Link, src: SocketAddr, payload: &[u8]) -> bool {
    flow.last_used = link.now;
    let guest = flow.guest;
    let Some(mac) = flow.mac.or_else(|| link.neighbour(guest.ip())) else {
        neighbours::solicit(link, guest.ip());
        link.dropped += 1;
        return true;
    };
    let datagram = udp_datagram(src, guest, payload);
    let route = link.route(mac, src.ip(), guest.ip());
    link.send_ip(&route, protocol::UDP, &datagram);
    true
}

/// Source, destination and payload of a UDP packet with a right checksum.
fn parse<'a>(
    ip: &Ip,
    message: &'a [u8],
    offload: &OffloadHeader,
) -> Option<(SocketAddr, SocketAddr, &'a [u8])> {
    let (src_port, dst_port) = (be16(message, 0)?, be16(message, 2)?);
    let len = usize::from(be16(message, 4)?);
    // With several datagrams in a frame the length is that of the frame.
    let message = message.get(..len)?;
    let payload = message.get(UDP_LEN..)?;
    let unchecked = ip.src.is_ipv4() && message[6..8] == [0, 0];
    let finished = offload.needs_csum.is_none() && !offload.data_valid;
    if finished && !unchecked {
        let mut sum = super::checksum::Sum::pseudo(ip.src, ip.dst, protocol::UDP, len);
        sum.add(message);
        if !sum.is_valid() {
            return None;
        }
    }
    if src_port == 0 || dst_port == 0 {
        return None;
    }
    Some((
        SocketAddr::new(ip.src, src_port),
        SocketAddr::new(ip.dst, dst_port),
        payload,
    ))
}

fn is_broadcast(link: &Link, ip: IpAddr) -> bool {
    ip.is_multicast()
        || matches!(ip, IpAddr::V4(a) if a.is_broadcast() || a == link.addresses.broadcast())
}

fn is_dns_address(link: &Link, ip: IpAddr) -> bool {
    ip == link.addresses.dns || ip == link.addresses.dns6
}

#[cfg(test)]
impl Udp {
    pub(crate) fn queued_tokens(&self) -> usize {
        self.ready.len()
    }
}
