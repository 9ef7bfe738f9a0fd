//! A compiler of blocks: its state, memory operands and the flags around them.
//!
//! A block is translated instruction by instruction. An instruction with a memory operand becomes: the address into R14, a
//! look-up in the translation buffer, which makes it a host address, and the instruction itself with that for its operand.
//! What is unusual goes out of line, where the interpreter does the whole instruction.

use iced_x86::{Instruction, InstructionInfoFactory, OpKind, Register};

use super::cold::{Cold, Target};
use super::emit::{Asm, Label, Opcode, R14, R15, RAX, RCX, Reg, Rm, cc, hot, mem, op, op64};
use super::held::{Access, Held};
use super::hot::at;
use super::liveness::Successors;
use super::registers::{ADDRESS, Place, SCRATCH, place};
use super::stubs::{Stubs, jrcxz};
use crate::cpu::{Ea, FLAT, Mode, Op};
use crate::mmu::{DATA_ENTRIES, SLOT_ROTATION, way};

/// Offsets in an entry of the translation buffer.
pub(super) const READ: i32 = 0;
pub(super) const WRITE: i32 = 8;
const HOST: i32 = 16;
pub(super) const FLAG: i32 = 24;

/// How a host address is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    /// In the translation buffer. R15 is the entry then.
    Buffer,
    /// It is most likely in the page that it was in the last time. The number of that page; R15 is free.
    Recent(usize),
}

/// Where the guest's status flags are while the host's are used for something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// They don't matter.
    Nowhere,
    /// In AX, as LAHF and SETO give them; RAX is in memory.
    InAx,
    /// In memory.
    InMemory,
}

/// A jump that waits for its target to be translated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    /// Where in all code the distance is.
    pub(crate) place: u32,
    /// The target, relative to the page.
    pub(crate) target: i32,
}

/// The state of compiling a block.
pub(crate) struct Compiler<'a> {
    pub(crate) asm: &'a mut Asm,
    pub(crate) stubs: Stubs,
    pub(crate) mode: Mode,
    /// The host has RORX.
    pub(crate) has_rorx: bool,
    /// The x87 unit is in the host's from here on.
    pub(crate) x87_ready: bool,
    /// Flags that matter where the code goes on at a place in the page.
    pub(crate) successors: &'a Successors<'a>,
    /// Place of the block in its page.
    pub(crate) start: i32,
    /// Its instructions.
    pub(crate) count: i32,
    /// Number of its first operation.
    pub(crate) first_op: u32,
    /// Its instructions that go from page to page with their memory operand, by bits.
    pub(crate) scattered: u64,
    pub(crate) cold: Vec<Cold>,
    /// The low bits of the number of its page where it was met first.
    pub(crate) page_number: u8,
    /// The operations of its instructions.
    pub(crate) ops: *const Op,
    /// Its instructions, each with the place of its immediate, and all their bytes.
    pub(crate) instructions: &'a [(Instruction, usize)],
    pub(crate) bytes: &'a [u8],
    /// Which registers instructions change.
    pub(crate) registers: &'a mut InstructionInfoFactory,
    /// Accesses that can share a look-up, by instruction.
    pub(crate) accesses: Vec<Option<Access>>,
    /// What R15 holds.
    pub(crate) held: Option<Held>,
    /// The instruction at hand leaves that.
    pub(crate) keeps_held: bool,
    /// Nobody has looked yet whether the page is watched that was stored to.
    pub(crate) unlooked: bool,
    /// Links: the place of the distance in the code so far, and the target.
    pub(crate) links: Vec<(usize, i32)>,
    /// Number of the first of them.
    pub(crate) first_link: u32,
}

/// The instruction at hand.
#[derive(Clone, Copy)]
pub(crate) struct At<'i> {
    pub(crate) i: &'i Instruction,
    pub(crate) op: &'i Op,
    /// Its number in the block.
    pub(crate) k: usize,
    /// Flags that it or what follows needs.
    pub(crate) live_before: bool,
    /// Flags that what follows needs.
    pub(crate) live_after: bool,
}

impl<'a> Compiler<'a> {
    pub(crate) fn code64(&self) -> bool {
        self.mode.is_64bit()
    }

