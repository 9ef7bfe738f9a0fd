//! Entering and leaving translated code, and the ways from it to Rust.

use std::mem::offset_of;

use super::code::{READ, WRITE};
use super::emit::{
    Asm, Opcode, R14, R15, RAX, RBP, RBX, RCX, RDI, RSI, RSP, Rm, hot, mem, op, op64,
};
use super::fpu;
use super::hot::{EPOCH, OpPlace, at};
use super::memory::CodeMemory;
use super::registers::{Place, place};
use super::runtime::{self, exit};
use crate::mmu::{DATA_ENTRIES, DataEntry, RECENT_PAGES, SLOT_ROTATION, way};

/// Addresses of the common pieces of code.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stubs {
    /// `extern "sysv64" fn(*mut Cpu, code) -> u32`.
    pub(crate) enter: u64,
    /// Leaves; `Cpu::rip` is set.
    pub(crate) exit: u64,
    /// Leaves at a link whose number is in R15.
    pub(crate) link: u64,
    /// Called: puts the x87 unit into the host's, for the operation whose number is in R15.
    pub(crate) load_x87: u64,
    /// Called, by the number of a recent page, to read or to write: R14 is a distance from the page, and becomes the address;
    /// the page becomes that of the address, if it is in the translation buffer with this right. R14 is then a distance again,
    /// or too large a number. Changes flags and R15, which, but for
    /// the supervisor's stack, is the place of the operation in the table of [`OpPlace`].
    pub(crate) find: [[u64; 2]; RECENT_PAGES],
    /// Called: executes the operation whose number is in R15 in the middle of a block.
    pub(crate) run_op: u64,
    /// Executes the last operation of a block, whose number is in R15.
    pub(crate) run_last: u64,
    /// A store has hit a watched page, whose flag R15 points to; `Cpu::rip` is set.
    pub(crate) wrote: u64,
    /// Goes on at the address in R14.
    pub(crate) lookup: u64,
}

const fn np(byte: u8) -> Opcode {
    Opcode { map: 1, ..op(byte) }
}

struct Builder<'a> {
    asm: &'a mut Asm,
    wide: bool,
}

