//! Model-specific registers and the time-stamp counter (SDM volume 4; volume 3, sections 12.11, 16.3, 18.17).

use x86_defs::control::{Cr0, Cr4, Efer};
use x86_defs::msr as name;
use x86_defs::state::{FS, GS, RAX, RCX, RDX};

use crate::apic::MsrFault;
use crate::cpu::{Cpu, Op, Result, Value};
use crate::mmu::PHYSICAL_BITS;

/// MSRs that the table in `x86_defs` does not name.
pub(super) mod number {
    pub(crate) const PLATFORM_ID: u32 = 0x17;
    pub(crate) const EBL_CR_POWERON: u32 = 0x2a;
    pub(crate) const SPEC_CTRL: u32 = 0x48;
    pub(crate) const PRED_CMD: u32 = 0x49;
    pub(crate) const BIOS_UPDATE_TRIGGER: u32 = 0x79;
    pub(crate) const BIOS_SIGN_ID: u32 = 0x8b;
    pub(crate) const PLATFORM_INFO: u32 = 0xce;
    pub(crate) const MTRR_CAP: u32 = 0xfe;
    pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;
    pub(crate) const MISC_FEATURES_ENABLES: u32 = 0x140;
    pub(crate) const MCG_CAP: u32 = 0x179;
    pub(crate) const MCG_STATUS: u32 = 0x17a;
    pub(crate) const MCG_CTL: u32 = 0x17b;
    pub(crate) const DEBUG_CTL: u32 = 0x1d9;
    pub(crate) const MTRR_FIRST_VARIABLE: u32 = 0x200;
    pub(crate) const MTRR_LAST_VARIABLE: u32 = 0x20f;
    pub(crate) const MTRR_DEFAULT: u32 = 0x2ff;
    pub(crate) const MC_FIRST: u32 = 0x400;
    pub(crate) const XSS: u32 = 0xda0;
}

/// The fixed-range MTRRs.
const FIXED_MTRRS: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
/// Banks of machine-check registers.
const BANKS: u32 = 10;
/// IA32_MCG_CAP: the banks, IA32_MCG_CTL is there, software error recovery.
const MCG_CAP_VALUE: u64 = BANKS as u64 | 1 << 8 | 1 << 24;
/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write combining.
const MTRR_CAP_VALUE: u64 = 0x508;
/// PAT after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE: fast strings; no branch trace store, no PEBS.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// IA32_MISC_ENABLE: bits that software may change: fast strings, automatic thermal control, MONITOR, xTPR, XD.
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 23 | 1 << 34;
/// IA32_SPEC_CTRL: IBRS, STIBP, SSBD, BHI_DIS_S.
const SPEC_CTRL_KNOWN: u64 = 0b111 | 1 << 10;
/// The update revision in IA32_BIOS_SIGN_ID.
const MICROCODE: u64 = 0x1_0000_0000;

/// IA32_ARCH_CAPABILITIES: not susceptible to anything: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO,
/// IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
pub(super) const ARCH_CAPABILITIES_VALUE: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// MSRs that only hold what was written, kept in the state by number and value.
#[derive(Debug, Clone)]
pub(super) struct PlainMsrs {
    pub(super) misc_enable: u64,
    pub(super) pat: u64,
    pub(super) spec_ctrl: u64,
    pub(super) debug_ctl: u64,
    pub(super) bios_sign: u64,
    pub(super) mtrr_default: u64,
    pub(super) mtrr_fixed: [u64; 11],
    pub(super) mtrr_variable: [u64; 16],
    pub(super) mcg_status: u64,
    pub(super) mcg_ctl: u64,
    pub(super) banks: [u64; 4 * BANKS as usize],
}

impl Default for PlainMsrs {
    fn default() -> Self {
        Self {
            misc_enable: MISC_ENABLE_RESET,
            pat: PAT_RESET,
            spec_ctrl: 0,
            debug_ctl: 0,
            bios_sign: MICROCODE,
            mtrr_default: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            mcg_status: 0,
            mcg_ctl: u64::MAX,
            banks: [0; 4 * BANKS as usize],
        }
    }
}

