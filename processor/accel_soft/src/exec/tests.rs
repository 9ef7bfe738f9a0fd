//! Programs in all three code sizes, run instruction by instruction and as blocks.

use crate::testing::{CODE, Ports, engine, run_blocks_to_halt, run_to_halt};
use iced_x86::code_asm::*;
use x86_defs::state::{RAX, RBX, RCX, RDI, RDX, RSI, RSP};

fn assemble(bits: u32, f: impl Fn(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a);
    a.hlt().unwrap();
    a.assemble(CODE).unwrap()
}

/// Runs both ways and gives the general registers.
fn registers(bits: u32, f: impl Fn(&mut CodeAssembler)) -> Vec<u64> {
    let code = assemble(bits, f);
    let mut single = engine(bits, &code);
    run_to_halt(&mut single);
    let mut blocks = engine(bits, &code);
    run_blocks_to_halt(&mut blocks);
    let a: Vec<u64> = (0..16).map(|i| single.cpu.regs[i]).collect();
    let b: Vec<u64> = (0..16).map(|i| blocks.cpu.regs[i]).collect();
    assert_eq!(a, b, "single steps and blocks differ");
    assert_eq!(single.cpu.rflags(), blocks.cpu.rflags());
    assert_eq!(single.cpu.instructions, blocks.cpu.instructions);
    a
}

#[test]
fn loops_and_sums() {
    for bits in [32, 64] {
        let r = registers(bits, |a| {
            let mut top = a.create_label();
            a.mov(ecx, 10000).unwrap();
            a.xor(eax, eax).unwrap();
            a.set_label(&mut top).unwrap();
            a.add(eax, ecx).unwrap();
            a.dec(ecx).unwrap();
            a.jne(top).unwrap();
        });
        assert_eq!((r[RAX], r[RCX]), (50_005_000, 0));
    }
}

#[test]
fn calls_and_stack() {
    let r = registers(64, |a| {
        let mut f = a.create_label();
        let mut over = a.create_label();
        a.mov(eax, 5).unwrap();
        a.call(f).unwrap();
        a.push(rax).unwrap();
        a.pop(rbx).unwrap();
        a.jmp(over).unwrap();
        a.set_label(&mut f).unwrap();
        a.lea(eax, rax * 2 + 1).unwrap();
        a.ret().unwrap();
        a.set_label(&mut over).unwrap();
    });
    assert_eq!((r[RAX], r[RBX], r[RSP]), (11, 11, 0x8000));
}

#[test]
fn real_width_stack_in_16_bit_code() {
    let r = registers(16, |a| {
        a.mov(ax, 0x1234).unwrap();
        a.push(ax).unwrap();
        a.push(ax).unwrap();
        a.pop(bx).unwrap();
        a.mov(esi, 0x2000).unwrap();
        a.mov(dword_ptr(esi), 0x89ab_cdefu32).unwrap();
        a.mov(cx, word_ptr(si + 2)).unwrap();
    });
    assert_eq!((r[RBX], r[RCX], r[RSP]), (0x1234, 0x89ab, 0x7ffe));
}

#[test]
fn memory_operands_of_all_sizes() {
    let r = registers(64, |a| {
        a.mov(edi, 0x3000).unwrap();
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.movzx(ecx, byte_ptr(rdi + 1)).unwrap();
        a.movsx(rdx, word_ptr(rdi)).unwrap();
        a.add(dword_ptr(rdi + 4), 1).unwrap();
        a.mov(ebx, dword_ptr(rdi + 4)).unwrap();
        a.add(al, ah).unwrap();
        a.mov(rsi, qword_ptr(rdi + 0x0ffc)).unwrap();
    });
    assert_eq!(r[RCX], 0x77);
    assert_eq!(r[RDX], 0x7788);
    assert_eq!(r[RBX], 0x1122_3345);
    assert_eq!(r[RAX], 0x1122_3344_5566_77ff);
    assert_eq!(r[RSI], 0);
}

#[test]
fn accesses_across_pages() {
    let r = registers(64, |a| {
        a.mov(edi, 0x4ffd).unwrap();
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.add(qword_ptr(rdi), 1).unwrap();
        a.mov(rbx, qword_ptr(rdi)).unwrap();
        a.lock().xadd(qword_ptr(rdi), rax).unwrap();
        a.mov(rcx, qword_ptr(rdi)).unwrap();
    });
    assert_eq!(r[RBX], 0x1122_3344_5566_7789);
    assert_eq!(r[RAX], 0x1122_3344_5566_7789);
    assert_eq!(r[RCX], 0x2244_6688_aacc_ef11);
}

#[test]
fn repeated_strings() {
    let r = registers(64, |a| {
        a.mov(edi, 0x5ff1).unwrap();
        a.mov(eax, 0xa5a5_a5a5u32).unwrap();
        a.mov(ecx, 3000).unwrap();
        a.rep().stosd().unwrap();
        a.mov(esi, 0x5ff1).unwrap();
        a.mov(edi, 0xa003).unwrap();
        a.mov(ecx, 12000).unwrap();
        a.rep().movsb().unwrap();
        a.mov(edi, 0xa003).unwrap();
        a.mov(ecx, 20000).unwrap();
        a.repe().scasb().unwrap();
    });
    // The last compare found the byte after the copy.
    assert_eq!(r[RDI], 0xa003 + 12001);
    assert_eq!(r[RCX], 20000 - 12001);
    assert_eq!(r[RSI], 0x5ff1 + 12000);
}

