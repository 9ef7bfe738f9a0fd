//! The I/O APIC: 24 inputs that become interrupt messages.
//!
//! Intel 82093AA datasheet (document 290566), with the version and the EOI register of ICH chipsets (ICH9 datasheet, section 13.5).

use std::sync::Arc;

use bitfield_struct::bitfield;
use device_model::{
    Device, IoBus, IoError, IoHandler, IoRegion, IrqSink, MsiSink, ResetKind, Widths,
};
use parking_lot::Mutex;

/// Registers and bits.
pub mod spec {
    /// Where PCs have it.
    pub const BASE: u64 = 0xfec0_0000;
    /// Bytes that it decodes.
    pub const SIZE: u64 = 0x1000;
    /// Register select.
    pub const IOREGSEL: u64 = 0x00;
    /// Register window.
    pub const IOWIN: u64 = 0x10;
    /// End of interrupt, write only.
    pub const EOIR: u64 = 0x40;
    /// Index of the ID register.
    pub const IOAPICID: u8 = 0x00;
    /// Index of the version register.
    pub const IOAPICVER: u8 = 0x01;
    /// Index of the arbitration register.
    pub const IOAPICARB: u8 = 0x02;
    /// Index of the first redirection register.
    pub const IOREDTBL: u8 = 0x10;
    /// The version: it has an EOI register.
    pub const VERSION: u32 = 0x20;
    /// Delivery mode: the 8259s give the vector.
    pub const MODE_EXTINT: u8 = 7;
    /// Delivery mode: system management interrupt.
    pub const MODE_SMI: u8 = 2;
    /// Delivery mode: non-maskable interrupt.
    pub const MODE_NMI: u8 = 4;
    /// Delivery mode: INIT.
    pub const MODE_INIT: u8 = 5;
    /// First address of interrupt messages.
    pub const MSI_BASE: u64 = 0xfee0_0000;
}
use spec::*;

/// How many inputs there are.
pub const PINS: usize = 24;

/// A redirection table entry.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Redirection {
    vector: u8,
    #[bits(3)]
    mode: u8,
    logical: bool,
    /// Delivery status: always idle here.
    pending: bool,
    active_low: bool,
    remote_irr: bool,
    level: bool,
    masked: bool,
    #[bits(31)]
    reserved: u32,
    #[bits(1)]
    reserved2: u8,
    /// Bits 8 to 14 of the destination, for guests that know of them.
    #[bits(7)]
    extended_destination: u8,
    destination: u8,
}

impl Redirection {
    const RESET: Self = Self::new().with_masked(true);
    /// Bits that a write changes.
    const WRITABLE: u64 = 0xfffe_0000_0001_afff;

    fn message(self) -> (u64, u32) {
        let address = MSI_BASE
            | u64::from(self.destination()) << 12
            | u64::from(self.extended_destination()) << 5
            | u64::from(self.logical()) << 2;
        let level = if self.level() { 0xc000 } else { 0 };
        let data = u32::from(self.vector()) | u32::from(self.mode()) << 8 | level;
        (address, data)
    }
}

/// Volatile guest state.
struct State {
    id: u32,
    select: u8,
    table: [Redirection; PINS],
    /// Levels of the inputs.
    lines: u32,
}

/// An I/O APIC. As an [`IrqSink`] it has inputs 0 to 23. A line that is asserted counts as active whatever the
/// polarity in the table: lines here know their own.
pub struct IoApic {
    messages: Arc<dyn MsiSink>,
    state: Mutex<State>,
}

impl IoApic {
    /// An I/O APIC in its reset state that sends to `messages`.
    pub fn new(messages: Arc<dyn MsiSink>) -> Arc<Self> {
        Arc::new(Self {
            messages,
            state: Mutex::new(State {
                id: 0,
                select: 0,
                table: [Redirection::RESET; PINS],
                lines: 0,
            }),
        })
    }

    /// Claims its registers at the PC's place.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, memory: &IoBus) -> Result<IoRegion, IoError> {
        memory.add(BASE, SIZE, "ioapic", self.clone())
    }

    /// A local APIC has ended a level-triggered interrupt: inputs with this vector whose lines are still asserted
    /// interrupt again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = self.state.lock();
        for pin in 0..PINS {
            let entry = state.table[pin];
            if entry.level() && entry.remote_irr() && entry.vector() == vector {
                state.table[pin].set_remote_irr(false);
                self.service(&mut state, pin);
            }
        }
    }

    /// Sends the message of a level-triggered input that wants it.
    fn service(&self, state: &mut State, pin: usize) {
        let entry = state.table[pin];
        let asserted = state.lines & 1 << pin != 0;
        if entry.level() && asserted && !entry.masked() && !entry.remote_irr() {
            // Only modes that carry a vector are acknowledged by an EOI.
            let acknowledged = !matches!(entry.mode(), MODE_SMI | MODE_NMI | MODE_INIT);
            state.table[pin].set_remote_irr(acknowledged);
            self.send(entry);
        }
    }

    fn send(&self, entry: Redirection) {
        // The 8259s are wired to the processor itself.
        if entry.mode() == MODE_EXTINT {
            return;
        }
        let (address, data) = entry.message();
        self.messages.send(address, data);
    }

    fn read_window(&self, state: &State) -> u32 {
        match state.select {
            IOAPICID | IOAPICARB => state.id,
            IOAPICVER => VERSION | (PINS as u32 - 1) << 16,
            index => {
                let at = usize::from(index.wrapping_sub(IOREDTBL));
                match state.table.get(at / 2) {
                    Some(entry) => (u64::from(*entry) >> (32 * (at % 2))) as u32,
                    None => 0,
                }
            }
        }
    }

    fn write_window(&self, state: &mut State, value: u32) {
        if state.select == IOAPICID {
            state.id = value & 0x0f00_0000;
            return;
        }
        let at = usize::from(state.select.wrapping_sub(IOREDTBL));
        let pin = at / 2;
        let Some(entry) = state.table.get_mut(pin) else {
            return;
        };
        let shift = 32 * (at % 2);
        let mask = (0xffff_ffff << shift) & Redirection::WRITABLE;
        let old = u64::from(*entry);
        *entry = Redirection::from(old & !mask | u64::from(value) << shift & mask);
        // Switching to edge and back is how systems without an EOI register clear it.
        if !entry.level() {
            entry.set_remote_irr(false);
        }
        self.service(state, pin);
    }
}

