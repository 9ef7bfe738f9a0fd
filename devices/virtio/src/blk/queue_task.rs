//! A queue at work on the disk's thread.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::Disk;
use block::executor::{EventSource, JoinHandle, spawn_local, yield_now};
use block::sync::WaitQueue;

use super::request::{Policy, Request};
use super::spec::ID_SIZE;
use crate::device::ActiveQueue;
use crate::queue::{Chain, Queue, QueueError};

/// What all queues of a disk share on its thread.
pub(super) struct Shared {
    pub(super) disk: Rc<Disk>,
    pub(super) id: [u8; ID_SIZE],
    /// Set by the configuration space's `writeback` field and by negotiation.
    pub(super) write_through: Arc<AtomicBool>,
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
        let policy = Policy {
            write_through: self.shared.write_through.load(Ordering::Relaxed),
            id: self.shared.id,
        };
        let status = request.run(&self.shared.disk, &policy).await;
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
        // Fails only when the counter would overflow: the task is awake then.
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
        let task = self.task.borrow_mut().take();
        if let Some(task) = task {
            task.await;
        }
        while self.in_flight.get() != 0 {
            self.idle.wait().await;
        }
        self.queue.borrow_mut().commit();
    }
}
