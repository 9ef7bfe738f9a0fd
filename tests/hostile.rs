//! A bare-metal guest (`guest/hostile.c`) that does its worst to the devices: wild queues, descriptors in circles, BARs in wrong
//! places, every port, every register, resets in between. Nothing of it may reach the process, or a disk that it may not write.

mod machine;
mod qmp;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use machine::Machine;
use qmp::Qmp;

const DISK_SIZE: u64 = 16 << 20;

/// A disk with a first sector that the guest knows.
fn disk(path: &Path) {
    std::fs::write(path, b"the first sector of the first disk").unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(DISK_SIZE).unwrap();
}

/// Lets the guest attack a board; `None` where there is no guest or no binary.
fn attack(board: &str, seed: u32, reboot: bool) -> Option<()> {
    let (Some(guest), Some(mut run)) = (std::env::var_os("CORTEN_TEST_HOSTILE"), machine::corten())
    else {
        println!("skipped: {board}: needs the guest and the binary that 'cargo xtask test' makes");
        return None;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    disk(Path::new(&path("a")));
    disk(Path::new(&path("b")));
    run.args(["run", "--accel", "soft", "--memory", "64M", "--cpus", "2"]);
    run.args(["--machine", board, "--append", &format!("seed={seed}")]);
    run.args([
        "--serial",
        "stdio",
        "--console",
        "null",
        "--rng",
        "--balloon",
    ]);
    run.args(["--net", "user,restrict=on"]);
    run.args(["--disk", &format!("{},format=raw", path("a"))]);
    run.args(["--disk", &format!("{},format=raw,readonly=on", path("b"))]);
    run.args(["--vsock", &format!("cid=3,path={}", path("vsock"))]);
    run.args(["--qmp", &format!("unix:{}", path("qmp"))]);
    if !reboot {
        run.arg("--no-reboot");
    }
    let mut machine = Machine::start(run.arg("--kernel").arg(guest).stderr(Stdio::piped()));
    let said = machine.errors();
    for done in ["RINGS-OK", "BARS-OK", "PORTS-OK", "WILD"] {
        machine.expect_or(done, "FAILED");
    }
    // The guest may power off in a moment, and is of no use as soon as it has led its own code astray.
    let end = Instant::now() + Duration::from_secs(3);
    while machine.is_running() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    if machine.is_running() {
        let mut qmp = Qmp::connect(Path::new(&path("qmp")));
        let status = qmp.say(r#"{"execute":"query-status"}"#);
        assert!(status["return"]["status"].is_string(), "{status}");
        machine.terminate();
        std::thread::sleep(Duration::from_millis(100));
        machine.terminate();
    }
    let status = machine.end();
    let said = said.join().unwrap();
    assert!(status.success(), "{board}, seed {seed}: {status}: {said}");
    assert!(
        !said.contains("panicked at"),
        "{board}, seed {seed}: {said}"
    );
    let after = std::fs::read(path("b")).unwrap();
    let (first, rest) = after.split_at(34);
    assert_eq!(first, b"the first sector of the first disk");
    assert!(
        rest.iter().all(|byte| *byte == 0),
        "the read-only disk has changed"
    );
    assert_eq!(after.len() as u64, DISK_SIZE);
    assert_eq!(std::fs::metadata(path("a")).unwrap().len(), DISK_SIZE);
    Some(())
}

#[test]
fn wild_guests_of_q35_reach_nothing() {
    for seed in 1..=4 {
        if attack("q35", seed, false).is_none() {
            return;
        }
    }
}

#[test]
fn a_wild_guest_of_q35_that_resets_reaches_nothing() {
    attack("q35", 5, true);
}

#[test]
fn a_wild_guest_of_a_microvm_reaches_nothing() {
    attack("microvm", 6, true);
}
