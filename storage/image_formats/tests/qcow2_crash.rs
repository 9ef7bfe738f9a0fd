//! The power fails at every write: what was flushed is there, the rest is old or new, and the image
//! checks clean or with leaks alone, which repair removes.

mod support;

use std::rc::Rc;

use block::{BlockBackend, Medium, MemoryMedium, executor};
use image_formats::qcow2::{CreateOptions, Qcow2, Repair};
use proptest::prelude::*;
use support::recorder::{Cut, Recorder, Story};
use support::{Model, Op, disk, read_all, reopen, run_op};

async fn verify(cut: Cut<'_>) {
    let what = &cut.what;
    let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(cut.image.clone()));
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
    cut.check_content(&seen);
    check_bitmap(&opened, &seen, what).await;
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

/// The bitmap was added when all of the disk was zero. If it can be trusted, it knows all that is not.
async fn check_bitmap(image: &Qcow2, seen: &[u8], what: &str) {
    let Some(info) = image.bitmaps().pop() else {
        return;
    };
    if info.in_use {
        assert!(image.bitmap(BITMAP).await.is_err(), "{what}");
        return;
    }
    let bitmap = image.bitmap(BITMAP).await.unwrap();
    for (n, sector) in seen.chunks(512).enumerate() {
        let written = sector.iter().any(|byte| *byte != 0);
        assert!(
            !written || bitmap.is_dirty(n as u64 * 512),
            "{what}: the bitmap does not know of sector {n}"
        );
    }
}

const BITMAP: &str = "since the beginning";

/// Returns the number of crash points that were tried.
fn run(options: &CreateOptions, with_bitmap: bool, ops: &[Op], seed: u64) -> usize {
    executor::block_on(async {
        let recorder = Rc::new(Recorder::default());
        let medium: Rc<dyn Medium> = recorder.clone();
        image_formats::qcow2::create(&medium, &block::Refusing, options)
            .await
            .unwrap();
        if with_bitmap {
            let image = reopen(&medium).await;
            image.add_bitmap(BITMAP, Some(512), true).unwrap();
            image.close().await.unwrap();
        }
        let mut model = Model::new(vec![0; options.size as usize]);
        let mut story = Story::new(recorder.clone(), model.bytes.clone());
        let mut image = reopen(&medium).await;
        for op in ops {
            let from = recorder.position();
            let before = model.bytes.clone();
            image = run_op(&medium, image, &mut model, op).await;
            match op {
                Op::Flush | Op::Reopen => story.flushed(before),
                _ => story.changed(from, model.bytes.clone()),
            }
        }
        story.cut(seed, verify).await
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
        with_bitmap: bool,
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
        let points = run(&options, with_bitmap, &ops, seed);
        prop_assert!(points >= 3);
        println!("{points} power cuts, seed {seed}");
    }
}
