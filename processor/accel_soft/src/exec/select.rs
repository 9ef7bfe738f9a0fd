//! Which handler executes an instruction.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

use super::alu::{self, Binary, Form, Unary};
use super::arith::{Arith, WideArith};
use super::dispatch::{AnyAddress, BaseAddress, is_base_address};
use super::{bcd, bits, branch, moves, multiply, port, shift, stack, string, various};
use crate::cpu::{Ea, Handler, Mode, Op, Value, instruction, last_instruction};

/// A handler, and whether the block ends here.
pub(crate) struct Selected {
    pub(crate) handler: Handler,
    pub(crate) ends: bool,
}

/// Goes on to the next instruction.
fn on(handler: Handler) -> Option<Selected> {
    Some(Selected {
        handler,
        ends: false,
    })
}

/// Ends the block.
fn end(handler: Handler) -> Option<Selected> {
    Some(Selected {
        handler,
        ends: true,
    })
}

/// Calls with the type of an operand size in bytes.
macro_rules! sized {
    ($size:expr, $t:ident => $e:expr) => {
        match $size {
            1 => { type $t = u8; $e }
            2 => { type $t = u16; $e }
            4 => { type $t = u32; $e }
            8 => { type $t = u64; $e }
            _ => return None,
        }
    };
}
/// As `sized`, without bytes.
macro_rules! wide {
    ($size:expr, $t:ident => $e:expr) => {
        match $size {
            2 => { type $t = u16; $e }
            4 => { type $t = u32; $e }
            8 => { type $t = u64; $e }
            _ => return None,
        }
    };
}
/// As `sized`, 32 and 64 bits.
macro_rules! large {
    ($size:expr, $t:ident => $e:expr) => {
        match $size {
            4 => { type $t = u32; $e }
            8 => { type $t = u64; $e }
            _ => return None,
        }
    };
}
/// Picks the memory or the register instance of a function with a `MEMORY` parameter.
macro_rules! either {
    ($memory:expr, $f:ident :: $g:ident < $($a:tt),* >) => {
        if $memory { instruction($f::$g::<$($a,)* true>) } else { instruction($f::$g::<$($a,)* false>) }
    };
}
/// Calls with the kind of address that the memory operand has.
macro_rules! addressed {
    ($op:expr, $e:ident => $h:expr) => {
        if is_base_address($op) {
            type $e = BaseAddress;
            $h
        } else {
            type $e = AnyAddress;
            $h
        }
    };
}
/// One instance for each condition code.
macro_rules! conditions {
    ($cc:expr, $n:ident => $e:expr) => {
        match $cc & 15 {
            0 => {
                const $n: u8 = 0;
                $e
            }
            1 => {
                const $n: u8 = 1;
                $e
            }
            2 => {
                const $n: u8 = 2;
                $e
            }
            3 => {
                const $n: u8 = 3;
                $e
            }
            4 => {
                const $n: u8 = 4;
                $e
            }
            5 => {
                const $n: u8 = 5;
                $e
            }
            6 => {
                const $n: u8 = 6;
                $e
            }
            7 => {
                const $n: u8 = 7;
                $e
            }
            8 => {
                const $n: u8 = 8;
                $e
            }
            9 => {
                const $n: u8 = 9;
                $e
            }
            10 => {
                const $n: u8 = 10;
                $e
            }
            11 => {
                const $n: u8 = 11;
                $e
            }
            12 => {
                const $n: u8 = 12;
                $e
            }
            13 => {
                const $n: u8 = 13;
                $e
            }
            14 => {
                const $n: u8 = 14;
                $e
            }
            _ => {
                const $n: u8 = 15;
                $e
            }
        }
    };
}

fn is_memory(i: &Instruction, operand: u32) -> bool {
    i.op_count() > operand && i.op_kind(operand) == OpKind::Memory
}

fn is_immediate(i: &Instruction, operand: u32) -> bool {
    i.op_count() > operand
        && i.op_kind(operand) >= OpKind::Immediate8
        && i.op_kind(operand) < OpKind::MemorySegSI
}

