//! Disks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::throttle::{self, ThrottleSpec};
use crate::{OptionError, Options};

/// An enumeration whose values have names.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $text)] $variant,)+
        }
        impl $name {
            /// The names, for messages.
            pub const NAMES: &str = named!(@list $($text),+);
            /// Reads a name.
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)+ _ => None }
            }
            /// The name.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }
    };
    (@list $first:literal $(, $rest:literal)*) => { concat!($first $(, ", ", $rest)*) };
}
pub(crate) use named;

named! {
    /// Image format.
    DiskFormat {
        /// The file is the disk.
        #[default]
        Raw = "raw",
        /// QEMU's copy-on-write format.
        Qcow2 = "qcow2",
        /// Virtual PC's and Azure's: VHD.
        Vpc = "vpc",
        /// Hyper-V's.
        Vhdx = "vhdx",
        /// VMware's.
        Vmdk = "vmdk",
        /// VirtualBox's.
        Vdi = "vdi",
        /// QEMU's enhanced disk; read alone.
        Qed = "qed",
        /// Parallels'; read alone.
        Parallels = "parallels",
        /// Bochs's growing image; read alone.
        Bochs = "bochs",
        /// Linux's compressed loop image; read alone.
        Cloop = "cloop",
        /// Apple's disk image; read alone.
        Dmg = "dmg",
        /// A LUKS1 volume.
        Luks = "luks",
    }
}

named! {
    /// How the host caches, as QEMU names it.
    CacheMode {
        /// The host's cache is used; guest flushes reach the disk.
        #[default]
        Writeback = "writeback",
        /// As writeback, and every write reaches the disk before it completes.
        Writethrough = "writethrough",
        /// The host's cache is passed by (O_DIRECT); guest flushes reach the disk.
        None = "none",
        /// As none, and every write reaches the disk before it completes.
        Directsync = "directsync",
        /// Guest flushes are ignored: data is lost when the host fails.
        Unsafe = "unsafe",
    }
}

named! {
    /// How input and output is done.
    Aio {
        /// io_uring where the host has it, else threads.
        #[default]
        IoUring = "io_uring",
        /// Threads that block.
        Threads = "threads",
    }
}

named! {
    /// What a guest's discard does.
    Discard {
        /// Nothing.
        #[default]
        Ignore = "ignore",
        /// Frees space in the image.
        Unmap = "unmap",
    }
}

named! {
    /// What a write of zeroes does.
    DetectZeroes {
        /// Written like any other.
        #[default]
        Off = "off",
        /// Written as a zero range.
        On = "on",
        /// Discarded where the disk may be.
        Unmap = "unmap",
    }
}

named! {
    /// What the disk is attached to.
    DiskBus {
        /// A virtio-blk device of its own.
        #[default]
        Virtio = "virtio",
    }
}

named! {
    /// What becomes of a request when the host can't read or write.
    ErrorPolicy {
        /// The guest is told.
        #[default]
        Report = "report",
        /// The guest is told that all went well.
        Ignore = "ignore",
        /// The guest is stopped, and the request tried again when it goes on.
        Stop = "stop",
        /// As stop where the host has no space left, else as report; for writes alone.
        Enospc = "enospc",
    }
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// What monitors call it; `None`: `disk` and its number.
    pub id: Option<String>,
    /// Image file or block device.
    pub path: PathBuf,
    /// Its format; `None` looks at the image (a raw image never turns into another format silently: what is not
    /// recognised by its header is raw, and what is recognised is said).
    pub format: Option<DiskFormat>,
    /// The guest can't write.
    pub read_only: bool,
    /// Caching.
    pub cache: CacheMode,
    /// Engine.
    pub aio: Aio,
    /// What discard does.
    pub discard: Discard,
    /// What zero writes do.
    pub detect_zeroes: DetectZeroes,
    /// Bus.
    pub bus: DiskBus,
    /// Serial number that the guest sees, at most 20 bytes.
    pub serial: Option<String>,
    /// Writes go to a temporary overlay that is gone afterwards.
    pub snapshot: bool,
    /// Logical sector size in bytes, 512 or 4096.
    pub logical_block_size: u32,
    /// Request queues; 0 for one for each vCPU, up to a limit.
    pub queues: u16,
    /// The device offers packed rings beside split ones.
    pub packed: bool,
    /// What to do when the host can't read.
    pub rerror: ErrorPolicy,
    /// What to do when the host can't write.
    pub werror: ErrorPolicy,
    /// The id of the secret that is its password.
    #[serde(default)]
    pub key_secret: Option<String>,
    /// Limits on its rate.
    #[serde(default)]
    pub throttle: ThrottleSpec,
}

const KEYS: &str = "file, format, readonly, cache, aio, discard, detect-zeroes, bus, serial, \
                    snapshot, logical_block_size, queues, packed, id, rerror, werror, key-secret, encrypt.key-secret";

/// A name as QEMU takes them for IDs.
fn identifier(text: &str) -> Option<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let starts = text.starts_with(|c: char| c.is_ascii_alphabetic());
    (starts && text.chars().all(good)).then(|| text.to_owned())
}

