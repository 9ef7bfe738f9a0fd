//! LUKS1 volumes: a header with eight places for passwords, then the disk, encrypted sector by sector.
//!
//! Without a password an image tells what its header says, and its disk can't be read.

mod amend;
mod cipher;
mod create;
mod encryption;
mod header;
mod keys;

pub use amend::KeyChange;
pub use cipher::{Hash, IvGenerator, Mode};
pub use create::{CreateOptions, create, measure};
pub(crate) use create::{header_length, new_keys};
pub(crate) use encryption::Encryption;

use std::cell::Cell;
use std::fmt;
use std::io::Read;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use block::{
    BlockBackend, BlockError, BlockFuture, ErrorKind, Extent, ExtentKind, ExtentQuery, IoBuf,
    Limits, Medium, Result, ZeroFlags,
};

use crate::details::{Compression, Description, ImageFormat, no_compression};
use crate::qcow2::{CheckReport, Repair};
use header::SECTOR;

/// A password is no longer than this, in bytes.
const MAX_SECRET: u64 = 1 << 20;
/// What is encrypted in one piece of memory.
const PIECE: usize = 1 << 20;

/// A password. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// These bytes as a password.
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    /// What the file `path` holds, as it is: a line's end counts too.
    ///
    /// # Errors
    ///
    /// What the host reports, and `InvalidArgument` for a file of more than 1 MiB.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |e| BlockError::io(format!("Unable to read {}", path.display()), e);
        let mut bytes = Vec::new();
        let opened = std::fs::File::open(path).map_err(failed)?;
        let mut limited = opened.take(MAX_SECRET + 1);
        limited.read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_SECRET {
            let message = format!("{}: a secret has at most 1 MiB", path.display());
            return Err(BlockError::invalid_argument(message));
        }
        Ok(Self::new(&bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// An open LUKS volume.
pub struct Luks {
    medium: Rc<dyn Medium>,
    encryption: Encryption,
    size: Cell<u64>,
}

impl Luks {
    /// Opens the volume in `medium`. Without a `secret` it can only be described.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported` with what is wrong, `PermissionDenied` if the password is wrong, or what the
    /// host reports.
    pub async fn open(medium: Rc<dyn Medium>, secret: Option<&Secret>) -> Result<Self> {
        let name = medium.name();
        let opened = Self::open_inner(medium, secret).await;
        opened.map_err(|e| match e.kind() {
            ErrorKind::InvalidImage | ErrorKind::Unsupported | ErrorKind::PermissionDenied => {
                e.context(format!("'{name}'"))
            }
            _ => e,
        })
    }

    async fn open_inner(medium: Rc<dyn Medium>, secret: Option<&Secret>) -> Result<Self> {
        let encryption = Encryption::open(&*medium, 0, secret).await?;
        let size = medium.len().checked_sub(encryption.payload());
        let size = size.ok_or_else(|| {
            BlockError::invalid_image("the file ends before the encrypted data begins")
        })?;
        Ok(Self {
            medium,
            size: Cell::new(size / SECTOR * SECTOR),
            encryption,
        })
    }

    fn payload(&self) -> u64 {
        self.encryption.payload()
    }

    async fn read_part(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let length = (buf.len() - done).min(PIECE);
            let at = offset + done as u64;
            // Others may look at the caller's memory, or change it, while it holds what is encrypted.
            let piece = IoBuf::zeroed(length);
            self.medium.read(self.payload() + at, piece.clone()).await?;
            let mut bytes = piece.to_vec();
            self.encryption.decrypt(at, &mut bytes)?;
            buf.slice(done, length).copy_from(&bytes);
            done += length;
        }
        Ok(())
    }

    async fn write_part(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let length = (buf.len() - done).min(PIECE);
            let bytes = buf.slice(done, length).to_vec();
            self.write_bytes(offset + done as u64, bytes).await?;
            done += length;
        }
        Ok(())
    }

    async fn write_bytes(&self, offset: u64, mut bytes: Vec<u8>) -> Result<()> {
        self.encryption.encrypt(offset, &mut bytes)?;
        let place = self.payload() + offset;
        self.medium.write(place, IoBuf::from_slice(&bytes)).await
    }

    /// Zeroes are stored encrypted, like everything else.
    async fn zero(&self, offset: u64, length: u64) -> Result<()> {
        let mut done = 0;
        while done < length {
            let part = (length - done).min(PIECE as u64);
            self.write_bytes(offset + done, vec![0; part as usize])
                .await?;
            done += part;
        }
        Ok(())
    }
}

impl BlockBackend for Luks {
    fn limits(&self) -> Limits {
        Limits {
            size: self.size.get(),
            logical_block_size: SECTOR as u32,
            physical_block_size: self.medium.alignment().max(SECTOR as u32),
            buffer_alignment: 1,
            discard_granularity: 0,
            zero_granularity: 0,
            max_transfer: 1 << 30,
            read_only: self.medium.read_only(),
        }
    }

    fn format_name(&self) -> &'static str {
        "luks"
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.medium.name())
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.read_part(offset, buf))
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.write_part(offset, buf))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            let message = "zeroes are stored encrypted, as data";
            return Box::pin(async move { Err(BlockError::unsupported(message)) });
        }
        Box::pin(self.zero(offset, length))
    }

    fn discard(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        // Holes would show which parts are in use.
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        self.medium.flush()
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        Box::pin(async move {
            Ok(vec![Extent {
                offset: query.offset,
                length: query.length,
                kind: ExtentKind::Data(None),
                depth: 0,
            }])
        })
    }

    fn resize(&self, size: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let old = self.size.get();
            if size > old {
                self.encryption.check_unlocked()?;
            }
            let length = self
                .payload()
                .checked_add(size)
                .ok_or_else(|| BlockError::invalid_argument("the size is larger than any file"))?;
            self.medium.set_len(length).await?;
            if size > old {
                self.zero(old, size - old).await?;
            }
            self.size.set(size);
            Ok(())
        })
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        if self.medium.read_only() {
            return Box::pin(async { Ok(()) });
        }
        self.medium.flush()
    }
}

impl ImageFormat for Luks {
    fn describe(&self) -> Description {
        Description {
            encrypted: true,
            specific: self.encryption.describe(),
            ..Description::default()
        }
    }

    fn check(&self, _repair: Repair) -> BlockFuture<'_, Option<CheckReport>> {
        Box::pin(async { Ok(None) })
    }

    fn compression(&self) -> Option<Compression> {
        None
    }

    fn write_compressed(&self, _offset: u64, _data: Vec<u8>) -> BlockFuture<'_, ()> {
        no_compression()
    }

    fn amend_keys(&self, change: KeyChange) -> BlockFuture<'_, ()> {
        Box::pin(async move { self.encryption.amend(&*self.medium, 0, &change).await })
    }
}
