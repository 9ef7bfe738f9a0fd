//! A DHCP server (RFC 2131, options of RFC 2132) for the guest, and for guests within it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::link::Link;
use super::wire::{BROADCAST, Mac, ipv4_at, mac_at, protocol, udp_datagram};

/// The server's port.
pub(crate) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// How many addresses are given out.
const LEASES: u32 = 16;
/// In seconds.
const LEASE_TIME: u32 = 86_400;

const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
const OPTIONS_AT: usize = 240;
/// The shortest message that old clients take (RFC 1542, section 2.1).
const SHORTEST: usize = 300;

mod message {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const DECLINE: u8 = 4;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const RELEASE: u8 = 7;
    pub(super) const INFORM: u8 = 8;
}

mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const SUBNET_MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const NAME_SERVER: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const DOMAIN_NAME: u8 = 15;
    pub(super) const MTU: u8 = 26;
    pub(super) const BROADCAST: u8 = 28;
    pub(super) const REQUESTED_ADDRESS: u8 = 50;
    pub(super) const LEASE_TIME: u8 = 51;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const MESSAGE: u8 = 56;
    pub(super) const DOMAIN_SEARCH: u8 = 119;
    pub(super) const END: u8 = 255;
}

/// Who has which address.
#[derive(Debug, Default)]
pub(crate) struct Dhcp {
    /// The address is the first one plus the place in this list.
    leases: Vec<Option<Mac>>,
}

/// What the server reads of a request.
#[derive(Debug)]
struct Request<'a> {
    bytes: &'a [u8],
    client: Mac,
    client_addr: Ipv4Addr,
    kind: Option<u8>,
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl<'a> Request<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        // Operation, hardware type Ethernet, and its addresses' length.
        if bytes.get(..3)? != [BOOT_REQUEST, 1, 6] || bytes.get(236..OPTIONS_AT)? != MAGIC {
            return None;
        }
        let mut request = Self {
            bytes,
            client: mac_at(bytes, 28)?,
            client_addr: ipv4_at(bytes, 12)?,
            kind: None,
            wanted: None,
            server: None,
        };
        let mut at = OPTIONS_AT;
        while let Some(&code) = bytes.get(at) {
            if code == option::END {
                break;
            }
            if code == option::PAD {
                at += 1;
                continue;
            }
            let len = usize::from(*bytes.get(at + 1)?);
            let value = bytes.get(at + 2..at + 2 + len)?;
            match code {
                option::MESSAGE_TYPE => request.kind = value.first().copied(),
                option::REQUESTED_ADDRESS => request.wanted = ipv4_at(value, 0),
                option::SERVER => request.server = ipv4_at(value, 0),
                _ => {}
            }
            at += 2 + len;
        }
        Some(request)
    }
}

impl Dhcp {
    /// Takes a message to the server's port.
    pub(crate) fn input(&mut self, link: &mut Link, bytes: &[u8]) {
        let Some(request) = Request::parse(bytes) else {
            return;
        };
        let own = link.addresses.host;
        match request.kind {
            // BOOTP knows no message types.
            None => {
                if let Some(addr) = self.lease(link, request.client, None) {
                    reply(link, &request, None, addr);
                }
            }
            Some(message::DISCOVER) => {
                if let Some(addr) = self.lease(link, request.client, request.wanted) {
                    reply(link, &request, Some(message::OFFER), addr);
                }
            }
            Some(message::REQUEST) => {
                if request.server.is_some_and(|server| server != own) {
                    self.release(request.client);
                    return;
                }
                let wanted = request.wanted.unwrap_or(request.client_addr);
                match self.lease(link, request.client, Some(wanted)) {
                    Some(addr) if addr == wanted => {
                        // Lets forwarded ports reach a guest that has not spoken IP yet.
                        reply(link, &request, Some(message::ACK), addr);
                        link.learn(addr.into(), request.client);
                    }
                    _ => reply(link, &request, Some(message::NAK), Ipv4Addr::UNSPECIFIED),
                }
            }
            Some(message::INFORM) => {
                reply(link, &request, Some(message::ACK), Ipv4Addr::UNSPECIFIED);
            }
            Some(message::RELEASE | message::DECLINE) => self.release(request.client),
            Some(_) => {}
        }
    }

