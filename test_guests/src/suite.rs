//! The conformance suite: what every processor behind the seam must do.

mod control;
mod hostile;
mod interrupts;
mod memory;
mod simple;

use accel::Accel;

use crate::board::{Board, Failure, Outcome};
use crate::guest;
use std::time::Duration;

/// A test of the suite.
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// What a KVM that interprets ring 0 is known to get wrong here; it is then noted, and no failure of ours.
    pub limit: Option<&'static str>,
    /// Runs it.
    pub run: fn(&dyn Accel) -> Result<(), Failure>,
}

/// Longest that an ordinary guest may take.
pub const TIME: Duration = Duration::from_secs(20);

/// True for a KVM that is not at hardware speed in ring 0: a page-table-based one, of which some tests ask too much.
pub fn interprets_ring_0(accel: &dyn Accel) -> bool {
    accel.name() == "kvm"
        && accel::probe::ring_zero(accel).is_ok_and(|seen| !seen.is_hardware_speed())
}

/// All tests.
pub fn all() -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(simple::TESTS);
    tests.extend(interrupts::TESTS);
    tests.extend(memory::TESTS);
    tests.extend(control::TESTS);
    tests.extend(hostile::TESTS);
    tests
}

/// Runs a guest on one vCPU and expects exit code 0.
pub(crate) fn passes(accel: &dyn Accel, name: &str) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest(name), 1)?;
    expect_pass(&mut board)
}

/// Runs a board and expects exit code 0.
pub(crate) fn expect_pass(board: &mut Board) -> Result<(), Failure> {
    let outcome = board.run(TIME);
    match outcome {
        Outcome::Exit(0) => Ok(()),
        other => Err(describe(board, &other)),
    }
}

/// An outcome that was not expected, with what helps to find out why.
pub(crate) fn describe(board: &Board, outcome: &Outcome) -> Failure {
    let what = match outcome {
        Outcome::Failed { line, detail } if *line > 100_000 => format!(
            "unexpected exception {} at {:#x}, error code {:#x}",
            line - 100_000,
            wide(detail, 0),
            wide(detail, 1)
        ),
        Outcome::Failed { line, detail } if detail.len() >= 4 => format!(
            "line {line}: got {:#x}, wanted {:#x}",
            wide(detail, 0),
            wide(detail, 1)
        ),
        other => format!("{other:?}"),
    };
    let text = String::from_utf8_lossy(&board.io.text.lock()).into_owned();
    let places: Vec<_> = board
        .vcpus
        .iter()
        .filter_map(|vcpu| vcpu.state().ok())
        .map(|state| {
            let word = |at: usize| state.lapic.get(at..at + 4).map_or(0, u32_of);
            let words = |base: usize| [0, 1, 2, 3, 4, 5, 6, 7].map(|i| word(base + 16 * i));
            format!(
                "{:#x} flags {:#x} {:?} TPR {:#x} ISR {:x?} IRR {:x?}",
                state.registers.rip,
                state.registers.rflags,
                state.mp_state,
                word(0x80),
                words(0x100),
                words(0x200)
            )
        })
        .collect();
    let interrupts: Vec<_> = (0..256u64)
        .map(|vector| (vector, board.memory.load_u32(0x9000 + 4 * vector)))
        .filter_map(|(vector, count)| Some((vector, count.ok().filter(|count| *count != 0)?)))
        .take(20)
        .collect();
    let reports = board.io.reports.lock();
    format!(
        "{what}; vCPUs at {places:?}; interrupts {interrupts:x?}; reports {reports:x?}; text {text:?}"
    )
}

fn u32_of(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_le_bytes)
}

/// The 64-bit value number `index` of a failed check's detail.
fn wide(detail: &[u32], index: usize) -> u64 {
    let half = |at: usize| u64::from(detail.get(at).copied().unwrap_or(0));
    half(2 * index) | half(2 * index + 1) << 32
}
