//! The stack: takes the guest's frames apart, and puts together what the guest gets.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};

use rustix::event::epoll::{self, EventFlags};
use rustix::time::Timespec;

use super::config::{Transport, UserNetConfig};
use super::dhcp::{self, Dhcp};
use super::fragments::Fragments;
use super::icmp::Pings;
use super::link::{Link, Sink, Source, is_host_address};
use super::neighbours;
use super::tcp::Tcp;
use super::timers::{Millis, Owner};
use super::udp::Udp;
use super::wire::{Ethernet, Ip, Mac, UDP_LEN, be16, copy_head, ethertype, protocol};
use crate::backend::NetError;
use crate::offload::{MAX_FRAME, OffloadHeader, Offloads};

/// How much of a frame is copied out of the guest's reach before it is looked at: all headers, in bytes.
const HEAD: usize = 256;
/// Events that are handled in one pass.
const EVENTS: usize = 64;
/// When the guest is first told of its router without having asked.
const FIRST_ADVERTISEMENT: Millis = 200_000;

/// The user-mode network, without threads or a clock of its own.
#[derive(Debug)]
pub(crate) struct Stack {
    pub(crate) link: Link,
    tcp: Tcp,
    udp: Udp,
    pings: Pings,
    dhcp: Dhcp,
    fragments: Fragments,
    /// A whole packet, copied.
    packet: Vec<u8>,
    /// UDP goes before TCP this time.
    udp_first: bool,
}

impl Stack {
    /// Makes the stack and opens the forwarded ports. The second value says where those are, in the order of the settings.
    pub(crate) fn new(config: UserNetConfig) -> Result<(Self, Vec<SocketAddr>), NetError> {
        let mut link = Link::new(config)?;
        let (mut tcp, mut udp) = (Tcp::new(), Udp::new());
        let mut bound = Vec::new();
        for forward in &link.config.hostfwd {
            bound.push(match forward.transport {
                Transport::Tcp => tcp.listen(&link, forward)?,
                Transport::Udp => udp.listen(&link, forward)?,
            });
        }
        if link.config.ipv6 {
            link.timers
                .set(FIRST_ADVERTISEMENT, Owner::RouterAdvertisement);
        }
        let stack = Self {
            link,
            tcp,
            udp,
            pings: Pings::new(),
            dhcp: Dhcp::default(),
            fragments: Fragments::default(),
            packet: Vec::new(),
            udp_first: false,
        };
        Ok((stack, bound))
    }