/// Is each byte a memory type (SDM volume 3, table 13-8)? `uncached_minus` allows type 7, which only PAT knows.
fn memory_types(value: u64, uncached_minus: bool) -> bool {
    value.to_le_bytes().iter().all(|b| match b {
        0 | 1 | 4 | 5 | 6 => true,
        7 => uncached_minus,
        _ => false,
    })
}

impl PlainMsrs {
    fn read(&self, msr: u32) -> Option<u64> {
        use number::*;
        Some(match msr {
            PLATFORM_ID | EBL_CR_POWERON | PLATFORM_INFO | MISC_FEATURES_ENABLES => 0,
            SPEC_CTRL => self.spec_ctrl,
            BIOS_SIGN_ID => self.bios_sign,
            MTRR_CAP => MTRR_CAP_VALUE,
            ARCH_CAPABILITIES => ARCH_CAPABILITIES_VALUE,
            MCG_CAP => MCG_CAP_VALUE,
            MCG_STATUS => self.mcg_status,
            MCG_CTL => self.mcg_ctl,
            name::MISC_ENABLE => self.misc_enable,
            DEBUG_CTL => self.debug_ctl,
            MTRR_FIRST_VARIABLE..=MTRR_LAST_VARIABLE => {
                self.mtrr_variable[(msr - MTRR_FIRST_VARIABLE) as usize]
            }
            name::PAT => self.pat,
            MTRR_DEFAULT => self.mtrr_default,
            XSS => 0,
            _ => {
                if let Some(i) = FIXED_MTRRS.iter().position(|m| *m == msr) {
                    return Some(self.mtrr_fixed[i]);
                }
                let bank = msr.checked_sub(MC_FIRST).filter(|n| *n < 4 * BANKS)?;
                self.banks[bank as usize]
            }
        })
    }

    /// Writes; `None` is #GP.
    fn write(&mut self, msr: u32, value: u64) -> Option<()> {
        use number::*;
        let allow = |good: bool| good.then_some(());
        match msr {
            EBL_CR_POWERON | MISC_FEATURES_ENABLES | XSS => allow(value == 0)?,
            SPEC_CTRL => {
                allow(value & !SPEC_CTRL_KNOWN == 0)?;
                self.spec_ctrl = value;
            }
            PRED_CMD => allow(value & !1 == 0)?,
            BIOS_UPDATE_TRIGGER => {}
            // The revision can be cleared, and reads as it is after CPUID.
            BIOS_SIGN_ID => {}
            MCG_STATUS => {
                allow(value & !0xf == 0)?;
                self.mcg_status = value;
            }
            MCG_CTL => self.mcg_ctl = value,
            name::MISC_ENABLE => {
                self.misc_enable =
                    self.misc_enable & !MISC_ENABLE_WRITABLE | value & MISC_ENABLE_WRITABLE;
            }
            DEBUG_CTL => {
                allow(value & !0b11 == 0)?;
                self.debug_ctl = value;
            }
            MTRR_FIRST_VARIABLE..=MTRR_LAST_VARIABLE => {
                let mask_register = msr & 1 != 0;
                let low = if mask_register {
                    value & 0x7ff
                } else {
                    value & 0xf00
                };
                let types = mask_register || memory_types(value & 0xff, false);
                allow(value >> PHYSICAL_BITS == 0 && low == 0 && types)?;
                self.mtrr_variable[(msr - MTRR_FIRST_VARIABLE) as usize] = value;
            }
            name::PAT => {
                allow(memory_types(value, true))?;
                self.pat = value;
            }
            MTRR_DEFAULT => {
                allow(value & !0xcff == 0 && memory_types(value & 0xff, false))?;
                self.mtrr_default = value;
            }
            _ => {
                if let Some(i) = FIXED_MTRRS.iter().position(|m| *m == msr) {
                    allow(memory_types(value, false))?;
                    self.mtrr_fixed[i] = value;
                } else {
                    let bank = msr.checked_sub(MC_FIRST).filter(|n| *n < 4 * BANKS)?;
                    // Control registers take all zeroes or all ones; the others are only cleared.
                    let good = match bank & 3 {
                        0 => value == 0 || value == u64::MAX || value == u64::MAX - 1,
                        _ => value == 0,
                    };
                    allow(good)?;
                    self.banks[bank as usize] = value;
                }
            }
        }
        Some(())
    }
}

