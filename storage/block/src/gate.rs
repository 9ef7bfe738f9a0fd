//! Implicit opens: files that an image names, and that the person who named the image did not.

use std::rc::Rc;

use crate::backend::{BlockBackend, BlockFuture};
use crate::error::{BlockError, ErrorKind};
use crate::medium::Medium;

/// Why an image asks for another file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImplicitFile {
    /// What unallocated parts read as.
    Backing {
        /// The format that the image says it has; `None` leaves it to the gate.
        format: Option<String>,
    },
    /// The file that holds the guest's data beside the metadata.
    Data,
    /// One piece of an image that is spread over files.
    Extent,
}

impl ImplicitFile {
    /// How to call it in messages.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Backing { .. } => "backing file",
            Self::Data => "data file",
            Self::Extent => "extent file",
        }
    }
}

/// Every file that an image names is opened here, so that a hostile image cannot reach files that the
/// caller does not want it to.
pub trait OpenGate {
    /// Opens a whole disk, for backing files. `base` is the name of the image that asks (relative
    /// names are relative to its directory), `name` what it asks for.
    fn open_backend<'a>(
        &'a self,
        base: &'a str,
        name: &'a str,
        why: ImplicitFile,
    ) -> BlockFuture<'a, Rc<dyn BlockBackend>>;

    /// Opens a file of bytes, for data and extent files.
    fn open_medium<'a>(
        &'a self,
        base: &'a str,
        name: &'a str,
        why: ImplicitFile,
        writable: bool,
    ) -> BlockFuture<'a, Rc<dyn Medium>>;
}

/// A gate that opens nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Refusing;

impl Refusing {
    fn refuse(name: &str, why: &ImplicitFile) -> BlockError {
        let what = why.describe();
        BlockError::new(
            ErrorKind::Refused,
            format!("the image asks for the {what} '{name}'"),
        )
    }
}

impl OpenGate for Refusing {
    fn open_backend<'a>(
        &'a self,
        _base: &'a str,
        name: &'a str,
        why: ImplicitFile,
    ) -> BlockFuture<'a, Rc<dyn BlockBackend>> {
        Box::pin(async move { Err(Self::refuse(name, &why)) })
    }

    fn open_medium<'a>(
        &'a self,
        _base: &'a str,
        name: &'a str,
        why: ImplicitFile,
        _writable: bool,
    ) -> BlockFuture<'a, Rc<dyn Medium>> {
        Box::pin(async move { Err(Self::refuse(name, &why)) })
    }
}
