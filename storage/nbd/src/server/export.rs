//! An export: a disk, or a part of one, in single bytes.

use std::rc::Rc;

use block::{
    BitmapRun, ByteDisk, DirtyBitmap, Disk, Extent, ExtentQuery, IoBuf, Result, Scope, ZeroFlags,
};

use crate::protocol::{StateFlags, StatusDescriptor, TransmissionFlags};

/// A disk under a name.
pub struct Export {
    /// The name that clients ask for.
    pub name: String,
    /// A description for people, if any.
    pub description: String,
    disk: Rc<Disk>,
    bytes: ByteDisk,
    offset: u64,
    size: u64,
    shared: bool,
    allocation_depth: bool,
    bitmaps: Vec<Rc<DirtyBitmap>>,
}

/// The number of the context `base:allocation`.
pub(super) const BASE_ALLOCATION: u32 = 0;
/// The number of the context `qemu:allocation-depth`.
pub(super) const ALLOCATION_DEPTH: u32 = 1;
/// The number of the first bitmap's context.
pub(super) const FIRST_BITMAP: u32 = 2;

impl Export {
    /// Exports `disk` from byte `offset` on. `shared` says that several clients may come at once.
    ///
    /// # Errors
    ///
    /// If the offset lies past the end.
    pub fn new(name: &str, disk: Rc<Disk>, offset: u64, shared: bool) -> Result<Self> {
        let whole = disk.size();
        let size = whole.checked_sub(offset).ok_or_else(|| {
            block::BlockError::invalid_argument(format!(
                "the offset {offset} lies past the end of the disk at {whole}"
            ))
        })?;
        Ok(Self {
            name: name.to_owned(),
            description: String::new(),
            bytes: ByteDisk::new(disk.clone()),
            disk,
            offset,
            size,
            shared,
            allocation_depth: false,
            bitmaps: Vec::new(),
        })
    }

    /// Adds a description for people.
    #[must_use]
    pub fn described(mut self, description: &str) -> Self {
        description.clone_into(&mut self.description);
        self
    }

    /// Offers `qemu:allocation-depth`.
    #[must_use]
    pub fn with_allocation_depth(mut self) -> Self {
        self.allocation_depth = true;
        self
    }

    /// Offers `qemu:dirty-bitmap:NAME`.
    #[must_use]
    pub fn with_bitmap(mut self, bitmap: Rc<DirtyBitmap>) -> Self {
        self.bitmaps.push(bitmap);
        self
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn flags(&self, structured: bool) -> TransmissionFlags {
        type F = TransmissionFlags;
        let mut flags = F::HAS_FLAGS | F::SEND_FLUSH | F::SEND_FUA | F::SEND_CACHE;
        if self.disk.limits().read_only {
            flags |= F::READ_ONLY | F::CAN_MULTI_CONN;
        } else {
            flags |= F::SEND_TRIM | F::SEND_WRITE_ZEROES | F::SEND_FAST_ZERO;
            // All connections share one disk, so what one flushes, all have flushed.
            flags.set(F::CAN_MULTI_CONN, self.shared);
        }
        flags.set(F::SEND_DF, structured);
        flags
    }

    /// Names and numbers of the meta contexts.
    pub(super) fn contexts(&self) -> Vec<(u32, String)> {
        let mut list = vec![(BASE_ALLOCATION, "base:allocation".to_owned())];
        if self.allocation_depth {
            list.push((ALLOCATION_DEPTH, "qemu:allocation-depth".to_owned()));
        }
        list.extend(
            (FIRST_BITMAP..)
                .zip(&self.bitmaps)
                .map(|(number, bitmap)| (number, format!("qemu:dirty-bitmap:{}", bitmap.name()))),
        );
        list
    }

    pub(super) fn read_only(&self) -> bool {
        self.disk.limits().read_only
    }

    /// Whether a range lies inside.
    pub(super) fn contains(&self, offset: u64, length: u64) -> bool {
        offset
            .checked_add(length)
            .is_some_and(|end| end <= self.size)
    }

    pub(super) async fn read(&self, offset: u64, buf: IoBuf) -> Result<()> {
        self.bytes.read(offset + self.offset, buf).await
    }

    pub(super) async fn write(&self, offset: u64, buf: IoBuf, through: bool) -> Result<()> {
        self.bytes.write(offset + self.offset, buf, through).await
    }

    pub(super) async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        flags: ZeroFlags,
        through: bool,
    ) -> Result<()> {
        let at = offset + self.offset;
        self.bytes.write_zeroes(at, length, flags, through).await
    }

    /// Whole blocks inside the range lose their contents.
    pub(super) async fn trim(&self, offset: u64, length: u64, through: bool) -> Result<()> {
        self.bytes.discard(offset + self.offset, length).await?;
        if through {
            self.disk.flush().await?;
        }
        Ok(())
    }

    pub(super) async fn flush(&self) -> Result<()> {
        self.disk.flush().await
    }

    pub(super) async fn extents(
        &self,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>> {
        let query = ExtentQuery {
            offset: offset + self.offset,
            length,
            scope: Scope::Chain,
            limit,
        };
        self.disk.extents(query).await
    }

    /// What context number `context` says of a range.
    pub(super) async fn status(
        &self,
        context: u32,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<StatusDescriptor>> {
        let bitmap = context.checked_sub(FIRST_BITMAP);
        if let Some(bitmap) = bitmap.and_then(|n| self.bitmaps.get(n as usize)) {
            return Ok(self.bitmap_status(bitmap, offset, length, limit));
        }
        let end = offset + self.offset + length;
        let mut found: Vec<StatusDescriptor> = Vec::new();
        for extent in self.extents(offset, length, limit).await? {
            let begin = extent.offset.max(offset + self.offset);
            let Some(length) = extent.end().min(end).checked_sub(begin).filter(|n| *n > 0) else {
                continue;
            };
            let flags = if context == BASE_ALLOCATION {
                let zero = StateFlags::HOLE | StateFlags::ZERO;
                let flags = extent.reads_as_zero().then_some(zero);
                u64::from(flags.unwrap_or(StateFlags::empty()).bits())
            } else if matches!(extent.kind, block::ExtentKind::Unallocated) {
                0
            } else {
                u64::from(extent.depth) + 1
            };
            push_status(&mut found, length, flags);
        }
        Ok(found)
    }

    fn bitmap_status(
        &self,
        bitmap: &DirtyBitmap,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Vec<StatusDescriptor> {
        let mut found = Vec::new();
        let mut done = 0;
        while done < length && found.len() < limit {
            let BitmapRun { dirty, length: run } =
                bitmap.run_at(offset + self.offset + done, length - done);
            push_status(&mut found, run.max(1), u64::from(dirty));
            done += run.max(1);
        }
        found
    }
}

fn push_status(found: &mut Vec<StatusDescriptor>, length: u64, flags: u64) {
    match found.last_mut() {
        Some(last) if last.flags == flags => last.length += length,
        _ => found.push(StatusDescriptor { length, flags }),
    }
}
