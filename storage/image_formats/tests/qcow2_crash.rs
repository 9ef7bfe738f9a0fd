//! The power fails at every write: what was flushed is there, the rest is old or new, and the image
//! checks clean or with leaks alone, which repair removes.

mod support;

use std::cell::RefCell;
use std::rc::Rc;

use block::{BlockFuture, IoBuf, Medium, MemoryMedium, SparseRange, ZeroFlags, executor};
use image_formats::qcow2::{CreateOptions, Repair};
use proptest::prelude::*;
use support::{Model, Op, disk, read_all, reopen, run_op};

/// A medium in memory that remembers what was done to it.
struct Recorder {
    memory: MemoryMedium,
    log: RefCell<Vec<Entry>>,
}

#[derive(Clone)]
enum Entry {
    Write { offset: u64, bytes: Vec<u8> },
    Length(u64),
    Flush,
}

impl Recorder {
    fn position(&self) -> usize {
        self.log.borrow().len()
    }

    fn push(&self, entry: Entry) {
        self.log.borrow_mut().push(entry);
    }
}

impl Medium for Recorder {
    fn name(&self) -> Rc<str> {
        "recorder".into()
    }

    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        self.memory.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        self.push(Entry::Write {
            offset,
            bytes: buf.to_vec(),
        });
        self.memory.write(offset, buf)
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        self.push(Entry::Write {
            offset,
            bytes: vec![0; length as usize],
        });
        self.memory.write_zeroes(offset, length, flags)
    }

    /// A hole is punched: it reads as zeroes.
    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        let length = self.len().clamp(offset, offset + length) - offset;
        self.push(Entry::Write {
            offset,
            bytes: vec![0; length as usize],
        });
        self.memory.write_zeroes(offset, length, ZeroFlags::empty())
    }

    fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        self.memory.preallocate(offset, length)
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        self.push(Entry::Flush);
        self.memory.flush()
    }

    fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
        self.push(Entry::Length(length));
        self.memory.set_len(length)
    }

    fn sparse_range(&self, offset: u64, length: u64) -> block::Result<SparseRange> {
        self.memory.sparse_range(offset, length)
    }
}

/// What an operation may have left, from this place in the log on.
struct Effect {
    from: usize,
    content: Vec<u8>,
}

/// A flush that had ended at this place in the log.
struct Flushed {
    at: usize,
    content: Vec<u8>,
    /// How many effects it covers.
    effects: usize,
}

/// Applies entries; `keep` decides for each sector of each write.
fn apply(image: &mut Vec<u8>, entries: &[Entry], mut keep: impl FnMut() -> bool) {
    for entry in entries {
        match entry {
            Entry::Write { offset, bytes } => {
                let start = *offset as usize;
                let mut at = 0;
                while at < bytes.len() {
                    // Sectors are written whole or not at all.
                    let sector_end = ((start + at) / 512 + 1) * 512 - start;
                    let end = sector_end.min(bytes.len());
                    if keep() {
                        if image.len() < start + end {
                            image.resize(start + end, 0);
                        }
                        image[start + at..start + end].copy_from_slice(&bytes[at..end]);
                    }
                    at = end;
                }
            }
            Entry::Length(length) => {
                if keep() {
                    image.resize(*length as usize, 0);
                }
            }
            Entry::Flush => {}
        }
    }
}

async fn verify(image: Vec<u8>, floor: &[u8], effects: &[Effect], what: &str) {
    let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(image));
    let opened = reopen(&medium).await;
    let report = opened.check(Repair::None).await.unwrap();
    // A flag that says "may be shared" of a cluster that is not costs a copy, no data.
    let harmless =
        |line: &String| line.starts_with("Leaked") || line.starts_with("ERROR OFLAG_COPIED");
    assert!(
        report.messages.iter().all(harmless),
        "{what}: {:?}",
        report.messages
    );
    let seen = read_all(&disk(&opened)).await;
    for (n, sector) in seen.chunks(512).enumerate() {
        let range = n * 512..n * 512 + sector.len();
        let known = sector == &floor[range.clone()]
            || effects.iter().any(|e| sector == &e.content[range.clone()]);
        assert!(known, "{what}: sector {n} has neither old nor new content");
    }
    if report.leaks + report.corruptions > 0 {
        let report = opened.check(Repair::All).await.unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{what}: {:?}",
            report.messages
        );
        assert!(
            read_all(&disk(&opened)).await == seen,
            "{what}: repair changed the content"
        );
    }
}

