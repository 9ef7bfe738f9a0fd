//! The user-mode network between a wild guest and a real server on the loopback interface: frames of every protocol that the
//! stack knows, a guest's TCP that follows the conversation unless told otherwise, forwarded ports, and time.

use std::cell::RefCell;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use network_cards::offload::{HEADER_LEN, MAX_FRAME, OffloadHeader, Offloads};
use network_cards::user::{HostForward, SteppedNet, Transport, UserNetConfig};

use crate::input::Input;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// The gateway's and the group addresses that frames go to.
const MACS: [[u8; 6]; 3] = [
    [0x52, 0x55, 10, 0, 2, 2],
    [0xff; 6],
    [0x33, 0x33, 0, 0, 0, 1],
];
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// The guest's connections.
const CONNECTIONS: usize = 4;
/// Sockets that the host's side keeps.
const SOCKETS: usize = 8;

thread_local! {
    /// The server: made once, since a machine has only so many ports.
    static SERVER: RefCell<Option<(TcpListener, UdpSocket)>> = const { RefCell::new(None) };
}

fn server() -> (TcpListener, UdpSocket) {
    let (listener, datagrams) = loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        // The same port of the other protocol may be taken.
        if let Ok(datagrams) = UdpSocket::bind(address) {
            break (listener, datagrams);
        }
    };
    listener.set_nonblocking(true).expect("a socket");
    datagrams.set_nonblocking(true).expect("a socket");
    (listener, datagrams)
}

/// A socket of the host's side that leaves nothing behind when it is closed.
fn tame(stream: &TcpStream) {
    let _ = stream.set_nonblocking(true);
    let _ = rustix::net::sockopt::set_socket_linger(stream, Some(std::time::Duration::ZERO));
}

/// A connection as the guest sees it.
#[derive(Clone, Copy, Default)]
struct Connection {
    /// Next sequence number that the guest sends.
    next: u32,
    /// Next one that it expects.
    expected: u32,
}

