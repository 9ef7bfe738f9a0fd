//! What guests do differently when CPUID tells them of AMD as the vendor: MSRs that AMD's processors have (APM volume 2,
//! appendix A; the BIOS and kernel developer's guides of families 0Fh to 17h), and SYSCALL outside 64-bit mode.

use x86_defs::control::Rflags;
use x86_defs::cpuid::CpuidEntry;
use x86_defs::state::RCX;

use crate::cpu::{Cpu, Result};

mod number {
    pub(super) const SYSCFG: u32 = 0xc001_0010;
    pub(super) const HWCR: u32 = 0xc001_0015;
    pub(super) const IORR_FIRST: u32 = 0xc001_0016;
    pub(super) const IORR_LAST: u32 = 0xc001_0019;
    pub(super) const TOP_MEM: u32 = 0xc001_001a;
    pub(super) const TOP_MEM2: u32 = 0xc001_001d;
    pub(super) const NB_CFG: u32 = 0xc001_001f;
    pub(super) const PATCH_LOADER: u32 = 0xc001_0020;
    pub(super) const INT_PENDING: u32 = 0xc001_0055;
    pub(super) const MMIO_CONFIG_BASE: u32 = 0xc001_0058;
    pub(super) const PSTATE_FIRST: u32 = 0xc001_0061;
    pub(super) const PSTATE_LAST: u32 = 0xc001_006b;
    pub(super) const SMM_ADDRESS: u32 = 0xc001_0112;
    pub(super) const SMM_MASK: u32 = 0xc001_0113;
    pub(super) const VM_CR: u32 = 0xc001_0114;
    pub(super) const OSVW_LENGTH: u32 = 0xc001_0140;
    pub(super) const OSVW_STATUS: u32 = 0xc001_0141;
    pub(super) const LS_CFG: u32 = 0xc001_1020;
    pub(super) const IC_CFG: u32 = 0xc001_1021;
    pub(super) const DC_CFG: u32 = 0xc001_1022;
    pub(super) const TW_CFG: u32 = 0xc001_1023;
    pub(super) const DE_CFG: u32 = 0xc001_1029;
    pub(super) const BU_CFG2: u32 = 0xc001_102a;
    pub(super) const EX_CFG: u32 = 0xc001_102c;
}

/// DE_CFG: LFENCE waits for all instructions before it. It always does here.
const LFENCE_SERIALIZES: u64 = 1 << 1;
/// VM_CR: SVM is locked and disabled.
const SVM_DISABLED: u64 = 1 << 3 | 1 << 4;
/// HWCR: bits that software may set without an effect here: monitor in user mode, TSC and instruction counter that never stop,
/// cache flushes by INVD, the IGNNE emulation, writes to machine-check banks.
const HWCR_KNOWN: u64 = 1 << 3 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 18 | 1 << 24 | 1 << 30;

/// True when CPUID names AMD or Hygon.
pub(super) fn is_vendor(cpuid: &[CpuidEntry]) -> bool {
    let first = cpuid.iter().find(|e| e.leaf == 0);
    first.is_some_and(|e| matches!(&e.ebx.to_le_bytes(), b"Auth" | b"Hygo"))
}

/// Reads an MSR; `None` is #GP. Those that describe chips which a virtual machine has not got read as zero.
pub(super) fn read_msr(cpu: &Cpu, msr: u32) -> Option<u64> {
    use number::*;
    Some(match msr {
        HWCR => cpu.system.hwcr,
        DE_CFG => LFENCE_SERIALIZES,
        VM_CR => SVM_DISABLED,
        SYSCFG
        | IORR_FIRST..=IORR_LAST
        | TOP_MEM
        | TOP_MEM2
        | NB_CFG
        | INT_PENDING
        | MMIO_CONFIG_BASE
        | PSTATE_FIRST..=PSTATE_LAST
        | SMM_ADDRESS
        | SMM_MASK
        | OSVW_LENGTH
        | OSVW_STATUS
        | LS_CFG
        | IC_CFG
        | DC_CFG
        | TW_CFG
        | BU_CFG2
        | EX_CFG => 0,
        _ => return None,
    })
}

/// Writes an MSR; `None` is #GP. What configures a chip that is not there is ignored.
pub(super) fn write_msr(cpu: &mut Cpu, msr: u32, value: u64) -> Option<()> {
    use number::*;
    match msr {
        HWCR => {
            (value & !HWCR_KNOWN == 0).then_some(())?;
            cpu.system.hwcr = value;
        }
        SYSCFG
        | IORR_FIRST..=IORR_LAST
        | TOP_MEM
        | TOP_MEM2
        | NB_CFG
        | PATCH_LOADER
        | INT_PENDING
        | MMIO_CONFIG_BASE
        | PSTATE_FIRST..=PSTATE_LAST
        | SMM_ADDRESS
        | SMM_MASK
        | OSVW_LENGTH
        | OSVW_STATUS
        | LS_CFG
        | IC_CFG
        | DC_CFG
        | TW_CFG
        | DE_CFG
        | BU_CFG2
        | EX_CFG => {}
        VM_CR => (value & !SVM_DISABLED == 0).then_some(())?,
        _ => return None,
    }
    Some(())
}

impl Cpu {
    /// SYSCALL outside 64-bit mode, which only AMD's processors have (APM volume 3, SYSCALL): to CSTAR from compatibility mode, to
    /// the address in STAR in legacy mode.
    pub(super) fn syscall_32bit(&mut self) -> Result<()> {
        if self.long_mode() {
            return self.syscall_to(self.system.cstar);
        }
        self.regs[RCX] = self.rip & 0xffff_ffff;
        let flags = self.rflags() & !(Rflags::VM | Rflags::IF | Rflags::RF).bits();
        self.set_rflags_without_mode(flags);
        self.rip = self.system.star & 0xffff_ffff;
        self.enter_legacy_kernel((self.system.star >> 32) as u16);
        Ok(())
    }

    /// SYSRET in legacy mode (APM volume 3, SYSRET).
    pub(super) fn sysret_legacy(&mut self) {
        self.rip = self.regs[RCX] & 0xffff_ffff;
        let flags = self.rflags() | Rflags::IF.bits();
        self.set_rflags_without_mode(flags);
        self.attention = true;
        self.enter_legacy_user((self.system.star >> 48) as u16);
    }
}
