//! AAA, AAD, AAM, AAS, DAA, DAS (not in 64-bit mode), SALC.

use x86_defs::state::RAX;

use super::arith::Arith;
use crate::cpu::{Cpu, Op, Result, Status, gpr};

const CF: u8 = 1;
const AF: u8 = 1 << 4;

fn al(cpu: &Cpu) -> u8 {
    cpu.regs.get(gpr(RAX))
}

/// SF, ZF and PF of a byte; the others clear.
fn result_flags(value: u8) -> Status {
    value.or(value).1
}

/// DAA, and DAS with `SUBTRACT`.
pub(crate) fn decimal<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let before = al(cpu);
    let (carry, half) = (cpu.status.carry(), cpu.status.low & AF != 0);
    let step = |value: u8, by: u8| {
        if SUBTRACT {
            value.overflowing_sub(by)
        } else {
            value.overflowing_add(by)
        }
    };
    let mut value = before;
    let mut low = 0;
    let mut borrowed = false;
    if before & 15 > 9 || half {
        let (v, over) = step(value, 6);
        (value, borrowed) = (v, over);
        low |= AF;
    }
    if before > 0x99 || carry {
        value = step(value, 0x60).0;
        low |= CF;
    } else if SUBTRACT && borrowed {
        low |= CF;
    }
    cpu.regs.put(gpr(RAX), value);
    cpu.status = result_flags(value);
    cpu.status.low = cpu.status.low & !(AF | CF) | low;
    Ok(())
}

/// AAA, and AAS with `SUBTRACT`.
pub(crate) fn ascii<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let mut ax: u16 = cpu.regs.get(gpr(RAX));
    let adjust = ax & 15 > 9 || cpu.status.low & AF != 0;
    if adjust {
        ax = if SUBTRACT {
            ax.wrapping_sub(0x106)
        } else {
            ax.wrapping_add(0x106)
        };
    }
    ax &= 0xff0f;
    cpu.regs.put(gpr(RAX), ax);
    cpu.status = result_flags(ax as u8);
    cpu.status.low &= !(AF | CF);
    if adjust {
        cpu.status.low |= AF | CF;
    }
    Ok(())
}

/// AAM.
pub(crate) fn aam(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let base = op.imm as u8;
    if base == 0 {
        return Err(cpu.de());
    }
    let value = al(cpu);
    cpu.regs.put(
        gpr(RAX),
        u16::from(value / base) << 8 | u16::from(value % base),
    );
    cpu.status = result_flags(value % base);
    Ok(())
}

/// AAD.
pub(crate) fn aad(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let ax: u16 = cpu.regs.get(gpr(RAX));
    let value = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    cpu.regs.put(gpr(RAX), u16::from(value));
    cpu.status = result_flags(value);
    Ok(())
}

/// SALC.
pub(crate) fn salc(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let value = if cpu.status.carry() { 0xffu8 } else { 0 };
    cpu.regs.put(gpr(RAX), value);
    Ok(())
}
