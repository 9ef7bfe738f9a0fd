//! What the protocols of the stack share: addresses, neighbours, timers, readiness, and frames that wait for the guest.

use std::collections::{HashMap, VecDeque};
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll;

use super::config::{Addresses, UserNetConfig};
use super::dns::Resolver;
use super::slab::Token;
use super::timers::{Millis, Timers};
use super::wire::{Mac, Route};
use crate::backend::NetError;
use crate::offload::Offloads;

/// How many answers wait for a guest without buffers; it gets no more of them then.
const OUTBOX: usize = 512;
/// How many addresses of the guest are remembered.
const NEIGHBOURS: usize = 256;

/// Whose descriptor became ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Timer,
    Tcp(Token),
    Udp(Token),
    Ping(Token),
    /// A forwarded TCP port, by its place in the list.
    Listener(u32),
}

impl Source {
    fn to_data(self) -> epoll::EventData {
        let (kind, bits) = match self {
            Self::Timer => (0, 0),
            Self::Tcp(token) => (1, token.to_bits()),
            Self::Udp(token) => (2, token.to_bits()),
            Self::Ping(token) => (3, token.to_bits()),
            Self::Listener(index) => (4, index.into()),
        };
        epoll::EventData::new_u64(kind << 56 | bits)
    }

    pub(crate) fn from_data(data: epoll::EventData) -> Self {
        let bits = data.u64();
        let token = Token::from_bits(bits & (u64::MAX >> 8));
        match bits >> 56 {
            1 => Self::Tcp(token),
            2 => Self::Udp(token),
            3 => Self::Ping(token),
            4 => Self::Listener(bits as u32),
            _ => Self::Timer,
        }
    }
}

/// Why the guest can't talk to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocked {
    /// By the settings.
    Restricted,
    /// There is nothing at that address.
    Nowhere,
}

/// The shared part of the stack.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) config: UserNetConfig,
    pub(crate) addresses: Addresses,
    /// What the guest accepts.
    pub(crate) accepted: Offloads,
    pub(crate) timers: Timers,
    pub(crate) resolver: Resolver,
    pub(crate) now: Millis,
    /// Frames that were lost for a reason other than the guest's.
    pub(crate) dropped: u64,
    neighbours: HashMap<IpAddr, Mac>,
    outbox: VecDeque<Vec<u8>>,
    epoll: OwnedFd,
    fragment_id: u32,
    /// Wild frames of tests must not reach anything but the test's own server.
    pub(crate) only_target: Option<SocketAddr>,
}

