//! Threads with an executor of their own.

use std::future::Future;
use std::sync::{Arc, mpsc};

use super::{EngineKind, Executor, Shared};
use crate::error::{BlockError, ErrorKind, Result};

/// A thread that runs an executor. Dropping it stops the thread: tasks are dropped where they wait,
/// and I/O in flight is waited for.
pub struct IoThread {
    handle: IoHandle,
    stop: Option<mpsc::Sender<()>>,
    join: Option<std::thread::JoinHandle<()>>,
}

/// Reaches an [`IoThread`]'s executor from any thread.
#[derive(Clone)]
pub struct IoHandle {
    shared: Arc<Shared>,
}

impl IoThread {
    /// Starts a thread called `name` (Linux shows the first 15 bytes).
    ///
    /// # Errors
    ///
    /// If the thread or its engine cannot be set up.
    pub fn start(name: &str, kind: EngineKind) -> Result<Self> {
        let (started, when_started) = mpsc::channel();
        let (stop, stopped) = mpsc::channel();
        let join = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(kind, &started, stopped))
            .map_err(|e| BlockError::io(format!("cannot start the I/O thread '{name}'"), e))?;
        let shared = when_started
            .recv()
            .map_err(|_| BlockError::new(ErrorKind::Io, "an I/O thread ended at its start"))??;
        Ok(Self {
            handle: IoHandle { shared },
            stop: Some(stop),
            join: Some(join),
        })
    }

    /// A handle for use by other threads.
    pub fn handle(&self) -> &IoHandle {
        &self.handle
    }

    /// Stops the thread and waits for its end. Tasks still waiting are dropped.
    pub fn stop(mut self) {
        self.stop_and_join();
    }

    fn stop_and_join(&mut self) {
        drop(self.stop.take());
        self.handle.shared.wake_remote(super::ROOT);
        if let Some(join) = self.join.take()
            && join.thread().id() != std::thread::current().id()
        {
            // A panic on the thread has been printed by it.
            let _ = join.join();
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

fn run(kind: EngineKind, started: &mpsc::Sender<Result<Arc<Shared>>>, stopped: mpsc::Receiver<()>) {
    let executor = match Executor::new(kind) {
        Ok(executor) => executor,
        Err(error) => {
            // If nobody listens any more, nobody needs the error.
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(executor.shared.clone()));
    executor.run(std::future::poll_fn(move |_| match stopped.try_recv() {
        Err(mpsc::TryRecvError::Disconnected) => std::task::Poll::Ready(()),
        _ => std::task::Poll::Pending,
    }));
}

impl IoHandle {
    /// Runs the future that `make` returns as a task of the thread. `make` runs on the thread, so the
    /// future need not be `Send`. After the thread's end nothing happens.
    pub fn spawn<F, Fut>(&self, make: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let call = Box::new(move || {
            drop(super::spawn_local(make()));
        });
        {
            let mut inbox = self.shared.inbox();
            if inbox.closed {
                return;
            }
            inbox.calls.push(call);
        }
        self.shared.notify();
    }

    /// Runs a future on the thread and waits for its value. Must not be called on the thread itself.
    ///
    /// # Errors
    ///
    /// If the thread ends before the future does.
    pub fn call<T, F, Fut>(&self, make: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        self.spawn(move || async move {
            // The receiver waits below.
            let _ = sender.send(make().await);
        });
        receiver
            .recv()
            .map_err(|_| BlockError::new(ErrorKind::Io, "the I/O thread ended during a call"))
    }
}