/// Bytes of an operand.
fn size_of_operand(i: &Instruction, operand: u32) -> usize {
    match i.op_kind(operand) {
        OpKind::Register => i.op_register(operand).size(),
        OpKind::Memory => i.memory_size().size(),
        _ => 0,
    }
}

/// The condition in the low bits of the opcode, from iced's numbering.
fn condition(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match i.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// The handler of an integer instruction, or `None` when it is not one.
pub(crate) fn select(i: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    if let Some(repeat) = string_repeat(i) {
        return string_instruction(i, repeat);
    }
    arithmetic(i, op)
        .or_else(|| movement(i, op, mode))
        .or_else(|| control(i, op, mode))
        .or_else(|| stack_instruction(i, op, mode))
        .or_else(|| shifting(i))
        .or_else(|| multiplication(i))
        .or_else(|| bit_instruction(i))
        .or_else(|| rest(i))
}

fn form(i: &Instruction) -> Option<Form> {
    Some(
        match (is_memory(i, 0), is_memory(i, 1), is_immediate(i, 1)) {
            (true, _, true) => Form::MemoryImmediate,
            (true, _, false) => Form::MemoryRegister,
            (false, true, _) => Form::RegisterMemory,
            (false, false, true) => Form::RegisterImmediate,
            (false, false, false) => Form::RegisterRegister,
        },
    )
}

fn binary<B: Binary>(i: &Instruction, op: &Op) -> Option<Selected> {
    let form = form(i)?;
    let (locked, base) = (i.has_lock_prefix(), is_base_address(op));
    on(sized!(size_of_operand(i, 0), T => alu::binary::<B, T>(form, locked, base)))
}

fn unary<U: Unary>(i: &Instruction, op: &Op) -> Option<Selected> {
    let (memory, locked) = (is_memory(i, 0), i.has_lock_prefix());
    let base = is_base_address(op);
    on(sized!(size_of_operand(i, 0), T => alu::unary::<U, T>(memory, locked, base)))
}

fn arithmetic(i: &Instruction, op: &Op) -> Option<Selected> {
    match i.mnemonic() {
        M::Add => binary::<alu::Add>(i, op),
        M::Or => binary::<alu::Or>(i, op),
        M::Adc => binary::<alu::Adc>(i, op),
        M::Sbb => binary::<alu::Sbb>(i, op),
        M::And => binary::<alu::And>(i, op),
        M::Sub => binary::<alu::Sub>(i, op),
        M::Xor => binary::<alu::Xor>(i, op),
        M::Cmp => binary::<alu::Cmp>(i, op),
        M::Test => binary::<alu::Test>(i, op),
        M::Inc => unary::<alu::Inc>(i, op),
        M::Dec => unary::<alu::Dec>(i, op),
        M::Neg => unary::<alu::Neg>(i, op),
        M::Not => unary::<alu::Not>(i, op),
        _ => None,
    }
}

fn extend<F: Arith, T: Value, const SIGNED: bool>(memory: bool, op: &Op) -> Handler {
    if memory {
        addressed!(op, E => moves::extend_rm::<F, T, E, SIGNED>)
    } else {
        moves::extend_rr::<F, T, SIGNED>
    }
}

fn extension<const SIGNED: bool>(i: &Instruction, op: &Op) -> Option<Selected> {
    let memory = is_memory(i, 1);
    let to = size_of_operand(i, 0);
    on(match size_of_operand(i, 1) {
        1 => wide!(to, T => extend::<u8, T, SIGNED>(memory, op)),
        2 => wide!(to, T => extend::<u16, T, SIGNED>(memory, op)),
        4 => wide!(to, T => extend::<u32, T, SIGNED>(memory, op)),
        _ => return None,
    })
}

fn mov(i: &Instruction, op: &mut Op) -> Option<Selected> {
    let size = size_of_operand(i, 0);
    if is_offset_form(i) {
        op.imm = i.memory_displacement64();
        return on(if is_memory(i, 0) {
            sized!(size, T => instruction(moves::mov_to_offset::<T>))
        } else {
            sized!(size, T => instruction(moves::mov_from_offset::<T>))
        });
    }
    let other = if i.op_kind(0) == OpKind::Register {
        i.op0_register()
    } else {
        Register::None
    };
    if !(other == Register::None || other.is_gpr())
        || (i.op_kind(1) == OpKind::Register && !i.op1_register().is_gpr())
    {
        return None;
    }
    on(match form(i)? {
        Form::RegisterRegister => sized!(size, T => moves::mov_rr::<T>),
        Form::RegisterImmediate => sized!(size, T => moves::mov_ri::<T>),
        Form::RegisterMemory => sized!(size, T => addressed!(op, E => moves::mov_rm::<T, E>)),
        Form::MemoryRegister => sized!(size, T => addressed!(op, E => moves::mov_mr::<T, E>)),
        Form::MemoryImmediate => sized!(size, T => addressed!(op, E => moves::mov_mi::<T, E>)),
    })
}

fn is_offset_form(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}

fn movement(i: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let size = if i.op_count() > 0 {
        size_of_operand(i, 0)
    } else {
        0
    };
    let memory = is_memory(i, 0) || is_memory(i, 1);
    let locked = i.has_lock_prefix();
    match i.mnemonic() {
        M::Mov => mov(i, op),
        M::Movnti => on(large!(size, T => addressed!(op, E => moves::mov_mr::<T, E>))),
        M::Movzx => extension::<false>(i, op),
        M::Movsx => extension::<true>(i, op),
        // MOVSXD without REX.W moves 32 (or 16) bits and extends nothing.
        M::Movsxd => match size {
            8 => extension::<true>(i, op),
            4 if memory => on(moves::mov_rm::<u32, AnyAddress>),
            4 => on(moves::mov_rr::<u32>),
            // AMD's processors read 32 bits all the same.
            _ if memory && mode.contains(Mode::AMD) => {
                on(moves::extend_rm::<u32, u16, AnyAddress, false>)
            }
            _ if memory => on(moves::mov_rm::<u16, AnyAddress>),
            _ => on(moves::mov_rr::<u16>),
        },
        M::Lea if mode.is_64bit() && op.ea() == Ea::Flat64 => {
            on(wide!(size, T => moves::lea_flat::<T>))
        }
        M::Lea => on(wide!(size, T => moves::lea::<T>)),
        M::Xchg if memory => on(sized!(size, T => instruction(moves::xchg_m::<T>))),
        M::Xchg => on(sized!(size, T => moves::xchg_rr::<T>)),
        M::Bswap if size == 2 => on(instruction(moves::bswap16)),
        M::Bswap => on(large!(size, T => moves::bswap::<T>)),
        M::Movbe if is_memory(i, 0) => on(wide!(size, T => instruction(moves::movbe_mr::<T>))),
        M::Movbe => on(wide!(size, T => instruction(moves::movbe_rm::<T>))),
        M::Xadd => on(sized!(size, T => match (memory, locked) {
            (false, _) => instruction(moves::xadd_rr::<T>),
            (true, false) => instruction(moves::xadd_mr::<T, false>),
            (true, true) => instruction(moves::xadd_mr::<T, true>),
        })),
        M::Cmpxchg => on(sized!(size, T => match (memory, locked) {
            (false, _) => instruction(moves::cmpxchg_rr::<T>),
            (true, false) => instruction(moves::cmpxchg_mr::<T, false>),
            (true, true) => instruction(moves::cmpxchg_mr::<T, true>),
        })),
        M::Cmpxchg8b if locked => on(instruction(moves::cmpxchg_pair::<u64, true>)),
        M::Cmpxchg8b => on(instruction(moves::cmpxchg_pair::<u64, false>)),
        M::Cmpxchg16b if locked => on(instruction(moves::cmpxchg_pair::<u128, true>)),
        M::Cmpxchg16b => on(instruction(moves::cmpxchg_pair::<u128, false>)),
        M::Cbw => on(moves::widen::<u8, u16>),
        M::Cwde => on(moves::widen::<u16, u32>),
        M::Cdqe => on(moves::widen::<u32, u64>),
        M::Cwd => on(moves::sign_to_rdx::<u16>),
        M::Cdq => on(moves::sign_to_rdx::<u32>),
        M::Cqo => on(moves::sign_to_rdx::<u64>),
        M::Xlatb => on(instruction(moves::xlat)),
        M::Lahf => on(moves::lahf),
        M::Sahf => on(moves::sahf),
        _ => conditional_move(i, op, size, memory),
    }
}

fn conditional_move(i: &Instruction, op: &mut Op, size: usize, memory: bool) -> Option<Selected> {
    if i.condition_code() == iced_x86::ConditionCode::None {
        return None;
    }
    let cc = condition(i);
    if i.op_count() == 1 && (memory || i.op0_kind() == OpKind::Register) {
        if memory {
            op.imm = u64::from(cc);
            return on(instruction(moves::set_m));
        }
        return on(conditions!(cc, C => moves::set_r::<C>));
    }
    if i.op_count() == 2 && i.op0_register().is_gpr() {
        if memory {
            op.imm = u64::from(cc);
            return on(wide!(size, T => instruction(moves::cmov_rm::<T>)));
        }
        return on(wide!(size, T => conditions!(cc, C => moves::cmov_rr::<T, C>)));
    }
    None
}

/// Operand size in bytes of a near branch.
fn branch_size(i: &Instruction, mode: Mode) -> usize {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        OpKind::Register => i.op0_register().size(),
        OpKind::Memory => i.memory_size().size(),
        _ if mode.is_64bit() => 8,
        _ => 4,
    }
}

