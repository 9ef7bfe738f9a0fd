//! Reset, INIT and startup; the architectural state as accelerators exchange it; permission to use ports.

use accel::AccelError;
use x86_defs::control::{Cr0, Cr4, Efer, Rflags, Xcr0};
use x86_defs::state::{
    CS, DescriptorTable, Events, LAPIC_SIZE, MpState, Registers, SS, Segment, SystemRegisters,
    VcpuState,
};

use super::control::{DR6_ONES, DR7_ONES};
use super::descriptor::UNUSABLE;
use crate::cpu::{Cpu, Exception, Result, Status, Waiting};
use crate::simd::Vectors;
use crate::x87::X87;

/// A data segment after reset.
const RESET_DATA: Segment = Segment {
    selector: 0,
    base: 0,
    limit: 0xffff,
    attributes: 0x93,
};

impl Cpu {
    /// Puts everything into the state after power-up or RESET (SDM volume 3, table 11-1), and calls `update_mode`. The
    /// time-stamp counters of all processors count from the machine's start, and so agree.
    pub(crate) fn power_up(&mut self) {
        self.system = self.system.after_reset();
        self.x87 = X87::default();
        self.vectors = Vectors::default();
        self.xcr0 = Xcr0::X87;
        self.cr0 = Cr0::CD | Cr0::NW | Cr0::ET;
        self.dr = [0; 4];
        self.apic.reset();
        self.reset_registers();
        let bootstrap = self.apic.mailbox().apic_id() == 0;
        self.waiting = if bootstrap {
            Waiting::No
        } else {
            Waiting::Init
        };
        self.nmi_pending = false;
    }

    /// INIT: as after reset but for what INIT leaves alone; an application processor then waits for a startup IPI.
    pub(crate) fn init(&mut self) {
        let bootstrap = self.apic.base() & crate::apic::spec::BASE_BSP != 0;
        self.cr0 = self.cr0 & (Cr0::CD | Cr0::NW) | Cr0::ET;
        self.apic.init();
        self.reset_registers();
        self.waiting = if bootstrap {
            Waiting::No
        } else {
            Waiting::Sipi
        };
    }

