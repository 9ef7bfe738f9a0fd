//! Persistent dirty bitmaps: they know what was written, survive closing, and are not trusted where they must not be.

mod support;

use std::rc::Rc;

use block::{BlockBackend, ErrorKind, Medium, MemoryMedium, executor};
use image_formats::qcow2::{BitmapInfo, CreateOptions, Qcow2, Repair};
use proptest::prelude::*;
use support::{
    Model, Op, SIZE, any_op, any_options, disk, make, qemu_img_ok, read_all, reopen, run_op, text,
};

const SECTORS: usize = (SIZE / 512) as usize;

/// Offsets and lengths.
type Ranges = Vec<(u64, u64)>;

/// Sectors that an operation surely writes, and those that it may write.
fn written(op: &Op, cluster: u64) -> (Ranges, Ranges) {
    match op {
        Op::Write { at, length, .. } | Op::Zero { at, length, .. } | Op::Discard { at, length } => {
            (vec![(*at, *length)], Vec::new())
        }
        // What does not become smaller is not stored.
        Op::Compress { at, .. } => {
            let at = at / cluster * cluster;
            (Vec::new(), vec![(at, cluster.min(SIZE - at))])
        }
        Op::Burst { at, .. } => {
            let starts = (0..16)
                .map(|n| at + n * 3 * 512)
                .filter(|start| start + 1024 <= SIZE);
            (starts.map(|start| (start, 1024)).collect(), Vec::new())
        }
        _ => (Vec::new(), Vec::new()),
    }
}

fn mark(sectors: &mut [bool], ranges: &[(u64, u64)]) {
    for (at, length) in ranges {
        sectors[(at / 512) as usize..((at + length) / 512) as usize].fill(true);
    }
}

async fn add_two(image: &Qcow2) {
    image.add_bitmap("fine", Some(512), true).unwrap();
    image.add_bitmap("coarse", Some(64 << 10), true).unwrap();
    image.add_bitmap("off", None, false).unwrap();
    image.bitmap("off").await.unwrap().set(1 << 20, 1);
}

async fn check_bitmaps(image: &Qcow2, surely: &[bool], maybe: &[bool]) {
    let fine = image.bitmap("fine").await.unwrap();
    let coarse = image.bitmap("coarse").await.unwrap();
    let off = image.bitmap("off").await.unwrap();
    let granule = u64::from(off.granularity());
    for n in 0..SECTORS {
        let at = n as u64 * 512;
        let dirty = fine.is_dirty(at);
        assert!(!surely[n] || dirty, "sector {n} was written");
        assert!(
            !dirty || surely[n] || maybe[n],
            "sector {n} was not written"
        );
        assert!(!dirty || coarse.is_dirty(at), "sector {n}");
        assert_eq!(
            off.is_dirty(at),
            at / granule == (1 << 20) / granule,
            "sector {n}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 100, ..ProptestConfig::default() })]

    #[test]
    fn bitmaps_know_what_was_written(
        options in any_options(),
        ops in prop::collection::vec(any_op(), 1..25),
    ) {
        let options = CreateOptions { version: 3, ..options };
        let bytes = executor::block_on(async {
            let memory = Rc::new(MemoryMedium::new(0));
            let medium: Rc<dyn Medium> = memory.clone();
            let mut image = make(&medium, &options).await;
            add_two(&image).await;
            let mut model = Model::new(vec![0; SIZE as usize]);
            let (mut surely, mut maybe) = (vec![false; SECTORS], vec![false; SECTORS]);
            for op in &ops {
                let (sure, possible) = written(op, image.cluster_size());
                mark(&mut surely, &sure);
                mark(&mut maybe, &possible);
                image = run_op(&medium, image, &mut model, op).await;
            }
            check_bitmaps(&image, &surely, &maybe).await;
            image.close().await.unwrap();
            drop(image);
            let image = reopen(&medium).await;
            check_bitmaps(&image, &surely, &maybe).await;
            assert!(read_all(&disk(&image)).await == model.bytes);
            image.close().await.unwrap();
            let report = image.check(Repair::None).await.unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.messages);
            memory.to_vec()
        })
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image.qcow2");
        std::fs::write(&image, &bytes).unwrap();
        qemu_img_ok(&["check", "-f", "qcow2", text(&image)]);
        if let Some(said) = qemu_img_ok(&["info", "-f", "qcow2", text(&image)]) {
            prop_assert_eq!(said.matches("auto").count(), 2, "{}", said);
            // It takes them over, and gives their clusters back.
            for name in ["fine", "coarse", "off"] {
                qemu_img_ok(&["bitmap", "--remove", text(&image), name]);
            }
            qemu_img_ok(&["check", "-f", "qcow2", text(&image)]);
        }
    }
}

fn options() -> CreateOptions {
    CreateOptions {
        size: SIZE,
        ..CreateOptions::default()
    }
}

/// An image with the three bitmaps, cleanly closed.
fn with_bitmaps() -> Vec<u8> {
    executor::block_on(async {
        let memory = Rc::new(MemoryMedium::new(0));
        let medium: Rc<dyn Medium> = memory.clone();
        let image = make(&medium, &options()).await;
        add_two(&image).await;
        image.close().await.unwrap();
        memory.to_vec()
    })
    .unwrap()
}

fn medium(bytes: &[u8]) -> Rc<dyn Medium> {
    Rc::new(MemoryMedium::from_vec(bytes.to_vec()))
}

#[test]
fn who_was_not_closed_is_not_trusted() {
    executor::block_on(async {
        let medium = medium(&with_bitmaps());
        // Open for writing, and gone.
        drop(reopen(&medium).await);
        let image = reopen(&medium).await;
        let in_use: Vec<bool> = image.bitmaps().iter().map(|b| b.in_use).collect();
        assert_eq!(in_use, [true, true, false]);
        let error = image.bitmap("fine").await.err().unwrap();
        assert_eq!(
            error.message(),
            "Bitmap 'fine' is inconsistent and cannot be used"
        );
        assert!(image.resize(SIZE * 2).await.is_err());
        image.bitmap("off").await.unwrap();
        image.remove_bitmap("fine").await.unwrap();
        image.remove_bitmap("coarse").await.unwrap();
        image.close().await.unwrap();
        drop(image);
        let image = reopen(&medium).await;
        let left: Vec<BitmapInfo> = image.bitmaps();
        assert_eq!(
            (left.len(), left[0].name.as_str(), left[0].auto),
            (1, "off", false)
        );
        let report = image.check(Repair::None).await.unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:?}",
            report.messages
        );
        image.remove_bitmap("off").await.unwrap();
        image.close().await.unwrap();
        assert_eq!(image.header().bitmaps(), None);
    })
    .unwrap();
}

