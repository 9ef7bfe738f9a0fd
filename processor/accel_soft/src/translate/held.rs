//! One look-up for several accesses to one object.
//!
//! A block often touches the same few bytes round a register more than once: fields of a structure, the registers that a
//! function saves on its stack. The first such access looks up the whole range, which must lie in one page, and its host
//! address stays in R15; the others take it from there. As long as it is held, whatever calls the interpreter does not come
//! back into the block but goes on at the next instruction as a jump there would: R15 is not what it was any more.
//!
//! Stores look at the flag of their page only once for several of them. So that code can't write over instructions of its own
//! block unseen, the page was not watched when it was looked up: a page that code was decoded from is.

use iced_x86::{Code, Instruction, Mnemonic as M, OpAccess, OpKind, Register};

use super::code::{At, Compiler, Kept, Via};
use super::cold::{Cold, Rejoin, Target};
use super::emit::{R14, R15, cc, hot, mem, op};
use super::encoding::Encoding;
use super::hot::at;
use super::shape::{self, Memory};
use crate::cpu::{Ea, FLAT, Mode};

/// The longest range that is looked up at once, in bytes.
const MOST: i32 = 256;

/// Memory at a base register and a displacement, where that is all there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    /// Number of the base register.
    base: usize,
    displacement: i32,
    size: i32,
    write: bool,
}

/// What is known of registers: each one's value less that of an origin.
type Offsets = [Option<i32>; 16];

/// A host address in R15, of the lowest byte of a range: the origin of the offsets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held {
    offsets: Offsets,
    /// Bytes of the range.
    length: i32,
    /// It may be written to.
    write: bool,
    /// Where the pointer to the page's flag byte is.
    flag: i32,
    /// The page was not watched: a few stores may be looked at together.
    unwatched: bool,
}

/// What the accesses to one object have in common.
#[derive(Debug, Clone, Copy)]
struct Group {
    low: i32,
    high: i32,
    stores: u32,
}