/// The MSRs of [`PlainMsrs`] that a saved state carries.
fn plain_numbers() -> impl Iterator<Item = u32> {
    use number::*;
    [
        SPEC_CTRL,
        MCG_STATUS,
        MCG_CTL,
        name::MISC_ENABLE,
        DEBUG_CTL,
        name::PAT,
        MTRR_DEFAULT,
    ]
    .into_iter()
    .chain(MTRR_FIRST_VARIABLE..=MTRR_LAST_VARIABLE)
    .chain(FIXED_MTRRS)
    .chain(MC_FIRST..MC_FIRST + 4 * BANKS)
}

/// The other MSRs that a saved state carries, in an order in which they can be restored.
const SAVED: [u32; 17] = [
    name::TSC_ADJUST,
    name::TSC,
    name::SYSENTER_CS,
    name::SYSENTER_ESP,
    name::SYSENTER_EIP,
    name::STAR,
    name::LSTAR,
    name::CSTAR,
    name::FMASK,
    name::KERNEL_GS_BASE,
    name::TSC_AUX,
    name::TSC_DEADLINE,
    super::paravirt::WALL_CLOCK,
    super::paravirt::SYSTEM_TIME,
    super::paravirt::STEAL_TIME,
    super::paravirt::PV_EOI,
    super::paravirt::POLL_CONTROL,
];

impl Cpu {
    // ---- Time ----

    /// The time-stamp counter.
    pub(crate) fn tsc(&self) -> u64 {
        self.tsc_at(self.machine.clock.now())
    }

    /// The time-stamp counter at a guest time in nanoseconds.
    pub(super) fn tsc_at(&self, now: u64) -> u64 {
        // The usual frequency needs no division.
        if self.tsc_khz == 1_000_000 {
            return now.wrapping_add(self.system.tsc_offset);
        }
        let ticks = u128::from(now) * u128::from(self.tsc_khz) / 1_000_000;
        (ticks as u64).wrapping_add(self.system.tsc_offset)
    }

