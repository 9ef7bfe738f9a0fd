//! A PCI function: the part that is the same in all devices.

use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use device_model::{Device, IoHandler, IoRegion, IrqLine, MsiSink, ResetKind, Widths};
use parking_lot::Mutex;

use crate::address::Devfn;
use crate::builder::Bar;
use crate::bus::{Fabric, PciBus, Upstream};
use crate::config::ConfigSpace;
use crate::msix::Msix;
use crate::spec::*;

/// A device with configuration space. [`Device::reset`] of such a device must reset its [`PciFunction`] too.
pub trait PciDevice: Device {
    /// The device's PCI half.
    fn function(&self) -> &PciFunction;

    /// A read in what base address register `bar` decodes, with a size that the register's [`Bar::widths`] allows. MSI-X tables
    /// don't come here.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// A write; as [`Self::bar_read`].
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// Register `bar` decodes at `address` now, or not any more. Called with the function's mapping locked: don't access
    /// configuration space of other functions from here.
    fn bar_moved(&self, bar: usize, address: Option<u64>);

    /// The guest has written configuration space, and the function has done its part.
    fn config_written(&self, offset: u16, len: usize);

    /// A guest's read of configuration space: a device whose registers have side effects on reading looks here first.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.function().config_read(offset, data);
    }
}

pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) config: ConfigSpace,
    pub(crate) bars: [Option<Bar>; 6],
    pub(crate) msix: Option<Arc<Msix>>,
    pub(crate) msix_cap: Option<u16>,
    pub(crate) msi_cap: Option<u16>,
    pub(crate) express_cap: Option<u16>,
    pub(crate) secondary: Option<Arc<PciBus>>,
}

struct State {
    config: ConfigSpace,
    intx: bool,
}

/// Where the function is plugged in.
pub(crate) struct Attachment {
    pub(crate) bus: Weak<PciBus>,
    pub(crate) devfn: Devfn,
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) intx: IrqLine,
}

#[derive(Default)]
struct Mapping {
    /// Whose registers these are, since it was first plugged in.
    device: Option<Weak<dyn PciDevice>>,
    regions: [Option<(u64, IoRegion)>; 6],
}

/// The PCI half of a device: configuration space, where its registers are mapped, and its interrupts.
pub struct PciFunction {
    name: String,
    bars: [Option<Bar>; 6],
    msix: Option<Arc<Msix>>,
    msix_cap: Option<u16>,
    msi_cap: Option<u16>,
    express_cap: Option<u16>,
    secondary: Option<Arc<PciBus>>,
    attachment: ArcSwapOption<Attachment>,
    mapping: Mutex<Mapping>,
    state: Mutex<State>,
}

/// What a bridge lets through to its secondary bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Space {
    Io,
    Memory,
}

