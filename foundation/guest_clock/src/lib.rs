//! Guest time.
//!
//! A [`GuestClock`] counts nanoseconds since the machine was made and stands still while the guest is stopped. No
//! device and no processor of ours reads the host's clock: everything that a guest can see of time derives from here, and
//! every [`Timer`] is set in guest time.

mod clock;
mod timers;

pub use clock::GuestClock;
pub use timers::Timer;