    /// The guest time in nanoseconds at which the time-stamp counter reaches a value; a past one counts as now.
    pub(super) fn time_of_tsc(&self, tsc: u64) -> u64 {
        let now = self.machine.clock.now();
        let left = tsc.wrapping_sub(self.tsc_at(now)) as i64;
        if left <= 0 {
            return now;
        }
        let wait = (left as u128 * 1_000_000).div_ceil(u128::from(self.tsc_khz.max(1)));
        now.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    fn set_tsc(&mut self, value: u64) {
        let delta = value.wrapping_sub(self.tsc());
        self.move_tsc(delta);
    }

    fn move_tsc(&mut self, delta: u64) {
        self.system.tsc_offset = self.system.tsc_offset.wrapping_add(delta);
        self.system.tsc_adjust = self.system.tsc_adjust.wrapping_add(delta);
        self.update_paravirtual_clock();
    }

    // ---- Reading and writing by number ----

    /// Reads an MSR; `None` is #GP.
    pub(super) fn read_msr(&self, msr: u32) -> Option<u64> {
        let s = &self.system;
        Some(match msr {
            name::TSC => self.tsc(),
            name::APIC_BASE => self.apic.base(),
            name::TSC_ADJUST => s.tsc_adjust,
            name::SYSENTER_CS => s.sysenter_cs,
            name::SYSENTER_ESP => s.sysenter_esp,
            name::SYSENTER_EIP => s.sysenter_eip,
            name::TSC_DEADLINE => self.apic.deadline(),
            name::X2APIC_FIRST..=name::X2APIC_LAST => self.apic.read_msr(msr).ok()?,
            name::EFER => self.efer.bits(),
            name::STAR => s.star,
            name::LSTAR => s.lstar,
            name::CSTAR => s.cstar,
            name::FMASK => s.fmask,
            name::FS_BASE => self.segments[FS].base,
            name::GS_BASE => self.segments[GS].base,
            name::KERNEL_GS_BASE => s.kernel_gs_base,
            name::TSC_AUX => s.tsc_aux,
            _ if super::paravirt::is_msr(msr) => self.read_paravirtual_msr(msr)?,
            0xc001_0000..=0xc001_ffff if s.amd => super::amd::read_msr(self, msr)?,
            _ => s.plain.read(msr)?,
        })
    }

    /// Writes an MSR; `None` is #GP.
    pub(super) fn write_msr(&mut self, msr: u32, value: u64) -> Option<()> {
        let canonical = super::canonical(value).then_some(value);
        match msr {
            name::TSC => self.set_tsc(value),
            name::APIC_BASE => self.set_apic_base(value)?,
            name::TSC_ADJUST => {
                let delta = value.wrapping_sub(self.system.tsc_adjust);
                self.move_tsc(delta);
            }
            name::SYSENTER_CS => self.system.sysenter_cs = value & 0xffff_ffff,
            name::SYSENTER_ESP => self.system.sysenter_esp = canonical?,
            name::SYSENTER_EIP => self.system.sysenter_eip = canonical?,
            name::TSC_DEADLINE => {
                let at = self.time_of_tsc(value);
                self.apic.set_deadline(value, at);
            }
            name::X2APIC_FIRST..=name::X2APIC_LAST => {
                self.settle_deferred_eoi();
                match self.apic.write_msr(msr, value) {
                    Ok(effect) => self.after_apic_write(effect),
                    Err(MsrFault) => return None,
                }
            }
            name::EFER => self.set_efer(value)?,
            name::STAR => self.system.star = value,
            name::LSTAR => self.system.lstar = canonical?,
            name::CSTAR => self.system.cstar = canonical?,
            name::FMASK => {
                (value >> 32 == 0).then_some(())?;
                self.system.fmask = value;
            }
            name::FS_BASE | name::GS_BASE => {
                let seg = if msr == name::FS_BASE { FS } else { GS };
                self.segments[seg].base = canonical?;
                self.bases[seg] = value;
            }
            name::KERNEL_GS_BASE => self.system.kernel_gs_base = canonical?,
            name::TSC_AUX => {
                (value >> 32 == 0).then_some(())?;
                self.system.tsc_aux = value;
            }
            _ if super::paravirt::is_msr(msr) => self.write_paravirtual_msr(msr, value)?,
            0xc001_0000..=0xc001_ffff if self.system.amd => {
                super::amd::write_msr(self, msr, value)?;
            }
            _ => self.system.plain.write(msr, value)?,
        }
        Some(())
    }

    fn set_efer(&mut self, value: u64) -> Option<()> {
        let known = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
        let new = Efer::from_bits_retain(value);
        let lme_changed = (new ^ self.efer).contains(Efer::LME);
        if !known.contains(new) || (lme_changed && self.cr0.contains(Cr0::PG)) {
            return None;
        }
        let old = self.efer;
        self.efer = (new - Efer::LMA) | (old & Efer::LMA);
        if (old ^ self.efer).contains(Efer::NXE) {
            self.flush_translations();
        }
        Some(())
    }

    /// The MSRs of a saved state.
    pub(super) fn save_msrs(&self) -> Vec<(u32, u64)> {
        let mut all: Vec<_> = SAVED
            .into_iter()
            .filter_map(|msr| Some((msr, self.read_msr(msr)?)))
            .collect();
        all.extend(plain_numbers().filter_map(|msr| Some((msr, self.system.plain.read(msr)?))));
        all
    }

    /// Takes over a saved MSR; false when it can't be.
    pub(super) fn restore_msr(&mut self, msr: u32, value: u64) -> bool {
        match msr {
            // The offset alone, so that neither changes the other.
            name::TSC => {
                let now = self.tsc();
                self.system.tsc_offset =
                    self.system.tsc_offset.wrapping_add(value.wrapping_sub(now));
                true
            }
            name::TSC_ADJUST => {
                self.system.tsc_adjust = value;
                true
            }
            // Restored with the local APIC.
            name::TSC_DEADLINE => true,
            number::MC_FIRST.. if msr < number::MC_FIRST + 4 * BANKS => {
                self.system.plain.banks[(msr - number::MC_FIRST) as usize] = value;
                true
            }
            _ => self.write_msr(msr, value).is_some(),
        }
    }
}

pub(super) fn rdmsr(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.need_supervisor()?;
    let msr = cpu.regs[RCX] as u32;
    if (name::X2APIC_FIRST..=name::X2APIC_LAST).contains(&msr) {
        cpu.settle_deferred_eoi();
    }
    let Some(value) = cpu.read_msr(msr) else {
        return Err(cpu.gp(0));
    };
    cpu.regs[RAX] = value & 0xffff_ffff;
    cpu.regs[RDX] = value >> 32;
    Ok(())
}

pub(super) fn wrmsr(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.need_supervisor()?;
    let value = cpu.regs[RDX] << 32 | cpu.regs[RAX] & 0xffff_ffff;
    match cpu.write_msr(cpu.regs[RCX] as u32, value) {
        Some(()) => Ok(()),
        None => Err(cpu.gp(0)),
    }
}

/// CR4.TSD keeps time from user mode.
fn check_time(cpu: &mut Cpu) -> Result<()> {
    if cpu.cpl != 0 && cpu.cr4.contains(Cr4::TSD) {
        return Err(cpu.gp(0));
    }
    Ok(())
}

pub(super) fn rdtsc(cpu: &mut Cpu, _: &Op) -> Result<()> {
    check_time(cpu)?;
    let tsc = cpu.tsc();
    cpu.regs[RAX] = tsc & 0xffff_ffff;
    cpu.regs[RDX] = tsc >> 32;
    Ok(())
}

pub(super) fn rdtscp(cpu: &mut Cpu, op: &Op) -> Result<()> {
    rdtsc(cpu, op)?;
    cpu.regs[RCX] = cpu.system.tsc_aux;
    Ok(())
}

pub(super) fn rdpid<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.system.tsc_aux;
    cpu.set_a::<T>(op, T::from_u64(value));
    Ok(())
}

