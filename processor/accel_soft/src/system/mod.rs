//! System instructions and what they rest on: segments, exceptions, control registers, MSRs, CPUID.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `descriptor`, `segment` | descriptors, loads of segment registers, LAR and its kind |
//! | `stack` | frames built on and read from a stack before registers change |
//! | `transfer`, `task` | far JMP, CALL and RET, call gates, task switches |
//! | `interrupt` | delivery of interrupts and exceptions, IRET |
//! | `syscall` | SYSCALL, SYSENTER and their returns, SWAPGS, FS and GS bases |
//! | `control`, `flags` | control and debug registers, XCR0, invalidation, RFLAGS |
//! | `msr`, `amd`, `cpuid` | model-specific registers, time, what AMD's processors do differently, CPUID |
//! | `xsave` | FXSAVE and XSAVE families |
//! | `local_apic`, `paravirt` | the local APIC as its processor uses it, KVM's paravirtual interface |
//! | `power` | reset, INIT, startup, saved state, permission to use ports |

mod amd;
mod control;
mod cpuid;
mod descriptor;
mod flags;
mod interrupt;
mod local_apic;
mod msr;
mod paravirt;
mod power;
mod segment;
mod stack;
mod syscall;
mod task;
#[cfg(test)]
mod tests;
mod transfer;
mod xsave;

use iced_x86::{Code, Instruction};
use x86_defs::cpuid::CpuidEntry;
use x86_defs::state::{CS, DS, ES, FS, GS, SS};

use crate::cpu::{Handler, Op, instruction as next, last_instruction as last};
use crate::mmu::MmuState;

/// MSRs and what else the system instructions keep.
#[derive(Debug, Default)]
pub(crate) struct SystemState {
    /// What address translation goes by.
    pub(crate) mmu: MmuState,
    star: u64,
    lstar: u64,
    cstar: u64,
    fmask: u64,
    pub(crate) kernel_gs_base: u64,
    sysenter_cs: u64,
    sysenter_esp: u64,
    sysenter_eip: u64,
    tsc_aux: u64,
    tsc_adjust: u64,
    /// CPUID names AMD as the vendor.
    amd: bool,
    /// HWCR of AMD's processors.
    hwcr: u64,
    /// Ticks that the time-stamp counter is ahead of guest time.
    tsc_offset: u64,
    plain: msr::PlainMsrs,
    paravirtual: paravirt::Paravirtual,
    /// Data breakpoints that the instruction under way has hit, as bits of DR6.
    data_breakpoints: u64,
    /// The instruction under way set TF: the trap comes after the next one.
    suppress_step: bool,
    /// The register of the local APIC that a byte-wise read is at.
    apic_word: [u8; 4],
}

/// TSC frequency of guests, in kHz. One tick is a nanosecond of guest time.
pub(crate) const TSC_KHZ: u32 = 1_000_000;

/// Everything that CPUID may promise.
pub(crate) fn supported_cpuid() -> Vec<CpuidEntry> {
    cpuid::supported(TSC_KHZ)
}

impl SystemState {
    /// The state of a processor with these CPUID tables.
    pub(crate) fn new(cpuid: &[CpuidEntry]) -> Self {
        Self {
            amd: amd::is_vendor(cpuid),
            ..Self::default()
        }
    }

    /// CPUID names AMD as the vendor.
    pub(crate) fn amd(&self) -> bool {
        self.amd
    }

    /// The state of the same processor after a reset.
    fn after_reset(&self) -> Self {
        Self {
            amd: self.amd,
            ..Self::default()
        }
    }
}

/// Bits 47 to 63 are equal.
#[inline]
fn canonical(linear: u64) -> bool {
    (linear as i64) << 16 >> 16 == linear as i64
}

/// The handler of a system instruction, or `None` when it is not one: far transfers, INT, IRET, segment and descriptor
/// table loads, MOV CR and DR, MSRs, CPUID, RDTSC, RDPMC, SYSCALL and SYSENTER families, SWAPGS, FSGSBASE, INVLPG, INVPCID,
/// WBINVD, XSAVE and FXSAVE families, XGETBV, XSETBV, CLI, STI, CLAC, STAC, PUSHF, POPF, LAR, LSL, VERR, VERW, ARPL, SMSW, LMSW, CLTS,
/// VMCALL, UD0 to UD2, BOUND. There is no MONITOR, MWAIT or RSM.
pub(crate) fn lookup(instruction: &Instruction, op: &Op) -> Option<Handler> {
    let code = instruction.code();
    let _ = op;
    transfers(code)
        .or_else(|| segments(code))
        .or_else(|| tables(code))
        .or_else(|| control_registers(code))
        .or_else(|| registers(code))
        .or_else(|| saves(code))
}

