//! Tests of the rings: a driver and a device against a plain model, and guests that do their worst.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use guest_memory::{BackingOptions, GuestMemory};
use parking_lot::Mutex;
use proptest::prelude::*;

use super::driver::{DriverQueue, Piece};
use super::*;
use crate::spec::descriptor::{INDIRECT, NEXT, WRITE};

#[derive(Default)]
struct Log {
    signals: AtomicUsize,
    failed: Mutex<Vec<(u16, QueueError)>>,
}

impl QueueEvents for Log {
    fn used(&self, _: u16) {
        self.signals.fetch_add(1, Ordering::SeqCst);
    }
    fn failed(&self, index: u16, error: &QueueError) {
        self.failed.lock().push((index, error.clone()));
    }
}

const RINGS: u64 = 0x1_0000;
const DATA: u64 = 0x8_0000;
const RAM: u64 = 0x10_0000;

/// Memory in two regions that meet in the middle of the rings, so that the slow path is walked too, or in one.
fn memory(scattered: bool) -> GuestMemory {
    let memory = GuestMemory::new();
    let cut = if scattered { RINGS + 0x1000 } else { RAM };
    memory.add_ram(0, cut, BackingOptions::default()).unwrap();
    if cut < RAM {
        memory
            .add_ram(cut, RAM - cut, BackingOptions::default())
            .unwrap();
    }
    memory
}

struct Pair {
    driver: DriverQueue,
    device: Queue,
    log: Arc<Log>,
}

fn pair(features: u64, size: u16, base: u64, scattered: bool) -> Pair {
    let memory = memory(scattered);
    let driver = DriverQueue::new(&memory, base, size, features);
    let log = Arc::new(Log::default());
    let device = Queue::new(&memory, driver.config(3), features, log.clone());
    Pair {
        driver,
        device,
        log,
    }
}

const SPLIT: u64 = feature::VERSION_1 | feature::INDIRECT_DESC;
const PACKED: u64 = SPLIT | feature::RING_PACKED;

