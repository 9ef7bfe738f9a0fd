//! Resource assignment: gives buses their numbers, and registers and bridge windows their addresses, as firmware does.
//!
//! A machine that boots a kernel directly calls [`assign`] after each reset. It works through configuration space only, so it
//! sees what firmware would see.

use std::ops::Range;
use std::sync::Arc;

use crate::PciError;
use crate::bus::{PciBus, config_write, is_bridge};
use crate::function::PciDevice;
use crate::spec::*;

/// The address ranges that are the root bus's to give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootWindows {
    /// Ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub memory32: Range<u64>,
    /// Memory above, for 64-bit registers that don't fit below. May be empty.
    pub memory64: Range<u64>,
}

/// What a hot-plug port keeps free for cards to come.
const RESERVE_IO: u64 = 0x1000;
const RESERVE_MEMORY: u64 = 2 << 20;
const RESERVE_PREFETCHABLE: u64 = 32 << 20;
const BRIDGE_IO_GRAIN: u64 = 0x1000;
const BRIDGE_MEMORY_GRAIN: u64 = 1 << 20;

/// A kind of address space, in the order of `Allocators`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Io,
    Memory,
    Prefetchable,
}

const KINDS: [Kind; 3] = [Kind::Io, Kind::Memory, Kind::Prefetchable];

/// What a register or a bridge's window needs.
struct Request {
    device: Arc<dyn PciDevice>,
    target: Target,
    size: u64,
    align: u64,
}

enum Target {
    Register(usize),
    Window,
}

/// Assigns everything below `root`.
///
/// # Errors
/// [`PciError::NoRoom`] when a window is too small.
pub fn assign(root: &Arc<PciBus>, windows: &RootWindows) -> Result<(), PciError> {
    let mut next_bus = 1;
    number(root, 0, &mut next_bus);
    place(root, Kind::Io, &mut Cursor::new(windows.io.clone()), None)?;
    let mut low = Cursor::new(windows.memory32.clone());
    let mut high = Cursor::new(windows.memory64.clone());
    place(root, Kind::Prefetchable, &mut low, Some(&mut high))?;
    place(root, Kind::Memory, &mut low, Some(&mut high))?;
    enable(root);
    Ok(())
}

/// The next free address of a window.
struct Cursor {
    next: u64,
    end: u64,
}

impl Cursor {
    fn new(range: Range<u64>) -> Self {
        Self {
            next: range.start,
            end: range.end,
        }
    }

    fn take(&mut self, size: u64, align: u64) -> Option<u64> {
        let base = self.next.checked_next_multiple_of(align)?;
        let end = base.checked_add(size).filter(|end| *end <= self.end)?;
        self.next = end;
        Some(base)
    }
}

fn write8(device: &dyn PciDevice, offset: u16, value: u8) {
    config_write(device, offset, &[value]);
}

fn write16(device: &dyn PciDevice, offset: u16, value: u16) {
    config_write(device, offset, &value.to_le_bytes());
}

fn write32(device: &dyn PciDevice, offset: u16, value: u32) {
    config_write(device, offset, &value.to_le_bytes());
}

/// Numbers the buses depth first.
fn number(bus: &Arc<PciBus>, own: u8, next: &mut u16) {
    for (_, device) in bus.functions() {
        let Some(below) = device.function().secondary() else {
            continue;
        };
        let Ok(secondary) = u8::try_from(*next) else {
            return;
        };
        *next += 1;
        write8(&*device, PRIMARY_BUS, own);
        write8(&*device, SECONDARY_BUS, secondary);
        write8(&*device, SUBORDINATE_BUS, 0xff);
        number(below, secondary, next);
        write8(&*device, SUBORDINATE_BUS, (*next - 1).min(0xff) as u8);
    }
}

fn hot_plug(device: &dyn PciDevice) -> bool {
    device.function().express_capability().is_some_and(|at| {
        let slot = device.function().config(|c| c.u32(at + express::SLOT_CAP));
        slot & express::SLOT_CAP_HOT_PLUG != 0
    })
}

/// Which kind of window a register goes into: a bridge's prefetchable window is for 64-bit prefetchable registers.
fn kind_of(device: &dyn PciDevice, index: usize) -> Option<(Kind, u64, bool)> {
    use crate::builder::BarKind;
    let bar = device.function().bar(index)?;
    Some(match bar.kind {
        BarKind::Io => (Kind::Io, bar.size, false),
        BarKind::Memory64 { prefetchable: true } => (Kind::Prefetchable, bar.size, true),
        BarKind::Memory64 { .. } => (Kind::Memory, bar.size, true),
        BarKind::Memory32 { .. } => (Kind::Memory, bar.size, false),
    })
}

