//! How a processor reaches configuration space: ports CF8h and CFCh, and the memory-mapped form.
//!
//! PCI Local Bus 3.0, section 3.2.2.3.2; PCI Express Base 4.0, section 7.2.2.

use std::sync::Arc;

use device_model::{Device, IoBus, IoError, IoHandler, IoRegion, ResetKind, Widths};
use parking_lot::Mutex;

use crate::address::Devfn;
use crate::bus::{PciBus, config_read, config_write};
use crate::spec::CONVENTIONAL_SIZE;

/// Port of the configuration address register.
pub const CONFIG_ADDRESS: u64 = 0xcf8;
/// Port of the configuration data register.
pub const CONFIG_DATA: u64 = 0xcfc;

const ENABLE: u32 = 1 << 31;
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

/// Bytes of memory-mapped configuration space for each bus.
pub const ECAM_BYTES_PER_BUS: u64 = 1 << 20;

/// Configuration access to everything below a root bus, whose number is 0.
pub struct ConfigAccess {
    root: Arc<PciBus>,
    address: Mutex<u32>,
}

impl ConfigAccess {
    /// Access to `root` and what is below it.
    pub fn new(root: Arc<PciBus>) -> Arc<Self> {
        Arc::new(Self {
            root,
            address: Mutex::new(0),
        })
    }

    /// Claims the ports CF8h to CFFh. Byte accesses to port CF9h lie in the middle of them and go to `reset_control`.
    ///
    /// # Errors
    /// When something else is there.
    pub fn claim_ports(
        self: &Arc<Self>,
        ports: &IoBus,
        reset_control: Arc<dyn IoHandler>,
    ) -> Result<IoRegion, IoError> {
        let handler = ConfigPorts {
            access: self.clone(),
            reset_control,
        };
        ports.add(CONFIG_ADDRESS, 8, "PCI configuration", Arc::new(handler))
    }

    /// A read from function `devfn` of bus `bus`; what is not there reads as ones.
    pub fn read(&self, bus: u8, devfn: Devfn, offset: u16, data: &mut [u8]) {
        match self.root.route(0, bus, devfn) {
            Some(device) => config_read(device.as_ref(), offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write; see [`Self::read`].
    pub fn write(&self, bus: u8, devfn: Devfn, offset: u16, data: &[u8]) {
        if let Some(device) = self.root.route(0, bus, devfn) {
            config_write(device.as_ref(), offset, data);
        }
    }

    /// Bus, function and offset that the address register selects, if it selects any; `low` is the byte in the data register.
    fn selected(&self, low: u16) -> Option<(u8, Devfn, u16)> {
        let address = *self.address.lock();
        (address & ENABLE != 0).then(|| {
            let [offset, devfn, bus, _] = address.to_le_bytes();
            (bus, Devfn::from_byte(devfn), u16::from(offset) + low)
        })
    }
}

impl Device for ConfigAccess {
    fn name(&self) -> String {
        "pci-config".into()
    }

    fn reset(&self, _kind: ResetKind) {
        *self.address.lock() = 0;
    }
}

/// The ports CF8h to CFFh.
struct ConfigPorts {
    access: Arc<ConfigAccess>,
    /// Port CF9h: byte accesses there are not configuration accesses.
    reset_control: Arc<dyn IoHandler>,
}

impl IoHandler for ConfigPorts {
    fn widths(&self) -> Widths {
        Widths::UP_TO_DWORD
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.access.address.lock().to_le_bytes()),
            (1, 1) => self.reset_control.read(0, data),
            (0..4, _) => data.fill(0xff),
            _ => match self.access.selected(offset as u16 - 4) {
                Some((bus, devfn, at)) => self.access.read(bus, devfn, at, data),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [a, b, c, d]) => {
                *self.access.address.lock() =
                    u32::from_le_bytes([*a, *b, *c, *d]) & ADDRESS_WRITABLE;
            }
            (1, [_]) => self.reset_control.write(0, data),
            (0..4, _) => {}
            _ => {
                if let Some((bus, devfn, at)) = self.access.selected(offset as u16 - 4) {
                    debug_assert!(usize::from(at) + data.len() <= CONVENTIONAL_SIZE);
                    self.access.write(bus, devfn, at, data);
                }
            }
        }
    }
}

/// Memory-mapped configuration space: one mebibyte for each bus.
pub struct Ecam(Arc<ConfigAccess>);

impl Ecam {
    /// The memory-mapped form of `access`, from bus 0 on.
    pub fn new(access: Arc<ConfigAccess>) -> Self {
        Self(access)
    }

    fn place(offset: u64) -> (u8, Devfn, u16) {
        (
            (offset >> 20) as u8,
            Devfn::from_byte((offset >> 12) as u8),
            (offset & 0xfff) as u16,
        )
    }
}

impl IoHandler for Ecam {
    fn widths(&self) -> Widths {
        Widths::UP_TO_DWORD
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bus, devfn, at) = Self::place(offset);
        self.0.read(bus, devfn, at, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bus, devfn, at) = Self::place(offset);
        self.0.write(bus, devfn, at, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Board;

    struct ResetControl(Mutex<Vec<u8>>);
    impl IoHandler for ResetControl {
        fn widths(&self) -> Widths {
            Widths::BYTE
        }
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(6);
        }
        fn write(&self, _offset: u64, data: &[u8]) {
            self.0.lock().extend(data);
        }
    }

    #[test]
    fn the_ports_reach_functions_and_leave_the_reset_port_alone() {
        let board = Board::new();
        let (_card, _handle) = board.plug_card(4);
        let access = ConfigAccess::new(board.bus.clone());
        let reset = Arc::new(ResetControl(Mutex::default()));
        let _ports = access.claim_ports(&board.ports, reset.clone()).unwrap();
        let read32 = |port: u64| {
            let mut data = [0; 4];
            board.ports.read(port, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read32(CONFIG_DATA), u32::MAX);
        board
            .ports
            .write(CONFIG_ADDRESS, &0x8000_2000u32.to_le_bytes());
        assert_eq!(read32(CONFIG_DATA), 0x5678_1234);
        let mut half = [0; 2];
        board.ports.read(CONFIG_DATA + 2, &mut half);
        assert_eq!(half, [0x78, 0x56]);
        board.ports.write(0xcf9, &[6]);
        assert_eq!(*reset.0.lock(), [6]);
        assert_eq!(read32(CONFIG_ADDRESS), 0x8000_2000);
        board
            .ports
            .write(CONFIG_ADDRESS, &0x8001_2000u32.to_le_bytes());
        assert_eq!(read32(CONFIG_DATA), u32::MAX);
        access.reset(ResetKind::Cold);
        assert_eq!(read32(CONFIG_ADDRESS), 0);
    }
}
