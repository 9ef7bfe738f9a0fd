use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::Header;
use super::spec::{HEADER, HOST_CID, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::spec::feature as ring;
use crate::testing::{DATA, Guest, PATIENCE};

const CID: u64 = 7;
const RX_SIZE: u64 = 0x1_1000;
const TX: u64 = DATA + 0x80_0000;
const CREDIT: u32 = 0x2_0000;

struct Vm {
    guest: Guest,
    directory: tempfile::TempDir,
    /// Bytes of data that the guest has taken, for its credit.
    taken: u32,
}

fn vm(features: u64) -> Vm {
    let directory = tempfile::tempdir().unwrap();
    let vsock = Vsock::new(CID, &directory.path().join("vm.sock")).unwrap();
    let mut guest = Guest::new(vsock);
    assert_eq!(guest.config_u64(0), CID);
    guest.start(features | F_STREAM, 64);
    for n in 0..64u64 {
        guest.send(0, &[(DATA + n * RX_SIZE, RX_SIZE as u32, true)]);
    }
    Vm {
        guest,
        directory,
        taken: 0,
    }
}

impl Vm {
    fn path(&self, tail: &str) -> PathBuf {
        self.directory.path().join(format!("vm.sock{tail}"))
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The next packet to the guest.
    fn hear(&mut self) -> (Header, Vec<u8>) {
        let (n, len) = self.guest.used(0);
        let at = DATA + n % 64 * RX_SIZE;
        let bytes = self.guest.bytes(at, len as usize);
        let header = Header::decode(bytes.first_chunk().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        self.taken = self.taken.wrapping_add(header.len);
        self.guest.send(0, &[(at, RX_SIZE as u32, true)]);
        (header, bytes[HEADER..].to_vec())
    }

    fn hear_op(&mut self, op: u16) -> Header {
        let (header, _) = self.hear();
        assert_eq!(header.op, op);
        header
    }

    fn header(&self, ports: (u32, u32), op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.1,
            dst_port: ports.0,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: CREDIT,
            fwd_cnt: self.taken,
        }
    }

    fn say(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.guest.put(TX, &header.encode());
        self.guest.put(TX + HEADER as u64, data);
        let len = (HEADER + data.len()) as u32;
        self.guest.request(1, &[(TX, len, false)]);
    }

    fn tell(&mut self, ports: (u32, u32), op: u16) {
        let header = self.header(ports, op);
        self.say(header, &[]);
    }

    fn shut(&mut self, ports: (u32, u32), flags: u32) {
        let header = self.header(ports, op::SHUTDOWN);
        self.say(Header { flags, ..header }, &[]);
    }

    /// A connection from the host to guest port 52.
    fn open_from_host(&mut self) -> (UnixStream, (u32, u32)) {
        let mut stream = self.connect();
        stream.write_all(b"CONNECT 52\n").unwrap();
        let request = self.hear_op(op::REQUEST);
        assert_eq!(request.dst_port, 52);
        let ports = (request.src_port, 52);
        self.tell(ports, op::RESPONSE);
        let mut line = String::new();
        let mut reader = BufReader::with_capacity(1, &stream);
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", ports.0));
        (stream, ports)
    }

    /// A connection from the guest's port 99 to the host's port 1234.
    fn open_from_guest(&mut self) -> (UnixStream, (u32, u32)) {
        let listener = UnixListener::bind(self.path("_1234")).unwrap();
        let ports = (1234, 99);
        self.tell(ports, op::REQUEST);
        let response = self.hear_op(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), ports);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        std::fs::remove_file(self.path("_1234")).unwrap();
        (stream, ports)
    }
}

#[test]
fn programs_on_the_host_reach_the_guest() {
    for features in [0, ring::RING_PACKED | ring::EVENT_IDX] {
        let mut vm = vm(features);
        let (mut stream, ports) = vm.open_from_host();
        stream.write_all(b"question").unwrap();
        let (header, data) = vm.hear();
        assert_eq!((header.op, data.as_slice()), (op::RW, &b"question"[..]));
        let header = vm.header(ports, op::RW);
        vm.say(header, b"answer");
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(vm.hear_op(op::SHUTDOWN).flags, SHUTDOWN_SEND);
        vm.say(header, b"more");
        vm.shut(ports, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        vm.hear_op(op::RST);
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"more");
    }
}

#[test]
fn programs_in_the_guest_reach_the_host() {
    let mut vm = vm(0);
    let (mut stream, ports) = vm.open_from_guest();
    let header = vm.header(ports, op::RW);
    vm.say(header, b"hello");
    vm.shut(ports, SHUTDOWN_SEND);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"hello");
    stream.write_all(b"bye").unwrap();
    assert_eq!(vm.hear().1, b"bye");
    drop(stream);
    let flags = vm.hear_op(op::SHUTDOWN).flags;
    assert_eq!(flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    vm.tell(ports, op::RST);
    // Nobody listens there any more.
    vm.tell(ports, op::REQUEST);
    vm.hear_op(op::RST);
}

#[test]
fn credit_bounds_what_is_under_way_in_both_directions() {
    let mut vm = vm(0);
    let (mut stream, ports) = vm.open_from_guest();
    let text: Vec<u8> = (0..600_000u32).map(|i| (i >> 3) as u8).collect();
    // To the guest: no more than its room until it says that it has taken some.
    let mut writer = stream.try_clone().unwrap();
    let copy = text.clone();
    let sender = std::thread::spawn(move || writer.write_all(&copy).unwrap());
    let mut got = Vec::new();
    while got.len() < text.len() {
        let room = CREDIT as usize;
        let start = got.len();
        while got.len() - start < room.min(text.len() - start) {
            let (header, data) = vm.hear();
            assert_eq!(header.op, op::RW);
            got.extend(data);
        }
        assert!(got.len() - start <= room);
        std::thread::yield_now();
        assert_eq!(vm.guest.queue(0).used(), None);
        vm.tell(ports, op::CREDIT_UPDATE);
    }
    assert_eq!(got, text);
    sender.join().unwrap();
    // From the guest: our room fills while the program reads nothing.
    let mut sent: u32 = 0;
    let mut room = connection::BUFFER;
    let mut read = Vec::new();
    for part in text.chunks(50_000) {
        while room < 50_000 {
            vm.tell(ports, op::CREDIT_REQUEST);
            let update = vm.hear_op(op::CREDIT_UPDATE);
            room = connection::BUFFER - sent.wrapping_sub(update.fwd_cnt);
            if room < 50_000 {
                let mut some = vec![0; 100_000];
                let n = stream.read(&mut some).unwrap();
                read.extend(&some[..n]);
            }
        }
        let header = vm.header(ports, op::RW);
        vm.say(header, part);
        sent += part.len() as u32;
        room -= part.len() as u32;
        while let Some(update) = unasked_update(&mut vm) {
            room = connection::BUFFER - sent.wrapping_sub(update.fwd_cnt);
        }
    }
    vm.shut(ports, SHUTDOWN_SEND);
    stream.read_to_end(&mut read).unwrap();
    assert_eq!(read, text);
}

/// A credit update that the device sends by itself, if there is one.
fn unasked_update(vm: &mut Vm) -> Option<Header> {
    let (n, len) = vm.guest.queue(0).used()?;
    let at = DATA + n % 64 * RX_SIZE;
    assert_eq!(len as usize, HEADER);
    let header = Header::decode(vm.guest.bytes(at, HEADER).first_chunk().unwrap());
    assert_eq!(header.op, op::CREDIT_UPDATE);
    vm.guest.send(0, &[(at, RX_SIZE as u32, true)]);
    Some(header)
}

#[test]
fn a_guest_that_ignores_credit_or_the_protocol_loses_its_connection() {
    let mut vm = vm(0);
    let (_stream, ports) = vm.open_from_guest();
    let header = vm.header(ports, op::RW);
    let mut resets = 0;
    for _ in 0..40 {
        vm.say(header, &[1; 60_000]);
        if let Some((n, _)) = vm.guest.queue(0).used() {
            let at = DATA + n % 64 * RX_SIZE;
            let header = Header::decode(vm.guest.bytes(at, HEADER).first_chunk().unwrap());
            if header.op == op::RST {
                resets += 1;
                break;
            }
        }
    }
    assert_eq!(resets, 1);
    // A new machine: more answers may be on their way in this one.
    let mut vm = self::vm(0);
    let (_stream, ports) = vm.open_from_guest();
    vm.tell(ports, 77);
    vm.hear_op(op::RST);
    let (_stream, ports) = vm.open_from_guest();
    vm.tell(ports, op::RESPONSE);
    vm.hear_op(op::RST);
    // Things that belong to nothing, or to somebody else.
    for (change, answered) in [
        (vm.header((5, 5), op::RW), true),
        (vm.header((5, 5), op::RST), false),
        (
            Header {
                dst_cid: 9,
                ..vm.header((5, 5), op::REQUEST)
            },
            false,
        ),
        (
            Header {
                kind: 2,
                ..vm.header((5, 5), op::REQUEST)
            },
            true,
        ),
    ] {
        vm.say(change, &[]);
        if answered {
            assert_eq!(vm.hear_op(op::RST).kind, change.kind);
        }
    }
}

#[test]
fn bad_greetings_and_refusals_close_the_socket() {
    let mut vm = vm(0);
    for line in [
        "GET / HTTP/1.0\n",
        "CONNECT\n",
        "CONNECT 1 2\n",
        "CONNECT 99999999999\n",
    ] {
        let mut stream = vm.connect();
        stream.write_all(line.as_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let mut endless = vm.connect();
    endless.write_all(&[b'x'; 64]).unwrap();
    assert_ne!(endless.read(&mut [0]).ok(), Some(1));
    let mut stream = vm.connect();
    stream.write_all(b"CONNECT 52\n").unwrap();
    let request = vm.hear_op(op::REQUEST);
    vm.tell((request.src_port, 52), op::RST);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // A program that leaves before the answer.
    let mut stream = vm.connect();
    stream.write_all(b"CONNECT 52\n").unwrap();
    vm.hear_op(op::REQUEST);
    drop(stream);
    vm.hear_op(op::RST);
}

#[test]
fn a_reset_closes_all_connections() {
    let mut vm = vm(0);
    let (mut stream, _) = vm.open_from_host();
    vm.guest.start(F_STREAM, 64);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn malformed_packets_stop_the_queue() {
    for (queue, piece) in [
        (0, (DATA, 44, true)),
        (1, (TX, 43, false)),
        (1, (TX, 44, false)),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let vsock = Vsock::new(CID, &directory.path().join("vm.sock")).unwrap();
        let mut guest = Guest::new(vsock);
        guest.start(F_STREAM, 64);
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            kind: TYPE_STREAM,
            len: 1,
            ..Header::decode(&[0; HEADER])
        };
        guest.put(TX, &header.encode());
        guest.send(queue, &[piece]);
        if queue == 0 {
            // Buffers are looked at when there is something for them.
            let header = Header {
                op: op::RW,
                len: 0,
                ..header
            };
            guest.put(TX, &header.encode());
            guest.send(1, &[(TX, 44, false)]);
        }
        guest.wait_for_failure();
    }
}

#[test]
fn the_socket_and_the_context_id_are_checked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.sock");
    for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(matches!(Vsock::new(cid, &path), Err(VsockError::Cid(_))));
    }
    let first = Vsock::new(3, &path).unwrap();
    let second = Vsock::new(4, &path).err().unwrap();
    assert!(second.to_string().contains("vm.sock"));
    drop(first);
    assert!(!path.exists());
}
