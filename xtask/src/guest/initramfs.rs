//! Initial RAM disks: busybox, virtio modules and a script (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::kernel::Kernel;
use crate::{Result, host};

/// What the RAM disk does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose<'a> {
    /// Mounts `/dev/vda` and starts its init.
    MountDisk,
    /// Runs the commands of the kernel argument `run=`, in which `+` stands for a space and `;` separates, then powers off.
    RunCommands {
        /// A program that they may use, on the host.
        program: &'a Path,
    },
    /// Runs a script, which may use a program that lies in `/bin`.
    Measure {
        /// The program, on the host.
        program: &'a Path,
        /// The script.
        script: &'a str,
    },
}

/// Modules that a guest may need; what they depend on comes with them.
const MODULES: [&str; 10] = [
    "kernel/drivers/virtio/virtio_mmio.ko",
    "kernel/drivers/virtio/virtio_pci.ko",
    "kernel/drivers/block/virtio_blk.ko",
    "kernel/drivers/net/virtio_net.ko",
    "kernel/drivers/char/hw_random/virtio-rng.ko",
    "kernel/drivers/char/virtio_console.ko",
    "kernel/drivers/virtio/virtio_balloon.ko",
    "kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko",
    "kernel/drivers/acpi/button.ko",
    "kernel/drivers/input/evdev.ko",
];

const PROLOGUE: &str = "#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /root
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
echo GUEST-USER-SPACE
for m in $(cat /modules/order); do insmod /modules/$m; done
";

const MOUNT_DISK: &str = "
for n in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 0.2; done
mount -t ext4 /dev/vda /root || { echo 'no root file system on /dev/vda'; exec sh; }
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
exec switch_root /root /sbin/init
";

const RUN_COMMANDS: &str = r#"
for word in $(cat /proc/cmdline); do case $word in run=*) commands=$(echo "${word#run=}" | tr + ' ') ;; esac; done
eval "$commands"
echo GUEST-DONE
poweroff -f
"#;

/// A cpio archive in the "newc" format under construction.
struct Archive<W: Write> {
    out: W,
    inode: u32,
    written: usize,
}

impl<W: Write> Archive<W> {
    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        rdev: (u32, u32),
        data: &[u8],
    ) -> std::io::Result<()> {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            rdev.0,
            rdev.1,
            name.len() as u32 + 1,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> std::io::Result<()> {
        let zeros = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..zeros])
    }

    fn folder(&mut self, name: &str) -> std::io::Result<()> {
        self.entry(name, 0o040_755, (0, 0), &[])
    }

    fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> std::io::Result<()> {
        self.entry(name, 0o100_000 | mode, (0, 0), data)
    }

    fn finish(mut self) -> std::io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Writes the RAM disk to `path`.
pub(crate) fn build(kernel: &Kernel, purpose: Purpose<'_>, path: &Path) -> Result<()> {
    host::need_packages(&["busybox-static"])?;
    let read = |path: &Path| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
    let busybox = read(Path::new("/bin/busybox"))?;
    let mut modules = Vec::new();
    for module in kernel.in_load_order(&MODULES)? {
        let name = module.rsplit('/').next().unwrap_or(&module).to_owned();
        modules.push((name, read(&kernel.modules.join(&module))?));
    }
    let (body, program) = match purpose {
        Purpose::MountDisk => (MOUNT_DISK, None),
        Purpose::RunCommands { program } => {
            (RUN_COMMANDS, Some((file_name(program), read(program)?)))
        }
        Purpose::Measure { program, script } => {
            (script, Some((file_name(program), read(program)?)))
        }
    };
    let write = || -> std::io::Result<()> {
        let file = BufWriter::new(File::create(path)?);
        let out = GzEncoder::new(file, Compression::fast());
        let mut archive = Archive {
            out,
            inode: 0,
            written: 0,
        };
        for folder in ["bin", "dev", "modules"] {
            archive.folder(folder)?;
        }
        archive.entry("dev/console", 0o020_600, (5, 1), &[])?;
        archive.file("bin/busybox", 0o755, &busybox)?;
        if let Some((name, data)) = &program {
            archive.file(&format!("bin/{name}"), 0o755, data)?;
        }
        archive.file("init", 0o755, format!("{PROLOGUE}{body}").as_bytes())?;
        let order: String = modules
            .iter()
            .map(|(name, _)| format!("{name}\n"))
            .collect();
        archive.file("modules/order", 0o644, order.as_bytes())?;
        for (name, data) in &modules {
            archive.file(&format!("modules/{name}"), 0o644, data)?;
        }
        archive.finish()?.finish()?.flush()
    };
    write().map_err(|e| format!("{}: {e}", path.display()))
}
