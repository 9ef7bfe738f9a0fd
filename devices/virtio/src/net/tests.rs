use std::io::{IoSlice, IoSliceMut};
use std::time::Instant;

use network_cards::crossover::{Crossover, crossover};
use network_cards::{Checksum, GsoKind, NetQueue, OffloadHeader, Transmit};

use super::spec::{HEADER, control, feature};
use super::*;
use crate::spec::feature as ring;
use crate::testing::{DATA, Guest, PATIENCE};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const RX_BUFFERS: u64 = DATA;
const RX_SIZE: u32 = 2048;
const TX_BUFFER: u64 = DATA + 0x40_0000;
const COMMAND: u64 = DATA + 0x50_0000;

/// Several cables as one link.
#[derive(Debug)]
struct Cables(Vec<Crossover>);

impl NetBackend for Cables {
    fn describe(&self) -> String {
        "cables".into()
    }
    fn max_queue_pairs(&self) -> u16 {
        self.0.len() as u16
    }
    fn transmit_offloads(&self) -> Offloads {
        Offloads::all()
    }
    fn receive_offloads(&self) -> Offloads {
        Offloads::all()
    }
    fn set_offloads(&self, _: Offloads) -> Result<(), NetError> {
        Ok(())
    }
    fn take_queues(&self, pairs: u16) -> Result<Vec<Box<dyn NetQueue>>, NetError> {
        let mut queues = Vec::new();
        for cable in &self.0[..usize::from(pairs)] {
            queues.append(&mut cable.take_queues(1)?);
        }
        Ok(queues)
    }
    fn set_active_queues(&self, _: u16) -> Result<(), NetError> {
        Ok(())
    }
    fn link(&self) -> LinkState {
        LinkState::Up
    }
}

/// The far ends of the cables.
struct Peer(Vec<Box<dyn NetQueue>>);

impl Peer {
    fn send(&mut self, pair: usize, header: &OffloadHeader, frame: &[u8]) {
        let end = Instant::now() + PATIENCE;
        while self.0[pair]
            .transmit(header, &[IoSlice::new(frame)])
            .unwrap()
            != Transmit::Accepted
        {
            assert!(Instant::now() < end);
            std::thread::yield_now();
            self.0[pair].process().unwrap();
        }
    }

    fn try_receive(&mut self, pair: usize) -> Option<(OffloadHeader, Vec<u8>)> {
        let mut space = vec![0; 70_000];
        let mut list = [IoSliceMut::new(&mut space)];
        self.0[pair].process().unwrap();
        let (header, len) = self.0[pair].receive(&mut list).unwrap()?;
        space.truncate(len);
        Some((header, space))
    }

    fn receive(&mut self, pair: usize) -> (OffloadHeader, Vec<u8>) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(frame) = self.try_receive(pair) {
                return frame;
            }
            assert!(Instant::now() < end, "no frame came");
            std::thread::yield_now();
        }
    }
}

fn card(pairs: u16) -> (Guest, Peer, NetHandle) {
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let (a, b) = crossover().unwrap();
        near.push(a);
        far.append(&mut b.take_queues(1).unwrap());
    }
    let options = NetOptions {
        queue_pairs: pairs,
        mtu: Some(1500),
        ..NetOptions::new(MAC)
    };
    let (net, handle) = Net::new(Arc::new(Cables(near)), options).unwrap();
    (Guest::new(net), Peer(far), handle)
}

fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i * 31) as u8).collect();
    frame[..6].copy_from_slice(&to);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame
}

impl Guest {
    /// Adds receive buffers; buffer `n` of the queue lies at `RX_BUFFERS` plus `n` times its size.
    fn post(&mut self, queue: u16, numbers: std::ops::Range<u64>) {
        for n in numbers {
            let at = RX_BUFFERS + n * u64::from(RX_SIZE);
            assert_eq!(self.queue(queue).add(&[(at, RX_SIZE, true)]), Some(n));
        }
        if self.queue(queue).must_kick() {
            self.kick(queue);
        }
    }

    /// Receives a frame: header and content, from as many buffers as it took.
    fn receive(&mut self, queue: u16) -> (OffloadHeader, Vec<u8>, u16) {
        let mut bytes = Vec::new();
        let mut buffers = 0;
        loop {
            let (n, len) = self.used(queue);
            bytes.extend(self.bytes(RX_BUFFERS + n * u64::from(RX_SIZE), len as usize));
            buffers += 1;
            let wanted = u16::from_le_bytes([bytes[10], bytes[11]]);
            if buffers == wanted {
                let mut header = [0; 10];
                header.copy_from_slice(&bytes[..10]);
                let header = OffloadHeader::decode(&header).unwrap();
                return (header, bytes.split_off(HEADER), buffers);
            }
        }
    }