fn control(i: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let flat64 = mode.is_64bit();
    match i.mnemonic() {
        M::Ret => {
            if i.op_count() == 0 {
                op.imm = 0;
            }
            return end(match i.code() {
                Code::Retnw | Code::Retnw_imm16 => branch::ret_slow::<u16>,
                Code::Retnd | Code::Retnd_imm16 => branch::ret_slow::<u32>,
                Code::Retnq | Code::Retnq_imm16 if flat64 => branch::ret64,
                _ => return None,
            });
        }
        M::Jmp | M::Call if i.op_count() == 1 => {
            let size = branch_size(i, mode);
            let far = matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
                || i.is_jmp_far_indirect()
                || i.is_call_far_indirect();
            if far {
                return None;
            }
            return end(match (i.mnemonic(), i.op0_kind()) {
                (M::Jmp, OpKind::Register) => wide!(size, T => branch::jmp_r::<T>),
                (M::Jmp, OpKind::Memory) => wide!(size, T => branch::jmp_m::<T>),
                (M::Jmp, _) if size == 2 => branch::jmp::<true>,
                (M::Jmp, _) => branch::jmp::<false>,
                (_, OpKind::Register) => wide!(size, T => branch::call_r::<T>),
                (_, OpKind::Memory) => wide!(size, T => branch::call_m::<T>),
                _ if flat64 && size == 8 => branch::call64,
                _ => wide!(size, T => branch::call_slow::<T>),
            });
        }
        _ => {}
    }
    if i.is_jcc_short_or_near() {
        let cc = condition(i);
        return end(if branch_size(i, mode) == 2 {
            conditions!(cc, C => branch::jcc_word::<C>)
        } else {
            conditions!(cc, C => branch::jcc::<C>)
        });
    }
    counted_branch(i, op, mode)
}

