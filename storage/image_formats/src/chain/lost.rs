//! What stands where an image was that could be opened no more.

use std::rc::Rc;

use block::{
    BlockBackend, BlockError, BlockFuture, ErrorKind, Extent, ExtentQuery, IoBuf, Limits, ZeroFlags,
};

/// Fails every request, so that nobody takes zeroes for what was there.
pub(super) struct Lost {
    pub(super) limits: Limits,
    pub(super) format: &'static str,
    pub(super) file: Rc<str>,
}

impl Lost {
    fn fail<'a, T: 'a>(&self) -> BlockFuture<'a, T> {
        let message = format!("'{}' could not be opened again", self.file);
        Box::pin(async move { Err(BlockError::new(ErrorKind::Io, message)) })
    }
}

impl BlockBackend for Lost {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn format_name(&self) -> &'static str {
        self.format
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.file.clone())
    }

    fn read(&self, _: u64, _: IoBuf) -> BlockFuture<'_, ()> {
        self.fail()
    }

    fn write(&self, _: u64, _: IoBuf) -> BlockFuture<'_, ()> {
        self.fail()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> BlockFuture<'_, ()> {
        self.fail()
    }

    fn discard(&self, _: u64, _: u64) -> BlockFuture<'_, ()> {
        self.fail()
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        self.fail()
    }

    fn extents(&self, _: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        self.fail()
    }

    fn resize(&self, _: u64) -> BlockFuture<'_, ()> {
        self.fail()
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}
