//! Random operation sequences on qcow2 against a plain model, then the same image read by qemu-img.

mod support;

use std::rc::Rc;

use block::{BlockBackend, IoBuf, Medium, MemoryMedium, executor};
use image_formats::luks;
use image_formats::qcow2::{CreateOptions, Repair};
use proptest::prelude::*;
use support::{
    Model, Op, PASSWORD, SIZE, any_op, any_options, disk, make, qemu_img_ok, read_all, run_op, text,
};

fn run(options: &CreateOptions, ops: &[Op]) -> (Vec<u8>, Model) {
    executor::block_on(async {
        let memory = Rc::new(MemoryMedium::new(0));
        let medium: Rc<dyn Medium> = memory.clone();
        let mut image = make(&medium, options).await;
        let mut model = Model::new(vec![0; SIZE as usize]);
        for op in ops {
            image = run_op(&medium, image, &mut model, op).await;
            let seen = read_all(&disk(&image)).await;
            if seen != model.bytes {
                let at = (0..seen.len())
                    .find(|n| seen[*n] != model.bytes[*n])
                    .unwrap();
                panic!(
                    "after {op:?} byte {at} is {} instead of {}",
                    seen[at], model.bytes[at]
                );
            }
        }
        image.close().await.unwrap();
        drop(image);
        let image = support::reopen(&medium).await;
        assert!(
            read_all(&disk(&image)).await == model.bytes,
            "content changed by closing"
        );
        let report = image.check(Repair::None).await.unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:?}",
            report.messages
        );
        let ids: Vec<String> = image.snapshots().iter().map(|s| s.id.clone()).collect();
        assert_eq!(ids.len(), model.snapshots.len());
        let bytes = memory.to_vec();
        // Each snapshot still has what it had.
        for (id, content) in ids.iter().zip(&model.snapshots) {
            if image.apply_snapshot(id).await.is_ok() {
                assert!(
                    read_all(&disk(&image)).await == *content,
                    "snapshot {id} changed"
                );
            }
        }
        (bytes, model)
    })
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 100, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_match_the_model_and_qemu_img(
        options in any_options(),
        ops in prop::collection::vec(any_op(), 1..30),
    ) {
        let (bytes, model) = run(&options, &ops);
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image.qcow2");
        let raw = directory.path().join("raw");
        std::fs::write(&image, &bytes).unwrap();
        if qemu_img_ok(&["check", "-f", "qcow2", text(&image)]).is_some() {
            qemu_img_ok(&["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
            prop_assert!(std::fs::read(&raw).unwrap() == model.bytes, "qemu-img reads other data");
        }
    }
}

/// A cipher that qemu-img 7.2 knows too.
fn any_encryption() -> impl Strategy<Value = luks::CreateOptions> {
    (any::<bool>(), any::<bool>()).prop_map(|(long, xts)| luks::CreateOptions {
        key_bits: if long { 256 } else { 128 },
        mode: if xts {
            luks::Mode::Xts
        } else {
            luks::Mode::Cbc
        },
        iteration_time: 1,
        secret: Some(luks::Secret::new(PASSWORD.as_bytes())),
        ..luks::CreateOptions::default()
    })
}

/// Encrypted images have no compressed clusters.
fn without_compression(op: Op) -> Op {
    match op {
        Op::Compress { at, value } => Op::Write {
            at: at % (SIZE - 512) / 512 * 512,
            length: 512,
            value,
        },
        op => op,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 100, ..ProptestConfig::default() })]

    #[test]
    fn encrypted_images_match_the_model_and_qemu_img(
        options in any_options(),
        encryption in any_encryption(),
        ops in prop::collection::vec(any_op(), 1..30),
    ) {
        let options = CreateOptions { encryption: Some(encryption), ..options };
        let ops: Vec<Op> = ops.into_iter().map(without_compression).collect();
        let (bytes, model) = run(&options, &ops);
        let directory = tempfile::tempdir().unwrap();
        let (image, raw) = (directory.path().join("image.qcow2"), directory.path().join("raw"));
        std::fs::write(&image, &bytes).unwrap();
        let object = format!("secret,id=s,data={PASSWORD}");
        let name = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", text(&image));
        let with = |verb: &'static str, more: &[&str]| {
            let words = [verb, "--object", &object, "--image-opts", &name];
            qemu_img_ok(&[&words[..], more].concat())
        };
        if with("check", &[]).is_some() {
            with("convert", &["-O", "raw", text(&raw)]);
            prop_assert!(std::fs::read(&raw).unwrap() == model.bytes, "qemu-img reads other data");
        }
    }
}

/// A text in the middle of a cluster, the cluster copied for a snapshot, and then written over in part.
#[test]
fn what_is_encrypted_is_nowhere_in_the_file() {
    const TEXT: &[u8; 32] = b"the quick brown fox jumps over i";
    executor::block_on(async {
        let memory = Rc::new(MemoryMedium::new(0));
        let medium: Rc<dyn Medium> = memory.clone();
        let options = CreateOptions {
            size: SIZE,
            encryption: Some(luks::CreateOptions {
                iteration_time: 1,
                secret: Some(luks::Secret::new(PASSWORD.as_bytes())),
                ..luks::CreateOptions::default()
            }),
            ..CreateOptions::default()
        };
        let image = make(&medium, &options).await;
        let disk = disk(&image);
        let text = IoBuf::from_slice(&TEXT.repeat(16));
        disk.write(5 * 512, text.clone(), false).await.unwrap();
        image.create_snapshot("one", (0, 0)).await.unwrap();
        disk.write(7 * 512, text, false).await.unwrap();
        let seen = read_all(&disk).await;
        assert_eq!(seen[5 * 512..][..32], *TEXT);
        assert_eq!(seen[7 * 512..][..32], *TEXT);
        // What was never written is zeroes, also in the same cluster.
        assert!(seen[6 * 512..7 * 512].iter().all(|byte| *byte == 0));
        assert!(seen[8 * 512..].iter().all(|byte| *byte == 0));
        image.close().await.unwrap();
        let bytes = memory.to_vec();
        assert!(!bytes.windows(32).any(|window| window == TEXT));
    })
    .unwrap();
}

/// Six pieces of compressed data share a cluster; four bits count twelve references, and not eighteen.
#[test]
fn a_snapshot_that_refcounts_have_no_room_for_changes_nothing() {
    let options = CreateOptions {
        size: SIZE,
        cluster_size: 512,
        refcount_bits: 4,
        ..CreateOptions::default()
    };
    let mut ops: Vec<Op> = (0..6)
        .map(|n| Op::Compress {
            at: n * 512,
            value: 1,
        })
        .collect();
    ops.extend([Op::Snapshot, Op::Snapshot]);
    let (_, model) = run(&options, &ops);
    assert_eq!(model.snapshots.len(), 1);
}