fn counted_branch(i: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    op.disp = if matches!(
        i.mnemonic(),
        M::Jcxz | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne
    ) {
        i32::from(branch_size(i, mode) == 2)
    } else {
        return None;
    };
    let count = counter_size(i)?;
    end(wide!(count, T => match i.mnemonic() {
        M::Loop => branch::counted::<T, { branch::LOOP }>,
        M::Loope => branch::counted::<T, { branch::LOOPE }>,
        M::Loopne => branch::counted::<T, { branch::LOOPNE }>,
        _ => branch::counted::<T, { branch::JCXZ }>,
    }))
}

/// Bytes of the count register of LOOP and JCXZ: the address size.
fn counter_size(i: &Instruction) -> Option<usize> {
    use Code as C;
    Some(match i.code() {
        C::Jcxz_rel8_16
        | C::Jcxz_rel8_32
        | C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX => 2,
        C::Jecxz_rel8_16
        | C::Jecxz_rel8_32
        | C::Jecxz_rel8_64
        | C::Loop_rel8_16_ECX
        | C::Loop_rel8_32_ECX
        | C::Loop_rel8_64_ECX
        | C::Loope_rel8_16_ECX
        | C::Loope_rel8_32_ECX
        | C::Loope_rel8_64_ECX
        | C::Loopne_rel8_16_ECX
        | C::Loopne_rel8_32_ECX
        | C::Loopne_rel8_64_ECX => 4,
        C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64
        | C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX => 8,
        _ => return None,
    })
}

