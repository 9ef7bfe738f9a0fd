//! What the fast handlers are made of.
//!
//! A fast handler does the usual case without calling anything, so that it needs no stack frame and its last call is a
//! jump; whatever is unusual (a TLB miss, a segment to check, a fault, a write to a page that somebody watches) goes to a
//! second, cold handler that does the whole instruction anew by the general functions of [`Cpu`].

use std::sync::atomic::{AtomicU8, Ordering};

use crate::cpu::{Cpu, Ea, FLAT, Flow, Op, Result, Value, ZERO, fault, gpr, leave};

/// Goes on to the next operation.
#[inline(always)]
pub(crate) fn next(cpu: &mut Cpu, op: *const Op) -> Flow {
    // SAFETY: every block ends in an operation that does not go on, so there is one after this.
    unsafe { ((*op.add(1)).handler)(cpu, op.add(1)) }
}

/// The operation behind the pointer.
#[inline(always)]
pub(crate) fn at<'a>(op: *const Op) -> &'a Op {
    // SAFETY: handlers are only called with operations of live blocks, which stay unchanged while they run.
    unsafe { &*op }
}

/// Ends a cold handler.
#[inline(always)]
pub(crate) fn done(cpu: &mut Cpu, op: *const Op, result: Result<()>) -> Flow {
    if result.is_err() {
        return fault(cpu, op);
    }
    if cpu.leave_block {
        return leave(cpu, op);
    }
    next(cpu, op)
}

/// Ends a cold handler of a branch: `Cpu::rip` is set.
#[inline(always)]
pub(crate) fn done_branch(cpu: &mut Cpu, op: *const Op, result: Result<()>) -> Flow {
    cpu.leave_block = false;
    match result {
        Ok(()) => Flow::Next,
        Err(_) => fault(cpu, op),
    }
}

/// The linear address of the memory operand where no check is needed.
#[inline(always)]
fn flat(cpu: &Cpu, op: &Op) -> Option<u64> {
    let base: u64 = cpu.regs.get(op.base);
    let index: u64 = cpu.regs.get(op.index);
    let sum = base
        .wrapping_add(index << (op.scale & 3))
        .wrapping_add(op.disp as u64);
    match op.ea_len & 15 {
        x if x == Ea::Flat64 as u8 => Some(sum.wrapping_add(cpu.bases[(op.seg & 7) as usize])),
        x if x == Ea::Flat32 as u8 => Some(sum & 0xffff_ffff),
        _ => None,
    }
}

/// How a fast handler makes the linear address of its memory operand.
pub(crate) trait Address {
    /// The address, or `None` where a check is needed.
    fn linear(cpu: &Cpu, op: &Op) -> Option<u64>;
}

/// Any kind of operand.
pub(crate) struct AnyAddress;
impl Address for AnyAddress {
    #[inline(always)]
    fn linear(cpu: &Cpu, op: &Op) -> Option<u64> {
        flat(cpu, op)
    }
}

/// A base register and a displacement in 64-bit mode: the most frequent by far.
pub(crate) struct BaseAddress;
impl Address for BaseAddress {
    #[inline(always)]
    fn linear(cpu: &Cpu, op: &Op) -> Option<u64> {
        let base: u64 = cpu.regs.get(op.base);
        Some(base.wrapping_add(op.disp as u64))
    }
}

/// True when [`BaseAddress`] is what the operand needs.
pub(crate) fn is_base_address(op: &Op) -> bool {
    op.ea() == Ea::Flat64 && op.seg >= FLAT && op.index == gpr(ZERO)
}

/// The memory operand, in the usual case.
#[inline(always)]
pub(crate) fn fast_read<T: Value, E: Address>(cpu: &Cpu, op: &Op) -> Option<T> {
    fast_load(cpu, E::linear(cpu, op)?)
}

/// Memory at a linear address, in the usual case.
#[inline(always)]
pub(crate) fn fast_load<T: Value>(cpu: &Cpu, linear: u64) -> Option<T> {
    let host = cpu.tlb.read_hit(linear, size_of::<T>())?;
    // SAFETY: a TLB entry maps its page to host memory that stays mapped as long as the entry is there.
    Some(unsafe { host.cast::<T>().read_unaligned() })
}

/// A place in guest memory that may be read and written.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    host: *mut u8,
    flag: *const AtomicU8,
}

impl Place {
    /// What is there.
    #[inline(always)]
    pub(crate) fn get<T: Value>(self) -> T {
        // SAFETY: as in `fast_load`.
        unsafe { self.host.cast::<T>().read_unaligned() }
    }

    /// Writes, and looks whether somebody watches the page: true then, and [`stored`] must follow.
    #[inline(always)]
    #[must_use]
    pub(crate) fn put<T: Value>(self, value: T) -> bool {
        // SAFETY: as in `fast_load`; the entry allows writing. The flag lives as long as the memory.
        unsafe {
            self.host.cast::<T>().write_unaligned(value);
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
            (*self.flag).load(Ordering::Relaxed) != 0
        }
    }
}

/// The memory operand as a place to write, in the usual case.
#[inline(always)]
pub(crate) fn fast_place<T: Value, E: Address>(cpu: &Cpu, op: &Op) -> Option<Place> {
    place_at::<T>(cpu, E::linear(cpu, op)?)
}

/// A linear address as a place to write, in the usual case.
#[inline(always)]
pub(crate) fn place_at<T: Value>(cpu: &Cpu, linear: u64) -> Option<Place> {
    let (host, flag) = cpu.tlb.write_hit(linear, size_of::<T>())?;
    Some(Place { host, flag })
}

/// Ends an instruction that has written to a page that somebody watches, after everything else is done.
#[cold]
#[inline(never)]
pub(crate) fn stored(cpu: &mut Cpu, op: *const Op, place: Place) -> Flow {
    cpu.note_write(place.host, 8);
    leave(cpu, op)
}

/// As [`stored`], for an instruction that ends its block and has set `Cpu::rip`.
#[cold]
#[inline(never)]
pub(crate) fn stored_branch(cpu: &mut Cpu, place: Place) -> Flow {
    cpu.note_write(place.host, 8);
    cpu.leave_block = false;
    Flow::Next
}
