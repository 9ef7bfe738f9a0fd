//! Frames that no honest guest sends, and honest ones with bytes changed: nothing may panic, and no table may grow without bound.

use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpListener, UdpSocket};

use proptest::prelude::*;

use super::config::UserNetConfig;
use super::stack::Stack;
use super::wire::{Ethernet, Mac, Route, ethertype, protocol, udp_datagram};
use crate::offload::{HEADER_LEN, MAX_FRAME, OffloadHeader, Offloads};

const GUEST: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Something that a guest could send; all but the raw bytes are right until they are changed.
#[derive(Debug, Clone)]
enum Kind {
    Raw(Vec<u8>),
    Arp(Vec<u8>),
    Tcp {
        v6: bool,
        port: u16,
        flags: u8,
        seq: u32,
        ack: u32,
        options: Vec<u8>,
        payload: usize,
    },
    Udp {
        v6: bool,
        to: u8,
        payload: usize,
    },
    Dhcp {
        options: Vec<u8>,
    },
    Icmp {
        v6: bool,
        kind: u8,
        to: u8,
        body: Vec<u8>,
    },
    Fragment {
        v6: bool,
        len: usize,
        which: usize,
    },
    Extensions {
        headers: Vec<u8>,
    },
}

fn kinds() -> impl Strategy<Value = Kind> {
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    prop_oneof![
        bytes(200).prop_map(Kind::Raw),
        bytes(40).prop_map(Kind::Arp),
        (
            any::<bool>(),
            0u16..6,
            prop_oneof![Just(2u8), Just(0x10), Just(0x11), any::<u8>()],
            prop_oneof![Just(1u32), any::<u32>()],
            any::<u32>(),
            bytes(40),
            0usize..5000,
        )
            .prop_map(|(v6, port, flags, seq, ack, options, payload)| Kind::Tcp {
                v6,
                port,
                flags,
                seq,
                ack,
                options,
                payload
            }),
        (any::<bool>(), any::<u8>(), 0usize..4000).prop_map(|(v6, to, payload)| Kind::Udp {
            v6,
            to,
            payload
        }),
        bytes(60).prop_map(|options| Kind::Dhcp { options }),
        (
            any::<bool>(),
            prop_oneof![Just(8u8), 128u8..138, any::<u8>()],
            any::<u8>(),
            bytes(80)
        )
            .prop_map(|(v6, kind, to, body)| Kind::Icmp { v6, kind, to, body }),
        (any::<bool>(), 1300usize..9000, 0usize..8).prop_map(|(v6, len, which)| Kind::Fragment {
            v6,
            len,
            which
        }),
        bytes(120).prop_map(|headers| Kind::Extensions { headers }),
    ]
}

fn route(v6: bool, to: u8) -> Route {
    let (src, dst) = if v6 {
        (
            "fec0::15".parse().unwrap(),
            format!("fec0::{to:x}").parse().unwrap(),
        )
    } else {
        (
            "10.0.2.15".parse().unwrap(),
            std::net::IpAddr::from([10, 0, 2, to]),
        )
    };
    Route {
        dst_mac: [0x52, 0x55, 10, 0, 2, 2],
        src_mac: GUEST,
        src,
        dst,
    }
}

fn packet(route: Route, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    route.write(&mut frame, protocol, payload.len());
    frame.extend_from_slice(payload);
    frame
}

impl Kind {
    /// The frame; `port` is where a server listens.
    fn frame(&self, server: u16) -> Vec<u8> {
        match self {
            Self::Raw(bytes) => bytes.clone(),
            Self::Arp(tail) => {
                let mut frame = Vec::new();
                Ethernet {
                    dst: [0xff; 6],
                    src: GUEST,
                    ethertype: ethertype::ARP,
                }
                .write(&mut frame);
                frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
                frame.extend_from_slice(tail);
                frame
            }
            Self::Tcp {
                v6,
                port,
                flags,
                seq,
                ack,
                options,
                payload,
            } => {
                let mut tcp = Vec::new();
                tcp.extend_from_slice(&(40_000 + port).to_be_bytes());
                tcp.extend_from_slice(&server.to_be_bytes());
                tcp.extend_from_slice(&seq.to_be_bytes());
                tcp.extend_from_slice(&ack.to_be_bytes());
                let words = 5 + options.len() / 4;
                tcp.extend_from_slice(&[(words as u8) << 4, *flags, 0x20, 0, 0, 0, 0, 0]);
                tcp.extend_from_slice(&options[..options.len() / 4 * 4]);
                tcp.resize(tcp.len() + payload, 7);
                packet(route(*v6, 2), protocol::TCP, &tcp)
            }
            Self::Udp { v6, to, payload } => {
                let route = route(*v6, *to);
                let (src, dst) = ((route.src, 5000).into(), SocketAddr::new(route.dst, server));
                packet(
                    route,
                    protocol::UDP,
                    &udp_datagram(src, dst, &vec![1; *payload]),
                )
            }
            Self::Dhcp { options } => {
                let mut bytes = vec![0; 240];
                bytes[..3].copy_from_slice(&[1, 1, 6]);
                bytes[28..34].copy_from_slice(&GUEST);
                bytes[236..].copy_from_slice(&[99, 130, 83, 99]);
                bytes.extend_from_slice(&[53, 1, 3]);
                bytes.extend_from_slice(options);
                let route = route(false, 255);
                let (src, dst) = ((route.src, 68).into(), (route.dst, 67).into());
                packet(route, protocol::UDP, &udp_datagram(src, dst, &bytes))
            }
            Self::Icmp { v6, kind, to, body } => {
                let mut message = vec![*kind, 0, 0, 0];
                message.extend_from_slice(body);
                packet(
                    route(*v6, *to),
                    if *v6 {
                        protocol::ICMPV6
                    } else {
                        protocol::ICMP
                    },
                    &message,
                )
            }
            Self::Fragment { v6, len, which } => {
                let frames = route(*v6, 2).frames(protocol::UDP, &vec![3; *len], 1280, *len as u32);
                frames[which % frames.len()].clone()
            }
            Self::Extensions { headers } => {
                packet(route(true, 2), headers.len() as u8 % 64, headers)
            }
        }
    }
}

