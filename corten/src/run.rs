//! `corten run`: a virtual machine in the foreground.

#![allow(rustdoc::broken_intra_doc_links)] // the doc comments here are help texts, with brackets of their own

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use machine::{Outcome, RunOptions};
use vm_spec::{
    BalloonSpec, CharSpec, CpuSpec, DiskSpec, KernelSpec, MachineType, NetSpec, OptionError,
    Options, SecretSpec, VmSpec, VsockSpec, parse_accel, parse_size,
};

const DEFAULT_MEMORY: u64 = 1 << 30;
const MAX_DISKS: usize = 24;

/// Run a virtual machine.
#[derive(Args)]
#[command(disable_version_flag = true)]
pub(crate) struct RunArguments {
    /// Name of the machine, for people
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Identity that the guest sees in SMBIOS (default: a new one)
    #[arg(long, value_name = "UUID")]
    uuid: Option<uuid::Uuid>,
    /// Processor: auto (KVM where it runs at hardware speed, else the software CPU), kvm, or
    /// soft[,translate=on|off][,cache-size=SIZE] (translate hot code to the host's; bytes of it for a vCPU, 64M by default)
    #[arg(long, value_name = "ACCEL", default_value = "auto")]
    accel: String,
    /// Board: q35, or microvm (no PCI: virtio in memory space alone)
    #[arg(long, value_name = "TYPE", default_value = "q35")]
    machine: String,
    /// CPU model and features: MODEL[,+feature][,-feature][,enforce]; models: max, host and QEMU's names with their versions,
    /// such as Haswell or EPYC-v3 (`--cpu help` lists them)
    #[arg(long, value_name = "MODEL", default_value = "max")]
    cpu: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Memory; a number alone counts MiB, suffixes K, M, G, T are binary (default: 1G)
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Kernel to boot: a bzImage or an ELF file (64-bit or PVH entry)
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Command line of the kernel
    #[arg(
        long,
        value_name = "STRING",
        requires = "kernel",
        allow_hyphen_values = true
    )]
    append: Option<String>,
    /// Disk: FILE[,format=raw|qcow2|vpc|vhdx|vmdk|vdi|qed|parallels|bochs|cloop|dmg|luks][,readonly=on][,snapshot=on][,cache=writeback|writethrough|none|directsync|unsafe]
    /// [,aio=io_uring|threads][,discard=ignore|unmap][,detect-zeroes=off|on|unmap][,bus=virtio][,serial=TEXT]
    /// [,logical_block_size=512|4096][,queues=N][,packed=on|off][,id=NAME][,rerror=report|ignore|stop]
    /// [,werror=report|ignore|stop|enospc][,throttling.bps-total|bps-read|bps-write|iops-total|iops-read|iops-write[-max[-length]]=N]
    /// [,throttling.iops-size=N][,throttling.group=NAME][,encrypt.key-secret=ID]; may be given several times
    #[arg(long, value_name = "DISK")]
    disk: Vec<String>,
    /// Password of encrypted disks: secret,id=ID,file=FILE; may be given several times
    #[arg(long, value_name = "OBJECT")]
    object: Vec<String>,
    /// Network card: user[,hostfwd=tcp|udp:[HOSTADDR:]HOSTPORT-[GUESTADDR:]GUESTPORT]…[,restrict=on][,hostname=NAME],
    /// tap,ifname=NAME, or none; each also takes mac=ADDRESS, queues=N and packed=on|off; may be
    /// given several times (default: none)
    #[arg(long, value_name = "NET")]
    net: Vec<String>,
    /// Serial port COM1 and on: stdio, file:PATH, unix:PATH[,server][,wait=off], tcp:HOST:PORT[,server][,wait=off], pty,
    /// null or none; may be given four times (default: stdio, unless there is a --console)
    #[arg(long, value_name = "CHARDEV")]
    serial: Vec<String>,
    /// Virtio console hvc0 and on, with the values of --serial; may be given several times
    #[arg(long, value_name = "CHARDEV")]
    console: Vec<String>,
    /// Debug console at port 402h, where firmware writes messages, with the values of --serial
    #[arg(long, value_name = "CHARDEV")]
    debugcon: Option<String>,
    /// A virtio entropy source
    #[arg(long)]
    rng: bool,
    /// A memory balloon: on[,deflate-on-oom=on][,free-page-reporting=on]
    #[arg(long, value_name = "BALLOON", num_args = 0..=1, default_missing_value = "on")]
    balloon: Option<String>,
    /// A socket device to the host: cid=N,path=SOCKET
    #[arg(long, value_name = "VSOCK")]
    vsock: Option<String>,
    /// Listen for QMP clients: unix:PATH
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<String>,
    /// Write the process ID to a file
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// End when the guest resets, instead of booting it again
    #[arg(long)]
    no_reboot: bool,
    /// Do not start the guest; QMP's cont does
    #[arg(long)]
    paused: bool,
    /// Writes to every disk go to temporary overlays that are gone afterwards
    #[arg(long)]
    snapshot: bool,
    /// Say on standard error at the end what the vCPUs have done: instructions, MIPS, translation, exits
    #[arg(long)]
    stats: bool,
    /// Where decompressed kernels are kept for the next machine: a folder, or none (default: corten/kernels in the user's cache folder)
    #[arg(long, value_name = "FOLDER")]
    kernel_cache: Option<PathBuf>,
    /// Say on standard error when the guest's first instruction runs
    #[arg(long, hide = true)]
    announce_start: bool,
    /// Print the machine's specification as JSON and do not run it
    #[arg(long)]
    print_spec: bool,
}

