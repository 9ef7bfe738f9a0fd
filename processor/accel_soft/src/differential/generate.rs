//! Random instructions of a given form, and register values with which their operands lie in the test's pages.

use iced_x86::{
    Code, Encoder, Instruction, MemoryOperand, OpCodeOperandKind as K, OpKind, Register,
};

use super::native::{CODE, DATA, DATA_WRITABLE, STACK, STACK_SIZE};
use super::random::Random;
use super::state::State;

/// Instructions in machine code and the state to start them from.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Decoded, for messages.
    pub(crate) instructions: Vec<Instruction>,
    /// Machine code.
    pub(crate) bytes: Vec<u8>,
    /// Registers before.
    pub(crate) state: State,
    /// Memory to set before: address and bytes.
    pub(crate) memory: Vec<(u64, Vec<u8>)>,
    /// Code size: 64 or 32.
    pub(crate) bits: u32,
}

/// Where the code of a case begins: far enough from the ends for every short branch.
pub(crate) const START: u64 = CODE + 0x800;

/// What a generator keeps while it makes one case.
struct Maker<'a> {
    random: &'a mut Random,
    state: State,
    /// General registers (and index vectors) whose value an address needs.
    fixed: u32,
    fixed_vector: Option<usize>,
    memory: Vec<(u64, Vec<u8>)>,
    /// Data addresses in registers may not change any more: a later instruction of a sequence.
    bases: bool,
    /// 64 or 32.
    bits: u32,
}

/// Random registers, all legal.
pub(crate) fn random_state(random: &mut Random) -> State {
    let mut gpr = [0; 16];
    gpr.iter_mut().for_each(|r| *r = random.integer());
    gpr[4] = STACK + STACK_SIZE / 2;
    let mut ymm = [[0; 2]; 16];
    ymm.iter_mut()
        .flatten()
        .for_each(|half| *half = random.vector());
    let mut rflags = 0x202 | random.next() & 0x8d5;
    if random.one_in(4) {
        rflags |= 1 << 10;
    }
    // Mostly as programs run: all masked.
    let mxcsr = match random.below(4) {
        0 => 0x1f80,
        1 => random.next() as u32 & 0xffff,
        2 => 0x1f80 | random.next() as u32 & 0xe07f,
        _ => 0x1f80 | random.next() as u32 & 0xe040,
    };
    let mut state = State {
        gpr,
        rip: START,
        rflags,
        ymm,
        mxcsr,
        x87: crate::x87::X87::default(),
    };
    let unit = &mut state.x87;
    unit.registers
        .iter_mut()
        .for_each(|r| *r = random.extended());
    unit.tags = match random.below(4) {
        0 => 0,
        1 => random.next() as u8,
        _ => 0xff,
    };
    let control = match random.below(4) {
        0 => 0x37f,
        1 => random.next() as u16,
        _ => 0x3f | random.next() as u16,
    };
    unit.control = control & 0xf3f | 0x40;
    unit.status = random.next() as u16 & 0x7f7f;
    if !random.one_in(16) {
        // No exception pending.
        unit.status &= !0x3f | unit.control & 0x3f;
        if unit.status & 1 == 0 {
            unit.status &= !0x40;
        }
    }
    unit.derive_pending();
    state
}

/// A case of one instruction, or `None` when the form can't be encoded with what was drawn.
pub(crate) fn single(random: &mut Random, code: Code, bits: u32) -> Option<Case> {
    let mut state = random_state(random);
    if bits == 32 {
        // The upper halves and registers are not there.
        state.gpr.iter_mut().for_each(|r| *r &= 0xffff_ffff);
    }
    let mut maker = Maker {
        random,
        state,
        fixed: 1 << 4,
        fixed_vector: None,
        memory: Vec::new(),
        bases: false,
        bits,
    };
    let instruction = maker.instruction(code, START)?;
    let bytes = encode(&instruction, START, bits)?;
    let Maker {
        mut state, memory, ..
    } = maker;
    if bits == 32 {
        state.gpr.iter_mut().for_each(|r| *r &= 0xffff_ffff);
    }
    Some(Case {
        instructions: vec![instruction],
        bytes,
        state,
        memory,
        bits,
    })
}

