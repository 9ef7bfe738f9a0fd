//! VMDK: streams of compressed grains, footers, extents of ESX, parents, hostile headers.

mod support;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::{CacheMode, Disk, DiskOptions, ErrorKind, IoBuf, Medium, MemoryMedium, executor};
use image_formats::copy::{CopyOptions, copy};
use image_formats::qcow2::Repair;
use image_formats::vmdk::{CreateOptions, Subformat, Vmdk};
use image_formats::{Image, ImageOptions, NewImage, create_file, open_image};
use support::{plain, qemu_img, qemu_img_ok, text};

const SIZE: usize = (5 << 20) + 3 * 512;

/// Data that compresses, data that does not, and holes.
fn sample() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    let mut state = 1u64;
    for (n, byte) in bytes[..3 << 20].iter_mut().enumerate() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = match n >> 19 & 3 {
            0 => (n / 11) as u8,
            1 => (state >> 56) as u8,
            _ => 0,
        };
    }
    bytes[SIZE - 700..].fill(0x77);
    bytes
}

async fn open(path: &Path, write: bool) -> block::Result<Image> {
    let options = ImageOptions {
        write,
        ..ImageOptions::default()
    };
    open_image(text(path), &options).await
}

fn disk(image: &Image) -> Rc<Disk> {
    Rc::new(Disk::new(image.backend.clone(), DiskOptions::default()))
}

/// Converts `raw` to a stream at `path`.
async fn make_stream(raw: &Path, path: &Path) {
    let options = CreateOptions {
        size: SIZE as u64,
        subformat: Subformat::StreamOptimized,
        ..CreateOptions::default()
    };
    let medium = create_file(text(path), CacheMode::Unsafe).unwrap();
    plain::create(&medium, &NewImage::Vmdk(options)).await;
    let target = plain::open(&medium, "vmdk").await;
    let source = open(raw, false).await.unwrap();
    let options = CopyOptions {
        compress: true,
        ..CopyOptions::default()
    };
    let progress: Rc<dyn Fn(u64)> = Rc::new(|_| {});
    let (from, to) = (disk(&source), disk(&target));
    copy(&from, &to, &target, 0, options, &progress)
        .await
        .unwrap();
    target.backend.close().await.unwrap();
}

struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("raw"), sample()).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

fn reads_as_sample(path: &Path) {
    executor::block_on(async {
        let image = open(path, false).await.unwrap();
        assert!(plain::content(&image).await == sample());
        let tools = image.format.clone().unwrap();
        let report = tools.check(Repair::None).await.unwrap().unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:?}",
            report.messages
        );
    })
    .unwrap();
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn streams_are_written_in_order_and_read_by_qemu() {
    let files = Files::new();
    let (raw, path) = (files.path("raw"), files.path("stream.vmdk"));
    executor::block_on(make_stream(&raw, &path)).unwrap();
    reads_as_sample(&path);
    let bytes = std::fs::read(&path).unwrap();
    assert!(
        bytes.len() < 2 << 20,
        "it is compressed: {} bytes",
        bytes.len()
    );
    // Grains follow one another as on the disk.
    let (mut at, mut last) = (number(&bytes, 64) as usize * 512, None);
    while at < bytes.len() {
        let (sector, length) = (number(&bytes, at), number(&bytes, at + 8) as u32 as usize);
        assert!(last < Some(sector), "sector {sector} after {last:?}");
        last = Some(sector);
        at += (12 + length).next_multiple_of(512);
    }
    let compare = [
        "compare",
        "-f",
        "raw",
        "-F",
        "vmdk",
        text(&raw),
        text(&path),
    ];
    if qemu_img_ok(&compare).is_some() {
        qemu_img_ok(&["check", text(&path)]);
    }
    executor::block_on(async {
        let image = open(&path, true).await.unwrap();
        let write = disk(&image)
            .write(0, IoBuf::from_slice(&[1; 512]), false)
            .await;
        assert_eq!(write.unwrap_err().kind(), ErrorKind::Unsupported);
    })
    .unwrap();
}

/// Moves what the header says to a footer, as writers do that cannot go back.
fn with_footer(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut footer = vec![0; 1536];
    footer[0] = 1;
    footer[12] = 3;
    footer[512..1024].copy_from_slice(&bytes[..512]);
    bytes[56..64].fill(0xff);
    bytes.extend(footer);
    bytes
}

