//! What tools ask of an image beyond its disk.

use block::{BlockError, BlockFuture, Result};

use crate::luks::KeyChange;
use crate::qcow2::{CheckReport, Repair};

/// A property of an image, for people and for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Property {
    /// The name in human output.
    pub label: &'static str,
    /// The name in JSON.
    pub key: &'static str,
    /// The value.
    pub value: Value,
}

/// The value of a [`Property`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Yes or no.
    Bool(bool),
    /// A number.
    Number(i64),
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Several things with properties of their own.
    List(Vec<Vec<Property>>),
    /// Properties that belong together.
    Group(Vec<Property>),
}

/// A property.
pub(crate) fn property(label: &'static str, key: &'static str, value: Value) -> Property {
    Property { label, key, value }
}

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    /// The unit of allocation in bytes.
    pub cluster_size: Option<u64>,
    /// The layer below, as the image names it.
    pub backing_file: Option<String>,
    /// The format of the layer below, as the image or its format says.
    pub backing_format: Option<String>,
    /// Whether the content is encrypted.
    pub encrypted: bool,
    /// Other files that the disk is stored in, without those below it.
    pub files: Vec<String>,
    /// What only this format has.
    pub specific: Vec<Property>,
}

/// How an image stores compressed data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression {
    /// Pieces of this size are compressed by themselves, in bytes.
    pub unit: u64,
    /// A zlib header and checksum go around the deflate stream.
    pub zlib_wrapper: bool,
}

/// The side of an open image that only tools use.
pub trait ImageFormat {
    /// What it says of itself.
    fn describe(&self) -> Description;

    /// Checks it, and repairs it if asked to. `None` if the format has nothing to check.
    fn check(&self, repair: Repair) -> BlockFuture<'_, Option<CheckReport>>;

    /// How compressed data may be written, if at all.
    fn compression(&self) -> Option<Compression>;

    /// Stores one unit that the caller has compressed.
    ///
    /// # Errors
    ///
    /// `Unsupported` where [`Self::compression`] is `None`, or what the host reports.
    fn write_compressed(&self, offset: u64, data: Vec<u8>) -> BlockFuture<'_, ()>;

    /// Changes passwords.
    fn amend_keys(&self, _change: KeyChange) -> BlockFuture<'_, ()> {
        Box::pin(async { Err(BlockError::unsupported("this format has no passwords")) })
    }
}

/// The answer of formats that store nothing compressed.
pub(crate) fn no_compression<'a>() -> BlockFuture<'a, ()> {
    let message = "this format stores nothing compressed";
    Box::pin(async move { Result::Err(BlockError::unsupported(message)) })
}
