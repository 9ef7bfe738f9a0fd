//! System instructions and what they rest on: segments, exceptions, control registers, MSRs.

use accel::AccelError;
use iced_x86::Instruction;
use x86_defs::state::VcpuState;

use crate::cpu::{Cpu, Handler, Op, Result};

/// MSRs and what else the system instructions keep.
#[derive(Debug, Default)]
pub(crate) struct SystemState {}

/// The handler of a system instruction, or `None` when it is not one: far transfers, INT, IRET, segment and descriptor
/// table loads, MOV CR and DR, MSRs, CPUID, RDTSC, RDPMC, SYSCALL and SYSENTER families, SWAPGS, FSGSBASE, INVLPG, INVPCID,
/// WBINVD, XSAVE and FXSAVE families, XGETBV, XSETBV, CLI, STI, CLAC, STAC, PUSHF, POPF, LAR, LSL, VERR, VERW, ARPL, SMSW, LMSW, CLTS,
/// MONITOR, VMCALL, UD0 to UD2, BOUND, RSM.
///
/// `op` holds the operands. An instruction that changes RIP, the mode or the interrupt flag uses
/// [`crate::cpu::last_instruction`].
pub(crate) fn lookup(instruction: &Instruction, op: &Op) -> Option<Handler> {
    let _ = (instruction, op);
    None
}

impl Cpu {
    /// Puts everything into the state after power-up or RESET (SDM volume 3, table 11-1), and calls `update_mode`.
    pub(crate) fn power_up(&mut self) {
        self.update_mode();
    }

    /// INIT: as after reset but for what INIT leaves alone; an application processor then waits for a startup IPI.
    pub(crate) fn init(&mut self) {}

    /// Starts at the page that a startup IPI names.
    pub(crate) fn start_up(&mut self, vector: u8) {
        let _ = vector;
    }

    /// Delivers `Cpu::exception` to the guest: `rip` is the address to return to (for faults, the instruction's). Double
    /// faults are made inside.
    ///
    /// # Errors
    /// `Cpu::exception` is [`crate::cpu::Exception::Shutdown`] then: a triple fault.
    pub(crate) fn deliver_exception(&mut self) -> Result<()> {
        Err(self.raise(crate::cpu::Exception::Shutdown))
    }

    /// Delivers an external interrupt or NMI; `rip` is the address to return to.
    ///
    /// # Errors
    /// As [`Self::deliver_exception`].
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) -> Result<()> {
        let _ = vector;
        Err(self.raise(crate::cpu::Exception::Shutdown))
    }

    /// Called before each instruction of a block with [`crate::cpu::Mode::STEP`]: instruction breakpoints.
    ///
    /// # Errors
    /// #DB.
    pub(crate) fn before_step(&mut self) -> Result<()> {
        Ok(())
    }

    /// Called after each instruction of such a block: single-step and data breakpoint traps. `tf` is TF before it.
    ///
    /// # Errors
    /// #DB, to be delivered with `rip` at the next instruction.
    pub(crate) fn after_step(&mut self, tf: bool) -> Result<()> {
        let _ = tf;
        Ok(())
    }

    /// Checks that the port may be used with the current privilege (IOPL, TSS I/O bitmap).
    ///
    /// # Errors
    /// #GP.
    pub(crate) fn check_port(&mut self, port: u16, size: u64) -> Result<()> {
        let _ = (port, size);
        Ok(())
    }

    /// The time-stamp counter.
    pub(crate) fn tsc(&self) -> u64 {
        0
    }

    /// True when the physical address lies in the local APIC's page and it is there.
    pub(crate) fn apic_claims(&self, physical: u64) -> bool {
        let _ = physical;
        false
    }

    /// A read of the page, of any size.
    pub(crate) fn apic_mmio_read(&mut self, physical: u64, to: &mut [u8]) {
        let _ = (physical, to);
    }

    /// A write to the page, of any size.
    pub(crate) fn apic_mmio_write(&mut self, physical: u64, from: &[u8]) {
        let _ = (physical, from);
    }

    /// The APIC's timer has expired ([`crate::apic::Event::TIMER`]).
    pub(crate) fn apic_timer(&mut self) {}

    /// The architectural state.
    pub(crate) fn save(&self) -> VcpuState {
        unimplemented_state()
    }

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`AccelError::BadState`]; nothing is changed then.
    pub(crate) fn restore(&mut self, state: &VcpuState) -> std::result::Result<(), AccelError> {
        let _ = state;
        Err(AccelError::BadState("not there yet".into()))
    }
}

fn unimplemented_state() -> VcpuState {
    VcpuState {
        registers: Default::default(),
        system: Default::default(),
        xsave: vec![0; 576],
        msrs: Vec::new(),
        events: Default::default(),
        mp_state: Default::default(),
        lapic: vec![0; x86_defs::state::LAPIC_SIZE],
    }
}

/// TSC frequency of guests, in kHz.
pub(crate) const TSC_KHZ: u32 = 2_000_000;

/// Everything that CPUID may promise.
pub(crate) fn supported_cpuid() -> Vec<x86_defs::cpuid::CpuidEntry> {
    Vec::new()
}
