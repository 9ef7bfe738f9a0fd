//! VHDX: logs that others left, parents, large sectors, growing tables, hostile headers.

mod support;

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use block::{ErrorKind, IoBuf, Medium, MemoryMedium, executor};
use image_formats::qcow2::Repair;
use image_formats::vhdx::{CreateOptions, Vhdx};
use image_formats::{Image, ImageOptions, NewImage, create_file, open_image};
use support::plain;
use support::{qemu_img_ok, text};

const MIB: u64 = 1 << 20;
const HEADERS: [usize; 2] = [64 << 10, 128 << 10];

fn new(options: CreateOptions) -> NewImage {
    NewImage::Vhdx(options)
}

async fn make(path: &Path, options: CreateOptions) {
    let medium = create_file(text(path), block::CacheMode::Unsafe).unwrap();
    plain::create(&medium, &new(options)).await;
}

async fn open(path: &Path, write: bool) -> block::Result<Image> {
    let options = ImageOptions {
        write,
        ..ImageOptions::default()
    };
    open_image(text(path), &options).await
}

async fn write(image: &Image, at: u64, value: u8, length: usize) {
    let disk = plain::disk(image);
    let bytes = IoBuf::from_slice(&vec![value; length]);
    disk.write(at, bytes, false).await.unwrap();
}

async fn read(image: &Image, at: u64, length: usize) -> Vec<u8> {
    let buffer = IoBuf::zeroed(length);
    plain::disk(image).read(at, buffer.clone()).await.unwrap();
    buffer.to_vec()
}

/// Makes an image whose log holds an entry that QEMU wrote, and whose table does not have what it says:
/// QEMU makes both in one go, so the moment in between is put together here.
fn left_by_qemu(path: &Path) -> Option<()> {
    const TABLE: usize = 2 << 20;
    let name = text(path);
    let create = ["create", "-f", "vhdx", "-o", "block_size=1M", name, "40M"];
    qemu_img_ok(&create)?;
    let before = std::fs::read(path).unwrap();
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "vhdx", "-c", "write -P 5 3M 1M", name]);
    if !qemu.output().is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: qemu-io is not installed");
        return None;
    }
    let mut after = std::fs::read(path).unwrap();
    assert!(after[1 << 20..].starts_with(b"loge"), "an entry is there");
    assert!(after[TABLE..TABLE + 4096] != before[TABLE..TABLE + 4096]);
    after[TABLE..TABLE + 4096].copy_from_slice(&before[TABLE..TABLE + 4096]);
    let id = after[(1 << 20) + 32..(1 << 20) + 48].to_vec();
    for header in HEADERS {
        after[header + 48..header + 64].copy_from_slice(&id);
        crc_at(&mut after, header, 4096);
    }
    std::fs::write(path, &after).unwrap();
    Some(())
}

#[test]
fn a_log_that_qemu_left_is_replayed() {
    let directory = tempfile::tempdir().unwrap();
    let (path, copy) = (
        directory.path().join("left.vhdx"),
        directory.path().join("copy.vhdx"),
    );
    let Some(()) = left_by_qemu(&path) else {
        return;
    };
    std::fs::copy(&path, &copy).unwrap();
    executor::block_on(async {
        for write in [false, true, false] {
            let image = open(&path, write).await.unwrap();
            let tools = image.format.clone().unwrap();
            let report = tools.check(Repair::None).await.unwrap().unwrap();
            assert_eq!(report.corruptions, 0, "{:?}", report.messages);
            assert!(read(&image, 3 * MIB, 1 << 20).await == vec![5; 1 << 20]);
            assert!(read(&image, 0, 3 << 20).await == vec![0; 3 << 20]);
            image.backend.close().await.unwrap();
        }
    })
    .unwrap();
    // The oracle makes the same of it, and finds nothing left to do in ours.
    qemu_img_ok(&["check", "-r", "all", text(&copy)]);
    qemu_img_ok(&["compare", text(&path), text(&copy)]);
    let said = qemu_img_ok(&["check", text(&path)]).unwrap();
    assert!(!said.contains("repaired"), "{said}");
}

#[test]
fn a_log_that_we_left_is_replayed_by_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("left.vhdx");
    executor::block_on(async {
        let options = CreateOptions {
            size: 40 * MIB,
            block_size: MIB,
            ..CreateOptions::default()
        };
        make(&path, options).await;
        let image = open(&path, true).await.unwrap();
        // Several entries, more than the log holds at once.
        for n in 0..36u64 {
            write(&image, n * MIB + 4096, n as u8 + 1, 8192).await;
            image.backend.flush().await.unwrap();
        }
        // Dropped without being closed.
    })
    .unwrap();
    let Some(said) = qemu_img_ok(&["check", "-r", "all", text(&path)]) else {
        return;
    };
    assert!(said.contains("1 corruptions"), "{said}");
    executor::block_on(async {
        let image = open(&path, false).await.unwrap();
        for n in 0..36u64 {
            let expected = vec![n as u8 + 1; 8192];
            assert_eq!(read(&image, n * MIB + 4096, 8192).await, expected);
        }
    })
    .unwrap();
}

