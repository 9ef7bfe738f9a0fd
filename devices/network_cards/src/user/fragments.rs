//! Putting fragmented datagrams of the guest together again (RFC 791, section 3.2; RFC 8200, section 4.5).

use std::collections::VecDeque;
use std::net::IpAddr;

use super::timers::Millis;
use super::wire::{Fragment, Ip};

/// How many datagrams can be unfinished; the oldest one gives way.
const UNFINISHED: usize = 32;
/// How long they may take.
const TIMEOUT: Millis = 30_000;
/// The longest payload, in bytes.
const LONGEST: usize = 65_535;
/// A datagram in more pieces than this is not honest.
const PIECES: usize = 256;

#[derive(Debug)]
struct Datagram {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    protocol: u8,
    since: Millis,
    bytes: Vec<u8>,
    /// What has come, as start and end.
    pieces: Vec<(usize, usize)>,
    len: Option<usize>,
}

impl Datagram {
    fn is_of(&self, ip: &Ip, place: &Fragment) -> bool {
        (self.src, self.dst, self.id) == (ip.src, ip.dst, place.id)
            && (ip.src.is_ipv6() || self.protocol == ip.protocol)
    }

    /// Takes a piece. `None`: it contradicts what came before.
    fn add(&mut self, place: &Fragment, piece: &[u8]) -> Option<()> {
        let end = place.offset.checked_add(piece.len())?;
        // All but the last are multiples of eight bytes long.
        let aligned = !place.more || piece.len().is_multiple_of(8);
        if end > LONGEST || piece.is_empty() || !aligned || self.pieces.len() >= PIECES {
            return None;
        }
        if self.pieces.contains(&(place.offset, end)) {
            return Some(());
        }
        // Overlaps serve attacks only (RFC 5722).
        if self
            .pieces
            .iter()
            .any(|(s, e)| place.offset < *e && *s < end)
        {
            return None;
        }
        if !place.more && self.len.replace(end).is_some_and(|old| old != end) {
            return None;
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[place.offset..end].copy_from_slice(piece);
        self.pieces.push((place.offset, end));
        Some(())
    }

    fn is_whole(&self) -> bool {
        let have: usize = self.pieces.iter().map(|(s, e)| e - s).sum();
        self.len == Some(have) && self.bytes.len() == have
    }
}

/// The unfinished datagrams.
#[derive(Debug, Default)]
pub(crate) struct Fragments {
    waiting: VecDeque<Datagram>,
}

impl Fragments {
    /// Takes a fragment, and gives the datagram's protocol and payload when it was the last one missing.
    pub(crate) fn add(
        &mut self,
        ip: &Ip,
        place: &Fragment,
        piece: &[u8],
        now: Millis,
    ) -> Option<(u8, Vec<u8>)> {
        self.expire(now);
        let index = match self.waiting.iter().position(|d| d.is_of(ip, place)) {
            Some(index) => index,
            None => {
                if self.waiting.len() >= UNFINISHED {
                    self.waiting.pop_front();
                }
                self.waiting.push_back(Datagram {
                    src: ip.src,
                    dst: ip.dst,
                    id: place.id,
                    protocol: ip.protocol,
                    since: now,
                    bytes: Vec::new(),
                    pieces: Vec::new(),
                    len: None,
                });
                self.waiting.len() - 1
            }
        };
        let datagram = self.waiting.get_mut(index)?;
        if place.offset == 0 {
            // In IPv6 only the first fragment tells the protocol reliably.
            datagram.protocol = ip.protocol;
        }
        if datagram.add(place, piece).is_none() {
            self.waiting.remove(index);
            return None;
        }
        if !datagram.is_whole() {
            return None;
        }
        self.waiting.remove(index).map(|d| (d.protocol, d.bytes))
    }

    fn expire(&mut self, now: Millis) {
        // They stand in the order of their age.
        while self
            .waiting
            .front()
            .is_some_and(|d| d.since + TIMEOUT <= now)
        {
            self.waiting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::user::wire::{ETHERNET_LEN, Ethernet, Route, ethertype, protocol};
    use proptest::prelude::*;

    fn pieces(v6: bool, payload: &[u8]) -> Vec<(Ip, Vec<u8>)> {
        let addr = |n: u16| -> IpAddr {
            if v6 {
                [0xfec0, 0, 0, 0, 0, 0, 0, n].into()
            } else {
                [10, 0, 2, n as u8].into()
            }
        };
        let route = Route {
            dst_mac: [2; 6],
            src_mac: [4; 6],
            src: addr(15),
            dst: addr(2),
        };
        let frames = route.frames(protocol::UDP, payload, 1280, 77);
        let cut = |frame: Vec<u8>| {
            let ethernet = Ethernet::parse(&frame).unwrap();
            assert_eq!(
                ethernet.ethertype,
                if v6 { ethertype::IPV6 } else { ethertype::IPV4 }
            );
            let ip = Ip::parse(ethernet.ethertype, &frame, frame.len()).unwrap();
            assert!(ip.payload_at >= ETHERNET_LEN);
            (ip, frame[ip.payload_at..][..ip.payload_len].to_vec())
        };
        frames.into_iter().map(cut).collect()
    }

    proptest! {
        #[test]
        fn datagrams_come_together_in_any_order(
            len in 1300usize..20_000, v6: bool, order in prop::collection::vec(any::<prop::sample::Index>(), 40),
        ) {
            let payload: Vec<u8> = (0..len).map(|n| (n / 3) as u8).collect();
            let mut pieces = pieces(v6, &payload);
            for (at, other) in order.iter().enumerate() {
                let n = pieces.len();
                pieces.swap(at % n, other.index(n));
            }
            let mut fragments = Fragments::default();
            let last = pieces.len() - 1;
            for (at, (ip, bytes)) in pieces.iter().enumerate() {
                let whole = fragments.add(ip, &ip.fragment.unwrap(), bytes, 5);
                prop_assert_eq!(whole.is_some(), at == last);
                if let Some((protocol, bytes)) = whole {
                    prop_assert_eq!(protocol, protocol::UDP);
                    prop_assert_eq!(&bytes, &payload);
                }
            }
            prop_assert!(fragments.waiting.is_empty());
        }

        #[test]
        fn wild_fragments_take_bounded_memory(
            places in prop::collection::vec((0u32..40, 0usize..70_000, any::<bool>(), 0usize..3000), 1..200),
        ) {
            let (ip, _) = pieces(false, &[0; 2000])[0].clone();
            let mut fragments = Fragments::default();
            for (id, offset, more, len) in places {
                let place = Fragment { id, offset: offset & !7, more };
                let _ = fragments.add(&ip, &place, &vec![0; len], 0);
                prop_assert!(fragments.waiting.len() <= UNFINISHED);
            }
        }
    }

    #[test]
    fn overlaps_and_late_pieces_are_refused() {
        let all = pieces(false, &[1; 4000]);
        let mut fragments = Fragments::default();
        let place = |n: usize| all[n].0.fragment.unwrap();
        assert!(fragments.add(&all[0].0, &place(0), &all[0].1, 0).is_none());
        let overlap = Fragment {
            offset: 8,
            ..place(0)
        };
        assert!(fragments.add(&all[0].0, &overlap, &all[0].1, 0).is_none());
        assert!(fragments.waiting.is_empty());
        assert!(fragments.add(&all[0].0, &place(0), &all[0].1, 0).is_none());
        assert!(
            fragments
                .add(&all[1].0, &place(1), &all[1].1, TIMEOUT)
                .is_none()
        );
        assert_eq!(fragments.waiting.len(), 1);
    }
}
