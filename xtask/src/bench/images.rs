//! `cargo xtask bench images`: `corten img` and `corten nbd` beside qemu-img, qemu-nbd and nbdkit, on a disk of this machine's own files.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::median;
use crate::Result;
use crate::host::{self, command};

/// What the disk is filled with: programs, text, and files that are compressed already.
const CONTENT: [&str; 6] = [
    "bin",
    "share/perl",
    "share/doc",
    "share/locale",
    "lib/python3",
    "include",
];
/// Reads of one measurement of a server.
const READS: u32 = 200_000;

/// What one run has taken, in seconds.
#[derive(Clone, Copy)]
struct Taken {
    wall: f64,
    cpu: f64,
}

/// Runs a command in `folder` under the shell's `time`, children included.
fn measure(program: &Path, arguments: &[&str], folder: &Path) -> Result<Taken> {
    let script = "TIMEFORMAT='%R %U %S'; time \"$@\" >/dev/null 2>errors || exit 1";
    let output = command("bash")
        .current_dir(folder)
        .args(["-c", script, "bench"])
        .arg(program)
        .args(arguments)
        .output()
        .map_err(|e| format!("bash: {e}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let numbers: Vec<f64> = text
        .split_whitespace()
        .filter_map(|w| w.parse().ok())
        .collect();
    match numbers[..] {
        [wall, user, system] if output.status.success() => Ok(Taken {
            wall,
            cpu: user + system,
        }),
        _ => {
            let why = std::fs::read_to_string(folder.join("errors")).unwrap_or_default();
            Err(format!("{} {arguments:?}: {text}{why}", program.display()))
        }
    }
}

/// The disk that is converted: ext4, with room left.
fn disk(folder: &Path) -> Result<()> {
    host::need_packages(&["qemu-utils", "e2fsprogs", "nbdkit"])?;
    let root = folder.join("root");
    if folder.join("src.raw").exists() {
        return Ok(());
    }
    for name in CONTENT {
        let from = Path::new("/usr").join(name);
        if from.exists() {
            let to = root.join(name);
            std::fs::create_dir_all(&to).map_err(|e| format!("{}: {e}", to.display()))?;
            host::run_quietly(command("cp").arg("-a").arg(from.join(".")).arg(&to))?;
        }
    }
    let part = folder.join("src.part");
    let file = std::fs::File::create(&part).map_err(|e| format!("{}: {e}", part.display()))?;
    file.set_len(2 << 30)
        .map_err(|e| format!("{}: {e}", part.display()))?;
    host::run_quietly(
        command("/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&root)
            .arg(&part),
    )?;
    std::fs::remove_dir_all(&root).map_err(|e| format!("{}: {e}", root.display()))?;
    std::fs::rename(&part, folder.join("src.raw")).map_err(|e| format!("{}: {e}", part.display()))
}

/// The verbs; `OUT` is the program's own output file.
const VERBS: [(&str, &[&str]); 13] = [
    (
        "convert raw>qcow2",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "src.raw",
            "OUT.qcow2",
        ],
    ),
    (
        "convert qcow2>raw",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "OUT.qcow2",
            "OUT.raw",
        ],
    ),
    (
        "convert -c zlib",
        &[
            "convert", "-c", "-f", "raw", "-O", "qcow2", "src.raw", "OUT.zlib",
        ],
    ),
    (
        "convert -c zstd",
        &[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            "compression_type=zstd",
            "src.raw",
            "OUT.zstd",
        ],
    ),
    (
        "zlib>raw",
        &["convert", "-f", "qcow2", "-O", "raw", "OUT.zlib", "OUT.raw"],
    ),
    (
        "zstd>raw",
        &["convert", "-f", "qcow2", "-O", "raw", "OUT.zstd", "OUT.raw"],
    ),
    (
        "compare raw qcow2",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            "src.raw",
            "OUT.qcow2",
        ],
    ),
    ("check", &["check", "-f", "qcow2", "OUT.zlib"]),
    ("map", &["map", "-f", "qcow2", "--output=json", "OUT.zlib"]),
    (
        "measure",
        &["measure", "-f", "raw", "-O", "qcow2", "src.raw"],
    ),
    ("info", &["info", "-f", "qcow2", "OUT.zlib"]),
    ("create", &["create", "-f", "qcow2", "OUT.new", "100G"]),
    (
        "create metadata",
        &[
            "create",
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata",
            "OUT.meta",
            "100G",
        ],
    ),
];

