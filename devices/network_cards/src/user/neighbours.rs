//! Who is where on the link: ARP (RFC 826), neighbour discovery and router advertisements (RFC 4861, RFC 8106).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum::Sum;
use super::link::Link;
use super::timers::{Millis, Owner};
use super::wire::{
    BROADCAST, ETHERNET_LEN, Ethernet, Ip, Mac, be16, ethertype, ipv4_at, ipv6_at, mac_at, protocol,
};

const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const ARP_LEN: usize = 28;

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

const OPTION_SOURCE: u8 = 1;
const OPTION_TARGET: u8 = 2;
const OPTION_PREFIX: u8 = 3;
const OPTION_MTU: u8 = 5;
const OPTION_RDNSS: u8 = 25;
const OPTION_DNSSL: u8 = 31;

/// In seconds. Advertisements come more than three times in this time.
const ROUTER_LIFETIME: u16 = 1800;
const ADVERTISE_EVERY: Millis = 500_000;
const PREFIX_VALID: u32 = 86_400;
const PREFIX_PREFERRED: u32 = 14_400;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The Ethernet address of an IPv6 multicast group (RFC 2464, section 7).
pub(crate) fn multicast_mac(group: Ipv6Addr) -> Mac {
    let o = group.octets();
    [0x33, 0x33, o[12], o[13], o[14], o[15]]
}

fn solicited_node(addr: Ipv6Addr) -> Ipv6Addr {
    let o = addr.octets();
    let low = u128::from(u32::from_be_bytes([0, o[13], o[14], o[15]]));
    Ipv6Addr::from(u128::from(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0)) | low)
}

/// Takes an ARP packet. Answers whether an address became known.
pub(crate) fn arp_input(link: &mut Link, frame: &[u8]) -> bool {
    let Some(arp) = frame.get(ETHERNET_LEN..ETHERNET_LEN + ARP_LEN) else {
        return false;
    };
    // Ethernet, IPv4, and the lengths of their addresses.
    if arp[..6] != [0, 1, 8, 0, 6, 4] {
        return false;
    }
    let fields = || {
        Some((
            be16(arp, 6)?,
            mac_at(arp, 8)?,
            ipv4_at(arp, 14)?,
            ipv4_at(arp, 24)?,
        ))
    };
    let Some((operation, sender_mac, sender, target)) = fields() else {
        return false;
    };
    let news = link.learn(sender.into(), sender_mac);
    // A probe comes from 0.0.0.0 (RFC 5227); ours are taken.
    if operation == ARP_REQUEST && link.addresses.is_own(target.into()) && sender != target {
        let reply = arp_packet(link, ARP_REPLY, target, (sender_mac, sender));
        link.send(reply);
    }
    news
}

fn arp_packet(
    link: &Link,
    operation: u16,
    sender: Ipv4Addr,
    (target_mac, target): (Mac, Ipv4Addr),
) -> Vec<u8> {
    let own = link.addresses.mac;
    let asks = operation == ARP_REQUEST;
    let dst = if asks { BROADCAST } else { target_mac };
    let mut frame = Vec::with_capacity(ETHERNET_LEN + ARP_LEN);
    Ethernet {
        dst,
        src: own,
        ethertype: ethertype::ARP,
    }
    .write(&mut frame);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&own);
    frame.extend_from_slice(&sender.octets());
    frame.extend_from_slice(&if asks { [0; 6] } else { target_mac });
    frame.extend_from_slice(&target.octets());
    frame
}

/// Asks where an address of the guest's is.
pub(crate) fn solicit(link: &mut Link, addr: IpAddr) {
    match addr {
        IpAddr::V4(target) => {
            let ask = arp_packet(link, ARP_REQUEST, link.addresses.host, ([0; 6], target));
            link.send(ask);
        }
        IpAddr::V6(target) => {
            let mut body = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
            body.extend_from_slice(&target.octets());
            push_address(&mut body, OPTION_SOURCE, link.addresses.mac);
            let src = if target.is_unicast_link_local() {
                link.addresses.link_local6
            } else {
                link.addresses.host6
            };
            send_icmp6(link, src, solicited_node(target), None, body);
        }
    }
}

fn push_address(body: &mut Vec<u8>, option: u8, mac: Mac) {
    body.extend_from_slice(&[option, 1]);
    body.extend_from_slice(&mac);
}

/// Sends an ICMPv6 message, to a group if `mac` is none.
fn send_icmp6(link: &mut Link, src: Ipv6Addr, dst: Ipv6Addr, mac: Option<Mac>, mut body: Vec<u8>) {
    let mut sum = Sum::pseudo(src.into(), dst.into(), protocol::ICMPV6, body.len());
    sum.add(&body);
    body[2..4].copy_from_slice(&sum.finish());
    let route = link.route(mac.unwrap_or(multicast_mac(dst)), src.into(), dst.into());
    link.send_ip(&route, protocol::ICMPV6, &body);
}

