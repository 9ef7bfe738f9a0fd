//! Mirrors and backups of disks that are written to, beside plain vectors.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::executor::{self, block_on, spawn_local, yield_now};
use block::job::{
    Backup, BackupOptions, CopyMode, ErrorAction, IoSide, IoStatus, Job, JobEvent, JobKind,
    JobOptions, JobStatus, Layers, Mirror, MirrorOptions, OnError,
};
use block::{
    BlockBackend, BlockError, BlockFuture, DirtyBitmap, Disk, DiskOptions, Extent, ExtentQuery,
    IoBuf, Limits, MemoryMedium, RawBackend, ZeroFlags,
};
use proptest::prelude::*;

const SIZE: usize = 300 << 10;
const GRANULE: u32 = 16 << 10;

/// A small generator, so that a seed gives the same order of events again.
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

/// A backend whose requests take random turns, and fail when told to.
struct Unsteady {
    inner: RawBackend,
    random: Rc<Random>,
    failing: Cell<u32>,
    errno: Cell<i32>,
}

impl Unsteady {
    async fn hold_up(&self) {
        for _ in 0..self.random.below(4) {
            yield_now().await;
        }
    }

    fn fail(&self) -> block::Result<()> {
        let left = self.failing.get();
        if left == 0 {
            return Ok(());
        }
        self.failing.set(left - 1);
        let error = std::io::Error::from_raw_os_error(self.errno.get());
        Err(BlockError::io("told to fail", error))
    }
}

impl BlockBackend for Unsteady {
    fn limits(&self) -> Limits {
        Limits {
            max_transfer: 40 << 10,
            ..self.inner.limits()
        }
    }

    fn format_name(&self) -> &'static str {
        "unsteady"
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.hold_up().await;
            let result = self.inner.read(offset, buf).await;
            self.hold_up().await;
            result
        })
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.hold_up().await;
            self.fail()?;
            let result = self.inner.write(offset, buf).await;
            self.hold_up().await;
            result
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.hold_up().await;
            self.fail()?;
            let result = self.inner.write_zeroes(offset, length, flags).await;
            self.hold_up().await;
            result
        })
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.hold_up().await;
            let zeroed = self.inner.write_zeroes(offset, length, ZeroFlags::empty());
            let result = zeroed.await;
            self.hold_up().await;
            result
        })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        self.inner.flush()
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        self.inner.extents(query)
    }

    fn resize(&self, size: u64) -> BlockFuture<'_, ()> {
        self.inner.resize(size)
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        self.inner.close()
    }
}

/// A disk with its backend.
struct Side {
    disk: Rc<Disk>,
    backend: Rc<Unsteady>,
}

async fn side(content: &[u8], random: &Rc<Random>) -> Side {
    let medium = Rc::new(MemoryMedium::from_vec(content.to_vec()));
    let backend = Rc::new(Unsteady {
        inner: RawBackend::open(medium).await.unwrap(),
        random: random.clone(),
        failing: Cell::new(0),
        errno: Cell::new(libc::EIO),
    });
    let options = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    let disk = Rc::new(Disk::new(backend.clone(), options));
    Side { disk, backend }
}

async fn content(disk: &Disk) -> Vec<u8> {
    let buf = IoBuf::zeroed(SIZE);
    disk.read(0, buf.clone()).await.unwrap();
    buf.to_vec()
}

fn filled(random: &Random) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for sector in bytes.chunks_mut(2048) {
        if random.below(2) == 0 {
            sector.fill(random.below(255) as u8 + 1);
        }
    }
    bytes
}

/// Changes the disk in one way or another.
async fn change(disk: &Disk, random: &Random) {
    let offset = random.below(SIZE as u64 / 512) * 512;
    let length = (random.below(60) * 512 + 512).min(SIZE as u64 - offset);
    match random.below(6) {
        0 => {
            let flags = ZeroFlags::MAY_UNMAP;
            disk.write_zeroes(offset, length, flags, false)
                .await
                .unwrap();
        }
        1 => disk.discard(offset, length).await.unwrap(),
        _ => {
            let data = vec![random.below(255) as u8 + 1; length as usize];
            let buf = IoBuf::from_slice(&data);
            disk.write(offset, buf, false).await.unwrap();
        }
    }
}

