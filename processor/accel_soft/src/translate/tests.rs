//! Programs whose blocks are translated, linked and thrown away.

use std::time::Duration;

use crate::apic::Event;
use crate::cpu::Mode;
use crate::run::Engine;
use crate::testing::{Ports, engine, run_blocks_to_halt};

/// A loop whose pushes share one look-up. At last the first of them writes over the others.
#[test]
fn a_push_over_the_next_ones_is_seen_at_once() {
    // 0: mov rax, two NOPs and what follows the pushes; 10: mov edi, 1800h, in the page of the code; 15: mov ecx, 100.
    let mut code = vec![0x48, 0xb8, 0x90, 0x90, 0xff, 0xc3, 0x90, 0x90, 0x90, 0x90];
    code.extend([0xbf, 0, 0x18, 0, 0, 0xb9, 100, 0, 0, 0]);
    // 20: mov rsp, rdi; push rax, three times; inc ebx; NOPs; dec ecx; jnz 20.
    code.extend([0x48, 0x89, 0xfc, 0x50, 0x50, 0x50]);
    code.extend([0xff, 0xc3, 0x90, 0x90, 0x90, 0x90]);
    code.extend([0xff, 0xc9, 0x75, 20_u8.wrapping_sub(36)]);
    // 36: test esi, esi; jnz 54; inc esi; mov edi, 8 bytes behind the second push; mov ecx, 1; jmp 20; 54: hlt.
    code.extend([0x85, 0xf6, 0x75, 14, 0xff, 0xc6, 0xbf]);
    let behind = crate::testing::CODE as u32 + 24 + 8;
    code.extend(behind.to_le_bytes());
    code.extend([0xb9, 1, 0, 0, 0, 0xeb, 20_u8.wrapping_sub(54), 0xf4]);
    let mut engine = engine(64, &code);
    run_blocks_to_halt(&mut engine);
    assert_eq!(engine.cpu.regs[3], 101);
    assert_eq!(engine.cpu.regs[4], u64::from(behind) - 8, "one push");
}

/// Returns that translated code does not find leave it, so that many of them show.
#[test]
fn returns_are_found_again_after_all_code_was_thrown_away() {
    // 0: mov ecx, 5000; 5: call 12; 10: dec ecx; jnz 5; hlt. 15: ret.
    let code = [
        0xb9, 0x88, 0x13, 0, 0, 0xe8, 5, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xf4, 0xc3,
    ];
    let mut engine = engine(64, &code);
    let start = engine.cpu.rip;
    let mut left = [0; 3];
    for (round, times) in left.iter_mut().enumerate() {
        engine.cpu.rip = start;
        engine.cpu.halted = false;
        run_blocks_to_halt(&mut engine);
        let counts = engine.translator.as_ref().unwrap().statistics;
        *times = counts.links + counts.others;
        // The second round is in another address space; only that is known when the code is thrown away.
        if round == 0 {
            engine.cpu.tlb.flush_all();
        } else {
            engine.cpu.code_stale = true;
        }
    }
    assert!(left[0] > 0 && left[2] < 300, "{left:?}");
}

/// An engine that runs a program with user privilege.
fn user_engine(code: &[u8]) -> Engine {
    let mut engine = engine(64, code);
    engine.cpu.cpl = 3;
    engine.cpu.update_mode();
    assert!(engine.cpu.mode.contains(Mode::USER));
    engine
}

/// Runs a program until it spins at `end`.
fn run_to(engine: &mut Engine, end: u64) {
    let shared = engine.cpu.shared.clone();
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let over = done.clone();
    let kicker = std::thread::spawn(move || {
        while !over.load(std::sync::atomic::Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
            shared.mailbox.raise(Event::KICK);
        }
    });
    let mut turns = 0;
    while engine.cpu.rip != end && turns < 20_000 {
        assert_eq!(engine.run(&Ports::default()), accel::Exit::Kicked);
        turns += 1;
    }
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    kicker.join().unwrap();
    assert_eq!(engine.cpu.rip, end);
}