impl Link {
    pub(crate) fn new(config: UserNetConfig) -> Result<Self, NetError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| NetError::os("can't make an epoll descriptor", e))?;
        let addresses = Addresses::of(&config)?;
        let timers = Timers::new()?;
        let link = Self {
            resolver: Resolver::new(config.resolv_conf.clone()),
            addresses,
            config,
            accepted: Offloads::empty(),
            now: 0,
            dropped: 0,
            neighbours: HashMap::new(),
            outbox: VecDeque::new(),
            epoll,
            fragment_id: 0,
            only_target: None,
            timers,
        };
        link.watch(&link.timers, Source::Timer, epoll::EventFlags::IN)
            .map_err(|e| NetError::os("can't wait for a timer", e))?;
        Ok(link)
    }

    /// The descriptor that is readable when [`wait`](Self::wait) has something.
    pub(crate) fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    /// Has readiness of `fd` reported.
    pub(crate) fn watch(
        &self,
        fd: impl AsFd,
        source: Source,
        events: epoll::EventFlags,
    ) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, fd, source.to_data(), events)
    }

    // Neighbours.

    /// Notes where an address of the guest's is. Answers whether that was new.
    pub(crate) fn learn(&mut self, addr: IpAddr, mac: Mac) -> bool {
        let usable = self.addresses.is_local(addr)
            && !self.addresses.is_own(addr)
            && mac[0] & 1 == 0
            && mac != self.addresses.mac;
        if !usable || self.neighbours.get(&addr) == Some(&mac) {
            return false;
        }
        if self.neighbours.len() >= NEIGHBOURS {
            self.neighbours.clear();
        }
        self.neighbours.insert(addr, mac).is_none()
    }

    /// Where an address of the guest's is.
    pub(crate) fn neighbour(&self, addr: IpAddr) -> Option<Mac> {
        self.neighbours.get(&addr).copied()
    }

    /// True once the guest has spoken.
    pub(crate) fn has_neighbours(&self) -> bool {
        !self.neighbours.is_empty()
    }

    // Frames for the guest.

    /// A route from one of our addresses (or one that we stand for) to the guest.
    pub(crate) fn route(&self, dst_mac: Mac, src: IpAddr, dst: IpAddr) -> Route {
        Route {
            dst_mac,
            src_mac: self.addresses.mac,
            src,
            dst,
        }
    }

    /// Queues a frame for the guest.
    pub(crate) fn send(&mut self, frame: Vec<u8>) {
        if self.outbox.len() < OUTBOX {
            self.outbox.push_back(frame);
        } else {
            self.dropped += 1;
        }
    }

    /// Queues a packet for the guest, in fragments if it is long.
    pub(crate) fn send_ip(&mut self, route: &Route, protocol: u8, payload: &[u8]) {
        self.fragment_id = self.fragment_id.wrapping_add(1);
        let mtu = self.config.mtu.into();
        for frame in route.frames(protocol, payload, mtu, self.fragment_id) {
            self.send(frame);
        }
    }

    pub(crate) fn next_frame(&mut self) -> Option<Vec<u8>> {
        self.outbox.pop_front()
    }

    pub(crate) fn has_frames(&self) -> bool {
        !self.outbox.is_empty()
    }

    // Addresses.

    /// Where a socket must go to reach what the guest calls `dst`.
    pub(crate) fn translate(&mut self, dst: SocketAddr) -> Result<SocketAddr, Blocked> {
        let target = self.target_of(dst)?;
        if self.only_target.is_some_and(|only| only != target) {
            return Err(Blocked::Nowhere);
        }
        Ok(target)
    }

    fn target_of(&mut self, dst: SocketAddr) -> Result<SocketAddr, Blocked> {
        let addresses = &self.addresses;
        if self.config.restrict {
            return Err(Blocked::Restricted);
        }
        let ip = dst.ip();
        if ip == addresses.host || ip == addresses.host6 || ip == addresses.link_local6 {
            let loopback = loopback_like(ip);
            let open = self.config.host_loopback;
            return if open {
                Ok((loopback, dst.port()).into())
            } else {
                Err(Blocked::Restricted)
            };
        }
        if ip == addresses.dns || ip == addresses.dns6 {
            let dns = dst.port() == 53;
            return if dns {
                Ok(self.resolver.server(self.now))
            } else {
                Err(Blocked::Nowhere)
            };
        }
        if addresses.is_local(ip) || !is_reachable(ip) {
            return Err(Blocked::Nowhere);
        }
        Ok(dst)
    }

    /// What the guest sees as the source of something that came from `peer`.
    pub(crate) fn as_seen_by_guest(&self, peer: SocketAddr, guest_is_v4: bool) -> SocketAddr {
        let ip = peer.ip().to_canonical();
        let foreign = ip.is_loopback()
            || ip.is_ipv4() != guest_is_v4
            || self.addresses.is_local(ip)
            || !is_reachable(ip);
        let host: IpAddr = if guest_is_v4 {
            self.addresses.host.into()
        } else {
            self.addresses.host6.into()
        };
        SocketAddr::new(if foreign { host } else { ip }, peer.port())
    }

    /// The address that stands for the host in the family of `like`.
    pub(crate) fn own_address(&self, like: IpAddr) -> IpAddr {
        match like {
            IpAddr::V4(_) => self.addresses.host.into(),
            IpAddr::V6(_) => self.addresses.host6.into(),
        }
    }
}

fn loopback_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}

/// False for what a packet from the guest must not reach: the host's own loopback addresses under any name, and what
/// is not one host.
fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => {
            let first = a.octets()[0];
            !(first == 0 || first == 127 || first >= 224)
        }
        IpAddr::V6(a) => {
            let mapped = u128::from(a) >> 32;
            // ::/96 holds the unspecified, loopback and old compatible addresses, ::ffff:0:0/96 the mapped ones.
            !(mapped == 0 || mapped == 0xffff || a.is_multicast() || a.is_unicast_link_local())
        }
    }
}

