//! The machine that the chores run on: its commands, packages and folders.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Result;

/// The workspace's root folder.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// The folder of everything that is built.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// A command that is to run in the workspace's root.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// The command as a person would type it.
pub(crate) fn line(command: &Command) -> String {
    let quote = |word: &OsStr| {
        let word = word.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(quote).collect::<Vec<_>>().join(" ")
}

/// Runs a command and shows what it prints.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let text = line(command);
    eprintln!("+ {text}");
    let status = command.status().map_err(|e| format!("{text}: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{text}: {status}"))
    }
}

/// Runs a command, which shows what it prints only when it fails.
pub(crate) fn run_quietly(command: &mut Command) -> Result<String> {
    let text = line(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{text}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    eprint!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Err(format!("{text}: {}", output.status))
}

/// A command that runs as root: itself when we are, else through sudo.
pub(crate) fn as_root(program: &str) -> Command {
    if is_root() {
        return command(program);
    }
    let mut sudo = command("sudo");
    sudo.arg(program);
    sudo
}

/// True when we are root.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

fn is_installed(package: &str) -> bool {
    let mut query = command("dpkg-query");
    query
        .args(["-W", "-f=${db:Status-Status}", package])
        .stderr(Stdio::null());
    query.output().is_ok_and(|out| out.stdout == b"installed")
}

/// Installs those of Debian's packages that are missing.
pub(crate) fn need_packages(packages: &[&str]) -> Result<()> {
    let missing = || -> Vec<&str> {
        let names = packages.iter().copied();
        names.filter(|p| !is_installed(p)).collect()
    };
    // One package may put another out that comes from a different release of Debian (qemu-system-x86 a newer
    // qemu-utils); that one is then missing, and fits when it is installed next.
    for _ in 0..2 {
        let names = missing();
        if names.is_empty() {
            return Ok(());
        }
        install(&names)?;
    }
    match missing()[..] {
        [] => Ok(()),
        [name, ..] => Err(format!("{name}: apt-get put it out for another package")),
    }
}

fn install(packages: &[&str]) -> Result<()> {
    update_package_lists()?;
    let mut install = as_root("apt-get");
    install
        .args(["install", "-y", "-q", "--no-install-recommends"])
        .args(packages);
    install.env("DEBIAN_FRONTEND", "noninteractive");
    eprintln!("+ {}", line(&install));
    run_quietly(&mut install).map(|_| ())
}

/// Fetches the lists of packages, once in a run.
pub(crate) fn update_package_lists() -> Result<()> {
    static DONE: std::sync::Once = std::sync::Once::new();
    let mut result = Ok(());
    DONE.call_once(|| {
        let mut update = as_root("apt-get");
        update.args(["update", "-q"]);
        eprintln!("+ {}", line(&update));
        // One unreachable source must not keep us from the others.
        if let Err(why) = run_quietly(&mut update) {
            eprintln!("{why}: going on with the lists that are there");
        }
        result = Ok(());
    });
    result
}

/// Builds the corten binary in release mode and returns its path.
pub(crate) fn build_corten() -> Result<PathBuf> {
    run(command("cargo").args(["build", "--release", "--package", "corten"]))?;
    Ok(target().join("release/corten"))
}

/// A folder below the target folder, made when it is missing.
pub(crate) fn folder(name: &str) -> Result<PathBuf> {
    let path = target().join(name);
    std::fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}