    fn release(&mut self, client: Mac) {
        for lease in &mut self.leases {
            if *lease == Some(client) {
                *lease = None;
            }
        }
    }

    /// The client's address: the one that it has, or the one that it wants, or the first free one.
    fn lease(&mut self, link: &Link, client: Mac, wanted: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        let first = u32::from(link.addresses.dhcp_start);
        let end = u32::from(link.addresses.broadcast()).min(first + LEASES);
        let usable = |n: usize| {
            let addr = Ipv4Addr::from(first + n as u32);
            !link.addresses.is_own(addr.into())
        };
        self.leases.resize(end.saturating_sub(first) as usize, None);
        let free = |n: &usize| usable(*n) && self.leases[*n].is_none();
        let has = self.leases.iter().position(|l| *l == Some(client));
        let wants = wanted
            .and_then(|w| u32::from(w).checked_sub(first))
            .map(|n| n as usize)
            .filter(|n| *n < self.leases.len() && free(n));
        let index = has
            .or(wants)
            .or_else(|| (0..self.leases.len()).find(free))?;
        self.leases[index] = Some(client);
        Some(Ipv4Addr::from(first + index as u32))
    }
}

fn reply(link: &mut Link, request: &Request<'_>, kind: Option<u8>, addr: Ipv4Addr) {
    let own = link.addresses.host;
    let old = request.bytes;
    let mut out = vec![0u8; OPTIONS_AT];
    out[..4].copy_from_slice(&[BOOT_REPLY, 1, 6, 0]);
    // The transaction, the flags, the relay and the client's hardware address are the request's.
    out[4..8].copy_from_slice(&old[4..8]);
    out[10..12].copy_from_slice(&old[10..12]);
    if kind != Some(message::NAK) {
        out[12..16].copy_from_slice(&old[12..16]);
        out[16..20].copy_from_slice(&addr.octets());
        out[20..24].copy_from_slice(&own.octets());
    }
    out[24..44].copy_from_slice(&old[24..44]);
    out[236..OPTIONS_AT].copy_from_slice(&MAGIC);
    if let Some(kind) = kind {
        push(&mut out, option::MESSAGE_TYPE, &[kind]);
        push(&mut out, option::SERVER, &own.octets());
    }
    if kind == Some(message::NAK) {
        push(
            &mut out,
            option::MESSAGE,
            b"requested address not available",
        );
    } else {
        push_settings(&mut out, link, !addr.is_unspecified());
    }
    out.push(option::END);
    out.resize(out.len().max(SHORTEST), 0);
    // A client that has an address already is told there (RFC 2131, section 4.1), the others by broadcast.
    let broadcast = kind == Some(message::NAK) || request.client_addr.is_unspecified();
    let (mac, dst) = if broadcast {
        (BROADCAST, Ipv4Addr::BROADCAST)
    } else {
        (request.client, request.client_addr)
    };
    let from = SocketAddr::new(own.into(), SERVER_PORT);
    let datagram = udp_datagram(from, SocketAddr::new(dst.into(), CLIENT_PORT), &out);
    let route = link.route(mac, own.into(), IpAddr::V4(dst));
    link.send_ip(&route, protocol::UDP, &datagram);
}

fn push_settings(out: &mut Vec<u8>, link: &Link, leased: bool) {
    let addresses = &link.addresses;
    let config = &link.config;
    push(out, option::SUBNET_MASK, &addresses.mask.octets());
    push(out, option::BROADCAST, &addresses.broadcast().octets());
    if leased {
        push(out, option::LEASE_TIME, &LEASE_TIME.to_be_bytes());
    }
    if !config.restrict {
        push(out, option::ROUTER, &addresses.host.octets());
        push(out, option::NAME_SERVER, &addresses.dns.octets());
    }
    if let Some(name) = &config.hostname {
        push(out, option::HOST_NAME, name.as_bytes());
    }
    if let Some(name) = &config.domainname {
        push(out, option::DOMAIN_NAME, name.as_bytes());
    }
    if config.mtu != 1500 {
        push(out, option::MTU, &config.mtu.to_be_bytes());
    }
    let mut names = Vec::new();
    for domain in &config.dnssearch {
        super::dns::push_name(&mut names, domain);
    }
    // RFC 3396: a long option comes in pieces.
    for piece in names.chunks(255) {
        push(out, option::DOMAIN_SEARCH, piece);
    }
}

