//! The PC's interrupt wires: which input of which controller a wire ends in.

use std::sync::Arc;

use device_model::{IrqLine, IrqPin, IrqSink};

use crate::ioapic::{self, IoApic};
use crate::pic::{Pic, spec::CASCADE};

/// ISA interrupts.
pub const ISA_IRQS: usize = 16;
/// The I/O APIC's input for ISA interrupt 0, the timer; the others have the input of their own number.
pub const TIMER_PIN: usize = 2;

/// The pins of a PC's interrupt controllers. All lines to a pin must be made from the one here.
pub struct InterruptPins {
    /// Global system interrupts: the I/O APIC's inputs 0 to 23.
    pub gsi: Vec<IrqPin>,
    /// ISA interrupts 0 to 15: each drives the 8259s and the I/O APIC. Number 2, which is the cascade, ends nowhere.
    pub isa: Vec<IrqPin>,
}

impl InterruptPins {
    /// Wires both controllers up as PCs do.
    pub fn new(pic: &Arc<Pic>, apic: &Arc<IoApic>) -> Self {
        let gsi: Vec<IrqPin> = (0..ioapic::PINS as u32)
            .map(|n| IrqPin::new(apic.clone(), n))
            .collect();
        let ends = (0..ISA_IRQS)
            .map(|irq| {
                if irq == usize::from(CASCADE) {
                    return Vec::new();
                }
                let input = if irq == 0 { TIMER_PIN } else { irq };
                let legacy = IrqPin::new(pic.clone(), irq as u32);
                vec![legacy.line(), gsi[input].line()]
            })
            .collect();
        let fan_out = Arc::new(FanOut { ends });
        let isa = (0..ISA_IRQS as u32)
            .map(|n| IrqPin::new(fan_out.clone(), n))
            .collect();
        Self { gsi, isa }
    }
}

/// Drives several lines from each input.
struct FanOut {
    ends: Vec<Vec<IrqLine>>,
}

impl IrqSink for FanOut {
    fn set_level(&self, pin: u32, high: bool) {
        for line in self.ends.get(pin as usize).into_iter().flatten() {
            line.set(high);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, Recorder};

    #[test]
    fn the_timer_reaches_both_controllers() {
        let output = Line::new();
        let pic = Pic::new(output.line());
        let apic = IoApic::new(Arc::new(Recorder::default()));
        let pins = InterruptPins::new(&pic, &apic);
        let timer = pins.isa[0].line();
        timer.set(true);
        assert!(pins.gsi[TIMER_PIN].is_high());
        assert!(output.is_high());
        let cascade = pins.isa[2].line();
        timer.set(false);
        cascade.set(true);
        assert!(!pins.gsi[TIMER_PIN].is_high());
    }
}