fn stack_instruction(i: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let flat64 = mode.is_64bit();
    match i.mnemonic() {
        M::Push | M::Pop if i.op0_kind() == OpKind::Register && !i.op0_register().is_gpr() => None,
        M::Push => {
            let size = i.stack_pointer_increment().unsigned_abs() as usize;
            on(match i.op0_kind() {
                OpKind::Register if flat64 && size == 8 => stack::push64_r,
                OpKind::Register => wide!(size, T => instruction(stack::push_r::<T>)),
                OpKind::Memory => wide!(size, T => instruction(stack::push_m::<T>)),
                _ if flat64 && size == 8 => stack::push64_i,
                _ => wide!(size, T => instruction(stack::push_i::<T>)),
            })
        }
        M::Pop => {
            let size = i.stack_pointer_increment().unsigned_abs() as usize;
            on(match i.op0_kind() {
                OpKind::Register if flat64 && size == 8 => stack::pop64_r,
                OpKind::Register => wide!(size, T => instruction(stack::pop_r::<T>)),
                _ => wide!(size, T => instruction(stack::pop_m::<T>)),
            })
        }
        M::Pusha => on(instruction(stack::pusha::<u16>)),
        M::Pushad => on(instruction(stack::pusha::<u32>)),
        M::Popa => on(instruction(stack::popa::<u16>)),
        M::Popad => on(instruction(stack::popa::<u32>)),
        M::Leave => on(match i.code() {
            Code::Leavew => instruction(stack::leave::<u16>),
            Code::Leaved => instruction(stack::leave::<u32>),
            _ => instruction(stack::leave::<u64>),
        }),
        M::Enter => {
            op.imm = u64::from(i.immediate16()) | u64::from(i.immediate8_2nd()) << 32;
            on(match i.code() {
                Code::Enterw_imm16_imm8 => instruction(stack::enter::<u16>),
                Code::Enterd_imm16_imm8 => instruction(stack::enter::<u32>),
                _ => instruction(stack::enter::<u64>),
            })
        }
        _ => None,
    }
}

fn shifts<S: shift::Shift>(i: &Instruction) -> Option<Selected> {
    let (memory, by_cl) = (is_memory(i, 0), !is_immediate(i, 1));
    on(sized!(size_of_operand(i, 0), T => shift::shift::<S, T>(memory, by_cl)))
}

fn flagless<const KIND: u8>(i: &Instruction) -> Option<Selected> {
    let memory = is_memory(i, 1);
    on(large!(size_of_operand(i, 0), T => if memory {
        instruction(shift::flagless::<T, KIND, true>)
    } else {
        instruction(shift::flagless::<T, KIND, false>)
    }))
}

fn shifting(i: &Instruction) -> Option<Selected> {
    let (memory, by_cl) = (is_memory(i, 0), !is_immediate(i, 2));
    match i.mnemonic() {
        M::Shl | M::Sal => shifts::<shift::Shl>(i),
        M::Shr => shifts::<shift::Shr>(i),
        M::Sar => shifts::<shift::Sar>(i),
        M::Rol => shifts::<shift::Rol>(i),
        M::Ror => shifts::<shift::Ror>(i),
        M::Rcl => shifts::<shift::Rcl>(i),
        M::Rcr => shifts::<shift::Rcr>(i),
        M::Shld => {
            on(wide!(size_of_operand(i, 0), T => shift::double_shift::<T, false>(memory, by_cl)))
        }
        M::Shrd => {
            on(wide!(size_of_operand(i, 0), T => shift::double_shift::<T, true>(memory, by_cl)))
        }
        M::Shlx => flagless::<{ shift::SHLX }>(i),
        M::Shrx => flagless::<{ shift::SHRX }>(i),
        M::Sarx => flagless::<{ shift::SARX }>(i),
        M::Rorx => flagless::<{ shift::RORX }>(i),
        _ => None,
    }
}

