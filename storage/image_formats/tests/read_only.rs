//! Formats that are read alone: images that qemu-img made, and images made here from the formats'
//! descriptions, are read as qemu-img reads them.

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use block::{Disk, DiskOptions, ErrorKind, ExtentKind, ExtentQuery, IoBuf, Scope, executor};
use image_formats::qcow2::Repair;
use image_formats::{ImageOptions, open_image};
use support::{plain, qemu_img_ok, text};

const SIZE: usize = (5 << 20) + 3 * 512;

/// Data here and there, also at the very end.
fn sample() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for (n, byte) in bytes.iter_mut().enumerate() {
        if n >> 17 & 3 == 1 || n > SIZE - 700 {
            *byte = (n >> 9) as u8 ^ (n % 251) as u8 | 1;
        }
    }
    bytes
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Ours and theirs read `content` from it; it checks clean, and can't be written.
fn reads_as(files: &Files, path: &Path, format: &str, content: &[u8]) {
    executor::block_on(async {
        let options = ImageOptions::default();
        let image = open_image(text(path), &options).await.unwrap();
        assert_eq!(image.backend.format_name(), format, "it is recognized");
        assert!(plain::content(&image).await == content, "{format}");
        let tools = image.format.clone().unwrap();
        if let Some(report) = tools.check(Repair::None).await.unwrap() {
            assert_eq!(report.corruptions, 0, "{:?}", report.messages);
        }
        let disk = Disk::new(image.backend.clone(), DiskOptions::default());
        let write = disk.write(0, IoBuf::zeroed(512), false).await;
        assert_eq!(write.unwrap_err().kind(), ErrorKind::ReadOnly);
    })
    .unwrap();
    let raw = files.put("content.raw", content);
    let (path, raw) = (text(path), text(&raw));
    qemu_img_ok(&["compare", "-f", format, "-F", "raw", path, raw]);
}

/// Opening it fails with a message that has `words` in it.
fn refused(files: &Files, format: &str, bytes: &[u8], words: &str) {
    let path = files.put("refused", bytes);
    executor::block_on(async {
        let options = ImageOptions {
            format: Some(format.to_owned()),
            ..ImageOptions::default()
        };
        let error = open_image(text(&path), &options).await.err().unwrap();
        let error = error.one_line();
        assert!(error.contains(words), "{error}");
    })
    .unwrap();
}

/// The kinds of what is at some offsets.
fn kinds(path: &Path, offsets: &[u64]) -> Vec<&'static str> {
    executor::block_on(async {
        let options = ImageOptions::default();
        let image = open_image(text(path), &options).await.unwrap();
        let mut found = Vec::new();
        for offset in offsets {
            let query = ExtentQuery {
                offset: *offset,
                length: 512,
                scope: Scope::Chain,
                limit: 1,
            };
            let extents = image.backend.extents(query).await.unwrap();
            found.push(match extents[0].kind {
                ExtentKind::Data(_) => "data",
                ExtentKind::Zero(_) => "zero",
                ExtentKind::Compressed => "compressed",
                ExtentKind::Unallocated => "unallocated",
            });
        }
        found
    })
    .unwrap()
}

