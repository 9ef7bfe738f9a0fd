//! What the host does to vCPUs: state in and out, kicks, resets, stops of guest time; and how guests end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use accel::{Accel, VcpuStatistics};
use guest_memory::{BackingOptions, GuestMemory};
use x86_defs::state::VcpuState;

use super::{TIME, Test, describe, expect_pass};
use crate::board::{Board, Failure, Io, Outcome, fail};
use crate::{Mode, guest};

pub(super) const TESTS: [Test; 10] = [
    Test {
        name: "state_moves",
        limit: None,
        run: state_moves,
    },
    Test {
        name: "state_halted",
        limit: None,
        run: state_halted,
    },
    Test {
        name: "cpuid",
        limit: Some("it lets the guest see the host's CPUID"),
        run: cpuid,
    },
    Test {
        name: "hypercall",
        limit: Some("it repeats VMCALL for ever"),
        run: hypercall,
    },
    Test {
        name: "kvmclock",
        limit: None,
        run: kvmclock,
    },
    Test {
        name: "kick_ring_0",
        limit: None,
        run: |accel| kicks(accel, 0),
    },
    Test {
        name: "kick_ring_3",
        limit: None,
        run: |accel| kicks(accel, 1),
    },
    Test {
        name: "kick_halted",
        limit: None,
        run: |accel| kicks(accel, 2),
    },
    Test {
        name: "triple_fault",
        limit: None,
        run: triple_fault,
    },
    Test {
        name: "reset",
        limit: None,
        run: reset,
    },
];

/// A word that the host writes and guests read.
const WORD: u64 = 0x8200;

fn write_word(memory: &GuestMemory, value: u32) -> Result<(), Failure> {
    memory.write(WORD, &value.to_le_bytes()).map_err(fail)
}

/// Moves a running guest from one VM to a fresh one, many times; its registers must not notice.
fn state_moves(accel: &dyn Accel) -> Result<(), Failure> {
    let guest = guest("state");
    let mut board = Board::new(accel, guest, 1)?;
    for _ in 0..12 {
        match board.run(Duration::from_millis(15)) {
            Outcome::TimedOut => {}
            other => return Err(describe(&board, &other)),
        }
        let state = board.vcpus[0].state().map_err(fail)?;
        let mut bytes = vec![0; crate::board::RAM as usize];
        board.memory.read(0, &mut bytes).map_err(fail)?;
        board = Board::new(accel, guest, 1)?;
        board.memory.write(0, &bytes).map_err(fail)?;
        board.vcpus[0].set_state(&state).map_err(fail)?;
        let back = board.vcpus[0].state().map_err(fail)?;
        same(&state, &back)?;
    }
    write_word(&board.memory, 1)?;
    expect_pass(&mut board)
}

/// Compares states but for the time.
fn same(wanted: &VcpuState, got: &VcpuState) -> Result<(), Failure> {
    let still = |state: &VcpuState| {
        let mut state = state.clone();
        state.msrs.retain(|(index, _)| *index != x86_defs::msr::TSC);
        state
    };
    let (wanted, got) = (still(wanted), still(got));
    if wanted == got {
        return Ok(());
    }
    let part = |name: &str, same: bool| {
        if same {
            String::new()
        } else {
            format!(" {name}")
        }
    };
    Err(format!(
        "state changed on its way:{}{}{}{}{}{}{}",
        part("registers", wanted.registers == got.registers),
        part("system", wanted.system == got.system),
        part("xsave", wanted.xsave == got.xsave),
        part("msrs", wanted.msrs == got.msrs),
        part("events", wanted.events == got.events),
        part("mp_state", wanted.mp_state == got.mp_state),
        part("lapic", wanted.lapic == got.lapic),
    ))
}

/// A vCPU in HLT is in HLT after a move, and an interrupt gets it out.
fn state_halted(accel: &dyn Accel) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest("halted"), 1)?;
    let outcome = board.run(Duration::from_millis(30));
    if outcome != Outcome::TimedOut {
        return Err(describe(&board, &outcome));
    }
    let state = board.vcpus[0].state().map_err(fail)?;
    if state.mp_state != x86_defs::state::MpState::Halted {
        return Err(format!("in HLT it is {:?}", state.mp_state));
    }
    let mut moved = Board::new(accel, guest("halted"), 1)?;
    let mut bytes = vec![0; crate::board::RAM as usize];
    board.memory.read(0, &mut bytes).map_err(fail)?;
    moved.memory.write(0, &bytes).map_err(fail)?;
    moved.vcpus[0].set_state(&state).map_err(fail)?;
    let outcome = moved.run(Duration::from_millis(30));
    if outcome != Outcome::TimedOut {
        return Err(describe(&moved, &outcome));
    }
    moved.io.send(0, 0x41);
    expect_pass(&mut moved)
}