impl Compiler<'_> {
    /// Accesses that can share a look-up, by instruction.
    pub(crate) fn find_accesses(&self) -> Vec<Option<Access>> {
        if !self.code64() {
            return vec![None; self.instructions.len()];
        }
        let all = 0..self.instructions.len();
        all.map(|number| self.find_access(number)).collect()
    }

    fn access(&self, number: usize) -> Option<Access> {
        self.accesses[number]
    }

    /// The instruction's only access to memory, if it is one that can share a look-up.
    fn find_access(&self, number: usize) -> Option<Access> {
        let (i, op) = (&self.instructions[number].0, self.op(number));
        if !self.has_template(i, op) {
            return None;
        }
        let stack = |displacement, write| {
            Some(Access {
                base: 4,
                displacement,
                size: 8,
                write,
            })
        };
        match i.mnemonic() {
            M::Push if i.stack_pointer_increment() == -8 => return stack(-8, true),
            M::Pop if i.stack_pointer_increment() == 8 && i.op0_kind() == OpKind::Register => {
                return stack(0, false);
            }
            M::Call if i.op0_kind() == OpKind::NearBranch64 => return stack(-8, true),
            M::Ret if matches!(i.code(), Code::Retnq | Code::Retnq_imm16) => {
                return stack(0, false);
            }
            M::Leave if i.code() == Code::Leaveq => {
                return stack(0, false).map(|access| Access { base: 5, ..access });
            }
            _ => {}
        }
        if shape::is_branch(i) || shape::is_stack(i) || super::divide::is_division(i) {
            return None;
        }
        let base = i.memory_base();
        let plain = base.is_gpr64()
            && i.memory_index() == Register::None
            && op.seg >= FLAT
            && op.ea() == Ea::Flat64;
        let displacement = i32::try_from(i.memory_displacement64() as i64).ok()?;
        if !plain || i.mnemonic() == M::Lea || displacement.unsigned_abs() > 1 << 30 {
            return None;
        }
        let size = Self::memory_bytes(i)?;
        let e = Encoding::parse(self.own_bytes(number), true)?;
        let s = shape::shape(i, &e)?;
        (s.memory != Memory::None && s.align == 0 && !shape::is_x87(i)).then_some(Access {
            base: base.number(),
            displacement,
            size: size as i32,
            write: s.memory != Memory::Read,
        })
    }

    /// The displacement from R15 of an access that the range covers.
    fn within(&self, access: Access) -> Option<i32> {
        let held = self.held.as_ref()?;
        let from = held.offsets[access.base]?.checked_add(access.displacement)?;
        let inside = from >= 0 && from + access.size <= held.length;
        (inside && (held.write || !access.write)).then_some(from)
    }

    /// Accesses from this instruction on that one look-up can serve; `None` if there is only one.
    fn group(&mut self, number: usize, first: Access) -> Option<Group> {
        let mut offsets = [None; 16];
        offsets[first.base] = Some(0);
        let mut group = Group {
            low: first.displacement,
            high: first.displacement + first.size,
            stores: u32::from(first.write),
        };
        let mut several = false;
        self.follow(&mut offsets, number);
        for next in number + 1..self.instructions.len() {
            if !self.may_hold(next) {
                break;
            }
            if let Some(access) = self.access(next)
                && let Some(offset) = offsets[access.base]
            {
                let from = offset.checked_add(access.displacement)?;
                let (low, high) = (group.low.min(from), group.high.max(from + access.size));
                if high - low > MOST {
                    break;
                }
                (group.low, group.high) = (low, high);
                group.stores += u32::from(access.write);
                several = true;
            } else if names_memory(&self.instructions[next].0) && !self.mode.contains(Mode::USER) {
                // A look-up in the buffer needs R15.
                break;
            }
            self.follow(&mut offsets, next);
        }
        several.then_some(group)
    }

    /// True when R15 most likely survives the instruction: a matter of speed alone.
    fn may_hold(&self, number: usize) -> bool {
        let i = &self.instructions[number].0;
        self.has_template(i, self.op(number))
            && !super::divide::is_division(i)
            && !super::string::is_string(i)
            && !shape::is_x87(i)
            && (!shape::is_branch(i) || self.access(number).is_some())
    }

    /// What an instruction does to what is known of registers.
    fn follow(&mut self, offsets: &mut Offsets, number: usize) {
        let i = self.instructions[number].0;
        let moved = |offset: Option<i32>, by: i64| {
            let sum = i64::from(offset?) + by;
            (sum.unsigned_abs() < 1 << 30).then_some(sum as i32)
        };
        let register =
            |n: u32| (i.op_kind(n) == OpKind::Register).then(|| i.op_register(n).number());
        let wide =
            i.op_count() > 0 && i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64();
        let by = |sign: i64| {
            let known = wide && i.op_count() == 2 && i.op1_kind() != OpKind::Register;
            let immediate = matches!(
                i.op1_kind(),
                OpKind::Immediate8to64 | OpKind::Immediate32to64
            );
            (known && immediate).then(|| sign * i.immediate(1) as i64)
        };
        let to = if wide { i.op0_register().number() } else { 0 };
        let new = match i.mnemonic() {
            M::Add => by(1).and_then(|by| moved(offsets[to], by)),
            M::Sub => by(-1).and_then(|by| moved(offsets[to], by)),
            M::Inc if wide => moved(offsets[to], 1),
            M::Dec if wide => moved(offsets[to], -1),
            M::Mov if wide && register(1).is_some() && i.op1_register().is_gpr64() => {
                offsets[i.op1_register().number()]
            }
            M::Lea if wide && i.memory_base().is_gpr64() && i.memory_index() == Register::None => {
                moved(
                    offsets[i.memory_base().number()],
                    i.memory_displacement64() as i64,
                )
            }
            _ => None,
        };
        let stack = match i.mnemonic() {
            M::Push | M::Pop | M::Call | M::Ret => {
                moved(offsets[4], i64::from(i.stack_pointer_increment()))
            }
            M::Leave => moved(offsets[5], 8),
            _ => offsets[4],
        };
        for used in self.registers.info(&i).used_registers() {
            let writes = !matches!(
                used.access(),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            );
            if writes && used.register().is_gpr() {
                offsets[used.register().full_register().number()] = None;
            }
        }
        if wide && new.is_some() {
            offsets[to] = new;
        }
        if matches!(i.mnemonic(), M::Push | M::Pop | M::Call | M::Ret | M::Leave) {
            offsets[4] = stack;
        }
    }

    /// The place of an access at R15, which is looked up now if that serves others as well. `None`: it is alone. Keeps flags.
    pub(crate) fn held_access(&mut self, at: At) -> Option<i32> {
        let access = self.access(at.k)?;
        if let Some(from) = self.within(access) {
            self.keeps_held = true;
            return Some(from);
        }
        let group = self.group(at.k, access)?;
        self.look_up(at, access, group);
        self.keeps_held = true;
        self.within(access)
    }

    /// Looks the range of a group up.
    fn look_up(&mut self, at: At, first: Access, group: Group) {
        self.look_at_stores(at);
        let via = self.via(at);
        let (kept, slow) = (super::branch::usual(at), self.asm.label());
        let base = match super::registers::place(first.base as u8) {
            super::registers::Place::Host(reg) => reg,
            super::registers::Place::Frame(from) => {
                self.asm.load(R14, hot(from));
                R14
            }
        };
        self.asm.lea(R14, mem(base, group.low));
        self.keep_flags(kept);
        let length = group.high - group.low;
        self.held = None;
        self.translate(at, via, length as u32, group.stores > 0, slow);
        let flag = self.keep_flag(via, group, first.write, slow);
        self.asm.mov(R15, R14);
        self.cold.push(Cold::Slow {
            from: slow,
            rejoin: self.rejoin_next(at),
            op: self.op_number(at),
            kept,
        });
        self.restore_flags(kept);
        let mut offsets = [None; 16];
        offsets[first.base] = Some(-group.low);
        self.held = Some(Held {
            offsets,
            length,
            write: group.stores > 0,
            flag,
            unwatched: group.stores > 1,
        });
    }

    /// Keeps where the page's flag byte is for the stores of a group; several of them want a page that nobody watches. The
    /// host address is in R14, the entry of a [`Via::Buffer`] in R15.
    fn keep_flag(&mut self, via: Via, group: Group, first: bool, slow: super::emit::Label) -> i32 {
        let recent = match via {
            Via::Recent(number) => Some(at::recent(number) + super::code::FLAG),
            Via::Buffer => None,
        };
        match recent {
            Some(flag) if group.stores == 0 || group.stores == 1 && first => return flag,
            None if group.stores == 0 => return at::HELD_FLAG,
            Some(flag) => self.asm.load(R15, hot(flag)),
            None => self.asm.load(R15, mem(R15, super::code::FLAG)),
        }
        self.asm.store(hot(at::HELD_FLAG), R15);
        if group.stores > 1 {
            self.asm.ins(op(0x80), 7, mem(R15, 0));
            self.asm.u8(0);
            self.asm.jcc(cc::NE, slow);
        }
        at::HELD_FLAG
    }

    /// Where the interpreter goes on while R15 is held.
    pub(crate) fn rejoin_next(&self, at: At) -> Rejoin {
        Rejoin::Next {
            place: self.next_place(at),
            rest: self.count - 1 - at.k as i32,
        }
    }

    /// After a store at R15. Keeps flags.
    pub(crate) fn stored(&mut self, at: At, next: Target) {
        let held = self.held.expect("what was stored to");
        self.unlooked = held.unwatched && at.k + 1 < self.instructions.len();
        if self.unlooked {
            return;
        }
        let rest = self.count - 1 - at.k as i32;
        self.look_at_flag(held.flag, at.live_after, next, rest);
    }

    /// Looks at stores that nobody has looked at, before an instruction.
    pub(crate) fn look_at_stores(&mut self, at: At) {
        if !std::mem::take(&mut self.unlooked) {
            return;
        }
        let here = self.next_place(at) - at.i.len() as i32;
        let rest = self.count - at.k as i32;
        self.look_at_flag(at::HELD_FLAG, at.live_before, Target::Page(here), rest);
    }

    /// Looks at stores that nobody has looked at, behind the last instruction of a block that goes on.
    pub(crate) fn look_at_last_stores(&mut self, at: At) {
        if std::mem::take(&mut self.unlooked) {
            let next = Target::Page(self.next_place(at));
            self.look_at_flag(at::HELD_FLAG, true, next, 0);
        }
    }

    fn look_at_flag(&mut self, flag: i32, live: bool, next: Target, rest: i32) {
        let kept = if live { Kept::InAx } else { Kept::Nowhere };
        let from = self.asm.label();
        self.keep_flags(kept);
        self.asm.load(R14, hot(flag));
        self.asm.ins(op(0x80), 7, mem(R14, 0));
        self.asm.u8(0);
        self.asm.jcc(cc::NE, from);
        self.cold.push(Cold::Watched {
            from,
            kept,
            next,
            rest,
        });
        self.restore_flags(kept);
    }

    /// Before an instruction: stores are looked at unless they can wait for a better moment.
    pub(crate) fn before_instruction(&mut self, at: At) {
        self.keeps_held = false;
        if !self.unlooked {
            return;
        }
        let access = self.access(at.k);
        let covered = access.is_some_and(|access| {
            self.within(access).is_some() && (access.write || !shape::is_branch(at.i))
        });
        let register = !shape::is_branch(at.i)
            && self.may_hold(at.k)
            && !names_memory(at.i)
            && !shape::is_stack(at.i)
            && !super::system::is_system(at.i, self.mode);
        let last_chance = !at.live_before && at.live_after;
        if !(covered || register && !last_chance) {
            self.look_at_stores(at);
        }
    }

    /// After an instruction: what is still known.
    pub(crate) fn after_instruction(&mut self, at: At) {
        let Some(mut held) = self.held.take() else {
            return;
        };
        if self.keeps_held {
            self.follow(&mut held.offsets, at.k);
            self.held = Some(held);
        }
    }
}

/// True when an operand is in memory, or LEA's.
fn names_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory)
}
