//! The x87 unit (whose registers MMX shares).

mod environment;
mod host;

use host::Routine;
use iced_x86::{Code, CpuidFeature, Instruction, MemorySize};
use x86_defs::control::Cr0;
use x86_defs::exception;

use crate::cpu::{
    Access, Cpu, Exception, Handler, Mode, Op, Result, Status, instruction as handler,
};
use crate::simd::Unit;

/// x87 registers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct X87 {
    /// Physical registers R0 to R7 (not relative to the top of stack): significand, sign and exponent. MMn is the
    /// significand of Rn.
    pub(crate) registers: [(u64, u16); 8],
    /// Control word.
    pub(crate) control: u16,
    /// Status word, with the top of stack in bits 11 to 13.
    pub(crate) status: u16,
    /// Bit n: register Rn is *not* empty (the abridged tag word of FXSAVE).
    pub(crate) tags: u8,
    /// Last opcode (11 bits).
    pub(crate) opcode: u16,
    /// Last instruction pointer.
    pub(crate) instruction: u64,
    /// Last instruction's code segment.
    pub(crate) instruction_segment: u16,
    /// Last data pointer.
    pub(crate) data: u64,
    /// Last data segment.
    pub(crate) data_segment: u16,
}

impl Default for X87 {
    fn default() -> Self {
        Self {
            registers: [(0, 0); 8],
            control: 0x37f,
            status: 0,
            tags: 0,
            opcode: 0,
            instruction: 0,
            instruction_segment: 0,
            data: 0,
            data_segment: 0,
        }
    }
}

impl Cpu {
    /// #MF when an unmasked x87 exception is pending. (Without CR0.NE it would go out as FERR#, which the machine has not got.)
    #[inline]
    pub(crate) fn check_pending_x87(&mut self) -> Result<()> {
        if self.x87.status & 0x80 != 0 && self.cr0.contains(Cr0::NE) {
            return Err(self.raise(Exception::Plain(exception::MF)));
        }
        Ok(())
    }
}

/// Notes where the instruction and its data are, as each instruction but the control instructions does.
fn note_pointers(cpu: &mut Cpu, op: &Op) {
    cpu.x87.instruction = cpu.rip_of(op);
    cpu.x87.instruction_segment = 0;
    if op.has_memory() {
        cpu.x87.data = cpu.ea(op);
        cpu.x87.data_segment = 0;
    }
}

/// The routine that decoding left in the operation.
fn routine(op: &Op) -> Routine {
    // SAFETY: `lookup` gives the handlers below only to operations whose immediate it has set.
    unsafe { Routine::from_bits(op.imm & ((1 << 48) - 1)) }
}

/// An instruction on registers alone.
fn registers(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    let flags = host::execute(
        routine(op),
        &mut cpu.x87,
        &mut [0; 16],
        cpu.status.to_rflags(),
    );
    cpu.status = Status::from_rflags(flags);
    note_pointers(cpu, op);
    Ok(())
}

/// An instruction that reads `N` bytes of memory.
fn load<const N: usize>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    let mut memory = [0; 16];
    let linear = cpu.linear_op(op, N as u64, Access::Read)?;
    match N {
        2 => memory[..2].copy_from_slice(&cpu.load_in::<u16>(linear, op.seg)?.to_le_bytes()),
        4 => memory[..4].copy_from_slice(&cpu.load_in::<u32>(linear, op.seg)?.to_le_bytes()),
        8 => memory[..8].copy_from_slice(&cpu.load_in::<u64>(linear, op.seg)?.to_le_bytes()),
        _ => {
            memory[..8].copy_from_slice(&cpu.load_in::<u64>(linear, op.seg)?.to_le_bytes());
            let rest = cpu.load_in::<u16>(linear.wrapping_add(8), op.seg)?;
            memory[8..10].copy_from_slice(&rest.to_le_bytes());
        }
    }
    host::execute(routine(op), &mut cpu.x87, &mut memory, 0);
    note_pointers(cpu, op);
    Ok(())
}

