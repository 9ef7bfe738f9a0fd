//! A disk on its own thread, as a port sees it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::executor::{IoHandle, IoThread};
use block::{BlockError, Disk, Limits};

thread_local! {
    /// The disks that live on this thread.
    static DISKS: RefCell<HashMap<u64, Rc<Disk>>> = RefCell::default();
}

static NEXT_DISK: AtomicU64 = AtomicU64::new(0);

/// A disk to be plugged into a port. Dropping it closes the disk.
pub struct AtaDisk {
    pub(super) link: DiskLink,
    pub(super) limits: Limits,
    pub(super) serial: String,
    /// The thread; ends with the disk.
    _thread: IoThread,
}

/// Reaches a disk from a port, and from tasks on its thread.
#[derive(Clone)]
pub(super) struct DiskLink {
    number: u64,
    thread: IoHandle,
}

impl AtaDisk {
    /// `open` runs on `thread` and opens the disk there. The guest sees the first 20 characters of `serial`.
    ///
    /// # Errors
    /// What `open` reports, or the end of the thread.
    pub fn new<F, Fut>(thread: IoThread, serial: &str, open: F) -> Result<Self, BlockError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Disk, BlockError>> + 'static,
    {
        let number = NEXT_DISK.fetch_add(1, Ordering::Relaxed);
        let limits = thread.handle().call(move || async move {
            let disk = Rc::new(open().await?);
            let limits = disk.limits();
            DISKS.with_borrow_mut(|disks| disks.insert(number, disk));
            Ok::<Limits, BlockError>(limits)
        })??;
        Ok(Self {
            link: DiskLink {
                number,
                thread: thread.handle().clone(),
            },
            limits,
            serial: serial.to_owned(),
            _thread: thread,
        })
    }
}

impl Drop for AtaDisk {
    fn drop(&mut self) {
        let number = self.link.number;
        // An error has nobody to go to; what was flushed is safe.
        let _ = self.link.thread.call(move || async move {
            let disk = DISKS.with_borrow_mut(|disks| disks.remove(&number));
            match disk {
                Some(disk) => disk.close().await,
                None => Ok(()),
            }
        });
    }
}

impl DiskLink {
    /// Runs a task on the disk's thread, with the disk unless it has been closed.
    pub(super) fn spawn<F, Fut>(&self, work: F)
    where
        F: FnOnce(Option<Rc<Disk>>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let number = self.number;
        self.thread
            .spawn(move || work(DISKS.with_borrow(|disks| disks.get(&number).cloned())));
    }
}
