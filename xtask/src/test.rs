//! `cargo xtask test`: everything that must hold, on one command.

use std::time::Instant;

use crate::host::{self, command};
use crate::tally::Tally;
use crate::{Result, guest};

/// Options of the tests.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave formatting, lints and documentation out
    #[arg(long)]
    no_lint: bool,
}

/// Peers and tools that tests compare with.
const PACKAGES: [&str; 16] = [
    "gcc",
    "libc6-dev",
    "binutils",
    "acpica-tools",
    "busybox-static",
    "bzip2",
    "cryptsetup-bin",
    "e2fsprogs",
    "iproute2",
    "lz4",
    "qemu-utils",
    "qemu-system-x86",
    "util-linux",
    "wget",
    "xz-utils",
    "zstd",
];

pub(crate) fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    host::need_packages(&PACKAGES)?;
    if !options.no_lint {
        lint()?;
    }
    let (boot, installer) = (guest::test_guest()?, guest::installer()?);
    // The whole-system tests run the binary that people run, and find their guest by these names.
    let corten = host::build_corten()?;
    let mut tests = command("cargo");
    tests.args([
        "test",
        "--workspace",
        "--no-fail-fast",
        "--",
        "--show-output",
    ]);
    tests.env("CORTEN", corten);
    tests
        .env("CORTEN_TEST_KERNEL", boot.kernel)
        .env("CORTEN_TEST_INITRD", boot.initrd)
        .env("CORTEN_TEST_HOSTILE", guest::hostile()?)
        .env("CORTEN_TEST_INSTALLER_KERNEL", installer.kernel)
        .env("CORTEN_TEST_INSTALLER_INITRD", installer.initrd);
    let mut tally = Tally::new();
    let result = tally.run(&mut tests);
    eprintln!("xtask: {} s", start.elapsed().as_secs());
    tally.report();
    result?;
    no_kvm_test_may_skip(&tally)
}

/// Where there is a KVM that can be used, its tests prove something only if they run.
fn no_kvm_test_may_skip(tally: &Tally) -> Result<()> {
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match tally.skipped_for_kvm().next() {
        Some(name) if kvm.is_ok() => Err(format!("{name}: skipped though there is /dev/kvm")),
        _ => Ok(()),
    }
}

fn lint() -> Result<()> {
    host::run(command("cargo").args(["fmt", "--all", "--check"]))?;
    let clippy = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ];
    host::run(command("cargo").args(clippy))?;
    let mut doc = command("cargo");
    doc.args(["doc", "--workspace", "--no-deps", "--quiet"]);
    host::run(doc.env("RUSTDOCFLAGS", "-D warnings"))
}