/// `sample` converted by qemu-img; `None` if that is not installed.
fn converted(files: &Files, format: &str, options: &str) -> Option<PathBuf> {
    let raw = files.put("sample.raw", &sample());
    let path = files.0.path().join(format!("theirs.{format}"));
    let (from, to) = (text(&raw), text(&path));
    let mut arguments = vec!["convert", "-f", "raw", "-O", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([from, to]);
    qemu_img_ok(&arguments)?;
    Some(path)
}

#[test]
fn qed_images_are_read_with_zero_clusters_and_what_is_below() {
    let files = Files::new();
    for options in ["", "cluster_size=4096,table_size=2", "table_size=16"] {
        let Some(path) = converted(&files, "qed", options) else {
            return;
        };
        reads_as(&files, &path, "qed", &sample());
    }
    let base = files.put("base.raw", &sample());
    let path = files.0.path().join("top.qed");
    for backing_format in ["raw", "qed"] {
        let name = if backing_format == "raw" {
            "base.raw"
        } else {
            "theirs.qed"
        };
        let create = ["create", "-f", "qed", "-b", name, "-F", backing_format];
        qemu_img_ok(&[&create[..], &[text(&path)]].concat());
        let zero = ["-f", "qed", "-c", "write -z 128k 128k", "-c"];
        let status = Command::new("qemu-io")
            .args(zero)
            .args(["write -P 7 2M 64k", text(&path)])
            .output();
        if !status.is_ok_and(|o| o.status.success()) {
            return;
        }
        let mut content = sample();
        content[128 << 10..256 << 10].fill(0);
        content[2 << 20..(2 << 20) + (64 << 10)].fill(7);
        reads_as(&files, &path, "qed", &content);
        let places = [128 << 10, 2 << 20, 640 << 10];
        assert_eq!(kinds(&path, &places), ["zero", "data", "data"]);
    }
    drop(base);
}

#[test]
fn hostile_qed_headers_are_refused_with_what_is_wrong() {
    let files = Files::new();
    let Some(path) = converted(&files, "qed", "") else {
        return;
    };
    let good = std::fs::read(path).unwrap();
    for (at, value, words) in [
        (0, 0, "no QED image"),
        (5, 1, "clusters of"),
        (8, 3, "tables of"),
        (17, 1, "features 0x100"),
        (42, 0, "a table at 0"),
        (45, 9, "past the end of the file"),
        (48, 1, "a disk of"),
        (55, 0x7f, "a disk of"),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        refused(&files, "qed", &bytes, words);
    }
}

#[test]
fn parallels_disks_of_both_kinds_are_read() {
    let files = Files::new();
    for options in ["", "cluster_size=65536"] {
        let Some(path) = converted(&files, "parallels", options) else {
            return;
        };
        reads_as(&files, &path, "parallels", &sample());
        // The old kind counts sectors where the new one counts clusters.
        let mut old = std::fs::read(&path).unwrap();
        let number = |at: usize| u32::from_le_bytes(old[at..at + 4].try_into().unwrap());
        let (sectors, entries) = (number(28), number(32) as usize);
        let entry = |n: usize| number(64 + n * 4) * sectors;
        let table: Vec<u8> = (0..entries).flat_map(|n| entry(n).to_le_bytes()).collect();
        old[64..64 + table.len()].copy_from_slice(&table);
        old[..16].copy_from_slice(b"WithoutFreeSpace");
        let path = files.put("old.hdd", &old);
        reads_as(&files, &path, "parallels", &sample());
        for (at, value, words) in [
            (0, 0, "no Parallels disk"),
            (16, 3, "version 3"),
            (31, 0x7f, "clusters of"),
            (34, 0x7f, "past the end of the file"),
            (39, 0x7f, "too small for the disk"),
        ] {
            let mut bytes = old.clone();
            bytes[at] = value;
            refused(&files, "parallels", &bytes, words);
        }
    }
    let path = files.0.path().join("old.hdd");
    assert_eq!(kinds(&path, &[0, 128 << 10]), ["unallocated", "data"]);
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A growing disk of Bochs with `content`, extents of `extent` bytes, in the order of their last use.
fn bochs(content: &[u8], extent: usize, version: u32) -> Vec<u8> {
    let entries = content.len().div_ceil(extent);
    let bitmap = (extent / 512).div_ceil(8);
    let mut head = vec![0; 512];
    put(&mut head, 0, b"Bochs Virtual HD Image");
    put(&mut head, 32, b"Redolog");
    put(&mut head, 48, b"Growing");
    let numbers = [version, 512, entries as u32, bitmap as u32, extent as u32];
    for (n, number) in numbers.into_iter().enumerate() {
        put(&mut head, 64 + n * 4, &number.to_le_bytes());
    }
    let at = if version == 0x1_0000 { 84 } else { 88 };
    put(&mut head, at, &(content.len() as u64).to_le_bytes());
    let mut catalog = vec![0xff; entries * 4];
    let mut extents = Vec::new();
    let mut next = 0u32;
    for number in (0..entries).rev() {
        let part = &content[number * extent..content.len().min((number + 1) * extent)];
        if part.iter().all(|b| *b == 0) {
            continue;
        }
        put(&mut catalog, number * 4, &next.to_le_bytes());
        next += 1;
        let mut bits = vec![0; bitmap.next_multiple_of(512)];
        let mut data = vec![0xee; extent];
        for (sector, bytes) in part.chunks(512).enumerate() {
            if bytes.iter().any(|b| *b != 0) {
                bits[sector / 8] |= 1 << (sector % 8);
                put(&mut data, sector * 512, bytes);
            }
        }
        extents.extend_from_slice(&bits);
        extents.extend_from_slice(&data);
    }
    [head, catalog, extents].concat()
}

#[test]
fn growing_disks_of_bochs_are_read() {
    let files = Files::new();
    for (extent, version) in [(4096, 0x2_0000), (1 << 20, 0x1_0000), (8 << 20, 0x2_0000)] {
        let bytes = bochs(&sample(), extent, version);
        let path = files.put("disk.bochs", &bytes);
        reads_as(&files, &path, "bochs", &sample());
    }
    let good = bochs(&sample(), 65536, 0x2_0000);
    for (at, value, words) in [
        (1, 0, "no Bochs disk"),
        (48, b'V', "growing"),
        (64, 1, "version 0x20001"),
        (75, 1, "catalog is too large"),
        (76, 0, "impossible size"),
        (80, 1, "no power of two"),
        (95, 1, "too small for the disk"),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        refused(&files, "bochs", &bytes, words);
    }
}

/// A compressed loop device with `content` in blocks of `block` bytes.
fn cloop(content: &[u8], block: usize) -> Vec<u8> {
    let script =
        "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    let mut head = vec![0; 128];
    put(&mut head, 0, script.as_bytes());
    let count = content.len().div_ceil(block);
    head.extend_from_slice(&(block as u32).to_be_bytes());
    head.extend_from_slice(&(count as u32).to_be_bytes());
    let first = head.len() + (count + 1) * 8;
    let mut data = Vec::new();
    for part in content.chunks(block) {
        head.extend_from_slice(&((first + data.len()) as u64).to_be_bytes());
        let mut padded = part.to_vec();
        padded.resize(block, 0);
        let level = flate2::Compression::default();
        let mut encoder = flate2::write::ZlibEncoder::new(&mut data, level);
        encoder.write_all(&padded).unwrap();
        encoder.finish().unwrap();
    }
    head.extend_from_slice(&((first + data.len()) as u64).to_be_bytes());
    [head, data].concat()
}

#[test]
fn compressed_loop_devices_are_read() {
    let files = Files::new();
    for block in [512, 65536, 1 << 20] {
        let path = files.put("disk.cloop", &cloop(&sample(), block));
        let mut content = sample();
        content.resize(SIZE.next_multiple_of(block), 0);
        reads_as(&files, &path, "cloop", &content);
        assert_eq!(kinds(&path, &[0]), ["compressed"]);
    }
    let good = cloop(&sample(), 65536);
    for (at, value, words) in [
        (131, 1, "multiple of 512"),
        (128, 0xff, "multiple of 512"),
        (132, 1, "past the end of the file"),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        refused(&files, "cloop", &bytes, words);
    }
    // Damage in one block is told when it is read.
    let mut bytes = good;
    let end = bytes.len();
    bytes[end - 10..].fill(0x55);
    let path = files.put("damaged.cloop", &bytes);
    executor::block_on(async {
        let options = ImageOptions::default();
        let image = open_image(text(&path), &options).await.unwrap();
        let last = SIZE.next_multiple_of(65536) as u64 - 512;
        let error = image.backend.read(last, IoBuf::zeroed(512)).await;
        assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidImage);
    })
    .unwrap();
}