impl RunArguments {
    fn spec(&self) -> Result<VmSpec, OptionError> {
        let size = match &self.memory {
            None => DEFAULT_MEMORY,
            Some(text) => parse_size(text, 20).ok_or_else(|| {
                OptionError::new(
                    "--memory",
                    format!("'{text}': expected a size such as 512M or 2G"),
                )
            })?,
        };
        let mut spec = VmSpec::new(size);
        spec.name.clone_from(&self.name);
        spec.uuid = self.uuid.unwrap_or(spec.uuid);
        (spec.accel, spec.soft) = parse_accel("--accel", &self.accel)?;
        spec.machine = MachineType::parse(&self.machine)
            .ok_or_else(|| not_one_of("--machine", &self.machine, MachineType::NAMES))?;
        spec.cpu = CpuSpec::parse("--cpu", &self.cpu)?;
        spec.cpus = self.cpus;
        if !(1..=vm_spec::MAX_CPUS).contains(&self.cpus) {
            let message = format!("{}: expected 1 to {}", self.cpus, vm_spec::MAX_CPUS);
            return Err(OptionError::new("--cpus", message));
        }
        spec.kernel = self.kernel.clone().map(|kernel| KernelSpec {
            kernel,
            initrd: self.initrd.clone(),
            append: self.append.clone().unwrap_or_default(),
        });
        self.devices(&mut spec)?;
        spec.no_reboot = self.no_reboot;
        Ok(spec)
    }

    fn devices(&self, spec: &mut VmSpec) -> Result<(), OptionError> {
        for text in &self.object {
            spec.secrets.push(SecretSpec::parse("--object", text)?);
        }
        for text in &self.disk {
            let mut disk = DiskSpec::parse("--disk", text)?;
            disk.snapshot |= self.snapshot;
            if let Some(id) = &disk.key_secret
                && !spec.secrets.iter().any(|secret| secret.id == *id)
            {
                let message = format!("key-secret={id}: expected the id of an --object secret");
                return Err(OptionError::new("--disk", message));
            }
            spec.disks.push(disk);
        }
        if spec.disks.len() > MAX_DISKS {
            let message = format!(
                "{} disks, at most {MAX_DISKS} are possible",
                spec.disks.len()
            );
            return Err(OptionError::new("--disk", message));
        }
        for text in &self.net {
            spec.nets.extend(NetSpec::parse("--net", text)?);
        }
        for text in &self.serial {
            spec.serials.extend(CharSpec::parse("--serial", text)?);
        }
        for text in &self.console {
            spec.consoles.extend(CharSpec::parse("--console", text)?);
        }
        if let Some(text) = &self.debugcon {
            spec.debug_console = CharSpec::parse("--debugcon", text)?;
        }
        if self.serial.is_empty() && self.console.is_empty() {
            spec.serials.push(CharSpec::Stdio);
        }
        if spec.serials.len() > 4 {
            return Err(OptionError::new(
                "--serial",
                "a machine has four serial ports",
            ));
        }
        let terminals = spec
            .serials
            .iter()
            .chain(&spec.consoles)
            .chain(&spec.debug_console);
        if terminals.filter(|c| **c == CharSpec::Stdio).count() > 1 {
            return Err(OptionError::new("--serial", "stdio can be given only once"));
        }
        spec.rng = self.rng;
        spec.balloon = self.balloon.as_deref().map(balloon).transpose()?.flatten();
        spec.vsock = self.vsock.as_deref().map(vsock).transpose()?;
        Ok(())
    }

