//! Instructions that are executed as they are, with other registers and another place for their memory operand.

use iced_x86::{Instruction, Mnemonic as M};

use super::code::{At, Compiler, Kept, Via};
use super::cold::{Cold, Rejoin, Target};
use super::emit::{Opcode, R14, R15, Reg, Rm, hot, mem};
use super::encoding::Encoding;
use super::flags;
use super::hot::at;
use super::registers::{Place, place};
use super::shape::{Memory, Shape};
use crate::cpu::FLAT;

/// A register that an encoding names, in the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    /// Not a general register, or one that is in its place.
    Kept(u8),
    /// Another number.
    Other(Reg),
    /// In memory; this temporary stands for it.
    Spilled(i32, Reg),
    /// AH, CH, DH or BH.
    High(u8),
}

impl Named {
    fn number(self) -> Reg {
        match self {
            Self::Kept(n) | Self::Other(n) | Self::High(n) | Self::Spilled(_, n) => n,
        }
    }
}

/// Names a register of an encoding. `temporaries` are taken from the end; `None` when there are none left.
fn name(
    number: u8,
    general: bool,
    high: bool,
    temporaries: &mut Vec<Reg>,
    taken: &mut Vec<(i32, Reg)>,
) -> Option<Named> {
    if !general {
        return Some(Named::Kept(number));
    }
    if high && (4..8).contains(&number) {
        return Some(Named::High(number));
    }
    Some(match place(number) {
        Place::Host(reg) if reg == number => Named::Kept(reg),
        Place::Host(reg) => Named::Other(reg),
        Place::Frame(at) => {
            if let Some((_, reg)) = taken.iter().find(|(a, _)| *a == at) {
                return Some(Named::Spilled(at, *reg));
            }
            let reg = temporaries.pop()?;
            taken.push((at, reg));
            Named::Spilled(at, reg)
        }
    })
}

/// True when the instruction leaves all its register operands as they are.
fn only_reads(m: M) -> bool {
    matches!(m, M::Cmp | M::Test | M::Bt)
}