    fn transmit(&mut self, queue: u16, header: &OffloadHeader, frame: &[u8]) -> u64 {
        let mut bytes = header.encode().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(frame);
        self.put(TX_BUFFER, &bytes);
        let len = frame.len() as u32;
        self.send(
            queue,
            &[(TX_BUFFER, 12, false), (TX_BUFFER + 12, len, false)],
        )
    }

    fn command(&mut self, queue: u16, class: u8, command: u8, data: &[u8]) -> u8 {
        self.put(COMMAND, &[class, command]);
        self.put(COMMAND + 2, data);
        let ack = COMMAND + 0x8000;
        self.put(ack, &[0xee]);
        let pieces = [(COMMAND, 2 + data.len() as u32, false), (ack, 1, true)];
        assert_eq!(self.request(queue, &pieces), 1);
        self.bytes(ack, 1)[0]
    }
}

const BASIC: u64 = feature::MRG_RXBUF | feature::STATUS;
/// Everything but the packed format.
const ALL: u64 = !(ring::RING_PACKED | ring::INDIRECT_DESC);

#[test]
fn frames_pass_both_ways_with_every_ring() {
    for (features, indirect) in [
        (BASIC, false),
        (BASIC | ring::EVENT_IDX, false),
        (BASIC | ring::RING_PACKED, false),
        (
            BASIC | ring::RING_PACKED | ring::EVENT_IDX | ring::INDIRECT_DESC,
            true,
        ),
    ] {
        let (mut guest, mut peer, _handle) = card(1);
        guest.start(features, 64);
        for queue in [0, 1] {
            guest.queue(queue).indirect = indirect;
        }
        guest.post(0, 0..64);
        for n in 0..200u64 {
            let out = frame(OTHER, 60 + n as usize);
            let sent = guest.transmit(1, &OffloadHeader::default(), &out);
            assert_eq!(peer.receive(0), (OffloadHeader::default(), out));
            assert_eq!(guest.used(1), (sent, 0));
            let back = frame(MAC, 1514 - n as usize);
            peer.send(0, &OffloadHeader::default(), &back);
            assert_eq!(guest.receive(0), (OffloadHeader::default(), back, 1));
            guest.post(0, n + 64..n + 65);
        }
    }
}

#[test]
fn large_frames_take_several_buffers() {
    let (mut guest, mut peer, _handle) = card(1);
    guest.start(ALL, 64);
    guest.post(0, 0..64);
    let header = OffloadHeader {
        needs_csum: Some(Checksum {
            start: 34,
            offset: 16,
        }),
        gso: GsoKind::Tcp4,
        hdr_len: 54,
        gso_size: 1448,
        ..OffloadHeader::default()
    };
    let large = frame(MAC, 40_000);
    peer.send(0, &header, &large);
    assert_eq!(guest.receive(0), (header, large.clone(), 20));
    peer.send(0, &header, &frame(MAC, 2036));
    assert_eq!(guest.receive(0).2, 1);
    peer.send(0, &header, &frame(MAC, 2037));
    assert_eq!(guest.receive(0).2, 2);
    guest.transmit(1, &header, &large);
    assert_eq!(peer.receive(0), (header, large));
}

#[test]
fn frames_wait_for_buffers_and_for_the_link() {
    let (mut guest, mut peer, _handle) = card(1);
    guest.start(BASIC, 256);
    // The cable holds 256 frames; the card must not lose those behind them.
    for n in 0..250 {
        peer.send(0, &OffloadHeader::default(), &frame(MAC, 60 + n));
    }
    for n in 0..250 {
        guest.post(0, n as u64..n as u64 + 1);
        assert_eq!(guest.receive(0).1, frame(MAC, 60 + n));
    }
    let pieces = [(TX_BUFFER, 12, false), (TX_BUFFER + 12, 60, false)];
    guest.put(TX_BUFFER, &[0; 128]);
    guest.queue(1).indirect = false;
    let mut sent = 0;
    let mut got = 0;
    while sent < 600 {
        while sent < 600 && guest.queue(1).add(&pieces).is_some() {
            sent += 1;
        }
        guest.kick(1);
        while guest.queue(1).used().is_some() {}
        if sent - got > 200 {
            peer.receive(0);
            got += 1;
        }
    }
    while got < 600 {
        peer.receive(0);
        got += 1;
    }
    assert!(peer.try_receive(0).is_none());
}

