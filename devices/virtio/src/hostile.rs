//! Guests that do their worst, against every device: random requests, registers, rings and resets. Nothing may panic, hang,
//! or keep a device from working after its next reset.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use block::executor::{EngineKind, IoThread};
use block::{Disk, DiskOptions, MemoryMedium, RawBackend};
use device_model::{CharBackend, CharFrontend};
use guest_clock::GuestClock;
use network_cards::NetBackend;
use network_cards::crossover::crossover;

use crate::balloon::{Balloon, BalloonOptions};
use crate::blk::{Blk, BlkOptions};
use crate::console::{Console, ConsoleOptions, NamedPort};
use crate::net::{Net, NetOptions};
use crate::rng::Rng;
use crate::spec::{Status, feature};
use crate::testing::{DATA, Guest, RAM};
use crate::vsock::Vsock;

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts panics on any thread, those of devices among them.
fn watch_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        before(info);
    }));
}

/// A generator of the same numbers in each run (Knuth's constants).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 20
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

const REGION: u64 = 0x2_0000;

/// Buffers that are nearly right: readable before writable, mostly in memory, small numbers in them.
fn request(guest: &Guest, n: &mut Numbers) -> Vec<(u64, u32, bool)> {
    let at = DATA + n.below(REGION);
    for field in 0..12 {
        let value = match n.below(4) {
            0 => n.next(),
            1 => n.below(3),
            _ => n.below(16),
        };
        guest.put(at + field * 4, &(value as u32).to_le_bytes());
    }
    let mut writable = n.one_in(3);
    let mut pieces = Vec::new();
    for i in 0..=n.below(5) {
        let addr = match n.below(40) {
            0 => RAM - n.below(64),
            1 => n.next(),
            _ if i == 0 => at,
            _ => DATA + n.below(REGION),
        };
        let len = match n.below(12) {
            0 => n.next() as u32,
            1 => 512,
            2 => 65_000,
            _ => n.below(100) as u32,
        };
        pieces.push((addr, len, writable));
        writable |= n.one_in(3);
        writable &= !n.one_in(50);
    }
    pieces
}

fn step(guest: &mut Guest, n: &mut Numbers, queues: u64) {
    let queue = n.below(queues) as u16;
    match n.below(24) {
        0..14 => {
            let pieces = request(guest, n);
            guest.queue(queue).add(&pieces);
            guest.kick(queue);
        }
        14..18 => {
            // What the device has used, as long as it is what was asked: a driver would stop believing otherwise.
            guest.queue(queue).forget_used();
        }
        18 => guest.kick(n.below(queues + 2) as u16),
        19 => {
            let at = 0x2000 + n.below(64);
            let len = 1 << n.below(4);
            guest.write((at & !(len - 1)) as usize, len as usize, n.next());
        }
        20 => {
            guest.read((0x2000 + n.below(64)) as usize, 1);
        }
        21 => {
            // A wild word in a ring.
            let base = guest.queue(queue).base;
            let at = base + n.below(guest.queue(queue).footprint() / 2) * 2;
            guest.memory.store_u16(at, n.next() as u16).unwrap();
            guest.kick(queue);
        }
        22 if n.one_in(4) => {
            guest.write(22, 2, u64::from(queue));
            guest.write(58, 2, 1);
        }
        _ if n.one_in(6) => guest.set_status(Status::empty()),
        _ => {}
    }
}

fn torment(mut guest: Guest, wanted: u64) {
    let mut n = Numbers(wanted ^ 0x5eed);
    let queues = guest.queues.len() as u64;
    for round in 0..24 {
        let rings = match round % 4 {
            0 => 0,
            1 => feature::EVENT_IDX | feature::INDIRECT_DESC,
            2 => feature::RING_PACKED,
            _ => feature::RING_PACKED | feature::EVENT_IDX | feature::INDIRECT_DESC,
        };
        guest.start(wanted | rings | feature::RING_RESET, 64);
        for queue in 0..queues as u16 {
            guest.queue(queue).indirect = rings & feature::INDIRECT_DESC != 0;
        }
        for _ in 0..150 {
            step(&mut guest, &mut n, queues);
        }
    }
    guest.set_status(Status::empty());
    assert_eq!(guest.status(), Status::empty());
    drop(guest);
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
}

/// All of a device's own features.
const OWN: u64 = 0x07ff_0000_00ff_ffff;

struct Nothing;
impl CharBackend for Nothing {
    fn connect(&self, _: std::sync::Weak<dyn CharFrontend>) {}
    fn write(&self, data: &[u8]) -> usize {
        data.len()
    }
    fn accept_input(&self) {}
    fn is_open(&self) -> bool {
        true
    }
    fn drain(&self, _: Duration) {}
}

#[test]
fn entropy() {
    watch_panics();
    torment(Guest::new(Rng::new(None).unwrap()), OWN);
}

#[test]
fn disk() {
    watch_panics();
    let thread = IoThread::start("disk", EngineKind::Auto).unwrap();
    let options = BlkOptions {
        queues: 2,
        ..BlkOptions::default()
    };
    let (blk, _handle) = Blk::new(thread, options, || async {
        let backend = RawBackend::open(Rc::new(MemoryMedium::new(1 << 20))).await?;
        let options = DiskOptions {
            discard: true,
            ..DiskOptions::default()
        };
        Ok(Disk::new(Rc::new(backend), options))
    })
    .unwrap();
    torment(Guest::new(blk), OWN);
}

#[test]
fn network() {
    watch_panics();
    let (near, far) = crossover().unwrap();
    let (a, _handle) = Net::new(Arc::new(near), NetOptions::new([2; 6])).unwrap();
    // The far end is a queue that nobody reads: frames wait, and then the transmit queue does.
    let far: Arc<dyn NetBackend> = Arc::new(far);
    torment(Guest::new(a), OWN);
    drop(far);
}

#[test]
fn console() {
    watch_panics();
    let (console, _handle) = Console::new(ConsoleOptions {
        console: Some(Arc::new(Nothing)),
        ports: vec![NamedPort {
            name: "port".into(),
            backend: Arc::new(Nothing),
        }],
    })
    .unwrap();
    torment(Guest::new(console), OWN);
}

#[test]
fn balloon() {
    watch_panics();
    let options = BalloonOptions {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let (balloon, handle) = Balloon::new(options, &GuestClock::new()).unwrap();
    handle.poll_statistics(1000);
    torment(Guest::new(balloon), OWN);
}

#[test]
fn sockets() {
    watch_panics();
    let directory = tempfile::tempdir().unwrap();
    let vsock = Vsock::new(9, &directory.path().join("socket")).unwrap();
    torment(Guest::new(vsock), OWN);
}