/// An instruction that writes `N` bytes of memory.
fn save<const N: usize>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    if cpu.mode.contains(Mode::AMD) {
        // AMD's processors look at the place before they look at the value.
        let linear = cpu.linear_op(op, N as u64, Access::Write)?;
        cpu.probe(linear, N as u64, Access::Write, op.seg)?;
    }
    let mut memory = [0; 16];
    let mut unit = cpu.x87;
    host::execute(routine(op), &mut unit, &mut memory, 0);
    // An unmasked exception other than a loss of precision suppresses the store.
    if unit.status & !unit.control & 0x1f == 0 {
        let linear = cpu.linear_op(op, N as u64, Access::Write)?;
        let low = u64::from_le_bytes(memory[..8].try_into().unwrap_or_default());
        match N {
            2 => cpu.store_in(linear, low as u16, op.seg)?,
            4 => cpu.store_in(linear, low as u32, op.seg)?,
            8 => cpu.store_in(linear, low, op.seg)?,
            _ => {
                cpu.probe(linear, 10, Access::Write, op.seg)?;
                cpu.store_in(linear, low, op.seg)?;
                cpu.store_in(
                    linear.wrapping_add(8),
                    u16::from_le_bytes([memory[8], memory[9]]),
                    op.seg,
                )?;
            }
        }
    }
    cpu.x87 = unit;
    note_pointers(cpu, op);
    Ok(())
}

/// FWAIT.
fn wait(cpu: &mut Cpu, _: &Op) -> Result<()> {
    if cpu.cr0.contains(Cr0::MP | Cr0::TS) {
        return Err(cpu.nm());
    }
    cpu.check_pending_x87()
}

/// FNENI, FNDISI, FNSETPM: nothing since the 387.
fn nothing(_: &mut Cpu, _: &Op) -> Result<()> {
    Ok(())
}

/// The handler of an x87 instruction (FWAIT too), or `None` when it is not one.
pub(crate) fn lookup(instruction: &Instruction, op: &mut Op) -> Option<(Handler, Unit)> {
    if instruction.code() == Code::Wait {
        return Some((handler(wait), Unit::Own));
    }
    let found = control(instruction).or_else(|| arithmetic(instruction, op))?;
    Some((found, Unit::X87))
}

/// Instructions on the unit's state.
fn control(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Fldcw_m2byte => handler(environment::load_control),
        Code::Fnstcw_m2byte => handler(environment::store_control),
        Code::Fnstsw_m2byte => handler(environment::store_status),
        Code::Fnstsw_AX => handler(environment::status_to_ax),
        Code::Fnclex => handler(environment::clear_exceptions),
        Code::Fninit => handler(environment::initialize),
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => handler(nothing),
        Code::Fnstenv_m14byte => handler(environment::store_environment::<false>),
        Code::Fnstenv_m28byte => handler(environment::store_environment::<true>),
        Code::Fldenv_m14byte => handler(environment::load_environment::<false>),
        Code::Fldenv_m28byte => handler(environment::load_environment::<true>),
        Code::Fnsave_m94byte => handler(environment::save::<false>),
        Code::Fnsave_m108byte => handler(environment::save::<true>),
        Code::Frstor_m94byte => handler(environment::restore::<false>),
        Code::Frstor_m108byte => handler(environment::restore::<true>),
        _ => return None,
    })
}

/// Instructions that the host executes.
fn arithmetic(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    let code = instruction.code();
    let known = |f: &CpuidFeature| {
        matches!(
            f,
            CpuidFeature::FPU | CpuidFeature::FPU387 | CpuidFeature::CMOV | CpuidFeature::SSE3
        )
    };
    let fpu = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU387);
    let features = code.cpuid_features();
    if !features.iter().any(fpu) || !features.iter().all(known) {
        return None;
    }
    let encoding = code.op_code();
    if instruction.memory_size() == MemorySize::Unknown {
        let [escape, second] = u16::try_from(encoding.op_code()).ok()?.to_be_bytes();
        if escape & 0xf8 != 0xd8 {
            return None;
        }
        // Forms with ST(i) name the first of eight opcodes; the other operand, if any, is ST(0).
        let number = (0..instruction.op_count())
            .map(|i| instruction.op_register(i).number())
            .max();
        let number = number.map_or(0, |n| (n & 7) as u8);
        op.imm = Routine::of_registers(escape, second | number).to_bits();
        return Some(handler(registers));
    }
    let escape = u8::try_from(encoding.op_code())
        .ok()
        .filter(|e| e & 0xf8 == 0xd8)?;
    let extension = u8::try_from(encoding.group_index()).ok()?;
    op.imm = Routine::of_memory(escape, extension).to_bits();
    let stores = matches!(
        instruction.mnemonic(),
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp
    );
    Some(match (instruction.memory_size().size(), stores) {
        (2, false) => handler(load::<2>),
        (4, false) => handler(load::<4>),
        (8, false) => handler(load::<8>),
        (10, false) => handler(load::<10>),
        (2, true) => handler(save::<2>),
        (4, true) => handler(save::<4>),
        (8, true) => handler(save::<8>),
        (10, true) => handler(save::<10>),
        _ => return None,
    })
}