#[test]
fn what_a_writer_without_bitmaps_has_left_is_forgotten() {
    executor::block_on(async {
        let mut bytes = with_bitmaps();
        bytes[88..96].fill(0); // the autoclear features
        let medium = medium(&bytes);
        let image = reopen(&medium).await;
        assert_eq!(
            (image.bitmaps(), image.header().bitmaps()),
            (Vec::new(), None)
        );
        let report = image.check(Repair::All).await.unwrap();
        assert_eq!(report.corruptions, 0, "{:?}", report.messages);
        image.add_bitmap("fine", None, true).unwrap();
        image.close().await.unwrap();
        let report = image.check(Repair::None).await.unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:?}",
            report.messages
        );
    })
    .unwrap();
}

#[test]
fn what_can_t_be_is_refused() {
    executor::block_on(async {
        let empty: Rc<dyn Medium> = Rc::new(MemoryMedium::new(0));
        let old = make(
            &empty,
            &CreateOptions {
                version: 2,
                ..options()
            },
        )
        .await;
        let error = old.add_bitmap("b", None, true).unwrap_err();
        assert_eq!(
            error.message(),
            "Cannot store dirty bitmaps in qcow2 v2 files"
        );
        let image = reopen(&medium(&with_bitmaps())).await;
        let kind = |done: block::Result<()>| done.unwrap_err().kind();
        assert_eq!(
            kind(image.add_bitmap("fine", None, true)),
            ErrorKind::AlreadyExists
        );
        for (name, granularity) in [("", 512), ("n", 256), ("n", 3000), (&"n".repeat(1024), 512)] {
            let done = image.add_bitmap(name, Some(granularity), true);
            assert_eq!(kind(done), ErrorKind::InvalidArgument);
        }
        assert_eq!(kind(image.remove_bitmap("none").await), ErrorKind::NotFound);
        image.create_snapshot("s", (0, 0)).await.unwrap();
        assert_eq!(
            kind(image.apply_snapshot("s").await),
            ErrorKind::Unsupported
        );
    })
    .unwrap();
}

/// Every byte of the directory, and every byte of the extension, in several ways.
#[test]
fn hostile_directories_do_no_harm() {
    let good = with_bitmaps();
    let place =
        executor::block_on(async { reopen(&medium(&good)).await.header().bitmaps().unwrap() })
            .unwrap();
    let extension = (112..512).find(|at| good[*at..].starts_with(&0x2385_2875u32.to_be_bytes()));
    let extension = extension.unwrap();
    let directory = place.directory_offset as usize;
    let places =
        (directory..directory + place.directory_size as usize).chain(extension + 8..extension + 32);
    executor::block_on(async {
        for at in places {
            for value in [0, 0xff, good[at] ^ 0x40] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let options = image_formats::qcow2::OpenOptions {
                    backing: false,
                    ..Default::default()
                };
                let medium = medium(&bytes);
                let opened = Qcow2::open(medium, &block::Refusing, &options).await;
                let Ok(image) = opened else {
                    continue;
                };
                for info in image.bitmaps() {
                    let _ = image.bitmap(&info.name).await;
                }
                let _ = image.close().await;
                let _ = image.check(Repair::All).await;
            }
        }
    })
    .unwrap();
}