impl Builder<'_> {
    /// Vector registers to or from the state, with the host's stack pointer `shift` below it.
    fn vectors(&mut self, shift: i32, save: bool) {
        let byte = if save { 0x29 } else { 0x28 };
        for n in 0..16u8 {
            let place = hot(shift + at::YMM + 32 * i32::from(n));
            if self.wide {
                self.asm.vex(0, 1, false, true, byte, n, 0, place);
            } else {
                self.asm.ins(np(byte), n, place);
            }
        }
        if save && self.wide {
            self.asm.bytes.extend_from_slice(&[0xc5, 0xf8, 0x77]);
        }
    }

    /// Puts all guest state into memory; R15 and the stack pointer are kept.
    fn save(&mut self, shift: i32) {
        self.asm.store(hot(shift + at::REGS), RAX);
        // LAHF, SETO AL: as the interpreter keeps them.
        self.asm.u8(0x9f);
        self.asm.bytes.extend_from_slice(&[0x0f, 0x90, 0xc0]);
        let word = Opcode {
            p66: true,
            ..op(0x89)
        };
        self.asm.ins(word, RAX, hot(shift + at::STATUS));
        for n in 1..16 {
            let to = hot(shift + at::REGS + 8 * i32::from(n));
            match place(n) {
                Place::Host(reg) => self.asm.store(to, reg),
                Place::Frame(from) => {
                    self.asm.load(R14, hot(shift + from));
                    self.asm.store(to, R14);
                }
            }
        }
        self.vectors(shift, true);
        // STMXCSR, and LDMXCSR of the host's.
        self.asm.ins(np(0xae), 3, hot(shift + at::MXCSR));
        self.asm.ins(np(0xae), 2, hot(shift + at::HOST_MXCSR));
    }

    /// Takes all guest state out of memory.
    fn load(&mut self, shift: i32) {
        self.asm.ins(np(0xae), 2, hot(shift + at::MXCSR));
        self.vectors(shift, false);
        self.asm.ins(np(0xb7), RAX, hot(shift + at::STATUS));
        // ADD AL, 127; SAHF.
        self.asm.bytes.extend_from_slice(&[0x04, 0x7f, 0x9e]);
        for n in 0..16 {
            let from = hot(shift + at::REGS + 8 * i32::from(n));
            match place(n) {
                Place::Host(reg) => self.asm.load(reg, from),
                Place::Frame(to) => {
                    self.asm.load(R14, from);
                    self.asm.store(hot(shift + to), R14);
                }
            }
        }
    }

    fn call_rust(&mut self, function: usize) {
        self.asm.mov_u64(RAX, function as u64);
        self.asm.ins(op(0xff), 2, Rm::Reg(RAX));
    }

    /// Back to who entered, with EAX.
    fn leave(&mut self) {
        self.asm.load(RSP, hot(at::HOST_RSP));
        for reg in [15u8, 14, 13, 12] {
            self.asm.u8(0x41);
            self.asm.u8(0x58 + (reg & 7));
        }
        self.asm.u8(0x58 + RBP);
        self.asm.u8(0x58 + RBX);
        self.asm.u8(0xc3);
    }

    fn enter(&mut self) {
        self.asm.u8(0x50 + RBX);
        self.asm.u8(0x50 + RBP);
        for reg in [12u8, 13, 14, 15] {
            self.asm.u8(0x41);
            self.asm.u8(0x50 + (reg & 7));
        }
        self.asm.store(mem(RDI, at::HOST_RSP), RSP);
        self.asm.mov(RSP, RDI);
        self.asm.store(hot(at::SAVED_REGISTER), RSI);
        self.load(0);
        self.asm.ins(op(0xff), 4, hot(at::SAVED_REGISTER));
    }

    fn exit_with(&mut self, code: u32) {
        self.save(0);
        self.asm.mov_u32(RAX, code);
        self.leave();
    }

    fn link(&mut self) {
        self.save(0);
        self.asm.ins(op(0x8b), RAX, Rm::Reg(R15));
        self.asm.ins(op(0xc1), 4, Rm::Reg(RAX));
        self.asm.u8(8);
        self.asm.ins(op(0x83), 1, Rm::Reg(RAX));
        self.asm.u8(exit::LINK as u8);
        self.leave();
    }

    /// `call`ed, so that the stack pointer is one word below the state: calls a function that takes the state and the number
    /// in R15, and goes on when it gives zero.
    fn call_and_go_on(&mut self, function: usize) {
        self.save(8);
        self.asm.lea(RDI, hot(8));
        self.asm.ins(op(0x8b), RSI, Rm::Reg(R15));
        self.asm.alu_i(5, RSP, 8);
        self.call_rust(function);
        self.asm.alu_i(0, RSP, 8);
        self.asm.ins(op(0x85), RAX, Rm::Reg(RAX));
        let stop = self.asm.label();
        self.asm.jcc(super::emit::cc::NE, stop);
        self.load(8);
        self.asm.u8(0xc3);
        self.asm.bind(stop);
        self.asm.alu_i(0, RSP, 8);
        self.leave();
    }

    fn run_last(&mut self, lookup: u64) {
        self.save(0);
        self.asm.mov(RDI, RSP);
        self.asm.ins(op(0x8b), RSI, Rm::Reg(R15));
        self.call_rust(runtime::run_last as *const () as usize);
        self.asm.ins(op(0x85), RAX, Rm::Reg(RAX));
        let stop = self.asm.label();
        self.asm.jcc(super::emit::cc::NE, stop);
        self.load(0);
        self.asm.load(R14, hot(at::RIP));
        self.asm.jmp(lookup);
        self.asm.bind(stop);
        self.leave();
    }

    fn find(&mut self, recent: i32, right: i32) {
        // One word below the state.
        let at = |place: i32| hot(8 + place);
        self.asm.ins(op64(0x03), R14, at(recent + right));
        self.asm.store(at(at::SAVED_ADDRESS), R14);
        if recent != at::recent(way::SUPERVISOR_STACK) {
            self.count_miss();
            self.asm.load(R14, at(at::SAVED_ADDRESS));
        }
        self.asm.mov(R15, R14);
        self.asm.ins(op64(0xc1), 1, Rm::Reg(R15));
        self.asm.u8(SLOT_ROTATION as u8);
        self.asm.ins(op64(0x33), R15, Rm::Reg(R14));
        self.asm.ins(op64(0xc1), 5, Rm::Reg(R15));
        self.asm.u8(7);
        self.asm.ins(op(0x81), 4, Rm::Reg(R15));
        self.asm.i32(((DATA_ENTRIES - 1) << 5) as i32);
        self.asm.ins(op64(0x03), R15, at(at::TLB));
        self.asm.ins(op64(0x2b), R14, mem(R15, right));
        self.asm.alu_i(7, R14, 4095);
        let other = self.asm.label();
        self.asm.jcc(super::emit::cc::A, other);
        for word in (0..size_of::<DataEntry>() as i32).step_by(8) {
            self.asm.load(R14, mem(R15, word));
            self.asm.store(at(recent + word), R14);
        }
        self.asm.load(R14, at(at::SAVED_ADDRESS));
        self.asm.ins(op64(0x2b), R14, at(recent + right));
        self.asm.bind(other);
        self.asm.u8(0xc3);
    }

    /// Counts a miss of the operation whose [`OpPlace`] is R15 bytes into the table; names it when there are too many for the
    /// time. Uses R14.
    fn count_miss(&mut self) {
        const EPOCH_AT: i32 = offset_of!(OpPlace, epoch) as i32;
        const MISSES_AT: i32 = offset_of!(OpPlace, misses) as i32;
        let word = |byte| Opcode {
            p66: true,
            ..op(byte)
        };
        let (same, done) = (self.asm.label(), self.asm.label());
        self.asm.ins(op64(0x03), R15, hot(8 + at::PLACES));
        self.asm.load(R14, hot(8 + at::INSTRUCTIONS));
        self.asm.ins(op64(0xc1), 5, Rm::Reg(R14));
        self.asm.u8(EPOCH);
        self.asm.ins(word(0x3b), R14, mem(R15, EPOCH_AT));
        self.asm.jcc(super::emit::cc::E, same);
        self.asm.ins(word(0x89), R14, mem(R15, EPOCH_AT));
        self.asm.ins(op(0xc6), 0, mem(R15, MISSES_AT));
        self.asm.u8(0);
        self.asm.jmp_label(done);
        self.asm.bind(same);
        // INC, which gives zero after 255.
        self.asm.ins(op(0xfe), 0, mem(R15, MISSES_AT));
        self.asm.jcc(super::emit::cc::NE, done);
        self.asm.store(hot(8 + at::SCATTERED), R15);
        self.asm.bind(done);
    }

    fn wrote(&mut self) {
        self.save(0);
        self.asm.mov(RDI, RSP);
        self.asm.mov(RSI, R15);
        self.call_rust(runtime::wrote as *const () as usize);
        self.leave();
    }
}