    /// The operation of an instruction.
    pub(crate) fn op(&self, number: usize) -> &'a Op {
        // SAFETY: a block has as many operations as instructions, and one more, and lives while it is compiled.
        unsafe { &*self.ops.add(number) }
    }

    /// The bytes of an instruction. They were decoded for an address of zero.
    pub(crate) fn own_bytes(&self, number: usize) -> &'a [u8] {
        let i = &self.instructions[number].0;
        &self.bytes[i.ip() as usize..][..i.len()]
    }

    /// An opcode of the size of addresses.
    pub(crate) fn wide(&self, byte: u8) -> Opcode {
        if self.code64() { op64(byte) } else { op(byte) }
    }

    pub(crate) fn op_number(&self, at: At) -> u32 {
        self.first_op + at.k as u32
    }

    /// The place behind the instruction, relative to the page.
    pub(crate) fn next_place(&self, at: At) -> i32 {
        self.start + i32::from(at.op.next)
    }

    /// Keeps the status flags where they are wanted.
    pub(crate) fn keep_flags(&mut self, kept: Kept) {
        if kept == Kept::Nowhere {
            return;
        }
        self.asm.store(hot(at::SAVED_REGISTER), RAX);
        // LAHF, SETO AL.
        self.asm.u8(0x9f);
        self.asm.bytes.extend_from_slice(&[0x0f, 0x90, 0xc0]);
        if kept == Kept::InMemory {
            self.asm.ins(op(0x89), RAX, hot(at::SAVED_FLAGS));
            self.asm.load(RAX, hot(at::SAVED_REGISTER));
        }
    }

    /// Takes them out again. R14 and R15 are kept.
    pub(crate) fn restore_flags(&mut self, kept: Kept) {
        match kept {
            Kept::Nowhere => return,
            Kept::InAx => {}
            Kept::InMemory => {
                self.asm.store(hot(at::SAVED_REGISTER), RAX);
                self.asm.ins(op(0x8b), RAX, hot(at::SAVED_FLAGS));
            }
        }
        // ADD AL, 127; SAHF.
        self.asm.bytes.extend_from_slice(&[0x04, 0x7f, 0x9e]);
        self.asm.load(RAX, hot(at::SAVED_REGISTER));
    }

    /// The guest register in a host register: its own, or `temporary`, loaded.
    fn source(&mut self, guest: Register, temporary: Reg) -> Option<Reg> {
        match place(guest.number() as u8) {
            Place::Host(reg) => Some(reg),
            Place::Frame(at) => {
                self.asm.load(temporary, hot(at));
                Some(temporary)
            }
        }
    }

    /// The effective address of the memory operand, without segment, into `to`. Uses R14 and R15. False: it can't be done.
    pub(crate) fn effective_address(&mut self, at: At, to: Reg) -> bool {
        let i = at.i;
        let (base, index) = (i.memory_base(), i.memory_index());
        if matches!(base, Register::RIP | Register::EIP) {
            let relative = i.ip_rel_memory_address() as i64 + i64::from(self.start);
            let Ok(relative) = i32::try_from(relative) else {
                return false;
            };
            if base == Register::EIP {
                return false;
            }
            self.asm.load(to, hot(at::PAGE));
            self.asm.lea(to, mem(to, relative));
            return true;
        }
        let wide = match at.op.ea() {
            Ea::Flat64 => true,
            Ea::Flat32 | Ea::Long32 => false,
            _ => return false,
        };
        let lea = if wide { op64(0x8d) } else { op(0x8d) };
        let displacement = if wide {
            let d = i.memory_displacement64() as i64;
            match i32::try_from(d) {
                Ok(d) => d,
                Err(_) => return false,
            }
        } else {
            i.memory_displacement64() as u32 as i32
        };
        let base = match base {
            Register::None => None,
            r if r.is_gpr64() || r.is_gpr32() => self.source(r, R14),
            _ => return false,
        };
        let index = match index {
            Register::None => None,
            r if r.is_gpr64() || r.is_gpr32() => {
                let scale = i.memory_index_scale().trailing_zeros() as u8;
                let temporary = if base == Some(R14) { R15 } else { R14 };
                self.source(r, temporary).map(|r| (r, scale))
            }
            _ => return false,
        };
        self.asm.ins(lea, to, Rm::Mem(base, index, displacement));
        true
    }

    /// The linear address of the memory operand into R14. False: it can't be done.
    pub(crate) fn linear_address(&mut self, at: At) -> bool {
        if !self.effective_address(at, ADDRESS) {
            return false;
        }
        if at.op.seg < FLAT {
            self.asm
                .load(SCRATCH, hot(at::BASES + 8 * i32::from(at.op.seg)));
            self.asm
                .lea(ADDRESS, Rm::Mem(Some(ADDRESS), Some((SCRATCH, 0)), 0));
        }
        true
    }

    /// Makes the linear address in R14 a host address, or goes to `slow`. R15 is then the entry. Changes flags.
    pub(crate) fn translate(&mut self, at: At, via: Via, size: u32, write: bool, slow: Label) {
        if let Via::Recent(number) = via {
            return self.translate_recent(at, number, size, write, slow);
        }
        let mask = ((DATA_ENTRIES - 1) << 5) as i32;
        if self.has_rorx {
            self.asm.vex(3, 3, true, false, 0xf0, R15, 0, Rm::Reg(R14));
        } else {
            self.asm.mov(R15, R14);
            self.asm.ins(op64(0xc1), 1, Rm::Reg(R15));
        }
        self.asm.u8(SLOT_ROTATION as u8);
        self.asm.ins(op64(0x33), R15, Rm::Reg(R14));
        self.asm.ins(op64(0xc1), 5, Rm::Reg(R15));
        self.asm.u8(7);
        self.asm.ins(op(0x81), 4, Rm::Reg(R15));
        self.asm.i32(mask);
        self.asm.ins(op64(0x03), R15, hot(at::TLB));
        self.asm
            .ins(op64(0x2b), R14, mem(R15, if write { WRITE } else { READ }));
        self.asm.alu_i(7, R14, 4096 - size as i32);
        self.asm.jcc(cc::A, slow);
        self.asm.ins(op64(0x03), R14, mem(R15, HOST));
    }

    fn translate_recent(&mut self, op: At, number: usize, size: u32, write: bool, slow: Label) {
        let op = self.op_number(op);
        let (other, back) = (self.asm.label(), self.asm.label());
        let recent = at::recent(number);
        let right = if write { WRITE } else { READ };
        self.asm.ins(op64(0x2b), R14, hot(recent + right));
        self.asm.alu_i(7, R14, 4096 - size as i32);
        self.asm.jcc(cc::A, other);
        self.asm.bind(back);
        self.asm.ins(op64(0x03), R14, hot(recent + HOST));
        self.cold.push(Cold::OtherPage {
            from: other,
            back,
            slow,
            size,
            number,
            write,
            op,
            holds: self.held.is_some(),
        });
    }

    /// How the memory operand is best looked up.
    pub(crate) fn via(&self, at: At) -> Via {
        let base = at.i.memory_base();
        let indexed = at.i.memory_index() != Register::None;
        let based = base.is_gpr64() || base.is_gpr32();
        let flat = at.op.seg >= FLAT;
        if !self.mode.contains(Mode::USER) {
            let stack = based && base.number() == 4 && !indexed && flat;
            return if stack { self.via_stack() } else { Via::Buffer };
        }
        if self.scattered >> at.k & 1 != 0 {
            return Via::Buffer;
        }
        match (based, indexed, flat) {
            (true, false, true) => Via::Recent(way::BASE + base.number()),
            (true, true, true) => Via::Recent(way::INDEXED + base.number()),
            (false, false, true) => Via::Recent(way::PLAIN + self.plain_way(at)),
            (false, false, false) => Via::Recent(way::SEGMENT),
            _ => Via::Buffer,
        }
    }

    /// Which of the ways of plain addresses this one takes: by its page, as far as that is known now.
    fn plain_way(&self, at: At) -> usize {
        let page = if at.i.is_ip_rel_memory_operand() {
            let relative = at.i.ip_rel_memory_address().wrapping_add(self.start as u64);
            (relative >> 12).wrapping_add(u64::from(self.page_number))
        } else {
            at.i.memory_displacement64() >> 12
        };
        page as usize % way::PLAIN_WAYS
    }

    /// How the stack is best looked up.
    pub(crate) fn via_stack(&self) -> Via {
        Via::Recent(if self.mode.contains(Mode::USER) {
            way::BASE + 4
        } else {
            way::SUPERVISOR_STACK
        })
    }

    /// Goes to `slow` unless R14 is a multiple of `align`. Changes flags.
    pub(crate) fn check_alignment(&mut self, align: u8, slow: Label) {
        self.asm.ins(
            Opcode {
                rex: true,
                ..op(0xf6)
            },
            0,
            Rm::Reg(R14),
        );
        self.asm.u8(align - 1);
        self.asm.jcc(cc::NE, slow);
    }

    /// After a store, with the entry of a [`Via::Buffer`] in R15: leaves the block if somebody watches the page. Changes flags.
    pub(crate) fn look_at_watch(&mut self, at: At, via: Via, kept: Kept, next: Target) {
        let from = self.asm.label();
        let flag = match via {
            Via::Buffer => mem(R15, FLAG),
            Via::Recent(number) => hot(at::recent(number) + FLAG),
        };
        self.asm.load(R14, flag);
        self.asm.ins(op(0x80), 7, mem(R14, 0));
        self.asm.u8(0);
        self.asm.jcc(cc::NE, from);
        self.cold.push(Cold::Watched {
            from,
            kept,
            next,
            rest: self.count - 1 - at.k as i32,
        });
    }

    /// Counts instructions. Uses R14.
    pub(crate) fn count_instructions(&mut self, by: i32) {
        self.asm.load(R14, hot(at::INSTRUCTIONS));
        self.asm.lea(R14, mem(R14, by));
        self.asm.store(hot(at::INSTRUCTIONS), R14);
    }

    /// Counts the instructions of the block, at its start. Uses R14 where flags matter.
    pub(crate) fn count_block(&mut self, flags_matter: bool) {
        match i8::try_from(self.count) {
            Ok(count) if !flags_matter => {
                self.asm.ins(op64(0x83), 0, hot(at::INSTRUCTIONS));
                self.asm.u8(count as u8);
            }
            _ => self.count_instructions(self.count),
        }
    }

    /// Before the first instruction of the block that needs the x87 unit. Keeps flags.
    pub(crate) fn need_x87(&mut self, at: At) {
        if std::mem::replace(&mut self.x87_ready, true) {
            return;
        }
        let (from, back) = (self.asm.label(), self.asm.label());
        self.asm.mov(R14, RCX);
        let movzx = Opcode { map: 1, ..op(0xb6) };
        self.asm.ins(movzx, RCX, hot(at::X87_LIVE));
        // JRCXZ over the next jump, to the one behind it.
        jrcxz(self.asm, 2);
        self.asm.bytes.extend_from_slice(&[0xeb, 5]);
        self.asm.jmp_label(from);
        self.asm.bind(back);
        self.asm.mov(RCX, R14);
        self.cold.push(Cold::LoadX87 {
            from,
            op: self.op_number(at),
            back,
        });
    }

    /// The interpreter does this operation, here.
    pub(crate) fn call_interpreter(&mut self, at: At) {
        self.look_at_stores(at);
        let number = self.op_number(at);
        self.asm.mov_u32(R15, number);
        self.asm.call(self.stubs.run_op);
    }

    /// The interpreter does this operation, which ends the block.
    pub(crate) fn end_by_interpreter(&mut self, at: At) {
        self.look_at_stores(at);
        let number = self.op_number(at);
        self.asm.mov_u32(R15, number);
        self.asm.jmp(self.stubs.run_last);
    }

    /// R14 becomes an address relative to the page.
    pub(crate) fn address_in_page(&mut self, target: i32) {
        self.asm.load(R14, hot(at::PAGE));
        self.asm.ins(self.wide(0x8d), R14, mem(R14, target));
    }

    /// Bytes of the memory operand, when they are known and not too many.
    pub(crate) fn memory_bytes(i: &Instruction) -> Option<u32> {
        let has = (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory);
        let size = i.memory_size().size() as u32;
        (has && matches!(size, 1 | 2 | 4 | 8 | 10 | 16 | 32)).then_some(size)
    }
}