#[derive(Debug, Clone)]
enum Step {
    Add { reads: Vec<u32>, writes: Vec<u32> },
    Pop(bool),
    Push(usize),
    Commit,
    Collect,
    Want(bool),
    Doorbell(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let lens = || prop::collection::vec(0u32..600, 0..4);
    prop_oneof![
        4 => (lens(), lens()).prop_filter_map("a request has buffers", |(reads, writes)| {
            (reads.len() + writes.len() > 0).then_some(Step::Add { reads, writes })
        }),
        4 => prop::bool::weighted(0.1).prop_map(Step::Pop),
        4 => any::<usize>().prop_map(Step::Push),
        2 => Just(Step::Commit),
        3 => Just(Step::Collect),
        1 => any::<bool>().prop_map(Step::Want),
        1 => any::<bool>().prop_map(Step::Doorbell),
    ]
}

/// The requests as a plain model sees them.
#[derive(Default)]
struct Model {
    available: VecDeque<(u64, Vec<Piece>)>,
    /// Taken by the device, with what it is to be given back with.
    taken: Vec<(u64, Chain)>,
    pushed: VecDeque<(u64, u32)>,
    published: VecDeque<(u64, u32)>,
}

fn check_chain(memory: &GuestMemory, pieces: &[Piece], chain: &Chain) {
    for writable in [false, true] {
        let side = if writable {
            &chain.writable
        } else {
            &chain.readable
        };
        let expected: usize = pieces
            .iter()
            .filter(|p| p.2 == writable)
            .map(|p| p.1 as usize)
            .sum();
        assert_eq!(side.len(), expected);
        let mut bytes = Vec::new();
        for (addr, len, _) in pieces.iter().filter(|p| p.2 == writable) {
            let mut part = vec![0; *len as usize];
            memory.read(*addr, &mut part).unwrap();
            bytes.extend(part);
        }
        assert_eq!(side.to_vec(usize::MAX), bytes);
    }
}

fn run(mut pair: Pair, steps: &[Step], indirect: &[bool]) {
    let Pair {
        driver,
        device,
        log,
    } = &mut pair;
    let memory = driver.memory.clone();
    let mut model = Model::default();
    let mut at = DATA;
    for (n, step) in steps.iter().enumerate() {
        match step {
            Step::Add { reads, writes } => {
                driver.indirect = indirect[n % indirect.len()];
                let sides = [(reads, false), (writes, true)];
                let mut pieces = Vec::new();
                for (len, writable) in sides
                    .into_iter()
                    .flat_map(|(lens, w)| lens.iter().map(move |l| (*l, w)))
                {
                    at = DATA + (at + 4096 - DATA) % (RAM - DATA);
                    memory.write(at, &vec![n as u8; len as usize]).unwrap();
                    pieces.push((at, len, writable));
                }
                if let Some(request) = driver.add(&pieces) {
                    model.available.push_back((request, pieces));
                }
            }
            Step::Pop(back) => {
                let chain = device.pop();
                assert_eq!(chain.is_some(), !model.available.is_empty());
                if let Some(chain) = chain {
                    check_chain(&memory, &model.available[0].1, &chain);
                    if *back {
                        device.unpop(chain);
                    } else {
                        let (request, _) = model.available.pop_front().unwrap();
                        model.taken.push((request, chain));
                    }
                }
            }
            Step::Push(which) => {
                if !model.taken.is_empty() {
                    let (request, chain) = model.taken.remove(which % model.taken.len());
                    let written = chain.writable.len() as u32;
                    device.push(chain.token, written);
                    model.pushed.push_back((request, written));
                }
            }
            Step::Commit => {
                device.commit();
                model.published.append(&mut model.pushed);
            }
            Step::Collect => loop {
                let used = driver.used();
                assert_eq!(used, model.published.pop_front());
                if used.is_none() {
                    break;
                }
            },
            Step::Want(wanted) => driver.want_signal(*wanted),
            Step::Doorbell(true) => {
                assert_eq!(device.enable_doorbell(), !model.available.is_empty());
            }
            Step::Doorbell(false) => device.disable_doorbell(),
        }
        assert_eq!(device.error(), None);
    }
    device.commit();
    model.published.append(&mut model.pushed);
    while let Some(used) = driver.used() {
        assert_eq!(Some(used), model.published.pop_front());
    }
    assert!(model.published.is_empty() && log.failed.lock().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn driver_and_device_agree(
        steps in prop::collection::vec(step(), 1..250),
        indirect in prop::collection::vec(any::<bool>(), 1..5),
        packed: bool, event_idx: bool, scattered: bool,
        log_size in 0u32..6, odd in 1u16..20,
    ) {
        let mut features = if packed { PACKED } else { SPLIT };
        if event_idx {
            features |= feature::EVENT_IDX;
        }
        let size = if packed { odd } else { 1 << log_size };
        let base = if scattered { RINGS + 0x1000 - 0x40 } else { RINGS };
        run(pair(features, size, base, scattered), &steps, &indirect);
    }

    #[test]
    fn a_wanted_signal_comes_and_an_unwanted_one_does_not(
        packed: bool, event_idx: bool, size in 1u16..9, rounds in prop::collection::vec((1u16..9, any::<bool>()), 1..60),
    ) {
        let mut features = if packed { PACKED } else { SPLIT };
        if event_idx {
            features |= feature::EVENT_IDX;
        }
        let size = size.next_power_of_two();
        let Pair { mut driver, mut device, log } = pair(features, size, RINGS, false);
        for (batch, wanted) in rounds {
            driver.want_signal(wanted);
            let before = log.signals.load(Ordering::SeqCst);
            prop_assert!(!device.enable_doorbell());
            for _ in 0..batch.min(size) {
                driver.add(&[(DATA, 8, true)]).unwrap();
            }
            prop_assert!(driver.must_kick());
            while let Some(chain) = device.pop() {
                device.push(chain.token, 8);
            }
            device.commit();
            device.commit();
            let signals = log.signals.load(Ordering::SeqCst) - before;
            prop_assert_eq!(signals, usize::from(wanted));
            while driver.used().is_some() {}
        }
    }

    #[test]
    fn garbage_in_the_rings_harms_nobody(
        packed: bool, event_idx: bool,
        noise in prop::collection::vec((0u64..0x600, any::<u16>()), 1..400),
        rounds in 1usize..40,
    ) {
        let mut features = if packed { PACKED } else { SPLIT };
        if event_idx {
            features |= feature::EVENT_IDX;
        }
        let Pair { driver, mut device, .. } = pair(features, 16, RINGS, false);
        let per_round = noise.len().div_ceil(rounds);
        for part in noise.chunks(per_round) {
            for (at, value) in part {
                driver.memory.store_u16(RINGS + at * 2 % 0x400, *value).unwrap();
            }
            for _ in 0..40 {
                let Some(chain) = device.pop() else { break };
                prop_assert!(chain.readable.slices().len() <= 2048);
                chain.writable.write_at(0, &[1; 64]);
                device.push(chain.token, 64);
            }
            device.commit();
            device.enable_doorbell();
        }
    }
}

/// A descriptor's four fields.
type Entry = (u64, u32, u16, u16);

/// Puts one descriptor list into a fresh split ring and takes it.
fn first_error(table: &[Entry], features: u64) -> Option<QueueError> {
    let Pair {
        driver,
        mut device,
        log,
    } = pair(features, 8, RINGS, false);
    for (i, d) in table.iter().enumerate() {
        driver.descriptor(RINGS, i as u16, *d);
    }
    driver
        .memory
        .store_u16(driver.driver_area() + 2, 1)
        .unwrap();
    let chain = device.pop();
    assert!(device.pop().is_none());
    let error = device.error().cloned();
    assert_eq!(chain.is_none(), error.is_some());
    let failed = log.failed.lock().clone();
    assert_eq!(
        failed,
        error.iter().map(|e| (3, e.clone())).collect::<Vec<_>>()
    );
    error
}

#[test]
fn hostile_chains_latch_an_error() {
    use QueueError as E;
    let cases: Vec<(&[Entry], u64, QueueError)> = vec![
        // A loop of two.
        (
            &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)],
            SPLIT,
            E::ChainTooLong(8),
        ),
        (
            &[(DATA, 1, NEXT, 8)],
            SPLIT,
            E::DescriptorIndex { index: 8, size: 8 },
        ),
        (
            &[(RAM - 1, 2, 0, 0)],
            SPLIT,
            E::Buffer {
                addr: RAM - 1,
                len: 2,
            },
        ),
        (
            &[(u64::MAX, u32::MAX, WRITE, 0)],
            SPLIT,
            E::Buffer {
                addr: u64::MAX,
                len: u32::MAX,
            },
        ),
        (
            &[(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)],
            SPLIT,
            E::ReadableBehindWritable,
        ),
        (
            &[(RINGS, 16, INDIRECT, 0)],
            SPLIT & !feature::INDIRECT_DESC,
            E::Indirect("that was not negotiated"),
        ),
        (
            &[(RINGS, 16, INDIRECT | NEXT, 0)],
            SPLIT,
            E::Indirect("with a successor"),
        ),
        // The table is itself.
        (
            &[(RINGS, 16, INDIRECT, 0)],
            SPLIT,
            E::Indirect("inside an indirect table"),
        ),
        (&[(RINGS, 0, INDIRECT, 0)], SPLIT, E::IndirectSize(0)),
        (&[(RINGS, 17, INDIRECT, 0)], SPLIT, E::IndirectSize(17)),
        (
            &[(RAM + 16, 16, INDIRECT, 0)],
            SPLIT,
            E::Buffer {
                addr: RAM + 16,
                len: 16,
            },
        ),
        // A table whose one entry leads to itself.
        (
            &[(RINGS + 16, 16, INDIRECT, 0), (DATA, 1, NEXT, 0)],
            SPLIT,
            E::ChainTooLong(1024),
        ),
        (
            &[(RINGS + 16, 16, INDIRECT, 0), (DATA, 1, NEXT, 1)],
            SPLIT,
            E::DescriptorIndex { index: 1, size: 1 },
        ),
    ];
    for (table, features, expected) in cases {
        assert_eq!(first_error(table, features), Some(expected), "{table:x?}");
    }
    assert_eq!(first_error(&[(DATA, 1, 0, 0)], SPLIT), None);
}

