//! What the fuzz targets of image formats do with their input. The formats' own tests run the same
//! functions on the corpus.

use std::rc::Rc;

use block::{
    BlockBackend, BlockFuture, Disk, DiskOptions, ExtentQuery, ImplicitFile, IoBuf, Medium,
    MemoryMedium, OpenGate, Refusing, Scope, ZeroFlags, executor,
};
use image_formats::deflate::Deflater;
use image_formats::luks::{Luks, Secret};
use image_formats::qcow2::{OpenOptions, Qcow2, Repair};
use image_formats::vdi::Vdi;
use image_formats::vhdx::Vhdx;
use image_formats::vmdk::Vmdk;
use image_formats::vpc::Vpc;
use image_formats::{ImageFormat, bochs, cloop, dmg, parallels, qed};

/// Opens any bytes as a qcow2 image, reads, checks, writes, repairs. Nothing may panic or hang.
pub fn qcow2(data: &[u8]) {
    executor::block_on(async {
        for for_check in [true, false] {
            let medium: Rc<dyn Medium> =
                Rc::new(MemoryMedium::from_vec(data.to_vec()).with_limit(8 << 20));
            let options = OpenOptions {
                l2_cache: 64 << 10,
                refcount_cache: 0,
                for_check,
                ..OpenOptions::default()
            };
            let Ok(image) = Qcow2::open(medium, &Refusing, &options).await else {
                continue;
            };
            let image = Rc::new(image);
            use_image(&image, for_check).await;
        }
    })
    .expect("an executor");
}

async fn use_image(image: &Rc<Qcow2>, repair: bool) {
    let options = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    let disk = Disk::new(image.clone(), options);
    use_disk(&disk, disk.size()).await;
    let _ = image
        .check(if repair { Repair::All } else { Repair::None })
        .await;
    if let Some(snapshot) = image.snapshots().first() {
        let _ = image.apply_snapshot(&snapshot.id).await;
        let _ = image.delete_snapshot(&snapshot.id).await;
    }
    let _ = image.create_snapshot("s", (0, 0)).await;
    let _ = image.close().await;
}

/// Uses the disk at its beginning, in the middle and at its end. Errors are what is expected; only panics and hangs are
/// failures.
async fn use_disk(disk: &Disk, size: u64) {
    for offset in [
        0,
        size / 2 / 4096 * 4096,
        size.saturating_sub(4096) / 512 * 512,
    ] {
        let length = (size - offset).min(4096);
        let _ = disk.read(offset, IoBuf::zeroed(length as usize)).await;
        let query = ExtentQuery {
            offset,
            length: size - offset,
            scope: Scope::Chain,
            limit: 16,
        };
        let _ = disk.extents(query).await;
        let _ = disk
            .write(offset, IoBuf::from_slice(&vec![1; length as usize]), false)
            .await;
        let _ = disk
            .write_zeroes(offset, length, ZeroFlags::MAY_UNMAP, false)
            .await;
        let _ = disk.discard(offset, length).await;
    }
}

/// Opens, checks, uses, resizes and repairs an image of another product's format.
async fn use_format<F: BlockBackend + ImageFormat + 'static>(opened: block::Result<F>) {
    let Ok(image) = opened else { return };
    let image = Rc::new(image);
    let options = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    let disk = Disk::new(image.clone(), options);
    let size = disk.size();
    let _ = image.describe();
    let _ = ImageFormat::check(&*image, Repair::None).await;
    use_disk(&disk, size).await;
    let _ = disk.flush().await;
    let _ = disk.resize(size.saturating_add(1 << 20)).await;
    use_disk(&disk, disk.size()).await;
    let _ = disk.resize(size / 2 / 4096 * 4096).await;
    let _ = ImageFormat::check(&*image, Repair::All).await;
    let _ = disk.close().await;
}

/// Makes a checksum of a VHD right, which else would hide all that is behind it: the complement of the sum of the
/// other bytes, at `at` in a structure that begins with `magic`.
fn mend(data: &mut [u8], start: usize, magic: &[u8], (length, at): (usize, usize)) {
    let Some(bytes) = data.get_mut(start..).and_then(|d| d.get_mut(..length)) else {
        return;
    };
    if bytes.starts_with(magic) {
        bytes[at..at + 4].fill(0);
        let sum: u32 = bytes.iter().map(|b| u32::from(*b)).sum();
        bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    }
}

fn memory(bytes: Vec<u8>) -> Rc<dyn Medium> {
    Rc::new(MemoryMedium::from_vec(bytes).with_limit(12 << 20))
}

/// Files with much nothing in them, as pieces: the number of a sector of 512 bytes (4 bytes), a length
/// (2 bytes), and that many bytes for this place; all numbers with the lowest byte first.
fn scattered(mut data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some((head, rest)) = data.split_at_checked(6) {
        let sector = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) % (16 << 10);
        let length = usize::from(u16::from_le_bytes([head[4], head[5]])).min(rest.len());
        let at = sector as usize * 512;
        if bytes.len() < at + length {
            bytes.resize(at + length, 0);
        }
        bytes[at..at + length].copy_from_slice(&rest[..length]);
        data = &rest[length..];
    }
    bytes
}

/// Opens any bytes as a VHD.
pub fn vpc(data: &[u8]) {
    let mut data = data.to_vec();
    let end = data.len().saturating_sub(512);
    mend(&mut data, 0, b"conectix", (512, 64));
    mend(&mut data, end, b"conectix", (512, 64));
    mend(&mut data, 512, b"cxsparse", (1024, 36));
    executor::block_on(async {
        // Where its parent is asked for, the image is refused.
        let _ = Vpc::open(memory(data.clone()), &Refusing, true).await;
        use_format(Vpc::open(memory(data), &Refusing, false).await).await;
    })
    .expect("an executor");
}

