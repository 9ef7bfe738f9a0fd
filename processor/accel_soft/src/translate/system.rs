//! What kernels do all the time with the system's part of the state: CLI, STI, CLD, PUSHFQ, SWAPGS and fences.

use iced_x86::{Code, Instruction, Mnemonic as M};

use super::branch::usual;
use super::code::{At, Compiler};
use super::cold::Target;
use super::emit::{Label, R14, R15, Reg, Rm, cc, hot, mem, op};
use super::hot::at;
use crate::cpu::{Mode, STATUS};

/// The interrupt and the direction flag in the second byte of RFLAGS.
const IF: u8 = 2;
const DF: u8 = 4;
/// What PUSHF gives as zero: RF and VM.
const NOT_PUSHED: i32 = 3 << 16;

/// True for what [`Compiler::system`] does in this mode.
pub(crate) fn is_system(i: &Instruction, mode: Mode) -> bool {
    let kernel = mode.is_64bit() && !mode.contains(Mode::USER);
    match i.mnemonic() {
        M::Cld | M::Lfence | M::Mfence | M::Sfence => true,
        M::Cli | M::Sti | M::Swapgs => kernel,
        M::Pushfq => i.code() == Code::Pushfq && mode.is_64bit(),
        _ => false,
    }
}

impl Compiler<'_> {
    /// The instruction. False: it can't be done here.
    pub(crate) fn system(&mut self, at: At, last: bool) -> bool {
        match at.i.mnemonic() {
            M::Lfence | M::Mfence | M::Sfence => {
                let bytes = self.own_bytes(at.k);
                self.asm.bytes.extend_from_slice(bytes);
            }
            M::Cld => {
                self.keep_flags(usual(at));
                self.clear_system_flag(DF);
                self.restore_flags(usual(at));
            }
            // What follows may have to go to the interpreter, which ends the block with it.
            _ if !last => return false,
            M::Cli => {
                self.privileged(at);
                self.clear_system_flag(IF);
                self.restore_flags(usual(at));
            }
            M::Sti => self.sti(at),
            M::Swapgs => self.swapgs(at),
            _ => self.pushfq(at),
        }
        true
    }

    /// Compares a byte of the state. Changes flags.
    fn compare_byte(&mut self, place: i32, with: u8) {
        self.asm.ins(op(0x80), 7, hot(place));
        self.asm.u8(with);
    }

    /// Keeps the flags that matter, and leaves the instruction to the interpreter unless the privilege level is 0. Gives the
    /// way there.
    fn privileged(&mut self, at: At) -> Label {
        let slow = self.asm.label();
        self.keep_flags(usual(at));
        self.compare_byte(at::CPL, 0);
        self.asm.jcc(cc::NE, slow);
        self.missed(at, slow, 0);
        slow
    }

    fn clear_system_flag(&mut self, flag: u8) {
        self.asm.ins(op(0x80), 4, hot(at::SYSTEM_FLAGS + 1));
        self.asm.u8(!flag);
    }

    /// The interpreter does it when an interrupt may wait. The shadow stays until somebody looks for interrupts again, and then
    /// lets one instruction go first, which need not be the next one.
    fn sti(&mut self, at: At) {
        let (slow, done) = (self.privileged(at), self.asm.label());
        self.asm.ins(op(0xf6), 0, hot(at::SYSTEM_FLAGS + 1));
        self.asm.u8(IF);
        self.asm.jcc(cc::NE, done);
        self.compare_byte(at::HELD_BACK, 0);
        self.asm.jcc(cc::NE, slow);
        self.asm.ins(op(0x80), 1, hot(at::SYSTEM_FLAGS + 1));
        self.asm.u8(IF);
        self.asm.ins(op(0xc6), 0, hot(at::STI_SHADOW));
        self.asm.u8(1);
        self.asm.bind(done);
        self.restore_flags(usual(at));
    }

    fn swapgs(&mut self, at: At) {
        self.privileged(at);
        self.asm.load(R14, hot(at::GS_BASE));
        self.asm.load(R15, hot(at::KERNEL_GS_BASE));
        self.asm.store(hot(at::KERNEL_GS_BASE), R14);
        self.asm.store(hot(at::GS_BASE), R15);
        self.asm.store(hot(at::GS_SEGMENT_BASE), R15);
        self.restore_flags(usual(at));
    }

    fn pushfq(&mut self, at: At) {
        // PUSHFQ; POP R14: there is a word free below the state.
        self.asm.bytes.extend_from_slice(&[0x9c, 0x41, 0x5e]);
        self.asm.store(hot(at::SAVED_ENTRY), R14);
        let kept = usual(at);
        let slow = self.slot_to_push(at, kept);
        self.missed(at, slow, 0);
        self.asm.load(R15, hot(at::SAVED_ENTRY));
        self.and(R15, STATUS as i32);
        self.asm
            .ins(super::emit::op64(0x0b), R15, hot(at::SYSTEM_FLAGS));
        self.and(R15, !NOT_PUSHED);
        self.asm.store(mem(R14, 0), R15);
        self.move_stack(-8);
        let next = Target::Page(self.next_place(at));
        self.look_at_watch(at, self.via_stack(), kept, next);
        self.restore_flags(kept);
    }

    fn and(&mut self, reg: Reg, mask: i32) {
        self.asm.ins(super::emit::op64(0x81), 4, Rm::Reg(reg));
        self.asm.i32(mask);
    }
}
