//! Spawned tasks.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use super::TaskWaker;

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

enum Entry {
    Free,
    /// Its future is being polled, or waits to be.
    Task {
        future: Option<LocalFuture>,
        waker: Arc<TaskWaker>,
    },
}

/// The table of spawned tasks.
#[derive(Default)]
pub(crate) struct Tasks {
    entries: Vec<Entry>,
    free: Vec<usize>,
}

impl Tasks {
    pub(crate) fn vacant(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry::Free);
            self.entries.len() - 1
        })
    }

    pub(crate) fn insert(&mut self, id: usize, future: LocalFuture, waker: Arc<TaskWaker>) {
        self.entries[id] = Entry::Task {
            future: Some(future),
            waker,
        };
    }

    /// Gives task `id` its turn. A late wake-up of a task that has ended does nothing, or at worst
    /// polls the task that took its place once more than needed.
    pub(crate) fn poll(this: &RefCell<Self>, id: usize) {
        let (mut future, waker) = {
            let mut tasks = this.borrow_mut();
            let Some(Entry::Task { future, waker }) = tasks.entries.get_mut(id) else {
                return;
            };
            waker.queued.store(false, Ordering::Release);
            let Some(future) = future.take() else { return };
            (future, Waker::from(waker.clone()))
        };
        if future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready()
        {
            // Dropped outside of the borrow: its destructors may wake or spawn tasks.
            drop(future);
            let mut tasks = this.borrow_mut();
            tasks.entries[id] = Entry::Free;
            tasks.free.push(id);
            return;
        }
        if let Some(Entry::Task { future: place, .. }) = this.borrow_mut().entries.get_mut(id) {
            *place = Some(future);
        }
    }
}

struct Joint<T> {
    value: Option<T>,
    waker: Option<Waker>,
    ended: bool,
}

/// Waits for a spawned task. Dropping it lets the task run on.
pub struct JoinHandle<T>(Rc<RefCell<Joint<T>>>);

impl<T> Future for JoinHandle<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut joint = self.0.borrow_mut();
        if let Some(value) = joint.value.take() {
            return Poll::Ready(value);
        }
        assert!(
            !joint.ended,
            "a task was dropped before its end, or joined twice"
        );
        joint.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Marks the joint as ended when the task goes, whichever way.
struct Ending<T>(Rc<RefCell<Joint<T>>>);

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        let waker = {
            let mut joint = self.0.borrow_mut();
            joint.ended = true;
            joint.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

pub(crate) fn joinable<T: 'static>(
    future: impl Future<Output = T> + 'static,
) -> (LocalFuture, JoinHandle<T>) {
    let joint = Rc::new(RefCell::new(Joint {
        value: None,
        waker: None,
        ended: false,
    }));
    let ending = Ending(joint.clone());
    let future = Box::pin(async move {
        let value = future.await;
        ending.0.borrow_mut().value = Some(value);
        drop(ending);
    });
    (future, JoinHandle(joint))
}

/// Lets other ready tasks run before the caller goes on.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
