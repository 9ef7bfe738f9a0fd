//! The process round a guest: what it takes of the host, how it ends, and how it leaves the terminal.

mod machine;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use machine::{Machine, elf_of, guest};

/// A bare-metal guest that writes a line to the first serial port and then does `last`.
fn bare_guest(dir: &tempfile::TempDir, last: &[u8]) -> std::path::PathBuf {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 3F8h
    for byte in b"UP\n" {
        code.extend([0xb0, *byte, 0xee]); // mov al, byte; out dx, al
    }
    code.extend(last);
    let path = dir.path().join("kernel");
    std::fs::write(&path, elf_of(&code)).unwrap();
    path
}

/// `corten run` on a bare-metal guest; `None`, with a line that says so, where there is no binary.
fn run_bare(test: &str, kernel: &std::path::Path) -> Option<Command> {
    let Some(mut run) = machine::corten() else {
        println!("skipped: {test}: needs the binary that 'cargo xtask test' makes");
        return None;
    };
    run.args(["run", "--accel", "soft", "--serial", "stdio", "--no-reboot"]);
    run.arg("--kernel").arg(kernel);
    Some(run)
}

/// Time that a process has run on the host's processors.
fn processor_time(process: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // Fields are counted behind the name, which is in brackets: utime and stime are the 14th and 15th of all (proc(5)).
    let fields: Vec<&str> = text.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10) // USER_HZ is 100 on this architecture
}

/// KiB of memory that a process has touched.
fn resident(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches("kB").trim();
    kib.parse().unwrap()
}

#[test]
fn a_halted_guest_takes_no_time_and_no_memory_that_it_has_not_touched() {
    const NAME: &str = "a_halted_guest_takes_no_time_and_no_memory_that_it_has_not_touched";
    let dir = tempfile::tempdir().unwrap();
    let kernel = bare_guest(&dir, &[0xf4, 0xeb, 0xfd]); // hlt; jmp to it
    let Some(mut run) = run_bare(NAME, &kernel) else {
        return;
    };
    let mut machine = Machine::start(run.args(["--memory", "4G", "--cpus", "4"]));
    machine.expect("UP\n");
    std::thread::sleep(Duration::from_millis(500)); // until everything has started
    let before = processor_time(machine.id());
    std::thread::sleep(Duration::from_secs(3));
    let taken = processor_time(machine.id()) - before;
    assert!(taken <= Duration::from_millis(20), "{taken:?} in 3 s");
    let kib = resident(machine.id());
    assert!(
        kib < 64 << 10,
        "{kib} KiB of a guest that has touched a page"
    );
}

/// Debian's kernel stops its tick when it has nothing to do, so that little is left.
#[test]
fn an_idle_kernel_takes_little_time() {
    let Some(mut run) = guest(
        "an_idle_kernel_takes_little_time",
        "echo IDLE-NOW;sleep 600",
    ) else {
        return;
    };
    let mut machine = Machine::start(run.args(["--cpus", "2"]));
    machine.expect("\nIDLE-NOW");
    std::thread::sleep(Duration::from_secs(2));
    let before = processor_time(machine.id());
    std::thread::sleep(Duration::from_secs(4));
    let taken = processor_time(machine.id()) - before;
    assert!(taken <= Duration::from_millis(150), "{taken:?} in 4 s");
}

#[test]
fn sigterm_presses_the_power_button_and_the_next_one_quits() {
    // The guest takes the button's key and goes on.
    let script = "for e in /dev/input/event*;do (head -c 1 $e >/dev/null;echo PRESSED-$(cat /sys/class/input/${e##*/}/device/name))& done;sleep 1;echo READY;sleep 600";
    let Some(mut run) = guest("sigterm_presses_the_power_button", script) else {
        return;
    };
    let mut machine = Machine::start(&mut run);
    machine.expect("\nREADY");
    machine.terminate();
    machine.expect("PRESSED-Power Button");
    machine.terminate();
    let (status, text) = machine.wait();
    assert!(status.success(), "{status}: {text}");
    assert!(!text.contains("GUEST-DONE"), "{text}");
}

/// A terminal: the end that a person has, and the end of the process.
fn terminal() -> (OwnedFd, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let name = ptsname(&person, Vec::new()).unwrap();
    let mut both_ways = File::options();
    both_ways.read(true).write(true);
    (person, both_ways.open(name.to_str().unwrap()).unwrap())
}

/// What of a terminal's settings a program changes.
fn settings(terminal: impl AsFd) -> (u32, u32, u32, u32) {
    let all = rustix::termios::tcgetattr(terminal).unwrap();
    (
        all.input_modes.bits(),
        all.output_modes.bits(),
        all.control_modes.bits(),
        all.local_modes.bits(),
    )
}

/// Waits for text on a terminal.
fn read_until(person: &OwnedFd, wanted: &str) {
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    while !text.contains(wanted) {
        let n = rustix::io::read(person, &mut buffer).unwrap_or(0);
        assert!(n > 0, "no {wanted:?} on the terminal: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
}

#[test]
fn the_terminal_is_as_it_was_after_every_end() {
    const NAME: &str = "the_terminal_is_as_it_was_after_every_end";
    let dir = tempfile::tempdir().unwrap();
    let halted = bare_guest(&dir, &[0xf4, 0xeb, 0xfd]);
    let broken = dir.path().join("broken");
    std::fs::write(&broken, b"no kernel").unwrap();
    let keys: fn(&OwnedFd, &Machine) = |person, _| {
        rustix::io::write(person, b"\x01x").unwrap();
    };
    let signals: fn(&OwnedFd, &Machine) = |_, machine| {
        machine.terminate();
        std::thread::sleep(Duration::from_millis(200));
        machine.terminate();
    };
    for (kernel, end, status) in [
        (&halted, Some(keys), 0),
        (&halted, Some(signals), 0),
        (&broken, None, 1),
    ] {
        let Some(mut run) = run_bare(NAME, kernel) else {
            return;
        };
        let (person, process) = terminal();
        let before = settings(&process);
        let ends = || Stdio::from(process.try_clone().unwrap());
        run.stdin(ends()).stdout(ends()).stderr(ends());
        let mut child = Machine::of(run.spawn().unwrap());
        if let Some(end) = end {
            read_until(&person, "UP");
            assert_ne!(settings(&process), before, "the terminal has become raw");
            end(&person, &child);
        }
        let ended = child.end();
        assert_eq!(ended.code(), Some(status), "{}", kernel.display());
        assert_eq!(settings(&process), before, "{}", kernel.display());
    }
}
