//! The client on the server: random requests beside a plain vector, and hostile peers.

#[path = "../../../fuzz/src/nbd_peers.rs"]
#[allow(unreachable_pub, missing_docs)]
mod nbd_peers;

use std::os::unix::net::UnixStream;
use std::rc::Rc;

use block::executor::{Socket, block_on, spawn_local};
use block::{
    BlockBackend, DirtyBitmap, Disk, DiskOptions, IoBuf, MemoryMedium, RawBackend, ZeroFlags,
};
use nbd::NbdName;
use nbd::client::NbdDisk;
use nbd::protocol::*;
use nbd::server::{Export, Server};
use proptest::prelude::*;

const SIZE: usize = 200 << 10;

async fn server() -> Rc<Server> {
    let medium = Rc::new(MemoryMedium::new(SIZE));
    let backend = RawBackend::open(medium).await.unwrap();
    let options = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    let disk = Rc::new(Disk::new(Rc::new(backend), options));
    let bitmap = Rc::new(DirtyBitmap::new("b0", SIZE as u64, 4096).unwrap());
    bitmap.set(8192, 4096);
    let export = Export::new("disk", disk, 0, true).unwrap();
    Server::new(vec![Rc::new(export.with_bitmap(bitmap))], None)
}

fn connection(server: &Rc<Server>) -> Socket {
    let (near, far) = UnixStream::pair().unwrap();
    let server = server.clone();
    let far = Socket::new(far.into()).unwrap();
    spawn_local(async move { server.serve(far).await });
    Socket::new(near.into()).unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u8),
    Zero(usize, usize),
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..SIZE, 1..SIZE).prop_map(|(a, n)| (a, n.min(SIZE - a)));
    let step = prop_oneof![
        range().prop_map(|(a, n)| Step::Read(a, n)),
        (range(), any::<u8>()).prop_map(|((a, n), v)| Step::Write(a, n, v)),
        range().prop_map(|(a, n)| Step::Zero(a, n)),
        Just(Step::Flush),
    ];
    proptest::collection::vec(step, 1..30)
}