#[test]
fn hostile_indices_and_addresses_latch_an_error() {
    let Pair {
        driver, mut device, ..
    } = pair(SPLIT, 8, RINGS, false);
    driver
        .memory
        .store_u16(driver.driver_area() + 2, 9)
        .unwrap();
    assert!(device.pop().is_none());
    assert!(matches!(
        device.error(),
        Some(QueueError::AvailableIndex { index: 9, .. })
    ));
    let memory = memory(false);
    let log = Arc::new(Log::default());
    for (features, change) in [
        (SPLIT, [1u64, 0, 0]),
        (SPLIT, [0, 1, 0]),
        (PACKED, [0, 2, 0]),
        (SPLIT, [RAM, 0, 0]),
        (PACKED, [0, 0, RAM]),
    ] {
        let mut config = DriverQueue::new(&memory, RINGS, 8, features).config(0);
        config.descriptors += change[0];
        config.driver += change[1];
        config.device += change[2];
        let mut queue = Queue::new(&memory, config, features, log.clone());
        assert!(queue.error().is_some(), "{change:x?}");
        assert!(queue.pop().is_none() && !queue.enable_doorbell());
        queue.commit();
    }
    assert_eq!(log.failed.lock().len(), 5);
    let mut config = DriverQueue::new(&memory, RINGS, 8, SPLIT).config(0);
    config.size = 6;
    assert!(Queue::new(&memory, config, SPLIT, log).error().is_some());
}

