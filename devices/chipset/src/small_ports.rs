//! Devices of a port or a few: guest panic notification, the debug console, the DMA page registers.

use std::sync::Arc;

use device_model::{
    CharBackend, Device, IoBus, IoError, IoHandler, IoRegion, PanicKind, PowerControl, PowerEvent,
    ResetKind, ShutdownCause, Widths,
};
use parking_lot::Mutex;

/// Ports and bits.
pub mod spec {
    /// The ISA panic device's port (QEMU's docs/specs/pvpanic).
    pub const PVPANIC: u64 = 0x505;
    /// The guest has panicked.
    pub const PVPANIC_PANICKED: u8 = 1 << 0;
    /// The guest has panicked and will handle it itself.
    pub const PVPANIC_CRASH_LOADED: u8 = 1 << 1;
    /// The guest asks to be powered off.
    pub const PVPANIC_SHUTDOWN: u8 = 1 << 2;
    /// The debug console's port, as firmware knows it.
    pub const DEBUG_CONSOLE: u64 = 0x402;
    /// What reading the debug console gives, by which firmware knows that it is there.
    pub const DEBUG_CONSOLE_READBACK: u8 = 0xe9;
    /// First of the DMA page registers.
    pub const DMA_PAGE: u64 = 0x80;
    /// Their number.
    pub const DMA_PAGES: u64 = 16;
}
use spec::*;

/// Tells the machine of guest panics.
pub struct PvPanic(Arc<dyn PowerControl>);

impl PvPanic {
    /// A panic device that reports to `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self(power))
    }

    /// Claims port 505h.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<IoRegion, IoError> {
        ports.add(PVPANIC, 1, "pvpanic", self.clone())
    }
}

impl IoHandler for PvPanic {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PVPANIC_PANICKED | PVPANIC_CRASH_LOADED | PVPANIC_SHUTDOWN);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let event = if value & PVPANIC_PANICKED != 0 {
            PowerEvent::Panic(PanicKind::Panicked)
        } else if value & PVPANIC_CRASH_LOADED != 0 {
            PowerEvent::Panic(PanicKind::CrashLoaded)
        } else if value & PVPANIC_SHUTDOWN != 0 {
            PowerEvent::Shutdown(ShutdownCause::PvPanic)
        } else {
            return;
        };
        self.0.request(event);
    }
}

impl Device for PvPanic {
    fn name(&self) -> String {
        "pvpanic".into()
    }

    fn reset(&self, _kind: ResetKind) {}
}

/// Takes firmware's debug messages.
pub struct DebugConsole(Arc<dyn CharBackend>);

impl DebugConsole {
    /// A console that writes to `backend`. What that does not take at once is lost: a debug port has no way to say "wait".
    pub fn new(backend: Arc<dyn CharBackend>) -> Arc<Self> {
        Arc::new(Self(backend))
    }

    /// Claims port 402h.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<IoRegion, IoError> {
        ports.add(DEBUG_CONSOLE, 1, "debug console", self.clone())
    }
}

impl IoHandler for DebugConsole {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(DEBUG_CONSOLE_READBACK);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.0.write(data);
    }
}

impl Device for DebugConsole {
    fn name(&self) -> String {
        "debug-console".into()
    }

    fn reset(&self, _kind: ResetKind) {}
}

/// The DMA controllers' page registers, 80h to 8Fh. There is no ISA DMA on this platform, but software writes the
/// first one to show progress or to wait a moment, and reads back others.
pub struct DmaPages(Mutex<[u8; DMA_PAGES as usize]>);

impl DmaPages {
    /// The registers, zero.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::default()))
    }

    /// Claims the ports 80h to 8Fh.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<IoRegion, IoError> {
        ports.add(DMA_PAGE, DMA_PAGES, "dma pages", self.clone())
    }
}

impl IoHandler for DmaPages {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(self.0.lock()[offset as usize % DMA_PAGES as usize]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [value] = data {
            self.0.lock()[offset as usize % DMA_PAGES as usize] = *value;
        }
    }
}

impl Device for DmaPages {
    fn name(&self) -> String {
        "dma-pages".into()
    }

    fn reset(&self, _kind: ResetKind) {
        *self.0.lock() = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MemoryBackend, Recorder};

    #[test]
    fn each_does_its_one_thing() {
        let ports = IoBus::ports();
        let power = Arc::new(Recorder::default());
        let backend = Arc::new(MemoryBackend::default());
        let pages = DmaPages::new();
        let _regions = [
            PvPanic::new(power.clone()).attach(&ports).unwrap(),
            DebugConsole::new(backend.clone()).attach(&ports).unwrap(),
            pages.attach(&ports).unwrap(),
        ];
        let get = |port| {
            let mut data = [0];
            ports.read(port, &mut data);
            data[0]
        };
        ports.write(PVPANIC, &[1]);
        assert_eq!(
            *power.requests.lock(),
            [PowerEvent::Panic(PanicKind::Panicked)]
        );
        assert_eq!(get(DEBUG_CONSOLE), 0xe9);
        ports.write(DEBUG_CONSOLE, b"x");
        assert_eq!(backend.output(), b"x");
        ports.write(0x87, &[5]);
        assert_eq!(get(0x87), 5);
        pages.reset(ResetKind::Cold);
        assert_eq!(get(0x87), 0);
    }
}
