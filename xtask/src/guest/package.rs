//! Debian's packages, unpacked without being installed.

use std::path::Path;

use crate::Result;
use crate::host::{self, command};

/// Fetches a package and unpacks it into a folder.
pub(super) fn unpack(package: &str, folder: &Path) -> Result<()> {
    eprintln!("fetching {package}");
    let mut download = command("apt-get");
    download
        .args(["download", "-q", package])
        .current_dir(folder);
    if host::run_quietly(&mut download).is_err() {
        host::update_package_lists()?;
        host::run_quietly(&mut download)?;
    }
    let archive = folder.join(entry(folder, |name| {
        name.starts_with(package) && name.ends_with(".deb")
    })?);
    let mut unpack = command("dpkg-deb");
    host::run_quietly(unpack.arg("-x").arg(&archive).arg(folder))?;
    std::fs::remove_file(&archive).map_err(|e| format!("{}: {e}", archive.display()))
}

/// The last by name of a folder's entries that are wanted.
pub(super) fn entry(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|name| wanted(name))
        .collect();
    names.sort();
    names
        .pop()
        .ok_or_else(|| format!("{}: not what was expected inside", folder.display()))
}
