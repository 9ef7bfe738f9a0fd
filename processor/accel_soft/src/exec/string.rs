//! MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, alone and repeated.
//!
//! A repeated instruction keeps its registers up to date with each element, so that it can be left at any element: for a
//! fault, or after a stretch for an interrupt, and goes on when it is executed again. Copies and fills take a page at a time
//! where both sides are plain memory.

use std::sync::atomic::Ordering;

use x86_defs::control::Rflags;
use x86_defs::state::{ES, RAX, RCX, RDI, RDX, RSI};

use super::arith::Arith;
use crate::cpu::{
    Access, Cpu, Ea, Handler, Mode, Op, Result, Value, gpr, instruction, last_instruction,
};

/// Elements after which a repeated instruction looks for interrupts.
const STRETCH: u64 = 4096;

/// The mask of an effective address's size.
pub(crate) fn address_mask(ea: Ea) -> u64 {
    match ea {
        Ea::Flat64 | Ea::None => u64::MAX,
        Ea::Seg16 => 0xffff,
        Ea::Flat32 | Ea::Long32 | Ea::Seg32 => 0xffff_ffff,
    }
}

/// How a repeat prefix ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// No prefix.
    Once,
    /// While the count lasts (and ZF is set, for CMPS and SCAS).
    Equal,
    /// While the count lasts and ZF is clear.
    NotEqual,
}

/// Adds to an index or count register with the address size.
#[inline(always)]
fn bump(cpu: &mut Cpu, register: usize, by: u64, mask: u64) {
    let value = cpu.regs[register].wrapping_add(by) & mask;
    set_counted(cpu, register, value, mask);
}

#[inline(always)]
fn set_counted(cpu: &mut Cpu, register: usize, value: u64, mask: u64) {
    cpu.regs[register] = if mask == 0xffff {
        cpu.regs[register] & !mask | value
    } else {
        value
    };
}

/// The linear address of an element in a segment. In 64-bit mode only FS and GS have a base.
#[inline(always)]
fn element(cpu: &mut Cpu, op: &Op, seg: u8, offset: u64, size: u64, access: Access) -> Result<u64> {
    match op.ea() {
        Ea::Flat64 | Ea::Long32 => Ok(offset.wrapping_add(cpu.bases[(seg & 7) as usize])),
        Ea::Flat32 => Ok(offset),
        _ => cpu.linear(seg, offset, size, access),
    }
}

fn source(cpu: &mut Cpu, op: &Op, size: u64) -> Result<u64> {
    let offset = cpu.regs[RSI] & address_mask(op.ea());
    element(cpu, op, op.seg, offset, size, Access::Read)
}

fn destination(cpu: &mut Cpu, op: &Op, size: u64, access: Access) -> Result<u64> {
    let offset = cpu.regs[RDI] & address_mask(op.ea());
    element(cpu, op, ES as u8, offset, size, access)
}

fn step<T: Value>(cpu: &Cpu) -> u64 {
    let size = size_of::<T>() as u64;
    if cpu.system_flag(Rflags::DF) {
        size.wrapping_neg()
    } else {
        size
    }
}

fn movs<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (size, by, mask) = (size_of::<T>() as u64, step::<T>(cpu), address_mask(op.ea()));
    let from = source(cpu, op, size)?;
    let value: T = cpu.load_in(from, op.seg)?;
    let to = destination(cpu, op, size, Access::Write)?;
    cpu.store(to, value)?;
    bump(cpu, RSI, by, mask);
    bump(cpu, RDI, by, mask);
    Ok(())
}

fn stos<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (size, by, mask) = (size_of::<T>() as u64, step::<T>(cpu), address_mask(op.ea()));
    let to = destination(cpu, op, size, Access::Write)?;
    cpu.store(to, T::from_u64(cpu.regs[RAX]))?;
    bump(cpu, RDI, by, mask);
    Ok(())
}

fn lods<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (size, by, mask) = (size_of::<T>() as u64, step::<T>(cpu), address_mask(op.ea()));
    let from = source(cpu, op, size)?;
    let value: T = cpu.load_in(from, op.seg)?;
    cpu.regs.set(gpr(RAX), value);
    bump(cpu, RSI, by, mask);
    Ok(())
}