impl PciFunction {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            name: parts.name,
            bars: parts.bars,
            msix: parts.msix,
            msix_cap: parts.msix_cap,
            msi_cap: parts.msi_cap,
            express_cap: parts.express_cap,
            secondary: parts.secondary,
            attachment: ArcSwapOption::empty(),
            mapping: Mutex::default(),
            state: Mutex::new(State {
                config: parts.config,
                intx: false,
            }),
        }
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A base address register.
    pub fn bar(&self, index: usize) -> Option<Bar> {
        self.bars.get(index).copied().flatten()
    }

    /// The function's MSI-X table.
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref()
    }

    /// The bus behind a bridge.
    pub fn secondary(&self) -> Option<&Arc<PciBus>> {
        self.secondary.as_ref()
    }

    /// The offset of the PCI Express capability.
    pub fn express_capability(&self) -> Option<u16> {
        self.express_cap
    }

    /// Slot and function, while it is plugged in.
    pub fn devfn(&self) -> Option<Devfn> {
        self.attachment.load().as_ref().map(|a| a.devfn)
    }

    /// True while the guest lets it do DMA.
    pub fn is_bus_master(&self) -> bool {
        self.config(|c| c.u16(COMMAND)) & COMMAND_MASTER != 0
    }

    /// Looks at configuration space.
    pub fn config<T>(&self, look: impl FnOnce(&ConfigSpace) -> T) -> T {
        look(&self.state.lock().config)
    }

    /// Changes configuration space from the device's side: read-only registers, status bits. Not for base addresses,
    /// the command register or message control, whose effects would be missing.
    pub fn change_config<T>(&self, change: impl FnOnce(&mut ConfigSpace) -> T) -> T {
        change(&mut self.state.lock().config)
    }

    /// A guest's read of configuration space.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.state.lock().config.read(offset, data);
    }

    /// Does what the guest's write of configuration space means for the function itself.
    pub(crate) fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state.lock();
        let before = Decode::of(&state.config, &self.bars);
        state.config.write(offset, data);
        let decode = Decode::of(&state.config, &self.bars);
        let bridge_before = before.bridge;
        let reset_before = before.bridge_control & BRIDGE_CONTROL_RESET;
        let reset_after = decode.bridge_control & BRIDGE_CONTROL_RESET;
        self.sync(&state);
        self.send_pending_msi(&mut state);
        drop(state);
        if before != decode {
            self.remap();
        }
        if let Some(bus) = &self.secondary {
            if bridge_before != decode.bridge || before.command != decode.command {
                bus.remap();
            }
            if reset_before == 0 && reset_after != 0 {
                bus.reset(ResetKind::Warm);
            }
        }
    }

    /// True if a guest's write sets the bit of Device Control that starts a function level reset, where that is offered. The bit
    /// always reads as 0, so it is looked for in what is written.
    pub(crate) fn starts_reset(&self, offset: u16, data: &[u8]) -> bool {
        use crate::spec::express::{
            DEVICE_CAP, DEVICE_CAP_FLR, DEVICE_CONTROL, DEVICE_CONTROL_FLR,
        };
        let Some(at) = self.express_cap else {
            return false;
        };
        let [_, bit] = DEVICE_CONTROL_FLR.to_le_bytes();
        let written = usize::from(at + DEVICE_CONTROL + 1)
            .checked_sub(usize::from(offset))
            .and_then(|into| data.get(into));
        written.is_some_and(|byte| byte & bit != 0)
            && self.config(|c| c.u32(at + DEVICE_CAP)) & DEVICE_CAP_FLR != 0
    }

    /// Drives what configuration space controls: the INTx line and the MSI-X table's switches.
    fn sync(&self, state: &State) {
        let command = state.config.u16(COMMAND);
        let msix_control = self.msix_cap.map_or(0, |at| state.config.u16(at + 2));
        if let Some(msix) = &self.msix {
            msix.configure(
                msix_control & MSIX_ENABLE != 0,
                msix_control & MSIX_MASK_ALL != 0,
                command & COMMAND_MASTER != 0,
            );
        }
        let silent = command & COMMAND_INTX_DISABLE != 0
            || msix_control & MSIX_ENABLE != 0
            || self.msi_control(&state.config) & MSI_ENABLE != 0;
        if let Some(attachment) = self.attachment.load().as_ref() {
            attachment.intx.set(state.intx && !silent);
        }
    }

    fn msi_control(&self, config: &ConfigSpace) -> u16 {
        self.msi_cap.map_or(0, |at| config.u16(at + 2))
    }

    /// Sets the level of the function's INTx output. It shows in the status register; the wire follows unless the guest has
    /// disabled it or uses messages.
    pub fn set_intx(&self, high: bool) {
        let mut state = self.state.lock();
        if state.intx == high {
            return;
        }
        state.intx = high;
        let bit = STATUS_INTERRUPT;
        state
            .config
            .change_u16(STATUS, bit, if high { bit } else { 0 });
        self.sync(&state);
    }

    /// True when the guest uses MSI-X.
    pub fn msix_enabled(&self) -> bool {
        self.msix.as_ref().is_some_and(|m| m.is_enabled())
    }

    /// True when the guest uses MSI.
    pub fn msi_enabled(&self) -> bool {
        let state = self.state.lock();
        self.msi_control(&state.config) & MSI_ENABLE != 0
    }

    /// Sends MSI-X vector or MSI message number `vector`, whichever the guest uses. Returns false when it uses neither: then
    /// [`Self::set_intx`] is the way.
    pub fn notify(&self, vector: u16) -> bool {
        if let Some(msix) = self.msix.as_ref().filter(|m| m.is_enabled()) {
            msix.notify(vector);
            return true;
        }
        let Some(at) = self.msi_cap else {
            return false;
        };
        let mut state = self.state.lock();
        if state.config.u16(at + 2) & MSI_ENABLE == 0 {
            return false;
        }
        let bit = 1u32.checked_shl(u32::from(vector)).unwrap_or(1);
        let pending = state.config.u32(at + 0x14) | bit;
        state.config.set(at + 0x14, &pending.to_le_bytes());
        self.send_pending_msi(&mut state);
        true
    }

    fn send_pending_msi(&self, state: &mut State) {
        let Some(at) = self.msi_cap else {
            return;
        };
        let config = &mut state.config;
        let control = config.u16(at + 2);
        let pending = config.u32(at + 0x14);
        let ready = pending & !config.u32(at + 0x10);
        let master = config.u16(COMMAND) & COMMAND_MASTER != 0;
        if ready == 0 || !master || control & MSI_ENABLE == 0 {
            return;
        }
        config.set(at + 0x14, &(pending & !ready).to_le_bytes());
        let address = u64::from(config.u32(at + 8)) << 32 | u64::from(config.u32(at + 4));
        let data = u32::from(config.u16(at + 12));
        let granted = 1u32 << ((control >> 4) & 7).min((control >> 1) & 7);
        let attachment = self.attachment.load();
        let Some(attachment) = attachment.as_ref() else {
            return;
        };
        for message in (0..32).filter(|m| ready & 1 << m != 0) {
            // The low bits of the data number the message; numbers beyond those granted share the last ones.
            let number = message & (granted - 1);
            attachment
                .fabric
                .msi
                .send(address, data & !(granted - 1) | number);
        }
    }

    /// Restores the reset state: nothing decodes, no interrupts.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        let multifunction = state.config.u8(HEADER_TYPE) & HEADER_MULTIFUNCTION;
        state.config.reset();
        let header = state.config.u8(HEADER_TYPE) | multifunction;
        state.config.set(HEADER_TYPE, &[header]);
        state.intx = false;
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        self.sync(&state);
        drop(state);
        self.remap();
        if let Some(bus) = &self.secondary {
            bus.remap();
        }
    }

    pub(crate) fn set_multifunction(&self, on: bool) {
        let mut state = self.state.lock();
        let header = state.config.u8(HEADER_TYPE) & !HEADER_MULTIFUNCTION;
        let bit = if on { HEADER_MULTIFUNCTION } else { 0 };
        state.config.set(HEADER_TYPE, &[header | bit]);
    }

    pub(crate) fn attach(&self, device: &Arc<dyn PciDevice>, attachment: Attachment) {
        self.mapping.lock().device = Some(Arc::downgrade(device));
        let sink: Arc<dyn MsiSink> = attachment.fabric.msi.clone();
        if let Some(msix) = &self.msix {
            msix.connect(Some(sink));
        }
        self.attachment.store(Some(Arc::new(attachment)));
        self.sync(&self.state.lock());
        self.remap();
    }

    pub(crate) fn detach(&self) {
        self.attachment.store(None);
        if let Some(msix) = &self.msix {
            msix.connect(None);
        }
        self.remap();
    }

    /// Where register `index` decodes by what configuration space says, bridges aside.
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let state = self.state.lock();
        *Decode::of(&state.config, &self.bars).bars.get(index)?
    }

    /// Maps every register where it belongs now.
    pub(crate) fn remap(&self) {
        let mut mapping = self.mapping.lock();
        let attachment = self.attachment.load_full();
        let wanted = {
            let state = self.state.lock();
            Decode::of(&state.config, &self.bars).bars
        };
        for (index, bar) in self.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let place = attachment.as_ref().and_then(|a| {
                let base = wanted[index]?;
                let range = base..=base.checked_add(bar.size - 1)?;
                let space = if bar.kind.is_io() {
                    Space::Io
                } else {
                    Space::Memory
                };
                let bus = a.bus.upgrade()?;
                passes(&bus, space, &range).then_some(base)
            });
            if mapping.regions[index].as_ref().map(|(at, _)| *at) == place {
                continue;
            }
            let had = mapping.regions[index].take().is_some();
            let Some(device) = mapping.device.as_ref().and_then(Weak::upgrade) else {
                continue;
            };
            let region = place
                .zip(attachment.as_ref())
                .and_then(|(base, attachment)| {
                    let decoder = Arc::new(BarDecoder {
                        device: device.clone(),
                        msix: self.msix.clone().filter(|m| m.bar() == index),
                        index,
                        widths: bar.widths,
                    });
                    let space = if bar.kind.is_io() {
                        &attachment.fabric.ports
                    } else {
                        &attachment.fabric.memory
                    };
                    let name = format!("{} BAR {index}", self.name);
                    let region = space.add_movable(base, bar.size, &name, decoder).ok()?;
                    Some((base, region))
                });
            let now = region.as_ref().map(|(base, _)| *base);
            mapping.regions[index] = region;
            if had || now.is_some() {
                device.bar_moved(index, now);
            }
        }
    }

    /// True if this bridge forwards a range downstream.
    fn forwards(&self, space: Space, range: &RangeInclusive<u64>) -> bool {
        let state = self.state.lock();
        let command = state.config.u16(COMMAND);
        let Some(windows) = BridgeWindows::of(&state.config) else {
            return false;
        };
        let within = |w: &Option<(u64, u64)>| {
            w.is_some_and(|(first, last)| first <= *range.start() && *range.end() <= last)
        };
        match space {
            Space::Io => command & COMMAND_IO != 0 && within(&windows.io),
            Space::Memory => {
                command & COMMAND_MEMORY != 0
                    && (within(&windows.memory) || within(&windows.prefetchable))
            }
        }
    }

    /// The secondary and subordinate bus numbers of a bridge.
    pub(crate) fn bus_numbers(&self) -> (u8, u8) {
        self.config(|c| (c.u8(SECONDARY_BUS), c.u8(SUBORDINATE_BUS)))
    }
}