fn imul<T: WideArith>(i: &Instruction) -> Handler {
    match (i.op_count(), is_memory(i, 1)) {
        (2, true) => instruction(multiply::imul2::<T, true>),
        (2, false) => instruction(multiply::imul2::<T, false>),
        (_, true) => instruction(multiply::imul3::<T, true>),
        (_, false) => instruction(multiply::imul3::<T, false>),
    }
}

fn multiplication(i: &Instruction) -> Option<Selected> {
    let memory = is_memory(i, 0);
    let size = if i.op_count() > 0 {
        size_of_operand(i, 0)
    } else {
        0
    };
    match i.mnemonic() {
        M::Mul => on(sized!(size, T => either!(memory, multiply::multiply<T, false>))),
        M::Imul if i.op_count() == 1 => {
            on(sized!(size, T => either!(memory, multiply::multiply<T, true>)))
        }
        M::Imul => on(wide!(size, T => imul::<T>(i))),
        M::Div => on(sized!(size, T => either!(memory, multiply::divide<T>))),
        M::Idiv => on(sized!(size, T => either!(memory, multiply::divide_signed<T>))),
        M::Mulx => {
            let memory = is_memory(i, 2);
            on(large!(size, T => either!(memory, multiply::mulx<T>)))
        }
        _ => None,
    }
}

fn bit_test<T: Arith, const KIND: u8>(i: &Instruction) -> Handler {
    match (is_memory(i, 0), is_immediate(i, 1), i.has_lock_prefix()) {
        (false, false, _) => instruction(bits::bit_register::<T, KIND, false>),
        (false, true, _) => instruction(bits::bit_register::<T, KIND, true>),
        (true, false, false) => instruction(bits::bit_memory::<T, KIND, false, false>),
        (true, false, true) => instruction(bits::bit_memory::<T, KIND, false, true>),
        (true, true, false) => instruction(bits::bit_memory::<T, KIND, true, false>),
        (true, true, true) => instruction(bits::bit_memory::<T, KIND, true, true>),
    }
}

fn bit_instruction(i: &Instruction) -> Option<Selected> {
    let size = if i.op_count() > 0 {
        size_of_operand(i, 0)
    } else {
        0
    };
    let second = is_memory(i, 1);
    let third = is_memory(i, 2);
    match i.mnemonic() {
        M::Bt => on(wide!(size, T => bit_test::<T, { bits::TEST }>(i))),
        M::Bts => on(wide!(size, T => bit_test::<T, { bits::SET }>(i))),
        M::Btr => on(wide!(size, T => bit_test::<T, { bits::RESET }>(i))),
        M::Btc => on(wide!(size, T => bit_test::<T, { bits::COMPLEMENT }>(i))),
        M::Bsf => on(wide!(size, T => either!(second, bits::scan<T, false>))),
        M::Bsr => on(wide!(size, T => either!(second, bits::scan<T, true>))),
        M::Tzcnt => on(wide!(size, T => either!(second, bits::tzcnt<T>))),
        M::Lzcnt => on(wide!(size, T => either!(second, bits::lzcnt<T>))),
        M::Popcnt => on(wide!(size, T => either!(second, bits::popcnt<T>))),
        M::Andn => on(large!(size, T => either!(third, bits::andn<T>))),
        M::Blsi => on(large!(size, T => either!(second, bits::lowest<T, { bits::ISOLATE }>))),
        M::Blsmsk => on(large!(size, T => either!(second, bits::lowest<T, { bits::MASK }>))),
        M::Blsr => on(large!(size, T => either!(second, bits::lowest<T, { bits::CLEAR }>))),
        M::Bextr => on(large!(size, T => either!(second, bits::bextr<T>))),
        M::Bzhi => on(large!(size, T => either!(second, bits::bzhi<T>))),
        M::Pdep => on(large!(size, T => either!(third, bits::pdep<T>))),
        M::Pext => on(large!(size, T => either!(third, bits::pext<T>))),
        M::Adcx => on(large!(size, T => either!(second, bits::add_one_flag<T, false>))),
        M::Adox => on(large!(size, T => either!(second, bits::add_one_flag<T, true>))),
        M::Crc32 => {
            let from = size_of_operand(i, 1);
            on(sized!(from, T => either!(second, bits::crc32<T>)))
        }
        _ => None,
    }
}

