//! `cargo xtask bench devices`: virtio disks and network cards from inside a guest, beside QEMU's.
//!
//! One guest, the same for both, runs `test_guests/io_bench/iobench.c`; its lines on the console tell when a measurement
//! begins and ends. Time is the host's, and so is the processor time that the machine's process has used in between.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::net_server::NetServer;
use super::process::{Cpu, CpuMeter};
use super::{Machine, median, qemu};
use crate::Result;
use crate::console::Console;
use crate::guest::{self, Boot};
use crate::host::{self, command};

/// Options of this measurement.
#[derive(clap::Args)]
pub(super) struct Options {
    /// Seconds that each measurement takes in the guest
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Folder for the disk images, on the file system that is to be measured (default: below the target folder)
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Measure only the disks or only the network
    #[arg(long, value_enum)]
    only: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Disks,
    Network,
}

/// Longest time for a boot or one measurement.
const LIMIT: Duration = Duration::from_secs(120);
const APPEND: &str = "console=ttyS0 panic=-1 quiet";
const IMAGE_SIZE: u64 = 256 << 20;
/// `O_DIRECT` of Linux on x86.
const O_DIRECT: i32 = 0o40000;
const MEBIBYTE: f64 = (1 << 20) as f64;

/// A disk of the measured machine.
struct Disk {
    /// What the guest knows it by.
    name: String,
    path: PathBuf,
    format: &'static str,
    cache: &'static str,
}

/// The images, written once in full, so that every measurement finds allocated blocks.
fn make_disks(corten: &Path, folder: &Path) -> Result<Vec<Disk>> {
    std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let source = folder.join("source.raw");
    fill(&source).map_err(|e| format!("{}: {e}", source.display()))?;
    let mut direct = std::fs::OpenOptions::new();
    let caches: &[&'static str] = match direct.read(true).custom_flags(O_DIRECT).open(&source) {
        Ok(_) => &["none", "writeback"],
        Err(why) => {
            let folder = folder.display();
            eprintln!("{folder}: no direct I/O there ({why}), so cache=none is left out");
            &["writeback"]
        }
    };
    let mut disks = Vec::new();
    for format in ["raw", "qcow2"] {
        for cache in caches {
            let name = format!("{format}-{cache}");
            let path = folder.join(&name);
            let mut convert = command(corten);
            convert.args(["img", "convert", "-f", "raw", "-O", format]);
            host::run_quietly(convert.arg(&source).arg(&path))?;
            disks.push(Disk {
                name,
                path,
                format,
                cache,
            });
        }
    }
    std::fs::remove_file(&source).map_err(|e| format!("{}: {e}", source.display()))?;
    // What is still in the host's cache would be written in the middle of a measurement.
    host::run_quietly(&mut command("sync"))?;
    Ok(disks)
}

/// Writes numbers that neither compress nor look like zeroes.
fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path)?);
    let mut x: u64 = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..IMAGE_SIZE / 8 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        file.write_all(&x.to_ne_bytes())?;
    }
    file.flush()
}

/// The measured machine.
struct Setup {
    corten: PathBuf,
    boot: Boot,
    disks: Vec<Disk>,
    network: bool,
}

impl Setup {
    fn ours(&self, machine: Machine) -> Command {
        let mut run = command(&self.corten);
        let accel = match machine {
            Machine::Software => "soft",
            Machine::Kvm => "kvm",
        };
        run.args(["run", "--accel", accel, "--memory", "1G"]);
        run.args(["--serial", "stdio", "--no-reboot", "--append", APPEND]);
        run.arg("--kernel").arg(&self.boot.kernel);
        run.arg("--initrd").arg(&self.boot.initrd);
        for disk in &self.disks {
            run.arg("--disk").arg(format!(
                "{},format={},cache={},aio=io_uring,serial={},queues=1,packed=on",
                disk.path.display(),
                disk.format,
                disk.cache,
                disk.name
            ));
        }
        let net = if self.network {
            "user,queues=1,packed=on"
        } else {
            "none"
        };
        run.args(["--net", net]);
        run
    }

