//! Guest writes that only signal an event.

use vmm_sys_util::eventfd::EventFd;

/// A place whose writes signal an event and do nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doorbell {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes of the write that count (1, 2, 4, 8), or 0 for any.
    pub len: u32,
    /// Only writes of this value, or any.
    pub value: Option<u64>,
}

/// The processor's short cut for doorbells. A device that uses it must do the same on an ordinary register write, since the
/// write may come either way.
pub trait Doorbells: Send + Sync {
    /// Lets writes to `doorbell` signal `event`. False when there is no short cut.
    fn add(&self, doorbell: Doorbell, event: &EventFd) -> bool;
    /// Undoes [`Self::add`]. Does nothing for one that was not added.
    fn remove(&self, doorbell: Doorbell, event: &EventFd);
}
