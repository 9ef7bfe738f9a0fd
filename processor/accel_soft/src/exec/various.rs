//! Flags, hints, HLT, PAUSE, random numbers, cache lines.

use x86_defs::control::Rflags;

use super::dispatch::next;
use crate::cpu::{Access, Cpu, Flow, Op, Result, Status, Value};

/// NOP and all hints that do nothing here.
pub(crate) fn nop(cpu: &mut Cpu, op: *const Op) -> Flow {
    next(cpu, op)
}

/// #UD.
pub(crate) fn undefined(cpu: &mut Cpu, _: &Op) -> Result<()> {
    Err(cpu.ud())
}

/// CLC.
pub(crate) fn clc(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.status.low &= !1;
    next(cpu, op)
}

/// STC.
pub(crate) fn stc(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.status.low |= 1;
    next(cpu, op)
}

/// CMC.
pub(crate) fn cmc(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.status.low ^= 1;
    next(cpu, op)
}

/// CLD.
pub(crate) fn cld(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.system_flags &= !Rflags::DF.bits();
    next(cpu, op)
}

/// STD.
pub(crate) fn std(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.system_flags |= Rflags::DF.bits();
    next(cpu, op)
}

/// MFENCE, LFENCE, SFENCE.
pub(crate) fn fence(cpu: &mut Cpu, op: *const Op) -> Flow {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    next(cpu, op)
}

/// HLT.
pub(crate) fn hlt(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    cpu.halted = true;
    cpu.attention = true;
    Ok(())
}

/// PAUSE: now and then lets another thread run, so that a lock's holder gets on where there are fewer processors than vCPUs.
pub(crate) fn pause(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(256) {
        cpu.counters.paravirtual.yields += 1;
        std::thread::yield_now();
    }
    Ok(())
}

/// RDRAND, RDSEED.
pub(crate) fn random<T: Value>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer has eight bytes.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), 8, 0) };
    let there = n == 8;
    cpu.status = Status {
        of: 0,
        low: u8::from(there),
    };
    cpu.set_a(op, T::from_u64(u64::from_le_bytes(bytes)));
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB: the address must be readable.
pub(crate) fn flush_line(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let linear = cpu.linear_op(op, 1, Access::Read)?;
    cpu.probe(linear, 1, Access::Read, op.seg)
}
