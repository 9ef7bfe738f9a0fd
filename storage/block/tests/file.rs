//! Host files under both engines, through the page cache and past it.

use std::path::Path;
use std::rc::Rc;

use block::executor::{self, EngineKind, spawn_local};
use block::{ErrorKind, FileOptions, HostFile, IoBuf, LockMode, Medium, ZeroFlags};

const ENGINES: [EngineKind; 2] = [EngineKind::Auto, EngineKind::Threads];

fn writable() -> FileOptions {
    FileOptions {
        write: true,
        lock: LockMode::Write,
        ..FileOptions::default()
    }
}

async fn read(file: &HostFile, offset: u64, length: usize) -> Vec<u8> {
    let buffer = IoBuf::from_slice(&vec![0xee; length]);
    file.read(offset, buffer.clone()).await.unwrap();
    buffer.to_vec()
}

#[test]
fn writes_read_back_with_each_engine_and_cache() {
    // The build directory is on a real file system, so that direct I/O works.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for engine in ENGINES {
        for direct in [false, true] {
            let path = directory.path().join("file");
            let options = FileOptions {
                create: true,
                direct,
                ..writable()
            };
            executor::block_on_with(engine, async {
                let file = HostFile::open(&path, &options).unwrap();
                // Neither aligned in place nor in length.
                file.write(1000, IoBuf::from_slice(&[1; 3000]))
                    .await
                    .unwrap();
                file.write(4096, IoBuf::from_slice(&[2; 8192]))
                    .await
                    .unwrap();
                file.write(5000, IoBuf::from_slice(&[3; 10])).await.unwrap();
                assert_eq!(file.len(), 4096 + 8192);
                let mut expected = vec![0; 20_000];
                expected[1000..4000].fill(1);
                expected[4096..12288].fill(2);
                expected[5000..5010].fill(3);
                assert_eq!(read(&file, 0, 20_000).await, expected);
                assert_eq!(read(&file, 999, 777).await, expected[999..1776]);
                file.write_zeroes(2000, 4000, ZeroFlags::MAY_UNMAP)
                    .await
                    .unwrap();
                expected[2000..6000].fill(0);
                file.write_zeroes(12_000, 2000, ZeroFlags::empty())
                    .await
                    .unwrap();
                expected[12_000..].fill(0);
                assert_eq!(file.len(), 14_000);
                file.flush().await.unwrap();
                assert_eq!(read(&file, 0, 20_000).await, expected);
            })
            .unwrap();
        }
    }
}

#[test]
fn many_requests_in_flight_land_where_they_belong() {
    let directory = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let path = directory.path().join("file");
        executor::block_on_with(engine, async {
            let options = FileOptions {
                create: true,
                ..writable()
            };
            let file = Rc::new(HostFile::open(&path, &options).unwrap());
            let handles: Vec<_> = (0..600u32)
                .map(|n| {
                    let file = file.clone();
                    let buffer = IoBuf::from_slice(&n.to_le_bytes().repeat(128));
                    spawn_local(async move { file.write(u64::from(n) * 512, buffer).await })
                })
                .collect();
            for handle in handles {
                handle.await.unwrap();
            }
            for n in 0..600u32 {
                let bytes = read(&file, u64::from(n) * 512, 512).await;
                assert_eq!(bytes, n.to_le_bytes().repeat(128));
            }
        })
        .unwrap();
    }
}

#[test]
fn dropped_requests_do_not_harm_buffers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, vec![5; 1 << 20]).unwrap();
    for engine in ENGINES {
        executor::block_on_with(engine, async {
            let file = Rc::new(HostFile::open(&path, &FileOptions::default()).unwrap());
            for n in 0..64 {
                let file = file.clone();
                drop(spawn_local(async move {
                    file.read(n * 512, IoBuf::zeroed(65536)).await
                }));
            }
            executor::yield_now().await;
        })
        .unwrap();
    }
}

#[test]
fn holes_are_found() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("sparse");
    executor::block_on(async {
        let options = FileOptions {
            create: true,
            ..writable()
        };
        let file = HostFile::open(&path, &options).unwrap();
        file.set_len(10 << 20).await.unwrap();
        file.write(1 << 20, IoBuf::from_slice(&[1; 65536]))
            .await
            .unwrap();
        let range = file.sparse_range(0, 10 << 20).unwrap();
        assert!(!range.data && range.length == 1 << 20, "{range:?}");
        let range = file.sparse_range(1 << 20, 9 << 20).unwrap();
        assert!(range.data && range.length == 65536, "{range:?}");
        let rest = (9 << 20) - 65536;
        let range = file.sparse_range((1 << 20) + 65536, rest).unwrap();
        assert!(!range.data && range.length == rest, "{range:?}");
    })
    .unwrap();
}

#[test]
fn errors_are_clear() {
    let directory = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let missing = directory.path().join("missing.img");
        let error = HostFile::open(&missing, &FileOptions::default())
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let expected = format!(
            "cannot open '{}': No such file or directory",
            missing.display()
        );
        assert_eq!(error.one_line(), expected);
        let error = HostFile::open(Path::new("/dev/null"), &FileOptions::default())
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let path = directory.path().join("locked");
        let options = FileOptions {
            create: true,
            ..writable()
        };
        let first = HostFile::open(&path, &options).unwrap();
        first.write(0, IoBuf::from_slice(&[1; 512])).await.unwrap();
        // The attempt must not have emptied the file.
        let error = HostFile::open(&path, &options).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 512);
    })
    .unwrap();
}
