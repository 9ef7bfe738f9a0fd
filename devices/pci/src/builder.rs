//! How a function's configuration space is put together.

use std::sync::Arc;

use device_model::Widths;

use crate::PciError;
use crate::bus::PciBus;
use crate::config::ConfigSpace;
use crate::function::{Parts, PciFunction};
use crate::msix::{ENTRY_SIZE, MAX_VECTORS, Msix};
use crate::spec::*;

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: base class in bits 16 to 23, subclass in 8 to 15, programming interface in 0 to 7.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What a base address register decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Port space.
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects, and writes may be merged.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects, and writes may be merged.
        prefetchable: bool,
    },
}

impl BarKind {
    /// True for port space.
    pub fn is_io(self) -> bool {
        self == Self::Io
    }

    fn low_bits(self) -> u32 {
        let (wide, prefetchable) = match self {
            Self::Io => return BAR_IO,
            Self::Memory32 { prefetchable } => (0, prefetchable),
            Self::Memory64 { prefetchable } => (BAR_64, prefetchable),
        };
        wide | if prefetchable { BAR_PREFETCHABLE } else { 0 }
    }
}

/// A base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes or ports: a power of two.
    pub size: u64,
    /// The access sizes that the device wants there.
    pub widths: Widths,
}

/// What a function is in PCI Express (Base 4.0, table 7-14), without the links inside the root complex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpressType {
    /// A card behind a root port.
    Endpoint,
    /// A device on the root bus.
    RootIntegratedEndpoint,
    /// A root port with a hot-plug slot.
    RootPort {
        /// The number that people see on the slot; unique in the machine.
        slot: u16,
        /// Whether cards may come and go.
        hot_plug: bool,
    },
}

/// Builds a [`PciFunction`].
pub struct FunctionBuilder {
    name: String,
    config: ConfigSpace,
    bars: [Option<Bar>; 6],
    msix: Option<Arc<Msix>>,
    msix_cap: Option<u16>,
    msi_cap: Option<u16>,
    express_cap: Option<u16>,
    bridge: bool,
}

const MSI_MASK_OFFSET: u16 = 0x10;
const LINK_WIDTH_1: u32 = 1 << 4;
const LINK_SPEED_16GT: u32 = 4;

impl FunctionBuilder {
    /// A function with a type 0 header.
    pub fn new(name: impl Into<String>, id: Identity) -> Self {
        let mut builder = Self::header(name, id);
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER;
        builder.allow_command(command);
        let subsystem = u32::from(id.subsystem) << 16 | u32::from(id.subsystem_vendor);
        builder
            .config
            .define(SUBSYSTEM_VENDOR, &subsystem.to_le_bytes());
        builder
    }