#[derive(Debug, Clone)]
struct Step {
    kind: Kind,
    changes: Vec<(prop::sample::Index, u8)>,
    cut: Option<prop::sample::Index>,
    /// Checksums are left to the stack, so that changed frames get past that check.
    offload: bool,
    header: [u8; HEADER_LEN],
    pieces: usize,
    room: usize,
    later: u64,
}

fn steps() -> impl Strategy<Value = Step> {
    let change = (any::<prop::sample::Index>(), any::<u8>());
    (
        kinds(),
        prop::collection::vec(change, 0..4),
        prop::option::weighted(0.1, any::<prop::sample::Index>()),
        prop::bool::weighted(0.8),
        any::<[u8; HEADER_LEN]>(),
        1usize..60,
        prop_oneof![Just(MAX_FRAME), 0usize..3000],
        prop_oneof![Just(0u64), 0u64..500_000],
    )
        .prop_map(
            |(kind, changes, cut, offload, header, pieces, room, later)| Step {
                kind,
                changes,
                cut,
                offload,
                header,
                pieces,
                room,
                later,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 200, ..Default::default() })]

    #[test]
    fn no_frame_does_harm(steps in prop::collection::vec(steps(), 1..80), offloads: u32) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let _same_port = UdpSocket::bind(server);
        let (mut stack, _) = Stack::new(UserNetConfig::default()).unwrap();
        stack.link.only_target = Some(server);
        stack.link.accepted = Offloads::from_bits_truncate(offloads).consistent();
        let mut now = 0;
        for step in steps {
            let mut frame = step.kind.frame(server.port());
            for (at, value) in &step.changes {
                if !frame.is_empty() {
                    let at = at.index(frame.len());
                    frame[at] = *value;
                }
            }
            if let Some(cut) = step.cut {
                frame.truncate(cut.index(frame.len() + 1));
            }
            let mut header = step.header;
            if step.offload {
                header[0] |= 1;
            }
            let header = OffloadHeader::decode(&header).unwrap_or_default();
            let size = frame.len() / step.pieces + 1;
            let parts: Vec<_> = frame.chunks(size).map(IoSlice::new).collect();
            now += step.later;
            stack.transmit(&header, &parts, now);
            stack.process(now).unwrap();
            let mut buffer = vec![0; step.room];
            let (a, b) = buffer.split_at_mut(step.room / 3);
            let mut buffers = [IoSliceMut::new(a), IoSliceMut::new(b)];
            for _ in 0..100 {
                match stack.receive(&mut buffers, now) {
                    Some((_, len)) => prop_assert!(len <= step.room),
                    None => break,
                }
            }
        }
    }
}

/// A guest that opens and resets connections and never fetches an answer, and one that uses every port.
#[test]
fn a_guest_that_only_sends_takes_bounded_memory() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = listener.local_addr().unwrap();
    let _same_port = UdpSocket::bind(server);
    let (mut stack, _) = Stack::new(UserNetConfig::default()).unwrap();
    stack.link.only_target = Some(server);
    let offload = OffloadHeader::decode(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    let tcp = |flags, seq| Kind::Tcp {
        v6: false,
        port: 0,
        flags,
        seq,
        ack: 0,
        options: Vec::new(),
        payload: 0,
    };
    for n in 0..12_000u32 {
        // SYN, and RST with the number that counts.
        for kind in [tcp(2, n), tcp(4, n + 1)] {
            stack.transmit(
                &offload,
                &[IoSlice::new(&kind.frame(server.port()))],
                n.into(),
            );
        }
        while let Ok((stream, _)) = {
            listener.set_nonblocking(true).unwrap();
            listener.accept()
        } {
            drop(stream);
        }
        let route = route(false, 2);
        let src = SocketAddr::new(route.src, 1000 + (n % 5000) as u16);
        let datagram = udp_datagram(src, SocketAddr::new(route.dst, server.port()), b"x");
        let frame = packet(route, protocol::UDP, &datagram);
        stack.transmit(&offload, &[IoSlice::new(&frame)], n.into());
        stack.process(n.into()).unwrap();
    }
    assert!(stack.queued_tokens() < 20_000, "{}", stack.queued_tokens());
    assert!(
        stack.link.timers.len() < 10_000,
        "{}",
        stack.link.timers.len()
    );
}
