//! Ethernet, IPv4 and IPv6 headers: reading the guest's, writing ours.
//!
//! Readers take bytes that were copied out of the guest's reach and answer `None` for what makes no sense.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::checksum::{self, Sum};

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

/// The bytes of an Ethernet header without tags.
pub(crate) const ETHERNET_LEN: usize = 14;
/// The bytes of an IPv4 header without options.
pub(crate) const IPV4_LEN: usize = 20;
/// The bytes of the fixed IPv6 header.
pub(crate) const IPV6_LEN: usize = 40;
/// The bytes of a UDP header.
pub(crate) const UDP_LEN: usize = 8;
/// The bytes of an IPv6 fragment header.
const IPV6_FRAGMENT_LEN: usize = 8;

/// Everybody on the link.
pub(crate) const BROADCAST: Mac = [0xff; 6];

/// EtherType values (IEEE 802 numbers).
pub(crate) mod ethertype {
    pub(crate) const IPV4: u16 = 0x0800;
    pub(crate) const ARP: u16 = 0x0806;
    pub(crate) const IPV6: u16 = 0x86dd;
}

/// Protocol numbers (IANA).
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ICMPV6: u8 = 58;
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const DESTINATION_OPTIONS: u8 = 60;
}

/// The big-endian 16-bit value at `at`.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

/// The big-endian 32-bit value at `at`.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes([four[0], four[1], four[2], four[3]]))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The IPv4 address at `at`.
pub(crate) fn ipv4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    array::<4>(bytes, at).map(Ipv4Addr::from)
}

/// The IPv6 address at `at`.
pub(crate) fn ipv6_at(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    array::<16>(bytes, at).map(Ipv6Addr::from)
}

/// The Ethernet address at `at`.
pub(crate) fn mac_at(bytes: &[u8], at: usize) -> Option<Mac> {
    array::<6>(bytes, at)
}

/// An Ethernet header (IEEE 802.3, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ethernet {
    pub(crate) dst: Mac,
    pub(crate) src: Mac,
    pub(crate) ethertype: u16,
}

impl Ethernet {
    pub(crate) fn parse(frame: &[u8]) -> Option<Self> {
        Some(Self {
            dst: mac_at(frame, 0)?,
            src: mac_at(frame, 6)?,
            ethertype: be16(frame, 12)?,
        })
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.dst);
        out.extend_from_slice(&self.src);
        out.extend_from_slice(&self.ethertype.to_be_bytes());
    }
}

/// Where a fragment belongs in its datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) id: u32,
    /// In bytes.
    pub(crate) offset: usize,
    pub(crate) more: bool,
}

/// What the stack needs to know of an IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    /// Of the payload, behind all extension headers.
    pub(crate) protocol: u8,
    /// Time to live or hop limit.
    pub(crate) ttl: u8,
    /// Where the payload starts, counted from the start of the frame.
    pub(crate) payload_at: usize,
    /// The payload's bytes.
    pub(crate) payload_len: usize,
    /// Set if this is not a whole datagram.
    pub(crate) fragment: Option<Fragment>,
}

impl Ip {
    /// Reads the header behind an Ethernet header. `head` is the start of the frame, `frame_len` the length of all of it.
    pub(crate) fn parse(ethertype: u16, head: &[u8], frame_len: usize) -> Option<Self> {
        match ethertype {
            ethertype::IPV4 => Self::parse_v4(head, frame_len),
            ethertype::IPV6 => Self::parse_v6(head, frame_len),
            _ => None,
        }
    }

