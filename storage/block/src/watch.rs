//! What happens around the requests of a disk in use: jobs that see each change, and moments without any request.

use std::cell::Cell;
use std::rc::Rc;

use crate::backend::{BlockFuture, ZeroFlags};
use crate::buffer::IoBuf;
use crate::sync::WaitQueue;

/// What a request changes in its range.
#[derive(Clone)]
pub enum Change {
    /// This data is written.
    Data(IoBuf),
    /// It is made to read as zeroes.
    Zeroes(ZeroFlags),
    /// Its space is given back: it may read as before, or as zeroes.
    Discard,
}

/// A job that follows the changes of a disk. See [`crate::Disk::watch`].
///
/// While a disk is watched, each change holds its range of [`crate::Disk::ranges`], widened to whole blocks of
/// [`Self::granularity`], from before the first call to after the second.
pub trait WriteWatcher {
    /// The size, in bytes, of the blocks in which the watcher thinks: a power of two.
    fn granularity(&self) -> u64;

    /// A change is about to be made; it waits for this.
    fn before(&self, offset: u64, length: u64) -> BlockFuture<'_, ()>;

    /// A change was made, or failed half way (`done` is false); who asked for it waits for this.
    fn after<'a>(
        &'a self,
        offset: u64,
        length: u64,
        change: &'a Change,
        done: bool,
    ) -> BlockFuture<'a, ()>;
}

/// The requests that a disk has under way.
#[derive(Default)]
pub(crate) struct Traffic {
    under_way: Cell<usize>,
    /// How many want the disk to stand still.
    stops: Cell<usize>,
    changed: WaitQueue,
}

/// A request that is under way.
pub(crate) struct Passage<'a>(&'a Traffic);

/// While this lives, a disk has no request under way; new ones wait.
pub struct StandStill(Rc<Traffic>);

impl Traffic {
    /// Waits until nobody wants the disk to stand still.
    pub(crate) async fn enter(&self) -> Passage<'_> {
        while self.stops.get() > 0 {
            self.changed.wait().await;
        }
        self.under_way.set(self.under_way.get() + 1);
        Passage(self)
    }

    pub(crate) async fn stop(self: &Rc<Self>) -> StandStill {
        self.stops.set(self.stops.get() + 1);
        let still = StandStill(self.clone());
        while self.under_way.get() > 0 {
            self.changed.wait().await;
        }
        still
    }
}

impl StandStill {
    /// Whether it is this disk's.
    pub(crate) fn is_of(&self, traffic: &Rc<Traffic>) -> bool {
        Rc::ptr_eq(&self.0, traffic)
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.0.under_way.set(self.0.under_way.get() - 1);
        if self.0.under_way.get() == 0 && self.0.stops.get() > 0 {
            self.0.changed.wake_all();
        }
    }
}

impl Drop for StandStill {
    fn drop(&mut self) {
        self.0.stops.set(self.0.stops.get() - 1);
        self.0.changed.wake_all();
    }
}
