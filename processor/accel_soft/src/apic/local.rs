//! The registers of one local APIC, owned by its vCPU's thread.

use std::sync::Arc;

use guest_clock::GuestClock;
use x86_defs::state::LAPIC_SIZE;

use super::bus::{ApicBus, Message};
use super::mailbox::{ApicMode, Event, Mailbox};
use super::spec::{self, DeliveryMode, offset};
use super::timer::ApicTimer;

/// What a register write asks of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub struct ApicWrite {
    /// Tell the I/O APICs that a level-triggered interrupt of this vector has ended.
    pub end_of_interrupt: Option<u8>,
}

/// An MSR access that raises #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrFault;

const LVTS: [u16; 7] = [
    offset::LVT_CMCI,
    offset::LVT_TIMER,
    offset::LVT_THERMAL,
    offset::LVT_PERFORMANCE,
    offset::LVT_LINT0,
    offset::LVT_LINT1,
    offset::LVT_ERROR,
];
const TIMER: usize = 1;
const LINT0: usize = 4;
const LINT1: usize = 5;
const ERROR: usize = 6;

/// The bits of each LVT that software may write.
const LVT_WRITABLE: [u32; 7] = [
    0x1_07ff, 0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff,
];

/// A local APIC.
pub struct LocalApic {
    // Configuration.
    mailbox: Arc<Mailbox>,
    bus: Arc<ApicBus>,
    // Volatile guest state (the request and trigger registers are in the mailbox).
    base: u64,
    tpr: u8,
    isr: [u32; 8],
    ldr: u32,
    dfr: u32,
    svr: u32,
    esr: u32,
    esr_pending: u32,
    icr: u64,
    lvt: [u32; 7],
    timer: ApicTimer,
}

impl LocalApic {
    /// A local APIC as after reset; it attaches itself to nothing: its mailbox is on `bus` by the caller's doing.
    pub fn new(mailbox: Arc<Mailbox>, bus: Arc<ApicBus>, clock: GuestClock) -> Self {
        let fired = mailbox.clone();
        let timer = ApicTimer::new(clock, move || fired.raise(Event::TIMER));
        let mut apic = Self {
            mailbox,
            bus,
            base: 0,
            tpr: 0,
            isr: [0; 8],
            ldr: 0,
            dfr: 0,
            svr: 0,
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [0; 7],
            timer,
        };
        apic.reset();
        apic
    }

    /// The side that other threads see.
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The bus that it is on.
    pub fn bus(&self) -> &Arc<ApicBus> {
        &self.bus
    }

    /// Power-up reset.
    pub fn reset(&mut self) {
        self.base = spec::DEFAULT_BASE | spec::BASE_ENABLED;
        if self.mailbox.apic_id() == 0 {
            self.base |= spec::BASE_BSP;
        }
        self.init();
        // A hypervisor's firmware-less machines expect the 8259 to reach the bootstrap processor (virtual wire mode).
        if self.mailbox.apic_id() == 0 {
            self.lvt[LINT0] = 0x700;
        }
    }

    /// INIT: all registers but the base address (SDM volume 3, section 12.4.7.3).
    pub fn init(&mut self) {
        self.tpr = 0;
        self.isr = [0; 8];
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.esr = 0;
        self.esr_pending = 0;
        self.icr = 0;
        self.lvt = [spec::LVT_MASKED; 7];
        self.timer.reset();
        (0..8).for_each(|i| self.mailbox.set_words(i, 0, 0));
        self.ldr = self.derived_ldr();
        self.sync();
    }

    /// The logical ID: fixed by the APIC ID in x2APIC mode, zero after reset else.
    fn derived_ldr(&self) -> u32 {
        let id = self.mailbox.apic_id();
        match self.mode() {
            ApicMode::X2apic => id >> 4 << 16 | 1 << (id & 15),
            _ => 0,
        }
    }