#[test]
fn the_filter_and_the_address_follow_commands() {
    let (mut guest, mut peer, _handle) = card(1);
    guest.start(ALL & !feature::CTRL_VLAN, 64);
    guest.post(0, 0..64);
    assert_eq!(guest.config::<6>(0), MAC);
    assert_eq!(guest.config_u16(config::MTU), 1500);
    assert_eq!(guest.command(2, control::RX, 0, &[0]), control::OK);
    let group = [1, 0, 0x5e, 0, 0, 1];
    let all_then = |peer: &mut Peer, last: [u8; 6]| {
        for to in [OTHER, group, last] {
            peer.send(0, &OffloadHeader::default(), &frame(to, 64));
        }
    };
    all_then(&mut peer, MAC);
    assert_eq!(guest.receive(0).1, frame(MAC, 64));
    let mut table = vec![1, 0, 0, 0];
    table.extend(OTHER);
    table.extend([0, 0, 0, 0]);
    assert_eq!(guest.command(2, control::MAC, 0, &table), control::OK);
    all_then(&mut peer, MAC);
    assert_eq!(guest.receive(0).1, frame(OTHER, 64));
    assert_eq!(guest.receive(0).1, frame(MAC, 64));
    table.truncate(7);
    assert_eq!(guest.command(2, control::MAC, 0, &table), control::ERR);
    assert_eq!(guest.command(2, control::MAC, 0, &[0xff; 8]), control::ERR);
    assert_eq!(guest.command(2, control::MAC, 1, &group), control::OK);
    assert_eq!(guest.config::<6>(0), group);
    for (class, command) in [(0, 6), (1, 2), (2, 0), (4, 0), (9, 9)] {
        assert_eq!(guest.command(2, class, command, &[1, 0]), control::ERR);
    }
    assert_eq!(guest.command(2, control::RX, 0, &[]), control::ERR);
    let offloads = feature::GUEST_CSUM.to_le_bytes();
    assert_eq!(
        guest.command(2, control::GUEST_OFFLOADS, 0, &offloads),
        control::OK
    );
    assert_eq!(
        guest.command(2, control::GUEST_OFFLOADS, 0, &[0xff; 8]),
        control::ERR
    );
    // A reset opens the filter and restores the address.
    guest.start(BASIC, 64);
    assert_eq!(guest.config::<6>(0), MAC);
    guest.post(0, 0..64);
    all_then(&mut peer, MAC);
    assert_eq!(guest.receive(0).1, frame(OTHER, 64));
}

#[test]
fn the_link_goes_down_and_up() {
    let (mut guest, mut peer, handle) = card(1);
    guest.start(ALL, 64);
    guest.post(0, 0..8);
    assert_eq!(guest.config_u16(config::STATUS), 1);
    handle.set_link(false);
    assert_eq!(guest.config_u16(config::STATUS), 0);
    assert_eq!(guest.interrupts.count(3), 1);
    let sent = guest.transmit(1, &OffloadHeader::default(), &frame(OTHER, 60));
    assert_eq!(guest.used(1), (sent, 0));
    assert!(peer.try_receive(0).is_none());
    peer.send(0, &OffloadHeader::default(), &frame(MAC, 61));
    handle.set_link(true);
    assert_eq!(guest.config_u16(config::STATUS), 1);
    assert_eq!(guest.receive(0).1, frame(MAC, 61));
    handle.announce();
    assert_eq!(guest.config_u16(config::STATUS), 3);
    assert_eq!(guest.command(2, control::ANNOUNCE, 0, &[]), control::OK);
    assert_eq!(guest.config_u16(config::STATUS), 1);
}

#[test]
fn several_pairs_work_side_by_side() {
    let (mut guest, mut peer, _handle) = card(2);
    assert_eq!(guest.config_u16(config::MAX_PAIRS), 2);
    guest.start(ALL & !feature::CTRL_VLAN, 64);
    guest.post(0, 0..8);
    guest.post(2, 0..8);
    peer.send(1, &OffloadHeader::default(), &frame(MAC, 70));
    for pairs in [0u16, 3] {
        let data = pairs.to_le_bytes();
        assert_eq!(guest.command(4, control::MQ, 0, &data), control::ERR);
    }
    assert_eq!(guest.queue(2).used(), None);
    assert_eq!(guest.command(4, control::MQ, 0, &[2, 0]), control::OK);
    assert_eq!(guest.receive(2).1, frame(MAC, 70));
    for pair in 0..2u16 {
        guest.transmit(2 * pair + 1, &OffloadHeader::default(), &frame(OTHER, 80));
        assert_eq!(peer.receive(usize::from(pair)).1, frame(OTHER, 80));
    }
    // Without MQ the control queue is the third one.
    guest.negotiate(BASIC | feature::CTRL_VQ | feature::CTRL_RX);
    for queue in 0..3 {
        guest.add_queue(queue, 64);
    }
    guest.driver_ok();
    assert_eq!(guest.command(2, control::RX, 0, &[1]), control::OK);
}