impl Compiler<'_> {
    /// Executes the instruction as it is. False: it can't be done that way.
    pub(crate) fn native(&mut self, at: At, e: &Encoding, s: &Shape, bytes: &[u8]) -> bool {
        if super::shape::is_x87(at.i) {
            self.need_x87(at);
        }
        match s.memory {
            Memory::None => self.on_registers(at, e, s, bytes),
            _ => self.on_memory(at, e, s, bytes),
        }
    }

    /// LEA.
    pub(crate) fn lea(&mut self, at: At, e: &Encoding) -> bool {
        if e.p66 {
            return false;
        }
        let to = place(at.i.op0_register().number() as u8);
        let reg = match to {
            Place::Host(reg) => reg,
            Place::Frame(_) => R14,
        };
        if !self.effective_address(at, R14) {
            return false;
        }
        self.keeps_held = !both_in_memory(at.i);
        // A 32-bit result of a 64-bit address.
        if reg != R14 || !e.w() {
            let byte = if e.w() {
                super::emit::op64(0x8b)
            } else {
                super::emit::op(0x8b)
            };
            self.asm.ins(byte, reg, Rm::Reg(R14));
        }
        if let Place::Frame(at) = to {
            self.asm.store(hot(at), R14);
        }
        true
    }

    fn on_registers(&mut self, at: At, e: &Encoding, s: &Shape, bytes: &[u8]) -> bool {
        let mut temporaries = vec![R15, R14];
        let mut taken = Vec::new();
        let opcode_register = s.opcode;
        let mut named = |number, general, byte: bool| {
            let high = byte && e.rex == 0;
            name(number, general, high, &mut temporaries, &mut taken)
        };
        let (reg, rm, second, opcode) = (
            if s.modrm {
                named(e.reg(), s.reg, s.reg_byte)
            } else {
                Some(Named::Kept(0))
            },
            if s.modrm {
                named(e.rm(), s.rm, s.rm_byte)
            } else {
                Some(Named::Kept(0))
            },
            match e.vex {
                Some(v) => named(v.second, s.second, false),
                None => Some(Named::Kept(0)),
            },
            if opcode_register {
                named(e.opcode_register(), true, s.opcode_byte)
            } else {
                Some(Named::Kept(0))
            },
        );
        let (Some(reg), Some(rm), Some(second), Some(opcode)) = (reg, rm, second, opcode) else {
            return false;
        };
        let all = [reg, rm, second, opcode];
        let same = all
            .iter()
            .all(|n| matches!(n, Named::Kept(_) | Named::High(_)));
        if same && !is_short_inc(e, self.code64()) && !e.has_odd_prefixes {
            self.keeps_held = !super::shape::is_x87(at.i);
            self.asm.bytes.extend_from_slice(bytes);
            return true;
        }
        if !s.modrm && !opcode_register {
            return false;
        }
        // A REX prefix and a high byte register exclude one another.
        if all.iter().any(|n| matches!(n, Named::High(_)))
            && (e.rex != 0 || all.iter().any(|n| n.number() >= 8))
        {
            return false;
        }
        self.keeps_held = !temporaries.is_empty() && !super::shape::is_x87(at.i);
        for (place, temporary) in &taken {
            self.asm.load(*temporary, hot(*place));
        }
        if opcode_register {
            self.opcode_form(e, opcode.number(), bytes, s.bytes());
        } else {
            self.encode(
                e,
                reg.number(),
                Rm::Reg(rm.number()),
                second.number(),
                bytes,
                s.bytes(),
            );
        }
        if !only_reads(at.i.mnemonic()) {
            for (place, temporary) in &taken {
                self.asm.store(hot(*place), *temporary);
            }
        }
        true
    }

    /// An instruction whose opcode names its register.
    fn opcode_form(&mut self, e: &Encoding, reg: Reg, bytes: &[u8], byte_register: bool) {
        if is_short_inc(e, self.code64()) {
            // INC and DEC of 32-bit code, whose opcodes are REX prefixes in 64-bit code.
            let o = Opcode {
                p66: e.p66,
                ..super::emit::op(0xff)
            };
            self.asm.ins(o, e.byte >> 3 & 1, Rm::Reg(reg));
            return;
        }
        if e.p66 {
            self.asm.u8(0x66);
        }
        let rex = u8::from(e.w()) << 3 | reg >> 3;
        if rex != 0 || byte_register && (e.rex != 0 || reg >= 8) {
            self.asm.u8(0x40 | rex);
        }
        if e.map == 1 {
            self.asm.u8(0x0f);
        }
        self.asm.u8(e.byte & !7 | reg & 7);
        self.asm.bytes.extend_from_slice(&bytes[e.opcode_at + 1..]);
    }

    /// The instruction with these registers and this operand, and its immediate.
    fn encode(
        &mut self,
        e: &Encoding,
        reg: Reg,
        rm: Rm,
        second: Reg,
        bytes: &[u8],
        byte_register: bool,
    ) {
        if let Some(v) = e.vex {
            self.asm.vex(v.pp, e.map, v.w, v.l, e.byte, reg, second, rm);
        } else {
            let o = Opcode {
                p66: e.p66,
                rep: e.rep,
                lock: e.lock,
                w: e.w(),
                rex: byte_register && e.rex != 0,
                map: e.map,
                byte: e.byte,
            };
            self.asm.ins(o, reg, rm);
        }
        self.asm.bytes.extend_from_slice(&bytes[e.immediate_at..]);
    }

    fn on_memory(&mut self, at: At, e: &Encoding, s: &Shape, bytes: &[u8]) -> bool {
        let Some(size) = Self::memory_bytes(at.i) else {
            return false;
        };
        let high = s.reg_byte && e.rex == 0;
        let (mut temporaries, mut taken) = (vec![R15], Vec::new());
        let mut named = |number, general| name(number, general, high, &mut temporaries, &mut taken);
        let reg = named(e.reg(), s.reg);
        let second = match e.vex {
            Some(v) => named(v.second, s.second),
            None => Some(Named::Kept(0)),
        };
        let (Some(reg), Some(second)) = (reg, second) else {
            return false;
        };
        if matches!(reg, Named::High(_)) {
            return false;
        }
        if taken.len() < 2
            && let Some(from) = self.held_access(at)
        {
            // The scratch register is taken: the other one is free.
            let other = |named: Named| match named {
                Named::Spilled(..) => R14,
                named => named.number(),
            };
            let (reg, second) = (other(reg), other(second));
            let taken = taken.first().map(|(place, _)| *place);
            if let Some(place) = taken {
                self.asm.load(R14, hot(place));
            }
            self.encode(e, reg, mem(R15, from), second, bytes, s.bytes());
            if let Some(place) = taken
                && !self.leaves_registers(at, s)
            {
                self.asm.store(hot(place), R14);
            }
            if s.memory != Memory::Read {
                self.stored(at, Target::Page(self.next_place(at)));
            }
            return true;
        }
        let via = self.via(at);
        self.keeps_held = self.held.is_some()
            && via != Via::Buffer
            && at.op.seg >= FLAT
            && taken.is_empty()
            && !both_in_memory(at.i)
            && !super::shape::is_x87(at.i);
        if !self.keeps_held {
            self.held = None;
        }
        if !self.linear_address(at) {
            return false;
        }
        let writes = s.memory != Memory::Read;
        let (slow, back) = (self.asm.label(), self.asm.label());
        let changes = flags::changes(at.i);
        // The flags are there again when the instruction is executed, unless it has nothing to do with them.
        let restored = !writes || changes || at.i.rflags_read() != 0;
        let uses_rax = s.reg && reg.number() == 0 || s.second && second.number() == 0;
        let kept = match (at.live_before, restored || !uses_rax) {
            (false, _) => Kept::Nowhere,
            (true, true) => Kept::InAx,
            (true, false) => Kept::InMemory,
        };
        self.keep_flags(kept);
        if s.align != 0 {
            self.check_alignment(s.align, slow);
        }
        self.translate(at, via, size, writes, slow);
        let rejoin = if self.keeps_held {
            self.rejoin_next(at)
        } else {
            Rejoin::Back(back)
        };
        self.cold.push(Cold::Slow {
            from: slow,
            rejoin,
            op: self.op_number(at),
            kept,
        });
        if restored {
            self.restore_flags(kept);
        }
        let entry_kept = writes && via == Via::Buffer && !taken.is_empty();
        if entry_kept {
            self.asm.store(hot(at::SAVED_ENTRY), R15);
        }
        for (place, temporary) in &taken {
            self.asm.load(*temporary, hot(*place));
        }
        self.encode(
            e,
            reg.number(),
            mem(R14, 0),
            second.number(),
            bytes,
            s.bytes(),
        );
        if !self.leaves_registers(at, s) {
            for (place, temporary) in &taken {
                self.asm.store(hot(*place), *temporary);
            }
        }
        if writes {
            if entry_kept {
                self.asm.load(R15, hot(at::SAVED_ENTRY));
            }
            self.after_store(at, via, kept, restored);
        }
        self.asm.bind(back);
        true
    }

    /// True when an instruction with a memory operand leaves its register operands as they are.
    fn leaves_registers(&self, at: At, s: &Shape) -> bool {
        only_reads(at.i.mnemonic()) || s.memory == Memory::Write
    }

    /// What comes after an instruction that has written to memory. The flags are where they belong when `restored`, else where
    /// they were kept.
    fn after_store(&mut self, at: At, via: Via, kept: Kept, restored: bool) {
        let kept = match (restored, at.live_after) {
            (false, _) => kept,
            (true, true) => Kept::InAx,
            (true, false) => Kept::Nowhere,
        };
        if restored {
            self.keep_flags(kept);
        }
        let next = Target::Page(self.next_place(at));
        self.look_at_watch(at, via, kept, next);
        self.restore_flags(kept);
    }
}

/// True when base and index of the memory operand are both in memory: both temporaries are needed then.
fn both_in_memory(i: &Instruction) -> bool {
    let in_memory =
        |r: iced_x86::Register| r.is_gpr() && matches!(place(r.number() as u8), Place::Frame(_));
    in_memory(i.memory_base()) && in_memory(i.memory_index())
}

/// INC or DEC in the opcodes that are REX prefixes in 64-bit code.
fn is_short_inc(e: &Encoding, code64: bool) -> bool {
    !code64 && e.map == 0 && (0x40..0x50).contains(&e.byte)
}

/// True for XCHG of a register with RAX, and what else names a register in its opcode.
pub(crate) fn is_nop(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Nop
            | M::Reservednop
            | M::Endbr64
            | M::Endbr32
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetch
            | M::Prefetchw
    )
}
