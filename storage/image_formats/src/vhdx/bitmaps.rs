//! Sector bitmaps of differencing disks: which sectors are in this layer ([MS-VHDX] 2.5.2).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use block::{IoBuf, Medium, Result};

use super::journal::Sector;
use super::log::SECTOR;

/// Sectors of the disk that a page of a bitmap covers.
pub(super) const PAGE_BITS: u64 = 8 * SECTOR as u64;
/// Pages in memory, at most, unless more of them wait to be written.
const MAX_PAGES: usize = 4096;

/// A part of a bitmap, as large as a sector of the log.
struct Page {
    bytes: Rc<Vec<u8>>,
    dirty: bool,
    /// Being written: what is on the medium may be older.
    writing: bool,
}

/// Pages by their place in the file.
#[derive(Default)]
pub(super) struct Bitmaps {
    pages: RefCell<BTreeMap<u64, Page>>,
}

impl Bitmaps {
    /// The page at `place`.
    pub(super) async fn page(&self, medium: &dyn Medium, place: u64) -> Result<Rc<Vec<u8>>> {
        if let Some(page) = self.pages.borrow().get(&place) {
            return Ok(page.bytes.clone());
        }
        let buffer = IoBuf::zeroed(SECTOR);
        medium.read(place, buffer.clone()).await?;
        let mut pages = self.pages.borrow_mut();
        if pages.len() >= MAX_PAGES {
            pages.retain(|_, page| page.dirty || page.writing);
        }
        // Another task may have read and changed it meanwhile.
        let page = pages.entry(place).or_insert_with(|| Page {
            bytes: Rc::new(buffer.to_vec()),
            dirty: false,
            writing: false,
        });
        Ok(page.bytes.clone())
    }

    /// Sets or clears `count` bits from `first` on in the page at `place`.
    pub(super) async fn set(
        &self,
        medium: &dyn Medium,
        place: u64,
        (first, count): (u64, u64),
        value: bool,
    ) -> Result<()> {
        self.page(medium, place).await?;
        let mut pages = self.pages.borrow_mut();
        if let Some(page) = pages.get_mut(&place) {
            let bytes = Rc::make_mut(&mut page.bytes);
            for bit in first..first + count {
                if let Some(byte) = bytes.get_mut(bit as usize / 8) {
                    let mask = 1 << (bit % 8);
                    let new = if value { *byte | mask } else { *byte & !mask };
                    page.dirty |= new != *byte;
                    *byte = new;
                }
            }
        }
        Ok(())
    }

    /// The pages to write now.
    pub(super) fn begin(&self) -> Vec<Sector> {
        let mut pages = self.pages.borrow_mut();
        let dirty = pages.iter_mut().filter(|(_, page)| page.dirty);
        dirty
            .map(|(place, page)| {
                (page.dirty, page.writing) = (false, true);
                (*place, page.bytes.to_vec())
            })
            .collect()
    }

    /// Notes that the pages are on the medium, or are not.
    pub(super) fn end(&self, written: &[Sector], well: bool) {
        let mut pages = self.pages.borrow_mut();
        for (place, _) in written {
            if let Some(page) = pages.get_mut(place) {
                page.writing = false;
                page.dirty |= !well;
            }
        }
    }
}

/// A bit of a page.
pub(super) fn is_set(page: &[u8], bit: u64) -> bool {
    page.get(bit as usize / 8)
        .is_some_and(|byte| byte & 1 << (bit % 8) != 0)
}
