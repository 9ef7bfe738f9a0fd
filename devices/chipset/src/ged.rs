//! Power management without the PC's fixed hardware: the generic event device (ACPI 6.5, section 5.6.9) and the sleep and reset
//! registers of hardware-reduced ACPI (sections 4.8.3.6 to 4.8.3.8).

use std::sync::Arc;

use device_model::{
    Device, IoBus, IoError, IoHandler, IoRegion, IrqLine, PowerControl, PowerEvent, ResetCause,
    ResetKind, ShutdownCause, Widths,
};
use parking_lot::Mutex;

/// Registers and bits.
pub mod spec {
    /// The event selector: four bytes that tell, and forget when read, what has happened.
    pub const EVENT_SELECTOR: u64 = 0;
    /// The power button has been pressed.
    pub const EVENT_POWER_BUTTON: u32 = 1 << 1;
    /// The sleep control register, one byte.
    pub const SLEEP_CONTROL: u64 = 0x10;
    /// `SLP_EN`.
    pub const SLEEP_ENABLE: u8 = 1 << 5;
    /// Where `SLP_TYP`'s three bits are.
    pub const SLEEP_TYPE_SHIFT: u8 = 2;
    /// What `_S5` names as the type of soft-off.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// The sleep status register, one byte.
    pub const SLEEP_STATUS: u64 = 0x11;
    /// The reset register, one byte.
    pub const RESET: u64 = 0x12;
    /// What resets the machine when it is written there.
    pub const RESET_VALUE: u8 = 0x42;
    /// Bytes of registers.
    pub const SIZE: u64 = 0x20;
}
use spec::*;

/// The generic event device with the power registers beside it.
pub struct GenericEvents {
    power: Arc<dyn PowerControl>,
    interrupt: IrqLine,
    /// What has happened since the selector was read.
    events: Mutex<u32>,
}

impl GenericEvents {
    /// A device that signals `interrupt`, a level that falls as the selector is read.
    pub fn new(interrupt: IrqLine, power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self {
            power,
            interrupt,
            events: Mutex::new(0),
        })
    }

    /// Claims [`SIZE`] bytes of memory space.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, memory: &IoBus, base: u64) -> Result<IoRegion, IoError> {
        memory.add(base, SIZE, "generic events", self.clone())
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        let mut events = self.events.lock();
        *events |= EVENT_POWER_BUTTON;
        self.interrupt.set(true);
    }

    fn take_events(&self) -> u32 {
        let mut events = self.events.lock();
        self.interrupt.set(false);
        std::mem::take(&mut events)
    }

    fn sleep(&self, value: u8) {
        let kind = value >> SLEEP_TYPE_SHIFT & 7;
        if value & SLEEP_ENABLE != 0 && kind == SLEEP_TYPE_S5 {
            self.power
                .request(PowerEvent::Shutdown(ShutdownCause::Acpi));
        }
    }
}

impl IoHandler for GenericEvents {
    fn widths(&self) -> Widths {
        Widths::ANY
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == EVENT_SELECTOR && data.len() == 4 {
            data.copy_from_slice(&self.take_events().to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, [value]) => self.sleep(*value),
            (RESET, [RESET_VALUE]) => self.power.request(PowerEvent::Reset(ResetCause::Platform)),
            _ => {}
        }
    }
}

impl Device for GenericEvents {
    fn name(&self) -> String {
        "generic-events".into()
    }

    fn reset(&self, _kind: ResetKind) {
        self.take_events();
    }
}

#[cfg(test)]
mod tests {
    use device_model::{IrqPin, IrqSink};

    use super::*;

    #[derive(Default)]
    struct Ends {
        levels: Mutex<Vec<bool>>,
        asked: Mutex<Vec<PowerEvent>>,
    }
    impl IrqSink for Ends {
        fn set_level(&self, _: u32, high: bool) {
            self.levels.lock().push(high);
        }
    }
    impl PowerControl for Ends {
        fn request(&self, event: PowerEvent) {
            self.asked.lock().push(event);
        }
    }

    #[test]
    fn the_button_raises_the_line_until_the_selector_is_read() {
        let ends = Arc::new(Ends::default());
        let device = GenericEvents::new(IrqPin::new(ends.clone(), 0).line(), ends.clone());
        device.press_power_button();
        let mut selector = [0; 4];
        device.read(EVENT_SELECTOR, &mut selector);
        assert_eq!(u32::from_le_bytes(selector), EVENT_POWER_BUTTON);
        device.read(EVENT_SELECTOR, &mut selector);
        assert_eq!(u32::from_le_bytes(selector), 0);
        assert_eq!(*ends.levels.lock(), [true, false]);
    }

    #[test]
    fn only_the_right_values_sleep_and_reset() {
        let ends = Arc::new(Ends::default());
        let device = GenericEvents::new(IrqPin::new(ends.clone(), 0).line(), ends.clone());
        device.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT]);
        device.write(SLEEP_CONTROL, &[SLEEP_ENABLE]);
        device.write(RESET, &[1]);
        device.write(RESET, &[RESET_VALUE, 0]);
        assert!(ends.asked.lock().is_empty());
        device.write(
            SLEEP_CONTROL,
            &[SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE],
        );
        device.write(RESET, &[RESET_VALUE]);
        assert_eq!(
            *ends.asked.lock(),
            [
                PowerEvent::Shutdown(ShutdownCause::Acpi),
                PowerEvent::Reset(ResetCause::Platform)
            ]
        );
    }
}