/// Makes the checksum of a structure right.
fn sign(bytes: &mut [u8], at: usize, length: usize) {
    if let Some(part) = bytes.get_mut(at..at + length) {
        part[4..8].fill(0);
        let sum = crc32c::crc32c(part);
        part[4..8].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Opens pieces as a VHDX image, whose checksums are made right first.
pub fn vhdx(data: &[u8]) {
    let mut bytes = scattered(data);
    for header in [64 << 10, 128 << 10] {
        sign(&mut bytes, header, 4096);
    }
    for table in [192 << 10, 256 << 10] {
        sign(&mut bytes, table, 64 << 10);
    }
    for at in (1 << 20..bytes.len().min(2 << 20)).step_by(4096) {
        if bytes[at..].starts_with(b"loge") && at + 12 <= bytes.len() {
            let length = [bytes[at + 8], bytes[at + 9], bytes[at + 10], 0];
            let length = u32::from_le_bytes(length) as usize;
            sign(&mut bytes, at, length.clamp(64, 1 << 20));
        }
    }
    executor::block_on(async {
        use_format(Vhdx::open(memory(bytes), &Refusing, false).await).await;
    })
    .expect("an executor");
}

/// Every extent file is these bytes; parents are refused.
struct OneExtent(Vec<u8>);

impl OpenGate for OneExtent {
    fn open_backend<'a>(
        &'a self,
        base: &'a str,
        name: &'a str,
        why: ImplicitFile,
    ) -> BlockFuture<'a, Rc<dyn BlockBackend>> {
        Refusing.open_backend(base, name, why)
    }

    fn open_medium<'a>(
        &'a self,
        base: &'a str,
        name: &'a str,
        why: ImplicitFile,
        writable: bool,
    ) -> BlockFuture<'a, Rc<dyn Medium>> {
        match why {
            ImplicitFile::Extent => Box::pin(async { Ok(memory(self.0.clone())) }),
            _ => Refusing.open_medium(base, name, why, writable),
        }
    }
}

/// Opens pieces as a VMDK image. What follows a line `EXTENT` is the file of every extent that it names.
pub fn vmdk(data: &[u8]) {
    const SPLIT: &[u8] = b"\nEXTENT\n";
    let at = data.windows(SPLIT.len()).position(|w| w == SPLIT);
    let (bytes, extent) = match at {
        Some(at) => (
            data[..at + 1].to_vec(),
            scattered(&data[at + SPLIT.len()..]),
        ),
        None => (scattered(data), Vec::new()),
    };
    executor::block_on(async {
        let gate = OneExtent(extent);
        use_format(Vmdk::open(memory(bytes), &gate, true).await).await;
    })
    .expect("an executor");
}

/// Opens pieces as a VDI image.
pub fn vdi(data: &[u8]) {
    executor::block_on(async {
        use_format(Vdi::open(memory(scattered(data))).await).await;
    })
    .expect("an executor");
}

/// Opens pieces as a LUKS volume, with a password and without. Keys are derived quickly.
pub fn luks(data: &[u8]) {
    let mut bytes = scattered(data);
    for at in [164].into_iter().chain((0..8).map(|n| 208 + n * 48 + 4)) {
        if let Some([high @ .., a, _]) = bytes.get_mut(at..at + 4) {
            high.fill(0);
            *a &= 3;
        }
    }
    executor::block_on(async {
        use_format(Luks::open(memory(bytes.clone()), None).await).await;
        let secret = Secret::new(b"open sesame");
        use_format(Luks::open(memory(bytes), Some(&secret)).await).await;
    })
    .expect("an executor");
}

/// Opens pieces as a QED image.
pub fn qed(data: &[u8]) {
    executor::block_on(async {
        use_format(qed::open(memory(scattered(data)), &Refusing, false).await).await;
    })
    .expect("an executor");
}

/// Opens pieces as a Parallels image.
pub fn parallels(data: &[u8]) {
    executor::block_on(async {
        use_format(parallels::open(memory(scattered(data))).await).await;
    })
    .expect("an executor");
}

/// Opens pieces as a Bochs image.
pub fn bochs(data: &[u8]) {
    executor::block_on(async {
        use_format(bochs::open(memory(scattered(data))).await).await;
    })
    .expect("an executor");
}

/// Opens any bytes as an Apple disk image.
pub fn dmg(data: &[u8]) {
    executor::block_on(async {
        use_format(dmg::open(memory(data.to_vec())).await).await;
    })
    .expect("an executor");
}

/// Opens any bytes as a cloop image.
pub fn cloop(data: &[u8]) {
    executor::block_on(async {
        use_format(cloop::open(memory(data.to_vec())).await).await;
    })
    .expect("an executor");
}

/// Whatever is compressed inflates to itself.
pub fn deflate(data: &[u8]) {
    let Some(bytes) = Deflater::default().compress(data, usize::MAX) else {
        return;
    };
    let mut out = vec![0; data.len() + 1];
    let mut inflater = flate2::Decompress::new(false);
    inflater
        .decompress(&bytes, &mut out, flate2::FlushDecompress::Finish)
        .expect("own output inflates");
    assert_eq!(inflater.total_out(), data.len() as u64);
    assert!(out[..data.len()] == *data);
}