#[test]
fn footers_say_what_headers_leave_open() {
    let files = Files::new();
    let (raw, path) = (files.path("raw"), files.path("theirs.vmdk"));
    let options = "subformat=streamOptimized";
    let convert = ["convert", "-f", "raw", "-O", "vmdk", "-o", options];
    let Some(_) = qemu_img_ok(&[&convert[..], &[text(&raw), text(&path)]].concat()) else {
        return;
    };
    let bytes = with_footer(std::fs::read(&path).unwrap());
    std::fs::write(&path, &bytes).unwrap();
    qemu_img_ok(&[
        "compare",
        "-f",
        "raw",
        "-F",
        "vmdk",
        text(&raw),
        text(&path),
    ]);
    reads_as_sample(&path);
    let mut cut = bytes.clone();
    cut.truncate(bytes.len() - 512);
    let cut = files.put("cut.vmdk", &cut);
    executor::block_on(async {
        let error = open(&cut, false).await.err().unwrap();
        assert!(error.one_line().contains("footer"), "{error}");
    })
    .unwrap();
}

fn descriptor(create_type: &str, extents: &str) -> Vec<u8> {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
         createType=\"{create_type}\"\n\n# Extent description\n{extents}\n\n# The Disk Data Base\n#DDB\n"
    )
    .into_bytes()
}

/// A sparse extent of ESX: header, directory, tables of 4096 entries, grains of one sector to 64 KiB.
fn cowd(content: &[u8], grain: usize) -> Vec<u8> {
    let grains = content.len().div_ceil(grain);
    let tables = grains.div_ceil(4096);
    let directory = 4 * 512;
    let first = (directory + tables * 4).next_multiple_of(512);
    let mut bytes = vec![0; first + tables * 16384];
    let put = |bytes: &mut Vec<u8>, at: usize, value: usize| {
        bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    bytes[..4].copy_from_slice(b"COWD");
    for (at, value) in [
        (4, 1),
        (8, 3),
        (12, content.len() / 512),
        (16, grain / 512),
        (20, 4),
        (24, tables),
    ] {
        put(&mut bytes, at, value);
    }
    for n in 0..tables {
        put(&mut bytes, directory + n * 4, (first + n * 16384) / 512);
    }
    for (n, data) in content.chunks(grain).enumerate() {
        if data.iter().any(|b| *b != 0) {
            let place = bytes.len() / 512;
            put(&mut bytes, first + n * 4, place);
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(grain.max(512)), 0);
        }
    }
    let end = bytes.len() / 512;
    put(&mut bytes, 28, end);
    bytes
}

#[test]
fn sparse_extents_of_esx_are_read() {
    let files = Files::new();
    files.put("esx-delta.vmdk", &cowd(&sample(), 65536));
    let line = format!("RW {} VMFSSPARSE \"esx-delta.vmdk\"", SIZE / 512);
    let path = files.put("esx.vmdk", &descriptor("vmfsSparse", &line));
    reads_as_sample(&path);
    let raw = files.path("raw");
    qemu_img_ok(&[
        "compare",
        "-f",
        "raw",
        "-F",
        "vmdk",
        text(&raw),
        text(&path),
    ]);
    executor::block_on(async {
        let image = open(&path, true).await.unwrap();
        assert!(image.backend.limits().read_only);
    })
    .unwrap();
}

/// A space-efficient sparse extent: 4 KiB grains, tables of 4096 entries of 8 bytes.
fn sesparse(content: &[u8]) -> Vec<u8> {
    let grains = content.len().div_ceil(4096);
    let tables = grains.div_ceil(4096);
    // In sectors: directory, tables, grains; the tables lie in reverse order.
    let (directory, first_table) = (1024u64, 1032u64);
    let first_grain = first_table + tables as u64 * 64;
    let mut bytes = vec![0; first_grain as usize * 512];
    let put = |bytes: &mut Vec<u8>, at: usize, value: u64| {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let sectors = (content.len() / 512) as u64;
    for (n, value) in [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, sectors),
        (3, 8),
        (4, 64),
        (10, 1),
        (11, 1),
        (12, 2),
        (13, 2046),
        (14, 2048),
        (15, 2048),
        (16, directory),
        (17, 8),
        (18, first_table),
        (19, tables as u64 * 64),
        (24, first_grain),
        (25, grains as u64 * 8),
    ] {
        put(&mut bytes, n * 8, value);
    }
    // The volatile header.
    put(&mut bytes, 512, 0xcafe_cafe);
    for n in 0..tables {
        let place = tables - 1 - n;
        put(
            &mut bytes,
            directory as usize * 512 + n * 8,
            1 << 60 | place as u64,
        );
    }
    let mut stored = 0u64;
    for (n, data) in content.chunks(4096).enumerate() {
        let table = tables - 1 - n / 4096;
        let at = (first_table as usize + table * 64) * 512 + n % 4096 * 8;
        let entry = match data.iter().all(|b| *b == 0) {
            // Unmapped, zero, not allocated: all read as zeroes.
            true => ((n % 3) as u64) << 60,
            false => {
                bytes.extend_from_slice(data);
                bytes.resize(bytes.len().next_multiple_of(4096), 0);
                stored += 1;
                let number = stored - 1;
                3 << 60 | (number & 0xfff) << 48 | number >> 12
            }
        };
        put(&mut bytes, at, entry);
    }
    bytes
}