fn transfers(code: Code) -> Option<Handler> {
    use interrupt as i;
    use transfer as t;
    Some(match code {
        Code::Jmp_ptr1616 | Code::Jmp_ptr1632 => last(t::jmp_far_immediate),
        Code::Call_ptr1616 => last(t::call_far_immediate::<u16>),
        Code::Call_ptr1632 => last(t::call_far_immediate::<u32>),
        Code::Jmp_m1616 => last(t::jmp_far_memory::<u16>),
        Code::Jmp_m1632 => last(t::jmp_far_memory::<u32>),
        Code::Jmp_m1664 => last(t::jmp_far_memory::<u64>),
        Code::Call_m1616 => last(t::call_far_memory::<u16>),
        Code::Call_m1632 => last(t::call_far_memory::<u32>),
        Code::Call_m1664 => last(t::call_far_memory::<u64>),
        Code::Retfw | Code::Retfw_imm16 => last(t::ret_far::<u16>),
        Code::Retfd | Code::Retfd_imm16 => last(t::ret_far::<u32>),
        Code::Retfq | Code::Retfq_imm16 => last(t::ret_far::<u64>),
        Code::Int_imm8 => last(i::int_n),
        Code::Int3 => last(i::int3),
        Code::Into => last(i::into),
        Code::Int1 => last(i::int1),
        Code::Iretw => last(i::iret::<u16>),
        Code::Iretd => last(i::iret::<u32>),
        Code::Iretq => last(i::iret::<u64>),
        Code::Syscall => last(syscall::syscall),
        Code::Sysretd => last(syscall::sysret::<u32>),
        Code::Sysretq => last(syscall::sysret::<u64>),
        Code::Sysenter => last(syscall::sysenter),
        Code::Sysexitd => last(syscall::sysexit::<u32>),
        Code::Sysexitq => last(syscall::sysexit::<u64>),
        Code::Vmcall | Code::Vmmcall => last(paravirt::vmcall),
        Code::Bound_r16_m1616 => last(i::bound::<u16>),
        Code::Bound_r32_m3232 => last(i::bound::<u32>),
        Code::Ud0
        | Code::Ud0_r16_rm16
        | Code::Ud0_r32_rm32
        | Code::Ud0_r64_rm64
        | Code::Ud1_r16_rm16
        | Code::Ud1_r32_rm32
        | Code::Ud1_r64_rm64
        | Code::Ud2 => last(i::undefined),
        _ => return None,
    })
}

fn segments(code: Code) -> Option<Handler> {
    use segment as s;
    Some(match code {
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            last(s::mov_to_segment)
        }
        Code::Mov_rm16_Sreg => next(s::mov_from_segment::<u16>),
        Code::Mov_r32m16_Sreg => next(s::mov_from_segment::<u32>),
        Code::Mov_r64m16_Sreg => next(s::mov_from_segment::<u64>),
        Code::Lds_r16_m1616 => last(s::load_far_pointer::<u16, DS>),
        Code::Lds_r32_m1632 => last(s::load_far_pointer::<u32, DS>),
        Code::Les_r16_m1616 => last(s::load_far_pointer::<u16, ES>),
        Code::Les_r32_m1632 => last(s::load_far_pointer::<u32, ES>),
        Code::Lss_r16_m1616 => last(s::load_far_pointer::<u16, SS>),
        Code::Lss_r32_m1632 => last(s::load_far_pointer::<u32, SS>),
        Code::Lss_r64_m1664 => last(s::load_far_pointer::<u64, SS>),
        Code::Lfs_r16_m1616 => last(s::load_far_pointer::<u16, FS>),
        Code::Lfs_r32_m1632 => last(s::load_far_pointer::<u32, FS>),
        Code::Lfs_r64_m1664 => last(s::load_far_pointer::<u64, FS>),
        Code::Lgs_r16_m1616 => last(s::load_far_pointer::<u16, GS>),
        Code::Lgs_r32_m1632 => last(s::load_far_pointer::<u32, GS>),
        Code::Lgs_r64_m1664 => last(s::load_far_pointer::<u64, GS>),
        _ => return segment_stack(code),
    })
}

