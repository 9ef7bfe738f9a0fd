//! Guests that do their worst: nothing may panic or hang, and the VM must be of use afterwards.

use std::time::{Duration, Instant};

use accel::Accel;

use super::{Test, describe, expect_pass};
use crate::board::{Board, Failure, Outcome, fail};
use crate::{Mode, guest};

pub(super) const TESTS: [Test; 6] = [
    Test {
        name: "hostile_ports",
        limit: None,
        run: |accel| super::passes(accel, "ports"),
    },
    Test {
        name: "hostile_apic",
        limit: None,
        run: wild_apic,
    },
    Test {
        name: "hostile_ring_0",
        limit: None,
        run: |accel| wild(accel, 0),
    },
    Test {
        name: "hostile_ring_3",
        limit: None,
        run: |accel| wild(accel, 1),
    },
    Test {
        name: "hostile_real_mode",
        limit: None,
        run: |accel| wild_mode(accel, Mode::Real),
    },
    Test {
        name: "hostile_protected_mode",
        limit: None,
        run: |accel| wild_mode(accel, Mode::Protected),
    },
];

/// How often each test tries, with other bytes.
const ROUNDS: u64 = 8;
/// How long a round may take; its end is a kick.
const ROUND: Duration = Duration::from_millis(40);
/// A kick that takes longer than this on a busy host is a hang.
const HANG: Duration = Duration::from_secs(20);

/// Numbers that look random but are the same in every run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Starts of instructions that reach far: control and debug registers, MSRs, descriptor tables, ports, strings, far transfers,
/// extended state, interrupts.
const SPICE: [&[u8]; 32] = [
    &[0x0f, 0x22],
    &[0x0f, 0x20],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x01],
    &[0x0f, 0x00],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0x0b],
    &[0x48, 0xcf],
    &[0xcf],
    &[0xcb],
    &[0xcd],
    &[0xcc],
    &[0xf1],
    &[0x9d],
    &[0xfb],
    &[0xf4],
    &[0xf3, 0xa4],
    &[0xf3, 0x48, 0xab],
    &[0xf3, 0x6e],
    &[0xf3, 0x6c],
    &[0x8e],
    &[0xff],
    &[0xf0, 0x48, 0x0f, 0xc7],
    &[0xc5, 0xfc],
];

fn bytes(numbers: &mut Numbers, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        let number = numbers.next();
        if number & 3 == 0 {
            bytes.extend_from_slice(SPICE[(number >> 8) as usize % SPICE.len()]);
        } else {
            let count = 1 + (number >> 2 & 3) as usize;
            bytes.extend_from_slice(&number.to_le_bytes()[4..4 + count]);
        }
    }
    bytes.truncate(len);
    bytes
}

/// Runs a round; any end is a good one but a hang. Then the vCPU must reset and run an ordinary guest.
fn round(board: &mut Board, last: bool) -> Result<(), Failure> {
    let start = Instant::now();
    let outcome = board.run(ROUND);
    if start.elapsed() > HANG {
        return Err(format!("took {:?} to stop", start.elapsed()));
    }
    if matches!(&outcome, Outcome::InternalError(why) if why.contains("panicked")) {
        return Err(describe(board, &outcome));
    }
    board.vcpus[0].state().map_err(fail)?;
    board.vcpus[0].reset().map_err(fail)?;
    if !last {
        return Ok(());
    }
    board.memory.write(0, &[0; 0x9000]).map_err(fail)?;
    let good = guest("port_io");
    board
        .memory
        .write(good.mode.address(), good.image)
        .map_err(fail)?;
    board.enter(good.mode)?;
    board.io.forget();
    expect_pass(board)
}

fn wild(accel: &dyn Accel, ring: u32) -> Result<(), Failure> {
    for seed in 1..=ROUNDS {
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
        let mut board = Board::new(accel, guest("wild"), 1)?;
        let code = bytes(&mut numbers, 0x10_0000);
        board.memory.write(0x20_0000, &code).map_err(fail)?;
        board
            .memory
            .write(0x8200, &ring.to_le_bytes())
            .map_err(fail)?;
        round(&mut board, seed == ROUNDS)?;
    }
    Ok(())
}

fn wild_mode(accel: &dyn Accel, mode: Mode) -> Result<(), Failure> {
    for seed in 1..=4 * ROUNDS {
        let mut numbers = Numbers(0x2545_f491_4f6c_dd1du64.wrapping_mul(seed));
        let mut board = Board::new(accel, guest("wild"), 1)?;
        // From address 0 on, so that the interrupt table and what it leads to are wild as well.
        let code = bytes(&mut numbers, 0x11_0000);
        board.memory.write(0, &code).map_err(fail)?;
        board.vcpus[0].reset().map_err(fail)?;
        board.enter(mode)?;
        round(&mut board, seed == 4 * ROUNDS)?;
    }
    Ok(())
}

fn wild_apic(accel: &dyn Accel) -> Result<(), Failure> {
    for seed in 1..=ROUNDS {
        let mut board = Board::new(accel, guest("wild_apic"), 1)?;
        let number = Numbers(seed).next() as u32;
        board
            .memory
            .write(0x8200, &number.to_le_bytes())
            .map_err(fail)?;
        round(&mut board, seed == ROUNDS)?;
    }
    Ok(())
}
