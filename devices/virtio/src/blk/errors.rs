//! What becomes of a request when the host fails: QEMU's `rerror` and `werror`.

use std::sync::Arc;

use block::{BlockError, ErrorKind};
use parking_lot::Mutex;

use super::spec::Status;

/// What to do when the host can't read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ErrorPolicy {
    /// The guest is told.
    #[default]
    Report,
    /// The guest is told that all went well.
    Ignore,
    /// The request waits, and is tried again when a person lets the guest go on.
    Stop,
    /// As `Stop` where the host has no space left, else as `Report`.
    Enospc,
}

/// What was done about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest was told.
    Report,
    /// The guest was not told.
    Ignore,
    /// The request waits.
    Stop,
}

/// A failure of the host's that a request met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoFailure {
    /// The request writes; else it reads.
    pub write: bool,
    /// What was done about it.
    pub action: ErrorAction,
    /// The host has no space left.
    pub no_space: bool,
    /// What happened, in a line.
    pub reason: String,
}

/// Hears of failures, on the disk's thread.
pub type FailureSink = Arc<dyn Fn(IoFailure) + Send + Sync>;

/// A disk's policies, and who hears of failures.
#[derive(Default)]
pub(super) struct Errors {
    pub(super) read: ErrorPolicy,
    pub(super) write: ErrorPolicy,
    pub(super) sink: Arc<Mutex<Option<FailureSink>>>,
}

impl Errors {
    /// Decides about a failure, and tells of it.
    pub(super) fn decide(&self, write: bool, error: &BlockError) -> ErrorAction {
        let no_space = error.kind() == ErrorKind::NoSpace;
        let action = match if write { self.write } else { self.read } {
            ErrorPolicy::Ignore => ErrorAction::Ignore,
            ErrorPolicy::Stop => ErrorAction::Stop,
            ErrorPolicy::Enospc if no_space => ErrorAction::Stop,
            ErrorPolicy::Report | ErrorPolicy::Enospc => ErrorAction::Report,
        };
        let sink = self.sink.lock().clone();
        if let Some(sink) = sink {
            sink(IoFailure {
                write,
                action,
                no_space,
                reason: error.to_string(),
            });
        }
        action
    }
}