    fn sync(&mut self) {
        self.mailbox.set_addressing(
            self.mode(),
            self.svr & spec::SVR_ENABLED != 0,
            self.ldr,
            self.dfr >> 28 == 0xf,
        );
        self.mailbox.set_priority(self.ppr());
        self.mailbox.raise(Event::INTERRUPT);
    }

    /// The mode that IA32_APIC_BASE selects.
    pub fn mode(&self) -> ApicMode {
        if self.base & spec::BASE_ENABLED == 0 {
            ApicMode::Disabled
        } else if self.base & spec::BASE_X2APIC != 0 {
            ApicMode::X2apic
        } else {
            ApicMode::Xapic
        }
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE.
    ///
    /// # Errors
    /// #GP for reserved bits and for the mode changes that SDM volume 3, section 12.12.5 forbids.
    pub fn set_base(&mut self, value: u64) -> Result<(), MsrFault> {
        let known = spec::BASE_ADDRESS | spec::BASE_BSP | spec::BASE_X2APIC | spec::BASE_ENABLED;
        let mode = |v: u64| v & (spec::BASE_ENABLED | spec::BASE_X2APIC);
        let (old, new) = (mode(self.base), mode(value));
        const X2: u64 = spec::BASE_ENABLED | spec::BASE_X2APIC;
        let forbidden = value & !known != 0
            || new == spec::BASE_X2APIC
            || (old == X2 && new == spec::BASE_ENABLED)
            || (old == 0 && new == X2);
        if forbidden {
            return Err(MsrFault);
        }
        self.base = value;
        if old != new {
            if new == 0 {
                self.init();
            } else if new == X2 {
                self.ldr = self.derived_ldr();
                self.icr &= 0xffff_ffff;
            } else {
                self.ldr = 0;
                self.dfr = u32::MAX;
            }
        }
        self.sync();
        Ok(())
    }

    // ---- Priorities and interrupts ----

    fn highest_in_service(&self) -> Option<u8> {
        (0..8usize).rev().find_map(|i| {
            let word = self.isr[i];
            (word != 0).then(|| (i as u32 * 32 + 31 - word.leading_zeros()) as u8)
        })
    }

    /// The processor priority (SDM volume 3, section 12.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.highest_in_service().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service {
            self.tpr
        } else {
            in_service
        }
    }

    /// CR8: the task priority class.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// Writes CR8 (the caller has checked the reserved bits).
    pub fn set_cr8(&mut self, value: u64) {
        self.set_tpr((value as u8) << 4);
    }

    fn set_tpr(&mut self, value: u8) {
        let lowered = value < self.tpr;
        self.tpr = value;
        self.mailbox.set_priority(self.ppr());
        if lowered {
            self.mailbox.raise(Event::INTERRUPT);
        }
    }

    /// The 8259's output reaches the processor: LINT0 is unmasked and in ExtINT mode, or the APIC is disabled and the pins
    /// are the processor's own.
    pub fn takes_extint(&self) -> bool {
        if self.mode() == ApicMode::Disabled {
            return self.mailbox.apic_id() == 0;
        }
        let lint0 = self.lvt[LINT0];
        self.mailbox.apic_id() == 0
            && lint0 & spec::LVT_MASKED == 0
            && DeliveryMode::from_bits(lint0) == DeliveryMode::ExtInt
    }

    /// An interrupt from the 8259 waits.
    pub fn has_extint(&self) -> bool {
        self.mailbox.extint() && self.takes_extint()
    }

    /// The vector that the APIC would interrupt with now.
    pub fn pending(&self) -> Option<u8> {
        if self.svr & spec::SVR_ENABLED == 0 || self.mode() == ApicMode::Disabled {
            return None;
        }
        let vector = self.mailbox.highest_request()?;
        (vector & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// Takes the pending interrupt into service.
    pub fn accept(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.mailbox.accept(vector);
        self.isr[usize::from(vector / 32)] |= 1 << (vector % 32);
        self.mailbox.set_priority(self.ppr());
        Some(vector)
    }

    /// Ends the interrupt of highest priority in service, as a write to EOI does. Returns the vector when the I/O APICs must
    /// hear of it.
    pub fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.highest_in_service()?;
        self.isr[usize::from(vector / 32)] &= !(1 << (vector % 32));
        self.mailbox.set_priority(self.ppr());
        if self.mailbox.highest_request().is_some() {
            self.mailbox.raise(Event::INTERRUPT);
        }
        let broadcast = self.mailbox.is_level(vector) && self.svr & spec::SVR_EOI_SUPPRESS == 0;
        broadcast.then_some(vector)
    }

    /// True when the end of the interrupt in service may be noted by the guest in memory instead of by an EOI (KVM's PV
    /// EOI): it is edge-triggered, and nothing of lower priority waits for it.
    pub fn may_defer_eoi(&self) -> bool {
        self.highest_in_service()
            .is_some_and(|v| !self.mailbox.is_level(v))
            && self.mailbox.highest_request().is_none()
    }

    /// The guest-clock timer has fired ([`Event::TIMER`]). `deadline_at` gives the guest time of a TSC value.
    pub fn timer_fired(&mut self, deadline_at: impl Fn(u64) -> u64) {
        if self.timer.fired(self.lvt[TIMER], deadline_at) {
            self.local_interrupt(TIMER);
        }
    }

    /// A performance-counter, thermal or other local source has fired.
    fn local_interrupt(&mut self, entry: usize) {
        let lvt = self.lvt[entry];
        if lvt & spec::LVT_MASKED != 0 || self.mode() == ApicMode::Disabled {
            return;
        }
        match DeliveryMode::from_bits(lvt) {
            DeliveryMode::Fixed => self.request(lvt as u8),
            DeliveryMode::Nmi => self.mailbox.raise(Event::NMI),
            DeliveryMode::Init => self.mailbox.raise(Event::INIT),
            DeliveryMode::ExtInt => self.mailbox.raise(Event::INTERRUPT),
            _ => {}
        }
    }

    fn request(&mut self, vector: u8) {
        if vector < 16 {
            self.error(spec::ESR_RECEIVE_ILLEGAL);
        } else {
            self.mailbox.request(vector, false);
        }
    }

    /// An NMI from the machine (its LINT1 pin). True when it reaches the processor.
    pub fn nmi_pin(&self) -> bool {
        self.mode() == ApicMode::Disabled
            || (self.lvt[LINT1] & spec::LVT_MASKED == 0
                && DeliveryMode::from_bits(self.lvt[LINT1]) == DeliveryMode::Nmi)
    }

    fn error(&mut self, bits: u32) {
        let new = self.esr_pending & bits != bits;
        self.esr_pending |= bits;
        let vector = self.lvt[ERROR] as u8;
        // An illegal error vector must not report itself for ever.
        if new && vector >= 16 {
            self.local_interrupt(ERROR);
        }
    }

    // ---- Interprocessor interrupts ----

    fn send_ipi(&mut self, low: u32, destination: u32, wide: bool) {
        let message = Message::from_icr(low, destination, wide);
        let fixed = matches!(
            message.mode,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority
        );
        if fixed && message.vector < 16 {
            self.error(spec::ESR_SEND_ILLEGAL);
            return;
        }
        // The de-assert half of an INIT only loads arbitration IDs, which nobody has any more.
        if message.mode == DeliveryMode::Init
            && low & (spec::ICR_LEVEL | spec::ICR_ASSERT) == spec::ICR_LEVEL
        {
            return;
        }
        let own = self.mailbox.apic_id();
        match low >> 18 & 3 {
            0 => {
                self.bus.send(message);
            }
            1 if fixed => self.request(message.vector),
            1 => {}
            2 => {
                self.bus.broadcast(message, None);
            }
            _ => {
                self.bus.broadcast(message, Some(own));
            }
        }
    }

    // ---- Registers ----

    fn lvt_index(register: u16) -> Option<usize> {
        LVTS.iter().position(|r| *r == register)
    }

    fn set_lvt(&mut self, index: usize, value: u32) {
        let kept = self.lvt[index] & (spec::LVT_PENDING | spec::LVT_REMOTE_IRR);
        let old = self.lvt[index];
        let mut new = value & LVT_WRITABLE[index] | kept;
        if self.svr & spec::SVR_ENABLED == 0 {
            new |= spec::LVT_MASKED;
        }
        self.lvt[index] = new;
        match index {
            TIMER => self.timer.mode_changed(old, new),
            LINT0 => self.mailbox.raise(Event::INTERRUPT),
            _ => {}
        }
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value & (0x1ff | spec::SVR_EOI_SUPPRESS);
        if self.svr & spec::SVR_ENABLED == 0 {
            self.lvt.iter_mut().for_each(|l| *l |= spec::LVT_MASKED);
        }
        self.sync();
    }

    /// A register that both modes have, or `None`.
    fn read(&self, register: u16) -> Option<u32> {
        let bank = usize::from(register >> 4 & 7);
        Some(match register {
            offset::ID => match self.mode() {
                ApicMode::X2apic => self.mailbox.apic_id(),
                _ => self.mailbox.apic_id() << 24,
            },
            offset::VERSION => spec::VERSION,
            offset::TPR => u32::from(self.tpr),
            offset::PPR | offset::APR => u32::from(self.ppr()),
            offset::LDR => self.ldr,
            offset::SVR => self.svr,
            0x100..=0x170 => self.isr[bank],
            0x180..=0x1f0 => self.mailbox.tmr_word(bank),
            0x200..=0x270 => self.mailbox.irr_word(bank),
            offset::ESR => self.esr,
            offset::ICR_LOW => self.icr as u32,
            offset::TIMER_INITIAL => self.timer.initial(),
            offset::TIMER_CURRENT => self.timer.current(self.lvt[TIMER]),
            offset::TIMER_DIVIDE => self.timer.divide(),
            _ => self.lvt[Self::lvt_index(register)?],
        })
    }

    /// Writes a register that both modes have; false when there is none.
    fn write(&mut self, register: u16, value: u32, effect: &mut ApicWrite) -> bool {
        match register {
            offset::TPR => self.set_tpr(value as u8),
            offset::EOI => effect.end_of_interrupt = self.end_of_interrupt(),
            offset::SVR => self.set_svr(value),
            offset::ESR => {
                self.esr = std::mem::take(&mut self.esr_pending);
            }
            offset::TIMER_INITIAL => self.timer.set_initial(value, self.lvt[TIMER]),
            offset::TIMER_DIVIDE => self.timer.set_divide(value, self.lvt[TIMER]),
            _ => match Self::lvt_index(register) {
                Some(index) => self.set_lvt(index, value),
                None => return false,
            },
        }
        true
    }

    /// Reads a 32-bit register at an offset of the xAPIC page.
    pub fn read_page(&mut self, at: u16) -> u32 {
        let register = at & 0xff0;
        if at & 0xf != 0 {
            return 0;
        }
        match register {
            offset::DFR => self.dfr,
            offset::ICR_HIGH => (self.icr >> 32) as u32,
            offset::RRD => 0,
            _ => self.read(register).unwrap_or_else(|| {
                self.error(spec::ESR_ILLEGAL_REGISTER);
                0
            }),
        }
    }

    /// Writes a 32-bit register at an offset of the xAPIC page.
    pub fn write_page(&mut self, at: u16, value: u32) -> ApicWrite {
        let mut effect = ApicWrite::default();
        if at & 0xf != 0 {
            return effect;
        }
        match at & 0xff0 {
            offset::ID => {}
            offset::LDR => {
                self.ldr = value & 0xff00_0000;
                self.sync();
            }
            offset::DFR => {
                self.dfr = value | 0x0fff_ffff;
                self.sync();
            }
            offset::ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            offset::ICR_LOW => {
                let low = value & spec::ICR_WRITABLE;
                self.icr = self.icr >> 32 << 32 | u64::from(low);
                self.send_ipi(low, (self.icr >> 56) as u32, false);
            }
            register => {
                if !self.write(register, value, &mut effect) {
                    self.error(spec::ESR_ILLEGAL_REGISTER);
                }
            }
        }
        effect
    }

    /// Reads an x2APIC MSR (0x800 to 0x8ff).
    ///
    /// # Errors
    /// #GP when the mode is another or the register is not there or not readable.
    pub fn read_msr(&self, msr: u32) -> Result<u64, MsrFault> {
        if self.mode() != ApicMode::X2apic || msr > 0x83f {
            return Err(MsrFault);
        }
        match ((msr & 0xff) << 4) as u16 {
            offset::ICR_LOW => Ok(self.icr),
            offset::APR => Err(MsrFault),
            register => self.read(register).map(u64::from).ok_or(MsrFault),
        }
    }

    /// Writes an x2APIC MSR.
    ///
    /// # Errors
    /// #GP as for reads, and for reserved bits.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<ApicWrite, MsrFault> {
        if self.mode() != ApicMode::X2apic || msr > 0x83f {
            return Err(MsrFault);
        }
        let register = ((msr & 0xff) << 4) as u16;
        let low = value as u32;
        let allowed: u64 = match register {
            offset::ICR_LOW => 0xffff_ffff_0000_0000 | u64::from(spec::ICR_WRITABLE),
            offset::EOI | offset::ESR => 0,
            offset::TPR | offset::SELF_IPI => 0xff,
            offset::SVR => 0x11ff,
            offset::TIMER_INITIAL => 0xffff_ffff,
            offset::TIMER_DIVIDE => 0xb,
            _ => Self::lvt_index(register).map_or(0, |i| {
                u64::from(LVT_WRITABLE[i] | spec::LVT_PENDING | spec::LVT_REMOTE_IRR)
            }),
        };
        if value & !allowed != 0 {
            return Err(MsrFault);
        }
        let mut effect = ApicWrite::default();
        match register {
            offset::ICR_LOW => {
                self.icr = value;
                self.send_ipi(low, (value >> 32) as u32, true);
            }
            offset::SELF_IPI => self.request(low as u8),
            _ if self.write(register, low, &mut effect) => {}
            _ => return Err(MsrFault),
        }
        Ok(effect)
    }

    /// IA32_TSC_DEADLINE.
    pub fn deadline(&self) -> u64 {
        self.timer.deadline()
    }

    /// Writes IA32_TSC_DEADLINE; `at` is the guest time in nanoseconds at which the TSC has that value.
    pub fn set_deadline(&mut self, value: u64, at: u64) {
        self.timer.set_deadline(value, at, self.lvt[TIMER]);
    }

    // ---- Saved state ----

    /// The registers as a page, each at its xAPIC offset.
    pub fn save(&self) -> Vec<u8> {
        let mut page = vec![0; LAPIC_SIZE];
        let mut put = |at: u16, value: u32| {
            page[usize::from(at)..usize::from(at) + 4].copy_from_slice(&value.to_le_bytes());
        };
        for at in (0..0x400u16).step_by(16) {
            if let Some(value) = self.read(at) {
                put(at, value);
            }
        }
        put(offset::DFR, self.dfr);
        put(offset::ICR_HIGH, (self.icr >> 32) as u32);
        page
    }

    /// Takes over registers saved by [`Self::save`]. `base` is IA32_APIC_BASE, `deadline` IA32_TSC_DEADLINE and the guest
    /// time that it stands for.
    ///
    /// # Errors
    /// What is wrong with the state.
    pub fn restore(&mut self, page: &[u8], base: u64, deadline: (u64, u64)) -> Result<(), String> {
        if page.len() < LAPIC_SIZE {
            return Err(format!(
                "{} bytes of local APIC state where {LAPIC_SIZE} were expected",
                page.len()
            ));
        }
        let get = |at: u16| {
            let at = usize::from(at);
            u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
        };
        let known = spec::BASE_ADDRESS | spec::BASE_BSP | spec::BASE_X2APIC | spec::BASE_ENABLED;
        let mode = base & (spec::BASE_ENABLED | spec::BASE_X2APIC);
        if base & !known != 0 || mode == spec::BASE_X2APIC {
            return Err(format!("local APIC base {base:#x} has reserved bits set"));
        }
        self.base = base;
        self.tpr = get(offset::TPR) as u8;
        self.svr = get(offset::SVR) & (0x1ff | spec::SVR_EOI_SUPPRESS);
        self.ldr = match self.mode() {
            ApicMode::X2apic => self.derived_ldr(),
            _ => get(offset::LDR) & 0xff00_0000,
        };
        self.dfr = get(offset::DFR) | 0x0fff_ffff;
        self.esr = get(offset::ESR);
        self.esr_pending = 0;
        self.icr = u64::from(get(offset::ICR_HIGH)) << 32 | u64::from(get(offset::ICR_LOW));
        for (index, at) in LVTS.into_iter().enumerate() {
            self.lvt[index] = get(at) & (LVT_WRITABLE[index] | spec::LVT_REMOTE_IRR);
        }
        for i in 0..8u16 {
            self.isr[usize::from(i)] = get(offset::ISR + i * 16);
            self.mailbox.set_words(
                usize::from(i),
                get(offset::IRR + i * 16),
                get(offset::TMR + i * 16),
            );
        }
        self.timer.restore(
            self.lvt[TIMER],
            get(offset::TIMER_INITIAL),
            get(offset::TIMER_DIVIDE),
            get(offset::TIMER_CURRENT),
            deadline,
        );
        self.sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apics(n: u32) -> (Vec<LocalApic>, GuestClock) {
        let clock = GuestClock::new();
        let bus = Arc::new(ApicBus::new());
        let all = (0..n)
            .map(|id| {
                let mailbox = Arc::new(Mailbox::new(id));
                assert!(bus.attach(mailbox.clone()));
                let mut apic = LocalApic::new(mailbox, bus.clone(), clock.clone());
                let _ = apic.write_page(offset::SVR, 0x1ff);
                apic
            })
            .collect();
        (all, clock)
    }

    #[test]
    fn reset_values_are_the_manuals() {
        let (_, clock) = apics(1);
        let bus = Arc::new(ApicBus::new());
        let mut a = LocalApic::new(Arc::new(Mailbox::new(3)), bus, clock);
        assert_eq!(a.base(), 0xfee0_0800);
        assert_eq!(a.read_page(offset::ID), 3 << 24);
        assert_eq!(a.read_page(offset::VERSION) & 0xff, 0x14);
        assert_eq!(a.read_page(offset::DFR), u32::MAX);
        assert_eq!(a.read_page(offset::SVR), 0xff);
        for lvt in LVTS {
            assert_eq!(a.read_page(lvt), spec::LVT_MASKED);
        }
        // While disabled by software the mask bits can't be cleared and nothing fixed is accepted.
        let _ = a.write_page(offset::LVT_TIMER, 0x40);
        assert_eq!(a.read_page(offset::LVT_TIMER), spec::LVT_MASKED | 0x40);
        a.mailbox().request(0x50, false);
        assert_eq!(a.accept(), None);
    }

    #[test]
    fn priority_rules() {
        let (mut all, _) = apics(1);
        let a = &mut all[0];
        a.mailbox().request(0x31, false);
        a.mailbox().request(0x38, false);
        a.mailbox().request(0x52, false);
        assert_eq!(a.accept(), Some(0x52));
        assert_eq!(a.ppr(), 0x50);
        // Lower and same classes wait.
        a.mailbox().request(0x5f, false);
        assert_eq!(a.accept(), None);
        a.mailbox().request(0x60, false);
        assert_eq!(a.accept(), Some(0x60));
        assert_eq!(a.end_of_interrupt(), None);
        assert_eq!(a.accept(), None);
        assert_eq!(a.end_of_interrupt(), None);
        assert_eq!(a.accept(), Some(0x5f));
        let _ = a.end_of_interrupt();
        a.set_cr8(3);
        assert_eq!(a.accept(), None);
        assert_eq!((a.cr8(), a.read_page(offset::PPR)), (3, 0x30));
        let _ = a.mailbox().take_events();
        a.set_cr8(2);
        assert!(a.mailbox().take_events().contains(Event::INTERRUPT));
        assert_eq!(a.accept(), Some(0x38));
        let _ = a.end_of_interrupt();
        assert_eq!(a.accept(), Some(0x31));
        let _ = a.end_of_interrupt();
        assert_eq!(a.end_of_interrupt(), None);
    }

    #[test]
    fn level_interrupts_are_broadcast_at_their_end() {
        let (mut all, _) = apics(1);
        let a = &mut all[0];
        a.mailbox().request(0x61, true);
        assert_eq!(a.accept(), Some(0x61));
        assert!(!a.may_defer_eoi());
        assert_eq!(a.write_page(offset::EOI, 0).end_of_interrupt, Some(0x61));
        let _ = a.write_page(offset::SVR, 0x11ff);
        a.mailbox().request(0x61, true);
        assert_eq!(a.accept(), Some(0x61));
        assert_eq!(a.write_page(offset::EOI, 0).end_of_interrupt, None);
        a.mailbox().request(0x61, false);
        assert_eq!(a.accept(), Some(0x61));
        assert!(a.may_defer_eoi());
    }

    #[test]
    fn interprocessor_interrupts() {
        let (mut all, _) = apics(3);
        let _ = all[0].write_page(offset::ICR_HIGH, 2 << 24);
        let _ = all[0].write_page(offset::ICR_LOW, 0x4044);
        assert_eq!(all[2].accept(), Some(0x44));
        // All but self.
        let _ = all[1].write_page(offset::ICR_LOW, 3 << 18 | 0x45);
        assert_eq!(all[0].accept(), Some(0x45));
        assert_eq!(all[1].accept(), None);
        assert_eq!(all[2].pending(), None); // same class as the one in service
        // Self.
        let _ = all[1].write_page(offset::ICR_LOW, 1 << 18 | 0x46);
        assert_eq!(all[1].accept(), Some(0x46));
        // INIT asserted, de-asserted, and a startup IPI.
        all.iter().for_each(|a| {
            a.mailbox().take_events();
        });
        let _ = all[0].write_page(offset::ICR_HIGH, 1 << 24);
        let _ = all[0].write_page(offset::ICR_LOW, 0x8500);
        assert!(!all[1].mailbox().has_events());
        let _ = all[0].write_page(offset::ICR_LOW, 0xc500);
        let _ = all[0].write_page(offset::ICR_LOW, 0x0699);
        let events = all[1].mailbox().take_events();
        assert_eq!(events, Event::INIT | Event::STARTUP);
        assert_eq!(all[1].mailbox().startup_vector(), 0x99);
    }

    #[test]
    fn errors_are_latched_and_shown_by_a_write() {
        let (mut all, _) = apics(1);
        let a = &mut all[0];
        let _ = a.write_page(offset::LVT_ERROR, 0xe1);
        let _ = a.write_page(offset::ICR_LOW, 1 << 18 | 5);
        assert_eq!(a.read_page(offset::ESR), 0);
        assert_eq!(a.accept(), Some(0xe1));
        let _ = a.write_page(offset::ESR, 0);
        assert_eq!(a.read_page(offset::ESR), spec::ESR_SEND_ILLEGAL);
        let _ = a.write_page(0x3d0, 1);
        let _ = a.write_page(offset::ESR, 0);
        assert_eq!(a.read_page(offset::ESR), spec::ESR_ILLEGAL_REGISTER);
    }

    #[test]
    fn x2apic_mode_and_its_faults() {
        let (mut all, _) = apics(2);
        let base = all[1].base();
        let a = &mut all[1];
        assert_eq!(a.read_msr(0x802), Err(MsrFault));
        assert_eq!(
            a.set_base(base & !spec::BASE_ENABLED | spec::BASE_X2APIC),
            Err(MsrFault)
        );
        assert_eq!(a.set_base(base | 1), Err(MsrFault));
        a.set_base(base | spec::BASE_X2APIC).unwrap();
        assert_eq!(a.set_base(base), Err(MsrFault));
        assert_eq!(a.read_msr(0x802), Ok(1));
        assert_eq!(a.read_msr(0x80d), Ok(2));
        assert_eq!(a.read_msr(0x80e), Err(MsrFault));
        assert_eq!(a.read_msr(0x831), Err(MsrFault));
        assert_eq!(a.write_msr(0x80b, 1), Err(MsrFault));
        assert_eq!(a.write_msr(0x808, 0x100), Err(MsrFault));
        assert_eq!(a.write_msr(0x802, 0), Err(MsrFault));
        let _ = a.write_msr(0x83f, 0x77).unwrap();
        assert_eq!(a.accept(), Some(0x77));
        let _ = a.write_msr(0x80b, 0).unwrap();
        let _ = a.write_msr(0x830, 0x55).unwrap();
        assert_eq!(all[0].accept(), Some(0x55));
        // Disabling forgets all; x2APIC can then only be entered through xAPIC mode.
        let a = &mut all[1];
        a.set_base(spec::DEFAULT_BASE).unwrap();
        assert_eq!(a.mode(), ApicMode::Disabled);
        assert_eq!(a.set_base(base | spec::BASE_X2APIC), Err(MsrFault));
        a.set_base(base).unwrap();
        assert_eq!(a.read_page(offset::SVR), 0xff);
    }

    #[test]
    fn the_timer_interrupts_and_extint_follows_lint0() {
        let (mut all, clock) = apics(1);
        let a = &mut all[0];
        let _ = a.write_page(offset::TIMER_DIVIDE, 0xb);
        let _ = a.write_page(offset::LVT_TIMER, 0x30 | spec::TIMER_TSC_DEADLINE);
        a.set_deadline(9000, 3000);
        clock.set(2999);
        a.timer_fired(|tsc| tsc / 3);
        assert_eq!(a.accept(), None);
        clock.set(3000);
        a.timer_fired(|tsc| tsc / 3);
        assert_eq!((a.accept(), a.deadline()), (Some(0x30), 0));
        a.mailbox().set_extint(true);
        let _ = a.write_page(offset::LVT_LINT0, 0x1_0700);
        assert!(!a.has_extint());
        let _ = a.write_page(offset::LVT_LINT0, 0x700);
        assert!(a.has_extint());
        a.mailbox().set_extint(false);
        assert!(!a.has_extint());
    }

    #[test]
    fn saved_registers_come_back() {
        let (mut all, clock) = apics(1);
        let a = &mut all[0];
        a.mailbox().request(0x61, true);
        a.mailbox().request(0x71, false);
        let _ = a.accept();
        let _ = a.write_page(offset::LVT_ERROR, 0xfe);
        let _ = a.write_page(offset::LVT_TIMER, 0x30);
        let _ = a.write_page(offset::TIMER_INITIAL, 1000);
        clock.set(500);
        let page = a.save();
        let (mut others, clock) = apics(1);
        clock.set(500);
        let b = &mut others[0];
        b.restore(&page, a.base(), (0, 0)).unwrap();
        assert!(b.save() == page);
        assert_eq!((b.ppr(), b.accept()), (0x70, None));
        assert!(b.restore(&page[1..], a.base(), (0, 0)).is_err());
        assert!(b.restore(&page, a.base() | 2, (0, 0)).is_err());
    }
}