/// Returns the number of crash points that were tried.
fn run(options: &CreateOptions, ops: &[Op], seed: u64) -> usize {
    executor::block_on(async {
        let recorder = Rc::new(Recorder {
            memory: MemoryMedium::new(0),
            log: RefCell::default(),
        });
        let medium: Rc<dyn Medium> = recorder.clone();
        image_formats::qcow2::create(&medium, &block::Refusing, options)
            .await
            .unwrap();
        let base = recorder.memory.to_vec();
        recorder.log.borrow_mut().clear();
        let mut image = reopen(&medium).await;
        let mut model = Model::new(vec![0; options.size as usize]);
        let mut effects: Vec<Effect> = Vec::new();
        let mut flushes = vec![Flushed {
            at: 0,
            content: model.bytes.clone(),
            effects: 0,
        }];
        for op in ops {
            let from = recorder.position();
            let before = model.bytes.clone();
            image = run_op(&medium, image, &mut model, op).await;
            match op {
                Op::Flush | Op::Reopen => flushes.push(Flushed {
                    at: recorder.position(),
                    content: before,
                    effects: effects.len(),
                }),
                _ => effects.push(Effect {
                    from,
                    content: model.bytes.clone(),
                }),
            }
        }
        let log = recorder.log.borrow().clone();
        let mut durable = base;
        let mut last_flush = 0;
        let mut state = seed | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut points = 0;
        for at in 0..=log.len() {
            if at > 0 && matches!(log[at - 1], Entry::Flush) {
                apply(&mut durable, &log[last_flush..at], || true);
                last_flush = at;
            }
            let flushed = flushes.iter().rev().find(|f| f.at <= at).unwrap();
            let possible: &[Effect] = &effects[flushed.effects..];
            let possible = &possible[..possible.iter().take_while(|e| e.from <= at).count()];
            let pending = &log[last_flush..at];
            for variant in 0..3 {
                let mut image = durable.clone();
                match variant {
                    0 => apply(&mut image, pending, || true),
                    1 => apply(&mut image, pending, || random() % 2 == 0),
                    _ => apply(&mut image, pending, || random() % 8 == 0),
                }
                let what = format!(
                    "power cut before write {at} of {}, variant {variant}",
                    log.len()
                );
                verify(image, &flushed.content, possible, &what).await;
                points += 1;
            }
        }
        points
    })
    .unwrap()
}

/// Operations on a small disk: its size is given by the options.
fn small_ops(size: u64) -> impl Strategy<Value = Vec<Op>> {
    let range = move || {
        (0..size / 512, 1..40u64)
            .prop_map(move |(at, n)| (at * 512, (n * 512).min(size - at * 512)))
    };
    let op = prop_oneof![
        8 => (range(), 1u8..).prop_map(|((at, length), value)| Op::Write { at, length, value }),
        2 => (range(), any::<bool>()).prop_map(|((at, length), unmap)| Op::Zero { at, length, unmap }),
        3 => range().prop_map(|(at, length)| Op::Discard { at, length }),
        3 => Just(Op::Flush),
        1 => Just(Op::Snapshot),
        1 => Just(Op::Apply),
        1 => Just(Op::Delete),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..14)
}

const SMALL: u64 = 96 << 10;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn power_cuts_lose_nothing_that_was_flushed(
        bits in prop_oneof![Just(9u32), Just(10), Just(12), Just(14)],
        refcount in 3u32..=6,
        lazy: bool,
        extended: bool,
        ops in small_ops(SMALL),
        seed: u64,
    ) {
        let options = CreateOptions {
            size: SMALL,
            cluster_size: 1 << bits,
            refcount_bits: 1 << refcount,
            lazy_refcounts: lazy,
            extended_l2: extended && bits >= 14,
            ..CreateOptions::default()
        };
        let points = run(&options, &ops, seed);
        prop_assert!(points >= 3);
        println!("{points} power cuts, seed {seed}");
    }
}