    fn qmp_path(&self) -> Result<Option<PathBuf>, OptionError> {
        let Some(text) = &self.qmp else {
            return Ok(None);
        };
        let path = text
            .strip_prefix("unix:")
            .and_then(|rest| rest.split(',').next());
        match path.filter(|path| !path.is_empty()) {
            Some(path) => Ok(Some(path.into())),
            None => Err(OptionError::new(
                "--qmp",
                format!("'{text}': expected unix:PATH"),
            )),
        }
    }
}

fn not_one_of(option: &str, text: &str, names: &str) -> OptionError {
    OptionError::new(option, format!("'{text}': expected one of {names}"))
}

fn balloon(text: &str) -> Result<Option<BalloonSpec>, OptionError> {
    let mut options = Options::parse("--balloon", text);
    let on = options.take_switch("on")?.unwrap_or(true);
    let off = options.take_switch("off")?.unwrap_or(false);
    let spec = BalloonSpec {
        deflate_on_oom: options.take_switch("deflate-on-oom")?.unwrap_or(false),
        free_page_reporting: options.take_switch("free-page-reporting")?.unwrap_or(false),
    };
    options.finish("on, off, deflate-on-oom, free-page-reporting")?;
    Ok((on && !off).then_some(spec))
}

fn vsock(text: &str) -> Result<VsockSpec, OptionError> {
    let mut options = Options::parse("--vsock", text);
    let cid = options.take_parsed("cid", "3 to 4294967294", |t| {
        t.parse().ok().filter(|cid| (3..=0xffff_fffe).contains(cid))
    })?;
    let path = options.take("path")?;
    let (Some(cid), Some(path)) = (cid, path) else {
        return Err(options.error("expected cid=N,path=SOCKET"));
    };
    options.finish("cid, path")?;
    Ok(VsockSpec {
        cid,
        path: path.into(),
    })
}

/// The folder for decompressed kernels: as given, else in the user's cache folder (XDG Base Directory Specification 0.8).
fn kernel_cache(given: Option<&Path>) -> Option<PathBuf> {
    if let Some(given) = given {
        return (given != Path::new("none")).then(|| given.to_owned());
    }
    let folder = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(caches.join("corten/kernels"))
}

/// Runs the machine to its end.
pub(crate) fn run(arguments: &RunArguments) -> ExitCode {
    if matches!(arguments.cpu.as_str(), "help" | "?") {
        machine::cpu_model::model_names()
            .iter()
            .for_each(|name| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let (spec, qmp) = match (arguments.spec(), arguments.qmp_path()) {
        (Ok(spec), Ok(qmp)) => (spec, qmp),
        (Err(why), _) | (_, Err(why)) => {
            eprintln!("corten run: {why}");
            return ExitCode::from(2);
        }
    };
    if arguments.print_spec {
        return match serde_json::to_string_pretty(&spec) {
            Ok(text) => {
                println!("{text}");
                ExitCode::SUCCESS
            }
            Err(why) => failed(&why),
        };
    }
    let options = RunOptions {
        qmp,
        pidfile: arguments.pidfile.clone(),
        paused: arguments.paused,
        kernel_cache: kernel_cache(arguments.kernel_cache.as_deref()),
        announce_start: arguments.announce_start,
        statistics: arguments.stats,
    };
    match machine::run(&spec, &options) {
        Ok(Outcome::PoweredOff | Outcome::Quit) => ExitCode::SUCCESS,
        Ok(Outcome::Ended(why)) => {
            eprintln!("corten: {why}");
            ExitCode::SUCCESS
        }
        Err(why) => failed(&why),
    }
}

fn failed(why: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("corten run: {why}");
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_cache_is_where_it_is_said_or_nowhere() {
        assert_eq!(kernel_cache(Some(Path::new("none"))), None);
        let given = Path::new("some/folder");
        assert_eq!(kernel_cache(Some(given)).as_deref(), Some(given));
    }
}
