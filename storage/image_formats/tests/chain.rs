//! Jobs on chains of images that are written to, beside a plain vector; the files are read by qemu-img afterwards.

mod support;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::executor::{block_on, spawn_local, yield_now};
use block::job::{Job, JobKind, JobOptions, JobStatus, OnError};
use block::{Disk, DiskOptions, IoBuf, ZeroFlags};
use image_formats::chain::{self, Commit, Overlay, Stream};
use image_formats::qcow2::CreateOptions;
use image_formats::{ImageOptions, create_file, open_image, qcow2};
use proptest::prelude::*;
use support::{qemu_img_ok, text};

const SIZE: usize = 1 << 20;

struct Random(Cell<u64>);

impl Random {
    fn below(&self, limit: u64) -> u64 {
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.set(x);
        (x >> 20) % limit
    }
}

fn options() -> ImageOptions {
    ImageOptions {
        write: true,
        ..ImageOptions::default()
    }
}

async fn open(path: &Path) -> Rc<Disk> {
    let image = open_image(text(path), &options()).await.unwrap();
    let policies = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    Rc::new(Disk::new(image.backend, policies))
}

/// Makes a qcow2 image; its cluster size is one of three.
async fn make(path: &Path, size: usize, backing: Option<(&str, &str)>, random: &Random) {
    let medium = create_file(text(path), block::CacheMode::Writeback).unwrap();
    let create = CreateOptions {
        size: size as u64,
        cluster_size: 4096 << (random.below(3) * 2),
        backing_file: backing.map(|(name, _)| name.to_owned()),
        backing_format: backing.map(|(_, format)| format.to_owned()),
        ..CreateOptions::default()
    };
    qcow2::create(&medium, &block::Refusing, &create)
        .await
        .unwrap();
}

/// One change of the disk, and of the model as the disk says.
async fn change(disk: &Disk, model: &RefCell<Vec<u8>>, random: &Random) {
    let offset = random.below(SIZE as u64 / 512) * 512;
    let length = (random.below(100) * 512 + 512).min(SIZE as u64 - offset);
    let range = offset as usize..(offset + length) as usize;
    match random.below(8) {
        0..3 => {
            let flags = ZeroFlags::MAY_UNMAP;
            disk.write_zeroes(offset, length, flags, false)
                .await
                .unwrap();
            model.borrow_mut()[range].fill(0);
        }
        3 => {
            disk.discard(offset, length).await.unwrap();
            let buf = IoBuf::zeroed(length as usize);
            disk.read(offset, buf.clone()).await.unwrap();
            let seen = buf.to_vec();
            let mut model = model.borrow_mut();
            for (new, old) in seen.iter().zip(&mut model[range]) {
                assert!(
                    *new == *old || *new == 0,
                    "a discard brought up something else"
                );
                *old = *new;
            }
        }
        _ => {
            let data = vec![random.below(255) as u8 + 1; length as usize];
            let buf = IoBuf::from_slice(&data);
            disk.write(offset, buf, false).await.unwrap();
            model.borrow_mut()[range].copy_from_slice(&data);
        }
    }
}

async fn check(disk: &Disk, model: &RefCell<Vec<u8>>, when: &str) {
    let buf = IoBuf::zeroed(SIZE);
    disk.read(0, buf.clone()).await.unwrap();
    let (seen, model) = (buf.to_vec(), model.borrow());
    let differs = (0..SIZE).find(|n| seen[*n] != model[*n]);
    assert_eq!(differs, None, "{when}");
}

fn job(kind: JobKind) -> Rc<Job> {
    let options = JobOptions {
        id: "job0".into(),
        kind,
        speed: 0,
        auto_finalize: true,
        auto_dismiss: true,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
    };
    Rc::new(Job::new(options, |_, _| {}))
}

/// A chain of some images below a disk, each with content of its own.
struct Chain {
    directory: tempfile::TempDir,
    disk: Rc<Disk>,
    model: Rc<RefCell<Vec<u8>>>,
    made: Cell<u32>,
    random: Rc<Random>,
}