/// Lets `count` writers change the disk until the flag is set.
fn writers(
    disk: &Rc<Disk>,
    random: &Rc<Random>,
    count: u64,
) -> (Rc<Cell<bool>>, Vec<executor::JoinHandle<()>>) {
    let stop = Rc::new(Cell::new(false));
    let tasks = (0..count).map(|_| {
        let (disk, random, stop) = (disk.clone(), random.clone(), stop.clone());
        spawn_local(async move {
            while !stop.get() {
                change(&disk, &random).await;
                for _ in 0..random.below(6) {
                    yield_now().await;
                }
            }
        })
    });
    let tasks = tasks.collect();
    (stop, tasks)
}

type Told = Rc<RefCell<Vec<JobEvent>>>;

fn job_with(change: impl FnOnce(&mut JobOptions)) -> (Rc<Job>, Told) {
    let mut options = JobOptions {
        id: "job0".into(),
        kind: JobKind::Mirror,
        speed: 0,
        auto_finalize: true,
        auto_dismiss: true,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
    };
    change(&mut options);
    let told: Told = Rc::default();
    let list = told.clone();
    let job = Job::new(options, move |_, event| list.borrow_mut().push(event));
    (Rc::new(job), told)
}

fn mirror_options(copy_mode: CopyMode) -> MirrorOptions {
    MirrorOptions {
        granularity: GRANULE,
        layers: Layers::All,
        target_is_zero: false,
        copy_mode,
    }
}

/// A mirror of a disk that is written to, up to the moment when both must be the same.
async fn mirrored(seed: u64, copy_mode: CopyMode, pivot: bool) {
    let random = Rc::new(Random(Cell::new(seed | 1)));
    let source = side(&filled(&random), &random).await;
    let target = side(&filled(&random), &random).await;
    let (job, told) = job_with(|_| {});
    let count = random.below(4);
    let (stop, tasks) = writers(&source.disk, &random, count);
    let options = mirror_options(copy_mode);
    let mirror = Mirror::new(
        job.clone(),
        source.disk.clone(),
        target.disk.clone(),
        options,
    );
    let mirror = mirror.unwrap();
    job.start();
    let steering = {
        let (job, random) = (job.clone(), random.clone());
        spawn_local(async move {
            for _ in 0..random.below(3) {
                for _ in 0..random.below(100) {
                    yield_now().await;
                }
                if job.pause().is_ok() {
                    yield_now().await;
                    job.resume().unwrap();
                }
            }
            while job.status() != JobStatus::Ready {
                executor::sleep(std::time::Duration::from_millis(1))
                    .await
                    .unwrap();
            }
            if pivot {
                job.complete()
            } else {
                job.cancel(false)
            }
            .unwrap();
        })
    };
    let end = mirror.run().await.unwrap();
    steering.await;
    assert_eq!(end.pivot, pivot);
    let mut expected = vec![0; SIZE];
    let buf = IoBuf::zeroed(SIZE);
    source.backend.inner.read(0, buf.clone()).await.unwrap();
    buf.copy_to(&mut expected);
    let mut found = vec![0; SIZE];
    target.backend.inner.read(0, buf.clone()).await.unwrap();
    buf.copy_to(&mut found);
    let differs = (0..SIZE).find(|n| expected[*n] != found[*n]);
    assert_eq!(differs, None, "seed {seed}");
    if pivot {
        source
            .disk
            .replace_backend(&end.still, target.backend.clone());
    }
    drop(end.still);
    // The disk goes on working.
    for _ in 0..20 {
        yield_now().await;
    }
    stop.set(true);
    for task in tasks {
        task.await;
    }
    job.settle().await.unwrap();
    job.end(Ok(())).await;
    let told = told.borrow().clone();
    let last = &told[told.len() - 5..];
    assert_eq!(
        last,
        [
            JobEvent::Status(JobStatus::Waiting),
            JobEvent::Status(JobStatus::Pending),
            JobEvent::Completed,
            JobEvent::Status(JobStatus::Concluded),
            JobEvent::Status(JobStatus::Null),
        ]
    );
    if pivot {
        assert!(content(&source.disk).await == content(&target.disk).await);
    }
}

