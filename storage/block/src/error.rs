//! The one error type of the block layer.

use std::fmt;
use std::io;

/// What went wrong, for control flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file does not exist.
    NotFound,
    /// The host refuses access to a file.
    PermissionDenied,
    /// Another process holds a conflicting lock on the image.
    Locked,
    /// A file that should be created is there already.
    AlreadyExists,
    /// The file's contents break the rules of its format.
    InvalidImage,
    /// The format or file asks for something that is not supported.
    Unsupported,
    /// The request reaches past the end of the disk.
    OutOfRange,
    /// The request's offset or length is not a multiple of the block size.
    Misaligned,
    /// A write to something that was opened read-only.
    ReadOnly,
    /// The file system or device is full.
    NoSpace,
    /// An option or argument has a bad value.
    InvalidArgument,
    /// A file outside the image's own reach was asked for and the gate refused it.
    Refused,
    /// Any other failure of the host's I/O.
    Io,
}

/// An error of the block layer: a kind, a one-line message with the context that a person needs, and
/// possibly the host's error that caused it (which the message does not repeat).
#[derive(Debug)]
pub struct BlockError(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<io::Error>,
}

/// The block layer's result.
pub type Result<T, E = BlockError> = std::result::Result<T, E>;

impl BlockError {
    /// An error without an underlying cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            source: None,
        }))
    }

    /// An error caused by the host's I/O; the kind is derived from it.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        let kind = kind_of(&source);
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            source: Some(source),
        }))
    }

    /// The file breaks its format's rules.
    pub fn invalid_image(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidImage, message)
    }

    /// Something that is not supported.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// An option or argument has a bad value.
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The message alone, without the source.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The same error with `context` and a colon before its message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.0.message = format!("{context}: {}", self.0.message);
        self
    }

    /// The error number that tells this failure to a guest or a protocol peer.
    pub fn errno(&self) -> i32 {
        if let Some(number) = self.0.source.as_ref().and_then(io::Error::raw_os_error) {
            return number;
        }
        match self.0.kind {
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::PermissionDenied | ErrorKind::Refused => libc::EACCES,
            ErrorKind::Locked => libc::EAGAIN,
            ErrorKind::AlreadyExists => libc::EEXIST,
            ErrorKind::Unsupported => libc::ENOTSUP,
            ErrorKind::OutOfRange | ErrorKind::Misaligned | ErrorKind::InvalidArgument => {
                libc::EINVAL
            }
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::InvalidImage | ErrorKind::Io => libc::EIO,
        }
    }

    /// Message and causes in one line, as a tool prints it.
    pub fn one_line(&self) -> String {
        match &self.0.source {
            Some(source) => format!("{}: {}", self.0.message, os_message(source)),
            None => self.0.message.clone(),
        }
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for BlockError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}

/// The system's text for an error, without the error number that Rust appends.
fn os_message(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.raw_os_error() {
        Some(libc::ENOENT) => ErrorKind::NotFound,
        Some(libc::EACCES | libc::EPERM) => ErrorKind::PermissionDenied,
        Some(libc::EEXIST) => ErrorKind::AlreadyExists,
        Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
        Some(libc::EROFS) => ErrorKind::ReadOnly,
        Some(libc::EOPNOTSUPP) => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_names_cause_once_without_number() {
        let source = io::Error::from_raw_os_error(libc::ENOENT);
        let error = BlockError::io("cannot open 'a.img'", source);
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(error.errno(), libc::ENOENT);
        assert_eq!(
            error.one_line(),
            "cannot open 'a.img': No such file or directory"
        );
        assert_eq!(error.to_string(), "cannot open 'a.img'");
    }
}