    /// The sum over the pseudo header and the payload, which includes the transport's checksum.
    pub(crate) fn checksum(&self, frame: &[IoSlice<'_>], protocol: u8) -> Sum {
        let mut sum = Sum::pseudo(self.src, self.dst, protocol, self.payload_len);
        for part in slices_of(frame, self.payload_at, self.payload_len) {
            sum.add(&part);
        }
        sum
    }

    /// RFC 791, section 3.1.
    fn parse_v4(head: &[u8], frame_len: usize) -> Option<Self> {
        let first = *head.get(ETHERNET_LEN)?;
        let header_len = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || header_len < IPV4_LEN {
            return None;
        }
        let header = head.get(ETHERNET_LEN..ETHERNET_LEN + header_len)?;
        if checksum::of(header) != [0, 0] {
            return None;
        }
        let total = usize::from(be16(header, 2)?);
        if total < header_len || ETHERNET_LEN + total > frame_len {
            return None;
        }
        let flags = be16(header, 6)?;
        let (more, offset) = (flags & 0x2000 != 0, usize::from(flags & 0x1fff) * 8);
        let id = u32::from(be16(header, 4)?);
        Some(Self {
            src: ipv4_at(header, 12)?.into(),
            dst: ipv4_at(header, 16)?.into(),
            protocol: header[9],
            ttl: header[8],
            payload_at: ETHERNET_LEN + header_len,
            payload_len: total - header_len,
            fragment: (more || offset != 0).then_some(Fragment { id, offset, more }),
        })
    }

    /// RFC 8200, sections 3 and 4.
    fn parse_v6(head: &[u8], frame_len: usize) -> Option<Self> {
        let header = head.get(ETHERNET_LEN..ETHERNET_LEN + IPV6_LEN)?;
        let end = ETHERNET_LEN + IPV6_LEN + usize::from(be16(header, 4)?);
        if header[0] >> 4 != 6 || end > frame_len {
            return None;
        }
        let (mut next, mut at, mut fragment) = (header[6], ETHERNET_LEN + IPV6_LEN, None);
        // Each round moves on by eight bytes or more within `head`.
        loop {
            match next {
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS => {
                    next = *head.get(at)?;
                    at += (usize::from(*head.get(at + 1)?) + 1) * 8;
                }
                protocol::FRAGMENT if fragment.is_none() => {
                    next = *head.get(at)?;
                    let word = be16(head, at + 2)?;
                    let place = Fragment {
                        id: be32(head, at + 4)?,
                        offset: usize::from(word & 0xfff8),
                        more: word & 1 != 0,
                    };
                    at += IPV6_FRAGMENT_LEN;
                    fragment = Some(place);
                    if place.offset != 0 {
                        break;
                    }
                }
                _ => break,
            }
        }
        // An "atomic" fragment is a whole datagram (RFC 6946).
        let fragment = fragment.filter(|f| f.more || f.offset != 0);
        Some(Self {
            src: ipv6_at(header, 8)?.into(),
            dst: ipv6_at(header, 24)?.into(),
            protocol: next,
            ttl: header[7],
            payload_at: at,
            payload_len: end.checked_sub(at)?,
            fragment,
        })
    }
}

/// Who a packet of ours goes to and comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) dst_mac: Mac,
    pub(crate) src_mac: Mac,
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
}

impl Route {
    /// The bytes of Ethernet and IP headers.
    pub(crate) fn headers_len(&self) -> usize {
        ETHERNET_LEN
            + if self.src.is_ipv4() {
                IPV4_LEN
            } else {
                IPV6_LEN
            }
    }