/// A backup of a disk that is written to, of everything or of what a bitmap says.
async fn backed_up(seed: u64, incremental: bool) {
    let random = Rc::new(Random(Cell::new(seed | 1)));
    let before = filled(&random);
    let source = side(&before, &random).await;
    let bitmap = Rc::new(DirtyBitmap::new("b", SIZE as u64, 4096).unwrap());
    let target = if incremental {
        side(&before, &random).await
    } else {
        side(&filled(&random), &random).await
    };
    source.disk.add_bitmap(bitmap.clone());
    let (stop, tasks) = writers(&source.disk, &random, 3);
    for _ in 0..random.below(300) {
        yield_now().await;
    }
    let (job, _) = job_with(|options| options.kind = JobKind::Backup);
    let still = source.disk.stand_still().await;
    let buf = IoBuf::zeroed(SIZE);
    source.backend.inner.read(0, buf.clone()).await.unwrap();
    let expected = buf.to_vec();
    let options = BackupOptions {
        granularity: GRANULE,
        layers: Layers::All,
        target_is_zero: false,
    };
    let backup = Backup::begin(
        job.clone(),
        source.disk.clone(),
        target.disk.clone(),
        &still,
        incremental.then_some(&*bitmap),
        options,
    )
    .unwrap();
    drop(still);
    job.start();
    backup.run().await.unwrap();
    assert_eq!(job.progress().0, job.progress().1);
    stop.set(true);
    for task in tasks {
        task.await;
    }
    let found = content(&target.disk).await;
    let differs = (0..SIZE).find(|n| expected[*n] != found[*n]);
    assert_eq!(differs, None, "seed {seed}");
    // The disk itself has gone on.
    assert!(bitmap.dirty_bytes() > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn a_mirror_ends_with_the_same_content(seed in any::<u64>(), blocking in any::<bool>(), pivot in any::<bool>()) {
        let mode = if blocking { CopyMode::WriteBlocking } else { CopyMode::Background };
        block_on(mirrored(seed, mode, pivot)).unwrap();
    }

    #[test]
    fn a_backup_is_of_the_moment_when_it_began(seed in any::<u64>(), incremental in any::<bool>()) {
        block_on(backed_up(seed, incremental)).unwrap();
    }
}

#[test]
fn a_backup_of_nothing_keeps_what_is_overwritten() {
    block_on(async {
        let random = Rc::new(Random(Cell::new(7)));
        let before = filled(&random);
        let source = side(&before, &random).await;
        let target = side(&vec![0; SIZE], &random).await;
        let (job, told) = job_with(|options| options.kind = JobKind::Backup);
        let still = source.disk.stand_still().await;
        let options = BackupOptions {
            granularity: GRANULE,
            layers: Layers::None,
            target_is_zero: true,
        };
        let (from, to) = (source.disk.clone(), target.disk.clone());
        let backup = Backup::begin(job.clone(), from, to, &still, None, options).unwrap();
        drop(still);
        job.start();
        let running = {
            let job = job.clone();
            spawn_local(async move {
                let result = backup.run().await;
                assert!(result.is_err());
                job.end(result).await;
            })
        };
        let buf = IoBuf::from_slice(&[0xee; 512]);
        source.disk.write(40 << 10, buf, false).await.unwrap();
        let found = content(&target.disk).await;
        let granule = (32 << 10)..(48 << 10);
        assert!(found[granule.clone()] == before[granule.clone()]);
        assert!(found[..granule.start].iter().all(|b| *b == 0));
        assert!(found[granule.end..].iter().all(|b| *b == 0));
        job.cancel(false).unwrap();
        running.await;
        let told = told.borrow().clone();
        assert!(told.contains(&JobEvent::Cancelled) && !told.contains(&JobEvent::Completed));
        // Nothing is kept any more.
        let buf = IoBuf::from_slice(&[0xee; 512]);
        source.disk.write(100 << 10, buf, false).await.unwrap();
        assert!(content(&target.disk).await[100 << 10] == 0);
    })
    .unwrap();
}

#[test]
fn zeroes_are_not_copied_to_what_is_zero() {
    block_on(async {
        let random = Rc::new(Random(Cell::new(9)));
        let mut bytes = vec![0; SIZE];
        bytes[100 << 10..104 << 10].fill(1);
        // Holes are told from zeroes by a file only.
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE as u64).unwrap();
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[1; 4096], 100 << 10).unwrap();
        let options = block::FileOptions::default();
        let medium = Rc::new(block::HostFile::open(file.path(), &options).unwrap());
        let backend = Rc::new(RawBackend::open(medium).await.unwrap());
        let source = Rc::new(Disk::new(backend, DiskOptions::default()));
        let target = side(&vec![0; SIZE], &random).await;
        let (job, _) = job_with(|_| {});
        let options = MirrorOptions {
            target_is_zero: true,
            ..mirror_options(CopyMode::Background)
        };
        let mirror = Mirror::new(job.clone(), source, target.disk.clone(), options).unwrap();
        job.start();
        let running = spawn_local(async move { mirror.run().await });
        while job.status() != JobStatus::Ready {
            executor::sleep(std::time::Duration::from_millis(1))
                .await
                .unwrap();
        }
        // One block of the mirror and no more.
        assert_eq!(job.progress(), (u64::from(GRANULE), u64::from(GRANULE)));
        job.complete().unwrap();
        running.await.unwrap();
        assert!(content(&target.disk).await == bytes);
    })
    .unwrap();
}

