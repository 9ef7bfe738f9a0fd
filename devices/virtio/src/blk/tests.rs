use std::path::Path;

use block::executor::EngineKind;
use block::{DiskOptions, MemoryMedium, RawBackend};

use super::spec::{Status, feature, request};
use super::*;
use crate::queue::driver::Piece;
use crate::spec::feature as ring;
use crate::testing::{DATA, Guest, RAM};

const MIB: u64 = 1 << 20;
/// Where tests put headers, data and status.
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

fn device(options: BlkOptions, disk: DiskOptions) -> (Guest, BlkHandle) {
    let thread = IoThread::start("disk", EngineKind::Auto).unwrap();
    let (blk, handle) = Blk::new(thread, options, move || async move {
        let medium = Rc::new(MemoryMedium::new(8 << 20));
        let backend = RawBackend::open(medium).await?;
        Ok(Disk::new(Rc::new(backend), disk))
    })
    .unwrap();
    (Guest::new(blk), handle)
}

/// A disk in a file, so that requests really are under way.
fn on_file(kind: EngineKind) -> (Guest, BlkHandle) {
    let thread = IoThread::start("disk", kind).unwrap();
    let options = BlkOptions {
        queues: 2,
        ..BlkOptions::default()
    };
    let (blk, handle) = Blk::new(thread, options, || async {
        let file = block::HostFile::temporary(&std::env::temp_dir())?;
        block::Medium::set_len(&file, 8 * MIB).await?;
        let backend = RawBackend::open(Rc::new(file)).await?;
        Ok(Disk::new(Rc::new(backend), DiskOptions::default()))
    })
    .unwrap();
    (Guest::new(blk), handle)
}

fn plain() -> (Guest, BlkHandle) {
    let options = BlkOptions {
        queues: 2,
        serial: "a-serial-number-that-is-long".into(),
        ..BlkOptions::default()
    };
    let disk = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    device(options, disk)
}