    /// Writes Ethernet and IP headers for `payload_len` bytes of `protocol`. The hop limit is 255 for ICMPv6 (neighbour
    /// discovery asks for that) and 64 otherwise.
    pub(crate) fn write(&self, out: &mut Vec<u8>, protocol: u8, payload_len: usize) {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                // Don't fragment; the identification is not needed then (RFC 6864).
                self.write_v4(out, (src, dst), protocol, payload_len, 0, 0x4000);
            }
            (src, dst) => self.write_v6(out, (to_v6(src), to_v6(dst)), protocol, payload_len),
        }
    }

    fn write_v4(
        &self,
        out: &mut Vec<u8>,
        (src, dst): (Ipv4Addr, Ipv4Addr),
        protocol: u8,
        payload_len: usize,
        id: u16,
        flags: u16,
    ) {
        let ethernet = Ethernet {
            dst: self.dst_mac,
            src: self.src_mac,
            ethertype: ethertype::IPV4,
        };
        ethernet.write(out);
        let at = out.len();
        let total = u16::try_from(IPV4_LEN + payload_len).unwrap_or(u16::MAX);
        out.extend_from_slice(&[0x45, 0]);
        out.extend_from_slice(&total.to_be_bytes());
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&[64, protocol, 0, 0]);
        out.extend_from_slice(&src.octets());
        out.extend_from_slice(&dst.octets());
        let sum = checksum::of(&out[at..]);
        out[at + 10..at + 12].copy_from_slice(&sum);
    }

    fn write_v6(
        &self,
        out: &mut Vec<u8>,
        (src, dst): (Ipv6Addr, Ipv6Addr),
        next_header: u8,
        payload_len: usize,
    ) {
        let ethernet = Ethernet {
            dst: self.dst_mac,
            src: self.src_mac,
            ethertype: ethertype::IPV6,
        };
        ethernet.write(out);
        let len = u16::try_from(payload_len).unwrap_or(u16::MAX);
        out.extend_from_slice(&[0x60, 0, 0, 0]);
        out.extend_from_slice(&len.to_be_bytes());
        let hops = if next_header == protocol::ICMPV6 {
            255
        } else {
            64
        };
        out.extend_from_slice(&[next_header, hops]);
        out.extend_from_slice(&src.octets());
        out.extend_from_slice(&dst.octets());
    }

    /// The frames that carry `payload` (with its transport header), fragmented if it is longer than `mtu` allows.
    pub(crate) fn frames(&self, protocol: u8, payload: &[u8], mtu: usize, id: u32) -> Vec<Vec<u8>> {
        let ip_len = self.headers_len() - ETHERNET_LEN;
        if ip_len + payload.len() <= mtu {
            let mut frame = Vec::with_capacity(ETHERNET_LEN + ip_len + payload.len());
            self.write(&mut frame, protocol, payload.len());
            frame.extend_from_slice(payload);
            return vec![frame];
        }
        let header = ip_len
            + if self.src.is_ipv4() {
                0
            } else {
                IPV6_FRAGMENT_LEN
            };
        let step = (mtu.saturating_sub(header) & !7).max(8);
        let last = payload.len().saturating_sub(1) / step;
        let piece =
            |(n, bytes): (usize, &[u8])| self.fragment(protocol, bytes, id, n * step, n != last);
        payload.chunks(step).enumerate().map(piece).collect()
    }

    fn fragment(&self, protocol: u8, bytes: &[u8], id: u32, offset: usize, more: bool) -> Vec<u8> {
        let mut frame = Vec::with_capacity(ETHERNET_LEN + IPV6_LEN + 8 + bytes.len());
        // A datagram is shorter than 64 KiB, so its offsets fit.
        let offset = offset as u16;
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let flags = (offset / 8) | if more { 0x2000 } else { 0 };
                let route = (src, dst);
                self.write_v4(&mut frame, route, protocol, bytes.len(), id as u16, flags);
            }
            (src, dst) => {
                let route = (to_v6(src), to_v6(dst));
                let len = bytes.len() + IPV6_FRAGMENT_LEN;
                self.write_v6(&mut frame, route, protocol::FRAGMENT, len);
                frame.extend_from_slice(&[protocol, 0]);
                frame.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
                frame.extend_from_slice(&id.to_be_bytes());
            }
        }
        frame.extend_from_slice(bytes);
        frame
    }
}

fn to_v6(addr: IpAddr) -> Ipv6Addr {
    match addr {
        IpAddr::V4(a) => a.to_ipv6_mapped(),
        IpAddr::V6(a) => a,
    }
}

/// A UDP header and its payload, with the checksum made.
pub(crate) fn udp_datagram(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let len = UDP_LEN + payload.len();
    let mut out = Vec::with_capacity(len);
    out.extend_from_slice(&src.port().to_be_bytes());
    out.extend_from_slice(&dst.port().to_be_bytes());
    out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(payload);
    let mut sum = Sum::pseudo(src.ip(), dst.ip(), protocol::UDP, len);
    sum.add(&out);
    // Zero would say that there is no checksum (RFC 768).
    let sum = if sum.finish() == [0, 0] {
        [0xff, 0xff]
    } else {
        sum.finish()
    };
    out[6..8].copy_from_slice(&sum);
    out
}