async fn run_steps(steps: Vec<Step>) {
    let server = server().await;
    let name = NbdName::parse("nbd+unix:///disk?socket=/x").unwrap();
    // Two connections that take turns: what one writes, the other sees.
    let mut disks = Vec::new();
    for _ in 0..2 {
        let connected = NbdDisk::over(connection(&server), &name, true).await;
        disks.push(connected.unwrap());
    }
    let mut model = vec![0; SIZE];
    for (n, step) in steps.into_iter().enumerate() {
        let disk = &disks[n % 2];
        match step {
            Step::Read(at, length) => {
                let buf = IoBuf::zeroed(length);
                disk.read(at as u64, buf.clone()).await.unwrap();
                assert!(buf.to_vec() == model[at..at + length], "step {n}");
            }
            Step::Write(at, length, value) => {
                let buf = IoBuf::from_slice(&vec![value; length]);
                disk.write(at as u64, buf).await.unwrap();
                model[at..at + length].fill(value);
            }
            Step::Zero(at, length) => {
                let flags = ZeroFlags::MAY_UNMAP;
                let zero = disk.write_zeroes(at as u64, length as u64, flags);
                zero.await.unwrap();
                model[at..at + length].fill(0);
            }
            Step::Flush => disk.flush().await.unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn an_export_is_a_vector_of_bytes(steps in steps()) {
        block_on(run_steps(steps)).unwrap();
    }
}

/// The bytes of a client that agrees on extended headers and two contexts, then sends `requests`.
fn client_bytes(requests: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend(encode_option(OptionType::EXTENDED_HEADERS, &[]));
    let contexts = ["base:allocation", "qemu:dirty-bitmap:b0"];
    let selection = encode_contexts_request("disk", &contexts);
    bytes.extend(encode_option(OptionType::SET_META_CONTEXT, &selection));
    bytes.extend(encode_option(
        OptionType::GO,
        &encode_go_request("disk", &[]),
    ));
    requests.iter().for_each(|request| bytes.extend(request));
    bytes
}

fn request(command: Command, flags: CommandFlags, offset: u64, length: u64) -> Vec<u8> {
    let request = Request {
        flags,
        command,
        cookie: 9,
        offset,
        length,
    };
    encode_request(&request, true)
}

/// Everything that the server answers to `bytes`.
fn answers(bytes: Vec<u8>) -> Vec<u8> {
    block_on(async {
        let socket = connection(&server().await);
        socket.write_all(IoBuf::from_slice(&bytes)).await.unwrap();
        let (mut all, buf) = (Vec::new(), IoBuf::zeroed(65536));
        while let Ok(count @ 1..) = socket.read(buf.clone()).await {
            all.extend(buf.slice(0, count).to_vec());
        }
        all
    })
    .unwrap()
}

#[test]
fn extended_block_status_with_a_payload_is_as_specified() {
    let mut status = request(Command::BLOCK_STATUS, CommandFlags::PAYLOAD_LEN, 4096, 12);
    // The effect's length, then the number of the bitmap's context alone.
    status.extend(16384u64.to_be_bytes());
    status.extend(2u32.to_be_bytes());
    let disc = request(Command::DISC, CommandFlags::empty(), 0, 0);
    let got = answers(client_bytes(&[status, disc]));
    let mut expected = b"\x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x09".to_vec();
    expected.extend(4096u64.to_be_bytes());
    expected.extend((8u64 + 3 * 16).to_be_bytes());
    expected.extend(2u32.to_be_bytes());
    expected.extend(3u32.to_be_bytes());
    for (length, flags) in [(4096u64, 0u64), (4096, 1), (8192, 0)] {
        expected.extend(length.to_be_bytes());
        expected.extend(flags.to_be_bytes());
    }
    assert!(got.ends_with(&expected), "{got:02x?}");
}

#[test]
fn bad_requests_are_refused_and_the_connection_goes_on() {
    let empty = CommandFlags::empty();
    let requests = [
        request(Command::READ, empty, SIZE as u64, 1),
        request(Command::READ, empty, u64::MAX, u64::MAX),
        request(Command::WRITE_ZEROES, empty, 1, SIZE as u64),
        request(Command(77), empty, 0, 0),
        request(Command::BLOCK_STATUS, empty, 0, 0),
        request(Command::FLUSH, CommandFlags::from_bits_retain(0x40), 0, 0),
        request(Command::FLUSH, empty, 0, 0),
        request(Command::DISC, empty, 0, 0),
    ];
    let got = answers(client_bytes(&requests));
    let chunks = |kind: &[u8]| {
        let head = [b"\x6e\x8a\x27\x8c\0\x01", kind].concat();
        got.windows(head.len()).filter(|w| *w == head).count()
    };
    assert_eq!(chunks(&[0x80, 1]), 6);
    assert_eq!(chunks(&[0, 0]), 1);
}

/// The bytes of a server that agrees on structured replies and answers what the fuzzed client asks.
fn server_bytes() -> Vec<u8> {
    let mut bytes = INIT_MAGIC.to_be_bytes().to_vec();
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(3u16.to_be_bytes());
    let info = encode_info(&Info::Export(1 << 20, TransmissionFlags::all()));
    let meta = b"\0\0\0\x05base:allocation";
    for (option, kind, data) in [
        (OptionType::EXTENDED_HEADERS, ReplyType::ERR_UNSUP, &[][..]),
        (OptionType::STRUCTURED_REPLY, ReplyType::ACK, &[]),
        (OptionType::SET_META_CONTEXT, ReplyType::META_CONTEXT, meta),
        (OptionType::SET_META_CONTEXT, ReplyType::ACK, &[]),
        (OptionType::GO, ReplyType::INFO, &info),
        (OptionType::GO, ReplyType::ACK, &[]),
    ] {
        bytes.extend(encode_option_reply(option, kind, data));
    }
    let extents = [StatusDescriptor {
        length: 1 << 20,
        flags: 3,
    }];
    let status = encode_status(5, &extents, false);
    let error = encode_error(28, "full", None);
    let hole = b"\0\0\0\0\0\0\0\0\0\0\x02\0";
    for (cookie, kind, payload) in [
        (1, ChunkType::OFFSET_HOLE, &hole[..]),
        (2, ChunkType::BLOCK_STATUS, &status),
        (3, ChunkType::ERROR, &error),
    ] {
        let chunk = Chunk {
            flags: ReplyFlags::DONE,
            kind,
            cookie,
            offset: 0,
            length: payload.len() as u64,
        };
        let (head, used) = chunk_header(&chunk, false);
        bytes.extend(&head[..used]);
        bytes.extend(payload);
    }
    bytes
}

/// A few changed bytes, the same ones for each seed.
fn mutate(bytes: &mut Vec<u8>, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % limit.max(1) as u64) as usize
    };
    for _ in 0..=below(6) {
        let at = below(bytes.len());
        bytes[at] = [0, 1, 2, 0x7f, 0x80, 0xff][below(6)];
    }
    if below(8) == 0 {
        bytes.truncate(below(bytes.len()));
    }
}

#[test]
fn hostile_peers_do_no_harm() {
    let empty = CommandFlags::empty();
    let requests = [
        request(Command::READ, empty, 0, 4096),
        request(Command::BLOCK_STATUS, empty, 0, 65536),
        request(Command::WRITE_ZEROES, empty, 100, 3000),
        request(Command::TRIM, empty, 0, 8192),
    ];
    let client = client_bytes(&requests);
    for seed in 0..300 {
        let (mut as_client, mut as_server) = (client.clone(), server_bytes());
        if seed > 0 {
            mutate(&mut as_client, seed);
            mutate(&mut as_server, seed);
        }
        block_on(async {
            nbd_peers::server(as_client).await;
            nbd_peers::client(as_server).await;
        })
        .unwrap();
    }
}