impl Guest {
    pub(super) fn blk_header(&self, at: u64, kind: u32, sector: u64) -> Piece {
        let mut header = [0; request::HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(at, &header);
        (at, request::HEADER as u32, false)
    }

    /// One request on queue 0; returns its status byte.
    pub(super) fn blk(&mut self, kind: u32, sector: u64, data: &[Piece]) -> u8 {
        let mut pieces = vec![self.blk_header(HEADER, kind, sector)];
        pieces.extend_from_slice(data);
        pieces.push((STATUS, 1, true));
        self.put(STATUS, &[0xee]);
        let writable: u32 = pieces.iter().filter(|p| p.2).map(|p| p.1).sum();
        assert_eq!(self.request(0, &pieces), writable);
        self.bytes(STATUS, 1)[0]
    }
}

#[test]
fn reads_what_was_written_with_every_ring() {
    let (mut guest, handle) = plain();
    for (n, features) in [
        0,
        ring::EVENT_IDX,
        ring::RING_PACKED,
        ring::RING_PACKED | ring::EVENT_IDX | ring::INDIRECT_DESC,
    ]
    .into_iter()
    .enumerate()
    {
        guest.start(features | !(ring::RING_PACKED | ring::EVENT_IDX), 16);
        guest.queue(0).indirect = n == 3;
        let data: Vec<u8> = (0..1536u32).map(|i| (i * 7 + n as u32) as u8).collect();
        guest.put(BUFFER, &data);
        let out = [(BUFFER, 700, false), (BUFFER + 700, 836, false)];
        assert_eq!(guest.blk(request::OUT, 9, &out), 0);
        let back = [(BUFFER + 0x1000, 1, true), (BUFFER + 0x1001, 1535, true)];
        assert_eq!(guest.blk(request::IN, 9, &back), 0);
        assert_eq!(guest.bytes(BUFFER + 0x1000, 1536), data);
        assert_eq!(guest.blk(request::FLUSH, 0, &[]), 0);
    }
    let counted = handle.state().unwrap().statistics;
    assert_eq!(
        (
            counted.reads.done,
            counted.writes.done,
            counted.flushes.done
        ),
        (4, 4, 4)
    );
}

#[test]
fn many_requests_are_in_flight_on_all_queues() {
    many_requests(plain());
    many_requests(on_file(EngineKind::Auto));
    many_requests(on_file(EngineKind::Threads));
}

fn many_requests((mut guest, _handle): (Guest, BlkHandle)) {
    guest.start(ring::EVENT_IDX, 128);
    for round in 0..8u64 {
        for queue in 0..2u16 {
            for i in 0..32u64 {
                let slot = (u64::from(queue) * 32 + i) * 0x2000;
                let header = guest.blk_header(HEADER + slot, request::OUT, slot / 512);
                guest.put(BUFFER + slot, &[(round * 64 + i) as u8 ^ queue as u8; 512]);
                let pieces = [
                    header,
                    (BUFFER + slot, 512, false),
                    (STATUS + slot, 1, true),
                ];
                guest.send(queue, &pieces);
            }
        }
        for queue in 0..2 {
            for _ in 0..32 {
                assert_eq!(guest.used(queue).1, 1);
            }
        }
    }
    for i in 0..64u64 {
        let back = [(BUFFER, 512, true)];
        assert_eq!(guest.blk(request::IN, i * 16, &back), 0);
        let (queue, i) = (i / 32, i % 32);
        assert_eq!(
            guest.bytes(BUFFER, 512),
            [(7 * 64 + i) as u8 ^ queue as u8; 512]
        );
    }
}

#[test]
fn bad_requests_get_their_status() {
    let (mut guest, _handle) = plain();
    guest.start(!ring::RING_PACKED, 16);
    let data = |len| [(BUFFER, len, true)];
    let error = Status::IoError as u8;
    assert_eq!(guest.blk(request::IN, 16383, &data(512)), 0);
    assert_eq!(guest.blk(request::IN, 16384, &data(512)), error);
    assert_eq!(guest.blk(request::IN, 16383, &data(1024)), error);
    assert_eq!(guest.blk(request::IN, u64::MAX, &data(512)), error);
    assert_eq!(guest.blk(request::IN, 1 << 55, &data(512)), error);
    assert_eq!(guest.blk(request::IN, 0, &data(511)), error);
    assert_eq!(
        guest.blk(request::OUT, 16384, &[(BUFFER, 512, false)]),
        error
    );
    assert_eq!(guest.blk(77, 0, &[]), Status::Unsupported as u8);
    assert_eq!(guest.blk(request::DISCARD, 0, &[]), error);
    assert_eq!(
        guest.blk(request::DISCARD, 0, &[(BUFFER, 15, false)]),
        error
    );
}

#[test]
fn discard_and_write_zeroes() {
    let (mut guest, _handle) = plain();
    guest.start(!ring::RING_PACKED, 16);
    guest.put(BUFFER, &[5; 4096]);
    assert_eq!(guest.blk(request::OUT, 8, &[(BUFFER, 4096, false)]), 0);
    let range = |guest: &Guest, sector: u64, count: u32, flags: u32| -> [Piece; 1] {
        guest.put(BUFFER, &sector.to_le_bytes());
        guest.put(BUFFER + 8, &count.to_le_bytes());
        guest.put(BUFFER + 12, &flags.to_le_bytes());
        [(BUFFER, 16, false)]
    };
    let zeroes = range(&guest, 9, 2, request::UNMAP);
    assert_eq!(guest.blk(request::WRITE_ZEROES, 0, &zeroes), 0);
    assert_eq!(guest.blk(request::IN, 8, &[(BUFFER, 2048, true)]), 0);
    let mut expected = [5; 2048];
    expected[512..1536].fill(0);
    assert_eq!(guest.bytes(BUFFER, 2048), expected);
    for (kind, sector, count, flags, status) in [
        (request::DISCARD, 8, 8, 0, Status::Ok),
        (request::DISCARD, 8, 8, request::UNMAP, Status::Unsupported),
        (request::WRITE_ZEROES, 8, 8, 2, Status::Unsupported),
        (request::DISCARD, 16380, 8, 0, Status::IoError),
        (request::DISCARD, u64::MAX, 8, 0, Status::IoError),
        (request::WRITE_ZEROES, 0, u32::MAX, 0, Status::IoError),
    ] {
        let range = range(&guest, sector, count, flags);
        assert_eq!(guest.blk(kind, 0, &range), status as u8);
    }
}

#[test]
fn configuration_identity_and_size_changes() {
    let (mut guest, handle) = plain();
    guest.start(!ring::RING_PACKED, 16);
    guest.queue(0).indirect = true;
    assert_eq!(guest.config_u64(config::CAPACITY), 8 * MIB / 512);
    assert_eq!(guest.config_u32(config::SEG_MAX), 254);
    assert_eq!(guest.config_u32(config::BLK_SIZE), 512);
    assert_eq!(guest.config_u16(config::NUM_QUEUES), 2);
    assert_eq!(guest.config::<1>(config::WRITEBACK), [1]);
    guest.write(0x2000 + config::WRITEBACK, 1, 0);
    guest.write(0x2000 + config::CAPACITY, 4, 0);
    assert_eq!(guest.config::<1>(config::WRITEBACK), [0]);
    guest.put(BUFFER, &[1; 512]);
    assert_eq!(guest.blk(request::OUT, 0, &[(BUFFER, 512, false)]), 0);
    assert_eq!(guest.blk(request::GET_ID, 0, &[(BUFFER, 20, true)]), 0);
    assert_eq!(guest.bytes(BUFFER, 20), *b"a-serial-number-that");
    let generation = guest.read(21, 1);
    handle.resize(9 * MIB).unwrap();
    assert_ne!(guest.read(21, 1), generation);
    assert_eq!(guest.interrupts.count(2), 1);
    assert_eq!(guest.config_u64(config::CAPACITY), 9 * MIB / 512);
    assert_eq!(guest.blk(request::IN, 16384, &[(BUFFER, 512, true)]), 0);
    guest.start(0, 16);
    assert_eq!(guest.config::<1>(config::WRITEBACK), [0]);
}

#[test]
fn read_only_disks_say_so_and_refuse() {
    let disk = DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    };
    let (mut guest, _handle) = device(BlkOptions::default(), disk);
    assert_eq!(
        guest.offered() & (feature::RO | feature::DISCARD | feature::CONFIG_WCE),
        feature::RO
    );
    guest.start(feature::RO, 16);
    guest.put(BUFFER, &[1; 512]);
    assert_eq!(guest.blk(request::OUT, 0, &[(BUFFER, 512, false)]), 1);
    assert_eq!(guest.blk(request::IN, 0, &[(BUFFER, 512, true)]), 0);
    assert_eq!(guest.bytes(BUFFER, 512), [0; 512]);
}