struct Link {
    net: SteppedNet,
    now: u64,
    server: SocketAddr,
    forwards: Vec<SocketAddr>,
    connections: [Connection; CONNECTIONS],
    /// The peers of the last connections from the host, by the guest's port.
    callers: Vec<(IpAddr, u16)>,
    streams: Vec<TcpStream>,
    fragment: u16,
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut total = start;
    for pair in bytes.chunks(2) {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        total += u32::from(word);
    }
    while total > 0xffff {
        total = (total >> 16) + (total & 0xffff);
    }
    !(total as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The sum of the pseudo header and the payload.
fn full_sum(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> u16 {
    let mut pseudo = octets(src);
    pseudo.extend(octets(dst));
    pseudo.extend((payload.len() as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    let start = u32::from(!sum(&pseudo, 0));
    sum(payload, start)
}

impl Link {
    fn new(server: SocketAddr) -> Self {
        let forward = |transport, guest: Option<&str>| HostForward {
            transport,
            host: "127.0.0.1:0".parse().expect("an address"),
            guest_addr: guest.map(|text| text.parse().expect("an address")),
            guest_port: 80,
        };
        let config = UserNetConfig {
            hostfwd: vec![
                forward(Transport::Tcp, None),
                forward(Transport::Tcp, Some("fec0::15")),
                forward(Transport::Udp, None),
            ],
            hostname: Some("guest".into()),
            domainname: Some("example".into()),
            dnssearch: vec!["example.org".into()],
            resolv_conf: "/nonexistent".into(),
            ..UserNetConfig::default()
        };
        let (net, forwards) = SteppedNet::new(config, server).expect("the network");
        Self {
            net,
            now: 0,
            server,
            forwards,
            connections: Default::default(),
            callers: Vec::new(),
            streams: Vec::new(),
            fragment: 0,
        }
    }

    /// The guest's address and the one that it talks to.
    fn addresses(v6: bool, input: &mut Input<'_>) -> (IpAddr, IpAddr) {
        let to = input.byte();
        let to = if to < 200 { 2 } else { to };
        if v6 {
            let dst = match to {
                250.. => "ff02::1".to_owned(),
                _ => format!("fec0::{to:x}"),
            };
            let src = input.pick(&["fec0::15", "fec0::15", "fec0::15", "fe80::15", "::"]);
            (
                src.parse().expect("an address"),
                dst.parse().expect("an address"),
            )
        } else {
            let src = input.pick(&[[10, 0, 2, 15], [10, 0, 2, 15], [10, 0, 2, 16], [0; 4]]);
            (src.into(), [10, 0, 2, to].into())
        }
    }

    /// A packet around a payload. Fragments now and then.
    fn packet(
        &mut self,
        (src, dst): (IpAddr, IpAddr),
        protocol: u8,
        payload: &[u8],
        input: &mut Input<'_>,
    ) -> Vec<u8> {
        let mut frame = input
            .pick(&[MACS[0], MACS[0], MACS[0], MACS[1], MACS[2]])
            .to_vec();
        frame.extend(GUEST_MAC);
        let how = input.byte();
        let fragment = if how & 0xf0 == 0 {
            self.fragment = self.fragment.wrapping_add(u16::from(how & 1));
            u16::from(input.byte() & 63) | u16::from(how & 2) << 12
        } else {
            0
        };
        if src.is_ipv4() {
            frame.extend([8, 0]);
            let mut header = vec![0x45, 0];
            header.extend((20 + payload.len() as u16).to_be_bytes());
            header.extend(self.fragment.to_be_bytes());
            header.extend(fragment.to_be_bytes());
            header.extend([64, protocol, 0, 0]);
            header.extend(octets(src));
            header.extend(octets(dst));
            let checksum = sum(&header, 0).to_be_bytes();
            header[10..12].copy_from_slice(&checksum);
            frame.extend(header);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            let mut extensions = Vec::new();
            let mut next = protocol;
            if fragment != 0 {
                extensions.extend([protocol, 0]);
                let place = (fragment & 0x1fff) << 3 | fragment >> 13;
                extensions.extend(place.to_be_bytes());
                extensions.extend(u32::from(self.fragment).to_be_bytes());
                next = 44;
            } else if how == 0x10 {
                let kind = input.pick(&[0, 43, 60]);
                extensions.extend([protocol, input.byte() & 3]);
                extensions.extend(input.bytes(6));
                next = kind;
            }
            frame.extend(((extensions.len() + payload.len()) as u16).to_be_bytes());
            let hops = if how == 0x11 { 64 } else { 255 };
            frame.extend([next, hops]);
            frame.extend(octets(src));
            frame.extend(octets(dst));
            frame.extend(extensions);
        }
        frame.extend(payload);
        frame
    }

    /// A segment of one of the guest's connections, or of one that the host has made.
    fn tcp(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let how = input.byte();
        let number = usize::from(how & 3);
        let connection = &mut self.connections[number];
        let kind = input.byte();
        let (flags, advance) = match kind {
            0..60 => (SYN, 1),
            60..180 => (ACK, 0),
            180..210 => (ACK | 8, 0),
            210..225 => (ACK | FIN, 1),
            225..232 => (SYN | ACK, 1),
            232..240 => (4, 0),
            _ => (input.byte(), 0),
        };
        let count = match input.byte() {
            0..128 => 0,
            128..224 => usize::from(input.byte()),
            224..248 => 1400,
            _ => usize::from(input.word(2) as u16),
        };
        let count = if flags == SYN { 0 } else { count };
        let wild = how & 0x70 == 0;
        let (seq_off, ack_off) = if wild {
            (input.number() as u32, input.number() as u32)
        } else {
            (0, 0)
        };
        let caller = self.callers.get(number).copied().filter(|_| how & 4 != 0);
        let v6 = caller.is_some_and(|(peer, _)| peer.is_ipv6());
        let (mut src, mut dst) = Self::addresses(v6, input);
        let mut ports = (40_000 + number as u16, self.server.port());
        if let Some((peer, port)) = caller {
            src = if v6 { "fec0::15" } else { "10.0.2.15" }
                .parse()
                .expect("an address");
            (dst, ports) = (peer, (80, port));
        }
        let mut options: Vec<u8> = Vec::new();
        if flags & SYN != 0 {
            options.extend([2, 4]);
            options.extend((input.word(2) as u16).to_be_bytes());
            options.extend([1, 3, 3, input.byte() & 15]);
        }
        if how & 0x80 != 0 {
            options.extend(input.bytes(8));
            options.resize(options.len().next_multiple_of(4), 0);
        }
        let mut segment = Vec::new();
        segment.extend(ports.0.to_be_bytes());
        segment.extend(ports.1.to_be_bytes());
        segment.extend(connection.next.wrapping_add(seq_off).to_be_bytes());
        segment.extend(connection.expected.wrapping_add(ack_off).to_be_bytes());
        segment.extend([((5 + options.len() / 4) as u8) << 4, flags]);
        segment.extend(match how & 8 {
            0 => [0xff, 0xff],
            _ => [input.byte() & 3, input.byte()],
        });
        segment.extend([0; 4]);
        segment.extend(options);
        segment.resize((segment.len() + count).min(65_000), 7);
        if !wild {
            connection.next = connection.next.wrapping_add(advance + count as u32);
        }
        self.packet((src, dst), TCP, &segment, input)
    }

    fn udp(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let ports = [self.server.port(), self.server.port(), 53, 67, 80, 0];
        let port = input.pick(&ports);
        let (src, dst) = Self::addresses(input.byte() & 3 == 0, input);
        let mut body = match port {
            67 => {
                let mut dhcp = vec![0; 240];
                dhcp[..3].copy_from_slice(&[1, 1, 6]);
                dhcp[28..34].copy_from_slice(&GUEST_MAC);
                dhcp[236..].copy_from_slice(&[99, 130, 83, 99]);
                dhcp.extend([53, 1, input.byte() & 15]);
                let count = usize::from(input.byte());
                dhcp.extend(input.bytes(count));
                dhcp
            }
            _ => {
                let count = usize::from(input.byte());
                input.bytes(count).to_vec()
            }
        };
        if input.one_in(16) {
            body.resize(usize::from(input.word(2) as u16).min(65_000), 3);
        }
        let mut datagram = Vec::new();
        let from = if port == 67 {
            68
        } else {
            5000 + u16::from(input.byte() & 7)
        };
        datagram.extend(from.to_be_bytes());
        datagram.extend(port.to_be_bytes());
        datagram.extend((8 + body.len() as u16).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(body);
        let checksum = full_sum(src, dst, UDP, &datagram).to_be_bytes();
        datagram[6..8].copy_from_slice(&checksum);
        self.packet((src, dst), UDP, &datagram, input)
    }

    fn icmp(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let v6 = input.byte() & 1 != 0;
        let (src, dst) = Self::addresses(v6, input);
        let kinds: &[u8] = if v6 {
            &[128, 129, 133, 134, 135, 135, 136, 137, 1, 2, 143]
        } else {
            &[8, 8, 0, 3, 13]
        };
        let mut message = vec![input.pick(kinds), input.byte() & 3, 0, 0];
        let count = usize::from(input.byte());
        if input.one_in(3) {
            message.extend([0; 4]);
            message.extend(octets(dst));
            message.extend([1, 1]);
            message.extend(GUEST_MAC);
        }
        message.extend(input.bytes(count));
        let checksum = if v6 {
            full_sum(src, dst, ICMPV6, &message)
        } else {
            sum(&message, 0)
        };
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        let protocol = if v6 { ICMPV6 } else { ICMP };
        self.packet((src, dst), protocol, &message, input)
    }

    fn arp(input: &mut Input<'_>) -> Vec<u8> {
        let mut frame = MACS[1].to_vec();
        frame.extend(GUEST_MAC);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1 + (input.byte() & 1)]);
        frame.extend(GUEST_MAC);
        frame.extend([10, 0, 2, 15 + (input.byte() & 3)]);
        frame.extend([0; 6]);
        frame.extend([10, 0, 2, input.pick(&[2, 3, 15, 99])]);
        frame
    }

    /// The guest sends a frame, perhaps with bytes changed.
    fn send(&mut self, input: &mut Input<'_>) {
        let mut frame = match input.byte() {
            0..140 => self.tcp(input),
            140..180 => self.udp(input),
            180..210 => self.icmp(input),
            210..240 => Self::arp(input),
            _ => {
                let count = usize::from(input.byte());
                input.bytes(count).to_vec()
            }
        };
        if input.one_in(8) {
            let at = input.below(frame.len().min(100) as u64) as usize;
            if let Some(byte) = frame.get_mut(at) {
                *byte = input.byte();
            }
        }
        if input.one_in(40) {
            frame.truncate(input.below(frame.len() as u64 + 1) as usize);
        }
        // Checksums of TCP are left to the stack.
        let mut header = [0; HEADER_LEN];
        header[0] = 1;
        if input.one_in(20) {
            for (to, from) in header.iter_mut().zip(input.bytes(HEADER_LEN)) {
                *to = *from;
            }
        }
        let header = OffloadHeader::decode(&header).unwrap_or_default();
        let size = frame.len() / usize::from(1 + input.byte() % 5) + 1;
        let parts: Vec<_> = frame.chunks(size).map(IoSlice::new).collect();
        self.net.transmit(&header, &parts, self.now);
    }

    /// Fetches what there is for the guest, at most so many frames with so much room.
    fn fetch(&mut self, most: usize, room: usize) {
        let mut buffer = vec![0; room];
        for _ in 0..most {
            let (a, b) = buffer.split_at_mut(room / 3);
            let mut buffers = [IoSliceMut::new(a), IoSliceMut::new(b)];
            match self.net.receive(&mut buffers, self.now) {
                Some((_, length)) => {
                    assert!(length <= room, "a frame longer than its buffers");
                    self.hear(&buffer[..length]);
                }
                None => return,
            }
        }
    }

    /// Follows the conversation.
    fn hear(&mut self, frame: &[u8]) {
        let (peer, at): (IpAddr, usize) = match frame.get(12..14) {
            Some([8, 0]) if frame.len() >= 54 && frame[23] == TCP => {
                let octets: [u8; 4] = std::array::from_fn(|i| frame[26 + i]);
                (octets.into(), 34)
            }
            Some([0x86, 0xdd]) if frame.len() >= 74 && frame[20] == TCP => {
                let octets: [u8; 16] = std::array::from_fn(|i| frame[22 + i]);
                (octets.into(), 54)
            }
            _ => return,
        };
        let tcp = &frame[at..];
        let word = |i: usize| u32::from_be_bytes(std::array::from_fn(|n| tcp[i + n]));
        let [from, to] = [0, 2].map(|i| u16::from_be_bytes([tcp[i], tcp[i + 1]]));
        let flags = tcp[13];
        let number = if to == 80 {
            let caller = (peer, from);
            let known = self.callers.iter().position(|c| *c == caller);
            known.unwrap_or_else(|| {
                self.callers.push(caller);
                if self.callers.len() > CONNECTIONS {
                    self.callers.remove(0);
                }
                self.callers.len() - 1
            })
        } else {
            usize::from(to.wrapping_sub(40_000))
        };
        let Some(connection) = self.connections.get_mut(number) else {
            return;
        };
        let header = usize::from(tcp[12] >> 4) * 4;
        let data = tcp.len().saturating_sub(header) as u32;
        let ends = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        connection.expected = word(4).wrapping_add(data + ends);
    }

    /// The host's programs do something.
    fn outside(&mut self, (listener, datagrams): &(TcpListener, UdpSocket), input: &mut Input<'_>) {
        match input.byte() {
            0..80 => {
                if let Ok((stream, _)) = listener.accept() {
                    tame(&stream);
                    self.streams.push(stream);
                }
            }
            80..120 => {
                let to = self.forwards[usize::from(input.byte() & 1)];
                if let Ok(stream) = TcpStream::connect(to) {
                    tame(&stream);
                    self.streams.push(stream);
                }
            }
            120..140 => {
                let _ = datagrams.send_to(input.bytes(40), self.forwards[2]);
                let mut buffer = [0; 2000];
                if let Ok((count, from)) = datagrams.recv_from(&mut buffer) {
                    let _ = datagrams.send_to(&buffer[..count], from);
                }
            }
            how => {
                let which = input.below(self.streams.len() as u64) as usize;
                let Some(stream) = self.streams.get_mut(which) else {
                    return;
                };
                match how & 7 {
                    0 => drop(self.streams.remove(which)),
                    1 => drop(stream.shutdown(std::net::Shutdown::Write)),
                    2 | 3 => drop(stream.read(&mut [0; 4096])),
                    _ => {
                        let count = input.word(2) as usize;
                        let _ = stream.write(&vec![9; count]);
                    }
                }
            }
        }
        if self.streams.len() > SOCKETS {
            self.streams.remove(0);
        }
    }

    fn step(&mut self, server: &(TcpListener, UdpSocket), input: &mut Input<'_>) {
        match input.byte() {
            0..140 => self.send(input),
            140..180 => self.outside(server, input),
            180..220 => {
                self.net
                    .process(self.now)
                    .expect("sockets can be waited for");
                self.fetch(8, MAX_FRAME);
            }
            220..230 => {
                let room = usize::from(input.word(2) as u16 & 0xfff);
                self.fetch(4, room);
            }
            230..236 => {
                let bits = input.word(1) as u32;
                self.net.set_offloads(Offloads::from_bits_truncate(bits));
            }
            _ => {
                self.now += input.word(3) >> (input.byte() % 24);
                self.net
                    .process(self.now)
                    .expect("sockets can be waited for");
            }
        }
    }
}

/// A conversation. Nothing may panic or hang.
pub fn conversation(data: &[u8]) {
    let server = SERVER.with_borrow_mut(|kept| kept.take().unwrap_or_else(server));
    let address = server.0.local_addr().expect("it is bound");
    let mut link = Link::new(address);
    let mut input = Input::new(data);
    while input.more() {
        link.step(&server, &mut input);
    }
    drop(link);
    // What the guest has opened and nobody has accepted.
    while let Ok((stream, _)) = server.0.accept() {
        tame(&stream);
    }
    while server.1.recv(&mut [0; 16]).is_ok() {}
    SERVER.set(Some(server));
}
