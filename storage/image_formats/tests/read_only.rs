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

/// How a chunk of a test image is stored.
#[derive(Clone, Copy)]
enum Stored {
    Zlib,
    Bzip2,
    Adc,
}

/// Bytes as Apple Data Compression: runs, and a copy where a byte repeats.
fn adc(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some(first) = rest.first() {
        let same = rest.iter().take(4096).take_while(|b| *b == first).count();
        if same < 5 {
            let length = rest.len().min(100);
            out.push(0x7f + length as u8);
            out.extend_from_slice(&rest[..length]);
            rest = &rest[length..];
            continue;
        }
        // The byte, a short copy of three or a long one of up to 67, both one back.
        out.extend_from_slice(&[0x80, *first]);
        rest = &rest[1..];
        let mut left = same - 1;
        while left >= 4 {
            let length = left.min(67);
            out.extend_from_slice(&[0x40 | (length - 4) as u8, 0, 0]);
            (left, rest) = (left - length, &rest[length..]);
        }
        if left == 3 {
            out.extend_from_slice(&[0, 0]);
            rest = &rest[3..];
        }
    }
    out
}

fn packed(part: &[u8], stored: Stored) -> Vec<u8> {
    match stored {
        Stored::Zlib => {
            let level = flate2::Compression::default();
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), level);
            encoder.write_all(part).unwrap();
            encoder.finish().unwrap()
        }
        Stored::Bzip2 => {
            let level = bzip2::Compression::default();
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), level);
            encoder.write_all(part).unwrap();
            encoder.finish().unwrap()
        }
        Stored::Adc => adc(part),
    }
}

/// An Apple disk image with `content` in chunks of `size` bytes; every third chunk is stored as it is. The
/// lists are in a resource fork or in a property list.
fn dmg(content: &[u8], size: usize, stored: Stored, fork: bool) -> Vec<u8> {
    let mut file = vec![0; 512];
    let mut list = vec![0; 204];
    put(&mut list, 0, b"mish");
    put(&mut list, 16, &(content.len() as u64 / 512).to_be_bytes());
    let mut entry = |kind: u32, at: usize, length: usize, place: usize, bytes: usize| {
        let mut one = vec![0; 40];
        put(&mut one, 0, &kind.to_be_bytes());
        let numbers = [at / 512, length / 512, place, bytes];
        for (n, number) in numbers.into_iter().enumerate() {
            put(&mut one, 8 + n * 8, &(number as u64).to_be_bytes());
        }
        list.extend_from_slice(&one);
    };
    for (n, part) in content.chunks(size).enumerate() {
        let (at, place) = (n * size, file.len());
        if part.iter().all(|b| *b == 0) {
            entry(2, at, part.len(), place, 0);
            continue;
        }
        let (kind, bytes) = match stored {
            _ if n % 3 == 2 => (1, part.to_vec()),
            Stored::Adc => (0x8000_0004, packed(part, stored)),
            Stored::Zlib => (0x8000_0005, packed(part, stored)),
            Stored::Bzip2 => (0x8000_0006, packed(part, stored)),
        };
        entry(kind, at, part.len(), place, bytes.len());
        file.extend_from_slice(&bytes);
    }
    entry(0xffff_ffff, content.len(), 0, file.len(), 0);
    let count = (list.len() - 204) as u32 / 40;
    put(&mut list, 200, &count.to_be_bytes());
    let place = file.len() as u64;
    let mut trailer = vec![0; 512];
    put(&mut trailer, 0, b"koly\0\0\0\x04\0\0\x02\0");
    let fields = if fork {
        let mut head = vec![0; 256];
        put(&mut head, 0, &256u32.to_be_bytes());
        put(&mut head, 4, &(256 + 4 + list.len() as u32).to_be_bytes());
        put(&mut head, 8, &(4 + list.len() as u32).to_be_bytes());
        head.extend_from_slice(&(list.len() as u32).to_be_bytes());
        file.extend_from_slice(&[head, list].concat());
        40
    } else {
        let text = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &list);
        let lines: Vec<&str> = (0..text.len())
            .step_by(52)
            .map(|at| &text[at..text.len().min(at + 52)])
            .collect();
        let head = "<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key><data>\n\t";
        let end = "\n</data></dict></array></dict></dict></plist>\n";
        file.extend_from_slice(format!("{head}{}{end}", lines.join("\n\t")).as_bytes());
        216
    };
    put(&mut trailer, fields, &place.to_be_bytes());
    let length = file.len() as u64 - place;
    put(&mut trailer, fields + 8, &length.to_be_bytes());
    put(
        &mut trailer,
        492,
        &(content.len() as u64 / 512).to_be_bytes(),
    );
    file.extend_from_slice(&trailer);
    file
}

#[test]
fn apple_disk_images_are_read() {
    let files = Files::new();
    for fork in [false, true] {
        let path = files.put("disk.dmg", &dmg(&sample(), 128 << 10, Stored::Zlib, fork));
        reads_as(&files, &path, "dmg", &sample());
        assert_eq!(
            kinds(&path, &[0, 128 << 10, 256 << 10]),
            ["zero", "compressed", "zero"]
        );
    }
    // Without a module for them qemu-img reads no bzip2; it never reads ADC.
    for stored in [Stored::Bzip2, Stored::Adc] {
        let path = files.put("disk.dmg", &dmg(&sample(), 64 << 10, stored, false));
        executor::block_on(async {
            let image = open_image(text(&path), &ImageOptions::default()).await;
            assert!(plain::content(&image.unwrap()).await == sample());
        })
        .unwrap();
    }
    let good = dmg(&sample(), 128 << 10, Stored::Zlib, true);
    let list = good.windows(4).position(|w| w == b"mish").unwrap();
    let end = good.len() - 512;
    for (at, bytes, words) in [
        (end, &[0; 4][..], "no trailer"),
        (end + 48, &[0; 8], "no lists"),
        (end + 40, &[0xff; 8], "past the end of the file"),
        (list + 204 + 8, &[0x7f; 8], "impossible place"),
        (list + 204 + 40 + 14, &[0; 2], "two chunks"),
        (list + 204 + 40 + 20, &[0x7f; 4], "larger than 64 MiB"),
    ] {
        let mut damaged = good.clone();
        put(&mut damaged, at, bytes);
        refused(&files, "dmg", &damaged, words);
    }
    // A method that is not supported is named where the chunk is read.
    let mut other = good;
    put(&mut other, list + 204 + 40, &0x8000_0007u32.to_be_bytes());
    let path = files.put("other.dmg", &other);
    executor::block_on(async {
        let image = open_image(text(&path), &ImageOptions::default())
            .await
            .unwrap();
        let error = image.backend.read(128 << 10, IoBuf::zeroed(512)).await;
        assert!(error.unwrap_err().one_line().contains("LZFSE"));
    })
    .unwrap();
}