#[test]
fn a_changed_or_missing_parent_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (base, child) = (
        directory.path().join("base.vhdx"),
        directory.path().join("child.vhdx"),
    );
    executor::block_on(async {
        let size = 10 * MIB;
        let options = CreateOptions {
            size,
            ..CreateOptions::default()
        };
        make(&base, options.clone()).await;
        let image = open(&base, true).await.unwrap();
        write(&image, 0, 1, 5 << 20).await;
        image.backend.close().await.unwrap();
        drop(image);
        let parent = Some("base.vhdx".to_owned());
        make(&child, CreateOptions { parent, ..options }).await;
        let image = open(&child, true).await.unwrap();
        write(&image, MIB, 2, 4096).await;
        // Hides what the parent has in a whole block, and in a part of one.
        let flags = block::ZeroFlags::MAY_UNMAP;
        let disk = plain::disk(&image);
        disk.write_zeroes(2 * MIB, 2 * MIB, flags, false)
            .await
            .unwrap();
        disk.write_zeroes(4 * MIB, 4096, flags, false)
            .await
            .unwrap();
        image.backend.close().await.unwrap();
        drop((image, disk));
        let image = open(&child, false).await.unwrap();
        let seen = read(&image, 0, 6 << 20).await;
        let mut expected = vec![1; 5 << 20];
        expected.resize(6 << 20, 0);
        expected[1 << 20..(1 << 20) + 4096].fill(2);
        expected[2 << 20..(4 << 20) + 4096].fill(0);
        assert!(seen == expected);
        drop(image);
        // A new size shows nothing that the parent has there.
        let image = open(&child, true).await.unwrap();
        image.backend.resize(3 * MIB / 2).await.unwrap();
        image.backend.resize(12 * MIB).await.unwrap();
        let seen = read(&image, 0, 6 << 20).await;
        expected[3 << 19..].fill(0);
        assert!(seen == expected);
        image.backend.close().await.unwrap();
        drop(image);
        let image = open(&base, true).await.unwrap();
        write(&image, 0, 9, 512).await;
        image.backend.close().await.unwrap();
        drop(image);
        let error = open(&child, false).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(error.one_line().contains("has been written to since"));
        std::fs::remove_file(&base).unwrap();
        let error = open(&child, false).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.one_line().contains("'base.vhdx'"), "{error}");
    })
    .unwrap();
}

/// QEMU opens no such images.
#[test]
fn disks_may_have_sectors_of_4096_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.vhdx");
    executor::block_on(async {
        let size = 64 * MIB;
        let options = CreateOptions {
            size,
            logical_sector: 4096,
            ..CreateOptions::default()
        };
        make(&path, options).await;
        let image = open(&path, true).await.unwrap();
        assert_eq!(image.backend.limits().logical_block_size, 4096);
        write(&image, 40 * MIB, 3, 4096).await;
        image.backend.close().await.unwrap();
        drop(image);
        let image = open(&path, false).await.unwrap();
        assert_eq!(read(&image, 40 * MIB, 4096).await, [3; 4096]);
        let disk = plain::disk(&image);
        let unaligned = disk.read(512, IoBuf::zeroed(512)).await;
        assert!(unaligned.is_err(), "half a sector");
    })
    .unwrap();
    let options = CreateOptions {
        size: 512,
        logical_sector: 4096,
        ..CreateOptions::default()
    };
    assert!(image_formats::vhdx::measure(&options, 0).is_err());
}

#[test]
fn a_table_moves_when_the_disk_outgrows_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("grows.vhdx");
    executor::block_on(async {
        let options = CreateOptions {
            size: 1 << 30,
            block_size: MIB,
            ..CreateOptions::default()
        };
        make(&path, options).await;
        let image = open(&path, true).await.unwrap();
        write(&image, 5 * MIB, 5, 4096).await;
        image.backend.resize(300 << 30).await.unwrap();
        write(&image, 299 << 30, 7, 4096).await;
        image.backend.close().await.unwrap();
        drop(image);
        let image = open(&path, true).await.unwrap();
        assert_eq!(image.backend.limits().size, 300 << 30);
        assert_eq!(read(&image, 5 * MIB, 4096).await, [5; 4096]);
        assert_eq!(read(&image, 299 << 30, 4096).await, [7; 4096]);
        let tools = image.format.clone().unwrap();
        let report = tools.check(Repair::None).await.unwrap().unwrap();
        assert_eq!(report.corruptions, 0, "{:?}", report.messages);
    })
    .unwrap();
    if let Some(said) = qemu_img_ok(&["info", text(&path)]) {
        assert!(said.contains("300 GiB"), "{said}");
        qemu_img_ok(&["check", text(&path)]);
    }
}

/// An image in memory, as bytes.
fn image_bytes() -> Vec<u8> {
    executor::block_on(async {
        let memory = Rc::new(MemoryMedium::new(0));
        let medium: Rc<dyn Medium> = memory.clone();
        let options = CreateOptions {
            size: 4 * MIB,
            block_size: MIB,
            ..CreateOptions::default()
        };
        plain::create(&medium, &new(options)).await;
        memory.to_vec()
    })
    .unwrap()
}

