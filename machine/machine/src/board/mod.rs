//! Boards: which devices there are, and how they are wired.

mod peripherals;
mod q35;

use std::sync::Arc;

use accel::Vm;
use device_model::PowerControl;
use guest_clock::GuestClock;
use guest_memory::GuestMemory;

pub(crate) use peripherals::Peripherals;
pub(crate) use q35::Q35;

use crate::memory_map::MemoryMap;

/// What every board is built on.
#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) memory: GuestMemory,
    pub(crate) clock: GuestClock,
    pub(crate) power: Arc<dyn PowerControl>,
    pub(crate) map: MemoryMap,
}
