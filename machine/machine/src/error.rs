//! Why a machine can't be built or run.

use accel::AccelError;
use block::BlockError;
use char_backends::OpenError;
use device_model::IoError;
use guest_memory::MemoryError;
use network_cards::NetError;
use pci::PciError;
use qmp::ServerError;
use virtio::transport::VirtioPciError;

use crate::loader::LoadError;

/// Why a machine can't be built or run; one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The specification asks for what there is not.
    #[error("{0}")]
    Spec(String),
    /// The processor.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A disk.
    #[error("--disk: {0}")]
    Disk(String),
    /// A network card's link.
    #[error("--net: {0}")]
    Net(#[from] NetError),
    /// A serial port or console.
    #[error("{option}: {source}")]
    Character {
        /// The option.
        option: &'static str,
        /// Why.
        source: OpenError,
    },
    /// A PCI function.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A virtio function.
    #[error(transparent)]
    Virtio(#[from] VirtioPciError),
    /// Register regions of two devices collide: the board is wrong.
    #[error(transparent)]
    Board(#[from] IoError),
    /// The control socket.
    #[error("--qmp: {0}")]
    Qmp(#[from] ServerError),
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The guest can't go on.
    #[error("{0}")]
    Guest(String),
}

impl MachineError {
    /// A refusal of the host's.
    pub(crate) fn host(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Host {
            what: what.into(),
            source: source.into(),
        }
    }
}

impl From<BlockError> for MachineError {
    fn from(error: BlockError) -> Self {
        Self::Disk(error.one_line())
    }
}