/// True if every bridge between the root and `bus` forwards a range.
fn passes(bus: &PciBus, space: Space, range: &RangeInclusive<u64>) -> bool {
    let bridge = match bus.upstream() {
        Upstream::Root => return true,
        Upstream::Nothing => return false,
        Upstream::Bridge(bridge) => bridge,
    };
    let function = bridge.function();
    let above = function
        .attachment
        .load()
        .as_ref()
        .and_then(|a| a.bus.upgrade());
    function.forwards(space, range) && above.is_some_and(|bus| passes(&bus, space, range))
}

/// What configuration space says about decoding.
#[derive(Debug, PartialEq, Eq)]
struct Decode {
    command: u16,
    bars: [Option<u64>; 6],
    bridge: Option<BridgeWindows>,
    bridge_control: u16,
}

impl Decode {
    fn of(config: &ConfigSpace, bars: &[Option<Bar>; 6]) -> Self {
        let command = config.u16(COMMAND) & (COMMAND_IO | COMMAND_MEMORY);
        let mut decode = Self {
            command,
            bars: [None; 6],
            bridge: BridgeWindows::of(config),
            bridge_control: 0,
        };
        if decode.bridge.is_some() {
            decode.bridge_control = config.u16(BRIDGE_CONTROL);
        }
        for (index, bar) in bars.iter().enumerate() {
            if let Some(bar) = bar {
                decode.bars[index] = Self::bar(config, command, index, bar);
            }
        }
        decode
    }

