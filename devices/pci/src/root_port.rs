//! PCI Express root ports with hot-plug slots (PCI Express Base 4.0, sections 6.7 and 7.5.3), and plain PCI-to-PCI bridges.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Weak};

use device_model::{Device, ResetKind};

use crate::builder::{ExpressType, FunctionBuilder, Identity};
use crate::bus::{PciBus, SlotSink};
use crate::function::{PciDevice, PciFunction};
use crate::spec::express::*;

/// Called when the guest has cut the power of a slot: the card is to be unplugged now. Called on a vCPU's thread in the middle of an
/// access: takes note, and unplugs later on another thread.
pub type PowerOffSink = Box<dyn Fn() + Send + Sync>;

/// A root port with one slot.
pub struct RootPort {
    function: PciFunction,
    express: u16,
    hot_plug: bool,
    power_off: PowerOffSink,
    /// The slot's control register as it was last seen.
    last_control: AtomicU16,
}

/// True if a slot's control register says that it is to be without power, and shows so.
fn is_off(control: u16) -> bool {
    control & SLOT_CONTROL_POWER_OFF != 0
        && control & SLOT_CONTROL_POWER_INDICATOR == SLOT_CONTROL_POWER_INDICATOR_OFF
}

impl RootPort {
    /// A root port. `slot` is the number that the guest shows for the slot, unique in the machine.
    pub fn new(name: &str, slot: u16, hot_plug: bool, power_off: PowerOffSink) -> Arc<Self> {
        let id = Identity {
            vendor: 0x1b36,
            device: 0x000c,
            class: 0x06_0400,
            ..Default::default()
        };
        let function = FunctionBuilder::bridge(name, id)
            .interrupt_pin(1)
            .express(ExpressType::RootPort { slot, hot_plug })
            .power_management()
            .msi(1)
            .build();
        let express = function.express_capability().unwrap_or_default();
        let port = Arc::new(Self {
            function,
            express,
            hot_plug,
            power_off,
            last_control: AtomicU16::new(0),
        });
        let sink: Weak<dyn SlotSink> = Arc::<Self>::downgrade(&port);
        port.bus().listen(sink);
        port
    }

    /// The bus behind the port: slot 0 is the card's.
    pub fn bus(&self) -> Arc<PciBus> {
        let bus = self.function.secondary();
        Arc::clone(bus.expect("a bridge has a secondary bus"))
    }

    /// Presses the slot's attention button: asks the guest to let go of the card. The guest answers, some seconds later, by
    /// cutting the power; see [`PowerOffSink`]. False when the slot is empty or not for hot-plug.
    pub fn request_unplug(&self) -> bool {
        let status = self.express + SLOT_STATUS;
        let present = self.function.config(|c| c.u16(status)) & SLOT_STATUS_PRESENT != 0;
        if present && self.hot_plug {
            self.function
                .change_config(|c| c.change_u16(status, 0, SLOT_STATUS_BUTTON));
            self.sync(true);
        }
        present && self.hot_plug
    }

    /// Drives the interrupt from events and enables. `new` when an event has come: a message is sent for those only.
    fn sync(&self, new: bool) {
        let (control, status) = self.function.config(|c| {
            (
                c.u16(self.express + SLOT_CONTROL),
                c.u16(self.express + SLOT_STATUS),
            )
        });
        // Events 0 to 4 are enabled by the same bits of the control register, the link's by one further up.
        let link =
            status & SLOT_STATUS_LINK_CHANGED != 0 && control & SLOT_CONTROL_LINK_CHANGED != 0;
        let pending = control & status & 0x1f != 0 || link;
        let on = pending && control & SLOT_CONTROL_HOT_PLUG_INTERRUPT != 0;
        if self.function.msi_enabled() {
            self.function.set_intx(false);
            if on && new {
                self.function.notify(0);
            }
        } else {
            self.function.set_intx(on);
        }
    }

    fn show_presence(&self, present: bool, event: bool) -> bool {
        self.function.change_config(|c| {
            let status = self.express + SLOT_STATUS;
            let was = c.u16(status) & SLOT_STATUS_PRESENT != 0;
            if was == present {
                return false;
            }
            let changed = if event && self.hot_plug {
                SLOT_STATUS_PRESENCE_CHANGED | SLOT_STATUS_LINK_CHANGED
            } else {
                0
            };
            let bit = if present { SLOT_STATUS_PRESENT } else { 0 };
            c.change_u16(status, SLOT_STATUS_PRESENT, bit | changed);
            let link = self.express + LINK_STATUS;
            // The width and speed that the port is capable of, in the same places.
            let trained = c.u16(self.express + LINK_CAP) & 0x3ff | LINK_STATUS_ACTIVE;
            c.change_u16(
                link,
                0x3ff | LINK_STATUS_ACTIVE,
                if present { trained } else { 0 },
            );
            changed != 0
        })
    }

    /// Takes note of a command that the guest has given to the slot.
    fn slot_control_written(&self) {
        let (control, status) = self.function.change_config(|c| {
            let status = self.express + SLOT_STATUS;
            c.change_u16(status, 0, SLOT_STATUS_COMMAND_COMPLETED);
            (c.u16(self.express + SLOT_CONTROL), c.u16(status))
        });
        let before = self.last_control.swap(control, Ordering::SeqCst);
        if is_off(control) && !is_off(before) && status & SLOT_STATUS_PRESENT != 0 {
            (self.power_off)();
        }
        self.sync(true);
    }
}

impl SlotSink for RootPort {
    fn presence_changed(&self, present: bool) {
        if self.show_presence(present, true) {
            self.sync(true);
        }
    }
}