    /// Handles sockets that became ready, and deadlines.
    pub(crate) fn process(&mut self, now: Millis) -> Result<(), NetError> {
        self.link.now = now;
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match epoll::wait(self.link.epoll(), &mut events, Some(&no_wait)) {
            Ok((events, _)) => {
                for event in events {
                    self.on_event(Source::from_data(event.data), event.flags);
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(NetError::os("can't wait for sockets", e)),
        }
        while let Some(owner) = self.link.timers.pop_due(now) {
            self.on_timer(owner);
        }
        self.link.timers.arm(now);
        Ok(())
    }

    fn on_event(&mut self, source: Source, events: EventFlags) {
        match source {
            Source::Timer => self.link.timers.fired(),
            Source::Tcp(token) => self.tcp.on_socket(&mut self.link, token, events),
            Source::Udp(token) => self.udp.on_socket(token),
            Source::Ping(token) => self.pings.on_socket(token),
            Source::Listener(index) => self.tcp.on_listener(&mut self.link, index),
        }
    }

    fn on_timer(&mut self, owner: Owner) {
        match owner {
            Owner::Tcp(token) => self.tcp.on_timer(&mut self.link, token),
            Owner::Udp(token) => self.udp.on_timer(&mut self.link, token),
            Owner::Ping(token) => self.pings.on_timer(&mut self.link, token),
            Owner::RouterAdvertisement => neighbours::on_timer(&mut self.link),
            Owner::Listeners => self.tcp.on_listener_timer(&mut self.link),
        }
    }

    /// Takes a frame from the guest.
    pub(crate) fn transmit(&mut self, offload: &OffloadHeader, frame: &[IoSlice<'_>], now: Millis) {
        self.link.now = now;
        let len: usize = frame.iter().map(|part| part.len()).sum();
        let mut head = [0; HEAD];
        let head_len = copy_head(frame, &mut head);
        let head = &head[..head_len];
        if len > MAX_FRAME || self.take_frame(offload, frame, head, len).is_none() {
            self.link.dropped += 1;
        }
        self.link.timers.arm(now);
    }

    /// `None`: the frame made no sense.
    fn take_frame(
        &mut self,
        offload: &OffloadHeader,
        frame: &[IoSlice<'_>],
        head: &[u8],
        len: usize,
    ) -> Option<()> {
        let ethernet = Ethernet::parse(head)?;
        let mac = ethernet.src;
        if mac[0] & 1 != 0 {
            return None;
        }
        let link = &mut self.link;
        match ethernet.ethertype {
            ethertype::ARP if link.config.ipv4 => {
                if neighbours::arp_input(link, head) {
                    self.tcp.on_neighbour();
                }
                return Some(());
            }
            ethertype::IPV4 if link.config.ipv4 => {}
            ethertype::IPV6 if link.config.ipv6 => {}
            // Another protocol: nobody listens.
            _ => return Some(()),
        }
        let ip = Ip::parse(ethernet.ethertype, head, len)?;
        // Frames for other stations reach us only from a bridge within the guest.
        let ours = ethernet.dst[0] & 1 != 0 || ethernet.dst == link.addresses.mac;
        if !ours {
            return Some(());
        }
        let host = is_host_address(ip.src);
        if link.addresses.is_own(ip.src) || !(host || ip.src.is_unspecified()) {
            return None;
        }
        if host && self.link.learn(ip.src, mac) {
            self.tcp.on_neighbour();
        }
        if ip.protocol == protocol::TCP && ip.fragment.is_none() {
            if host && !ip.dst.is_multicast() {
                self.tcp
                    .input(&mut self.link, mac, &ip, (head, frame), offload);
            }
            return Some(());
        }
        self.take_copied(mac, ip, (head, frame), offload, len)
    }

    /// Copies what is not TCP out of the guest's reach, puts fragments together, and hands the packet on.
    fn take_copied(
        &mut self,
        mac: Mac,
        ip: Ip,
        (head, frame): (&[u8], &[IoSlice<'_>]),
        offload: &OffloadHeader,
        len: usize,
    ) -> Option<()> {
        let mut packet = std::mem::take(&mut self.packet);
        packet.resize(len, 0);
        copy_head(frame, &mut packet);
        let mut result = Some(());
        if let Some(message) = packet.get(ip.payload_at..ip.payload_at + ip.payload_len) {
            result = match ip.fragment {
                None => self.take_packet(mac, &ip, (message, head), offload),
                Some(place) => match self.fragments.add(&ip, &place, message, self.link.now) {
                    Some((protocol, bytes)) => {
                        let whole = Ip {
                            protocol,
                            payload_len: bytes.len(),
                            fragment: None,
                            ..ip
                        };
                        self.take_packet(mac, &whole, (&bytes, head), offload)
                    }
                    None => Some(()),
                },
            };
        }
        self.packet = packet;
        result
    }

    fn take_packet(
        &mut self,
        mac: Mac,
        ip: &Ip,
        (message, head): (&[u8], &[u8]),
        offload: &OffloadHeader,
    ) -> Option<()> {
        let link = &mut self.link;
        match (ip.protocol, ip.src) {
            (protocol::UDP, _) => {
                let dst = SocketAddr::new(ip.dst, be16(message, 2)?);
                if dhcp::is_for_server(link, dst) {
                    self.dhcp.input(link, message.get(UDP_LEN..)?);
                    self.tcp.on_neighbour();
                } else if is_host_address(ip.src) {
                    self.udp.input(link, mac, ip, (message, head), offload);
                }
            }
            (protocol::ICMP, IpAddr::V4(_)) if is_host_address(ip.src) => {
                if super::checksum::of(message) != [0, 0] {
                    return None;
                }
                self.pings.input(link, mac, ip, message, head);
            }
            (protocol::ICMPV6, IpAddr::V6(_)) => self.take_icmp6(mac, ip, (message, head))?,
            _ => {}
        }
        Some(())
    }

    fn take_icmp6(&mut self, mac: Mac, ip: &Ip, (message, head): (&[u8], &[u8])) -> Option<()> {
        let mut sum = super::checksum::Sum::pseudo(ip.src, ip.dst, protocol::ICMPV6, message.len());
        sum.add(message);
        let kind = *message.first()?;
        if !sum.is_valid() {
            return None;
        }
        // The messages of neighbour discovery.
        if (133..=137).contains(&kind) {
            if neighbours::icmp6_input(&mut self.link, mac, ip, message) {
                self.tcp.on_neighbour();
            }
        } else if is_host_address(ip.src) && !ip.dst.is_multicast() {
            self.pings.input(&mut self.link, mac, ip, message, head);
        }
        Some(())
    }

    /// Fetches the next frame for the guest: its header and its length.
    pub(crate) fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
        now: Millis,
    ) -> Option<(OffloadHeader, usize)> {
        self.link.now = now;
        let mut sink = Sink::new(buffers);
        loop {
            while let Some(frame) = self.link.next_frame() {
                if frame.len() <= sink.room() {
                    sink.write(&frame);
                    return Some((self.finished(), frame.len()));
                }
                self.link.dropped += 1;
            }
            // They take turns.
            self.udp_first = !self.udp_first;
            if self.udp_first && self.pull_datagrams() {
                continue;
            }
            if let Some(header) = self.tcp.pull(&mut self.link, &mut sink) {
                return Some((header, sink.written()));
            }
            // Looking for TCP may have queued a question for the guest's address.
            if !self.pull_datagrams() && !self.link.has_frames() {
                self.link.timers.arm(now);
                return None;
            }
        }
    }

    fn pull_datagrams(&mut self) -> bool {
        self.udp.pull(&mut self.link) || self.pings.pull(&mut self.link)
    }

    /// The header of a frame with nothing left to do.
    fn finished(&self) -> OffloadHeader {
        let data_valid = self.link.accepted.contains(Offloads::CSUM);
        OffloadHeader {
            data_valid,
            ..Default::default()
        }
    }
}

#[cfg(test)]
impl Stack {
    /// Tokens in the queues of those that have something to say.
    pub(crate) fn queued_tokens(&self) -> usize {
        self.tcp.queued_tokens() + self.udp.queued_tokens()
    }
}
