//! The engine on io_uring.

#![allow(unsafe_code)] // Submission entries carry raw addresses into the kernel.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::task::Waker;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::Shared;
use super::operation::Operation;
use super::slots::{SlotId, Slots};
use crate::buffer::{IoBuf, Segment};

/// Entries of the submission ring. More operations than this may be in flight.
const RING_ENTRIES: u32 = 256;
/// The user data of the poll on the executor's own eventfd.
const WAKE_TOKEN: u64 = u64::MAX;
/// The user data of requests to cancel an operation.
const CANCEL_TOKEN: u64 = u64::MAX - 1;
/// The user data of the timeout that bounds the engine's end.
const TIMEOUT_TOKEN: u64 = u64::MAX - 2;
/// How long the engine's end waits for operations that were told to end, in nanoseconds.
const DRAIN_LIMIT: u32 = 200_000_000;
/// preadv and friends take no more than this many pieces (`UIO_MAXIOV`).
pub(crate) const MAX_SEGMENTS: usize = 1024;

pub(crate) struct UringEngine {
    ring: IoUring,
    /// Whether the poll on the wake-up eventfd is in the kernel.
    wake_armed: bool,
}

impl UringEngine {
    pub(crate) fn new(shared: &Shared) -> io::Result<Self> {
        // Completions are taken in by this thread when it enters the kernel anyway, so it need not
        // be interrupted for them (Linux 5.19); one thread submits (6.0).
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(RING_ENTRIES)
            .or_else(|_| IoUring::new(RING_ENTRIES))?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let mut engine = Self {
            ring,
            wake_armed: false,
        };
        engine.arm_wake(shared);
        Ok(engine)
    }

    fn arm_wake(&mut self, shared: &Shared) {
        let fd = types::Fd(shared.wake_fd.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, poll_in())
            .build()
            .user_data(WAKE_TOKEN);
        self.push(&entry);
        self.wake_armed = true;
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the entry's addresses stay valid until its completion: buffers, iovec arrays
            // and descriptors are held in the slot table, and leaked rather than freed if the
            // engine ends first. The wake-up descriptor belongs to `Shared`; polling has no buffer.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter(0);
        }
    }

    pub(crate) fn start(
        &mut self,
        slots: &mut Slots,
        operation: Operation,
        waker: Waker,
    ) -> SlotId {
        let bounded = operation.is_bounded();
        let (entry, segments) = entry_for(&operation);
        let id = slots.insert(waker, operation.into_held(), segments, bounded);
        self.push(&entry.user_data(u64::from(id)));
        id
    }

    /// Tells the kernel that an operation need not go on; it completes soon after.
    pub(crate) fn cancel(&mut self, id: SlotId) {
        let entry = opcode::AsyncCancel::new(u64::from(id)).build();
        self.push(&entry.user_data(CANCEL_TOKEN));
    }

    /// Hands submissions to the kernel and waits for `want` completions.
    fn enter(&mut self, want: usize) {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // The completion ring has overflowed or memory is short: take completions first.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return,
                Err(e) => panic!("io_uring_enter: {e}"),
            }
        }
    }

    pub(crate) fn turn(&mut self, shared: &Shared, slots: &mut Slots, block: bool) -> Vec<Waker> {
        if !self.wake_armed {
            self.arm_wake(shared);
        }
        let ready = !self.ring.completion().is_empty();
        if block && !ready {
            self.enter(1);
        } else if !self.ring.submission().is_empty() {
            self.enter(0);
        }
        let mut woken = Vec::new();
        let mut wake_fired = false;
        for completion in self.ring.completion() {
            let completion: cqueue::Entry = completion;
            if completion.user_data() == WAKE_TOKEN {
                wake_fired = true;
            } else if let Ok(id) = SlotId::try_from(completion.user_data()) {
                woken.extend(slots.complete(id, completion.result()));
            }
        }
        if wake_fired {
            self.wake_armed = false;
            let mut count = [0; 8];
            // Only resets the counter; what woke us is in the inbox.
            let _ = rustix::io::read(&shared.wake_fd, &mut count);
        }
        woken
    }

    /// Waits until the kernel is done with every buffer.
    pub(crate) fn drain(&mut self, shared: &Shared, slots: &mut Slots) {
        while slots.bounded_in_flight() > 0 {
            self.turn(shared, slots, true);
        }
        self.drain_cancelled(shared, slots);
        slots.leak_unbounded();
    }

    /// Waits for operations that were cancelled, but not for ever: the kernel may have one that it cannot cancel.
    fn drain_cancelled(&mut self, shared: &Shared, slots: &mut Slots) {
        if slots.in_flight() == 0 {
            return;
        }
        let start = std::time::Instant::now();
        let limit = types::Timespec::new().nsec(DRAIN_LIMIT);
        let entry = opcode::Timeout::new(&raw const limit).build();
        self.push(&entry.user_data(TIMEOUT_TOKEN));
        let limit = std::time::Duration::from_nanos(u64::from(DRAIN_LIMIT));
        while slots.in_flight() > 0 && start.elapsed() < limit {
            self.turn(shared, slots, true);
        }
    }
}

fn poll_in() -> u32 {
    u32::from(libc::POLLIN.cast_unsigned())
}

fn entry_for(operation: &Operation) -> (squeue::Entry, Option<Box<[Segment]>>) {
    let fd = |file: &OwnedFd| types::Fd(file.as_raw_fd());
    match operation {
        Operation::Read { file, offset, buf } => transfer_entry(fd(file), *offset, buf, false),
        Operation::Write { file, offset, buf } => transfer_entry(fd(file), *offset, buf, true),
        Operation::Sync { file } => {
            let entry = opcode::Fsync::new(fd(file))
                .flags(types::FsyncFlags::DATASYNC)
                .build();
            (entry, None)
        }
        Operation::Allocate {
            file,
            mode,
            offset,
            length,
        } => {
            let entry = opcode::Fallocate::new(fd(file), *length)
                .offset(*offset)
                .mode(*mode)
                .build();
            (entry, None)
        }
        Operation::Readable { file } => (opcode::PollAdd::new(fd(file), poll_in()).build(), None),
        // No position: the offset of a stream.
        Operation::EventRead { file, buf } | Operation::Receive { file, buf } => {
            transfer_entry(fd(file), u64::MAX, buf, false)
        }
        Operation::Send { file, buf } => transfer_entry(fd(file), u64::MAX, buf, true),
    }
}

fn transfer_entry(
    fd: types::Fd,
    offset: u64,
    buf: &IoBuf,
    write: bool,
) -> (squeue::Entry, Option<Box<[Segment]>>) {
    if let [segment] = buf.segments() {
        let length = u32::try_from(segment.length).unwrap_or(i32::MAX.cast_unsigned());
        let entry = if write {
            opcode::Write::new(fd, segment.address, length)
                .offset(offset)
                .build()
        } else {
            opcode::Read::new(fd, segment.address, length)
                .offset(offset)
                .build()
        };
        return (entry, None);
    }
    let pieces = buf.segments().len().min(MAX_SEGMENTS);
    let segments: Box<[Segment]> = buf.segments()[..pieces].into();
    let count = u32::try_from(segments.len()).unwrap_or(0);
    // `Segment` has the layout of `struct iovec`.
    let iovecs = segments.as_ptr().cast::<libc::iovec>();
    let entry = if write {
        opcode::Writev::new(fd, iovecs, count)
            .offset(offset)
            .build()
    } else {
        opcode::Readv::new(fd, iovecs, count).offset(offset).build()
    };
    (entry, Some(segments))
}