#[test]
fn frames_that_make_no_sense_are_lost_and_malformed_ones_stop_the_queue() {
    let (mut guest, mut peer, _handle) = card(1);
    guest.start(BASIC, 64);
    let gso = OffloadHeader {
        gso: GsoKind::Tcp6,
        gso_size: 1000,
        ..OffloadHeader::default()
    };
    let sent = guest.transmit(1, &gso, &frame(OTHER, 4000));
    assert_eq!(guest.used(1), (sent, 0));
    guest.put(TX_BUFFER, &[0, 77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    guest.request(1, &[(TX_BUFFER, 72, false)]);
    guest.put(TX_BUFFER, &[0; 12]);
    guest.request(1, &[(DATA, 12, false), (DATA, 100_000, false)]);
    guest.transmit(1, &OffloadHeader::default(), &frame(OTHER, 60));
    assert_eq!(peer.receive(0).1, frame(OTHER, 60));
    guest.send(1, &[(TX_BUFFER, 11, false)]);
    guest.wait_for_failure();
    guest.start(BASIC, 64);
    guest.send(0, &[(RX_BUFFERS, 11, true)]);
    guest.wait_for_failure();
    guest.start(ALL, 64);
    guest.send(2, &[(COMMAND, 2, false)]);
    guest.wait_for_failure();
    guest.start(ALL, 64);
    guest.post(0, 0..4);
    peer.send(0, &OffloadHeader::default(), &frame(MAC, 60));
}

#[test]
fn dependent_features_are_refused_alone() {
    let (a, _b) = crossover().unwrap();
    let (net, _handle) = Net::new(Arc::new(a), NetOptions::new(MAC)).unwrap();
    assert!(net.accepts(net.features()));
    assert!(net.accepts(0));
    for lonely in [
        feature::GUEST_TSO4,
        feature::HOST_TSO6,
        feature::MQ,
        feature::GUEST_ECN | feature::GUEST_CSUM,
        feature::GUEST_ANNOUNCE | feature::CTRL_VQ,
    ] {
        assert!(!net.accepts(lonely));
    }
}

#[test]
fn options_are_checked() {
    let make = |options: NetOptions| {
        let (a, _b) = crossover().unwrap();
        Net::new(Arc::new(a), options).err().map(|e| e.to_string())
    };
    let options = NetOptions::new(MAC);
    let two = NetOptions {
        queue_pairs: 2,
        ..options.clone()
    };
    assert!(make(two).unwrap().contains("1 to 1 queue pairs, not 2"));
    let odd = NetOptions {
        queue_size: 100,
        ..options.clone()
    };
    assert!(make(odd).unwrap().starts_with("queue-size=100"));
    let mtu = NetOptions {
        mtu: Some(10),
        ..options.clone()
    };
    assert!(make(mtu).unwrap().starts_with("mtu=10"));
    let (a, _b) = crossover().unwrap();
    let link: Arc<dyn NetBackend> = Arc::new(a);
    let _first = Net::new(link.clone(), options.clone()).unwrap();
    assert!(matches!(
        Net::new(link, options),
        Err(NetError::QueuesTaken(_))
    ));
}

#[test]
fn the_user_mode_network_answers_the_card() {
    use network_cards::user::{UserNet, UserNetConfig};
    let link = UserNet::new(UserNetConfig::default()).unwrap();
    let (net, _handle) = Net::new(Arc::new(link), NetOptions::new(MAC)).unwrap();
    let mut guest = Guest::new(net);
    for features in [BASIC, ALL] {
        guest.start(features & !feature::CTRL_VLAN, 64);
        guest.post(0, 0..64);
        let mut ask = vec![0xff; 6];
        ask.extend(MAC);
        ask.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        ask.extend(MAC);
        ask.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        ask.resize(60, 0);
        guest.transmit(1, &OffloadHeader::default(), &ask);
        let answer = loop {
            let (_, frame, _) = guest.receive(0);
            if frame[12..14] == [8, 6] {
                break frame;
            }
        };
        assert_eq!(answer[..6], MAC);
        assert_eq!(answer[20..22], [0, 2]);
        assert_eq!(answer[28..32], [10, 0, 2, 2]);
        assert_eq!(answer[32..42], [&MAC[..], &[10, 0, 2, 15]].concat());
    }
}