    /// A bridge, with a type 1 header. Windows are 16 bits of port space and 64 bits of prefetchable memory.
    pub fn bridge(name: impl Into<String>, id: Identity) -> Self {
        let mut builder = Self::header(name, id);
        builder.bridge = true;
        builder.allow_command(COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
        let config = &mut builder.config;
        config.define(HEADER_TYPE, &[1]);
        config.allow(PRIMARY_BUS, &[0xff, 0xff, 0xff]);
        config.allow(IO_BASE, &[0xf0, 0xf0]);
        config.allow_clear(SECONDARY_STATUS, &STATUS_ERRORS.to_le_bytes());
        config.allow(MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.define(PREFETCH_BASE, &[1, 0, 1, 0]);
        config.allow(PREFETCH_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.allow(PREFETCH_BASE_UPPER, &[0xff; 8]);
        config.allow(BRIDGE_CONTROL, &BRIDGE_CONTROL_WRITABLE.to_le_bytes());
        builder
    }

    fn header(name: impl Into<String>, id: Identity) -> Self {
        let mut config = ConfigSpace::new();
        config.define(VENDOR_ID, &id.vendor.to_le_bytes());
        config.define(DEVICE_ID, &id.device.to_le_bytes());
        let class = id.class << 8 | u32::from(id.revision);
        config.define(REVISION, &class.to_le_bytes());
        config.allow_clear(STATUS, &STATUS_ERRORS.to_le_bytes());
        config.allow(CACHE_LINE, &[0xff]);
        config.allow(INTERRUPT_LINE, &[0xff]);
        Self {
            name: name.into(),
            config,
            bars: [None; 6],
            msix: None,
            msix_cap: None,
            msi_cap: None,
            express_cap: None,
            bridge: false,
        }
    }

    fn allow_command(&mut self, decode: u16) {
        let mask = decode | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE;
        self.config.allow(COMMAND, &mask.to_le_bytes());
    }

    /// The raw configuration space, for device-specific registers.
    pub fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    /// Adds a base address register.
    ///
    /// # Errors
    /// [`PciError::BadBar`] when the register is not there or taken, or the size is not one that it can have.
    pub fn bar(mut self, index: usize, bar: Bar) -> Result<Self, PciError> {
        let Bar { kind, size, .. } = bar;
        let last = if self.bridge { 1 } else { 5 };
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let fits = match kind {
            BarKind::Io => (4..=0x1000).contains(&size),
            BarKind::Memory32 { .. } => (16..=1 << 31).contains(&size),
            BarKind::Memory64 { .. } => (16..=1 << 48).contains(&size),
        };
        let upper = index.wrapping_sub(1);
        let below_is_wide = self
            .bars
            .get(upper)
            .copied()
            .flatten()
            .is_some_and(|b| matches!(b.kind, BarKind::Memory64 { .. }));
        let free = index + usize::from(wide) <= last
            && self.bars[index].is_none()
            && !(wide && self.bars[index + 1].is_some())
            && !below_is_wide;
        if !free || !fits || !size.is_power_of_two() {
            return Err(PciError::BadBar {
                function: self.name,
                index,
                size,
            });
        }
        let at = BAR0 + 4 * index as u16;
        let mask = !(size - 1);
        self.config.define(at, &kind.low_bits().to_le_bytes());
        self.config.allow(at, &(mask as u32).to_le_bytes());
        if wide {
            self.config
                .allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars[index] = Some(bar);
        Ok(self)
    }

    /// Gives the function an INTx pin: 1 for INTA# to 4 for INTD#.
    pub fn interrupt_pin(mut self, pin: u8) -> Self {
        self.config.define(INTERRUPT_PIN, &[pin.min(4)]);
        self
    }

    /// Adds a capability; `body` is what follows the ID and the link, `writable` a mask over it.
    pub fn capability(mut self, id: u8, body: &[u8], writable: &[u8]) -> (Self, u16) {
        let at = self.config.add_capability(id, body);
        self.config.allow(at + 2, writable);
        (self, at)
    }

    /// Adds power management: D0 and D3hot, state kept in D3hot.
    pub fn power_management(mut self) -> Self {
        let at = self
            .config
            .add_capability(CAP_PM, &[0x03, 0, 0x08, 0, 0, 0]);
        self.config.allow(at + 4, &[0x03]);
        self
    }

    /// Adds MSI with 1, 2, 4, 8, 16 or 32 messages (other numbers are rounded up), 64-bit addresses and masks.
    pub fn msi(mut self, messages: u8) -> Self {
        let count = messages.clamp(1, 32).next_power_of_two();
        let control = MSI_64 | MSI_MASKABLE | (count.trailing_zeros() as u16) << 1;
        let mut body = [0; 22];
        body[..2].copy_from_slice(&control.to_le_bytes());
        let at = self.config.add_capability(CAP_MSI, &body);
        self.config.allow(at + 2, &[0x71]);
        self.config.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff]);
        self.config.allow(at + 8, &[0xff; 6]);
        let masks = u32::MAX >> (32 - u32::from(count));
        self.config
            .allow(at + MSI_MASK_OFFSET, &masks.to_le_bytes());
        self.msi_cap = Some(at);
        self
    }

    /// Adds MSI-X with its table and pending bits in a memory register of their own.
    ///
    /// # Errors
    /// [`PciError::BadMsix`] for 0 or more than 2048 vectors, [`PciError::BadBar`] as [`Self::bar`].
    pub fn msix(self, vectors: u16, bar: usize) -> Result<Self, PciError> {
        let table = u64::from(vectors) * ENTRY_SIZE;
        let pba = table.max(0x800);
        let size = (pba + Msix::pba_size(vectors))
            .next_power_of_two()
            .max(0x1000);
        let kind = BarKind::Memory32 {
            prefetchable: false,
        };
        let widths = Widths::DWORD_OR_QWORD;
        self.bar(bar, Bar { kind, size, widths })?
            .msix_in(vectors, bar, 0, pba)
    }

    /// Adds MSI-X with its table and pending bits at offsets of a memory register that was added before.
    ///
    /// # Errors
    /// [`PciError::BadMsix`] when they don't fit there or overlap.
    pub fn msix_in(
        mut self,
        vectors: u16,
        bar: usize,
        table: u64,
        pba: u64,
    ) -> Result<Self, PciError> {
        let table_end = table + u64::from(vectors) * ENTRY_SIZE;
        let pba_end = pba + Msix::pba_size(vectors);
        let room = match self.bars.get(bar).copied().flatten() {
            Some(b) if !b.kind.is_io() => b.size,
            _ => 0,
        };
        let good = (1..=MAX_VECTORS).contains(&vectors)
            && table.is_multiple_of(8)
            && pba.is_multiple_of(8)
            && table_end.max(pba_end) <= room.min(1 << 32)
            && (table_end <= pba || pba_end <= table)
            && self.msix.is_none();
        if !good {
            return Err(PciError::BadMsix {
                function: self.name,
                vectors,
            });
        }
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table as u32 | bar as u32).to_le_bytes());
        body[6..].copy_from_slice(&(pba as u32 | bar as u32).to_le_bytes());
        let at = self.config.add_capability(CAP_MSIX, &body);
        self.config
            .allow(at + 2, &(MSIX_ENABLE | MSIX_MASK_ALL).to_le_bytes());
        self.msix = Some(Arc::new(Msix::new(vectors, bar, table, pba)));
        self.msix_cap = Some(at);
        Ok(self)
    }

