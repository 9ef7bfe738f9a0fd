//! Guests made from Debian's packages.

mod initramfs;
mod kernel;
mod package;
mod root_disk;

use std::path::{Path, PathBuf};

use crate::{Result, host};

pub(crate) use root_disk::root_disk;

/// A kernel and an initial RAM disk.
pub(crate) struct Boot {
    /// bzImage.
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk.
    pub(crate) initrd: PathBuf,
}

/// Debian's kernel, and a RAM disk that mounts `/dev/vda` as the root file system.
pub(crate) fn disk_boot() -> Result<Boot> {
    let kernel = kernel::fetch()?;
    let initrd = host::folder("guest")?.join("initrd-disk.img");
    initramfs::build(&kernel, initramfs::Purpose::MountDisk, &initrd)?;
    Ok(Boot {
        kernel: kernel.image,
        initrd,
    })
}

/// Debian's kernel, and a RAM disk with busybox that runs commands given on the kernel command line.
pub(crate) fn test_guest() -> Result<Boot> {
    let kernel = kernel::fetch()?;
    let folder = host::folder("guest")?;
    let (program, initrd) = (folder.join("vsock"), folder.join("initrd-test.img"));
    host::need_packages(&["gcc", "libc6-dev"])?;
    let mut compile = host::command("gcc");
    compile.args(["-O2", "-static", "-o"]).arg(&program);
    host::run_quietly(compile.arg("tests/guest/vsock.c"))?;
    let purpose = initramfs::Purpose::RunCommands { program: &program };
    initramfs::build(&kernel, purpose, &initrd)?;
    Ok(Boot {
        kernel: kernel.image,
        initrd,
    })
}

/// A bare-metal guest that attacks its machine's devices: an ELF file.
pub(crate) fn hostile() -> Result<PathBuf> {
    host::need_packages(&["gcc", "libc6-dev"])?;
    let program = host::folder("guest")?.join("hostile");
    let mut compile = host::command("gcc");
    compile.args([
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffreestanding",
        "-nostdlib",
        "-static",
    ]);
    compile.args([
        "-fno-pic",
        "-no-pie",
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
    ]);
    compile.args(["-mno-red-zone", "-mgeneral-regs-only"]);
    // One segment at the address that the source says, without the file's header.
    compile.arg("-Wl,-N,-Ttext=0x3421000,--build-id=none,-z,noexecstack,--no-warn-rwx-segments");
    compile.arg("-o").arg(&program);
    host::run_quietly(compile.arg("tests/guest/hostile.c"))?;
    Ok(program)
}

/// Debian's installer as it starts from a network, with the screens for a text terminal.
pub(crate) fn installer() -> Result<Boot> {
    const PACKAGE: &str = "debian-installer-12-netboot-amd64";
    const IMAGES: &str = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64";
    let folder = host::folder("guest/installer")?;
    let boot = Boot {
        kernel: folder.join(IMAGES).join("linux"),
        initrd: folder.join(IMAGES).join("initrd.gz"),
    };
    if !(boot.kernel.is_file() && boot.initrd.is_file()) {
        package::unpack(PACKAGE, &folder)?;
    }
    Ok(boot)
}

/// Debian's kernel, and a RAM disk with busybox and a program, which runs a script.
pub(crate) fn measuring_guest(program: &Path, script: &str) -> Result<Boot> {
    let kernel = kernel::fetch()?;
    let initrd = host::folder("guest")?.join("initrd-bench.img");
    let purpose = initramfs::Purpose::Measure { program, script };
    initramfs::build(&kernel, purpose, &initrd)?;
    Ok(Boot {
        kernel: kernel.image,
        initrd,
    })
}