/// A request's status when the fault is its own; the error when it is the host's.
pub(super) fn status(result: Result<(), BlockError>) -> Result<Status, BlockError> {
    let Err(error) = result else {
        return Ok(Status::Ok);
    };
    match error.kind() {
        ErrorKind::Unsupported => Ok(Status::Unsupported),
        ErrorKind::OutOfRange | ErrorKind::Misaligned | ErrorKind::ReadOnly => Ok(Status::IoError),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use block::executor::{EngineKind, IoThread};
    use block::{
        BlockFuture, Disk, DiskOptions, IoBuf, Medium, MemoryMedium, RawBackend, SparseRange,
        ZeroFlags,
    };

    use super::super::spec::request;
    use super::super::{Blk, BlkHandle, BlkOptions};
    use super::*;
    use crate::testing::{DATA, Guest};

    const BUFFER: u64 = DATA + 0x1000;
    const STATUS: u64 = DATA + 0x100;

    /// Memory that fails while it is told to.
    struct Failing {
        memory: MemoryMedium,
        fails: Arc<AtomicBool>,
        kind: ErrorKind,
    }

    impl Failing {
        fn check<'a>(&'a self, done: BlockFuture<'a, ()>) -> BlockFuture<'a, ()> {
            if self.fails.load(Ordering::SeqCst) {
                let error = BlockError::new(self.kind, "as the test wants it");
                return Box::pin(async move { Err(error) });
            }
            done
        }
    }

    impl Medium for Failing {
        fn name(&self) -> Rc<str> {
            "failing".into()
        }
        fn len(&self) -> u64 {
            self.memory.len()
        }
        fn read_only(&self) -> bool {
            false
        }
        fn alignment(&self) -> u32 {
            1
        }
        fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
            self.check(self.memory.read(offset, buf))
        }
        fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
            self.check(self.memory.write(offset, buf))
        }
        fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
            self.check(self.memory.write_zeroes(offset, length, flags))
        }
        fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
            self.memory.discard(offset, length)
        }
        fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
            self.memory.preallocate(offset, length)
        }
        fn flush(&self) -> BlockFuture<'_, ()> {
            self.check(self.memory.flush())
        }
        fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
            self.memory.set_len(length)
        }
        fn sparse_range(&self, offset: u64, length: u64) -> block::Result<SparseRange> {
            self.memory.sparse_range(offset, length)
        }
    }

    struct Bench {
        guest: Guest,
        handle: BlkHandle,
        fails: Arc<AtomicBool>,
        heard: Arc<Mutex<Vec<IoFailure>>>,
    }

    fn bench(read_errors: ErrorPolicy, write_errors: ErrorPolicy, kind: ErrorKind) -> Bench {
        let fails = Arc::new(AtomicBool::new(false));
        let thread = IoThread::start("disk", EngineKind::Auto).unwrap();
        let options = BlkOptions {
            read_errors,
            write_errors,
            ..BlkOptions::default()
        };
        let of_thread = fails.clone();
        let (blk, handle) = Blk::new(thread, options, move || async move {
            let medium = Failing {
                memory: MemoryMedium::new(1 << 20),
                fails: of_thread,
                kind,
            };
            let backend = RawBackend::open(Rc::new(medium)).await?;
            Ok(Disk::new(Rc::new(backend), DiskOptions::default()))
        })
        .unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = heard.clone();
        handle.on_failure(Arc::new(move |failure| log.lock().push(failure)));
        let mut guest = Guest::new(blk);
        guest.start(0, 16);
        Bench {
            guest,
            handle,
            fails,
            heard,
        }
    }

    impl Bench {
        fn actions(&self) -> Vec<(bool, ErrorAction, bool)> {
            let heard = std::mem::take(&mut *self.heard.lock());
            heard
                .iter()
                .map(|f| (f.write, f.action, f.no_space))
                .collect()
        }

        /// Sends a write that will wait.
        fn send_write(&mut self) {
            let header = self.guest.blk_header(DATA, request::OUT, 3);
            self.guest.put(STATUS, &[0xee]);
            let pieces = [header, (BUFFER, 512, false), (STATUS, 1, true)];
            self.guest.send(0, &pieces);
            while self.heard.lock().is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn the_guest_is_told_or_not_as_the_policies_say() {
        use ErrorPolicy::{Enospc, Ignore, Report};
        let read = [(BUFFER, 512, true)];
        let write = [(BUFFER, 512, false)];
        for (policies, kind, statuses, actions) in [
            (
                (Report, Ignore),
                ErrorKind::Io,
                (1, 0),
                (ErrorAction::Report, ErrorAction::Ignore),
            ),
            (
                (Ignore, Report),
                ErrorKind::NoSpace,
                (0, 1),
                (ErrorAction::Ignore, ErrorAction::Report),
            ),
            (
                (Report, Enospc),
                ErrorKind::Io,
                (1, 1),
                (ErrorAction::Report, ErrorAction::Report),
            ),
        ] {
            let mut b = bench(policies.0, policies.1, kind);
            b.fails.store(true, Ordering::SeqCst);
            assert_eq!(b.guest.blk(request::IN, 0, &read), statuses.0);
            assert_eq!(b.guest.blk(request::OUT, 0, &write), statuses.1);
            assert_eq!(b.guest.blk(request::FLUSH, 0, &[]), statuses.1);
            // What is wrong with a request is always its own.
            assert_eq!(b.guest.blk(request::IN, 1 << 40, &read), 1);
            let full = kind == ErrorKind::NoSpace;
            let told = [
                (false, actions.0, full),
                (true, actions.1, full),
                (true, actions.1, full),
            ];
            assert_eq!(b.actions(), told);
        }
    }

    #[test]
    fn a_stopped_request_is_tried_again() {
        let mut b = bench(ErrorPolicy::Report, ErrorPolicy::Enospc, ErrorKind::NoSpace);
        b.guest.put(BUFFER, &[0x77; 512]);
        b.fails.store(true, Ordering::SeqCst);
        b.send_write();
        assert_eq!(b.actions(), [(true, ErrorAction::Stop, true)]);
        // It fails again, and waits again.
        b.handle.retry();
        while b.heard.lock().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(b.guest.bytes(STATUS, 1), [0xee]);
        b.fails.store(false, Ordering::SeqCst);
        b.handle.retry();
        assert_eq!(b.guest.used(0).1, 1);
        assert_eq!(b.guest.bytes(STATUS, 1), [0]);
        assert_eq!(b.guest.blk(request::IN, 3, &[(BUFFER + 512, 512, true)]), 0);
        assert_eq!(b.guest.bytes(BUFFER + 512, 512), [0x77; 512]);
    }

    #[test]
    fn a_reset_ends_what_is_stopped() {
        let mut b = bench(ErrorPolicy::Stop, ErrorPolicy::Stop, ErrorKind::Io);
        b.fails.store(true, Ordering::SeqCst);
        b.send_write();
        b.guest.start(0, 16);
        b.fails.store(false, Ordering::SeqCst);
        assert_eq!(b.guest.blk(request::IN, 3, &[(BUFFER, 512, true)]), 0);
        assert_eq!(b.guest.bytes(BUFFER, 512), [0; 512]);
    }
}
