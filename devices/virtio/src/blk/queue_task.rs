//! A queue at work on the disk's thread.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::Disk;
use block::executor::{EventSource, JoinHandle, spawn_local, yield_now};
use block::sync::WaitQueue;

use super::errors::{ErrorAction, Errors};
use super::request::{Policy, Request};
use super::spec::{ID_SIZE, Status};
use crate::device::ActiveQueue;
use crate::queue::{Chain, Queue, QueueError};

/// What all queues of a disk share on its thread.
pub(super) struct Shared {
    pub(super) disk: Rc<Disk>,
    pub(super) id: [u8; ID_SIZE],
    /// Set by the configuration space's `writeback` field and by negotiation.
    pub(super) write_through: Arc<AtomicBool>,
    pub(super) errors: Errors,
}

/// A queue, and the requests of it that are under way.
pub(super) struct RunningQueue {
    shared: Rc<Shared>,
    queue: RefCell<Queue>,
    /// For stopping: wakes the task that waits for the doorbell.
    doorbell: OwnedFd,
    stopping: Cell<bool>,
    in_flight: Cell<usize>,
    commit_planned: Cell<bool>,
    idle: WaitQueue,
    /// Requests that a failure of the host's has stopped.
    stopped: WaitQueue,
    task: RefCell<Option<JoinHandle<()>>>,
}

impl RunningQueue {
    /// Starts serving a queue. Without an event source there is nothing to serve it by, and it fails.
    pub(super) fn start(shared: Rc<Shared>, active: ActiveQueue) -> Rc<Self> {
        let ActiveQueue { queue, doorbell } = active;
        let source = doorbell
            .try_clone()
            .ok()
            .and_then(|doorbell| EventSource::new(doorbell).ok());
        let running = Rc::new(Self {
            shared,
            queue: RefCell::new(queue),
            doorbell,
            stopping: Cell::new(false),
            in_flight: Cell::new(0),
            commit_planned: Cell::new(false),
            idle: WaitQueue::default(),
            stopped: WaitQueue::default(),
            task: RefCell::new(None),
        });
        match source {
            Some(source) => {
                let task = spawn_local(running.clone().serve(source));
                *running.task.borrow_mut() = Some(task);
            }
            None => running
                .queue
                .borrow_mut()
                .fail(QueueError::Request("no event source on the host")),
        }
        running
    }

    /// Takes requests as they come.
    async fn serve(self: Rc<Self>, source: EventSource) {
        while !self.stopping.get() {
            self.queue.borrow_mut().disable_doorbell();
            self.take_all().await;
            let more = self.queue.borrow_mut().enable_doorbell();
            if !more && source.wait().await.is_err() {
                self.queue
                    .borrow_mut()
                    .fail(QueueError::Request("no event source on the host"));
                return;
            }
        }
    }

    async fn take_all(self: &Rc<Self>) {
        let turn = usize::from(self.queue.borrow().size());
        let mut taken = 0;
        while !self.stopping.get() {
            let Some(chain) = self.queue.borrow_mut().pop() else {
                return;
            };
            self.begin(chain);
            taken += 1;
            if taken == turn {
                // Completions and other queues have their turn, however fast the guest is.
                taken = 0;
                yield_now().await;
            }
        }
    }

    fn begin(self: &Rc<Self>, chain: Chain) {
        match Request::parse(&chain) {
            Err(what) => self.queue.borrow_mut().fail(QueueError::Request(what)),
            Ok(request) => {
                self.in_flight.set(self.in_flight.get() + 1);
                drop(spawn_local(self.clone().run(chain, request)));
            }
        }
    }

    async fn run(self: Rc<Self>, chain: Chain, request: Request) {
        let status = self.status(&request).await;
        // `parse` has seen that there is at least one byte.
        let last = chain.writable.len().saturating_sub(1);
        chain.writable.write_at(last, &[status as u8]);
        let written = u32::try_from(chain.writable.len()).unwrap_or(u32::MAX);
        self.queue.borrow_mut().push(chain.token, written);
        self.plan_commit();
        self.in_flight.set(self.in_flight.get() - 1);
        if self.in_flight.get() == 0 {
            self.idle.wake_all();
        }
    }

    /// Does a request until it has ended in a way that the guest is to know of.
    async fn status(&self, request: &Request) -> Status {
        let policy = Policy {
            write_through: self.shared.write_through.load(Ordering::Relaxed),
            id: self.shared.id,
        };
        loop {
            let error = match request.run(&self.shared.disk, &policy).await {
                Ok(status) => return status,
                Err(error) => error,
            };
            match self.shared.errors.decide(request.writes(), &error) {
                ErrorAction::Report => return Status::IoError,
                ErrorAction::Ignore => return Status::Ok,
                // The guest that asked is gone.
                ErrorAction::Stop if self.stopping.get() => return Status::IoError,
                ErrorAction::Stop => self.stopped.wait().await,
            }
            if self.stopping.get() {
                return Status::IoError;
            }
        }
    }

    /// Tries again what a failure has stopped.
    pub(super) fn retry(&self) {
        self.stopped.wake_all();
    }

    /// Shows the driver what has ended, together with all else that ends in this turn of the executor: the new task comes
    /// behind those that are ready.
    fn plan_commit(self: &Rc<Self>) {
        if self.commit_planned.replace(true) {
            return;
        }
        let running = self.clone();
        drop(spawn_local(async move {
            running.commit_planned.set(false);
            running.queue.borrow_mut().commit();
        }));
    }

    /// Stops: when this ends nothing of it touches guest memory.
    pub(super) async fn stop(&self) {
        self.stopping.set(true);
        self.retry();
        self.shared.disk.set_hurry(true);
        // Fails only when the counter would overflow: the task is awake then.
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
        let task = self.task.borrow_mut().take();
        if let Some(task) = task {
            task.await;
        }
        while self.in_flight.get() != 0 {
            self.idle.wait().await;
        }
        self.shared.disk.set_hurry(false);
        self.queue.borrow_mut().commit();
    }
}
