//! New images of any format but raw and qcow2, which tools make by their own options.

use std::rc::Rc;

use block::{ImplicitFile, Medium, OpenGate, Result};

use crate::{luks, vdi, vhdx, vmdk, vpc};

/// What to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewImage {
    /// VHD.
    Vpc(vpc::CreateOptions),
    /// VDI.
    Vdi(vdi::CreateOptions),
    /// VHDX.
    Vhdx(vhdx::CreateOptions),
    /// VMDK.
    Vmdk(vmdk::CreateOptions),
    /// LUKS1.
    Luks(luks::CreateOptions),
}

impl NewImage {
    /// The format's name as people write it.
    pub fn format(&self) -> &'static str {
        match self {
            Self::Vpc(_) => "vpc",
            Self::Vdi(_) => "vdi",
            Self::Vhdx(_) => "vhdx",
            Self::Vmdk(_) => "vmdk",
            Self::Luks(_) => "luks",
        }
    }

    /// The default options of a format; `None` if it cannot be written, or is raw or qcow2.
    pub fn of(format: &str) -> Option<Self> {
        Some(match format {
            "vpc" => Self::Vpc(vpc::CreateOptions::default()),
            "vdi" => Self::Vdi(vdi::CreateOptions::default()),
            "vhdx" => Self::Vhdx(vhdx::CreateOptions::default()),
            "vmdk" => Self::Vmdk(vmdk::CreateOptions::default()),
            "luks" => Self::Luks(luks::CreateOptions::default()),
            _ => return None,
        })
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Vpc(o) => o.size,
            Self::Vdi(o) => o.size,
            Self::Vhdx(o) => o.size,
            Self::Vmdk(o) => o.size,
            Self::Luks(o) => o.size,
        }
    }

    /// Sets the disk's size in bytes.
    pub fn set_size(&mut self, size: u64) {
        match self {
            Self::Vpc(o) => o.size = size,
            Self::Vdi(o) => o.size = size,
            Self::Vhdx(o) => o.size = size,
            Self::Vmdk(o) => o.size = size,
            Self::Luks(o) => o.size = size,
        }
    }

    /// The parent's name as it will be stored.
    pub fn backing(&self) -> Option<&str> {
        match self {
            Self::Vpc(o) => o.parent.as_deref(),
            Self::Vdi(_) | Self::Luks(_) => None,
            Self::Vhdx(o) => o.parent.as_deref(),
            Self::Vmdk(o) => o.parent.as_deref(),
        }
    }

    /// Sets the parent's name; `false` if the format has no parents.
    pub fn set_backing(&mut self, name: Option<String>) -> bool {
        match self {
            Self::Vpc(o) => o.parent = name,
            Self::Vdi(_) | Self::Luks(_) => return false,
            Self::Vhdx(o) => o.parent = name,
            Self::Vmdk(o) => o.parent = name,
        }
        true
    }

    /// The names of other files that an image named `name` consists of, relative to it. Whoever makes the
    /// image makes them first, empty.
    pub fn files(&self, name: &str) -> Vec<String> {
        match self {
            Self::Vpc(_) | Self::Vdi(_) | Self::Vhdx(_) | Self::Luks(_) => Vec::new(),
            Self::Vmdk(o) => vmdk::files(o, name),
        }
    }

    /// Makes the image in `medium`, which is emptied; other files are opened through `gate`. `random`
    /// makes identities unique.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for options that do not go together, or what the gate and the host report.
    pub async fn create(
        &self,
        medium: &Rc<dyn Medium>,
        gate: &dyn OpenGate,
        random: fn() -> [u8; 16],
    ) -> Result<()> {
        let parent = match self.backing() {
            Some(name) => {
                let why = ImplicitFile::Backing {
                    format: Some(self.format().to_owned()),
                };
                Some(gate.open_medium(&medium.name(), name, why, false).await?)
            }
            None => None,
        };
        match self {
            Self::Vpc(options) => vpc::create(medium, options, parent.as_deref(), random()).await,
            Self::Vdi(options) => vdi::create(medium, options).await,
            Self::Vhdx(options) => vhdx::create(medium, options, parent.as_deref()).await,
            Self::Vmdk(options) => vmdk::create(medium, options, parent.as_deref(), gate).await,
            Self::Luks(options) => luks::create(medium, options).await,
        }
    }

    /// The bytes of the file: with the given extents of the disk stored, and with all of it.
    ///
    /// # Errors
    ///
    /// If the options do not go together.
    pub fn measure(&self, stored: &[(u64, u64)]) -> Result<(u64, u64)> {
        match self {
            Self::Vpc(o) => vpc::measure(o, blocks_touched(stored, vpc::NEW_BLOCK_SIZE)),
            Self::Vdi(o) => vdi::measure(o, blocks_touched(stored, vdi::NEW_BLOCK_SIZE)),
            Self::Vhdx(o) => vhdx::measure(o, blocks_touched(stored, vhdx::new_block_size(o))),
            Self::Vmdk(o) => vmdk::measure(o, stored),
            Self::Luks(o) => luks::measure(o),
        }
    }
}

/// How many blocks hold some of the extents, which are sorted offsets and lengths.
fn blocks_touched(stored: &[(u64, u64)], block: u64) -> u64 {
    let (mut count, mut next) = (0, 0);
    for (offset, length) in stored {
        let first = (offset / block).max(next);
        let end = (offset + length).div_ceil(block);
        count += end.saturating_sub(first);
        next = next.max(end);
    }
    count
}
