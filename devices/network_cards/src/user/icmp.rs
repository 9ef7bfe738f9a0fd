//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echo, answered here or passed on through ping sockets, and errors for the guest.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};

use super::checksum::{self, Sum};
use super::link::{Blocked, Link, Source};
use super::slab::{Slab, Token};
use super::timers::{Millis, Owner};
use super::wire::{ETHERNET_LEN, Ip, Mac, be16, protocol};

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const UNREACHABLE6: u8 = 1;
const ECHO_REQUEST6: u8 = 128;
const ECHO_REPLY6: u8 = 129;
const ECHO_LEN: usize = 8;

/// How much of the packet an error quotes, in bytes (RFC 1812, section 4.3.2.3, and RFC 4443, section 3.1, allow more).
const QUOTE: usize = 128;

/// How many pings to different places can be under way.
const FLOWS: usize = 64;
const TIMEOUT: Millis = 30_000;

/// Why a packet of the guest's did not get anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// There is no way to that address.
    NoRoute,
    /// Somebody forbids it.
    Prohibited,
}

/// Tells the guest that there is no way to where `ip` goes.
pub(crate) fn unreachable(link: &mut Link, mac: Mac, ip: &Ip, head: &[u8]) {
    error(link, mac, ip, head, Reason::NoRoute);
}

/// Tells the guest why its packet `ip`, of which `head` is the start, was lost.
pub(crate) fn error(link: &mut Link, mac: Mac, ip: &Ip, head: &[u8], reason: Reason) {
    let v4 = ip.src.is_ipv4();
    let Some(packet) = head.get(ETHERNET_LEN..) else {
        return;
    };
    let len = (ip.payload_at - ETHERNET_LEN + ip.payload_len)
        .min(packet.len())
        .min(QUOTE);
    let (kind, code) = match (v4, reason) {
        (true, Reason::NoRoute) => (UNREACHABLE, 1),
        (true, Reason::Prohibited) => (UNREACHABLE, 13),
        (false, Reason::NoRoute) => (UNREACHABLE6, 0),
        (false, Reason::Prohibited) => (UNREACHABLE6, 1),
    };
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&packet[..len]);
    let src = link.own_address(ip.src);
    send(link, mac, src, ip.src, message);
}

/// Sends an ICMP message of either version, with its checksum.
fn send(link: &mut Link, mac: Mac, src: IpAddr, dst: IpAddr, mut message: Vec<u8>) {
    message[2..4].copy_from_slice(&[0, 0]);
    let (proto, sum) = if dst.is_ipv4() {
        (protocol::ICMP, checksum::of(&message))
    } else {
        let mut sum = Sum::pseudo(src, dst, protocol::ICMPV6, message.len());
        sum.add(&message);
        (protocol::ICMPV6, sum.finish())
    };
    message[2..4].copy_from_slice(&sum);
    let route = link.route(mac, src, dst);
    link.send_ip(&route, proto, &message);
}

#[derive(Debug)]
struct Flow {
    guest: IpAddr,
    /// The guest's identifier; the socket has its own.
    id: u16,
    mac: Mac,
    socket: OwnedFd,
    last_used: Millis,
    queued: bool,
}

/// Pings that go beyond the link.
#[derive(Debug)]
pub(crate) struct Pings {
    flows: Slab<Flow>,
    by_key: HashMap<(IpAddr, u16), Token>,
    ready: VecDeque<Token>,
    scratch: Vec<u8>,
}

impl Pings {
    pub(crate) fn new() -> Self {
        Self {
            flows: Slab::new(FLOWS),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            scratch: vec![0; 2048],
        }
    }

