//! The checks and policies of `Disk`, on a raw disk in memory.

use std::rc::Rc;

use block::{
    CacheMode, DetectZeroes, Disk, DiskOptions, ErrorKind, IoBuf, Medium, MemoryMedium, RawBackend,
    ZeroFlags, executor,
};

fn with_disk<F: AsyncFnOnce(Disk, Rc<MemoryMedium>)>(options: DiskOptions, test: F) {
    executor::block_on(async {
        let medium = Rc::new(MemoryMedium::new(64 << 10));
        let backend = RawBackend::open(medium.clone()).await.unwrap();
        test(Disk::new(Rc::new(backend), options), medium).await;
    })
    .unwrap();
}

#[test]
fn ranges_and_alignment_are_checked() {
    with_disk(DiskOptions::default(), async |disk, _| {
        let sector = || IoBuf::zeroed(512);
        let kind = |r: block::Result<()>| r.unwrap_err().kind();
        assert_eq!(
            kind(disk.read(64 << 10, sector()).await),
            ErrorKind::OutOfRange
        );
        assert_eq!(
            kind(disk.read(u64::MAX - 511, sector()).await),
            ErrorKind::OutOfRange
        );
        assert_eq!(
            kind(disk.write(1, sector(), false).await),
            ErrorKind::Misaligned
        );
        assert_eq!(
            kind(disk.read(0, IoBuf::zeroed(100)).await),
            ErrorKind::Misaligned
        );
        assert_eq!(
            kind(disk.discard(512, u64::MAX).await),
            ErrorKind::OutOfRange
        );
        disk.read(0, IoBuf::zeroed(0)).await.unwrap();
        let counted = disk.statistics();
        let failed = [counted.reads, counted.writes, counted.discards].map(|kind| kind.failed);
        assert_eq!(failed, [3, 1, 1]);
    });
}

#[test]
fn read_only_disks_refuse_every_write() {
    let options = DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    };
    with_disk(options, async |disk, medium| {
        let kind = |r: block::Result<()>| r.unwrap_err().kind();
        let full = IoBuf::from_slice(&[1; 512]);
        assert_eq!(kind(disk.write(0, full, false).await), ErrorKind::ReadOnly);
        assert_eq!(kind(disk.discard(0, 512).await), ErrorKind::ReadOnly);
        let zeroes = disk.write_zeroes(0, 512, ZeroFlags::empty(), false).await;
        assert_eq!(kind(zeroes), ErrorKind::ReadOnly);
        assert_eq!(kind(disk.resize(512).await), ErrorKind::ReadOnly);
        disk.flush().await.unwrap();
        assert!(medium.to_vec().iter().all(|b| *b == 0));
    });
}

#[test]
fn detected_zeroes_read_back_as_zeroes() {
    let options = DiskOptions {
        detect_zeroes: DetectZeroes::Unmap,
        ..DiskOptions::default()
    };
    with_disk(options, async |disk, medium| {
        disk.write(0, IoBuf::from_slice(&[1; 1024]), false)
            .await
            .unwrap();
        disk.write(512, IoBuf::zeroed(512), false).await.unwrap();
        assert!(medium.to_vec()[..512].iter().all(|b| *b == 1));
        assert!(medium.to_vec()[512..].iter().all(|b| *b == 0));
        assert_eq!(disk.statistics().writes.done, 2);
        assert_eq!(disk.statistics().writes.bytes, 1536);
    });
}

#[test]
fn larger_logical_blocks_are_enforced() {
    let options = DiskOptions {
        logical_block_size: Some(4096),
        ..DiskOptions::default()
    };
    with_disk(options, async |disk, _| {
        assert_eq!(disk.limits().logical_block_size, 4096);
        assert_eq!(disk.limits().physical_block_size, 4096);
        let error = disk
            .write(512, IoBuf::zeroed(4096), false)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misaligned);
    });
}

#[test]
fn cache_modes_have_the_names_people_know() {
    for (name, mode) in [
        ("none", CacheMode::None),
        ("off", CacheMode::None),
        ("writeback", CacheMode::Writeback),
        ("writethrough", CacheMode::Writethrough),
        ("directsync", CacheMode::DirectSync),
        ("unsafe", CacheMode::Unsafe),
    ] {
        assert_eq!(CacheMode::parse(name).unwrap(), mode);
    }
    assert!(
        CacheMode::parse("sometimes")
            .unwrap_err()
            .message()
            .contains("'sometimes'")
    );
}

#[test]
fn short_media_read_as_filled_up_with_zeroes() {
    executor::block_on(async {
        let medium: Rc<dyn Medium> = Rc::new(MemoryMedium::from_vec(vec![5; 700]));
        let disk = Disk::new(
            Rc::new(RawBackend::open(medium).await.unwrap()),
            DiskOptions::default(),
        );
        assert_eq!(disk.size(), 1024);
        let buffer = IoBuf::from_slice(&[9; 1024]);
        disk.read(0, buffer.clone()).await.unwrap();
        let bytes = buffer.to_vec();
        assert!(bytes[..700].iter().all(|b| *b == 5) && bytes[700..].iter().all(|b| *b == 0));
    })
    .unwrap();
}