/// Everything on a bus that needs room of a kind, the most demanding first.
fn requests(bus: &Arc<PciBus>, kind: Kind) -> Vec<Request> {
    let mut list = Vec::new();
    for (_, device) in bus.functions() {
        for index in 0..6 {
            if let Some((k, size, _)) = kind_of(&*device, index)
                && k == kind
            {
                // Pages are not shared between devices, so that a guest can hand one on.
                let align = if kind == Kind::Io {
                    size
                } else {
                    size.max(0x1000)
                };
                list.push(Request {
                    device: device.clone(),
                    target: Target::Register(index),
                    size,
                    align,
                });
            }
        }
        if let Some(below) = device.function().secondary() {
            let (size, align) = window_need(&*device, below, kind);
            if size > 0 {
                list.push(Request {
                    device: device.clone(),
                    target: Target::Window,
                    size,
                    align,
                });
            }
        }
    }
    list.sort_by_key(|r| std::cmp::Reverse(r.align));
    list
}

/// Size and alignment of a bridge's window for what is below it.
fn window_need(bridge: &dyn PciDevice, below: &Arc<PciBus>, kind: Kind) -> (u64, u64) {
    let (grain, reserve) = match kind {
        Kind::Io => (BRIDGE_IO_GRAIN, RESERVE_IO),
        Kind::Memory => (BRIDGE_MEMORY_GRAIN, RESERVE_MEMORY),
        Kind::Prefetchable => (BRIDGE_MEMORY_GRAIN, RESERVE_PREFETCHABLE),
    };
    let list = requests(below, kind);
    let align = list.iter().map(|r| r.align).fold(grain, u64::max);
    let mut cursor = Cursor::new(0..u64::MAX);
    for request in &list {
        if cursor.take(request.size, request.align).is_none() {
            return (u64::MAX, align);
        }
    }
    let mut size = cursor.next;
    // Ports are scarce: cards of today do without.
    if hot_plug(bridge) && kind != Kind::Io {
        size = size.max(reserve);
    }
    (
        size.checked_next_multiple_of(grain).unwrap_or(u64::MAX),
        align,
    )
}

/// Places one kind of resource on a bus and below. What may lie above 4 GiB goes there when there is no room below.
fn place(
    bus: &Arc<PciBus>,
    kind: Kind,
    low: &mut Cursor,
    mut high: Option<&mut Cursor>,
) -> Result<(), PciError> {
    for request in requests(bus, kind) {
        let device = &*request.device;
        let wide = match request.target {
            Target::Register(index) => kind_of(device, index).is_some_and(|(_, _, wide)| wide),
            Target::Window => kind == Kind::Prefetchable,
        };
        // Large ones would crowd the small window.
        let large = request.size > (64 << 20);
        let mut base = None;
        if wide && large {
            base = high
                .as_mut()
                .and_then(|h| h.take(request.size, request.align));
        }
        base = base.or_else(|| low.take(request.size, request.align));
        if wide && base.is_none() {
            base = high
                .as_mut()
                .and_then(|h| h.take(request.size, request.align));
        }
        let base = base.ok_or_else(|| PciError::NoRoom {
            function: device.function().name().to_owned(),
            size: request.size,
            space: if kind == Kind::Io { "port" } else { "memory" },
        })?;
        match request.target {
            Target::Register(index) => {
                let at = BAR0 + 4 * index as u16;
                write32(device, at, base as u32);
                if wide {
                    write32(device, at + 4, (base >> 32) as u32);
                }
            }
            Target::Window => {
                set_window(device, kind, base, base + request.size - 1);
                if let Some(below) = device.function().secondary() {
                    place(
                        below,
                        kind,
                        &mut Cursor::new(base..base + request.size),
                        None,
                    )?;
                }
            }
        }
    }
    close_empty_windows(bus, kind);
    Ok(())
}