/// A case of several instructions of the given forms.
pub(crate) fn sequence(
    random: &mut Random,
    codes: &[Code],
    length: usize,
    suits: impl Fn(&Instruction) -> bool,
) -> Option<Case> {
    let mut state = random_state(random);
    // R12 to R15 and RBX hold data addresses for the whole sequence: only movers change them, and not by much.
    for i in BASES {
        state.gpr[i] = if random.one_in(4) {
            DATA + 0x1000 - random.below(0x60)
        } else {
            DATA + 0x400 + random.below(0x1800)
        };
    }
    state.gpr[4] = STACK + 0x1000 + 8 * random.below(16);
    state.rflags &= !(1 << 10);
    let mut maker = Maker {
        random,
        state,
        fixed: 1 << 4,
        fixed_vector: None,
        memory: Vec::new(),
        bases: true,
        bits: 64,
    };
    let mut bytes = Vec::new();
    let mut instructions = Vec::new();
    let mut tries = 0;
    while instructions.len() < length {
        tries += 1;
        if tries > 40 * length {
            return None;
        }
        let at = START + bytes.len() as u64;
        let instruction = if maker.random.one_in(4) {
            mover(maker.random)
        } else {
            let code = maker.random.pick(codes);
            maker
                .instruction(code, at)
                .filter(|i| keeps_bases(i) && suits(i))
        };
        let Some(instruction) = instruction else {
            continue;
        };
        let Some(mut encoded) = encode(&instruction, at, 64) else {
            continue;
        };
        bytes.append(&mut encoded);
        instructions.push(instruction);
    }
    let Maker { state, memory, .. } = maker;
    Some(Case {
        instructions,
        bytes,
        state,
        memory,
        bits: 64,
    })
}

/// The registers that hold data addresses in sequences.
const BASES: [usize; 5] = [3, 12, 13, 14, 15];

/// What moves a base register a little, or one to another, or uses the stack.
fn mover(random: &mut Random) -> Option<Instruction> {
    let (to, from) = (GPR64[random.pick(&BASES)], GPR64[random.pick(&BASES)]);
    let other = GPR64[random.pick(&[0_usize, 1, 2, 5, 6, 7, 8, 9, 10, 11])];
    let by = random.below(33) as i32 - 16;
    let at = |base| MemoryOperand::with_base_displ(base, i64::from(by));
    match random.below(12) {
        0 => Instruction::with2(Code::Add_rm64_imm8, to, by),
        1 => Instruction::with2(Code::Sub_rm64_imm8, to, by),
        2 => Instruction::with1(Code::Inc_rm64, to),
        3 => Instruction::with1(Code::Dec_rm64, to),
        4 => Instruction::with2(Code::Lea_r64_m, to, at(from)),
        5 => Instruction::with2(Code::Mov_r64_rm64, to, from),
        6 => Instruction::with2(Code::Lea_r64_m, other, at(to)),
        7 => Instruction::with1(Code::Pushq_imm8, by),
        8 | 9 => Instruction::with1(Code::Push_r64, if random.one_in(3) { to } else { other }),
        _ => Instruction::with1(Code::Pop_r64, other),
    }
    .ok()
}

/// True for an instruction that leaves the sequence's base registers and the stack pointer alone.
fn keeps_bases(instruction: &Instruction) -> bool {
    use iced_x86::{InstructionInfoFactory, OpAccess};
    let kept = [
        Register::RSP,
        Register::RBX,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    !info.used_registers().iter().any(|used| {
        let writes = !matches!(
            used.access(),
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
        );
        writes && kept.contains(&used.register().full_register())
    })
}

fn encode(instruction: &Instruction, at: u64, bits: u32) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(bits);
    encoder.encode(instruction, at).ok()?;
    Some(encoder.take_buffer())
}

const GPR64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