impl Chain {
    async fn new(seed: u64, length: u64) -> Self {
        let random = Rc::new(Random(Cell::new(seed | 1)));
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("base");
        let raw = random.below(2) == 0;
        // The base may be smaller than what is above it.
        let size = SIZE - random.below(2) as usize * (SIZE / 4);
        if raw {
            std::fs::write(&base, vec![0; size]).unwrap();
        } else {
            make(&base, size, None, &random).await;
        }
        let mut content = vec![0; SIZE];
        let format = if raw { "raw" } else { "qcow2" };
        let opening = ImageOptions {
            format: Some(format.into()),
            ..options()
        };
        let backend = open_image(text(&base), &opening).await.unwrap().backend;
        let disk = Disk::new(backend, DiskOptions::default());
        for at in (0..size).step_by(8192) {
            if random.below(2) == 0 {
                content[at..at + 8192].fill(random.below(255) as u8 + 1);
                let buf = IoBuf::from_slice(&content[at..at + 8192]);
                disk.write(at as u64, buf, false).await.unwrap();
            }
        }
        disk.close().await.unwrap();
        drop(disk);
        let model = Rc::new(RefCell::new(content));
        let mut below = ("base".to_owned(), format);
        let mut top = base;
        for n in 0..length {
            let name = format!("layer{n}");
            top = directory.path().join(&name);
            make(&top, SIZE, Some((&below.0, below.1)), &random).await;
            let disk = open(&top).await;
            for _ in 0..3 + random.below(8) {
                change(&disk, &model, &random).await;
            }
            disk.close().await.unwrap();
            below = (name, "qcow2");
        }
        Self {
            disk: open(&top).await,
            directory,
            model,
            made: Cell::new(0),
            random,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn depth(&self) -> usize {
        chain::layers(&self.disk.backend()).len()
    }

    async fn put_overlay(&self) {
        self.made.set(self.made.get() + 1);
        let overlay = Overlay {
            file: text(&self.path(&format!("overlay{}", self.made.get()))).to_owned(),
            existing: false,
        };
        let depth = self.depth();
        chain::put_overlay(&self.disk, &overlay, &options())
            .await
            .unwrap();
        assert_eq!(self.depth(), depth + 1);
    }

    async fn stream(&self) {
        let depth = self.depth();
        // What is below the top stays, or a part of it.
        let base = 1 + self.random.below(depth as u64) as usize;
        let what = Stream {
            base: (base < depth).then_some(base),
            backing_file: None,
        };
        let job = job(JobKind::Stream);
        job.start();
        chain::stream(&job, &self.disk, &what).await.unwrap();
        assert_eq!(self.depth(), 1 + depth - base);
        assert_eq!(job.progress(), (SIZE as u64, SIZE as u64));
    }

    async fn commit(&self) {
        let depth = self.depth();
        let top = self.random.below(depth as u64 - 1) as usize;
        let base = top + 1 + self.random.below((depth - top - 1) as u64) as usize;
        let what = Commit {
            top,
            base,
            backing_file: None,
        };
        let job = job(JobKind::Commit);
        let options = options();
        job.start();
        if top > 0 {
            let committed = chain::commit_below(&job, &self.disk, &what, &options);
            committed.await.unwrap();
            assert_eq!(self.depth(), depth - (base - top));
            return;
        }
        let pivot = self.random.below(3) != 0;
        let steering = {
            let job = job.clone();
            spawn_local(async move {
                while job.status() != JobStatus::Ready {
                    yield_now().await;
                }
                if pivot {
                    job.complete()
                } else {
                    job.cancel(false)
                }
                .unwrap();
            })
        };
        let committed = chain::commit_active(&job, &self.disk, &what, &options);
        committed.await.unwrap();
        steering.await;
        let expected = if pivot { depth - base } else { depth };
        assert_eq!(self.depth(), expected);
        // Nobody writes to what is below.
        for layer in &chain::layers(&self.disk.backend())[1..] {
            assert!(layer.limits().read_only);
        }
    }

    async fn job(&self) {
        match self.random.below(4) {
            0 | 1 => self.put_overlay().await,
            _ if self.depth() < 2 => {}
            2 => match chain::as_qcow2(&self.disk.backend()) {
                Some(_) => self.stream().await,
                None => self.put_overlay().await,
            },
            _ => self.commit().await,
        }
    }
}

/// Several jobs on a chain, while a guest writes.
async fn run(seed: u64) {
    let chain = Chain::new(seed, 1 + seed % 3).await;
    let stop = Rc::new(Cell::new(false));
    let writer = {
        let (disk, model, random) = (
            chain.disk.clone(),
            chain.model.clone(),
            chain.random.clone(),
        );
        let stop = stop.clone();
        spawn_local(async move {
            while !stop.get() {
                change(&disk, &model, &random).await;
                for _ in 0..random.below(8) {
                    yield_now().await;
                }
                if random.below(8) == 0 {
                    check(&disk, &model, "meanwhile").await;
                }
            }
        })
    };
    for _ in 0..5 {
        chain.job().await;
    }
    stop.set(true);
    writer.await;
    check(&chain.disk, &chain.model, "in the end").await;
    let top = chain.disk.backend().file_name().unwrap();
    let files: Vec<(String, &str)> = chain::layers(&chain.disk.backend())
        .iter()
        .map(|layer| (layer.file_name().unwrap().to_string(), layer.format_name()))
        .collect();
    let raw = chain.path("raw");
    chain.disk.close().await.unwrap();
    let Chain {
        directory: _files,
        model,
        disk,
        ..
    } = chain;
    drop(disk);
    let format = files[0].1;
    // qemu-img follows the names in the headers.
    let read = ["convert", "-f", format, "-O", "raw", &top, text(&raw)];
    if qemu_img_ok(&read).is_some() {
        assert!(std::fs::read(&raw).unwrap() == *model.borrow());
        for (file, format) in files.iter().filter(|(_, format)| *format == "qcow2") {
            qemu_img_ok(&["check", "-f", format, file]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 30, ..ProptestConfig::default() })]

    #[test]
    fn chains_change_under_a_guest_that_writes(seed in any::<u64>()) {
        block_on(run(seed)).unwrap();
    }
}

#[test]
fn a_failed_overlay_leaves_the_disk_as_it_was() {
    block_on(async {
        let chain = Chain::new(5, 2).await;
        // Its own backing file, and a folder that is not there.
        for file in ["base", "missing/overlay"] {
            let overlay = Overlay {
                file: text(&chain.path(file)).to_owned(),
                existing: false,
            };
            let put = chain::put_overlay(&chain.disk, &overlay, &options()).await;
            assert!(put.is_err());
            check(&chain.disk, &chain.model, file).await;
            change(&chain.disk, &chain.model, &chain.random).await;
        }
        // An image that names something else below it, which is not there: the old image is opened again.
        let existing = chain.path("existing");
        make(&existing, SIZE, Some(("nowhere", "qcow2")), &chain.random).await;
        let overlay = Overlay {
            file: text(&existing).to_owned(),
            existing: true,
        };
        let put = chain::put_overlay(&chain.disk, &overlay, &options()).await;
        assert!(put.unwrap_err().one_line().contains("nowhere"));
        check(&chain.disk, &chain.model, "after all").await;
        change(&chain.disk, &chain.model, &chain.random).await;
        assert_eq!(chain.depth(), 3);
    })
    .unwrap();
}

#[test]
fn a_commit_that_is_cancelled_leaves_the_chain_as_it_was() {
    block_on(async {
        let chain = Chain::new(8, 2).await;
        for top in [0, 1] {
            let job = job(JobKind::Commit);
            job.start();
            job.cancel(true).unwrap();
            let what = Commit {
                top,
                base: 2,
                backing_file: None,
            };
            let result = if top == 0 {
                chain::commit_active(&job, &chain.disk, &what, &options()).await
            } else {
                chain::commit_below(&job, &chain.disk, &what, &options()).await
            };
            assert!(result.is_err());
            assert_eq!(chain.depth(), 3);
            let images = chain::layers(&chain.disk.backend());
            assert!(images[1..].iter().all(|layer| layer.limits().read_only));
            check(&chain.disk, &chain.model, "cancelled").await;
        }
    })
    .unwrap();
}

#[test]
fn zeroes_between_the_top_and_the_base_stay_zeroes() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let random = Random(Cell::new(3));
        std::fs::write(path("base"), vec![7; SIZE]).unwrap();
        make(&path("middle"), SIZE, Some(("base", "raw")), &random).await;
        let middle = open(&path("middle")).await;
        let flags = ZeroFlags::MAY_UNMAP;
        middle
            .write_zeroes(0, SIZE as u64 / 2, flags, false)
            .await
            .unwrap();
        middle.close().await.unwrap();
        drop(middle);
        make(&path("top"), SIZE, Some(("middle", "qcow2")), &random).await;
        let disk = open(&path("top")).await;
        let job = job(JobKind::Stream);
        job.start();
        let what = Stream {
            base: Some(2),
            backing_file: None,
        };
        chain::stream(&job, &disk, &what).await.unwrap();
        assert_eq!(chain::layers(&disk.backend()).len(), 2);
        let mut expected = vec![7; SIZE];
        expected[..SIZE / 2].fill(0);
        check(&disk, &RefCell::new(expected), "streamed").await;
    })
    .unwrap();
}