/// A mirror whose target fails a few times, with a policy for that.
async fn with_failures(policy: OnError, errno: i32) -> (Rc<Job>, Told, block::Result<()>, bool) {
    let random = Rc::new(Random(Cell::new(11)));
    let source = side(&filled(&random), &random).await;
    let target = side(&vec![0; SIZE], &random).await;
    target.backend.failing.set(2);
    target.backend.errno.set(errno);
    let (job, told) = job_with(|options| options.on_target_error = policy);
    let (from, to) = (source.disk.clone(), target.disk.clone());
    let options = mirror_options(CopyMode::Background);
    let mirror = Mirror::new(job.clone(), from, to, options).unwrap();
    job.start();
    let steering = {
        let job = job.clone();
        spawn_local(async move {
            loop {
                executor::sleep(std::time::Duration::from_millis(1))
                    .await
                    .unwrap();
                match job.status() {
                    JobStatus::Ready => return job.complete().unwrap(),
                    JobStatus::Paused => {
                        let expected = match errno {
                            libc::ENOSPC => IoStatus::NoSpace,
                            _ => IoStatus::Failed,
                        };
                        assert_eq!(job.io_status(), expected);
                        job.resume().unwrap();
                        assert_eq!(job.io_status(), IoStatus::Ok);
                    }
                    JobStatus::Null => return,
                    _ => {}
                }
            }
        })
    };
    let result = mirror.run().await.map(drop);
    let same = content(&source.disk).await == content(&target.disk).await;
    if result.is_err() {
        let error = BlockError::new(block::ErrorKind::Io, "told to fail");
        job.end(Err(error)).await;
    }
    steering.await;
    (job, told, result, same)
}

