//! Interrupts: messages, the 8259's way in, level-triggered ones, NMIs, timers, other processors.

use std::time::Duration;

use accel::{Accel, Doorbell, Msi};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Test, expect_pass, passes};
use crate::board::{Board, DEVICE, Failure, Io, fail};
use crate::guest;

pub(super) const TESTS: [Test; 10] = [
    Test {
        name: "msi",
        limit: None,
        run: msi,
    },
    Test {
        name: "extint",
        limit: None,
        run: extint,
    },
    Test {
        name: "level",
        limit: Some("it ends interrupts as it delivers them"),
        run: level,
    },
    Test {
        name: "nmi",
        limit: None,
        run: nmi,
    },
    Test {
        name: "apic_timer",
        limit: None,
        run: |accel| passes(accel, "apic_timer"),
    },
    Test {
        name: "x2apic",
        limit: None,
        run: |accel| passes(accel, "x2apic"),
    },
    Test {
        name: "smp_2",
        limit: None,
        run: |accel| smp(accel, 2),
    },
    Test {
        name: "smp_4",
        limit: None,
        run: |accel| smp(accel, 4),
    },
    Test {
        name: "doorbell",
        limit: None,
        run: doorbell,
    },
    Test {
        name: "irq_event",
        limit: None,
        run: irq_event,
    },
];

/// Long enough for a guest to get into HLT.
const LATER: Duration = Duration::from_millis(4);

/// Does something in a while, on another thread.
fn later(action: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        std::thread::sleep(LATER);
        action();
    });
}

fn message(vector: u8) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

fn msi(accel: &dyn Accel) -> Result<(), Failure> {
    let command = |io: &Io, command| match command {
        1 => io.send(0, 0x41),
        2 => {
            let vm = io.vm.clone();
            later(move || vm.send_msi(message(0x42)));
        }
        3 => {
            io.send(0, 0x51);
            io.send(0, 0x61);
        }
        4 => io.send(0, 0x71),
        5 => io.send(0, 0x51),
        _ => io.send(0, 0x61),
    };
    expect_pass(&mut Board::with_command(accel, guest("msi"), 1, command)?)
}

fn extint(accel: &dyn Accel) -> Result<(), Failure> {
    let command = |io: &Io, command| match command {
        1 => io.raise_extint(0x21),
        2 => {
            let (queue, vm) = (io.extint.clone(), io.vm.clone());
            later(move || {
                queue.lock().push_back(0x22);
                vm.set_extint(true);
            });
        }
        _ => {
            io.raise_extint(0x23);
            io.raise_extint(0x24);
        }
    };
    expect_pass(&mut Board::with_command(
        accel,
        guest("extint"),
        1,
        command,
    )?)
}

/// Data of a level-triggered, asserted message.
const LEVEL: u32 = 1 << 15 | 1 << 14;

fn level(accel: &dyn Accel) -> Result<(), Failure> {
    let command = |io: &Io, command| match command {
        1 => io.send(0, 0x61),
        _ => io.vm.send_msi(Msi {
            address: 0xfee0_0000,
            data: 0x62 | LEVEL,
        }),
    };
    let mut board = Board::with_command(accel, guest("level"), 1, command)?;
    expect_pass(&mut board)?;
    let ended = board.io.ended.lock().clone();
    let in_service = board.io.reports.lock().clone();
    if in_service != [4] {
        return Err(format!("in service: {in_service:x?}, not vector 0x62"));
    }
    if ended != [0x62; 4] {
        return Err(format!("ends of interrupts {ended:x?}, not four of 0x62"));
    }
    Ok(())
}

fn nmi(accel: &dyn Accel) -> Result<(), Failure> {
    let command = |io: &Io, command| match command {
        1 => io.handle(0).nmi(),
        2 => {
            let handle = io.handle(0);
            later(move || handle.nmi());
        }
        _ => io.vm.send_msi(Msi {
            address: 0xfee0_0000,
            data: 4 << 8,
        }),
    };
    expect_pass(&mut Board::with_command(accel, guest("nmi"), 1, command)?)
}

/// Where the guest looks for the number of processors.
const SMP_NUMBER: u64 = 0x8200;

fn smp(accel: &dyn Accel, count: u32) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest("smp"), count)?;
    board
        .memory
        .write(SMP_NUMBER, &count.to_le_bytes())
        .map_err(fail)?;
    expect_pass(&mut board)
}

/// Guest writes to doorbells signal their events, and only the writes that match.
fn doorbell(accel: &dyn Accel) -> Result<(), Failure> {
    let mut board = Board::new(accel, guest("doorbell"), 1)?;
    let event = || EventFd::new(EFD_NONBLOCK).map_err(fail);
    let doorbells = [
        (0x1000, 0, None),
        (0x1010, 2, None),
        (0x1020, 2, Some(5)),
        (0x1020, 2, Some(6)),
        (0x1030, 4, Some(7)),
    ];
    let mut rung = Vec::new();
    for (at, len, value) in doorbells {
        let event = event()?;
        let doorbell = Doorbell {
            address: DEVICE + at,
            len,
            value,
        };
        let taken = board.vm.add_doorbell(doorbell, &event);
        rung.push((doorbell, event, taken));
    }
    expect_pass(&mut board)?;
    let wanted = [3, 2, 1, 2, 1];
    for ((doorbell, event, taken), wanted) in rung.iter().zip(wanted) {
        let count = event.read().unwrap_or(0);
        if *taken && count != wanted {
            return Err(format!("{doorbell:?}: rung {count} times, not {wanted}"));
        }
        if *taken {
            board.vm.remove_doorbell(*doorbell, event);
        }
    }
    // Taken away, they ring no more, and the writes reach the device space.
    board.enter(crate::Mode::Long)?;
    expect_pass(&mut board)?;
    for (doorbell, event, _) in &rung {
        if event.read().is_ok() {
            return Err(format!("{doorbell:?}: rung after it was removed"));
        }
    }
    Ok(())
}

/// Signals of events become interrupts, also after their message has changed.
fn irq_event(accel: &dyn Accel) -> Result<(), Failure> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(fail)?;
    let other = EventFd::new(EFD_NONBLOCK).map_err(fail)?;
    let (signal, signal_other) = (
        event.try_clone().map_err(fail)?,
        other.try_clone().map_err(fail)?,
    );
    let command = move |io: &Io, command| {
        // An accelerator without the short cut leaves it to the caller to send the message.
        match command {
            1 => {
                if io.vm.set_irq_event(&signal, message(0x41)) {
                    let _ = signal.write(1);
                } else {
                    io.send(0, 0x41);
                }
            }
            2 => {
                if io.vm.set_irq_event(&signal, message(0x42)) {
                    let _ = signal.write(1);
                } else {
                    io.send(0, 0x42);
                }
            }
            _ => {
                if io.vm.set_irq_event(&signal_other, message(0x43)) {
                    let _ = signal_other.write(1);
                } else {
                    io.send(0, 0x43);
                }
                io.vm.remove_irq_event(&signal);
                let _ = signal.write(1);
            }
        }
    };
    let mut board = Board::with_command(accel, guest("irq_event"), 1, command)?;
    let passed = expect_pass(&mut board);
    board.vm.remove_irq_event(&other);
    passed
}