    fn theirs(&self, machine: Machine) -> Command {
        let mut run = qemu(&self.boot, APPEND, machine);
        for (n, disk) in self.disks.iter().enumerate() {
            // A thread for each disk, as we have it.
            run.args(["-object", &format!("iothread,id=io{n}")]);
            run.arg("-drive").arg(format!(
                "file={},format={},cache={},aio=io_uring,if=none,id=disk{n}",
                disk.path.display(),
                disk.format,
                disk.cache
            ));
            run.arg("-device").arg(format!(
                "virtio-blk-pci,drive=disk{n},serial={},num-queues=1,packed=on,iothread=io{n}",
                disk.name
            ));
        }
        if self.network {
            run.args(["-netdev", "user,id=net0"]);
            run.args(["-device", "virtio-net-pci,netdev=net0,packed=on,romfile="]);
        }
        run
    }
}

/// One measurement of one machine.
#[derive(Clone, Copy)]
struct Figure {
    operations: f64,
    bytes: f64,
    seconds: f64,
    cpu: Cpu,
}

/// Everything that one run has measured, in its order.
type Figures = Vec<(String, Figure)>;

/// Runs a machine to the end of its measurements.
fn measure(command: &mut Command) -> Result<Figures> {
    let mut console = Console::start(command.stderr(Stdio::null()), false)?;
    let mut meter = CpuMeter::new(console.process());
    let mut figures = Vec::new();
    loop {
        console.expect("BENCH-", LIMIT)?;
        let line = console.expect("\n", LIMIT)?;
        let (what, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        match what {
            "BEGIN" => {
                let (start, before) = (Instant::now(), meter.read()?);
                console.expect("BENCH-", LIMIT)?;
                let (seconds, after) = (start.elapsed().as_secs_f64(), meter.read()?);
                let line = console.expect("\n", LIMIT)?;
                let figure = parse_end(line.trim(), seconds, after - before)
                    .ok_or_else(|| format!("{rest}: the guest says {line:?}"))?;
                figures.push((rest.to_owned(), figure));
            }
            "DONE" => break,
            _ => return Err(format!("the guest says: {}", line.trim())),
        }
    }
    console.wait(LIMIT)?;
    Ok(figures)
}

fn parse_end(line: &str, seconds: f64, cpu: Cpu) -> Option<Figure> {
    let mut words = line.strip_prefix("END ")?.split(' ');
    let mut number = || words.next()?.parse::<u64>().ok();
    Some(Figure {
        operations: number()? as f64,
        bytes: number()? as f64,
        seconds,
        cpu,
    })
}

/// How a measurement is told.
struct Unit {
    name: &'static str,
    /// What of a figure is counted: the count is told for a second, and processor time for one.
    count: fn(&Figure) -> f64,
}

fn unit(name: &str) -> Unit {
    if name.contains("seq-") || name.contains("stream-") {
        Unit {
            name: "MiB/s",
            count: |f| f.bytes / MEBIBYTE,
        }
    } else {
        Unit {
            name: "1/s",
            count: |f| f.operations,
        }
    }
}

/// Rate; processor time for each; that outside the vCPU.
type Derived = [f64; 3];

/// A figure's rate, and the microseconds of processor time for each operation: all, and those outside the vCPU.
fn derive(figure: &Figure, unit: &Unit) -> Derived {
    let count = (unit.count)(figure).max(1.0);
    let each = |seconds: f64| seconds * 1e6 / count;
    [
        count / figure.seconds,
        each(figure.cpu.total()),
        each(figure.cpu.others),
    ]
}

/// The median of what `f` makes of each pair, ours first.
fn column(both: &[(Derived, Derived)], f: fn(Derived, Derived) -> f64) -> f64 {
    median(both.iter().map(|(a, b)| f(*a, *b)).collect())
}

fn table(pairs: &[(Figures, Figures)]) -> Result<()> {
    println!(
        "{:<33} {:>9} {:>9} {:>6}  {:>8} {:>8} {:>6}  {:>8} {:>8}",
        "", "corten", "QEMU", "ratio", "us CPU", "QEMU", "ratio", "no vCPU", "QEMU"
    );
    let Some((first, _)) = pairs.first() else {
        return Ok(());
    };
    for (name, _) in first {
        let unit = unit(name);
        let of = |figures: &Figures| {
            let by_name: HashMap<&str, &Figure> =
                figures.iter().map(|(n, f)| (n.as_str(), f)).collect();
            let figure = by_name.get(name.as_str()).copied();
            figure
                .map(|figure| derive(figure, &unit))
                .ok_or_else(|| format!("{name}: not every machine has measured it"))
        };
        let mut both: Vec<(Derived, Derived)> = Vec::new();
        for (ours, theirs) in pairs {
            both.push((of(ours)?, of(theirs)?));
        }
        println!(
            "{:<33} {:>9.0} {:>9.0} {:>6.2}  {:>8.1} {:>8.1} {:>6.2}  {:>8.1} {:>8.1}",
            format!("{name}, {}", unit.name),
            column(&both, |a, _| a[0]),
            column(&both, |_, b| b[0]),
            column(&both, |a, b| a[0] / b[0]),
            column(&both, |a, _| a[1]),
            column(&both, |_, b| b[1]),
            column(&both, |a, b| b[1] / a[1]),
            column(&both, |a, _| a[2]),
            column(&both, |_, b| b[2]),
        );
    }
    Ok(())
}

fn build_program(folder: &Path) -> Result<PathBuf> {
    host::need_packages(&["gcc", "libc6-dev"])?;
    let program = folder.join("iobench");
    let mut gcc = command("gcc");
    gcc.args(["-O2", "-static", "-o"]).arg(&program);
    host::run(gcc.arg("test_guests/io_bench/iobench.c"))?;
    Ok(program)
}

/// The commands that the guest runs.
fn script(options: &Options, port: u16) -> String {
    let seconds = options.seconds;
    let mut script = String::new();
    if options.only != Some(Part::Network) {
        script += &format!(
            "for d in /sys/block/vd*; do iobench disk /dev/${{d##*/}} $(cat $d/serial) {seconds}; done\n"
        );
    }
    if options.only != Some(Part::Disks) {
        script += &format!("ifconfig eth0 10.0.2.15 up\niobench net 10.0.2.2 {port} {seconds}\n");
    }
    script + "echo BENCH-DONE\npoweroff -f\n"
}

/// Whether `--accel auto` takes KVM here, which it does only where KVM runs a kernel well.
fn kvm_is_good(setup: &Setup) -> Result<bool> {
    let mut run = command(&setup.corten);
    run.args([
        "run",
        "--serial",
        "null",
        "--no-reboot",
        "--append",
        "panic=-1",
    ]);
    run.arg("--kernel").arg(&setup.boot.kernel);
    run.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = run
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{}: {e}", host::line(&run)))?;
    let mut first = String::new();
    if let Some(errors) = child.stderr.take() {
        let _ = std::io::BufRead::read_line(&mut std::io::BufReader::new(errors), &mut first);
    }
    let _ = child.kill();
    let _ = child.wait();
    Ok(first.starts_with("corten: kvm"))
}

/// Measures, and prints the table.
pub(super) fn run(options: &Options, runs: u32) -> Result<()> {
    if !(options.seconds > 0.0 && options.seconds <= 60.0) {
        return Err(format!(
            "--seconds {}: expected more than 0, at most 60",
            options.seconds
        ));
    }
    host::need_packages(&["qemu-system-x86"])?;
    let corten = host::build_corten()?;
    let program = build_program(&host::folder("guest")?)?;
    let server = NetServer::start()?;
    let boot = guest::measuring_guest(&program, &script(options, server.port()))?;
    let folder = match &options.folder {
        Some(folder) => folder.clone(),
        None => host::folder("bench")?,
    };
    let disks = if options.only == Some(Part::Network) {
        Vec::new()
    } else {
        make_disks(&corten, &folder)?
    };
    let setup = Setup {
        corten,
        boot,
        disks,
        network: options.only != Some(Part::Disks),
    };
    let mut machines = vec![(Machine::Software, "--accel soft beside TCG")];
    if kvm_is_good(&setup)? {
        machines.push((Machine::Kvm, "both on KVM"));
    } else {
        eprintln!("KVM is not there or does not run a kernel well, so both run on software alone");
    }
    for (machine, title) in machines {
        let mut pairs = Vec::new();
        for n in 1..=runs {
            // Who goes first finds the host's caches colder.
            let pair = if n % 2 == 1 {
                let ours = measure(&mut setup.ours(machine))?;
                (ours, measure(&mut setup.theirs(machine))?)
            } else {
                let theirs = measure(&mut setup.theirs(machine))?;
                (measure(&mut setup.ours(machine))?, theirs)
            };
            pairs.push(pair);
            eprintln!("pair {n} of {runs} done");
        }
        println!("{title}, medians of {runs} pairs; ratios above 1 are in corten's favour");
        table(&pairs)?;
    }
    println!(
        "CPU: microseconds of the host's processors for an operation (for a MiB of a stream), all of them and those outside the vCPU"
    );
    for disk in &setup.disks {
        let _ = std::fs::remove_file(&disk.path);
    }
    Ok(())
}