    /// What RESET and INIT do alike.
    fn reset_registers(&mut self) {
        for i in 0..16 {
            self.regs[i] = 0;
        }
        self.regs[x86_defs::state::RDX] = self
            .cpuid
            .get(&(1, u32::MAX))
            .map_or(0x600, |e| u64::from(e.eax));
        self.status = Status::default();
        self.system_flags = Rflags::FIXED.bits();
        self.rip = 0xfff0;
        self.segments = [RESET_DATA; 6];
        self.segments[CS] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            attributes: 0x9b,
        };
        self.tr = Segment {
            limit: 0xffff,
            attributes: 0x8b,
            ..Segment::default()
        };
        self.ldtr = Segment {
            limit: 0xffff,
            attributes: 0x82,
            ..Segment::default()
        };
        let table = DescriptorTable {
            base: 0,
            limit: 0xffff,
        };
        (self.gdtr, self.idtr) = (table, table);
        (self.cr2, self.cr3) = (0, 0);
        self.cr4 = Cr4::empty();
        self.efer = Efer::empty();
        self.dr6 = DR6_ONES;
        self.dr7 = DR7_ONES;
        self.cpl = 0;
        self.sti_shadow = false;
        self.mov_ss_shadow = false;
        self.nmi_masked = false;
        self.halted = false;
        self.exception = Exception::Resume;
        self.switch_address_space(false);
        self.flush_translations();
        self.update_mode();
    }

    /// Starts at the page that a startup IPI names.
    pub(crate) fn start_up(&mut self, vector: u8) {
        let cs = &mut self.segments[CS];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.rip = 0;
        self.waiting = Waiting::No;
        self.halted = false;
        self.update_mode();
    }

    /// Checks that the port may be used with the current privilege (IOPL, TSS I/O bitmap).
    ///
    /// # Errors
    /// #GP.
    pub(crate) fn check_port(&mut self, port: u16, size: u64) -> Result<()> {
        let free = !self.virtual_8086() && (!self.protected() || self.cpl <= self.iopl());
        if free {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        if self.tr.attributes & UNUSABLE != 0 || self.tr.attributes & 8 == 0 || limit < 0x67 {
            return Err(self.gp(0));
        }
        let map: u16 = self.load_system(self.system_address(self.tr.base, 0x66))?;
        let at = u64::from(map) + u64::from(port / 8);
        // Two bytes are read always, so both must be inside.
        if at + 1 > limit {
            return Err(self.gp(0));
        }
        let low: u8 = self.load_system(self.system_address(self.tr.base, at))?;
        let high: u8 = self.load_system(self.system_address(self.tr.base, at + 1))?;
        let bits = u32::from(low) | u32::from(high) << 8;
        let mask = ((1u32 << size) - 1) << (port % 8);
        if bits & mask != 0 {
            Err(self.gp(0))
        } else {
            Ok(())
        }
    }

    // ---- Saved state ----

    /// The architectural state.
    pub(crate) fn save(&self) -> VcpuState {
        let mut gpr = [0; 16];
        for (i, value) in gpr.iter_mut().enumerate() {
            *value = self.regs[i];
        }
        VcpuState {
            registers: Registers {
                gpr,
                rip: self.rip,
                rflags: self.rflags(),
            },
            system: self.save_system(),
            xsave: self.save_area(),
            msrs: self.save_msrs(),
            events: Events {
                exception: None,
                interrupt: None,
                sti_shadow: self.sti_shadow,
                mov_ss_shadow: self.mov_ss_shadow,
                nmi_pending: self.nmi_pending,
                nmi_masked: self.nmi_masked,
            },
            mp_state: match self.waiting {
                Waiting::Init => MpState::Uninitialized,
                Waiting::Sipi => MpState::WaitForSipi,
                Waiting::No if self.halted => MpState::Halted,
                Waiting::No => MpState::Runnable,
            },
            lapic: self.apic.save(),
        }
    }

    fn save_system(&self) -> SystemRegisters {
        SystemRegisters {
            segments: self.segments,
            tr: self.tr,
            ldtr: self.ldtr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0.bits(),
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4.bits(),
            cr8: self.apic.cr8(),
            efer: self.efer.bits(),
            apic_base: self.apic.base(),
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            xcr0: self.xcr0.bits(),
        }
    }

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`AccelError::BadState`]; nothing is changed then.
    pub(crate) fn restore(&mut self, state: &VcpuState) -> std::result::Result<(), AccelError> {
        check(state)?;
        let system = &state.system;
        for (i, value) in state.registers.gpr.iter().enumerate() {
            self.regs[i] = *value;
        }
        self.rip = state.registers.rip;
        self.segments = system.segments;
        self.tr = system.tr;
        self.ldtr = system.ldtr;
        self.gdtr = system.gdtr;
        self.idtr = system.idtr;
        self.cr0 = Cr0::from_bits_truncate(system.cr0) | Cr0::ET;
        self.cr2 = system.cr2;
        self.cr3 = system.cr3;
        self.cr4 = Cr4::from_bits_truncate(system.cr4);
        self.efer = Efer::from_bits_truncate(system.efer);
        self.dr = system.dr;
        self.dr6 = system.dr6 | DR6_ONES;
        self.dr7 = system.dr7 | DR7_ONES;
        self.xcr0 = Xcr0::from_bits_truncate(system.xcr0);
        self.set_rflags_without_mode(state.registers.rflags);
        self.restore_events(state);
        self.restore_area(&state.xsave)
            .map_err(AccelError::BadState)?;
        self.restore_msrs(state)?;
        // PDPTEs with reserved bits were refused when the guest loaded them; memory may have changed since.
        let _ = self.load_pdptes(self.cr0, self.cr3, self.cr4);
        self.switch_address_space(false);
        self.flush_translations();
        self.update_mode();
        Ok(())
    }

    fn restore_events(&mut self, state: &VcpuState) {
        let virtual_8086 = state.registers.rflags & Rflags::VM.bits() != 0;
        self.cpl = if !self.cr0.contains(Cr0::PE) {
            0
        } else if virtual_8086 {
            3
        } else {
            (state.system.segments[SS].attributes >> 5) as u8 & 3
        };
        self.sti_shadow = state.events.sti_shadow;
        self.mov_ss_shadow = state.events.mov_ss_shadow;
        self.nmi_pending = state.events.nmi_pending;
        self.nmi_masked = state.events.nmi_masked;
        self.halted = state.mp_state == MpState::Halted;
        self.waiting = match state.mp_state {
            MpState::Uninitialized => Waiting::Init,
            MpState::WaitForSipi => Waiting::Sipi,
            MpState::Runnable | MpState::Halted => Waiting::No,
        };
    }

    fn restore_msrs(&mut self, state: &VcpuState) -> std::result::Result<(), AccelError> {
        for (msr, value) in &state.msrs {
            if !self.restore_msr(*msr, *value) {
                return Err(AccelError::BadState(format!(
                    "MSR {msr:#x} does not take {value:#x}"
                )));
            }
        }
        let named = |msr| state.msrs.iter().find(|(m, _)| *m == msr).map(|(_, v)| *v);
        let deadline = named(x86_defs::msr::TSC_DEADLINE).unwrap_or(0);
        let at = self.time_of_tsc(deadline);
        let page = if state.lapic.is_empty() {
            self.apic.save()
        } else {
            state.lapic.clone()
        };
        self.apic
            .restore(&page, state.system.apic_base, (deadline, at))
            .map_err(AccelError::BadState)
    }
}

/// Refuses what no processor can be in.
fn check(state: &VcpuState) -> std::result::Result<(), AccelError> {
    let system = &state.system;
    let (cr0, efer) = (system.cr0, system.efer);
    let paging = cr0 & Cr0::PG.bits() != 0;
    let long = efer & Efer::LMA.bits() != 0;
    let wrong = if paging && cr0 & Cr0::PE.bits() == 0 {
        "paging without protection"
    } else if long && (!paging || system.cr4 & Cr4::PAE.bits() == 0) {
        "long mode without PAE paging"
    } else if long != (paging && efer & Efer::LME.bits() != 0) {
        "EFER.LMA does not follow from LME and paging"
    } else if !super::control::CR4_KNOWN.contains(Cr4::from_bits_retain(system.cr4)) {
        "CR4 bits that there are not"
    } else if !super::control::XCR0_KNOWN.contains(Xcr0::from_bits_retain(system.xcr0)) {
        "XCR0 bits that there are not"
    } else if !state.lapic.is_empty() && state.lapic.len() < LAPIC_SIZE {
        "too few bytes of local APIC"
    } else {
        return Ok(());
    };
    Err(AccelError::BadState(wrong.into()))
}