/// The parts of `frame` that hold the bytes from `from` on, `len` of them at most.
pub(crate) fn slices_of<'a>(
    frame: &'a [IoSlice<'a>],
    mut from: usize,
    mut len: usize,
) -> smallvec::SmallVec<[IoSlice<'a>; 24]> {
    let mut parts = smallvec::SmallVec::new();
    for part in frame {
        if len == 0 {
            break;
        }
        if from >= part.len() {
            from -= part.len();
            continue;
        }
        let take = (part.len() - from).min(len);
        parts.push(IoSlice::new(&part[from..from + take]));
        (from, len) = (0, len - take);
    }
    parts
}

/// Copies the start of `frame` to `out`, and answers how much that was.
pub(crate) fn copy_head(frame: &[IoSlice<'_>], out: &mut [u8]) -> usize {
    let mut at = 0;
    for part in frame {
        let take = part.len().min(out.len() - at);
        out[at..at + take].copy_from_slice(&part[..take]);
        at += take;
        if at == out.len() {
            break;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn route(v6: bool) -> Route {
        let addr = |n: u8| -> IpAddr {
            if v6 {
                Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, n.into()).into()
            } else {
                Ipv4Addr::new(10, 0, 2, n).into()
            }
        };
        Route {
            dst_mac: [2; 6],
            src_mac: [4; 6],
            src: addr(2),
            dst: addr(15),
        }
    }

    fn ethertype_of(v6: bool) -> u16 {
        if v6 { ethertype::IPV6 } else { ethertype::IPV4 }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200), v6: bool, extra in 0usize..70_000,
        ) {
            if let Some(ip) = Ip::parse(ethertype_of(v6), &bytes, bytes.len() + extra) {
                prop_assert!(ip.payload_at + ip.payload_len <= bytes.len() + extra);
            }
        }

        #[test]
        fn what_is_written_is_read(len in 0usize..1400, proto in 61u8.., v6: bool) {
            let mut frame = Vec::new();
            route(v6).write(&mut frame, proto, len);
            let at = frame.len();
            frame.resize(at + len, 0);
            let ip = Ip::parse(ethertype_of(v6), &frame, frame.len()).unwrap();
            prop_assert_eq!((ip.src, ip.dst), (route(v6).src, route(v6).dst));
            prop_assert_eq!((ip.protocol, ip.payload_at, ip.payload_len), (proto, at, len));
            prop_assert_eq!(ip.fragment, None);
        }

        #[test]
        fn fragments_cover_the_datagram(len in 1400usize..9000, v6: bool) {
            let payload: Vec<u8> = (0..len).map(|n| n as u8).collect();
            let frames = route(v6).frames(protocol::UDP, &payload, 1280, 7);
            let mut whole = vec![0; len];
            let mut last = 0;
            for frame in &frames {
                prop_assert!(frame.len() <= 1280 + ETHERNET_LEN);
                let ip = Ip::parse(ethertype_of(v6), frame, frame.len()).unwrap();
                let place = ip.fragment.unwrap();
                prop_assert_eq!((place.id, ip.protocol), (7, protocol::UDP));
                let bytes = &frame[ip.payload_at..][..ip.payload_len];
                whole[place.offset..place.offset + bytes.len()].copy_from_slice(bytes);
                last += usize::from(!place.more);
            }
            prop_assert_eq!((whole, last), (payload, 1));
        }

        #[test]
        fn slices_of_a_frame_are_its_bytes(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..8),
            from in 0usize..100, len in 0usize..100,
        ) {
            let whole = parts.concat();
            let slices: Vec<_> = parts.iter().map(|p| IoSlice::new(p)).collect();
            let got: Vec<u8> = slices_of(&slices, from, len).iter().flat_map(|s| s.to_vec()).collect();
            let start = from.min(whole.len());
            prop_assert_eq!(got, &whole[start..(start + len).min(whole.len())]);
        }
    }
}