fn cmps<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (size, by, mask) = (size_of::<T>() as u64, step::<T>(cpu), address_mask(op.ea()));
    // Processors look at ES:rDI first (AMD's mostly).
    let to = destination(cpu, op, size, Access::Read)?;
    let b: T = cpu.load(to)?;
    let from = source(cpu, op, size)?;
    let a: T = cpu.load_in(from, op.seg)?;
    cpu.status = a.sub(b).1;
    bump(cpu, RSI, by, mask);
    bump(cpu, RDI, by, mask);
    Ok(())
}

fn scas<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (size, by, mask) = (size_of::<T>() as u64, step::<T>(cpu), address_mask(op.ea()));
    let to = destination(cpu, op, size, Access::Read)?;
    let b: T = cpu.load(to)?;
    cpu.status = T::from_u64(cpu.regs[RAX]).sub(b).1;
    bump(cpu, RDI, by, mask);
    Ok(())
}

fn ins<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (size, by, mask) = (size_of::<T>() as u64, step::<T>(cpu), address_mask(op.ea()));
    let port = cpu.regs[RDX] as u16;
    cpu.check_port(port, size)?;
    let to = destination(cpu, op, size, Access::Write)?;
    cpu.probe(to, size, Access::Write, ES as u8)?;
    let value: T = super::port::read_port(cpu, port);
    cpu.store(to, value)?;
    bump(cpu, RDI, by, mask);
    Ok(())
}

fn outs<T: Arith>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let (size, by, mask) = (size_of::<T>() as u64, step::<T>(cpu), address_mask(op.ea()));
    let port = cpu.regs[RDX] as u16;
    cpu.check_port(port, size)?;
    let from = source(cpu, op, size)?;
    let value: T = cpu.load_in(from, op.seg)?;
    super::port::write_port(cpu, port, value);
    bump(cpu, RSI, by, mask);
    Ok(())
}

/// Elements that can be done from here at once because they lie in one page, at most `left`.
fn in_page(linear: u64, size: u64, left: u64) -> u64 {
    ((0x1000 - (linear & 0xfff)) / size).min(left)
}

/// Copies as many elements as lie in one page on both sides. Returns how many: 0 when it must be done singly.
fn copy_stretch<T: Arith>(cpu: &mut Cpu, op: &Op, left: u64) -> u64 {
    let size = size_of::<T>() as u64;
    if cpu.system_flag(Rflags::DF) || !matches!(op.ea(), Ea::Flat64 | Ea::Flat32) {
        return 0;
    }
    let (Ok(from), Ok(to)) = (
        source(cpu, op, size),
        destination(cpu, op, size, Access::Write),
    ) else {
        return 0;
    };
    let n = in_page(to, size, in_page(from, size, left));
    let bytes = (n * size) as usize;
    if n < 2 {
        return 0;
    }
    let (Some(source), Some((target, flag))) =
        (cpu.tlb.read_hit(from, bytes), cpu.tlb.write_hit(to, bytes))
    else {
        return 0;
    };
    // A forward copy onto what is still to be read repeats its beginning; that is done element by element.
    let ahead = (target as usize).wrapping_sub(source as usize);
    if ahead < bytes && ahead != 0 {
        return 0;
    }
    // SAFETY: both ranges lie inside pages that the TLB maps to live host memory. They may overlap, with the target first.
    unsafe {
        std::ptr::copy(source, target, bytes);
        if (*flag).load(Ordering::Relaxed) != 0 {
            cpu.note_write(target, bytes);
        }
    }
    let mask = address_mask(op.ea());
    bump(cpu, RSI, n * size, mask);
    bump(cpu, RDI, n * size, mask);
    n
}

