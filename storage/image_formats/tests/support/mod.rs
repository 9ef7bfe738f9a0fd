//! What the tests of image formats share: a plain model of a disk, operations on both, qemu-img.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part of it"
)]

pub mod plain;
pub mod recorder;

use std::path::Path;
use std::process::{Command, Output};
use std::rc::Rc;

use block::{BlockBackend, Disk, DiskOptions, IoBuf, Medium, Refusing, ZeroFlags};
use image_formats::luks::Secret;
use image_formats::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use proptest::prelude::*;

/// The size of test disks: not a multiple of any cluster size above 512.
pub const SIZE: u64 = 3 * (1 << 20) + 7 * 512;

/// The password of encrypted test images.
pub const PASSWORD: &str = "open sesame";

/// One operation of a guest, or of a person on the image.
#[derive(Debug, Clone)]
pub enum Op {
    Write {
        at: u64,
        length: u64,
        value: u8,
    },
    Zero {
        at: u64,
        length: u64,
        unmap: bool,
    },
    Discard {
        at: u64,
        length: u64,
    },
    Compress {
        at: u64,
        value: u8,
    },
    Flush,
    Snapshot,
    Apply,
    Delete,
    Reopen,
    /// The writes are in flight together; they do not overlap.
    Burst {
        at: u64,
        value: u8,
    },
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    // Mostly inside one stretch of 1 MiB, so that operations meet.
    (
        prop_oneof![0..SIZE / 512, 0..2048u64],
        prop_oneof![1..16u64, 1..400u64],
    )
        .prop_map(|(at, length)| (at * 512, (length * 512).min(SIZE - at * 512)))
}

/// Any operation, writes most of all.
pub fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(), 1u8..).prop_map(|((at, length), value)| Op::Write { at, length, value }),
        3 => (range(), any::<bool>()).prop_map(|((at, length), unmap)| Op::Zero { at, length, unmap }),
        3 => range().prop_map(|(at, length)| Op::Discard { at, length }),
        3 => (0..SIZE, 1u8..).prop_map(|(at, value)| Op::Compress { at, value }),
        2 => Just(Op::Flush),
        1 => Just(Op::Snapshot),
        1 => Just(Op::Apply),
        1 => Just(Op::Delete),
        1 => Just(Op::Reopen),
        1 => (0..SIZE / 512 / 2, any::<u8>()).prop_map(|(at, value)| Op::Burst { at: at * 512, value }),
    ]
}

/// The image options that tests go through.
pub fn any_options() -> impl Strategy<Value = CreateOptions> {
    (9u32..=21, 0u32..=6, any::<bool>(), any::<bool>(), 0..4u8).prop_map(
        |(bits, refcount, lazy, zstd, kind)| {
            let mut options = CreateOptions {
                size: SIZE,
                cluster_size: 1 << bits,
                refcount_bits: 1 << refcount,
                lazy_refcounts: lazy,
                ..CreateOptions::default()
            };
            if zstd {
                options.compression = image_formats::qcow2::CompressionType::Zstd;
            }
            match kind {
                0 => {
                    options = CreateOptions {
                        size: SIZE,
                        version: 2,
                        cluster_size: 1 << bits,
                        ..CreateOptions::default()
                    };
                }
                1 if bits >= 14 => options.extended_l2 = true,
                _ => {}
            }
            options
        },
    )
}

/// Makes an image and opens it.
pub async fn make(medium: &Rc<dyn Medium>, options: &CreateOptions) -> Rc<Qcow2> {
    create(medium, &Refusing, options).await.unwrap();
    reopen(medium).await
}

/// Opens an image with caches so small that they overflow.
pub async fn reopen(medium: &Rc<dyn Medium>) -> Rc<Qcow2> {
    let options = OpenOptions {
        l2_cache: 16 << 10,
        refcount_cache: 0,
        backing: false,
        secret: Some(Secret::new(PASSWORD.as_bytes())),
        ..OpenOptions::default()
    };
    Rc::new(
        Qcow2::open(medium.clone(), &Refusing, &options)
            .await
            .unwrap(),
    )
}

pub fn disk(image: &Rc<Qcow2>) -> Disk {
    let options = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    Disk::new(image.clone(), options)
}

pub async fn read_all(disk: &Disk) -> Vec<u8> {
    let buffer = IoBuf::zeroed(disk.size() as usize);
    disk.read(0, buffer.clone()).await.unwrap();
    buffer.to_vec()
}

/// Some bytes that compress, and differ by place.
pub fn pattern(value: u8, length: u64, at: u64) -> Vec<u8> {
    (0..length)
        .map(|n| value.wrapping_add(((at + n) / 512) as u8) | 1)
        .collect()
}

