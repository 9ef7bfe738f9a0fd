//! Debian's kernel for clouds, unmodified, as its package has it.

use std::path::{Path, PathBuf};

use super::package;
use crate::Result;
use crate::host::{self, command};

/// The package that always depends on the newest.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
pub(crate) struct Kernel {
    /// bzImage.
    pub(crate) image: PathBuf,
    /// Version, as modules are filed under.
    pub(crate) version: String,
    /// Folder of the version's modules.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// The named modules and all that they depend on, each behind what it needs.
    pub(crate) fn in_load_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let path = self.modules.join("modules.dep");
        let text =
            std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut order: Vec<String> = Vec::new();
        for module in wanted {
            let line = text.lines().find_map(|line| {
                let (name, needs) = line.split_once(':')?;
                (name == *module).then_some(needs)
            });
            let Some(needs) = line else {
                return Err(format!("{}: no module {module}", path.display()));
            };
            // Each line lists everything that a module needs, what must be loaded first last.
            for name in needs.split_whitespace().rev().chain([*module]) {
                if !order.iter().any(|there| there == name) {
                    order.push(name.to_owned());
                }
            }
        }
        Ok(order)
    }
}

/// Fetches and unpacks the package unless that has been done.
pub(crate) fn fetch() -> Result<Kernel> {
    let folder = host::folder("guest/kernel")?;
    if let Ok(kernel) = find(&folder) {
        return Ok(kernel);
    }
    host::need_packages(&["kmod"])?;
    let mut policy = dependency();
    if policy.is_err() {
        host::update_package_lists()?;
        policy = dependency();
    }
    package::unpack(&policy?, &folder)?;
    let kernel = find(&folder)?;
    host::run_quietly(
        command("/sbin/depmod")
            .arg("-b")
            .arg(&folder)
            .arg(&kernel.version),
    )?;
    Ok(kernel)
}

/// The package with the kernel itself.
fn dependency() -> Result<String> {
    let text = host::run_quietly(command("apt-cache").args(["depends", PACKAGE]))?;
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| format!("{PACKAGE}: depends on no kernel; are the package lists there?"))
}

fn find(folder: &Path) -> Result<Kernel> {
    let boot = folder.join("boot");
    let name = package::entry(&boot, |name| name.starts_with("vmlinuz-"))?;
    let version = name.trim_start_matches("vmlinuz-").to_owned();
    let modules = folder.join("lib/modules").join(&version);
    if !modules.is_dir() {
        return Err(format!("{}: missing", modules.display()));
    }
    Ok(Kernel {
        image: boot.join(name),
        version,
        modules,
    })
}