fn segment_stack(code: Code) -> Option<Handler> {
    use segment as s;
    Some(match code {
        Code::Pushw_ES => last(s::push_segment::<u16, ES>),
        Code::Pushd_ES => last(s::push_segment::<u32, ES>),
        Code::Pushw_CS => last(s::push_segment::<u16, CS>),
        Code::Pushd_CS => last(s::push_segment::<u32, CS>),
        Code::Pushw_SS => last(s::push_segment::<u16, SS>),
        Code::Pushd_SS => last(s::push_segment::<u32, SS>),
        Code::Pushw_DS => last(s::push_segment::<u16, DS>),
        Code::Pushd_DS => last(s::push_segment::<u32, DS>),
        Code::Pushw_FS => last(s::push_segment::<u16, FS>),
        Code::Pushd_FS => last(s::push_segment::<u32, FS>),
        Code::Pushq_FS => last(s::push_segment::<u64, FS>),
        Code::Pushw_GS => last(s::push_segment::<u16, GS>),
        Code::Pushd_GS => last(s::push_segment::<u32, GS>),
        Code::Pushq_GS => last(s::push_segment::<u64, GS>),
        Code::Popw_ES => last(s::pop_segment::<u16, ES>),
        Code::Popd_ES => last(s::pop_segment::<u32, ES>),
        Code::Popw_SS => last(s::pop_segment::<u16, SS>),
        Code::Popd_SS => last(s::pop_segment::<u32, SS>),
        Code::Popw_DS => last(s::pop_segment::<u16, DS>),
        Code::Popd_DS => last(s::pop_segment::<u32, DS>),
        Code::Popw_FS => last(s::pop_segment::<u16, FS>),
        Code::Popd_FS => last(s::pop_segment::<u32, FS>),
        Code::Popq_FS => last(s::pop_segment::<u64, FS>),
        Code::Popw_GS => last(s::pop_segment::<u16, GS>),
        Code::Popd_GS => last(s::pop_segment::<u32, GS>),
        Code::Popq_GS => last(s::pop_segment::<u64, GS>),
        _ => return None,
    })
}

fn tables(code: Code) -> Option<Handler> {
    use segment as s;
    Some(match code {
        Code::Sgdt_m1632_16 => last(s::sgdt::<16>),
        Code::Sgdt_m1632 => last(s::sgdt::<32>),
        Code::Sgdt_m1664 => last(s::sgdt::<64>),
        Code::Sidt_m1632_16 => last(s::sidt::<16>),
        Code::Sidt_m1632 => last(s::sidt::<32>),
        Code::Sidt_m1664 => last(s::sidt::<64>),
        Code::Lgdt_m1632_16 => last(s::lgdt::<16>),
        Code::Lgdt_m1632 => last(s::lgdt::<32>),
        Code::Lgdt_m1664 => last(s::lgdt::<64>),
        Code::Lidt_m1632_16 => last(s::lidt::<16>),
        Code::Lidt_m1632 => last(s::lidt::<32>),
        Code::Lidt_m1664 => last(s::lidt::<64>),
        Code::Lldt_rm16 | Code::Lldt_r32m16 | Code::Lldt_r64m16 => last(s::lldt),
        Code::Ltr_rm16 | Code::Ltr_r32m16 | Code::Ltr_r64m16 => last(s::ltr),
        Code::Sldt_rm16 => last(s::sldt::<u16>),
        Code::Sldt_r32m16 => last(s::sldt::<u32>),
        Code::Sldt_r64m16 => last(s::sldt::<u64>),
        Code::Str_rm16 => last(s::str::<u16>),
        Code::Str_r32m16 => last(s::str::<u32>),
        Code::Str_r64m16 => last(s::str::<u64>),
        Code::Lar_r16_rm16 => last(s::lar::<u16>),
        Code::Lar_r32_r32m16 => last(s::lar::<u32>),
        Code::Lar_r64_r64m16 => last(s::lar::<u64>),
        Code::Lsl_r16_rm16 => last(s::lsl::<u16>),
        Code::Lsl_r32_r32m16 => last(s::lsl::<u32>),
        Code::Lsl_r64_r64m16 => last(s::lsl::<u64>),
        Code::Verr_rm16 | Code::Verr_r32m16 | Code::Verr_r64m16 => last(s::verr),
        Code::Verw_rm16 | Code::Verw_r32m16 | Code::Verw_r64m16 => last(s::verw),
        Code::Arpl_rm16_r16 | Code::Arpl_r32m16_r32 => last(s::arpl),
        _ => return None,
    })
}

