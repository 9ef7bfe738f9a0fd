//! How long the software CPU takes for instructions that libraries are made of.

use std::time::Instant;

use super::generate::START;
use super::guest::Guest;
use super::native::DATA;
use super::random::Random;

/// Copies of the instruction in a block.
const COPIES: usize = 40;
/// Times that the block is run.
const ROUNDS: usize = 20_000;

const INSTRUCTIONS: &[(&str, &[u8])] = &[
    ("add rax, rcx", &[0x48, 0x01, 0xc8]),
    ("mov rax, [rdi]", &[0x48, 0x8b, 0x07]),
    ("movaps xmm0, xmm1", &[0x0f, 0x28, 0xc1]),
    ("movups xmm0, [rdi]", &[0x0f, 0x10, 0x07]),
    ("movups [rdi], xmm0", &[0x0f, 0x11, 0x07]),
    ("movdqa xmm0, [rdi]", &[0x66, 0x0f, 0x6f, 0x07]),
    ("movq xmm0, rax", &[0x66, 0x48, 0x0f, 0x6e, 0xc0]),
    ("pxor xmm0, xmm1", &[0x66, 0x0f, 0xef, 0xc1]),
    ("pcmpeqb xmm0, xmm1", &[0x66, 0x0f, 0x74, 0xc1]),
    ("pcmpeqb xmm0, [rdi]", &[0x66, 0x0f, 0x74, 0x07]),
    ("pmovmskb eax, xmm0", &[0x66, 0x0f, 0xd7, 0xc0]),
    ("paddd xmm0, xmm1", &[0x66, 0x0f, 0xfe, 0xc1]),
    ("pshufd xmm0, xmm1, 1", &[0x66, 0x0f, 0x70, 0xc1, 0x01]),
    ("psrldq xmm0, 4", &[0x66, 0x0f, 0x73, 0xd8, 0x04]),
    ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
    ("mulpd xmm0, xmm1", &[0x66, 0x0f, 0x59, 0xc1]),
    ("addsd xmm0, [rdi]", &[0xf2, 0x0f, 0x58, 0x07]),
    ("ucomisd xmm0, xmm1", &[0x66, 0x0f, 0x2e, 0xc1]),
    ("cvtsi2sd xmm0, rax", &[0xf2, 0x48, 0x0f, 0x2a, 0xc0]),
    ("vmovdqu ymm0, [rdi]", &[0xc5, 0xfe, 0x6f, 0x07]),
    ("vmovdqu [rdi], ymm0", &[0xc5, 0xfe, 0x7f, 0x07]),
    ("vpcmpeqb ymm0, ymm0, [rdi]", &[0xc5, 0xfd, 0x74, 0x07]),
    ("vpor ymm0, ymm1, ymm2", &[0xc5, 0xf5, 0xeb, 0xc2]),
    ("vpmovmskb eax, ymm0", &[0xc5, 0xfd, 0xd7, 0xc0]),
    (
        "vfmadd213pd ymm0, ymm1, ymm2",
        &[0xc4, 0xe2, 0xf5, 0xa8, 0xc2],
    ),
    ("fld qword [rdi]; fstp st0", &[0xdd, 0x07, 0xdd, 0xd8]),
    ("fadd st0, st1", &[0xd8, 0xc1]),
];

#[test]
#[ignore = "measures; run in release mode, by itself"]
fn time_of_instructions() {
    let mut guest = Guest::new();
    let mut state = super::generate::random_state(&mut Random::new(1));
    state.gpr[7] = DATA + 0x100;
    state.mxcsr = 0x1f80;
    state.x87.control = 0x37f;
    state.x87.status = 0;
    state.x87.tags = 0x7f;
    for half in state.ymm.iter_mut().flatten() {
        *half = u128::from(1.5_f64.to_bits()) << 64 | u128::from(2.5_f64.to_bits());
    }
    for (name, bytes) in INSTRUCTIONS {
        let mut code = bytes.repeat(COPIES);
        code.extend([0xeb, 0xfe]);
        guest.write(START, &code);
        let began = Instant::now();
        for _ in 0..ROUNDS {
            guest.run_block(&state);
        }
        let time = began.elapsed().as_nanos() as f64 / (ROUNDS * COPIES) as f64;
        println!("{name:32} {time:6.1} ns");
    }
}