#[test]
fn failures_are_dealt_with_by_their_policy() {
    block_on(async {
        let count = |told: &Told, event: JobEvent| {
            let told = told.borrow();
            told.iter().filter(|e| **e == event).count()
        };
        let failed = |action| JobEvent::Error(IoSide::Target, action);
        let (job, told, result, _) = with_failures(OnError::Report, libc::EIO).await;
        assert!(result.is_err() && job.error().unwrap().contains("told to fail"));
        assert_eq!(count(&told, failed(ErrorAction::Report)), 1);
        let (_, told, result, same) = with_failures(OnError::Ignore, libc::EIO).await;
        assert!(result.is_ok() && same);
        assert_eq!(count(&told, failed(ErrorAction::Ignore)), 2);
        let (_, told, result, same) = with_failures(OnError::Stop, libc::EIO).await;
        assert!(result.is_ok() && same);
        assert_eq!(count(&told, failed(ErrorAction::Stop)), 2);
        assert!(count(&told, JobEvent::Status(JobStatus::Paused)) > 0);
        let (_, told, result, same) = with_failures(OnError::Enospc, libc::ENOSPC).await;
        assert!(result.is_ok() && same);
        assert_eq!(count(&told, failed(ErrorAction::Stop)), 2);
        let (_, _, result, _) = with_failures(OnError::Enospc, libc::EIO).await;
        assert!(result.is_err());
    })
    .unwrap();
}

#[test]
fn commands_are_taken_in_their_states_only() {
    block_on(async {
        let (job, told) = job_with(|options| {
            options.auto_finalize = false;
            options.auto_dismiss = false;
        });
        job.start();
        let refused = |result: block::Result<()>| result.unwrap_err().one_line();
        assert_eq!(
            refused(job.complete()),
            "Job 'job0' in state 'running' cannot accept command verb 'complete'"
        );
        assert_eq!(
            refused(job.resume()),
            "Can't resume a job that was not paused"
        );
        job.pause().unwrap();
        assert_eq!(refused(job.pause()), "Job is already paused");
        job.resume().unwrap();
        let ending = {
            let job = job.clone();
            spawn_local(async move {
                job.settle().await.unwrap();
                job.end(Ok(())).await;
            })
        };
        yield_now().await;
        assert_eq!(job.status(), JobStatus::Pending);
        assert!(told.borrow().contains(&JobEvent::Pending));
        assert_eq!(
            refused(job.pause()),
            "Job 'job0' in state 'pending' cannot accept command verb 'pause'"
        );
        job.finalize().unwrap();
        yield_now().await;
        yield_now().await;
        assert_eq!(job.status(), JobStatus::Concluded);
        assert!(job.cancel(true).is_err());
        job.dismiss().unwrap();
        ending.await;
        assert_eq!(job.status(), JobStatus::Null);
    })
    .unwrap();
}

#[test]
fn a_limit_on_the_speed_holds_and_can_be_lifted() {
    block_on(async {
        let random = Rc::new(Random(Cell::new(13)));
        let source = side(&vec![1; SIZE], &random).await;
        let target = side(&vec![0; SIZE], &random).await;
        // Three blocks in a second: the whole takes six.
        let (job, _) = job_with(|options| options.speed = 3 * u64::from(GRANULE));
        let still = source.disk.stand_still().await;
        let options = BackupOptions {
            granularity: GRANULE,
            layers: Layers::All,
            target_is_zero: false,
        };
        let (from, to) = (source.disk.clone(), target.disk.clone());
        let backup = Backup::begin(job.clone(), from, to, &still, None, options).unwrap();
        drop(still);
        let start = std::time::Instant::now();
        job.start();
        let running = spawn_local(async move { backup.run().await });
        executor::sleep(std::time::Duration::from_millis(300))
            .await
            .unwrap();
        assert_ne!(job.progress().0, 0);
        job.set_speed(0).unwrap();
        running.await.unwrap();
        assert!(start.elapsed().as_secs() < 5);
        assert!(content(&target.disk).await == vec![1; SIZE]);
    })
    .unwrap();
}
