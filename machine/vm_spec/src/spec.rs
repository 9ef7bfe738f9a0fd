//! The whole machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::disk::named;
use crate::{AccelChoice, CharSpec, CpuSpec, DiskSpec, NetSpec, OptionError, Options, SoftSpec};

named! {
    /// The board.
    MachineType {
        /// Intel Q35 with an ICH9 south bridge and PCI Express.
        #[default]
        Q35 = "q35",
        /// As few devices as a Linux guest needs: no legacy timers, no keyboard controller.
        Microvm = "microvm",
    }
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySpec {
    /// Bytes.
    pub size: u64,
    /// Ask the host for transparent huge pages.
    pub huge_pages: bool,
    /// Let the host merge equal pages.
    pub mergeable: bool,
}

/// A kernel that is booted without firmware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelSpec {
    /// bzImage or ELF file.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Command line.
    pub append: String,
}

/// A memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BalloonSpec {
    /// Give memory back to the guest when it runs out.
    pub deflate_on_oom: bool,
    /// Let the guest report free pages, which go back to the host.
    pub free_page_reporting: bool,
}

/// A socket device between guest and host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockSpec {
    /// The guest's context ID, 3 or more.
    pub cid: u64,
    /// Unix socket on the host's side.
    pub path: PathBuf,
}

/// A password of encrypted disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSpec {
    /// What disks call it.
    pub id: String,
    /// The file that holds it, as it is: a line's end counts too.
    pub file: PathBuf,
}

impl SecretSpec {
    /// Reads `secret,id=ID,file=FILE`.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(option: &str, text: &str) -> Result<Self, OptionError> {
        let (kind, mut o) = Options::parse_with_first(option, text, "secret")?;
        if kind != "secret" {
            return Err(o.error(format!("'{kind}': expected secret,id=ID,file=FILE")));
        }
        // What it holds is not shown.
        if o.take("data").is_ok_and(|data| data.is_some()) {
            return Err(
                o.error("data= shows the password to everybody on the host: expected file=FILE")
            );
        }
        let (id, file) = (o.take("id")?, o.take("file")?);
        let (Some(id), Some(file)) = (id, file) else {
            return Err(o.error("expected secret,id=ID,file=FILE"));
        };
        o.take_parsed("format", "raw", |format| (format == "raw").then_some(()))?;
        o.finish("id, file, format")?;
        let file = file.into();
        Ok(Self { id, file })
    }
}

/// Version of the spec's own format.
const FORMAT: u32 = 1;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Version of this format.
    pub format: u32,
    /// Name, for people.
    pub name: Option<String>,
    /// Identity that the guest sees in SMBIOS.
    pub uuid: Uuid,
    /// Processor.
    pub accel: AccelChoice,
    /// How the software CPU works.
    #[serde(default)]
    pub soft: SoftSpec,
    /// Board.
    pub machine: MachineType,
    /// CPU model.
    pub cpu: CpuSpec,
    /// vCPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: MemorySpec,
    /// Kernel booted directly.
    pub kernel: Option<KernelSpec>,
    /// Passwords of disks.
    #[serde(default)]
    pub secrets: Vec<SecretSpec>,
    /// Disks, in the guest's order.
    pub disks: Vec<DiskSpec>,
    /// Network cards, in the guest's order.
    pub nets: Vec<NetSpec>,
    /// Serial ports COM1 to COM4.
    pub serials: Vec<CharSpec>,
    /// Virtio consoles hvc0 and on.
    pub consoles: Vec<CharSpec>,
    /// Where messages to the debug console's port, 402h, go; without one the port is not there.
    #[serde(default)]
    pub debug_console: Option<CharSpec>,
    /// A virtio entropy source.
    pub rng: bool,
    /// A memory balloon.
    pub balloon: Option<BalloonSpec>,
    /// A socket device.
    pub vsock: Option<VsockSpec>,
    /// A reset of the guest ends the machine.
    pub no_reboot: bool,
}

impl VmSpec {
    /// A machine with `size` bytes of memory, one vCPU and no devices beyond the board's own.
    pub fn new(size: u64) -> Self {
        Self {
            format: FORMAT,
            name: None,
            uuid: Uuid::new_v4(),
            accel: AccelChoice::default(),
            soft: SoftSpec::default(),
            machine: MachineType::default(),
            cpu: CpuSpec::default(),
            cpus: 1,
            memory: MemorySpec {
                size,
                huge_pages: true,
                mergeable: false,
            },
            kernel: None,
            secrets: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            serials: Vec::new(),
            consoles: Vec::new(),
            debug_console: None,
            rng: false,
            balloon: None,
            vsock: None,
            no_reboot: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_json() {
        let mut spec = VmSpec::new(1 << 30);
        spec.disks.push(DiskSpec::new("a.qcow2"));
        spec.serials.push(CharSpec::Stdio);
        let text = serde_json::to_string_pretty(&spec).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec);
        assert!(serde_json::from_str::<VmSpec>(&text.replace("\"rng\"", "\"rgn\"")).is_err());
    }
}
