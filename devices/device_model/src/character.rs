//! The two ends of a serial line.
//!
//! A device (serial port, console) is the [`CharFrontend`]; what stands behind it on the host (terminal, socket, file) is the
//! [`CharBackend`]. Neither blocks the other: each side says how much it has taken, keeps the rest, and is told when the
//! other side has room again.

use std::sync::Weak;

/// What happens on the host's side of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CharEvent {
    /// Somebody listens now.
    Opened,
    /// Nobody listens any more.
    Closed,
    /// A break condition, as sent from the terminal's menu.
    Break,
}

/// The device's end. All calls come on the backend's own thread with no lock of the backend held.
pub trait CharFrontend: Send + Sync {
    /// Input. Returns how many bytes were taken; the rest is offered again after [`CharBackend::accept_input`].
    fn receive(&self, data: &[u8]) -> usize;
    /// The backend has room after a [`CharBackend::write`] that took less than all.
    fn writable(&self);
    /// Something happened.
    fn event(&self, event: CharEvent);
}

/// The host's end. May be called with a device's lock held: no call blocks or calls the front end.
pub trait CharBackend: Send + Sync {
    /// Connects the device, in place of an earlier one. Input that came before waits for it.
    fn connect(&self, frontend: Weak<dyn CharFrontend>);
    /// Output. Returns how many bytes were taken. After less than all, [`CharFrontend::writable`] is called when there is room.
    /// While nobody listens, output is taken and lost.
    fn write(&self, data: &[u8]) -> usize;
    /// The device has room for input again.
    fn accept_input(&self);
    /// True while somebody listens.
    fn is_open(&self) -> bool;
    /// Waits until all output has reached the host, or the time has passed.
    fn drain(&self, at_most: std::time::Duration);
}
