//! `cargo xtask bench cpu`: the programs of `test_guests/cpu_bench` on the host, under the software CPU and under QEMU's TCG.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Machine, median, qemu};
use crate::Result;
use crate::guest::{self, Boot};
use crate::host::{self, command};

/// Programs of the shell, with the names that they are reported under.
const SHELL: &str = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do busybox cat /bin/busybox; done | busybox head -c 33554432 > $F
$B exec gzip32M busybox sh -c \"busybox gzip -c $F >/dev/null\"
$B exec sha256sum32M busybox sha256sum $F
$B exec ashloop busybox sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'
$B exec awkloop busybox awk 'BEGIN{for(i=0;i<500000;i++){s+=i%7;a[i%100]=s};print s}'
$B exec sort200k busybox sh -c 'busybox seq 200000 -1 1 | busybox sort | busybox tail -1'
";
/// The last line of a run.
const DONE: &str = "BENCH-DONE";

/// What one run has printed: seconds and checksum by name, and the order of the names.
#[derive(Default)]
struct Figures {
    order: Vec<String>,
    by_name: HashMap<String, (Vec<f64>, String)>,
}

impl Figures {
    /// Takes the `BENCH` lines out of a run's output.
    fn take(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if words.next() != Some("BENCH") {
                continue;
            }
            let (Some(name), Some(seconds)) = (words.next(), words.next()) else {
                continue;
            };
            let Ok(seconds) = seconds.parse() else {
                continue;
            };
            let checksum = words.next().unwrap_or_default().to_owned();
            if !self.by_name.contains_key(name) {
                self.order.push(name.to_owned());
            }
            let entry = self
                .by_name
                .entry(name.to_owned())
                .or_insert_with(|| (Vec::new(), checksum.clone()));
            entry.0.push(seconds);
        }
    }

    fn seconds(&self, name: &str) -> Option<f64> {
        self.by_name.get(name).map(|(all, _)| median(all.clone()))
    }

    fn checksum(&self, name: &str) -> Option<&str> {
        self.by_name.get(name).map(|(_, sum)| sum.as_str())
    }
}

fn build(folder: &Path) -> Result<PathBuf> {
    host::need_packages(&["gcc", "libc6-dev", "busybox-static"])?;
    let program = folder.join("cpubench");
    let source = host::root().join("test_guests/cpu_bench/cpubench.c");
    let mut gcc = command("gcc");
    gcc.args(["-O2", "-static", "-w", "-o"])
        .arg(&program)
        .arg(source)
        .args(["-lm", "-pthread"]);
    host::run(&mut gcc)?;
    Ok(program)
}

/// The text that a run prints, which must end as it should.
fn output(command: &mut Command, who: &str) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|e| format!("{who}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains(DONE) {
        Ok(text)
    } else {
        let last = text.lines().last().unwrap_or_default();
        Err(format!(
            "{who}: the benchmarks did not end; the last line is '{last}'"
        ))
    }
}

fn native(program: &Path, folder: &Path) -> Command {
    let mut shell = command("/bin/busybox");
    let file = folder.join("cpubench.data");
    let script = format!("$B\n{SHELL}echo {DONE}\n");
    shell
        .args(["sh", "-c", &script])
        .env("B", program)
        .env("F", file)
        .env("PATH", "/bin:/usr/bin");
    shell
}

fn ours(corten: &Path, boot: &Boot) -> Command {
    let mut run = command(corten);
    run.args([
        "run", "--accel", "soft", "--memory", "1G", "--serial", "stdio",
    ]);
    run.args([
        "--no-reboot",
        "--net",
        "none",
        "--append",
        "console=ttyS0 panic=-1 quiet",
    ]);
    run.arg("--kernel")
        .arg(&boot.kernel)
        .arg("--initrd")
        .arg(&boot.initrd);
    run
}

/// Measures, and prints the table.
pub(super) fn run(runs: u32) -> Result<()> {
    host::need_packages(&["qemu-system-x86"])?;
    let corten = host::build_corten()?;
    let folder = host::folder("guest")?;
    let program = build(&folder)?;
    let script = format!("export B=cpubench F=/tmp/f\n$B\n{SHELL}echo {DONE}\npoweroff -f\n");
    let boot = guest::measuring_guest(&program, &script)?;
    let (mut host, mut soft, mut tcg) = Default::default();
    for n in 1..=runs {
        for (figures, mut command, who) in [
            (&mut host, native(&program, &folder), "the host"),
            (&mut soft, ours(&corten, &boot), "corten"),
            (
                &mut tcg,
                qemu(&boot, "console=ttyS0 panic=-1 quiet", Machine::Software),
                "QEMU",
            ),
        ] {
            let figures: &mut Figures = figures;
            figures.take(&output(&mut command, who)?);
        }
        eprintln!("round {n} of {runs} done");
    }
    table(&host, &soft, &tcg)
}

fn table(host: &Figures, soft: &Figures, tcg: &Figures) -> Result<()> {
    println!(
        "{:<14} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "seconds", "host", "corten", "TCG", "x host", "x TCG"
    );
    let (mut ratios, mut wrong) = (Vec::new(), Vec::new());
    for name in &host.order {
        let (Some(a), Some(b), Some(c)) =
            (host.seconds(name), soft.seconds(name), tcg.seconds(name))
        else {
            return Err(format!("{name}: not every processor has run it"));
        };
        let ratio = c / b;
        ratios.push(ratio);
        println!(
            "{name:<14} {a:9.4} {b:9.4} {c:9.4} {:9.1} {ratio:9.2}",
            b / a
        );
        if soft.checksum(name) != host.checksum(name) {
            wrong.push(name.as_str());
        }
    }
    let mean = (ratios.iter().map(|r: &f64| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
    println!("as fast as TCG, geometric mean: {mean:.2} times");
    if wrong.is_empty() {
        println!("all checksums are the host's");
        Ok(())
    } else {
        Err(format!("wrong results: {}", wrong.join(", ")))
    }
}