#[test]
fn space_efficient_extents_are_read() {
    let files = Files::new();
    // Grain offsets are multiples of 4 KiB from the first one on.
    files.put("se-sesparse.vmdk", &sesparse(&sample()));
    let line = format!("RW {} SESPARSE \"se-sesparse.vmdk\"", SIZE / 512);
    let path = files.put("se.vmdk", &descriptor("seSparse", &line));

    reads_as_sample(&path);
    let raw = files.path("raw");
    qemu_img_ok(&[
        "compare",
        "-f",
        "raw",
        "-F",
        "vmdk",
        text(&raw),
        text(&path),
    ]);
}

#[test]
fn extents_of_all_kinds_make_one_disk() {
    let files = Files::new();
    let bytes = sample();
    let (a, b) = (700 * 512, 6000 * 512);
    // Into the middle of its file.
    files.put("flat.vmdk", &[&[9; 512][..], &bytes[..a]].concat());
    files.put("sparse.vmdk", &cowd(&bytes[a..b], 4096));
    let zero = (SIZE - b) / 512 - 2;
    files.put("end.vmdk", &bytes[SIZE - 1024..]);
    let lines = format!(
        "RW {} FLAT \"flat.vmdk\" 1\nRDONLY {} VMFSSPARSE \"sparse.vmdk\"\nRW {zero} ZERO\n\
         RW 2 VMFS \"end.vmdk\"",
        a / 512,
        (b - a) / 512
    );
    let path = files.put("many.vmdk", &descriptor("custom", &lines));
    executor::block_on(async {
        let image = open(&path, false).await.unwrap();
        let mut expected = bytes.clone();
        expected[b..SIZE - 1024].fill(0);
        assert!(plain::content(&image).await == expected);
    })
    .unwrap();
}

#[test]
fn a_changed_parent_is_refused_as_by_qemu() {
    let files = Files::new();
    let (base, child) = (files.path("base.vmdk"), files.path("child.vmdk"));
    executor::block_on(async {
        let options = CreateOptions {
            size: 1 << 20,
            ..CreateOptions::default()
        };
        for (path, parent) in [(&base, None), (&child, Some("base.vmdk".to_owned()))] {
            let new = CreateOptions {
                parent,
                ..options.clone()
            };
            let medium = create_file(text(path), CacheMode::Unsafe).unwrap();
            plain::create(&medium, &NewImage::Vmdk(new)).await;
        }
        let image = open(&child, true).await.unwrap();
        let bytes = IoBuf::from_slice(&[7; 512]);
        disk(&image).write(4096, bytes, false).await.unwrap();
        image.backend.close().await.unwrap();
        drop(image);
        let image = open(&base, true).await.unwrap();
        let bytes = IoBuf::from_slice(&[8; 512]);
        disk(&image).write(512 << 10, bytes, false).await.unwrap();
        image.backend.close().await.unwrap();
        drop(image);
        let error = open(&child, false).await.err().unwrap();
        assert!(
            error.one_line().contains("has been written to since"),
            "{error}"
        );
    })
    .unwrap();
    let raw = files.path("out");
    if let Some(output) = qemu_img(&["convert", "-O", "raw", text(&child), text(&raw)]) {
        assert!(!output.status.success(), "qemu-img refuses it as well");
    }
}

fn refused(bytes: Vec<u8>) -> String {
    executor::block_on(async {
        let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(bytes));
        let opened = Vmdk::open(medium, &block::Refusing, true).await;
        opened.err().expect("it is refused").one_line()
    })
    .unwrap()
}