fn refused(bytes: Vec<u8>) -> String {
    executor::block_on(async {
        let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(bytes));
        let opened = Vhdx::open(medium, &block::Refusing, true).await;
        opened.err().expect("it is refused").one_line()
    })
    .unwrap()
}

fn crc_at(bytes: &mut [u8], at: usize, length: usize) {
    bytes[at + 4..at + 8].fill(0);
    let sum = crc32c::crc32c(&bytes[at..at + length]);
    bytes[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn hostile_headers_are_refused_with_what_is_wrong() {
    let good = image_bytes();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        refused(bytes)
    };
    const TABLES: [usize; 2] = [192 << 10, 256 << 10];
    // Behind header, log (1 MiB) and block table (1 MiB), and the table of metadata.
    const ITEMS: usize = (3 << 20) + (64 << 10);
    let both = |bytes: &mut Vec<u8>, at: usize, value: &[u8]| {
        for header in HEADERS {
            bytes[header + at..header + at + value.len()].copy_from_slice(value);
            crc_at(bytes, header, 4096);
        }
    };
    let table = |bytes: &mut Vec<u8>, at: usize, value: &[u8]| {
        for place in TABLES {
            bytes[place + at..place + at + value.len()].copy_from_slice(value);
            crc_at(bytes, place, 65536);
        }
    };
    let says = |message: String, words: &str| assert!(message.contains(words), "{message}");
    says(with(&|b| b[0] = b'x'), "no VHDX image");
    says(with(&|b| b.truncate(100)), "headers are damaged");
    says(
        with(&|b| {
            b[HEADERS[0] + 9] ^= 1;
            b[HEADERS[1] + 9] ^= 1;
        }),
        "headers are damaged",
    );
    // A log to replay: none is there, at an impossible place, too large, of an unknown version.
    says(
        with(&|b| both(b, 48, &[1; 16])),
        "log that is to be replayed is damaged",
    );
    says(
        with(&|b| {
            both(b, 72, &u64::MAX.to_le_bytes());
            both(b, 48, &[1; 16]);
        }),
        "impossible place",
    );
    says(
        with(&|b| {
            both(b, 68, &(2u32 << 30).to_le_bytes());
            both(b, 48, &[1; 16]);
        }),
        "larger than 64 MiB",
    );
    says(
        with(&|b| {
            both(b, 64, &[1, 0]);
            both(b, 48, &[1; 16]);
        }),
        "log version 1",
    );
    says(
        with(&|b| table(b, 8, &u32::MAX.to_le_bytes())),
        "region tables are damaged",
    );
    says(
        with(&|b| table(b, 8, &[1, 0, 0, 0])),
        "lacks the block table",
    );
    says(with(&|b| table(b, 16, &[3; 16])), "region 03030303-");
    says(
        with(&|b| table(b, 32, &u64::MAX.to_le_bytes())),
        "impossible place",
    );
    says(with(&|b| table(b, 40, &[0; 4])), "table is cut off");
    let set = |b: &mut Vec<u8>, at: usize, value: &[u8]| {
        b[ITEMS + at..ITEMS + at + value.len()].copy_from_slice(value);
    };
    // Items of 8 bytes each: block size and flags, size of the disk.
    says(
        with(&|b| set(b, 0, &12345u32.to_le_bytes())),
        "block size is no power of two",
    );
    says(
        with(&|b| set(b, 0, &(1u32 << 31).to_le_bytes())),
        "block size is no power of two",
    );
    says(
        with(&|b| set(b, 8, &u64::MAX.to_le_bytes())),
        "larger than 64 TiB",
    );
    says(
        with(&|b| set(b, 8, &(60u64 << 40).to_le_bytes())),
        "larger than 128 MiB",
    );
    says(
        with(&|b| set(b, 8, &(1u64 << 40).to_le_bytes())),
        "table is cut off",
    );
    says(with(&|b| set(b, 4, &[2])), "parent");
    says(with(&|b| b[3 << 20] = 0), "no metadata table");
    says(
        with(&|b| b[(3 << 20) + 32 + 16..(3 << 20) + 32 + 20].fill(0xff)),
        "reaches past its region",
    );
}

#[test]
fn check_tells_of_blocks_that_overlap() {
    executor::block_on(async {
        let mut bytes = image_bytes();
        // Block 0 lies on the log, blocks 1 and 2 in one place, block 3 past the end.
        let entries = [1u64 << 20, 5 << 20, 5 << 20, 900 << 20];
        for (n, entry) in entries.into_iter().enumerate() {
            let at = (2 << 20) + n * 8;
            bytes[at..at + 8].copy_from_slice(&(entry | 6).to_le_bytes());
        }
        let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(bytes));
        let image = plain::open(&medium, "vhdx").await;
        let tools = image.format.clone().unwrap();
        let report = tools.check(Repair::None).await.unwrap().unwrap();
        let all = report.messages.join("\n");
        for words in [
            "the log and block 0 both lie at 1048576",
            "block 1 and block 2 both lie",
            "block 3 lies at 943718400, past the end",
        ] {
            assert!(all.contains(words), "{all}");
        }
    })
    .unwrap();
}