#[test]
fn overlapping_forward_copy_repeats_its_beginning() {
    let r = registers(64, |a| {
        a.mov(edi, 0x3000).unwrap();
        a.mov(word_ptr(rdi), 0x4241).unwrap();
        a.mov(esi, 0x3000).unwrap();
        a.mov(edi, 0x3002).unwrap();
        a.mov(ecx, 100).unwrap();
        a.rep().movsb().unwrap();
        a.movzx(eax, word_ptr(0x3000 + 98)).unwrap();
    });
    assert_eq!(r[RAX], 0x4241);
}

#[test]
fn multiplication_and_division() {
    let r = registers(64, |a| {
        a.mov(rax, u64::MAX).unwrap();
        a.mov(ecx, 10).unwrap();
        a.mul(rcx).unwrap();
        a.div(rcx).unwrap();
        a.mov(rbx, rax).unwrap();
        a.mov(rax, -100i64).unwrap();
        a.cqo().unwrap();
        a.mov(ecx, 7).unwrap();
        a.idiv(rcx).unwrap();
    });
    assert_eq!(r[RBX], u64::MAX);
    assert_eq!((r[RAX] as i64, r[RDX] as i64), (-14, -2));
}

#[test]
fn atomics_and_bits() {
    let r = registers(64, |a| {
        a.mov(edi, 0x3000).unwrap();
        a.mov(eax, 0).unwrap();
        a.mov(ebx, 7).unwrap();
        a.lock().cmpxchg(qword_ptr(rdi), rbx).unwrap();
        a.setz(cl).unwrap();
        a.movzx(ecx, cl).unwrap();
        a.mov(edx, 1000).unwrap();
        a.lock().bts(qword_ptr(rdi), rdx).unwrap();
        a.movzx(esi, byte_ptr(rdi + 125)).unwrap();
        a.popcnt(rbx, rbx).unwrap();
        a.bsr(rdx, rdx).unwrap();
    });
    assert_eq!((r[RCX], r[RSI], r[RBX], r[RDX]), (1, 1, 3, 9));
}

#[test]
fn code_that_changes_itself() {
    let r = registers(64, |a| {
        let mut patched = a.create_label();
        let mut top = a.create_label();
        a.mov(ecx, 3).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut top).unwrap();
        a.lea(rdi, qword_ptr(patched)).unwrap();
        a.add(byte_ptr(rdi + 1), 1).unwrap();
        a.set_label(&mut patched).unwrap();
        a.mov(eax, 0x10).unwrap();
        a.add(ebx, eax).unwrap();
        a.dec(ecx).unwrap();
        a.jne(top).unwrap();
    });
    assert_eq!(r[RBX], 0x11 + 0x12 + 0x13);
}

#[test]
fn decimal_arithmetic() {
    let r = registers(32, |a| {
        a.mov(al, 0x79).unwrap();
        a.add(al, 0x35).unwrap();
        a.daa().unwrap();
        a.setc(bl).unwrap();
        a.movzx(ebx, bl).unwrap();
        a.movzx(ecx, al).unwrap();
        a.mov(ax, 105).unwrap();
        a.aam(10).unwrap();
    });
    assert_eq!((r[RCX], r[RBX], r[RAX] & 0xffff), (0x14, 1, 0x0a05));
}

#[test]
fn ports() {
    let code = assemble(64, |a| {
        a.mov(edx, 0x3f8).unwrap();
        a.mov(eax, 0x41).unwrap();
        a.out(dx, al).unwrap();
        a.in_(eax, 0x60).unwrap();
        a.mov(esi, 0x1000).unwrap();
        a.mov(ecx, 2).unwrap();
        a.rep().outsb().unwrap();
    });
    let mut e = engine(64, &code);
    let ports = Ports::default();
    while !e.cpu.halted {
        e.step(&ports).unwrap();
    }
    assert_eq!(e.cpu.regs[RAX], 0x6060_6060);
    assert_eq!(
        *ports.0.lock(),
        [
            (0x3f8, vec![0x41]),
            (0x3f8, vec![code[0]]),
            (0x3f8, vec![code[1]])
        ]
    );
}

#[test]
fn a_fault_leaves_the_state_as_it_was() {
    let code = assemble(64, |a| {
        a.mov(rax, 0x8000_0000_0000_0000u64).unwrap();
        a.push(rbx).unwrap();
        a.add(qword_ptr(rax), 1).unwrap();
    });
    let mut e = engine(64, &code);
    let ports = Ports::default();
    e.step(&ports).unwrap();
    e.step(&ports).unwrap();
    let rip = e.cpu.rip;
    // There is no IDT: the fault ends in a triple fault.
    assert_eq!(e.step(&ports), Err(accel::Exit::Shutdown));
    assert_eq!(e.cpu.rip, rip);
    assert_eq!(e.cpu.regs[RSP], 0x7ff8);
}

#[test]
fn counted_branches() {
    for bits in [16, 32, 64] {
        let r = registers(bits, |a| {
            let mut top = a.create_label();
            let mut done = a.create_label();
            a.mov(cx, 5).unwrap();
            a.xor(ax, ax).unwrap();
            a.set_label(&mut top).unwrap();
            a.add(ax, cx).unwrap();
            if bits == 64 {
                a.jrcxz(done).unwrap();
            } else {
                a.jecxz(done).unwrap();
            }
            a.loop_(top).unwrap();
            a.set_label(&mut done).unwrap();
        });
        assert_eq!((r[RAX], r[RCX]), (15, 0), "{bits}-bit code");
    }
}