impl Maker<'_> {
    fn instruction(&mut self, code: Code, at: u64) -> Option<Instruction> {
        let form = code.op_code();
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        let mut memory = None;
        for (i, kind) in form.op_kinds().iter().enumerate() {
            self.operand(&mut instruction, i as u32, *kind, at, &mut memory)?;
        }
        if instruction.is_string_instruction() {
            self.string(&mut instruction);
        }
        if form.can_use_lock_prefix()
            && instruction.op0_kind() == OpKind::Memory
            && self.random.one_in(4)
        {
            instruction.set_has_lock_prefix(true);
        }
        if instruction.is_stack_instruction() && !self.bases {
            self.stack(&instruction);
        }
        self.bound_operands(&instruction);
        Some(instruction)
    }

    fn gpr(&mut self) -> usize {
        self.random.below(if self.bits == 64 { 16 } else { 8 }) as usize
    }

    fn operand(
        &mut self,
        instruction: &mut Instruction,
        i: u32,
        kind: K,
        at: u64,
        memory: &mut Option<()>,
    ) -> Option<()> {
        let number = self.gpr();
        let or_memory = self.random.one_in(2);
        let register = match kind {
            K::mem | K::mem_offs | K::mem_mib => {
                return self.memory(instruction, i, kind, at, memory);
            }
            K::mem_vsib32x | K::mem_vsib64x => {
                return self.vector_memory(instruction, i, Register::XMM0, kind);
            }
            K::mem_vsib32y | K::mem_vsib64y => {
                return self.vector_memory(instruction, i, Register::YMM0, kind);
            }
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
                if or_memory =>
            {
                return self.memory(instruction, i, kind, at, memory);
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                let legacy = |r: &Register| (*r as u32) < Register::SPL as u32;
                let all: Vec<Register> = Register::values()
                    .filter(|r| r.is_gpr8() && (self.bits == 64 || legacy(r)))
                    .collect();
                self.random.pick(&all)
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => Register::AX + number as u32,
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                Register::EAX + number as u32
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                Register::RAX + number as u32
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + (number & 7) as u32,
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                Register::XMM0 + number as u32
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                Register::YMM0 + number as u32
            }
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + (number & 7) as u32,
            _ => return self.other(instruction, i, kind, at),
        };
        instruction.set_op_kind(i, OpKind::Register);
        instruction.set_op_register(i, register);
        Some(())
    }

    fn other(&mut self, instruction: &mut Instruction, i: u32, kind: K, at: u64) -> Option<()> {
        let value = self.random.integer();
        let (operand, value) = match kind {
            K::imm8 => (OpKind::Immediate8, value & 0xff),
            K::imm8_const_1 => (OpKind::Immediate8, 1),
            K::imm8sex16 => (OpKind::Immediate8to16, value as i8 as u64),
            K::imm8sex32 => (OpKind::Immediate8to32, value as i8 as u64),
            K::imm8sex64 => (OpKind::Immediate8to64, value as i8 as u64),
            K::imm16 => (OpKind::Immediate16, value & 0xffff),
            K::imm32 => (OpKind::Immediate32, value & 0xffff_ffff),
            K::imm32sex64 => (OpKind::Immediate32to64, value as i32 as u64),
            K::imm64 => (OpKind::Immediate64, value),
            K::br32_1 | K::br32_4 => {
                instruction.set_op_kind(i, OpKind::NearBranch32);
                instruction.set_near_branch32((at + 16 + self.random.below(100)) as u32);
                return Some(());
            }
            K::br64_1 | K::br64_4 => {
                instruction.set_op_kind(i, OpKind::NearBranch64);
                // Inside the page, past the instruction itself.
                instruction.set_near_branch64(at + 16 + self.random.below(100));
                return Some(());
            }
            K::seg_rSI | K::es_rDI | K::seg_rDI => {
                let short = self.bits == 32 || self.random.one_in(8) && kind != K::seg_rDI;
                let operand = match (kind, short) {
                    (K::seg_rSI, false) => OpKind::MemorySegRSI,
                    (K::seg_rSI, true) => OpKind::MemorySegESI,
                    (K::es_rDI, false) => OpKind::MemoryESRDI,
                    (K::es_rDI, true) => OpKind::MemoryESEDI,
                    (_, false) => OpKind::MemorySegRDI,
                    (_, true) => OpKind::MemorySegEDI,
                };
                let register = if kind == K::seg_rSI { 6 } else { 7 };
                let size = instruction.memory_size().size() as u64;
                let target = self.target(size.max(1), false);
                self.set_gpr(register, target);
                instruction.set_op_kind(i, operand);
                return Some(());
            }
            K::seg_rBX_al => {
                let target = self.target(1, false);
                let al = self.state.gpr[0] & 0xff;
                self.set_gpr(3, target.wrapping_sub(al));
                instruction.set_op_kind(i, OpKind::Memory);
                let base = if self.bits == 64 {
                    Register::RBX
                } else {
                    Register::EBX
                };
                instruction.set_memory_base(base);
                instruction.set_memory_index(Register::AL);
                return Some(());
            }
            _ => return None,
        };
        if operand == OpKind::Immediate8
            && i > 0
            && instruction.op_kind(i - 1) == OpKind::Immediate16
        {
            instruction.set_op_kind(i, OpKind::Immediate8_2nd);
            instruction.set_immediate8_2nd(value as u8);
            return Some(());
        }
        instruction.set_op_kind(i, operand);
        instruction.set_immediate_u64(i, value);
        Some(())
    }

    fn set_gpr(&mut self, number: usize, value: u64) {
        if !self.bases {
            self.state.gpr[number] = value;
        }
        self.fixed |= 1 << number;
    }

    /// Where a memory operand of `size` bytes shall lie, mostly in the writable pages. Its bytes become random.
    fn target(&mut self, size: u64, aligned: bool) -> u64 {
        let end = DATA + DATA_WRITABLE;
        let inside = DATA + 0x100 + self.random.below(DATA_WRITABLE - 0x300);
        let target = match self.random.below(24) {
            // Across the two pages, into the read-only one, before the first, past the last, nowhere.
            0 | 1 => DATA + 0x1000 - self.random.below(size + 1),
            2 => end - self.random.below(size + 1),
            3 => DATA - self.random.below(size + 2),
            4 => DATA + 0x3000 - self.random.below(size + 2),
            5 if self.random.one_in(3) => 0x8000_0000_0000 - self.random.below(size),
            6..14 => inside & !(size.next_power_of_two() - 1).min(63),
            _ => inside,
        };
        let target = if aligned {
            target & !(size.next_power_of_two() - 1)
        } else {
            target
        };
        self.fill(target, size);
        target
    }

    fn fill(&mut self, target: u64, size: u64) {
        let len = size.clamp(1, 32);
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            match (size, self.random.below(3)) {
                (4, 0) => bytes.extend(self.random.single().to_le_bytes()),
                (8, 0) => bytes.extend(self.random.double().to_le_bytes()),
                (10, 0..2) => {
                    let (significand, rest) = self.random.extended();
                    bytes.extend(significand.to_le_bytes());
                    bytes.extend(rest.to_le_bytes());
                }
                (1..=8, _) => bytes.extend(self.random.integer().to_le_bytes()),
                _ => bytes.extend(self.random.vector().to_le_bytes()),
            }
        }
        bytes.truncate(len as usize);
        let inside = |a: u64, n: u64| a >= DATA && a + n <= DATA + DATA_WRITABLE;
        if target < 1 << 40 && inside(target, len) {
            self.memory.push((target, bytes));
        }
    }

    fn memory(
        &mut self,
        instruction: &mut Instruction,
        i: u32,
        kind: K,
        at: u64,
        memory: &mut Option<()>,
    ) -> Option<()> {
        if memory.replace(()).is_some() {
            return None;
        }
        let size = (instruction.memory_size().size() as u64).max(1);
        instruction.set_op_kind(i, OpKind::Memory);
        if self.bases {
            let base = self.random.pick(&[3_usize, 12, 13, 14, 15]);
            instruction.set_memory_base(GPR64[base]);
            instruction.set_memory_displacement64(self.random.below(64));
            instruction.set_memory_displ_size(1);
            return Some(());
        }
        let target = self.target(size, false);
        if kind == K::mem_offs {
            instruction.set_memory_displ_size(self.bits / 8);
            instruction.set_memory_displacement64(target);
            return Some(());
        }
        if self.bits == 32 {
            self.memory_32(instruction, target);
            return Some(());
        }
        let low = target < 1 << 32;
        match self.random.below(10) {
            0 if low => {
                instruction.set_memory_base(Register::RIP);
                instruction.set_memory_displacement64(target);
                instruction.set_memory_displ_size(8);
                let _ = at;
            }
            1 if low => {
                instruction.set_memory_displacement64(target);
                instruction.set_memory_displ_size(4);
            }
            2 if low => self.base_index(instruction, target, true),
            _ => self.base_index(instruction, target, false),
        }
        match self.random.below(16) {
            0 => instruction.set_segment_prefix(Register::GS),
            1 => instruction.set_segment_prefix(self.random.pick(&[
                Register::DS,
                Register::ES,
                Register::CS,
                Register::SS,
            ])),
            _ => {}
        }
        Some(())
    }

    /// Addressing outside 64-bit mode. What 16 bits can address is not mapped, and faults.
    fn memory_32(&mut self, instruction: &mut Instruction, target: u64) {
        match self.random.below(12) {
            0 => {
                let base =
                    self.random
                        .pick(&[Register::BX, Register::BP, Register::SI, Register::DI]);
                instruction.set_memory_base(base);
                if matches!(base, Register::BX | Register::BP) && self.random.one_in(2) {
                    instruction.set_memory_index(self.random.pick(&[Register::SI, Register::DI]));
                }
                instruction.set_memory_displacement64(self.random.next() & 0xffff);
                instruction.set_memory_displ_size(2);
            }
            1 | 2 => {
                instruction.set_memory_displacement64(target & 0xffff_ffff);
                instruction.set_memory_displ_size(4);
            }
            _ => self.base_index(instruction, target, true),
        }
        if self.random.one_in(12) {
            let segments = [Register::DS, Register::ES, Register::CS, Register::SS];
            instruction.set_segment_prefix(self.random.pick(&segments));
        }
    }

    /// Base, perhaps index and displacement, 32 bits wide when `short`.
    fn base_index(&mut self, instruction: &mut Instruction, target: u64, short: bool) {
        let register = |n: usize| {
            if short {
                Register::EAX + n as u32
            } else {
                Register::RAX + n as u32
            }
        };
        let base = self.gpr();
        let index = self.gpr();
        let with_index = self.random.one_in(2) && index != 4 && index != base;
        let displacement: i64 = match self.random.below(4) {
            0 => 0,
            1 => i64::from(self.random.next() as i8),
            _ => i64::from(self.random.next() as i32),
        };
        let mut rest = target.wrapping_sub(displacement as u64);
        if with_index {
            let scale = 1 << self.random.below(4);
            let value = if self.random.one_in(2) {
                self.random.below(1000)
            } else {
                self.random.integer()
            };
            instruction.set_memory_index(register(index));
            instruction.set_memory_index_scale(scale);
            self.state.gpr[index] = value;
            self.fixed |= 1 << index;
            rest = rest.wrapping_sub(value.wrapping_mul(u64::from(scale)));
        }
        if short {
            // The upper half does not count.
            rest = rest & 0xffff_ffff | self.random.next() << 32;
        }
        instruction.set_memory_base(register(base));
        instruction.set_memory_displacement64(if short {
            u64::from(displacement as u32)
        } else {
            displacement as u64
        });
        instruction.set_memory_displ_size(if displacement == 0 {
            0
        } else if displacement == i64::from(displacement as i8) {
            1
        } else if short {
            4
        } else {
            8
        });
        self.state.gpr[base] = rest;
        self.fixed |= 1 << base;
    }

    fn vector_memory(
        &mut self,
        instruction: &mut Instruction,
        i: u32,
        first: Register,
        kind: K,
    ) -> Option<()> {
        let base = self.gpr();
        let index = self.gpr();
        let long = matches!(kind, K::mem_vsib64x | K::mem_vsib64y);
        instruction.set_op_kind(i, OpKind::Memory);
        let long_mode = self.bits == 64;
        instruction.set_memory_base(if long_mode {
            GPR64[base]
        } else {
            Register::EAX + base as u32
        });
        instruction.set_memory_index(first + index as u32);
        let scale = 1_u32 << self.random.below(4);
        instruction.set_memory_index_scale(scale);
        if self.bases {
            return None;
        }
        self.set_gpr(base, DATA + 0x800);
        let far = self.random.one_in(4);
        let mut element = || {
            let range = if far { 0x4000 } else { 0x1000 };
            (self.random.below(range) as i64 - 0x400) / i64::from(scale)
        };
        for half in &mut self.state.ymm[index] {
            *half = 0;
            for lane in 0..if long { 2 } else { 4 } {
                let bits = if long { 64 } else { 32 };
                let value = u128::from(element() as u64) & (u128::MAX >> (128 - bits));
                *half |= value << (lane * bits);
            }
        }
        self.fixed_vector = Some(index);
        let bytes = (0..128).map(|_| self.random.next() as u8).collect();
        self.memory.push((DATA + 0x800, bytes));
        Some(())
    }

    fn string(&mut self, instruction: &mut Instruction) {
        let small = self.random.below(20);
        let count = if self.random.one_in(16) {
            self.random.below(5000)
        } else {
            small
        };
        self.state.gpr[1] = count;
        if self.bases {
            return;
        }
        let start = DATA + 0x200 + self.random.below(0x100);
        let bytes = (0..64)
            .map(|_| self.random.pick(&[0_u8, 1, 0x41]))
            .collect();
        self.memory.push((start, bytes));
        match self.random.below(3) {
            0 => instruction.set_has_rep_prefix(true),
            1 if instruction.code().op_code().can_use_repne_prefix() => {
                instruction.set_has_repne_prefix(true)
            }
            _ => {}
        }
    }

    fn stack(&mut self, instruction: &Instruction) {
        let edge = self.random.below(12);
        let middle = STACK + STACK_SIZE / 2 + self.random.below(64) * 8;
        self.state.gpr[4] = match edge {
            0 => STACK + self.random.below(20),
            1 => STACK + STACK_SIZE - self.random.below(20),
            2 => STACK + 0x1000 + 4 - self.random.below(9),
            3 => middle + 1,
            _ => middle,
        };
        let _ = instruction;
        let rsp = self.state.gpr[4];
        // What a return finds.
        let value = if self.random.one_in(4) {
            self.random.integer()
        } else {
            START + 64 + self.random.below(64)
        };
        if rsp >= STACK && rsp + 8 <= STACK + STACK_SIZE {
            self.memory.push((rsp, value.to_le_bytes().to_vec()));
        }
    }

    /// Keeps operands that address memory or code in range.
    fn bound_operands(&mut self, instruction: &Instruction) {
        use iced_x86::Mnemonic as M;
        let register = instruction.op1_register();
        match instruction.mnemonic() {
            // The bit offset in a register reaches far from the address.
            M::Bt | M::Bts | M::Btr | M::Btc
                if instruction.op0_kind() == OpKind::Memory
                    && instruction.op1_kind() == OpKind::Register =>
            {
                let number = register.full_register().number();
                if self.fixed >> number & 1 == 0 {
                    self.state.gpr[number] = (self.random.below(4000) as i64 - 2000) as u64;
                }
            }
            M::Jmp | M::Call => {
                let target = if self.random.one_in(8) && self.bits == 64 {
                    1 << 47
                } else {
                    START + 64 + self.random.below(64)
                };
                if instruction.op0_kind() == OpKind::Register {
                    let number = instruction.op0_register().full_register().number();
                    self.state.gpr[number] = target;
                } else if let Some((_, bytes)) = self.memory.first_mut()
                    && bytes.len() == 8
                {
                    *bytes = target.to_le_bytes().to_vec();
                }
            }
            // Shorter runs of divisions that fit.
            M::Div | M::Idiv if self.random.one_in(2) => {
                let high = if self.random.one_in(2) {
                    0
                } else {
                    self.random.below(3)
                };
                if self.fixed & 4 == 0 {
                    self.state.gpr[2] = high;
                }
                if self.random.one_in(2) && self.fixed & 1 == 0 {
                    self.state.gpr[0] &= 0xff;
                }
            }
            _ => {}
        }
    }
}