fn control_registers(code: Code) -> Option<Handler> {
    use control as c;
    Some(match code {
        Code::Mov_r32_cr => last(c::mov_from_cr::<u32>),
        Code::Mov_r64_cr => last(c::mov_from_cr::<u64>),
        Code::Mov_cr_r32 => last(c::mov_to_cr::<u32>),
        Code::Mov_cr_r64 => last(c::mov_to_cr::<u64>),
        Code::Mov_r32_dr => last(c::mov_from_dr::<u32>),
        Code::Mov_r64_dr => last(c::mov_from_dr::<u64>),
        Code::Mov_dr_r32 => last(c::mov_to_dr::<u32>),
        Code::Mov_dr_r64 => last(c::mov_to_dr::<u64>),
        Code::Clts => last(c::clts),
        Code::Lmsw_rm16 | Code::Lmsw_r32m16 | Code::Lmsw_r64m16 => last(c::lmsw),
        Code::Smsw_rm16 => last(c::smsw::<u16>),
        Code::Smsw_r32m16 => last(c::smsw::<u32>),
        Code::Smsw_r64m16 => last(c::smsw::<u64>),
        Code::Invlpg_m => last(c::invlpg),
        Code::Invpcid_r32_m128 => last(c::invpcid::<u32>),
        Code::Invpcid_r64_m128 => last(c::invpcid::<u64>),
        Code::Xgetbv => last(c::xgetbv),
        Code::Xsetbv => last(c::xsetbv),
        Code::Wbinvd | Code::Wbnoinvd | Code::Invd => last(c::cache_flush),
        Code::Clac => last(c::set_access_control::<false>),
        Code::Stac => last(c::set_access_control::<true>),
        Code::Cli => last(flags::cli),
        Code::Sti => last(flags::sti),
        Code::Pushfw => last(flags::pushf::<u16>),
        Code::Pushfd => last(flags::pushf::<u32>),
        Code::Pushfq => last(flags::pushf::<u64>),
        Code::Popfw => last(flags::popf::<u16>),
        Code::Popfd => last(flags::popf::<u32>),
        Code::Popfq => last(flags::popf::<u64>),
        _ => return None,
    })
}

fn registers(code: Code) -> Option<Handler> {
    use syscall as s;
    Some(match code {
        Code::Rdmsr => last(msr::rdmsr),
        Code::Wrmsr => last(msr::wrmsr),
        Code::Rdtsc => last(msr::rdtsc),
        Code::Rdtscp => last(msr::rdtscp),
        Code::Rdpmc => last(msr::rdpmc),
        Code::Rdpid_r32 => last(msr::rdpid::<u32>),
        Code::Rdpid_r64 => last(msr::rdpid::<u64>),
        Code::Cpuid => last(cpuid::cpuid),
        Code::Swapgs => last(s::swapgs),
        Code::Rdfsbase_r32 => last(s::rdfsbase::<u32>),
        Code::Rdfsbase_r64 => last(s::rdfsbase::<u64>),
        Code::Rdgsbase_r32 => last(s::rdgsbase::<u32>),
        Code::Rdgsbase_r64 => last(s::rdgsbase::<u64>),
        Code::Wrfsbase_r32 => last(s::wrfsbase::<u32>),
        Code::Wrfsbase_r64 => last(s::wrfsbase::<u64>),
        Code::Wrgsbase_r32 => last(s::wrgsbase::<u32>),
        Code::Wrgsbase_r64 => last(s::wrgsbase::<u64>),
        _ => return None,
    })
}

fn saves(code: Code) -> Option<Handler> {
    use xsave as x;
    Some(match code {
        Code::Fxsave_m512byte => last(x::fxsave::<false>),
        Code::Fxsave64_m512byte => last(x::fxsave::<true>),
        Code::Fxrstor_m512byte => last(x::fxrstor::<false>),
        Code::Fxrstor64_m512byte => last(x::fxrstor::<true>),
        Code::Xsave_mem => last(x::xsave::<false>),
        Code::Xsave64_mem => last(x::xsave::<true>),
        Code::Xsaveopt_mem => last(x::xsaveopt::<false>),
        Code::Xsaveopt64_mem => last(x::xsaveopt::<true>),
        Code::Xsavec_mem => last(x::xsavec::<false>),
        Code::Xsavec64_mem => last(x::xsavec::<true>),
        Code::Xsaves_mem => last(x::xsaves::<false>),
        Code::Xsaves64_mem => last(x::xsaves::<true>),
        Code::Xrstor_mem => last(x::xrstor::<false>),
        Code::Xrstor64_mem => last(x::xrstor::<true>),
        Code::Xrstors_mem => last(x::xrstors::<false>),
        Code::Xrstors64_mem => last(x::xrstors::<true>),
        _ => return None,
    })
}