/// A program that calls a function in another page, under one key after another, until all keys are taken.
#[test]
fn calls_to_another_page_go_where_their_key_says() {
    const ROUNDS: u32 = 3000;
    let [a, b, c, _] = ROUNDS.to_le_bytes();
    // 0: mov ecx, ROUNDS; 5: call 1000h; 10: dec ecx; jnz 5; 14: jmp 14. 1000h: inc ebx; ret.
    let mut code = vec![0xb9, a, b, c, 0, 0xe8, 0xf6, 0x0f, 0, 0];
    code.extend([0xff, 0xc9, 0x75, 0xf7, 0xeb, 0xfe]);
    code.resize(0x1000, 0x90);
    code.extend([0xff, 0xc3, 0xc3]);
    let mut engine = user_engine(&code);
    let start = engine.cpu.rip;
    for round in 1..=4 {
        engine.cpu.rip = start;
        run_to(&mut engine, start + 14);
        assert_eq!(engine.cpu.regs[3], round * u64::from(ROUNDS));
        let translator = engine.translator.as_mut().unwrap();
        if round == 1 {
            assert!(translator.is_linked_far());
        }
        if round == 2 {
            translator.take_all_keys();
        } else {
            engine.cpu.tlb.flush_all();
        }
    }
}

/// A program that adds to two pages by turns through one register, and then spins.
#[test]
fn an_operand_that_goes_from_page_to_page_is_compiled_anew() {
    const ROUNDS: u32 = 200_000;
    let [a, b, c, _] = ROUNDS.to_le_bytes();
    // 0: mov ecx, ROUNDS; 5: mov ebx, 20000h; 10: add [rbx], rcx; 13: xor ebx, 1000h; 19: inc qword [rbx+8];
    // 23: dec ecx; 25: jnz 10; 27: jmp 27.
    let code = [
        0xb9, a, b, c, 0, 0xbb, 0, 0, 2, 0, 0x48, 0x01, 0x0b, 0x81, 0xf3, 0, 0x10, 0, 0, 0x48,
        0xff, 0x43, 8, 0xff, 0xc9, 0x75, 0xef, 0xeb, 0xfe,
    ];
    let mut engine = user_engine(&code);
    let end = engine.cpu.rip + 27;
    run_to(&mut engine, end);
    let word = |at: u64| {
        let mut bytes = [0; 8];
        engine.cpu.machine.memory.read(at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    // The even counts go to the first page, as the first of all does.
    let half = u64::from(ROUNDS / 2);
    let sums = [half * (half + 1), half * half];
    assert_eq!([word(0x2_0000), word(0x2_1000)], sums);
    assert_eq!([word(0x2_0008), word(0x2_1008)], [half, half]);
    let translator = engine.translator.as_ref().unwrap();
    assert!(translator.has_scattered());
}

/// Registers at the end of a program that runs one string instruction 40 times, and the bytes from 20000h to 24000h.
fn strings(code: &[u8], translated: bool) -> ([u64; 16], Vec<u8>) {
    let mut engine = user_engine(code);
    let mut data: Vec<u8> = (0..0x4000_u32).map(|n| (n * 7 + n / 256) as u8).collect();
    let memory = engine.cpu.machine.memory.clone();
    memory.load(0x2_0000, &data).unwrap();
    engine.options.hot_after = if translated { 1 } else { 60_000 };
    let end = engine.cpu.rip + code.len() as u64 - 2;
    run_to(&mut engine, end);
    memory.read(0x2_0000, &mut data).unwrap();
    (std::array::from_fn(|n| engine.cpu.regs[n]), data)
}

/// The program: sets the flags, the direction and the registers of a string instruction, and adds up what it leaves.
fn string_program(form: &[u8], [from, to, count]: [u32; 3], backwards: bool) -> Vec<u8> {
    // 0: mov edx, 40; 5: cmp eax, 0; CLD or STD; mov esi, from; mov edi, to; mov ecx, count; the instruction.
    let mut code = vec![0xba, 40, 0, 0, 0, 0x83, 0xf8, 0];
    code.push(0xfc + u8::from(backwards));
    for (opcode, value) in [(0xbe, from), (0xbf, to), (0xb9, count)] {
        code.push(opcode);
        code.extend(value.to_le_bytes());
    }
    code.extend(form);
    // setz bl; add ebp, ebx; add ebp, edi; add ebp, esi; add ebp, ecx; add eax, 17; dec edx; jnz 5; spins.
    code.extend([
        0x0f, 0x94, 0xc3, 0x01, 0xdd, 0x01, 0xfd, 0x01, 0xf5, 0x01, 0xcd,
    ]);
    code.extend([0x83, 0xc0, 17, 0xff, 0xca, 0x75]);
    code.push(5_u8.wrapping_sub(code.len() as u8 + 1));
    code.extend([0xeb, 0xfe]);
    code
}

/// Copies and fills of every size, direction, overlap and place in a page do what the interpreter does.
#[test]
fn repeated_strings_are_as_interpreted() {
    const FORMS: [&[u8]; 8] = [
        &[0xf3, 0xa4],
        &[0xf3, 0xa5],
        &[0xf3, 0x48, 0xa5],
        &[0xf3, 0xaa],
        &[0xf3, 0xab],
        &[0xf3, 0x48, 0xab],
        &[0xf2, 0xa4],
        &[0x67, 0xf3, 0xaa],
    ];
    const COUNTS: [u32; 10] = [0, 1, 2, 7, 63, 300, 511, 512, 1024, 4096];
    let mut seed = 0x1234_5678_u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) % below
    };
    for case in 0..160 {
        let form = FORMS[case % FORMS.len()];
        let count = COUNTS[random(10) as usize];
        let from = 0x2_0000 + random(0x1200);
        let to = match random(3) {
            0 => from + random(64),
            _ => 0x2_1f00 + random(0x200),
        };
        let code = string_program(form, [from, to, count], random(6) == 0);
        let [translated, interpreted] = [true, false].map(|on| strings(&code, on));
        assert_eq!(translated.0, interpreted.0, "case {case}, seed {seed:#x}");
        assert!(translated.1 == interpreted.1, "case {case}: other bytes");
    }
}

