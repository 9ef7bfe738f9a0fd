//! `cargo xtask bench boot`: Debian's kernel to the first line of user space, and what the process weighs then.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::process::{Memory, memory};
use super::{GUEST_MEMORY, Machine, median, qemu};
use crate::Result;
use crate::console::Console;
use crate::guest;
use crate::host::{self, command};

/// Longest time for one boot.
const LIMIT: Duration = Duration::from_secs(300);
/// The machine waits behind its first line, so that there is time to look at its memory.
const APPEND: &str = "console=ttyS0 panic=-1 quiet run=sleep+60";
const FIRST_LINE: &str = "GUEST-USER-SPACE";
const STARTS: u32 = 9;

/// Seconds from the start of the process to the first line of user space, and the process's memory then.
fn to_user_space(command: &mut Command) -> Result<(f64, Memory)> {
    let start = Instant::now();
    let mut console = Console::start(command.stderr(Stdio::null()), false)?;
    console.expect(FIRST_LINE, LIMIT)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok((seconds, memory(console.process(), GUEST_MEMORY)?))
}

/// Seconds from the start of the process to the guest's first instruction; the machine is ended then.
fn to_first_instruction(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    let mut child = command
        .arg("--announce-start")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{}: {e}", host::line(command)))?;
    let mut seconds = None;
    if let Some(errors) = child.stderr.take() {
        for line in BufReader::new(errors)
            .lines()
            .map_while(std::result::Result::ok)
        {
            if line.ends_with("the guest starts") {
                seconds = Some(start.elapsed().as_secs_f64());
                break;
            }
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    Ok(seconds.ok_or("corten ended before the guest's first instruction")?)
}

/// What the boots of one machine have shown.
#[derive(Default)]
struct Boots {
    seconds: Vec<f64>,
    memory: Vec<Memory>,
}

impl Boots {
    fn add(&mut self, command: &mut Command) -> Result<f64> {
        let (seconds, memory) = to_user_space(command)?;
        self.seconds.push(seconds);
        self.memory.push(memory);
        Ok(seconds)
    }

    fn seconds(&self) -> f64 {
        median(self.seconds.clone())
    }

    /// Medians in MiB: the process's own, and the guest's.
    fn mebibytes(&self) -> (f64, f64) {
        let of = |f: fn(&Memory) -> u64| {
            median(self.memory.iter().map(f).map(|n| n as f64).collect()) / f64::from(1 << 20)
        };
        (of(|m| m.own), of(|m| m.guest))
    }
}

/// Measures, and prints.
pub(super) fn run(runs: u32) -> Result<()> {
    host::need_packages(&["qemu-system-x86"])?;
    let corten = host::build_corten()?;
    let guest = guest::test_guest()?;
    let ours = || {
        let mut run = command(&corten);
        run.args(["run", "--accel", "soft", "--memory", "1G"]);
        run.args(["--serial", "stdio", "--no-reboot", "--net", "none"]);
        run.args(["--append", APPEND]);
        run.arg("--kernel").arg(&guest.kernel);
        run.arg("--initrd").arg(&guest.initrd);
        run
    };
    let theirs = || qemu(&guest, APPEND, Machine::Software);
    let (mut a, mut b) = (Boots::default(), Boots::default());
    let mut ratios = Vec::new();
    for n in 1..=runs {
        // A whole boot comes first, so the kernel has been decompressed and kept by the time that starts are measured.
        let (own, peer) = (a.add(&mut ours())?, b.add(&mut theirs())?);
        ratios.push(own / peer);
        eprintln!("pair {n}: corten {own:.2} s, QEMU {peer:.2} s");
    }
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        starts.push(to_first_instruction(&mut ours())?);
    }
    println!("boot to user space, 1 vCPU, medians of {runs} pairs");
    println!("  corten --accel soft      {:8.2} s", a.seconds());
    println!("  qemu-system-x86_64 tcg   {:8.2} s", b.seconds());
    println!("  ratio                    {:8.2}", median(ratios));
    println!(
        "memory of the process at the first line of user space (PSS), beyond the guest's touched pages"
    );
    for (name, boots) in [("corten --accel soft", &a), ("qemu-system-x86_64 tcg", &b)] {
        let (own, guest) = boots.mebibytes();
        println!("  {name:<24} {own:8.1} MiB   (guest: {guest:.1} MiB)");
    }
    println!(
        "process start to the guest's first instruction, median of {STARTS}, kernel kept from an earlier run"
    );
    println!("  corten --accel soft      {:8.1} ms", median(starts) * 1e3);
    Ok(())
}