    fn bar(config: &ConfigSpace, command: u16, index: usize, bar: &Bar) -> Option<u64> {
        use crate::builder::BarKind;
        let at = BAR0 + 4 * index as u16;
        let low = config.u32(at);
        let (enable, address, limit) = match bar.kind {
            BarKind::Io => (COMMAND_IO, u64::from(low & !3), 0xffff),
            BarKind::Memory32 { .. } => (COMMAND_MEMORY, u64::from(low & !15), u64::from(u32::MAX)),
            BarKind::Memory64 { .. } => {
                let high = u64::from(config.u32(at + 4)) << 32;
                (COMMAND_MEMORY, high | u64::from(low & !15), (1 << 52) - 1)
            }
        };
        let last = address.checked_add(bar.size - 1)?;
        (command & enable != 0 && address != 0 && last <= limit).then_some(address)
    }
}

/// A bridge's windows as first and last addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BridgeWindows {
    io: Option<(u64, u64)>,
    memory: Option<(u64, u64)>,
    prefetchable: Option<(u64, u64)>,
}

impl BridgeWindows {
    fn of(config: &ConfigSpace) -> Option<Self> {
        if config.u8(HEADER_TYPE) & !HEADER_MULTIFUNCTION != 1 {
            return None;
        }
        let window = |first: u64, last: u64| (first <= last).then_some((first, last));
        let field = |at: u16| u64::from(config.u16(at) & 0xfff0) << 16;
        let upper = |at: u16| u64::from(config.u32(at)) << 32;
        Some(Self {
            io: window(
                u64::from(config.u8(IO_BASE) & 0xf0) << 8,
                u64::from(config.u8(IO_LIMIT) & 0xf0) << 8 | 0xfff,
            ),
            memory: window(field(MEMORY_BASE), field(MEMORY_LIMIT) | 0xf_ffff),
            prefetchable: window(
                upper(PREFETCH_BASE_UPPER) | field(PREFETCH_BASE),
                upper(PREFETCH_LIMIT_UPPER) | field(PREFETCH_LIMIT) | 0xf_ffff,
            ),
        })
    }
}

