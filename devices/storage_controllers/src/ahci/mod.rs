//! The AHCI controller of ICH9: function 00:1f.2, six ports, ATA disks behind them.
//!
//! Serial ATA AHCI 1.3.1; ICH9 datasheet (document 316972), chapter 15. Each disk has a thread of its own. Commands run
//! there as tasks, up to 31 queued ones at a time, and move their data in pieces through memory of the host's.

mod disk;
mod port;
pub mod spec;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use device_model::{Device, ResetKind, Widths};
use guest_memory::GuestMemory;
use parking_lot::Mutex;
use pci::{Bar, BarKind, FunctionBuilder, Identity, PciDevice, PciFunction};

pub use disk::AtaDisk;
use port::Port;
use spec::*;

/// Ports of the controller.
pub const PORTS: usize = 6;
/// The base address register of the register space.
pub const ABAR: usize = 5;

/// Volatile guest state of the controller itself.
#[derive(Debug, Clone, Copy, Default)]
struct Global {
    ghc: u32,
    is: u32,
    /// Ports whose own enabled status is set.
    pending: u32,
}

impl Global {
    const RESET: Self = Self {
        ghc: GHC_AE,
        is: 0,
        pending: 0,
    };
}

/// What the ports share: the PCI function and the interrupt.
struct Hub {
    function: PciFunction,
    global: Mutex<Global>,
}

impl Hub {
    /// A port's enabled status has become set or clear. `event` when something has happened that calls for a message.
    fn port_status(&self, port: usize, pending: bool, event: bool) {
        let mut global = self.global.lock();
        let bit = 1 << port;
        if pending {
            global.pending |= bit;
            global.is |= bit;
        } else {
            global.pending &= !bit;
        }
        self.sync(&global, pending && event);
    }

    /// Drives the interrupt. A message is sent for news only.
    fn sync(&self, global: &Global, news: bool) {
        let on = global.ghc & GHC_IE != 0 && global.is != 0;
        if self.function.msi_enabled() {
            self.function.set_intx(false);
            if on && news {
                self.function.notify(0);
            }
        } else {
            self.function.set_intx(on);
        }
    }
}

/// The controller.
pub struct Ahci {
    hub: Arc<Hub>,
    ports: Vec<Arc<Port>>,
    /// Keeps the disks open.
    _disks: Vec<AtaDisk>,
}

impl Ahci {
    /// A controller with a disk in each port for which there is one, at most six. Its DMA goes to `memory`.
    pub fn new(name: &str, memory: &GuestMemory, disks: Vec<Option<AtaDisk>>) -> Arc<Self> {
        let id = Identity {
            vendor: 0x8086,
            device: 0x2922,
            class: 0x01_0601,
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let abar = Bar {
            kind: BarKind::Memory32 {
                prefetchable: false,
            },
            size: ABAR_SIZE,
            widths: Widths::DWORD,
        };
        let function = FunctionBuilder::new(name, id)
            .bar(ABAR, abar)
            .expect("register 5 is free and decodes memory")
            .msi(1)
            .interrupt_pin(1)
            .build();
        let hub = Arc::new(Hub {
            function,
            global: Mutex::new(Global::RESET),
        });
        let mut kept = Vec::new();
        let mut disks = disks.into_iter();
        let ports = (0..PORTS)
            .map(|n| {
                let disk = disks.next().flatten();
                let port = Port::new(n, hub.clone(), memory.clone(), disk.as_ref());
                kept.extend(disk);
                port
            })
            .collect();
        Arc::new(Self {
            hub,
            ports,
            _disks: kept,
        })
    }

    fn read_global(&self, offset: u64) -> u32 {
        let global = self.hub.global.lock();
        match offset {
            CAP => {
                let slots = (SLOTS - 1) << 8;
                let ports = PORTS as u32 - 1;
                CAP_S64A | CAP_SNCQ | CAP_SCLO | CAP_ISS_GEN3 | CAP_SAM | slots | ports
            }
            GHC => global.ghc,
            IS => global.is,
            PI => (1 << PORTS) - 1,
            VS => VERSION,
            _ => 0,
        }
    }

    fn write_global(&self, offset: u64, value: u32) {
        match offset {
            GHC if value & GHC_HR != 0 => self.reset_controller(),
            GHC => {
                let mut global = self.hub.global.lock();
                global.ghc = GHC_AE | value & GHC_IE;
                self.hub.sync(&global, true);
            }
            IS => {
                let mut global = self.hub.global.lock();
                // A port that still has something to say sets its bit again.
                global.is = global.is & !value | global.pending;
                self.hub.sync(&global, true);
            }
            _ => {}
        }
    }

    fn reset_controller(&self) {
        for port in &self.ports {
            port.reset();
        }
        let mut global = self.hub.global.lock();
        *global = Global::RESET;
        self.hub.sync(&global, false);
    }

    /// The port and its register that an offset names.
    fn port(&self, offset: u64) -> Option<(&Arc<Port>, u64)> {
        let at = offset.checked_sub(PORT_BASE)?;
        let port = self.ports.get((at / PORT_STRIDE) as usize)?;
        Some((port, at % PORT_STRIDE))
    }
}

impl Device for Ahci {
    fn name(&self) -> String {
        self.hub.function.name().to_owned()
    }

    fn reset(&self, _kind: ResetKind) {
        self.hub.function.reset();
        self.reset_controller();
    }
}

impl PciDevice for Ahci {
    fn function(&self) -> &PciFunction {
        &self.hub.function
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        let value = match self.port(offset) {
            Some((port, register)) => port.read(register),
            None => self.read_global(offset),
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len().min(4)]);
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match self.port(offset) {
            Some((port, register)) => port.write(register, value),
            None => self.write_global(offset, value),
        }
    }

    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}

    fn config_written(&self, _offset: u16, _len: usize) {
        self.hub.sync(&self.hub.global.lock(), false);
        // Commands that waited for leave to do DMA.
        for port in &self.ports {
            port.kick();
        }
    }
}