/// There are no performance counters.
pub(super) fn rdpmc(cpu: &mut Cpu, _: &Op) -> Result<()> {
    Err(cpu.gp(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_registers_refuse_what_the_manual_refuses() {
        let mut m = PlainMsrs::default();
        assert_eq!(m.read(name::PAT), Some(PAT_RESET));
        assert_eq!(m.write(name::PAT, 0x0007_0406_0007_0402), None);
        assert_eq!(m.write(name::PAT, 0x0007_0106_0007_0406), Some(()));
        assert_eq!(m.read(name::PAT), Some(0x0007_0106_0007_0406));
        assert_eq!(m.write(0x250, 0x0606_0606_0606_0607), None);
        assert_eq!(m.write(0x26f, 0x0606_0606_0606_0606), Some(()));
        assert_eq!(m.write(number::MTRR_CAP, 0), None);
        assert_eq!(m.write(number::MTRR_DEFAULT, 0xc06), Some(()));
        assert_eq!(m.write(number::MTRR_DEFAULT, 0x1c06), None);
        assert_eq!(m.write(0x200, 1 << PHYSICAL_BITS), None);
        assert_eq!(m.write(0x201, 0x3fff_c000_0800), Some(()));
        assert_eq!(m.read(0x1234), None);
        assert_eq!(m.write(0x1234, 0), None);
        // Bits of IA32_MISC_ENABLE that say what there is can't be changed.
        assert_eq!(m.write(name::MISC_ENABLE, 0), Some(()));
        assert_eq!(m.read(name::MISC_ENABLE), Some(0x1800));
        assert_eq!(m.write(0x401, 1), None);
        assert_eq!(m.write(0x400, u64::MAX), Some(()));
        for msr in plain_numbers() {
            assert!(m.read(msr).is_some(), "{msr:#x}");
        }
    }
}
