//! `cargo xtask bench`: measured beside peers in one run, printed as ratios.

mod boot;
mod cpu;
mod devices;
mod images;
mod net_server;
mod process;

use std::process::Command;

use crate::Result;
use crate::guest;
use crate::host::command;

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
    /// Debian's kernel to the first line of user space and memory then, software CPU beside QEMU's TCG; then what `devices` measures
    Boot(boot::Options),
    /// Programs in a guest: software CPU beside QEMU's TCG and the host itself
    Cpu,
    /// Disks and network cards from inside a guest, beside QEMU's
    Devices(devices::Options),
    /// Conversions and the other verbs beside qemu-img, the NBD server beside qemu-nbd and nbdkit
    Images,
}

/// Bytes of memory that every measured guest has (`1G`).
const GUEST_MEMORY: u64 = 1 << 30;

/// What runs the guest's code, in us and in the peer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Machine {
    /// Our software CPU, QEMU's TCG.
    Software,
    /// KVM.
    Kvm,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.what {
        What::Boot(these) => boot::run(these, options.runs),
        What::Cpu => cpu::run(options.runs),
        What::Devices(these) => devices::run(these, options.runs),
        What::Images => images::run(options.runs),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// QEMU, its machine as near to ours as it has one.
fn qemu(guest: &guest::Boot, append: &str, machine: Machine) -> Command {
    let mut run = command("qemu-system-x86_64");
    let accel = match machine {
        Machine::Software => "tcg",
        Machine::Kvm => "kvm",
    };
    run.args(["-accel", accel, "-M", "q35", "-m", "1G", "-cpu", "max"]);
    // Threads with names, so that vCPUs can be told from the others.
    run.args(["-name", "bench,debug-threads=on"]);
    run.args(["-nodefaults", "-no-reboot", "-display", "none"]);
    run.args(["-serial", "stdio", "-append", append]);
    run.arg("-kernel").arg(&guest.kernel);
    run.arg("-initrd").arg(&guest.initrd);
    run
}