/// A disk in plain memory, with its snapshots, oldest first.
pub struct Model {
    pub bytes: Vec<u8>,
    pub snapshots: Vec<Vec<u8>>,
    /// Sectors that were discarded may read as their old content or as zeroes.
    pub names: u32,
}

impl Model {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            snapshots: Vec::new(),
            names: 0,
        }
    }
}

/// Runs one operation on both. Returns the image, which may have been opened anew.
pub async fn run_op(
    medium: &Rc<dyn Medium>,
    image: Rc<Qcow2>,
    model: &mut Model,
    op: &Op,
) -> Rc<Qcow2> {
    let d = disk(&image);
    let range = |at: u64, length: u64| at as usize..(at + length) as usize;
    match op {
        Op::Write { at, length, value } => {
            let bytes = pattern(*value, *length, *at);
            d.write(*at, IoBuf::from_slice(&bytes), false)
                .await
                .unwrap();
            model.bytes[range(*at, *length)].copy_from_slice(&bytes);
        }
        Op::Zero { at, length, unmap } => {
            let flags = if *unmap {
                ZeroFlags::MAY_UNMAP
            } else {
                ZeroFlags::empty()
            };
            d.write_zeroes(*at, *length, flags, false).await.unwrap();
            model.bytes[range(*at, *length)].fill(0);
        }
        Op::Discard { at, length } => {
            d.discard(*at, *length).await.unwrap();
            // Either content is right; the model follows what the disk chose.
            let buffer = IoBuf::zeroed(*length as usize);
            d.read(*at, buffer.clone()).await.unwrap();
            for (n, sector) in buffer.to_vec().chunks(512).enumerate() {
                let place = range(at + n as u64 * 512, 512);
                let is_zero = sector.iter().all(|b| *b == 0);
                assert!(
                    is_zero || sector == &model.bytes[place.clone()],
                    "discard made up data"
                );
                model.bytes[place].copy_from_slice(sector);
            }
        }
        Op::Compress { at, value } => {
            let cluster = image.cluster_size();
            let at = at / cluster * cluster;
            let length = cluster.min(SIZE - at);
            let mut bytes = pattern(*value, cluster, at);
            bytes[length as usize..].fill(0);
            let kind = image.header().compression;
            let compressed = image_formats::qcow2::ClusterCompressor::new(kind).compress(&bytes);
            if let Some(compressed) = compressed {
                image.write_compressed(at, &compressed).await.unwrap();
                model.bytes[range(at, length)].copy_from_slice(&bytes[..length as usize]);
            }
        }
        Op::Flush => d.flush().await.unwrap(),
        Op::Snapshot => {
            let name = format!("s{}", model.names);
            // Narrow refcounts refuse; that must change nothing.
            if image.create_snapshot(&name, (1, 2)).await.is_ok() {
                model.snapshots.push(model.bytes.clone());
            }
            model.names += 1;
        }
        Op::Apply => {
            if let (Some(last), Some(s)) = (model.snapshots.last(), image.snapshots().last())
                && image.apply_snapshot(&s.id).await.is_ok()
            {
                model.bytes.clone_from(last);
            }
        }
        Op::Delete => {
            if let Some(first) = image.snapshots().first() {
                image.delete_snapshot(&first.id).await.unwrap();
                model.snapshots.remove(0);
            }
        }
        Op::Reopen => {
            image.close().await.unwrap();
            drop(d);
            drop(image);
            return reopen(medium).await;
        }
        Op::Burst { at, value } => {
            let d = Rc::new(disk(&image));
            let mut tasks = Vec::new();
            for n in 0..16u64 {
                let start = at + n * 3 * 512;
                if start + 1024 > SIZE {
                    break;
                }
                let bytes = pattern(value.wrapping_add(n as u8), 1024, start);
                model.bytes[range(start, 1024)].copy_from_slice(&bytes);
                let d = d.clone();
                tasks.push(block::executor::spawn_local(async move {
                    d.write(start, IoBuf::from_slice(&bytes), n == 7)
                        .await
                        .unwrap();
                }));
            }
            for task in tasks {
                task.await;
            }
        }
    }
    image
}

/// qemu-img, if it is installed.
pub fn qemu_img(arguments: &[&str]) -> Option<Output> {
    let output = Command::new("qemu-img").args(arguments).output();
    match output {
        Ok(output) => Some(output),
        Err(_) => {
            eprintln!("skipped: qemu-img is not installed");
            None
        }
    }
}

/// Runs qemu-img and expects success; `None` if it is not installed.
pub fn qemu_img_ok(arguments: &[&str]) -> Option<String> {
    let output = qemu_img(arguments)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(text)
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
