//! The local APIC from its processor's side: its page and MSRs, interrupt acceptance, end of interrupt, CR8, and the
//! timer.

use crate::apic::spec::{BASE_ADDRESS, BASE_ENABLED, BASE_X2APIC};
use crate::apic::{ApicMode, ApicWrite};
use crate::cpu::Cpu;

impl Cpu {
    /// True when the physical address lies in the local APIC's page and it is there.
    pub(crate) fn apic_claims(&self, physical: u64) -> bool {
        let base = self.apic.base();
        (physical ^ base) & BASE_ADDRESS == 0 && base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED
    }

    /// A read of the page, of any size. Registers are 32 bits wide at multiples of 16; the parts of other accesses that touch
    /// none read as zero.
    pub(crate) fn apic_mmio_read(&mut self, physical: u64, to: &mut [u8]) {
        self.settle_deferred_eoi();
        for (i, byte) in to.iter_mut().enumerate() {
            let at = (physical as usize + i) as u16 & 0xfff;
            if i == 0 || at & 3 == 0 {
                let value = self.apic.read_page(at & !3);
                self.system.apic_word = value.to_le_bytes();
            }
            *byte = self.system.apic_word[usize::from(at & 3)];
        }
    }

    /// A write to the page: one of four aligned bytes changes a register; the manual leaves others undefined, and they are
    /// ignored.
    pub(crate) fn apic_mmio_write(&mut self, physical: u64, from: &[u8]) {
        if physical & 3 != 0 || from.len() < 4 {
            return;
        }
        self.settle_deferred_eoi();
        let value = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
        let effect = self.apic.write_page(physical as u16 & 0xfff, value);
        self.after_apic_write(effect);
    }

    /// Does what a write to a register of the local APIC asks for.
    pub(super) fn after_apic_write(&mut self, effect: ApicWrite) {
        if let Some(vector) = effect.end_of_interrupt {
            self.outside(|io| io.end_of_interrupt(vector));
        }
    }

    /// Writes IA32_APIC_BASE; `None` is #GP.
    pub(super) fn set_apic_base(&mut self, value: u64) -> Option<()> {
        if value >> crate::mmu::PHYSICAL_BITS != 0 {
            return None;
        }
        self.apic.set_base(value).ok()?;
        // The page may have moved from or to where memory is.
        self.tlb.flush_all();
        self.leave_block = true;
        Some(())
    }

    /// The APIC's timer has expired ([`crate::apic::Event::TIMER`]).
    pub(crate) fn apic_timer(&mut self) {
        let now = self.machine.clock.now();
        let deadline = self.apic.deadline();
        let at = if deadline == 0 {
            now
        } else {
            self.time_of_tsc(deadline)
        };
        self.apic.timer_fired(|_| at);
    }

    /// Takes the vector of the interrupt that waits, if any: from the 8259 or from the local APIC, which then has it in
    /// service.
    pub(crate) fn take_interrupt(&mut self) -> Option<u8> {
        self.settle_deferred_eoi();
        if self.apic.has_extint() {
            let vector = self.outside(|io| io.acknowledge_extint());
            if vector.is_some() {
                return vector;
            }
        }
        let vector = self.apic.accept()?;
        self.defer_eoi();
        Some(vector)
    }

    /// CPUID.1:EDX.APIC follows IA32_APIC_BASE.
    pub(super) fn apic_enabled(&self) -> bool {
        self.apic.mode() != ApicMode::Disabled
    }
}