/// Takes the accesses to one base address register's range to the device.
struct BarDecoder {
    device: Arc<dyn PciDevice>,
    msix: Option<Arc<Msix>>,
    index: usize,
    widths: Widths,
}

impl IoHandler for BarDecoder {
    fn widths(&self) -> Widths {
        self.widths
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match &self.msix {
            Some(msix) if msix.claims(offset) => msix.read(offset, data),
            _ => self.device.bar_read(self.index, offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match &self.msix {
            Some(msix) if msix.claims(offset) => msix.write(offset, data),
            _ => self.device.bar_write(self.index, offset, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::{BarKind, FunctionBuilder, Identity};
    use crate::bus::config_write;
    use crate::testing::{Board, Card};

    fn write32(card: &Arc<Card>, offset: u16, value: u32) {
        config_write(card.as_ref(), offset, &value.to_le_bytes());
    }

    #[test]
    fn registers_follow_the_guests_addresses() {
        let board = Board::new();
        let (card, handle) = board.plug_card(3);
        write32(&card, BAR0, u32::MAX);
        assert_eq!(card.function().config(|c| c.u32(BAR0)), 0xffff_f008);
        write32(&card, BAR0, 0xc000_0000);
        assert_eq!(board.memory.owner(0xc000_0000), None);
        write32(&card, COMMAND, 0x7);
        assert!(board.memory.owner(0xc000_0fff).is_some());
        let mut data = [0; 4];
        board.memory.read(0xc000_0010, &mut data);
        assert_eq!(data, [0x10; 4]);
        write32(&card, BAR0, 0xd000_0000);
        assert_eq!(board.memory.owner(0xc000_0000), None);
        assert!(board.memory.owner(0xd000_0000).is_some());
        assert_eq!(
            *card.moves.lock(),
            [(0, Some(0xc000_0000)), (0, Some(0xd000_0000))]
        );
        handle.remove();
        assert_eq!(board.memory.owner(0xd000_0000), None);
        assert_eq!(card.moves.lock().last(), Some(&(0, None)));
    }

    #[test]
    fn wide_and_port_registers() {
        let board = Board::new();
        let (card, _handle) = board.plug_card(3);
        write32(&card, 0x14, 0xffff_ffff);
        assert_eq!(card.function().config(|c| c.u32(0x14)), 0xffff_ffe1);
        write32(&card, 0x14, 0xc040);
        write32(&card, 0x18, u32::MAX);
        write32(&card, 0x1c, u32::MAX);
        let sizing = card.function().config(|c| (c.u32(0x18), c.u32(0x1c)));
        assert_eq!(sizing, (0xffff_c004, 0xffff_ffff));
        write32(&card, 0x18, 0);
        write32(&card, 0x1c, 0x80);
        write32(&card, COMMAND, 3);
        assert!(board.ports.owner(0xc05f).is_some());
        assert!(board.memory.owner(0x80_0000_3fff).is_some());
        card.reset(ResetKind::Cold);
        assert!(board.memory.regions().is_empty() && board.ports.regions().is_empty());
    }

    #[test]
    fn interrupts_go_by_wire_or_by_message() {
        let board = Board::new();
        let (card, _handle) = board.plug_card(3);
        let function = card.function();
        assert!(!function.notify(0));
        function.set_intx(true);
        assert!(board.pins[3].is_high()); // slot 3, INTA#
        assert_eq!(function.config(|c| c.u16(STATUS)) & STATUS_INTERRUPT, 8);
        write32(
            &card,
            COMMAND,
            u32::from(COMMAND_INTX_DISABLE | COMMAND_MASTER),
        );
        assert!(!board.pins[3].is_high());
        write32(&card, COMMAND, u32::from(COMMAND_MASTER));
        assert!(board.pins[3].is_high());
        let msi = function.config(|c| u16::from(c.u8(CAPABILITIES)));
        write32(&card, msi + 4, 0xfee0_2000);
        write32(&card, msi + 12, 0x50);
        write32(&card, msi, u32::from(MSI_ENABLE | 1 << 4) << 16);
        assert!(!board.pins[3].is_high());
        assert!(function.notify(1));
        assert_eq!(board.messages.lock().pop(), Some((0xfee0_2000, 0x51)));
        write32(&card, msi + 16, 1);
        function.notify(0);
        assert_eq!(board.messages.lock().pop(), None);
        write32(&card, msi + 16, 0);
        assert_eq!(board.messages.lock().pop(), Some((0xfee0_2000, 0x50)));
    }

    #[test]
    fn bad_registers_are_refused() {
        let bar = |kind, size| Bar {
            kind,
            size,
            widths: Widths::ANY,
        };
        let builder = || FunctionBuilder::new("x", Identity::default());
        let wide = BarKind::Memory64 { prefetchable: true };
        assert!(builder().bar(0, bar(BarKind::Io, 24)).is_err());
        assert!(builder().bar(5, bar(wide, 4096)).is_err());
        let two = builder().bar(0, bar(wide, 4096)).unwrap();
        assert!(two.bar(1, bar(BarKind::Io, 8)).is_err());
        assert!(builder().msix(2049, 0).is_err());
        assert!(builder().msix(2048, 1).is_ok());
    }
}