/// Takes a message of neighbour discovery, whose checksum is right. Answers whether an address became known.
pub(crate) fn icmp6_input(link: &mut Link, mac: Mac, ip: &Ip, message: &[u8]) -> bool {
    let IpAddr::V6(src) = ip.src else {
        return false;
    };
    // A hop limit of 255 proves that it comes from this link (RFC 4861, section 6.1).
    if ip.ttl != 255 || message.get(1) != Some(&0) {
        return false;
    }
    match message[0] {
        ROUTER_SOLICITATION => {
            let to = (!src.is_unspecified()).then_some((src, mac));
            advertise_router(link, to);
            false
        }
        NEIGHBOUR_SOLICITATION => solicited(link, mac, src, message),
        NEIGHBOUR_ADVERTISEMENT => {
            let Some(target) = ipv6_at(message, 8) else {
                return false;
            };
            link.learn(target.into(), target_option(message).unwrap_or(mac))
        }
        _ => false,
    }
}

fn target_option(message: &[u8]) -> Option<Mac> {
    let mut at = 24;
    // Each option is eight bytes long or more.
    while let (Some(&kind), Some(&len)) = (message.get(at), message.get(at + 1)) {
        if kind == OPTION_TARGET {
            return mac_at(message, at + 2);
        }
        if len == 0 {
            return None;
        }
        at += usize::from(len) * 8;
    }
    None
}

/// Answers when somebody asks for one of our addresses.
fn solicited(link: &mut Link, mac: Mac, src: Ipv6Addr, message: &[u8]) -> bool {
    let news = !src.is_unspecified() && link.learn(src.into(), mac);
    let Some(target) = ipv6_at(message, 8) else {
        return news;
    };
    if !link.addresses.is_own(target.into()) {
        return news;
    }
    // Solicited (or an answer to address detection, which has no sender), override; we are a router.
    let flags = if src.is_unspecified() { 0xa0 } else { 0xe0 };
    let mut body = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    body.extend_from_slice(&target.octets());
    push_address(&mut body, OPTION_TARGET, link.addresses.mac);
    if src.is_unspecified() {
        send_icmp6(link, target, ALL_NODES, None, body);
    } else {
        send_icmp6(link, target, src, Some(mac), body);
    }
    news
}

/// Sends a router advertisement to one address, or to all.
fn advertise_router(link: &mut Link, to: Option<(Ipv6Addr, Mac)>) {
    let [life_high, life_low] = ROUTER_LIFETIME.to_be_bytes();
    let hop_limit = 64;
    let mut body = vec![
        ROUTER_ADVERTISEMENT,
        0,
        0,
        0,
        hop_limit,
        0,
        life_high,
        life_low,
    ];
    // Reachable time and retransmission time are the guest's choice.
    body.extend_from_slice(&[0; 8]);
    push_address(&mut body, OPTION_SOURCE, link.addresses.mac);
    if link.config.mtu != 1500 {
        body.extend_from_slice(&[OPTION_MTU, 1, 0, 0]);
        body.extend_from_slice(&u32::from(link.config.mtu).to_be_bytes());
    }
    // On this link, and good for addresses made from it.
    body.extend_from_slice(&[OPTION_PREFIX, 4, 64, 0xc0]);
    body.extend_from_slice(&PREFIX_VALID.to_be_bytes());
    body.extend_from_slice(&PREFIX_PREFERRED.to_be_bytes());
    body.extend_from_slice(&[0; 4]);
    body.extend_from_slice(&link.addresses.prefix6.octets());
    if !link.config.restrict {
        body.extend_from_slice(&[OPTION_RDNSS, 3, 0, 0]);
        body.extend_from_slice(&u32::from(ROUTER_LIFETIME).to_be_bytes());
        body.extend_from_slice(&link.addresses.dns6.octets());
    }
    push_search_list(&mut body, &link.config.dnssearch);
    let src = link.addresses.link_local6;
    match to {
        Some((dst, mac)) => send_icmp6(link, src, dst, Some(mac), body),
        None => send_icmp6(link, src, ALL_NODES, None, body),
    }
}

/// RFC 8106, section 5.2.
fn push_search_list(body: &mut Vec<u8>, domains: &[String]) {
    let mut names = Vec::new();
    for domain in domains {
        super::dns::push_name(&mut names, domain);
    }
    names.resize(names.len().next_multiple_of(8), 0);
    // The option's length is a byte, in units of eight.
    let Ok(units) = u8::try_from(1 + names.len() / 8) else {
        return;
    };
    if !names.is_empty() {
        body.extend_from_slice(&[OPTION_DNSSL, units, 0, 0]);
        body.extend_from_slice(&u32::from(ROUTER_LIFETIME).to_be_bytes());
        body.extend_from_slice(&names);
    }
}

/// Keeps the guest's default route alive.
pub(crate) fn on_timer(link: &mut Link) {
    if link.config.ipv6 {
        if link.has_neighbours() {
            advertise_router(link, None);
        }
        link.timers
            .set(link.now + ADVERTISE_EVERY, Owner::RouterAdvertisement);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_addresses_are_those_of_the_specifications() {
        let node = solicited_node("fec0::5054:ff:fe12:3456".parse().unwrap());
        assert_eq!(node.to_string(), "ff02::1:ff12:3456");
        assert_eq!(multicast_mac(node), [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
    }
}
