//! What the fuzz targets of image formats do with their input. The formats' own tests run the same
//! functions on the corpus.

use std::rc::Rc;

use block::{
    BlockBackend, Disk, DiskOptions, ExtentQuery, IoBuf, Medium, MemoryMedium, Refusing, Scope,
    ZeroFlags, executor,
};
use image_formats::deflate::Deflater;
use image_formats::qcow2::{OpenOptions, Qcow2, Repair};

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
    // Errors are what is expected; only panics and hangs are failures.
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