/// Adds an option; a value that is too long is left out.
fn push(out: &mut Vec<u8>, code: u8, value: &[u8]) {
    if let Ok(len) = u8::try_from(value.len()) {
        out.extend_from_slice(&[code, len]);
        out.extend_from_slice(value);
    }
}

/// True if a UDP packet to `dst` is for the server.
pub(crate) fn is_for_server(link: &Link, dst: SocketAddr) -> bool {
    let IpAddr::V4(ip) = dst.ip() else {
        return false;
    };
    let own = ip == link.addresses.host || ip.is_broadcast() || ip == link.addresses.broadcast();
    dst.port() == SERVER_PORT && own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::user::config::UserNetConfig;
    use crate::user::wire::{ETHERNET_LEN, IPV4_LEN, UDP_LEN, be16};
    use proptest::prelude::*;

    fn request(client: u8, kind: u8, wanted: Option<Ipv4Addr>) -> Vec<u8> {
        let mut bytes = vec![0u8; OPTIONS_AT];
        bytes[..3].copy_from_slice(&[BOOT_REQUEST, 1, 6]);
        bytes[4..8].copy_from_slice(&[9, 8, 7, 6]);
        bytes[28..34].copy_from_slice(&[2, 0, 0, 0, 0, client]);
        bytes[236..].copy_from_slice(&MAGIC);
        push(&mut bytes, option::MESSAGE_TYPE, &[kind]);
        if let Some(addr) = wanted {
            push(&mut bytes, option::REQUESTED_ADDRESS, &addr.octets());
        }
        bytes.push(option::END);
        bytes
    }

    /// The kind and the address of the answer.
    fn ask(dhcp: &mut Dhcp, link: &mut Link, bytes: &[u8]) -> Option<(u8, Ipv4Addr)> {
        dhcp.input(link, bytes);
        let frame = link.next_frame()?;
        let reply = &frame[ETHERNET_LEN + IPV4_LEN + UDP_LEN..];
        assert_eq!(be16(&frame, ETHERNET_LEN + IPV4_LEN), Some(SERVER_PORT));
        assert_eq!(reply[4..8], [9, 8, 7, 6]);
        assert_eq!(reply[OPTIONS_AT], option::MESSAGE_TYPE);
        Some((reply[OPTIONS_AT + 2], ipv4_at(reply, 16).unwrap()))
    }

    #[test]
    fn the_first_client_gets_the_usual_address_and_keeps_it() {
        let mut link = Link::new(UserNetConfig::default()).unwrap();
        let mut dhcp = Dhcp::default();
        let usual = Ipv4Addr::new(10, 0, 2, 15);
        let discover = request(1, message::DISCOVER, None);
        assert_eq!(
            ask(&mut dhcp, &mut link, &discover),
            Some((message::OFFER, usual))
        );
        let want = request(1, message::REQUEST, Some(usual));
        assert_eq!(
            ask(&mut dhcp, &mut link, &want),
            Some((message::ACK, usual))
        );
        let other = request(2, message::REQUEST, Some(usual));
        assert_eq!(ask(&mut dhcp, &mut link, &other).unwrap().0, message::NAK);
        let discover = request(2, message::DISCOVER, None);
        let second = ask(&mut dhcp, &mut link, &discover).unwrap().1;
        assert_eq!(second, Ipv4Addr::new(10, 0, 2, 16));
    }

    #[test]
    fn addresses_run_out_without_harm() {
        let mut link = Link::new(UserNetConfig::default()).unwrap();
        let mut dhcp = Dhcp::default();
        let got = (0..40)
            .filter(|n| ask(&mut dhcp, &mut link, &request(*n, message::DISCOVER, None)).is_some());
        assert_eq!(got.count(), LEASES as usize);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_server_panic(tail in prop::collection::vec(any::<u8>(), 0..80), cut in 0usize..400) {
            let mut bytes = request(1, message::REQUEST, None);
            bytes.truncate(OPTIONS_AT);
            bytes.extend(tail);
            bytes.truncate(cut);
            let mut link = Link::new(UserNetConfig::default()).unwrap();
            Dhcp::default().input(&mut link, &bytes);
        }
    }
}