/// `JRCXZ` over the next `distance` bytes.
pub(crate) fn jrcxz(asm: &mut Asm, distance: u8) {
    asm.u8(0xe3);
    asm.u8(distance);
}

/// True when the host has RORX, which shifts without a change of flags.
pub(crate) fn has_rorx() -> bool {
    std::arch::is_x86_feature_detected!("bmi2")
}

/// Goes to the translated code of the address in R14, or, when there is none, to `miss` with `Cpu::rip` set. Flags are kept.
pub(crate) fn lookup(asm: &mut Asm, has_rorx: bool, miss: impl FnOnce(&mut Asm)) {
    asm.store(hot(at::SAVED_ADDRESS), R14);
    asm.store(hot(at::SAVED_REGISTER), RCX);
    asm.load(RCX, hot(at::KEY));
    asm.lea(R14, Rm::Mem(Some(R14), Some((RCX, 0)), 0));
    if has_rorx {
        asm.vex(3, 3, true, false, 0xf0, R15, 0, Rm::Reg(R14));
        asm.u8(16);
        asm.lea(R15, Rm::Mem(Some(R15), Some((R14, 0)), 0));
        asm.ins(np(0xb7), R15, Rm::Reg(R15));
    } else {
        asm.ins(np(0xb7), R15, Rm::Reg(R14));
    }
    asm.load(RCX, hot(at::JUMPS));
    asm.lea(R15, Rm::Mem(Some(R15), Some((R15, 0)), 0));
    asm.lea(R15, Rm::Mem(Some(RCX), Some((R15, 3)), 0));
    asm.load(RCX, mem(R15, 0));
    asm.lea(RCX, Rm::Mem(Some(RCX), Some((R14, 0)), 0));
    jrcxz(asm, 0);
    let from = asm.len();
    asm.load(RCX, hot(at::SAVED_REGISTER));
    asm.load(R14, hot(at::SAVED_ADDRESS));
    asm.store(hot(at::RIP), R14);
    miss(asm);
    let distance = asm.len() - from;
    asm.bytes[from - 1] = u8::try_from(distance).expect("a short way out");
    asm.load(RCX, hot(at::SAVED_REGISTER));
    asm.load(R14, hot(at::SAVED_ADDRESS));
    asm.ins(op(0xff), 4, mem(R15, super::jumps::CODE));
}

/// Puts the common code at the start of the cache.
pub(crate) fn build(asm: &mut Asm, memory: &mut CodeMemory) -> Stubs {
    let has_rorx = has_rorx();
    let wide = std::arch::is_x86_feature_detected!("avx");
    let mut stubs = Stubs {
        enter: 0,
        exit: 0,
        link: 0,
        load_x87: 0,
        find: [[0; 2]; RECENT_PAGES],
        run_op: 0,
        run_last: 0,
        wrote: 0,
        lookup: 0,
    };
    let mut piece = |emit: &dyn Fn(&mut Builder)| {
        let start = memory.next();
        asm.start(start);
        emit(&mut Builder { asm, wide });
        asm.finish();
        memory.append(&asm.bytes);
        start
    };
    stubs.enter = piece(&|b| b.enter());
    stubs.exit = piece(&|b| b.exit_with(exit::NEXT));
    stubs.link = piece(&|b| b.link());
    stubs.run_op = piece(&|b| b.call_and_go_on(runtime::run_op as *const () as usize));
    stubs.load_x87 = piece(&|b| b.call_and_go_on(fpu::load as *const () as usize));
    for (number, find) in stubs.find.iter_mut().enumerate() {
        *find = [READ, WRITE].map(|right| piece(&|b| b.find(at::recent(number), right)));
    }
    let exit = stubs.exit;
    stubs.lookup = piece(&|b| lookup(b.asm, has_rorx, |asm| asm.jmp(exit)));
    let lookup = stubs.lookup;
    stubs.run_last = piece(&|b| b.run_last(lookup));
    stubs.wrote = piece(&|b| b.wrote());
    stubs
}