impl Device for RootPort {
    fn name(&self) -> String {
        self.function.name().to_owned()
    }

    fn reset(&self, kind: ResetKind) {
        self.function.reset();
        let present = !self.bus().functions().is_empty();
        self.show_presence(present, false);
        let control = self.function.change_config(|c| {
            let at = self.express + SLOT_CONTROL;
            if present && self.hot_plug {
                // A slot that is occupied at power-on is powered, and its light is on.
                let clear = SLOT_CONTROL_POWER_OFF | SLOT_CONTROL_POWER_INDICATOR;
                c.change_u16(at, clear, SLOT_CONTROL_POWER_INDICATOR_ON);
            }
            c.u16(at)
        });
        self.last_control.store(control, Ordering::SeqCst);
        self.sync(false);
        self.bus().reset(kind);
    }
}

impl PciDevice for RootPort {
    fn function(&self) -> &PciFunction {
        &self.function
    }
    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}

    fn config_written(&self, offset: u16, len: usize) {
        let first = self.express + SLOT_CONTROL;
        if self.hot_plug && offset < first + 2 && offset + len as u16 > first {
            self.slot_control_written();
        } else {
            self.sync(false);
        }
    }
}

/// A conventional PCI-to-PCI bridge.
pub struct PciBridge {
    function: PciFunction,
}

impl PciBridge {
    /// A bridge.
    pub fn new(name: &str) -> Arc<Self> {
        let id = Identity {
            vendor: 0x1b36,
            device: 0x0001,
            class: 0x06_0400,
            ..Default::default()
        };
        let function = FunctionBuilder::bridge(name, id).power_management().build();
        Arc::new(Self { function })
    }

    /// The bus behind the bridge.
    pub fn bus(&self) -> Arc<PciBus> {
        let bus = self.function.secondary();
        Arc::clone(bus.expect("a bridge has a secondary bus"))
    }
}

impl Device for PciBridge {
    fn name(&self) -> String {
        self.function.name().to_owned()
    }

    fn reset(&self, kind: ResetKind) {
        self.function.reset();
        self.bus().reset(kind);
    }
}

impl PciDevice for PciBridge {
    fn function(&self) -> &PciFunction {
        &self.function
    }
    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}
    fn config_written(&self, _offset: u16, _len: usize) {}
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::address::Devfn;
    use crate::bus::config_write;
    use crate::spec::{COMMAND, MSI_ENABLE};
    use crate::testing::{Board, Card};

    #[test]
    fn a_card_comes_and_goes() {
        let board = Board::new();
        let offs = Arc::new(AtomicUsize::new(0));
        let count = offs.clone();
        let port = RootPort::new(
            "port",
            7,
            true,
            Box::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            }),
        );
        let _port = board.bus.add(Devfn::new(2, 0), port.clone()).unwrap();
        port.reset(ResetKind::Cold);
        let cap = port.express;
        let status = || port.function.config(|c| c.u16(cap + SLOT_STATUS));
        let write = |at: u16, value: u16| config_write(&*port, at, &value.to_le_bytes());
        let enables = SLOT_CONTROL_HOT_PLUG_INTERRUPT | 0x1009;
        write(cap + SLOT_CONTROL, enables);
        write(cap + SLOT_STATUS, SLOT_STATUS_EVENTS);
        assert!(!port.request_unplug());

        let card = port
            .bus()
            .add(Devfn::new(0, 0), Arc::new(Card::new()))
            .unwrap();
        assert_eq!(
            status(),
            SLOT_STATUS_PRESENT | SLOT_STATUS_PRESENCE_CHANGED | SLOT_STATUS_LINK_CHANGED
        );
        assert!(board.pins[2].is_high());
        write(cap + SLOT_STATUS, SLOT_STATUS_EVENTS);
        assert!(!board.pins[2].is_high());

        assert!(port.request_unplug());
        assert!(board.pins[2].is_high());
        let off = SLOT_CONTROL_POWER_OFF | SLOT_CONTROL_POWER_INDICATOR_OFF;
        write(cap + SLOT_CONTROL, enables | off);
        write(cap + SLOT_CONTROL, enables | off);
        assert_eq!(offs.load(Ordering::SeqCst), 1);
        write(cap + SLOT_STATUS, SLOT_STATUS_EVENTS);
        card.remove();
        assert_eq!(status() & SLOT_STATUS_PRESENT, 0);
    }

    #[test]
    fn events_are_sent_as_messages() {
        let board = Board::new();
        let port = RootPort::new("port", 7, true, Box::new(|| {}));
        let _port = board.bus.add(Devfn::new(2, 0), port.clone()).unwrap();
        port.reset(ResetKind::Cold);
        let msi = port.function.config(|c| {
            let mut at = u16::from(c.u8(crate::spec::CAPABILITIES));
            while c.u8(at) != crate::spec::CAP_MSI {
                at = u16::from(c.u8(at + 1));
            }
            at
        });
        config_write(&*port, COMMAND, &[7, 0]);
        config_write(&*port, msi + 4, &0xfee0_0000u32.to_le_bytes());
        config_write(&*port, msi + 2, &MSI_ENABLE.to_le_bytes());
        config_write(&*port, port.express + SLOT_CONTROL, &[0x29, 0x10]);
        board.messages.lock().clear();
        let _card = port
            .bus()
            .add(Devfn::new(0, 0), Arc::new(Card::new()))
            .unwrap();
        assert_eq!(*board.messages.lock(), [(0xfee0_0000, 0)]);
    }
}
