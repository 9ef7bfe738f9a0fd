//! `cargo xtask bench boot`: Debian's kernel to the first line of user space and what the process weighs then, then disks
//! and network cards.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::process::{Memory, memory};
use super::{GUEST_MEMORY, Machine, devices, median, qemu};
use crate::Result;
use crate::console::Console;
use crate::guest::{self, Boot};
use crate::host::{self, command};

/// Options of this measurement.
#[derive(clap::Args)]
#[group(skip)] // its name would be that of the other's options
pub(super) struct Options {
    /// Leave the disks and network cards out
    #[arg(long)]
    no_devices: bool,
    #[command(flatten)]
    devices: devices::Options,
}

/// Longest time for one boot.
const LIMIT: Duration = Duration::from_secs(300);
/// The machine waits behind its first line, so that there is time to look at its memory.
const STAY: &str = "sleep+60";
/// The option that leaves translation out.
const INTERPRETER: &str = ",translate=off";
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

/// Seconds to the first line of user space, and million guest instructions in a second that is not spent halted, as
/// `--stats` says at the machine's end.
fn with_statistics(command: &mut Command) -> Result<(f64, f64)> {
    let path = host::folder("bench")?.join("statistics");
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = File::create(&path).map_err(failed)?;
    let start = Instant::now();
    let mut console = Console::start(command.arg("--stats").stderr(file), false)?;
    console.expect(FIRST_LINE, LIMIT)?;
    let seconds = start.elapsed().as_secs_f64();
    console.wait(LIMIT)?;
    let text = std::fs::read_to_string(&path).map_err(failed)?;
    let mips = text
        .split_once(" MIPS while not halted")
        .and_then(|(before, _)| {
            let number = before.rsplit(' ').next()?;
            number.parse().ok()
        });
    let mips = mips.ok_or_else(|| format!("{}: no MIPS in it", path.display()))?;
    Ok((seconds, mips))
}

/// The guest under `--accel` with these words behind `soft`, which does `work` in user space.
fn ours(corten: &Path, guest: &Boot, options: &str, work: &str) -> Command {
    let mut run = command(corten);
    run.args(["run", "--accel", &format!("soft{options}")]);
    run.args(["--memory", "1G"]);
    run.args(["--serial", "stdio", "--no-reboot", "--net", "none"]);
    run.arg("--append").arg(append(work));
    run.arg("--kernel").arg(&guest.kernel);
    run.arg("--initrd").arg(&guest.initrd);
    run
}

fn append(work: &str) -> String {
    format!("console=ttyS0 panic=-1 quiet run={work}")
}

/// Median seconds from the process's start to the guest's first instruction.
fn first_instruction(mut machine: impl FnMut() -> Command) -> Result<f64> {
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        starts.push(to_first_instruction(&mut machine())?);
    }
    Ok(median(starts))
}

/// Measures, and prints.
pub(super) fn run(options: &Options, runs: u32) -> Result<()> {
    host::need_packages(&["qemu-system-x86"])?;
    let corten = host::build_corten()?;
    let guest = guest::test_guest()?;
    boots(&corten, &guest, runs)?;
    starts(&corten, &guest)?;
    if options.no_devices {
        return Ok(());
    }
    devices::run(&options.devices, runs)
}

fn boots(corten: &Path, guest: &Boot, runs: u32) -> Result<()> {
    let (mut translated, mut peer) = (Boots::default(), Boots::default());
    let (mut interpreted, mut mips) = (Vec::new(), Vec::new());
    let (mut ratios, mut interpreted_ratios) = (Vec::new(), Vec::new());
    for n in 1..=runs {
        let own = translated.add(&mut ours(corten, guest, "", STAY))?;
        let other = peer.add(&mut qemu(guest, &append(STAY), Machine::Software))?;
        let (alone, speed) = with_statistics(&mut ours(corten, guest, INTERPRETER, "true"))?;
        ratios.push(own / other);
        interpreted_ratios.push(alone / other);
        interpreted.push(alone);
        mips.push(speed);
        eprintln!(
            "round {n}: corten {own:.2} s, interpreter alone {alone:.2} s, QEMU {other:.2} s"
        );
    }
    let (translated_name, peer_name) = ("corten --accel soft", "qemu-system-x86_64 tcg");
    println!("boot to user space, 1 vCPU, medians of {runs} rounds; ratios to QEMU");
    println!(
        "  {translated_name:<32} {:6.2} s  {:6.2}",
        translated.seconds(),
        median(ratios)
    );
    println!(
        "  {:<32} {:6.2} s  {:6.2}   {:.0} guest MIPS",
        format!("{translated_name}{INTERPRETER}"),
        median(interpreted),
        median(interpreted_ratios),
        median(mips)
    );
    println!("  {peer_name:<32} {:6.2} s", peer.seconds());
    println!(
        "memory of the process at the first line of user space (PSS), beyond the guest's touched pages"
    );
    for (name, boots) in [(translated_name, &translated), (peer_name, &peer)] {
        let (own, guest) = boots.mebibytes();
        println!("  {name:<32} {own:6.1} MiB   (guest: {guest:.1} MiB)");
    }
    Ok(())
}

/// The kernel has been decompressed and kept by the boots before.
fn starts(corten: &Path, guest: &Boot) -> Result<()> {
    let kept = first_instruction(|| ours(corten, guest, "", STAY))?;
    let anew = first_instruction(|| {
        let mut run = ours(corten, guest, "", STAY);
        run.args(["--kernel-cache", "none"]);
        run
    })?;
    println!("process start to the guest's first instruction, median of {STARTS}");
    println!(
        "  decompressed kernel kept from an earlier run {:8.1} ms",
        kept * 1e3
    );
    println!(
        "  kernel decompressed anew                     {:8.1} ms",
        anew * 1e3
    );
    Ok(())
}
