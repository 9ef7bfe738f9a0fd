//! The power fails at every write to an image of another product's format: what was flushed is there,
//! the rest is old or new, and the image checks clean.

mod support;

use std::path::Path;
use std::rc::Rc;

use block::{Medium, MemoryMedium, executor};
use image_formats::qcow2::Repair;
use image_formats::{NewImage, create_file, vdi, vhdx, vmdk, vpc};
use proptest::prelude::*;
use support::plain::{self, Step, steps};
use support::recorder::{Cut, Recorder, Story};
use support::text;

const MIB: u64 = 1 << 20;
/// The size of test disks: a few blocks, the last one in part.
const SIZE: u64 = 3 * MIB + 5 * 4096;

async fn verify(cut: Cut<'_>, format: &str) {
    let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(cut.image.clone()));
    let opened = plain::open(&medium, format).await;
    let tools = opened.format.clone().unwrap();
    let what = &cut.what;
    if let Some(report) = tools.check(Repair::None).await.unwrap() {
        let messages = &report.messages;
        assert_eq!(report.corruptions, 0, "{what}: {messages:?}");
    }
    let seen = plain::content(&opened).await;
    cut.check_content(&seen);
    if let Some(report) = tools.check(Repair::All).await.unwrap() {
        let messages = &report.messages;
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{what}: {messages:?}"
        );
    }
    assert!(
        plain::content(&opened).await == seen,
        "{what}: repair changed it"
    );
}

/// Returns the number of crash points that were tried.
fn run(new: &NewImage, below: &[u8], ops: &[Step], sector: u64, seed: u64) -> usize {
    executor::block_on(async {
        let recorder = Rc::new(Recorder::default());
        let medium: Rc<dyn Medium> = recorder.clone();
        plain::create(&medium, new).await;
        let mut model = below.to_vec();
        let mut story = Story::new(recorder.clone(), model.clone());
        let mut image = plain::open(&medium, new.format()).await;
        for op in ops {
            let from = recorder.position();
            let before = model.clone();
            image = plain::run(&medium, image, &mut model, op, sector).await;
            match op {
                Step::Flush | Step::Reopen => story.flushed(before),
                // One of the writes is forced through, after which nothing is known of the others.
                _ => story.changed(from, model.clone()),
            }
        }
        let verify = async |cut: Cut<'_>| verify(cut, new.format()).await;
        story.cut(seed, verify).await
    })
    .unwrap()
}

/// Makes a parent with data in every other stretch; returns what it holds.
fn make_parent(path: &Path, new: &NewImage, sector: u64) -> Vec<u8> {
    executor::block_on(async {
        let medium = create_file(text(path), block::CacheMode::Unsafe).unwrap();
        plain::create(&medium, new).await;
        let mut image = plain::open(&medium, new.format()).await;
        let mut model = vec![0; SIZE as usize];
        let mut at = 0;
        while at < SIZE {
            let length = 65536.min(SIZE - at);
            let value = 100;
            let step = Step::Write { at, length, value };
            image = plain::run(&medium, image, &mut model, &step, sector).await;
            at += 3 * 65536;
        }
        image.backend.close().await.unwrap();
        model
    })
    .unwrap()
}

fn vhdx_options(parent: Option<String>, sector: u32) -> NewImage {
    NewImage::Vhdx(vhdx::CreateOptions {
        size: SIZE,
        block_size: MIB,
        logical_sector: sector,
        parent,
        ..vhdx::CreateOptions::default()
    })
}

fn vpc_options(parent: Option<String>) -> NewImage {
    NewImage::Vpc(vpc::CreateOptions {
        size: SIZE,
        force_size: true,
        parent,
        ..vpc::CreateOptions::default()
    })
}

fn vmdk_options(parent: Option<String>, zeroed_grain: bool) -> NewImage {
    NewImage::Vmdk(vmdk::CreateOptions {
        size: SIZE,
        zeroed_grain,
        parent,
        ..vmdk::CreateOptions::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn vhdx_loses_nothing_that_was_flushed(
        large: bool,
        ops in prop::collection::vec(steps(SIZE, 4096, 24), 1..14),
        seed: u64,
    ) {
        let sector = if large { 4096 } else { 512 };
        let points = run(&vhdx_options(None, sector), &[0; SIZE as usize], &ops, 4096, seed);
        println!("{points} power cuts, seed {seed}");
    }

    #[test]
    fn differencing_vhdx_loses_nothing_that_was_flushed(
        large: bool,
        ops in prop::collection::vec(steps(SIZE, 4096, 24), 1..14),
        seed: u64,
    ) {
        let sector = if large { 4096 } else { 512 };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("base.vhdx");
        let below = make_parent(&path, &vhdx_options(None, sector), u64::from(sector));
        let new = vhdx_options(Some(text(&path).to_owned()), sector);
        let points = run(&new, &below, &ops, 4096, seed);
        println!("{points} power cuts, seed {seed}");
    }

    #[test]
    fn vpc_loses_nothing_that_was_flushed(
        ops in prop::collection::vec(steps(SIZE, 512, 150), 1..14),
        seed: u64,
    ) {
        let points = run(&vpc_options(None), &[0; SIZE as usize], &ops, 512, seed);
        println!("{points} power cuts, seed {seed}");
    }

    #[test]
    fn differencing_vpc_loses_nothing_that_was_flushed(
        ops in prop::collection::vec(steps(SIZE, 512, 150), 1..14),
        seed: u64,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("base.vhd");
        let below = make_parent(&path, &vpc_options(None), 512);
        let new = vpc_options(Some(text(&path).to_owned()));
        let points = run(&new, &below, &ops, 512, seed);
        println!("{points} power cuts, seed {seed}");
    }

    #[test]
    fn vdi_loses_nothing_that_was_flushed(
        fixed: bool,
        ops in prop::collection::vec(steps(SIZE, 512, 150), 1..14),
        seed: u64,
    ) {
        let new = NewImage::Vdi(vdi::CreateOptions {
            size: SIZE,
            fixed,
            ..vdi::CreateOptions::default()
        });
        let points = run(&new, &[0; SIZE as usize], &ops, 512, seed);
        println!("{points} power cuts, seed {seed}");
    }

    #[test]
    fn vmdk_loses_nothing_that_was_flushed(
        with_parent: bool,
        zeroed: bool,
        ops in prop::collection::vec(steps(SIZE, 512, 150), 1..14),
        seed: u64,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("base.vmdk");
        let (parent, below) = if with_parent {
            let below = make_parent(&path, &vmdk_options(None, false), 512);
            (Some(text(&path).to_owned()), below)
        } else {
            (None, vec![0; SIZE as usize])
        };
        let points = run(&vmdk_options(parent, zeroed), &below, &ops, 512, seed);
        println!("{points} power cuts, seed {seed}");
    }
}