    /// Takes a message whose checksum is right and that is not one of neighbour discovery.
    pub(crate) fn input(
        &mut self,
        link: &mut Link,
        mac: Mac,
        ip: &Ip,
        message: &[u8],
        head: &[u8],
    ) {
        let (request, reply) = if ip.src.is_ipv4() {
            (ECHO_REQUEST, ECHO_REPLY)
        } else {
            (ECHO_REQUEST6, ECHO_REPLY6)
        };
        // Errors about what we sent tell nothing that the sockets don't know.
        if message.len() < ECHO_LEN || message[..2] != [request, 0] {
            return;
        }
        if link.addresses.is_own(ip.dst) {
            let mut answer = message.to_vec();
            answer[0] = reply;
            return send(link, mac, ip.dst, ip.src, answer);
        }
        match link.translate(SocketAddr::new(ip.dst, 0)) {
            Ok(target) => self.pass_on(link, mac, ip, (message, head), target),
            Err(Blocked::Restricted) => {}
            Err(Blocked::Nowhere) => unreachable(link, mac, ip, head),
        }
    }

    fn pass_on(
        &mut self,
        link: &mut Link,
        mac: Mac,
        ip: &Ip,
        (message, head): (&[u8], &[u8]),
        target: SocketAddr,
    ) {
        let id = be16(message, 4).unwrap_or(0);
        let token = match self.by_key.get(&(ip.src, id)) {
            Some(token) => *token,
            None => match self.open(link, mac, ip.src, id) {
                Ok(token) => token,
                Err(_) => return error(link, mac, ip, head, Reason::Prohibited),
            },
        };
        let Some(flow) = self.flows.get_mut(token) else {
            return;
        };
        flow.last_used = link.now;
        match rustix::net::sendto(&flow.socket, message, SendFlags::DONTWAIT, &target) {
            Err(Errno::NETUNREACH | Errno::HOSTUNREACH) => unreachable(link, mac, ip, head),
            Err(_) => link.dropped += 1,
            Ok(_) => {}
        }
    }

    fn open(&mut self, link: &mut Link, mac: Mac, guest: IpAddr, id: u16) -> Result<Token, Errno> {
        let (family, proto) = if guest.is_ipv4() {
            (AddressFamily::INET, ipproto::ICMP)
        } else {
            (AddressFamily::INET6, ipproto::ICMPV6)
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(proto))?;
        let flow = Flow {
            guest,
            id,
            mac,
            socket,
            last_used: link.now,
            queued: false,
        };
        let token = self.flows.insert(flow).ok_or(Errno::NOBUFS)?;
        let events = EventFlags::IN | EventFlags::ET;
        if let Some(flow) = self.flows.get_mut(token)
            && let Err(error) = link.watch(&flow.socket, Source::Ping(token), events)
        {
            self.flows.remove(token);
            return Err(error);
        }
        self.by_key.insert((guest, id), token);
        link.timers.set(link.now + TIMEOUT, Owner::Ping(token));
        Ok(token)
    }

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
        let ends = flow.last_used + TIMEOUT;
        if ends > link.now {
            return link.timers.set(ends, Owner::Ping(token));
        }
        self.by_key.remove(&(flow.guest, flow.id));
        self.flows.remove(token);
    }

    /// Queues the next answer for the guest. Answers false if there is none.
    pub(crate) fn pull(&mut self, link: &mut Link) -> bool {
        while let Some(&token) = self.ready.front() {
            let Some(flow) = self.flows.get_mut(token) else {
                self.ready.pop_front();
                continue;
            };
            let buffer = &mut self.scratch[..];
            match rustix::net::recvfrom(&flow.socket, buffer, RecvFlags::DONTWAIT) {
                Ok((len, _, Some(from))) if len >= ECHO_LEN => {
                    let Ok(from) = SocketAddr::try_from(from) else {
                        continue;
                    };
                    let mut answer = self.scratch[..len].to_vec();
                    answer[4..6].copy_from_slice(&flow.id.to_be_bytes());
                    let (mac, guest) = (flow.mac, flow.guest);
                    send(link, mac, from.ip(), guest, answer);
                    return true;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => {
                    flow.queued = false;
                    self.ready.pop_front();
                }
            }
        }
        false
    }
}