#[test]
fn a_packed_ring_full_of_one_chain_is_no_loop() {
    let Pair {
        driver, mut device, ..
    } = pair(PACKED, 8, RINGS, false);
    for i in 0..8 {
        driver.descriptor(
            RINGS,
            i,
            (DATA, 1, 0, NEXT | crate::spec::descriptor::AVAIL),
        );
    }
    assert!(device.pop().is_none());
    assert_eq!(device.error(), Some(&QueueError::ChainTooLong(8)));
}

#[test]
fn tokens_of_an_earlier_queue_are_ignored() {
    let Pair {
        mut driver,
        mut device,
        log,
    } = pair(SPLIT, 8, RINGS, false);
    driver.add(&[(DATA, 8, true)]).unwrap();
    let chain = device.pop().unwrap();
    let mut again = Queue::new(&driver.memory, driver.config(3), SPLIT, log);
    again.push(chain.token, 1);
    again.commit();
    assert_eq!(driver.used(), None);
    device.push(chain.token, 1);
    device.commit();
    assert_eq!(driver.used(), Some((0, 1)));
}

#[test]
fn a_ring_whose_memory_goes_away_fails_and_not_the_process() {
    let memory = memory(true);
    let log = Arc::new(Log::default());
    let mut driver = DriverQueue::new(&memory, RINGS + 0x1000, 8, SPLIT);
    let mut device = Queue::new(&memory, driver.config(0), SPLIT, log);
    driver.add(&[(DATA, 8, true)]).unwrap();
    let chain = device.pop().unwrap();
    memory.remove(RINGS + 0x1000).unwrap();
    chain.writable.write_at(0, &[1]);
    device.push(chain.token, 1);
    device.commit();
    assert!(matches!(
        device.error(),
        Some(QueueError::RingNotMemory { .. })
    ));
}
