//! `cargo xtask bench`: measured beside peers in one run, printed as ratios.

mod cpu;
mod images;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Result;
use crate::console::Console;
use crate::guest;
use crate::host::{self, command};

/// Options of the measurements.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What is measured
    #[command(subcommand)]
    what: What,
    /// Pairs of runs of which the median is taken
    #[arg(long, default_value_t = 3, global = true)]
    runs: u32,
}

#[derive(clap::Subcommand)]
enum What {
    /// Debian's kernel to the first line of user space, software CPU beside QEMU's TCG
    Boot,
    /// Programs in a guest: software CPU beside QEMU's TCG and the host itself
    Cpu,
    /// Conversions and the other verbs beside qemu-img, the NBD server beside qemu-nbd and nbdkit
    Images,
}

/// Longest time for one boot.
const LIMIT: Duration = Duration::from_secs(300);
const APPEND: &str = "console=ttyS0 panic=-1 quiet run=true";
const FIRST_LINE: &str = "GUEST-USER-SPACE";

pub(crate) fn run(options: &Options) -> Result<()> {
    match options.what {
        What::Boot => boot(options.runs),
        What::Cpu => cpu::run(options.runs),
        What::Images => images::run(options.runs),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Seconds from the start of the process to the first line of user space.
fn time_to_user_space(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    let mut console = Console::start(command.stderr(Stdio::null()), false)?;
    console.expect(FIRST_LINE, LIMIT)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds from the start of the process to the guest's first instruction; the machine is ended then.
fn time_to_first_instruction(command: &mut Command) -> Result<f64> {
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

/// QEMU with TCG, its machine as near to ours as it has one.
fn qemu(guest: &guest::Boot, append: &str) -> Command {
    let mut run = command("qemu-system-x86_64");
    run.args(["-accel", "tcg", "-M", "q35", "-m", "1G", "-cpu", "max"]);
    run.args(["-nodefaults", "-no-reboot", "-display", "none"]);
    run.args(["-serial", "stdio", "-append", append]);
    run.arg("-kernel").arg(&guest.kernel);
    run.arg("-initrd").arg(&guest.initrd);
    run
}

fn boot(runs: u32) -> Result<()> {
    host::need_packages(&["qemu-system-x86"])?;
    let corten = host::build_corten()?;
    let guest = guest::test_guest()?;
    let ours = || {
        let mut run = command(&corten);
        run.args([
            "run",
            "--accel",
            "soft",
            "--memory",
            "1G",
            "--serial",
            "stdio",
            "--no-reboot",
        ]);
        run.args(["--net", "none", "--append", APPEND]);
        run.arg("--kernel")
            .arg(&guest.kernel)
            .arg("--initrd")
            .arg(&guest.initrd);
        run
    };
    let theirs = || qemu(&guest, APPEND);
    let (mut a, mut b, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    for n in 1..=runs {
        // A whole boot comes first, so the kernel has been decompressed and kept by the time that starts are measured.
        a.push(time_to_user_space(&mut ours())?);
        b.push(time_to_user_space(&mut theirs())?);
        eprintln!(
            "pair {n}: corten {:.2} s, QEMU {:.2} s",
            a[a.len() - 1],
            b[b.len() - 1]
        );
    }
    const STARTS: u32 = 9;
    for _ in 0..STARTS {
        starts.push(time_to_first_instruction(&mut ours())?);
    }
    let ratios: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a / b).collect();
    println!("boot to user space, 1 vCPU, medians of {runs} pairs");
    println!("  corten --accel soft      {:8.2} s", median(a));
    println!("  qemu-system-x86_64 tcg   {:8.2} s", median(b));
    println!("  ratio                    {:8.2}", median(ratios));
    println!(
        "process start to the guest's first instruction, median of {STARTS}, kernel kept from an earlier run"
    );
    println!("  corten --accel soft      {:8.1} ms", median(starts) * 1e3);
    Ok(())
}
