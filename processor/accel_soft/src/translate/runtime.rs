//! What translated code calls.

use super::fpu;
use super::hot::OpPlace;
use crate::cpu::{BLOCK_RIP, Cpu, Ea, Exception, FLAT, Flow, Op, ZERO, gpr};

/// Why translated code was left: the low byte of what it gives. A link's number stands above.
pub(crate) mod exit {
    /// Go on at `Cpu::rip`.
    pub(crate) const NEXT: u32 = 1;
    /// `Cpu::exception` is to be delivered; `Cpu::rip` is that of the instruction.
    pub(crate) const FAULT: u32 = 2;
    /// A direct jump leads to a place that is not linked yet.
    pub(crate) const LINK: u32 = 3;
    /// A direct jump to another page has found code at `Cpu::rip`, which it can be linked to.
    pub(crate) const FAR_LINK: u32 = 4;
}

/// Ends a copied operation: the instruction is done and nothing has happened.
fn stop(_: &mut Cpu, _: *const Op) -> Flow {
    Flow::Next
}

/// The operation of this number, with RIP known to the interpreter.
fn operation(cpu: &mut Cpu, index: u32) -> (*const Op, OpPlace) {
    let at = index as usize;
    // SAFETY: translated code only holds numbers of operations of the cache that the gate's tables are of, and both are
    // emptied together.
    let (op, place) = unsafe { (cpu.gate.ops.add(at), *cpu.gate.places.add(at)) };
    cpu.regs[BLOCK_RIP] = cpu.hot.page.wrapping_add(u64::from(place.start)) & cpu.rip_mask;
    (op, place)
}

/// `rest` instructions of the block behind the operation are not executed, if it was left.
fn settle(cpu: &mut Cpu, op: &Op, flow: Flow, rest: u64) {
    if flow != Flow::Next {
        cpu.instructions -= rest;
    }
    if flow == Flow::Fault {
        cpu.instructions -= 1;
        cpu.leave_block = false;
        if cpu.exception != Exception::Resume {
            cpu.rip = cpu.rip_of(op);
        }
    }
}

/// Translated code is left before this operation.
pub(crate) fn stop_before(cpu: &mut Cpu, index: u32) {
    let (op, place) = operation(cpu, index);
    cpu.instructions -= u64::from(place.rest) + 1;
    // SAFETY: a live operation.
    cpu.rip = cpu.rip_of(unsafe { &*op });
}

/// Executes an operation in the middle of a block by the interpreter. Zero: go on behind it.
///
/// # Safety
/// `cpu` is the vCPU that translated code runs for, with its registers in memory; `index` is of an operation of the
/// running block.
pub(crate) unsafe extern "sysv64" fn run_op(cpu: *mut Cpu, index: u32) -> u32 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    let (at, place) = operation(cpu, index);
    let rest = u64::from(place.rest);
    let unit_live = cpu.x87_live && place.x87;
    if unit_live {
        fpu::leave(cpu);
    }
    let alone = [
        // SAFETY: a live operation, which is plain data.
        unsafe { at.read() },
        Op {
            handler: stop,
            imm: 0,
            disp: 0,
            a: 0,
            b: 0,
            c: 0,
            base: gpr(ZERO),
            index: gpr(ZERO),
            scale: 0,
            seg: FLAT,
            ea_len: Ea::None as u8,
            next: 0,
            code: 0,
        },
    ];
    let flow = (alone[0].handler)(cpu, alone.as_ptr());
    settle(cpu, &alone[0], flow, rest);
    let unit_back = !unit_live || fpu::enter(cpu);
    match flow {
        Flow::Next if unit_back && goes_on(cpu) => 0,
        Flow::Next => {
            cpu.instructions -= rest;
            cpu.rip = cpu.next_rip(&alone[0]);
            exit::NEXT
        }
        Flow::Left => exit::NEXT,
        Flow::Fault => exit::FAULT,
    }
}

/// True when translated code of the same block may go on.
fn goes_on(cpu: &mut Cpu) -> bool {
    let same = cpu.gate.key_of == (cpu.mode.bits(), cpu.tlb.version);
    same && super::vectors_are_masked(cpu) && cpu.settle_attention()
}

/// Executes the last operation of a block by the interpreter; it sets `Cpu::rip`. Zero: go on there.
///
/// # Safety
/// As [`run_op`].
pub(crate) unsafe extern "sysv64" fn run_last(cpu: *mut Cpu, index: u32) -> u32 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    let (op, place) = operation(cpu, index);
    let rest = u64::from(place.rest);
    if place.x87 {
        fpu::leave(cpu);
    }
    // SAFETY: a live operation; the one behind it ends its block.
    let flow = unsafe { ((*op).handler)(cpu, op) };
    // SAFETY: as above.
    settle(cpu, unsafe { &*op }, flow, rest);
    if flow == Flow::Fault {
        return exit::FAULT;
    }
    if flow != Flow::Next || !cpu.settle_attention() || !super::vectors_are_masked(cpu) {
        return exit::NEXT;
    }
    let of = (cpu.mode.bits(), cpu.tlb.version);
    if cpu.gate.key_of != of {
        if !super::is_for(cpu.mode) {
            return exit::NEXT;
        }
        // SAFETY: set by who entered translated code, which waits for its end.
        let Some(key) = (unsafe { (*cpu.gate.jumps).key(of) }) else {
            return exit::NEXT;
        };
        (cpu.gate.key_of, cpu.hot.key) = (of, key);
    }
    0
}

/// A store has hit a page that somebody watches, whose flag byte this is; `Cpu::rip` is set.
///
/// # Safety
/// As [`run_op`]; `flag` came from the entry of the translation buffer.
pub(crate) unsafe extern "sysv64" fn wrote(cpu: *mut Cpu, flag: *const u8) -> u32 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    cpu.note_write_by_flag(flag);
    cpu.leave_block = false;
    exit::NEXT
}