/// CPUID answers what the table says, but for the bits that mirror other registers.
fn cpuid(accel: &dyn Accel) -> Result<(), Failure> {
    const ANSWERS: u64 = 0x20_0000;
    let table = crate::board::vcpu_config(accel, 0)?.cpuid;
    let mut board = Board::new(accel, guest("cpuid"), 1)?;
    for (at, entry) in (ANSWERS..).step_by(24).zip(&table) {
        let question = [entry.leaf, entry.subleaf.unwrap_or(0)].map(u32::to_le_bytes);
        board
            .memory
            .write(at, question.as_flattened())
            .map_err(fail)?;
    }
    write_word(&board.memory, table.len() as u32)?;
    expect_pass(&mut board)?;
    for (at, entry) in (ANSWERS..).step_by(24).zip(&table) {
        let mut got = [0; 4];
        for (i, value) in (0..).zip(&mut got) {
            *value = board.memory.load_u32(at + 8 + 4 * i).map_err(fail)?;
        }
        let wanted = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let masks: [u32; 4] = match (entry.leaf, entry.subleaf.unwrap_or(0)) {
            // APIC ID; OSXSAVE; APIC.
            (1, _) => [!0, 0x00ff_ffff, !(1 << 27), !(1 << 9)],
            // OSPKE.
            (7, 0) => [!0, !0, !(1 << 4), !0],
            // Sizes for the XCR0 of now.
            (0xd, 0 | 1) => [!0, 0, !0, !0],
            // Extended topology and the KVM leaves' TSC are derived.
            (0xb | 0x1f, _) => [0, 0, 0, 0],
            _ => [!0; 4],
        };
        for i in 0..4 {
            if (got[i] ^ wanted[i]) & masks[i] != 0 {
                return Err(format!(
                    "leaf {:#x} {:?}: got {got:x?}, wanted {wanted:x?}",
                    entry.leaf, entry.subleaf
                ));
            }
        }
    }
    Ok(())
}

fn hypercall(accel: &dyn Accel) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest("hypercall"), 1)?;
    match board.run(Duration::from_secs(1)) {
        Outcome::Exit(0) => Ok(()),
        other => Err(describe(&board, &other)),
    }
}

/// The paravirtual clock goes on with guest time and stands still with it.
fn kvmclock(accel: &dyn Accel) -> Result<(), Failure> {
    // The first command leaves the run loop, so that the clock is stopped while no vCPU runs.
    static STOP: AtomicBool = AtomicBool::new(false);
    STOP.store(false, Ordering::SeqCst);
    let command = |io: &Io, _| {
        STOP.store(true, Ordering::SeqCst);
        io.finish(Outcome::Exit(77));
    };
    let mut board = Board::with_command(accel, guest("kvmclock"), 1, command)?;
    let outcome = board.run(TIME);
    match outcome {
        Outcome::Exit(0) => return Ok(()), // no such clock
        Outcome::Exit(77) if STOP.load(Ordering::SeqCst) => {}
        other => return Err(describe(&board, &other)),
    }
    board.clock.stop();
    std::thread::sleep(Duration::from_secs(1));
    board.clock.resume();
    expect_pass(&mut board)
}

/// A vCPU comes out when it is kicked, whatever it does; a hundred times.
fn kicks(accel: &dyn Accel, kind: u32) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest("spin"), 1)?;
    write_word(&board.memory, kind)?;
    for _ in 0..100 {
        let outcome = board.run(Duration::from_micros(300));
        if outcome != Outcome::TimedOut {
            return Err(describe(&board, &outcome));
        }
    }
    let VcpuStatistics { io_calls, .. } = board.io.handle(0).statistics();
    if io_calls != 0 {
        return Err(format!("{io_calls} calls by a guest that does no I/O"));
    }
    Ok(())
}

fn triple_fault(accel: &dyn Accel) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest("triple_fault"), 1)?;
    let outcome = board.run(TIME);
    if outcome != Outcome::Shutdown {
        return Err(describe(&board, &outcome));
    }
    // As the machine does then: reset, and run something again.
    board.vcpus[0].reset().map_err(fail)?;
    let other = guest("exceptions");
    board
        .memory
        .write(other.mode.address(), other.image)
        .map_err(fail)?;
    board.enter(Mode::Long)?;
    expect_pass(&mut board)
}

/// After a reset in the middle of things the vCPU starts at the reset vector with its first state.
fn reset(accel: &dyn Accel) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest("state"), 1)?;
    let fresh = {
        let other = Board::new(accel, guest("state"), 1)?;
        let mut vcpu = other.vcpus;
        vcpu[0].reset().map_err(fail)?;
        vcpu[0].state().map_err(fail)?
    };
    board.run(Duration::from_millis(10));
    board.vcpus[0].reset().map_err(fail)?;
    let after = board.vcpus[0].state().map_err(fail)?;
    same(&fresh, &after)?;
    if (after.registers.rip, after.system.segments[1].base) != (0xfff0, 0xffff_0000) {
        return Err(format!("reset to {:#x}", after.registers.rip));
    }
    // jmp 0000:1000 at the reset vector's page, in ROM.
    let rom = board
        .memory
        .add_ram(0xffff_f000, 0x1000, BackingOptions::default());
    rom.map_err(fail)?;
    let jump = [0xea, 0x00, 0x10, 0x00, 0x00];
    board.memory.write(0xffff_fff0, &jump).map_err(fail)?;
    let other = guest("basics");
    board
        .memory
        .write(other.mode.address(), other.image)
        .map_err(fail)?;
    expect_pass(&mut board)
}