/// The prefix of a string instruction, or `None` when it is none.
fn string_repeat(i: &Instruction) -> Option<string::Repeat> {
    if !i.is_string_instruction() {
        return None;
    }
    Some(if i.has_repne_prefix() {
        string::Repeat::NotEqual
    } else if i.has_rep_prefix() {
        string::Repeat::Equal
    } else {
        string::Repeat::Once
    })
}

fn string_instruction(i: &Instruction, repeat: string::Repeat) -> Option<Selected> {
    // The vector instruction MOVSD shares a mnemonic with the string instruction.
    let size = i.memory_size().size();
    let handler = sized!(size, T => string::handler::<T>(i.mnemonic(), repeat))?;
    let ports = matches!(
        i.mnemonic(),
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
    );
    Some(Selected {
        handler,
        ends: ports || repeat != string::Repeat::Once,
    })
}

fn port_instruction(i: &Instruction) -> Option<Selected> {
    let input = i.mnemonic() == M::In;
    let (data, number) = if input { (0, 1) } else { (1, 0) };
    let immediate = is_immediate(i, number);
    end(match (size_of_operand(i, data), input, immediate) {
        (1, true, true) => last_instruction(port::input::<u8, true>),
        (2, true, true) => last_instruction(port::input::<u16, true>),
        (4, true, true) => last_instruction(port::input::<u32, true>),
        (1, true, false) => last_instruction(port::input::<u8, false>),
        (2, true, false) => last_instruction(port::input::<u16, false>),
        (4, true, false) => last_instruction(port::input::<u32, false>),
        (1, false, true) => last_instruction(port::output::<u8, true>),
        (2, false, true) => last_instruction(port::output::<u16, true>),
        (4, false, true) => last_instruction(port::output::<u32, true>),
        (1, false, false) => last_instruction(port::output::<u8, false>),
        (2, false, false) => last_instruction(port::output::<u16, false>),
        (4, false, false) => last_instruction(port::output::<u32, false>),
        _ => return None,
    })
}

fn rest(i: &Instruction) -> Option<Selected> {
    match i.mnemonic() {
        M::Nop | M::Endbr32 | M::Endbr64 | M::Reservednop | M::Cldemote => on(various::nop),
        M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetch => on(various::nop),
        M::Pause => end(last_instruction(various::pause)),
        M::Hlt => end(last_instruction(various::hlt)),
        M::Clc => on(various::clc),
        M::Stc => on(various::stc),
        M::Cmc => on(various::cmc),
        M::Cld => on(various::cld),
        M::Std => on(various::std),
        M::Mfence | M::Lfence | M::Sfence => on(various::fence),
        M::Rdrand | M::Rdseed => {
            on(wide!(size_of_operand(i, 0), T => instruction(various::random::<T>)))
        }
        M::Clflush | M::Clflushopt | M::Clwb => on(instruction(various::flush_line)),
        M::In | M::Out => port_instruction(i),
        M::Aaa => on(instruction(bcd::ascii::<false>)),
        M::Aas => on(instruction(bcd::ascii::<true>)),
        M::Daa => on(instruction(bcd::decimal::<false>)),
        M::Das => on(instruction(bcd::decimal::<true>)),
        M::Aam => on(instruction(bcd::aam)),
        M::Aad => on(instruction(bcd::aad)),
        M::Salc => on(instruction(bcd::salc)),
        _ => None,
    }
}

/// The handler of an instruction that nobody knows.
pub(crate) fn undefined() -> Selected {
    Selected {
        handler: last_instruction(various::undefined),
        ends: true,
    }
}