fn verb(corten: &Path, folder: &Path, name: &str, words: &[&str], runs: u32) -> Result<()> {
    let words_for =
        |who: &str| -> Vec<String> { words.iter().map(|w| w.replace("OUT", who)).collect() };
    let (ours, theirs) = (words_for("ours"), words_for("theirs"));
    let our_words: Vec<&str> = std::iter::once("img")
        .chain(ours.iter().map(String::as_str))
        .collect();
    let their_words: Vec<&str> = theirs.iter().map(String::as_str).collect();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        a.push(measure(corten, &our_words, folder)?);
        b.push(measure(Path::new("qemu-img"), &their_words, folder)?);
    }
    let of = |all: &[Taken], what: fn(&Taken) -> f64| median(all.iter().map(what).collect());
    let ratio = |what: fn(&Taken) -> f64| {
        median(
            a.iter()
                .zip(&b)
                .map(|(a, b)| what(b).max(0.001) / what(a).max(0.001))
                .collect(),
        )
    };
    println!(
        "{name:<18} {:8.3} {:8.3} {:7.2}x {:8.3} {:8.3} {:7.2}x",
        of(&a, |t| t.wall),
        of(&b, |t| t.wall),
        ratio(|t| t.wall),
        of(&a, |t| t.cpu),
        of(&b, |t| t.cpu),
        ratio(|t| t.cpu)
    );
    Ok(())
}

/// A server that is ended when it goes out of scope.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn start(run: &mut Command, socket: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let child = run
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| format!("{}: {e}", host::line(run)))?;
        let server = Self(child);
        let begin = Instant::now();
        while !socket.exists() {
            if begin.elapsed() > Duration::from_secs(10) {
                return Err(format!("{}: does not listen", host::line(run)));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Processor time in seconds; the kernel counts in hundredths.
    fn cpu(&self) -> Result<f64> {
        let path = format!("/proc/{}/stat", self.0.id());
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let fields = text
            .rsplit(") ")
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let ticks: f64 = fields
            .skip(11)
            .take(2)
            .filter_map(|f| f.parse::<f64>().ok())
            .sum();
        Ok(ticks / 100.0)
    }
}

/// Microseconds of the server's processor time for a 4 KiB read at queue depth 8.
fn server(mut run: Command, socket: &Path) -> Result<f64> {
    let server = Server::start(&mut run, socket)?;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let reads = READS.to_string();
    let mut client = command("qemu-img");
    client.args([
        "bench", "-f", "raw", "-c", &reads, "-d", "8", "-s", "4096", "-S", "4096", &uri,
    ]);
    let before = server.cpu()?;
    host::run_quietly(&mut client)?;
    Ok((server.cpu()? - before) * 1e6 / f64::from(READS))
}

fn servers(corten: &Path, folder: &Path, runs: u32) -> Result<()> {
    let socket: PathBuf = folder.join("socket");
    println!(
        "\nserver's CPU for a 4 KiB read at queue depth 8, µs (client: qemu-img bench, {READS} reads, Unix socket)"
    );
    println!(
        "{:<18} {:>8} {:>8} {:>8}",
        "", "corten", "qemu-nbd", "nbdkit"
    );
    for (format, file) in [("raw", "src.raw"), ("qcow2", "ours.qcow2")] {
        let path = folder.join(file);
        let options = |run: &mut Command| {
            run.args(["-t", "-r", "-f", format, "-k"])
                .arg(&socket)
                .arg(&path);
        };
        let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..runs {
            let mut ours = command(corten);
            ours.arg("nbd");
            options(&mut ours);
            a.push(server(ours, &socket)?);
            let mut theirs = command("qemu-nbd");
            options(&mut theirs);
            b.push(server(theirs, &socket)?);
            if format == "raw" {
                let mut kit = command("nbdkit");
                kit.args(["-f", "-r", "-U"])
                    .arg(&socket)
                    .arg("file")
                    .arg(&path);
                c.push(server(kit, &socket)?);
            }
        }
        println!(
            "{format:<18} {:8.1} {:8.1} {:8.1}",
            median(a),
            median(b),
            median(c)
        );
    }
    Ok(())
}

pub(super) fn run(runs: u32) -> Result<()> {
    let corten = host::build_corten()?;
    let folder = host::folder("bench-images")?;
    disk(&folder)?;
    println!(
        "seconds, medians of {runs} pairs; the ratio is qemu-img's divided by ours: above 1 is faster"
    );
    println!(
        "{:<18} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "", "wall", "qemu-img", "ratio", "CPU", "qemu-img", "ratio"
    );
    for (name, words) in VERBS {
        verb(&corten, &folder, name, words, runs)?;
    }
    for kind in ["zlib", "zstd"] {
        let length = |who: &str| {
            let path = folder.join(format!("{who}.{kind}"));
            std::fs::metadata(&path)
                .map(|m| m.len() as f64)
                .map_err(|e| format!("{}: {e}", path.display()))
        };
        let (ours, theirs) = (length("ours")?, length("theirs")?);
        println!(
            "size with {kind}: {:.1} MiB, qemu-img {:.1} MiB, {:+.2} %",
            ours / 1048576.0,
            theirs / 1048576.0,
            (ours / theirs - 1.0) * 100.0
        );
    }
    servers(&corten, &folder, runs)
}
