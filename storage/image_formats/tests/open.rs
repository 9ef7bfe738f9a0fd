//! Opening images by name: backing chains, gates, locks, temporary overlays, garbage.

use block::{ErrorKind, IoBuf, executor};
use image_formats::qcow2::{CreateOptions, create};
use image_formats::{External, ImageOptions, create_file, open_disk, open_image};

const SIZE: u64 = 1 << 20;

fn path(directory: &tempfile::TempDir, name: &str) -> String {
    directory.path().join(name).to_str().unwrap().to_owned()
}

async fn make(name: &str, backing: Option<(&str, &str)>) {
    let options = CreateOptions {
        size: SIZE,
        backing_file: backing.map(|b| b.0.to_owned()),
        backing_format: backing.map(|b| b.1.to_owned()),
        ..CreateOptions::default()
    };
    let medium = create_file(name, block::CacheMode::Writeback).unwrap();
    create(&medium, &block::Refusing, &options).await.unwrap();
}

fn writable() -> ImageOptions {
    ImageOptions {
        write: true,
        ..ImageOptions::default()
    }
}

async fn read(name: &str, options: &ImageOptions) -> Vec<u8> {
    let disk = open_disk(name, options).await.unwrap();
    let buffer = IoBuf::zeroed(disk.size() as usize);
    disk.read(0, buffer.clone()).await.unwrap();
    buffer.to_vec()
}

#[test]
fn chains_read_through_and_write_on_top() {
    let directory = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let (raw, middle, top) = (
            path(&directory, "raw"),
            path(&directory, "middle"),
            path(&directory, "top"),
        );
        // Shorter than what is on top of it.
        std::fs::write(&raw, vec![1; 300 << 10]).unwrap();
        make(&middle, Some(("raw", "raw"))).await;
        make(&top, Some(("middle", "qcow2"))).await;
        let disk = open_disk(&middle, &writable()).await.unwrap();
        disk.write(65536 + 512, IoBuf::from_slice(&[2; 512]), false)
            .await
            .unwrap();
        disk.close().await.unwrap();
        drop(disk);
        let disk = open_disk(&top, &writable()).await.unwrap();
        disk.write(65536 + 1024, IoBuf::from_slice(&[3; 512]), false)
            .await
            .unwrap();
        disk.write((300 << 10) - 512, IoBuf::from_slice(&[4; 1024]), false)
            .await
            .unwrap();
        disk.close().await.unwrap();
        drop(disk);
        let mut expected = vec![0; SIZE as usize];
        expected[..300 << 10].fill(1);
        expected[66048..66560].fill(2);
        expected[66560..67072].fill(3);
        expected[(300 << 10) - 512..(300 << 10) + 512].fill(4);
        assert!(read(&top, &ImageOptions::default()).await == expected);
        assert!(std::fs::read(&raw).unwrap().iter().all(|b| *b == 1));
    })
    .unwrap();
}

#[test]
fn images_cannot_name_files_elsewhere_unless_allowed() {
    let directory = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let secret = path(&other, "secret");
        std::fs::write(&secret, vec![9; SIZE as usize]).unwrap();
        let image = path(&directory, "image");
        for name in [
            secret.clone(),
            format!("../{}/secret", other.path().file_name().unwrap().display()),
        ] {
            make(&image, Some((&name, "raw"))).await;
            let error = open_image(&image, &ImageOptions::default())
                .await
                .err()
                .unwrap();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.one_line().contains(&name), "{error}");
        }
        std::os::unix::fs::symlink(&secret, directory.path().join("link")).unwrap();
        make(&image, Some(("link", "raw"))).await;
        let error = open_image(&image, &ImageOptions::default())
            .await
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::Refused);
        let follow = ImageOptions {
            external: External::Follow,
            ..ImageOptions::default()
        };
        assert!(read(&image, &follow).await.iter().all(|b| *b == 9));
    })
    .unwrap();
}

#[test]
fn circles_end() {
    let directory = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let image = path(&directory, "image");
        make(&image, Some(("image", "qcow2"))).await;
        let error = open_image(&image, &ImageOptions::default())
            .await
            .err()
            .unwrap();
        assert!(error.one_line().contains("circle"), "{error}");
    })
    .unwrap();
}

#[test]
fn overlays_keep_writes_from_the_image() {
    let directory = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let image = path(&directory, "disk.raw");
        std::fs::write(&image, vec![7; SIZE as usize]).unwrap();
        let options = ImageOptions {
            snapshot: true,
            ..writable()
        };
        let disk = open_disk(&image, &options).await.unwrap();
        disk.write(0, IoBuf::from_slice(&[8; 4096]), true)
            .await
            .unwrap();
        let buffer = IoBuf::zeroed(8192);
        disk.read(0, buffer.clone()).await.unwrap();
        assert_eq!(buffer.to_vec(), [[8; 4096], [7; 4096]].concat());
        drop(disk);
        assert!(std::fs::read(&image).unwrap().iter().all(|b| *b == 7));
    })
    .unwrap();
}

#[test]
fn writers_lock_images_and_lookers_do_not_care() {
    let directory = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let image = path(&directory, "image");
        make(&image, None).await;
        let _held = open_disk(&image, &writable()).await.unwrap();
        let error = open_disk(&image, &writable()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.one_line().contains("in use by process"), "{error}");
        let look = ImageOptions {
            lock: false,
            ..ImageOptions::default()
        };
        open_image(&image, &look).await.unwrap();
    })
    .unwrap();
}

#[test]
fn guessed_raw_disks_stay_raw() {
    let directory = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let image = path(&directory, "disk");
        std::fs::write(&image, vec![0; 65536]).unwrap();
        let mut header = vec![0; 512];
        header[..4].copy_from_slice(b"QFI\xfb");
        let disk = open_disk(&image, &writable()).await.unwrap();
        let error = disk
            .write(0, IoBuf::from_slice(&header), false)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        disk.write(0, IoBuf::from_slice(&[1; 1024]), false)
            .await
            .unwrap();
        drop(disk);
        let named = ImageOptions {
            format: Some("raw".into()),
            ..writable()
        };
        let disk = open_disk(&image, &named).await.unwrap();
        disk.write(0, IoBuf::from_slice(&header), false)
            .await
            .unwrap();
    })
    .unwrap();
}

#[test]
fn garbage_gives_one_line() {
    let directory = tempfile::tempdir().unwrap();
    executor::block_on(async {
        let image = path(&directory, "garbage");
        let mut bytes = vec![0xff; 4096];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        std::fs::write(&image, &bytes).unwrap();
        let error = open_image(&image, &writable()).await.err().unwrap();
        let line = error.one_line();
        assert!(line.contains(&image) && !line.contains('\n'), "{line}");
        assert!(
            std::fs::read(&image).unwrap() == bytes,
            "a failed open changed the file"
        );
    })
    .unwrap();
}