fn set_window(bridge: &dyn PciDevice, kind: Kind, base: u64, last: u64) {
    match kind {
        Kind::Io => {
            write8(bridge, IO_BASE, (base >> 8) as u8);
            write8(bridge, IO_LIMIT, (last >> 8) as u8);
        }
        Kind::Memory => {
            write16(bridge, MEMORY_BASE, (base >> 16) as u16);
            write16(bridge, MEMORY_LIMIT, (last >> 16) as u16);
        }
        Kind::Prefetchable => {
            write16(bridge, PREFETCH_BASE, (base >> 16) as u16);
            write16(bridge, PREFETCH_LIMIT, (last >> 16) as u16);
            write32(bridge, PREFETCH_BASE_UPPER, (base >> 32) as u32);
            write32(bridge, PREFETCH_LIMIT_UPPER, (last >> 32) as u32);
        }
    }
}

/// A window is closed by a base above its limit; all zeros would open it at address zero.
fn close_empty_windows(bus: &Arc<PciBus>, kind: Kind) {
    for (_, device) in bus.functions() {
        if let Some(below) = device.function().secondary()
            && window_need(&*device, below, kind).0 == 0
        {
            let base = if kind == Kind::Io {
                0xf000
            } else {
                0xfff0_0000
            };
            set_window(&*device, kind, base, 0);
        }
    }
}

/// Lets everything decode, and bridges master the bus.
fn enable(bus: &Arc<PciBus>) {
    for (_, device) in bus.functions() {
        let mut command = device.function().config(|c| c.u16(COMMAND));
        for kind in KINDS {
            let used = (0..6).any(|i| kind_of(&*device, i).is_some_and(|(k, ..)| k == kind));
            command |= match kind {
                Kind::Io if used => COMMAND_IO,
                Kind::Memory | Kind::Prefetchable if used => COMMAND_MEMORY,
                _ => 0,
            };
        }
        if is_bridge(&*device) {
            command |= COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER;
        }
        write16(&*device, COMMAND, command);
        if let Some(below) = device.function().secondary() {
            enable(below);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Devfn;
    use crate::root_port::{PciBridge, RootPort};
    use crate::testing::{Board, Card};

    fn windows() -> RootWindows {
        RootWindows {
            io: 0xc000..0x1_0000,
            memory32: 0xc000_0000..0xfec0_0000,
            memory64: 0x80_0000_0000..0x100_0000_0000,
        }
    }

    #[test]
    fn everything_gets_a_place_and_decodes_there() {
        let board = Board::new();
        let (a, _a) = board.plug_card(1);
        let port = RootPort::new("port", 1, true, Box::new(|| {}));
        let _port = board.bus.add(Devfn::new(2, 0), port.clone()).unwrap();
        let bridge = PciBridge::new("bridge");
        let _bridge = port.bus().add(Devfn::new(0, 0), bridge.clone()).unwrap();
        let b = Arc::new(Card::new());
        let _b = bridge.bus().add(Devfn::new(5, 0), b.clone()).unwrap();
        let empty = RootPort::new("empty", 2, true, Box::new(|| {}));
        let _empty = board.bus.add(Devfn::new(3, 0), empty.clone()).unwrap();
        assign(&board.bus, &windows()).unwrap();

        assert_eq!(port.function().bus_numbers(), (1, 2));
        assert_eq!(bridge.function().bus_numbers(), (2, 2));
        assert_eq!(empty.function().bus_numbers(), (3, 3));
        // Two cards with three registers each, all of them mapped through the bridges.
        assert_eq!(board.memory.regions().len(), 4);
        assert_eq!(board.ports.regions().len(), 2);
        let found = board.bus.route(0, 2, Devfn::new(5, 0)).unwrap();
        assert_eq!(found.function().bar_address(0), b.function().bar_address(0));
        assert!(a.function().bar_address(2).is_some());
        let memory = board.memory.regions();
        assert!(memory.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));

        // Closing a window takes away what is behind it.
        write16(&*port, COMMAND, 0);
        assert_eq!(board.memory.regions().len(), 2);
        write16(&*port, COMMAND, 7);
        assert_eq!(board.memory.regions().len(), 4);
        set_window(&*bridge, Kind::Memory, 0xfff0_0000, 0);
        assert_eq!(board.memory.regions().len(), 2);
    }

    #[test]
    fn too_small_a_window_is_an_error() {
        let board = Board::new();
        let (_a, _handle) = board.plug_card(1);
        let small = RootWindows {
            io: 0xc000..0xc010,
            ..windows()
        };
        let error = assign(&board.bus, &small).unwrap_err();
        assert_eq!(
            error.to_string(),
            "card: no room for 0x20 bytes of port space"
        );
    }
}