/// True for an address that can be the source of a packet.
pub(crate) fn is_host_address(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => {
            let first = a.octets()[0];
            !(first == 0 || first == 127 || first >= 224)
        }
        IpAddr::V6(a) => !(u128::from(a) >> 32 == 0 || a.is_multicast()),
    }
}

/// The guest's buffers for one frame.
#[derive(Debug)]
pub(crate) struct Sink<'a, 'b> {
    buffers: &'a mut [IoSliceMut<'b>],
    room: usize,
    written: usize,
    /// The buffer that is written now, and how far it is.
    part: usize,
    at: usize,
}

impl<'a, 'b> Sink<'a, 'b> {
    pub(crate) fn new(buffers: &'a mut [IoSliceMut<'b>]) -> Self {
        let room = buffers.iter().map(|b| b.len()).sum();
        Self {
            buffers,
            room,
            written: 0,
            part: 0,
            at: 0,
        }
    }

    /// All there is, in bytes.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// What has been written, in bytes.
    pub(crate) fn written(&self) -> usize {
        self.written
    }

    /// Adds bytes; what doesn't fit is cut, so look at [`room`](Self::room) first.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let Some(buffer) = self.buffers.get_mut(self.part) else {
                return;
            };
            let n = bytes.len().min(buffer.len() - self.at);
            buffer[self.at..self.at + n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            self.written += n;
            self.at += n;
            if self.at == buffer.len() {
                (self.part, self.at) = (self.part + 1, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> Link {
        Link::new(UserNetConfig::default()).unwrap()
    }

    #[test]
    fn the_hosts_loopback_is_reached_by_the_gateways_address_only() {
        let mut link = link();
        let mut to = |text: &str| link.translate(text.parse().unwrap());
        assert_eq!(to("10.0.2.2:80"), Ok("127.0.0.1:80".parse().unwrap()));
        assert_eq!(to("[fec0::2]:80"), Ok("[::1]:80".parse().unwrap()));
        assert_eq!(to("192.0.2.1:80"), Ok("192.0.2.1:80".parse().unwrap()));
        for text in [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "255.255.255.255:80",
            "224.0.0.1:80",
            "10.0.2.9:80",
            "10.0.2.3:80",
            "[::1]:80",
            "[::]:80",
            "[::ffff:127.0.0.1]:80",
            "[::127.0.0.1]:80",
            "[ff02::1]:80",
            "[fe80::1]:80",
            "[fec0::77]:80",
        ] {
            assert_eq!(to(text), Err(Blocked::Nowhere), "{text}");
        }
    }

    #[test]
    fn peers_look_like_something_the_guest_can_answer() {
        let link = link();
        let seen = |text: &str, v4| link.as_seen_by_guest(text.parse().unwrap(), v4).to_string();
        assert_eq!(seen("127.0.0.1:5", true), "10.0.2.2:5");
        assert_eq!(seen("192.0.2.1:5", true), "192.0.2.1:5");
        assert_eq!(seen("[::ffff:192.0.2.1]:5", true), "192.0.2.1:5");
        assert_eq!(seen("[2001:db8::1]:5", true), "10.0.2.2:5");
        assert_eq!(seen("192.0.2.1:5", false), "[fec0::2]:5");
        assert_eq!(seen("10.0.2.15:5", true), "10.0.2.2:5");
    }

    #[test]
    fn addresses_of_ours_are_not_learnt_from_the_guest() {
        let mut link = link();
        assert!(!link.learn("10.0.2.2".parse().unwrap(), [2, 0, 0, 0, 0, 1]));
        assert!(!link.learn("10.0.2.15".parse().unwrap(), [0xff; 6]));
        assert!(link.learn("10.0.2.15".parse().unwrap(), [2, 0, 0, 0, 0, 1]));
        assert!(!link.learn("10.0.2.15".parse().unwrap(), [2, 0, 0, 0, 0, 1]));
    }
}