    /// Adds the PCI Express capability, version 2. Function level reset is offered for all but ports.
    pub fn express(mut self, kind: ExpressType) -> Self {
        use crate::spec::express::*;
        let mut body = [0u8; SIZE as usize - 2];
        let mut put = |at: u16, value: &[u8]| {
            let at = usize::from(at) - 2;
            body[at..at + value.len()].copy_from_slice(value);
        };
        let flr = DEVICE_CAP_RBER | DEVICE_CAP_FLR;
        let link = LINK_SPEED_16GT | LINK_WIDTH_1;
        let speeds = 0b1_1110;
        let (flags, slot) = match kind {
            ExpressType::Endpoint => (0x02, None),
            ExpressType::RootIntegratedEndpoint => (0x92, None),
            ExpressType::RootPort { slot, hot_plug } => (0x42 | FLAGS_SLOT, Some((slot, hot_plug))),
        };
        let device = if slot.is_some() { DEVICE_CAP_RBER } else { flr };
        put(DEVICE_CAP, &device.to_le_bytes());
        if kind != ExpressType::RootIntegratedEndpoint {
            let port = if slot.is_some() {
                LINK_CAP_ACTIVE_REPORTING
            } else {
                0
            };
            put(LINK_CAP, &(link | port).to_le_bytes());
            put(LINK_CAP2, &[speeds]);
        }
        if let Some((number, hot_plug)) = slot {
            let hot = SLOT_CAP_BUTTON
                | SLOT_CAP_POWER
                | SLOT_CAP_ATTENTION
                | SLOT_CAP_POWER_INDICATOR
                | SLOT_CAP_HOT_PLUG;
            let number = u32::from(number & 0x1fff) << 19;
            let value = number | if hot_plug { hot } else { 0 };
            put(SLOT_CAP, &value.to_le_bytes());
        }
        put(FLAGS, &u16::to_le_bytes(flags));
        if kind == ExpressType::Endpoint {
            put(LINK_STATUS, &(link as u16).to_le_bytes());
        }
        if slot.is_some() {
            let empty = SLOT_CONTROL_ATTENTION_OFF
                | SLOT_CONTROL_POWER_INDICATOR_OFF
                | SLOT_CONTROL_POWER_OFF;
            put(SLOT_CONTROL, &empty.to_le_bytes());
        }
        let at = self.config.add_capability(CAP_EXPRESS, &body);
        self.config
            .allow(at + DEVICE_CONTROL, &0x7fefu16.to_le_bytes());
        self.config.allow_clear(at + DEVICE_STATUS, &[0x0f]);
        self.config.allow(at + DEVICE_CONTROL2, &[0x1f]);
        if kind != ExpressType::RootIntegratedEndpoint {
            self.config
                .allow(at + LINK_CONTROL, &0x01dbu16.to_le_bytes());
        }
        if let Some((_, true)) = slot {
            self.config
                .allow(at + SLOT_CONTROL, &SLOT_CONTROL_WRITABLE.to_le_bytes());
            self.config
                .allow_clear(at + SLOT_STATUS, &SLOT_STATUS_EVENTS.to_le_bytes());
        }
        if slot.is_some() {
            self.config.allow(at + ROOT_CONTROL, &[0x1f]);
        }
        self.express_cap = Some(at);
        self
    }

    /// The finished function.
    pub fn build(self) -> PciFunction {
        PciFunction::new(Parts {
            name: self.name,
            config: self.config,
            bars: self.bars,
            msix: self.msix,
            msix_cap: self.msix_cap,
            msi_cap: self.msi_cap,
            express_cap: self.express_cap,
            secondary: self.bridge.then(|| Arc::new(PciBus::behind_bridge())),
        })
    }
}