#[test]
fn hostile_headers_are_refused_with_what_is_wrong() {
    let good = executor::block_on(async {
        let memory = Rc::new(MemoryMedium::new(0));
        let medium: Rc<dyn Medium> = memory.clone();
        let options = CreateOptions {
            size: 1 << 30,
            ..CreateOptions::default()
        };
        plain::create(&medium, &NewImage::Vmdk(options)).await;
        memory.to_vec()
    })
    .unwrap();
    let with = |changes: &[(usize, &[u8])]| {
        let mut bytes = good.clone();
        for (at, value) in changes {
            bytes[*at..*at + value.len()].copy_from_slice(value);
        }
        refused(bytes)
    };
    let says = |message: String, words: &str| assert!(message.contains(words), "{message}");
    let (all, huge) = ([0xff; 8], [0, 0, 0, 0, 0, 0, 1, 0]);
    says(with(&[(0, b"xxxx")]), "no VMDK image");
    says(with(&[(4, &[9])]), "version 9");
    says(with(&[(10, &[1])]), "compression algorithm 0");
    says(with(&[(12, &all)]), "impossible place");
    says(with(&[(12, &huge)]), "directory is larger than 64 MiB");
    says(with(&[(20, &[0; 8])]), "grains of 0 sectors");
    says(with(&[(20, &all)]), "grains of");
    says(with(&[(44, &[0; 4])]), "grain tables of 0 entries");
    says(with(&[(44, &[0xff; 4])]), "grain tables of");
    says(with(&[(56, &[0, 0, 0, 1])]), "reaches past the end");
    says(with(&[(48, &[0, 0, 0, 1])]), "reaches past the end");
    says(with(&[(56, &all)]), "footer");
    let text = |lines: &str| refused(descriptor("monolithicFlat", lines));
    says(text(""), "names no extent");
    says(
        text("RW 10 FLAT \"/etc/passwd\" 0"),
        "asks for the extent file",
    );
    says(text("RW 10 VMFSRDM \"a\""), "VMFSRDM are not supported");
    says(text("RW 10 FLAT"), "has no name");
    let many = "RW 1 ZERO\n".repeat(5000);
    says(text(&many), "more than 4096 extents");
    says(refused(vec![b'#'; 2 << 20]), "no VMDK image");
}

#[test]
fn check_tells_of_grains_that_are_nowhere_or_twice() {
    executor::block_on(async {
        let memory = Rc::new(MemoryMedium::new(0));
        let medium: Rc<dyn Medium> = memory.clone();
        let options = CreateOptions {
            size: 1 << 20,
            ..CreateOptions::default()
        };
        plain::create(&medium, &NewImage::Vmdk(options)).await;
        let mut bytes = memory.to_vec();
        let directory = number(&bytes, 56) as usize * 512;
        let table = number(&bytes, directory) as u32 as usize * 512;
        let entries = [3u32, 3, 0x00ff_ffff];
        for (n, entry) in entries.into_iter().enumerate() {
            bytes[table + n * 4..table + n * 4 + 4].copy_from_slice(&entry.to_le_bytes());
        }
        let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(bytes));
        let image = plain::open(&medium, "vmdk").await;
        let tools = image.format.clone().unwrap();
        let report = tools.check(Repair::None).await.unwrap().unwrap();
        let all = report.messages.join("\n");
        for words in [
            "grains 0 and 1 both lie at 1536",
            "grain 2 lies at 8589934080, past the end",
            "the copy of grain table 0 differs",
        ] {
            assert!(all.contains(words), "{all}");
        }
    })
    .unwrap();
}

#[test]
fn a_large_disk_without_tables_is_told_at_once() {
    // Two thousand million grains of a sector each, in a directory of 16 MiB that names no table.
    let (entries, table) = (4u64 << 20, 512u64);
    let mut bytes = vec![0; 1024 + entries as usize * 4];
    bytes[..4].copy_from_slice(b"KDMV");
    let mut put = |at: usize, value: u64, width: usize| {
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    };
    put(4, 1, 4);
    put(8, 1, 4); // Flags: the newline test is valid.
    put(12, entries * table, 8);
    put(20, 1, 8);
    put(44, table, 4);
    put(56, 2, 8);
    put(64, 2 + entries * 4 / 512, 8);
    put(73, 0x0a0d_200a, 4);
    let files = Files::new();
    let line = format!("RW {} SPARSE \"large-s001.vmdk\"", entries * table);
    files.put("large-s001.vmdk", &bytes);
    let path = files.put("large.vmdk", &descriptor("twoGbMaxExtentSparse", &line));
    let start = std::time::Instant::now();
    let extents = executor::block_on(async {
        let image = open(&path, false).await.unwrap();
        let query = block::ExtentQuery {
            offset: 512,
            length: (entries * table - 1) * 512,
            scope: block::Scope::Layer,
            limit: 16,
        };
        disk(&image).extents(query).await.unwrap()
    })
    .unwrap();
    assert_eq!(extents.len(), 1);
    assert_eq!(extents[0].kind, block::ExtentKind::Unallocated);
    assert_eq!(extents[0].length, (entries * table - 1) * 512);
    // It took minutes when each grain was asked about.
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
