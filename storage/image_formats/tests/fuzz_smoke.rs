//! The fuzz targets on their corpus and on seeded random changes of it.

#[path = "../../../fuzz/src/images.rs"]
#[allow(unreachable_pub)]
mod images;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod seeds;

use std::path::Path;
use std::time::{Duration, Instant};

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

/// Changes a few bytes, mostly to values that mean something in binary formats.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(8) {
        let at = match random.below(3) {
            0 => random.below(112),
            1 => random.below(bytes.len().min(4096)),
            _ => random.below(bytes.len()),
        };
        let values = [0, 1, 2, 0x7f, 0x80, 0xff, random.below(256) as u8];
        if let Some(byte) = bytes.get_mut(at) {
            *byte = values[random.below(values.len())];
        }
    }
    if random.below(16) == 0 {
        bytes.truncate(random.below(bytes.len()));
    }
}

fn smoke(target: &str, run: fn(&[u8]), rounds: usize) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "the corpus is there");
    let begin = Instant::now();
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        run(&bytes);
        for seed in 1..=rounds {
            // On a slow machine fewer rounds; which ones does not depend on time.
            if begin.elapsed() > Duration::from_secs(30) {
                return;
            }
            let mut random = Random(seed as u64 * 0x9e37_79b9);
            let mut changed = bytes.clone();
            mutate(&mut changed, &mut random);
            run(&changed);
        }
    }
}

#[test]
fn damaged_qcow2_images_do_no_harm() {
    smoke("qcow2", images::qcow2, 300);
}

/// As [`smoke`], with the fuzzers' common way of changing samples.
fn bombard(target: &'static str, run: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    let samples: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    assert!(!samples.is_empty(), "the corpus is there");
    let size = (2000, 64 << 10);
    seeds::smoke(target, run, &samples, size, Duration::from_secs(10));
}

#[test]
fn damaged_vpc_images_do_no_harm() {
    bombard("vpc", images::vpc);
}

#[test]
fn damaged_vhdx_images_do_no_harm() {
    bombard("vhdx", images::vhdx);
}

#[test]
fn damaged_qed_images_do_no_harm() {
    bombard("qed", images::qed);
}

#[test]
fn damaged_parallels_images_do_no_harm() {
    bombard("parallels", images::parallels);
}

#[test]
fn damaged_bochs_images_do_no_harm() {
    bombard("bochs", images::bochs);
}

#[test]
fn damaged_cloop_images_do_no_harm() {
    bombard("cloop", images::cloop);
}

#[test]
fn damaged_vdi_images_do_no_harm() {
    bombard("vdi", images::vdi);
}

#[test]
fn damaged_dmg_images_do_no_harm() {
    bombard("dmg", images::dmg);
}

#[test]
fn damaged_luks_volumes_do_no_harm() {
    bombard("luks", images::luks);
}

#[test]
fn damaged_vmdk_images_do_no_harm() {
    bombard("vmdk", images::vmdk);
}

#[test]
fn deflate_round_trips() {
    smoke("deflate", images::deflate, 50);
}
