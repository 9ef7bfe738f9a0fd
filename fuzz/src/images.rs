//! What the fuzz targets of image formats do with their input. The formats' own tests run the same
//! functions on the corpus.

use std::rc::Rc;

use block::{
    BlockBackend, Disk, DiskOptions, ExtentQuery, IoBuf, Medium, MemoryMedium, Refusing, Scope,
    ZeroFlags, executor,
};
use image_formats::ImageFormat;
use image_formats::deflate::Deflater;
use image_formats::qcow2::{OpenOptions, Qcow2, Repair};
use image_formats::vpc::Vpc;

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
    let disk = Disk::new(
        image.clone(),
        DiskOptions {
            discard: true,
            ..DiskOptions::default()
        },
    );
    let size = disk.size();
    use_disk(&disk, size).await;
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
        size / 2 / 512 * 512,
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

/// Opens any bytes as a VHD, reads, checks, writes, repairs, resizes. Nothing may panic or hang.
pub fn vpc(data: &[u8]) {
    let mut data = data.to_vec();
    let end = data.len().saturating_sub(512);
    mend(&mut data, 0, b"conectix", (512, 64));
    mend(&mut data, end, b"conectix", (512, 64));
    mend(&mut data, 512, b"cxsparse", (1024, 36));
    executor::block_on(async {
        let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(data).with_limit(8 << 20));
        // Where its parent is asked for, the image is refused.
        let _ = Vpc::open(medium.clone(), &Refusing, true).await;
        let Ok(image) = Vpc::open(medium, &Refusing, false).await else {
            return;
        };
        let image = Rc::new(image);
        let options = DiskOptions {
            discard: true,
            ..DiskOptions::default()
        };
        let disk = Disk::new(image.clone(), options);
        let size = disk.size();
        let _ = ImageFormat::check(&*image, Repair::None).await;
        use_disk(&disk, size).await;
        let _ = image.describe();
        let _ = disk.resize(size.saturating_add(1 << 20)).await;
        use_disk(&disk, disk.size()).await;
        let _ = disk.resize(size / 2).await;
        let _ = ImageFormat::check(&*image, Repair::All).await;
        let _ = disk.close().await;
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