/// A loop with a fill, which at last writes over the instruction behind it.
#[test]
fn a_fill_of_code_is_seen_at_once() {
    // 0: mov eax, 90h; mov ebx, 1800h, in the page of the code; mov edx, 100; 15: mov edi, ebx; mov ecx, 2; rep stosb;
    // 24: inc ebp; dec edx; jnz 15.
    let mut code = vec![0xb8, 0x90, 0, 0, 0, 0xbb, 0, 0x18, 0, 0, 0xba, 100, 0, 0, 0];
    code.extend([0x89, 0xdf, 0xb9, 2, 0, 0, 0, 0xf3, 0xaa]);
    code.extend([0xff, 0xc5, 0xff, 0xca, 0x75, 15_u8.wrapping_sub(30)]);
    // 30: cmp ebx, 1800h; mov ebx, where the INC is; mov edx, 1; jz 15; spins.
    code.extend([0x81, 0xfb, 0, 0x18, 0, 0, 0xbb]);
    code.extend((crate::testing::CODE as u32 + 24).to_le_bytes());
    code.extend([0xba, 1, 0, 0, 0, 0x74, 15_u8.wrapping_sub(48), 0xeb, 0xfe]);
    for translated in [true, false] {
        let (registers, _) = strings(&code, translated);
        assert_eq!(registers[5], 100, "NOPs instead of the last INC");
    }
}

/// Calls through the word that they push to, to places that are not translated yet.
#[test]
fn a_call_through_the_slot_it_pushes_to_is_done_once() {
    const TIMES: u8 = 200;
    // 0: mov ecx, TIMES; 5: mov esp, 20800h; lea rax, [rcx + NOPs]; mov [rsp-8], rax; call [rsp-8]; dec ecx; jnz 5.
    let mut code = vec![0xb9, TIMES, 0, 0, 0, 0xbc, 0, 8, 2, 0, 0x48, 0x8d, 0x81];
    code.extend((crate::testing::CODE as u32 + 31).to_le_bytes());
    code.extend([0x48, 0x89, 0x44, 0x24, 0xf8, 0xff, 0x54, 0x24, 0xf8]);
    code.extend([0xff, 0xc9, 0x75, 5_u8.wrapping_sub(30), 0xeb, 0xfe]);
    // 32: NOPs, of which ever fewer are executed; inc ebp; ret.
    code.extend([0x90; TIMES as usize]);
    code.extend([0xff, 0xc5, 0xc3]);
    let mut engine = user_engine(&code);
    engine.options.hot_after = 1;
    let end = engine.cpu.rip + 30;
    run_to(&mut engine, end);
    assert_eq!(engine.cpu.regs[5], u64::from(TIMES));
}