impl DiskSpec {
    /// A disk with every setting at its default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            id: None,
            path: path.into(),
            format: None,
            read_only: false,
            cache: CacheMode::default(),
            aio: Aio::default(),
            discard: Discard::Unmap,
            detect_zeroes: DetectZeroes::default(),
            bus: DiskBus::default(),
            serial: None,
            snapshot: false,
            logical_block_size: 512,
            queues: 0,
            packed: true,
            rerror: ErrorPolicy::Report,
            werror: ErrorPolicy::Enospc,
            key_secret: None,
            throttle: ThrottleSpec::default(),
        }
    }

    /// Reads `FILE[,format=…][,readonly=…]…`, or `file=FILE,…`.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(option: &str, text: &str) -> Result<Self, OptionError> {
        let (path, mut o) = if text.starts_with("file=") {
            let mut o = Options::parse(option, text);
            let path = o.take("file")?.filter(|p| !p.is_empty());
            (path.ok_or_else(|| o.error("file= needs a path"))?, o)
        } else {
            Options::parse_with_first(option, text, "an image file")?
        };
        let mut disk = Self::new(path);
        disk.format = o.take_parsed("format", DiskFormat::NAMES, DiskFormat::parse)?;
        disk.read_only = o.take_switch("readonly")?.unwrap_or(false);
        disk.snapshot = o.take_switch("snapshot")?.unwrap_or(false);
        disk.cache = o
            .take_parsed("cache", CacheMode::NAMES, CacheMode::parse)?
            .unwrap_or_default();
        disk.aio = o
            .take_parsed("aio", Aio::NAMES, Aio::parse)?
            .unwrap_or_default();
        if let Some(discard) =
            o.take_parsed("discard", "ignore, unmap, off or on", |t| match t {
                "off" => Some(Discard::Ignore),
                "on" => Some(Discard::Unmap),
                t => Discard::parse(t),
            })?
        {
            disk.discard = discard;
        }
        disk.detect_zeroes = o
            .take_parsed("detect-zeroes", DetectZeroes::NAMES, DetectZeroes::parse)?
            .unwrap_or_default();
        disk.bus = o
            .take_parsed("bus", DiskBus::NAMES, DiskBus::parse)?
            .unwrap_or_default();
        disk.serial = o.take_parsed("serial", "at most 20 characters of ASCII", |t| {
            (t.len() <= 20 && t.is_ascii()).then(|| t.to_owned())
        })?;
        if let Some(size) = o.take_parsed("logical_block_size", "512 or 4096", |t| {
            t.parse().ok().filter(|s| matches!(s, 512 | 4096))
        })? {
            disk.logical_block_size = size;
        }
        if let Some(queues) = o.take_parsed("queues", "1 to 64", |t| {
            t.parse().ok().filter(|q| (1..=64).contains(q))
        })? {
            disk.queues = queues;
        }
        disk.packed = o.take_switch("packed")?.unwrap_or(true);
        disk.id = o.take_parsed(
            "id",
            "a letter, then letters, digits, '-', '.' or '_'",
            identifier,
        )?;
        let of_reads = |text: &str| ErrorPolicy::parse(text).filter(|p| *p != ErrorPolicy::Enospc);
        if let Some(policy) = o.take_parsed("rerror", "report, ignore or stop", of_reads)? {
            disk.rerror = policy;
        }
        if let Some(policy) = o.take_parsed("werror", ErrorPolicy::NAMES, ErrorPolicy::parse)? {
            disk.werror = policy;
        }
        disk.key_secret = match o.take("encrypt.key-secret")? {
            Some(id) => Some(id),
            None => o.take("key-secret")?,
        };
        disk.throttle = ThrottleSpec::take(&mut o)?;
        o.finish(&format!("{KEYS}, {}", throttle::KEYS))?;
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let disk = DiskSpec::parse(
            "--disk",
            "/d/a.qcow2,format=qcow2,readonly=on,cache=none,aio=threads,discard=off,bus=virtio",
        )
        .unwrap();
        assert_eq!(disk.path, PathBuf::from("/d/a.qcow2"));
        assert_eq!(disk.format, Some(DiskFormat::Qcow2));
        assert!(disk.read_only);
        assert_eq!(disk.cache, CacheMode::None);
        assert_eq!(disk.aio, Aio::Threads);
        assert_eq!(disk.discard, Discard::Ignore);
        assert_eq!(
            DiskSpec::parse("--disk", "file=x").unwrap(),
            DiskSpec::new("x")
        );
        let json = serde_json::to_string(&disk).unwrap();
        assert_eq!(serde_json::from_str::<DiskSpec>(&json).unwrap(), disk);
    }

    #[test]
    fn refusals_say_what_was_expected() {
        let error = |text| DiskSpec::parse("--disk", text).unwrap_err().to_string();
        assert_eq!(
            error("x,format=bmp"),
            "--disk: format=bmp: expected raw, qcow2, vpc, vhdx, vmdk, vdi, qed, parallels, bochs, cloop, dmg, luks"
        );
        assert!(error("x,cash=none").contains("unknown key 'cash'"));
        assert_eq!(error(",format=raw"), "--disk: expected an image file first");
    }
}
