//! A Debian root file system on a qcow2 disk, made from Debian's packages.

use std::path::{Path, PathBuf};

use crate::Result;
use crate::host::{self, as_root, command};

/// Size of the disk that the guest sees.
const SIZE: &str = "4G";
const PACKAGES: &str = "systemd-sysv,udev,dbus,login,passwd,kmod,iproute2,iputils-ping,pciutils,\
                        util-linux,procps,wget,ca-certificates,less,nano-tiny";

const NETWORK: &str = "[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n";
const RESOLV_CONF: &str = "nameserver 10.0.2.3\n";
const FSTAB: &str = "/dev/vda / ext4 defaults 0 1\n";

/// Makes the disk unless it is there.
pub(crate) fn root_disk(corten: &Path, rebuild: bool) -> Result<PathBuf> {
    let folder = host::folder("demo")?;
    let disk = folder.join("debian.qcow2");
    if disk.is_file() && !rebuild {
        return Ok(disk);
    }
    host::need_packages(&["mmdebstrap", "e2fsprogs", "kmod", "debian-archive-keyring"])?;
    let kernel = super::kernel::fetch()?;
    let tree = folder.join("root");
    remove_tree(&tree)?;
    eprintln!("making a Debian root file system (a few minutes)");
    let mut debootstrap = as_root("mmdebstrap");
    debootstrap.args(["--variant=minbase", "--format=directory", "--quiet"]);
    debootstrap.arg(format!("--include={PACKAGES}"));
    // What a small guest does not read.
    debootstrap.args([
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
    ]);
    debootstrap.arg("bookworm").arg(&tree);
    host::run(&mut debootstrap)?;
    configure(&tree, &kernel)?;

    let raw = folder.join("debian.raw");
    let _ = std::fs::remove_file(&raw);
    let mut mkfs = as_root("mke2fs");
    mkfs.args(["-q", "-t", "ext4", "-L", "debian", "-d"])
        .arg(&tree)
        .arg(&raw)
        .arg(SIZE);
    host::run(&mut mkfs)?;
    let unfinished = folder.join("debian.qcow2.part");
    host::run(
        command(corten)
            .args(["img", "convert", "-f", "raw", "-O", "qcow2"])
            .arg(&raw)
            .arg(&unfinished),
    )?;
    std::fs::rename(&unfinished, &disk).map_err(|e| format!("{}: {e}", disk.display()))?;
    remove_tree(&tree)?;
    run_rm(&raw)?;
    Ok(disk)
}

fn configure(tree: &Path, kernel: &super::kernel::Kernel) -> Result<()> {
    let modules = tree.join("lib/modules");
    host::run_quietly(as_root("mkdir").arg("-p").arg(&modules))?;
    host::run_quietly(as_root("cp").arg("-a").arg(&kernel.modules).arg(&modules))?;
    host::run_quietly(
        as_root("/sbin/depmod")
            .arg("-b")
            .arg(tree)
            .arg(&kernel.version),
    )?;
    for (file, text) in [
        ("etc/hostname", "corten\n"),
        ("etc/hosts", "127.0.0.1 localhost corten\n::1 localhost\n"),
        ("etc/fstab", FSTAB),
        ("etc/systemd/network/80-dhcp.network", NETWORK),
    ] {
        write(&tree.join(file), text)?;
    }
    // The file that the build left behind is the host's own.
    run_rm(&tree.join("etc/resolv.conf"))?;
    write(&tree.join("etc/resolv.conf"), RESOLV_CONF)?;
    let mut enable = as_root("chroot");
    enable
        .arg(tree)
        .args(["systemctl", "enable", "--quiet", "systemd-networkd"]);
    host::run_quietly(&mut enable)?;
    host::run_quietly(
        as_root("chroot")
            .arg(tree)
            .args(["passwd", "--delete", "root"]),
    )?;
    Ok(())
}

/// Writes a file that may belong to root.
fn write(path: &Path, text: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    std::fs::write(file.path(), text).map_err(|e| e.to_string())?;
    host::run_quietly(
        as_root("install")
            .args(["-m", "644"])
            .arg(file.path())
            .arg(path),
    )
    .map(|_| ())
}

fn run_rm(path: &Path) -> Result<()> {
    host::run_quietly(as_root("rm").args(["-f", "--"]).arg(path)).map(|_| ())
}

fn remove_tree(tree: &Path) -> Result<()> {
    host::run_quietly(
        as_root("rm")
            .args(["-rf", "--one-file-system", "--"])
            .arg(tree),
    )
    .map(|_| ())
}