/// A kernel's loop over flags, CLI, STI, CLD, SWAPGS and fences. It leaves sums of what it has seen.
fn kernel_loop(translated: bool) -> [u64; 16] {
    // 0: mov ecx, 300; mov esp, 20800h; STD; 11: cmp al, cl.
    let mut code = vec![0xb9, 0x2c, 1, 0, 0, 0xbc, 0, 8, 2, 0, 0xfd, 0x38, 0xc8];
    // Thrice: CLI, STI or CLD; PUSHFQ; setb dl; add ebx, edx; pop rdi; add rbp, rdi.
    for instruction in [0xfa, 0xfb, 0xfc] {
        code.extend([instruction, 0x9c, 0x0f, 0x92, 0xc2, 0x01, 0xd3, 0x5f]);
        code.extend([0x48, 0x01, 0xfd]);
    }
    // PUSHFQ, whose flags nothing needs afterwards; pop rdi; add eax, edi.
    code.extend([0x9c, 0x5f, 0x01, 0xf8]);
    // SWAPGS; fences; seta dl; add ebx, edx; mov rdi, gs:[0]; add rsi, rdi; STI; add eax, 77; dec ecx; jnz 11.
    code.extend([0x0f, 0x01, 0xf8, 0x0f, 0xae, 0xe8, 0x0f, 0xae, 0xf0]);
    code.extend([0x0f, 0xae, 0xf8, 0x0f, 0x97, 0xc2, 0x01, 0xd3]);
    code.extend([0x65, 0x48, 0x8b, 0x3c, 0x25, 0, 0, 0, 0]);
    code.extend([0x48, 0x01, 0xfe, 0xfb, 0x83, 0xc0, 77, 0xff, 0xc9, 0x75]);
    code.push(11_u8.wrapping_sub(code.len() as u8 + 1));
    // PUSHFQ; pop r8; spins.
    code.extend([0x9c, 0x41, 0x58, 0xeb, 0xfe]);
    let mut engine = engine(64, &code);
    engine.cpu.system.kernel_gs_base = 0x2_0000;
    let memory = engine.cpu.machine.memory.clone();
    memory.load(0x2_0000, &[9, 1, 0, 0, 0, 0, 0, 0]).unwrap();
    engine.options.hot_after = if translated { 1 } else { 60_000 };
    let end = engine.cpu.rip + code.len() as u64 - 2;
    run_to(&mut engine, end);
    assert!(engine.cpu.system_flag(x86_defs::control::Rflags::IF));
    std::array::from_fn(|n| engine.cpu.regs[n])
}

#[test]
fn flags_and_bases_of_a_kernel_are_as_interpreted() {
    assert_eq!(kernel_loop(true), kernel_loop(false));
}

/// A loop that is interruptible for one instruction at a time, and whose interrupt comes when it is not.
#[test]
fn an_interrupt_that_waits_for_sti_is_delivered() {
    // 0: jmp 2; sti; nop; cli; jmp 0. The shadow that is left from the last STI lets the first jump go before the look.
    let mut engine = engine(64, &[0xeb, 0, 0xfb, 0x90, 0xfa, 0xeb, 0xf9]);
    engine.options.hot_after = 1;
    // The local APIC's spurious interrupt vector register: enabled.
    let _ = engine.cpu.apic.write_page(0xf0, 0x1ff);
    let shared = engine.cpu.shared.clone();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        shared.mailbox.request(0x40, false);
        std::thread::sleep(Duration::from_secs(5));
        shared.mailbox.raise(Event::KICK);
    });
    // No interrupt can be delivered without a descriptor table.
    assert_eq!(engine.run(&Ports::default()), accel::Exit::Shutdown);
    let counts = engine.translator.as_ref().unwrap().statistics;
    assert!(counts.blocks > 0, "nothing was translated");
    drop(sender);
}