#[test]
fn malformed_requests_stop_the_queue_and_a_reset_heals() {
    let (mut guest, _handle) = plain();
    for pieces in [
        vec![(HEADER, 15, false), (STATUS, 1, true)],
        vec![(HEADER, 16, false)],
        vec![(HEADER, 16, false), (RAM, 512, true), (STATUS, 1, true)],
    ] {
        guest.start(0, 16);
        guest.send(1, &pieces);
        guest.wait_for_failure();
    }
    guest.start(0, 16);
    assert_eq!(guest.blk(request::IN, 0, &[(BUFFER, 512, true)]), 0);
}

#[test]
fn resets_in_the_middle_of_work_leave_nothing_behind() {
    resets_in_the_middle(plain());
    resets_in_the_middle(on_file(EngineKind::Auto));
    resets_in_the_middle(on_file(EngineKind::Threads));
}

fn resets_in_the_middle((mut guest, _handle): (Guest, BlkHandle)) {
    for round in 0..30u64 {
        guest.start(if round % 2 == 0 { 0 } else { ring::RING_PACKED }, 64);
        for i in 0..12u64 {
            let header = guest.blk_header(HEADER + i * 32, request::IN, i);
            let pieces = [header, (BUFFER + i * 4096, 4096, true), (STATUS, 1, true)];
            guest.send((i % 2) as u16, &pieces);
        }
        guest.set_status(crate::spec::Status::empty());
        guest.put(BUFFER, &[0xa5; 12 * 4096]);
        std::thread::yield_now();
        assert_eq!(guest.bytes(BUFFER, 12 * 4096), [0xa5; 12 * 4096]);
    }
}

#[test]
fn options_and_opening_are_checked() {
    let open = |options, path: &'static str| {
        let thread = IoThread::start("disk", EngineKind::Auto).unwrap();
        let made = Blk::new(thread, options, move || async move {
            let options = block::FileOptions::default();
            let file = block::HostFile::open(Path::new(path), &options)?;
            let backend = RawBackend::open(Rc::new(file)).await?;
            Ok(Disk::new(Rc::new(backend), DiskOptions::default()))
        });
        made.err().map(|e| e.kind())
    };
    let options = BlkOptions::default();
    assert_eq!(
        open(options.clone(), "/nowhere/at/all"),
        Some(block::ErrorKind::NotFound)
    );
    let bad = [
        BlkOptions {
            queues: 0,
            ..options.clone()
        },
        BlkOptions {
            queue_size: 100,
            ..options.clone()
        },
        BlkOptions {
            queue_size: 2048,
            ..options
        },
    ];
    for options in bad {
        assert_eq!(
            open(options, "/nowhere"),
            Some(block::ErrorKind::InvalidArgument)
        );
    }
}
