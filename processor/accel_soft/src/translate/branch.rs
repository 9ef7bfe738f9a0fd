//! Branches and the stack.

use iced_x86::{Code, Mnemonic as M, OpKind};

use super::code::{At, Compiler, Kept, Via};
use super::cold::{Cold, Rejoin, Target};
use super::emit::{Asm, R14, R15, RBP, RCX, Reg, Rm, hot, mem, op, op64};
use super::hot::at;
use super::registers::{ADDRESS, Place, SCRATCH, STACK, place};
use super::stubs::{jrcxz, lookup};
use crate::cpu::Mode;

impl Compiler<'_> {
    /// Bytes of a stack slot of the usual size.
    fn slot(&self) -> i32 {
        if self.code64() { 8 } else { 4 }
    }

    /// True when the stack is used by the whole of RSP without segment checks.
    fn flat_stack(&self) -> bool {
        self.code64() || self.mode.contains(Mode::FLAT | Mode::STACK32)
    }

    /// R14 becomes the host address of the slot below RSP, to write; R15 the entry. Flags are saved if they matter.
    pub(crate) fn slot_to_push(&mut self, at: At, kept: Kept) -> super::emit::Label {
        let (slow, slot) = (self.asm.label(), self.slot());
        self.asm.ins(self.wide(0x8d), ADDRESS, mem(STACK, -slot));
        self.keep_flags(kept);
        self.translate(at, self.via_stack(), slot as u32, true, slow);
        slow
    }

    /// Goes to `slow` unless the address that was kept is canonical: some processors look before they push. Changes flags.
    fn check_kept_target(&mut self, slow: super::emit::Label) {
        if !self.code64() {
            return;
        }
        self.asm.load(ADDRESS, hot(at::SAVED_ENTRY));
        self.asm.ins(op64(0xc1), 7, Rm::Reg(ADDRESS));
        self.asm.u8(47);
        self.asm.alu_i(0, ADDRESS, 1);
        self.asm.alu_i(7, ADDRESS, 1);
        self.asm.jcc(super::emit::cc::A, slow);
    }

    /// R14 becomes the host address of what RSP points to, to read.
    fn slot_to_pop(&mut self, at: At, base: Reg) -> super::emit::Label {
        let slow = self.asm.label();
        let via = if base == STACK {
            self.via_stack()
        } else {
            Via::Buffer
        };
        self.asm.ins(self.wide(0x8b), ADDRESS, Rm::Reg(base));
        self.keep_flags(usual(at));
        self.translate(at, via, self.slot() as u32, false, slow);
        slow
    }

    fn slow(&mut self, at: At, from: super::emit::Label, back: super::emit::Label) {
        let op = self.op_number(at);
        self.cold.push(Cold::Slow {
            from,
            rejoin: Rejoin::Back(back),
            op,
            kept: usual(at),
        });
    }

    pub(crate) fn move_stack(&mut self, by: i32) {
        self.asm.ins(self.wide(0x8d), STACK, mem(STACK, by));
    }

    /// PUSH, POP and LEAVE. False: it can't be done here.
    pub(crate) fn stack_instruction(&mut self, at: At) -> bool {
        let bytes = at.i.stack_pointer_increment().unsigned_abs() as i32;
        if !self.flat_stack() {
            return false;
        }
        match at.i.mnemonic() {
            M::Push if bytes == self.slot() => self.push(at),
            M::Pop if bytes == self.slot() => self.pop(at),
            M::Leave if matches!(at.i.code(), Code::Leaveq | Code::Leaved) => self.leave(at),
            _ => false,
        }
    }

    fn push(&mut self, at: At) -> bool {
        let i = at.i;
        let register = i.op0_kind() == OpKind::Register
            && (i.op0_register().is_gpr64() || i.op0_register().is_gpr32());
        let immediate = match i.op0_kind() {
            OpKind::Immediate8to64 | OpKind::Immediate32to64 => Some(i.immediate(0) as i32),
            OpKind::Immediate8to32 | OpKind::Immediate32 => Some(i.immediate(0) as i32),
            _ => None,
        };
        if !register && immediate.is_none() {
            return false;
        }
        if let Some(from) = self.held_access(at) {
            self.push_held(i, from, immediate);
            self.stored(at, Target::Page(self.next_place(at)));
            return true;
        }
        let is_rax = register && i.op0_register().number() == 0;
        let kept = match usual(at) {
            Kept::InAx if is_rax => Kept::InMemory,
            kept => kept,
        };
        let (slow, back) = (self.slot_to_push(at, kept), self.asm.label());
        let op = self.op_number(at);
        self.cold.push(Cold::Slow {
            from: slow,
            rejoin: Rejoin::Back(back),
            op,
            kept,
        });
        if let Some(value) = immediate {
            self.asm.ins(self.wide(0xc7), 0, mem(R14, 0));
            self.asm.i32(value);
        } else {
            match place(i.op0_register().number() as u8) {
                Place::Host(reg) => self.asm.ins(self.wide(0x89), reg, mem(R14, 0)),
                Place::Frame(from) => {
                    self.asm.load(R15, hot(from));
                    self.asm.ins(self.wide(0x89), R15, mem(R14, 0));
                }
            }
        }
        self.move_stack(-self.slot());
        let next = Target::Page(self.next_place(at));
        self.look_at_watch(at, self.via_stack(), kept, next);
        self.restore_flags(kept);
        self.asm.bind(back);
        true
    }

    /// Pushes to a place at R15.
    fn push_held(&mut self, i: &iced_x86::Instruction, to: i32, immediate: Option<i32>) {
        if let Some(value) = immediate {
            self.asm.ins(self.wide(0xc7), 0, mem(R15, to));
            self.asm.i32(value);
        } else {
            let reg = match place(i.op0_register().number() as u8) {
                Place::Host(reg) => reg,
                Place::Frame(from) => {
                    self.asm.load(R14, hot(from));
                    R14
                }
            };
            self.asm.ins(self.wide(0x89), reg, mem(R15, to));
        }
        self.move_stack(-self.slot());
    }

    fn pop(&mut self, at: At) -> bool {
        let i = at.i;
        let register = i.op0_kind() == OpKind::Register
            && (i.op0_register().is_gpr64() || i.op0_register().is_gpr32());
        if !register || i.op0_register().number() == 4 {
            return false;
        }
        if let Some(from) = self.held_access(at) {
            match place(i.op0_register().number() as u8) {
                Place::Host(reg) => self.asm.load(reg, mem(R15, from)),
                Place::Frame(to) => {
                    self.asm.load(R14, mem(R15, from));
                    self.asm.store(hot(to), R14);
                }
            }
            self.move_stack(self.slot());
            return true;
        }
        let (slow, back) = (self.slot_to_pop(at, STACK), self.asm.label());
        self.slow(at, slow, back);
        self.restore_flags(usual(at));
        match place(i.op0_register().number() as u8) {
            Place::Host(reg) => self.asm.ins(self.wide(0x8b), reg, mem(R14, 0)),
            Place::Frame(to) => {
                self.asm.ins(self.wide(0x8b), R15, mem(R14, 0));
                self.asm.store(hot(to), R15);
            }
        }
        self.move_stack(self.slot());
        self.asm.bind(back);
        true
    }

    fn leave(&mut self, at: At) -> bool {
        if let Some(from) = self.held_access(at) {
            self.asm.lea(STACK, mem(RBP, self.slot()));
            self.asm.load(RBP, mem(R15, from));
            return true;
        }
        let (slow, back) = (self.slot_to_pop(at, RBP), self.asm.label());
        self.slow(at, slow, back);
        self.restore_flags(usual(at));
        self.asm.ins(self.wide(0x8d), STACK, mem(RBP, self.slot()));
        self.asm.ins(self.wide(0x8b), RBP, mem(R14, 0));
        self.asm.bind(back);
        true
    }

    /// Ends the block with its last instruction. False: it is not a branch that can be done here.
    pub(crate) fn branch(&mut self, at: At) -> bool {
        match at.i.mnemonic() {
            M::Jmp if self.is_near(at) => {
                let target = self.near_target(at);
                self.go(at, target);
                true
            }
            M::Call if self.is_near(at) => self.flat_stack() && self.call_near(at),
            M::Ret => self.flat_stack() && self.ret(at),
            M::Jmp | M::Call => self.indirect(at),
            m if self.is_near(at) && condition_of(m).is_some() => {
                self.conditional(at);
                true
            }
            _ => false,
        }
    }

    fn is_near(&self, at: At) -> bool {
        let wanted = if self.code64() {
            OpKind::NearBranch64
        } else {
            OpKind::NearBranch32
        };
        at.i.op_count() == 1 && at.i.op0_kind() == wanted
    }

    /// The target relative to the page.
    fn near_target(&self, at: At) -> i32 {
        let relative = at.i.near_branch_target();
        let relative = if self.code64() {
            relative as i64 as i32
        } else {
            relative as u32 as i32
        };
        self.start.wrapping_add(relative)
    }

    fn conditional(&mut self, at: At) {
        let condition = condition_of(at.i.mnemonic()).expect("a conditional jump");
        let taken = self.near_target(at);
        let (next, here) = (self.next_place(at), self.here(at));
        if taken > here && self.is_linkable(taken) {
            let from = self.asm.label();
            let place = self.asm.jcc(condition, from);
            self.link(place, from, taken);
        } else {
            let label = self.asm.label();
            self.asm.jcc(condition ^ 1, label);
            self.go(at, taken);
            self.asm.bind(label);
        }
        self.go(at, next);
    }

    fn here(&self, at: At) -> i32 {
        self.next_place(at) - at.i.len() as i32
    }

    fn link(&mut self, place: usize, from: super::emit::Label, target: i32) {
        let link = self.add_link(place, target);
        self.cold.push(Cold::Link { from, link });
    }

    /// A jump whose distance is at `place` in the code, to a target in the page. Gives the number of the link.
    pub(crate) fn add_link(&mut self, place: usize, target: i32) -> u32 {
        self.links.push((place, target));
        self.first_link + self.links.len() as u32 - 1
    }

    /// True when a jump can be linked to this place.
    pub(crate) fn is_linkable(&self, target: i32) -> bool {
        in_page(target) && !self.successors.is_across(target)
    }

    /// Goes on at a place relative to the page.
    pub(crate) fn go(&mut self, at: At, target: i32) {
        let back = target <= self.here(at);
        if self.is_linkable(target) {
            if back {
                self.look_at_events(Some(target));
            }
            let from = self.asm.label();
            let place = self.asm.jmp_label(from);
            self.link(place, from, target);
        } else {
            self.address_in_page(target);
            if back || !self.code64() {
                // Two jumps forward may go round 4 GiB.
                self.look_at_events(None);
            }
            self.go_far();
        }
    }

    /// Goes on behind a block that does not end in a branch.
    pub(crate) fn fall_through(&mut self, at: At) {
        let next = self.next_place(at);
        self.go(at, next);
    }

    /// Leaves if another thread has raised an event. Keeps flags. The next address is a place in the page, or R14, which is kept.
    fn look_at_events(&mut self, target: Option<i32>) {
        if let Some(target) = target
            && self.successors.live_at(target) == 0
        {
            // Flags don't matter there.
            let label = self.asm.label();
            self.asm.load(R14, hot(at::EVENTS));
            self.asm.ins(op(0x83), 7, mem(R14, 0));
            self.asm.u8(0);
            self.asm.jcc(super::emit::cc::NE, label);
            self.cold.push(Cold::Event {
                from: label,
                target,
                rcx_kept: false,
            });
            return;
        }
        self.asm.mov(R15, RCX);
        self.asm.load(RCX, hot(at::EVENTS));
        self.asm.ins(op(0x8b), RCX, mem(RCX, 0));
        jrcxz(self.asm, 0);
        let from = self.asm.len();
        if let Some(target) = target {
            let label = self.asm.label();
            self.asm.jmp_label(label);
            self.cold.push(Cold::Event {
                from: label,
                target,
                rcx_kept: true,
            });
        } else {
            self.asm.mov(RCX, R15);
            self.asm.store(hot(at::RIP), R14);
            let exit = self.stubs.exit;
            self.asm.jmp(exit);
        }
        let distance = self.asm.len() - from;
        self.asm.bytes[from - 1] = distance as u8;
        self.asm.mov(RCX, R15);
    }

    /// Pushes the address of the next instruction. The host address is in R14, the entry in R15.
    fn put_return_address(&mut self, at: At) {
        let next = self.next_place(at);
        self.asm.load(SCRATCH, hot(at::PAGE));
        self.asm.ins(self.wide(0x8d), SCRATCH, mem(SCRATCH, next));
        self.asm.ins(self.wide(0x89), SCRATCH, mem(R14, 0));
        self.move_stack(-self.slot());
    }

    fn call_near(&mut self, at: At) -> bool {
        let target = self.near_target(at);
        if let Some(to) = self.held_access(at) {
            let next = self.next_place(at);
            self.address_in_page(next);
            self.asm.store(mem(R15, to), R14);
            self.move_stack(-self.slot());
            self.stored(at, Target::Page(target));
            self.go(at, target);
            return true;
        }
        let slow = self.slot_to_push(at, usual(at));
        self.missed(at, slow, 0);
        self.put_return_address(at);
        self.look_at_watch(at, self.via_stack(), usual(at), Target::Page(target));
        self.restore_flags(usual(at));
        self.go(at, target);
        true
    }

    /// The interpreter does the branch when the label is reached; the flags are in memory if they matter.
    pub(crate) fn missed(&mut self, at: At, from: super::emit::Label, stack: i32) {
        let op = self.op_number(at);
        self.cold.push(Cold::Missed {
            from,
            op,
            stack,
            kept: usual(at),
        });
    }

    /// Looks the target in R14 up; where there is no code, undoes what was done to RSP and lets the interpreter branch.
    fn go_to_address(&mut self, at: At, stack: i32) {
        self.look_at_events_before_branch(at, stack);
        let label = self.asm.label();
        lookup(self.asm, self.has_rorx, |asm: &mut Asm| {
            asm.jmp_label(label);
        });
        let op = self.op_number(at);
        self.cold.push(Cold::Missed {
            from: label,
            op,
            stack,
            kept: Kept::Nowhere,
        });
    }

    /// As [`Self::look_at_events`]; the interpreter does the branch in that case.
    fn look_at_events_before_branch(&mut self, at: At, stack: i32) {
        self.asm.mov(R15, RCX);
        self.asm.load(RCX, hot(at::EVENTS));
        self.asm.ins(op(0x8b), RCX, mem(RCX, 0));
        jrcxz(self.asm, 0);
        let from = self.asm.len();
        self.asm.mov(RCX, R15);
        let label = self.asm.label();
        self.asm.jmp_label(label);
        let op = self.op_number(at);
        self.cold.push(Cold::Missed {
            from: label,
            op,
            stack,
            kept: Kept::Nowhere,
        });
        let distance = self.asm.len() - from;
        self.asm.bytes[from - 1] = distance as u8;
        self.asm.mov(RCX, R15);
    }

    fn ret(&mut self, at: At) -> bool {
        let near = matches!(
            at.i.code(),
            Code::Retnq | Code::Retnq_imm16 | Code::Retnd | Code::Retnd_imm16
        );
        if !near || self.code64() != matches!(at.i.code(), Code::Retnq | Code::Retnq_imm16) {
            return false;
        }
        let more = if at.i.op_count() == 1 {
            i32::from(at.i.immediate16())
        } else {
            0
        };
        if let Some(from) = self.held_access(at) {
            self.asm.load(R14, mem(R15, from));
        } else {
            let slow = self.slot_to_pop(at, STACK);
            self.missed(at, slow, 0);
            self.restore_flags(usual(at));
            self.asm.ins(self.wide(0x8b), R14, mem(R14, 0));
        }
        let by = self.slot() + more;
        self.move_stack(by);
        self.go_to_address(at, by);
        true
    }

    /// The target of an indirect branch into R14. False: it can't be done here.
    fn target(&mut self, at: At) -> bool {
        let i = at.i;
        let size = if self.code64() { 8 } else { 4 };
        if i.op0_kind() == OpKind::Register {
            let register = i.op0_register();
            if register.size() != size {
                return false;
            }
            match place(register.number() as u8) {
                Place::Host(reg) => self.asm.ins(self.wide(0x8b), R14, Rm::Reg(reg)),
                Place::Frame(from) => self.asm.load(R14, hot(from)),
            }
            return true;
        }
        let near = matches!(
            i.code(),
            Code::Jmp_rm64 | Code::Jmp_rm32 | Code::Call_rm64 | Code::Call_rm32
        );
        if i.op0_kind() != OpKind::Memory
            || !near
            || i.memory_size().size() != size
            || !self.linear_address(at)
        {
            return false;
        }
        let slow = self.asm.label();
        self.keep_flags(usual(at));
        let via = self.via(at);
        self.translate(at, via, size as u32, false, slow);
        self.missed(at, slow, 0);
        self.asm.ins(self.wide(0x8b), R14, mem(R14, 0));
        self.restore_flags(usual(at));
        true
    }

    fn indirect(&mut self, at: At) -> bool {
        if at.i.op_count() != 1 || at.i.is_jmp_far_indirect() || at.i.is_call_far_indirect() {
            return false;
        }
        let near_register_or_memory = matches!(
            at.i.code(),
            Code::Jmp_rm64 | Code::Jmp_rm32 | Code::Call_rm64 | Code::Call_rm32
        );
        if !near_register_or_memory || !self.flat_stack() || !self.target(at) {
            return false;
        }
        if at.i.mnemonic() == M::Jmp {
            self.go_to_address(at, 0);
            return true;
        }
        self.asm.store(hot(at::SAVED_ENTRY), R14);
        self.keep_flags(usual(at));
        let slow = self.asm.label();
        self.check_kept_target(slow);
        let slot = self.slot();
        self.asm.ins(self.wide(0x8d), ADDRESS, mem(STACK, -slot));
        self.translate(at, self.via_stack(), slot as u32, true, slow);
        self.missed(at, slow, 0);
        self.put_return_address(at);
        self.look_at_watch(at, self.via_stack(), usual(at), Target::Saved);
        self.restore_flags(usual(at));
        self.asm.load(R14, hot(at::SAVED_ENTRY));
        // The call is done: done anew, it might find what it has pushed where its target was.
        self.look_at_events(None);
        let exit = self.stubs.exit;
        lookup(self.asm, self.has_rorx, |asm| asm.jmp(exit));
        true
    }
}

/// Where flags that matter are kept while an address is looked up.
pub(crate) fn usual(at: At) -> Kept {
    if at.live_before {
        Kept::InAx
    } else {
        Kept::Nowhere
    }
}

/// True for a place inside the page.
fn in_page(target: i32) -> bool {
    (0..4096).contains(&target)
}

/// The condition as opcodes number it.
fn condition_of(m: M) -> Option<u8> {
    Some(match m {
        M::Jo => 0,
        M::Jno => 1,
        M::Jb => 2,
        M::Jae => 3,
        M::Je => 4,
        M::Jne => 5,
        M::Jbe => 6,
        M::Ja => 7,
        M::Js => 8,
        M::Jns => 9,
        M::Jp => 10,
        M::Jnp => 11,
        M::Jl => 12,
        M::Jge => 13,
        M::Jle => 14,
        M::Jg => 15,
        _ => return None,
    })
}