/// Fills as many elements as lie in one page. Returns how many: 0 when it must be done singly.
fn fill_stretch<T: Arith>(cpu: &mut Cpu, op: &Op, left: u64) -> u64 {
    let size = size_of::<T>() as u64;
    if cpu.system_flag(Rflags::DF) || !matches!(op.ea(), Ea::Flat64 | Ea::Flat32) {
        return 0;
    }
    let Ok(to) = destination(cpu, op, size, Access::Write) else {
        return 0;
    };
    let n = in_page(to, size, left);
    let bytes = (n * size) as usize;
    if n < 2 {
        return 0;
    }
    let Some((target, flag)) = cpu.tlb.write_hit(to, bytes) else {
        return 0;
    };
    let value = T::from_u64(cpu.regs[RAX]);
    let byte = value.to_u64() as u8;
    let uniform = T::from_u64(0x0101_0101_0101_0101u64.wrapping_mul(u64::from(byte))) == value;
    // SAFETY: the range lies inside a page that the TLB maps to live, writable host memory.
    unsafe {
        if uniform {
            std::ptr::write_bytes(target, byte, bytes);
        } else {
            for i in 0..n as usize {
                target.cast::<T>().add(i).write_unaligned(value);
            }
        }
        if (*flag).load(Ordering::Relaxed) != 0 {
            cpu.note_write(target, bytes);
        }
    }
    bump(cpu, RDI, n * size, address_mask(op.ea()));
    n
}

const MOVS: u8 = 0;
const STOS: u8 = 1;
const LODS: u8 = 2;
const CMPS: u8 = 3;
const SCAS: u8 = 4;
const INS: u8 = 5;
const OUTS: u8 = 6;

#[inline(always)]
fn one<T: Arith, const KIND: u8>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    match KIND {
        MOVS => movs::<T>(cpu, op),
        STOS => stos::<T>(cpu, op),
        LODS => lods::<T>(cpu, op),
        CMPS => cmps::<T>(cpu, op),
        SCAS => scas::<T>(cpu, op),
        INS => ins::<T>(cpu, op),
        _ => outs::<T>(cpu, op),
    }
}

fn repeated<T: Arith, const KIND: u8, const EQUAL: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let mask = address_mask(op.ea());
    let mut budget = STRETCH;
    let before = cpu.status;
    loop {
        let left = cpu.regs[RCX] & mask;
        if left == 0 {
            return Ok(());
        }
        let stretch = match KIND {
            MOVS => copy_stretch::<T>(cpu, op, left),
            STOS => fill_stretch::<T>(cpu, op, left),
            _ => 0,
        };
        let n = if stretch == 0 {
            if let Err(fault) = one::<T, KIND>(cpu, op) {
                // A fault finds the flags as they were before the instruction, whatever has been compared; on AMD's
                // processors as the last comparison left them.
                if !cpu.mode.contains(Mode::AMD) {
                    cpu.status = before;
                }
                return Err(fault);
            }
            1
        } else {
            stretch
        };
        set_counted(cpu, RCX, left - n, mask);
        if left == n || (KIND == CMPS || KIND == SCAS) && cpu.status.zero() != EQUAL {
            return Ok(());
        }
        budget = budget.saturating_sub(n);
        let stop = budget == 0 || cpu.leave_block || KIND >= INS;
        if (stop && cpu.shared.mailbox.has_events()) || budget == 0 {
            cpu.rip = cpu.rip_of(op);
            return Ok(());
        }
    }
}

fn handler_of<T: Arith, const KIND: u8>(repeat: Repeat) -> Handler {
    match repeat {
        Repeat::Once if KIND >= INS => last_instruction(one::<T, KIND>),
        Repeat::Once => instruction(one::<T, KIND>),
        Repeat::Equal => last_instruction(repeated::<T, KIND, true>),
        Repeat::NotEqual => last_instruction(repeated::<T, KIND, false>),
    }
}

/// The handler of a string instruction on elements of a size.
pub(crate) fn handler<T: Arith>(mnemonic: iced_x86::Mnemonic, repeat: Repeat) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    Some(match mnemonic {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => handler_of::<T, MOVS>(repeat),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => handler_of::<T, STOS>(repeat),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => handler_of::<T, LODS>(repeat),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => handler_of::<T, CMPS>(repeat),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => handler_of::<T, SCAS>(repeat),
        M::Insb | M::Insw | M::Insd => handler_of::<T, INS>(repeat),
        M::Outsb | M::Outsw | M::Outsd => handler_of::<T, OUTS>(repeat),
        _ => return None,
    })
}