impl IrqSink for IoApic {
    fn set_level(&self, pin: u32, high: bool) {
        let pin = pin as usize;
        if pin >= PINS {
            return;
        }
        let mut state = self.state.lock();
        let was = state.lines & 1 << pin != 0;
        state.lines = state.lines & !(1 << pin) | u32::from(high) << pin;
        let entry = state.table[pin];
        if entry.level() {
            self.service(&mut state, pin);
        } else if high && !was && !entry.masked() {
            self.send(entry);
        }
    }
}

impl IoHandler for IoApic {
    fn widths(&self) -> Widths {
        Widths::DWORD
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let value = match offset {
            IOREGSEL => u32::from(state.select),
            IOWIN => self.read_window(&state),
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        if offset == EOIR {
            self.end_of_interrupt(bytes[0]);
            return;
        }
        let mut state = self.state.lock();
        match offset {
            IOREGSEL => state.select = bytes[0],
            IOWIN => self.write_window(&mut state, u32::from_le_bytes(bytes)),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn name(&self) -> String {
        "ioapic".into()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut state = self.state.lock();
        state.id = 0;
        state.select = 0;
        state.table = [Redirection::RESET; PINS];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Recorder, smoke};

    fn apic() -> (Arc<IoApic>, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (IoApic::new(recorder.clone()), recorder)
    }

    fn set(apic: &IoApic, pin: u8, value: u64) {
        for half in 0..2 {
            apic.write(IOREGSEL, &[IOREDTBL + 2 * pin + (1 - half), 0, 0, 0]);
            let part = (value >> (32 * (1 - half))) as u32;
            apic.write(IOWIN, &part.to_le_bytes());
        }
    }

    fn get(apic: &IoApic, index: u8) -> u32 {
        apic.write(IOREGSEL, &[index, 0, 0, 0]);
        let mut data = [0; 4];
        apic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_version_says_24_inputs_with_an_eoi_register() {
        assert_eq!(get(&apic().0, IOAPICVER), 0x0017_0020);
        assert_eq!(get(&apic().0, IOREDTBL), 0x0001_0000);
    }

    #[test]
    fn edges_send_once_and_not_while_masked() {
        let (apic, sent) = apic();
        apic.set_level(4, true);
        apic.set_level(4, false);
        set(&apic, 4, 0x0100_0000_0000_0031);
        assert!(sent.messages.lock().is_empty());
        apic.set_level(4, true);
        apic.set_level(4, true);
        assert_eq!(*sent.messages.lock(), [(0xfee0_1000, 0x31)]);
    }

    #[test]
    fn levels_send_again_after_the_end_of_interrupt_while_asserted() {
        let (apic, sent) = apic();
        set(&apic, 16, 0x0300_0000_0000_a859);
        apic.set_level(16, true);
        assert_eq!(*sent.messages.lock(), [(0xfee0_3004, 0xc059)]);
        assert_eq!(get(&apic, IOREDTBL + 32) >> 14 & 1, 1);
        apic.set_level(16, false);
        apic.set_level(16, true);
        assert_eq!(sent.messages.lock().len(), 1);
        apic.end_of_interrupt(0x58);
        assert_eq!(sent.messages.lock().len(), 1);
        apic.end_of_interrupt(0x59);
        assert_eq!(sent.messages.lock().len(), 2);
        apic.set_level(16, false);
        apic.write(EOIR, &[0x59, 0, 0, 0]);
        assert_eq!(sent.messages.lock().len(), 2);
        assert_eq!(get(&apic, IOREDTBL + 32) >> 14 & 1, 0);
    }

    #[test]
    fn unmasking_an_asserted_level_sends() {
        let (apic, sent) = apic();
        apic.set_level(20, true);
        set(&apic, 20, 0x1_8040);
        assert!(sent.messages.lock().is_empty());
        set(&apic, 20, 0x8040);
        assert_eq!(sent.messages.lock().len(), 1);
    }

    #[test]
    fn any_traffic_is_survived_and_reset_undoes_it() {
        let (apic, _) = apic();
        smoke(&*apic, 0x48, &[4], 20_000);
        apic.reset(ResetKind::Cold);
        for pin in 0..PINS as u8 {
            assert_eq!(get(&apic, IOREDTBL + 2 * pin), 0x1_0000);
            assert_eq!(get(&apic, IOREDTBL + 2 * pin + 1), 0);
        }
        assert_eq!(get(&apic, IOAPICID), 0);
    }
}
