//! Changes of metadata, made so that a power cut leaves all of them or none.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{IoBuf, Medium, Result};

use super::header::{HEADERS, Header};
use super::log::{Change, EntryHead, SECTOR, encode_entry};
use crate::identity::random_uuid;

/// Sectors of an entry, so that two entries fit into the smallest log.
const MAX_CHANGES: usize = 120;

/// The headers and the log of an open image.
pub(super) struct Journal {
    medium: Rc<dyn Medium>,
    header: RefCell<Header>,
    /// Which of the two headers is the current one.
    current: Cell<usize>,
    /// The identity of this session's log.
    id: [u8; 16],
    next_place: Cell<u64>,
    sequence: Cell<u64>,
    /// The identities of content that has been changed are new ones.
    marked: Cell<bool>,
}

/// A sector of metadata: its place in the file, and what is to stand there.
pub(super) type Sector = (u64, Vec<u8>);

impl Journal {
    pub(super) fn new(medium: Rc<dyn Medium>, header: Header, current: usize) -> Self {
        Self {
            medium,
            header: RefCell::new(header),
            current: Cell::new(current),
            id: random_uuid(true),
            next_place: Cell::new(0),
            sequence: Cell::new(1),
            marked: Cell::new(false),
        }
    }

    pub(super) fn header(&self) -> Header {
        self.header.borrow().clone()
    }

    /// Writes the header that is not the current one, which makes it that.
    pub(super) async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut header = self.header();
        change(&mut header);
        header.sequence = header.sequence.wrapping_add(1);
        let other = 1 - self.current.get();
        let bytes = IoBuf::from_slice(&header.encode());
        self.medium.write(HEADERS[other], bytes).await?;
        self.medium.flush().await?;
        self.current.set(other);
        *self.header.borrow_mut() = header;
        Ok(())
    }

    pub(super) fn is_marked(&self) -> bool {
        self.marked.get()
    }

    /// Notes in the file that its content is not what it was ([MS-VHDX] 2.2.2), once.
    pub(super) async fn mark(&self) -> Result<()> {
        if self.marked.get() {
            return Ok(());
        }
        self.update_header(|h| {
            h.file_write = random_uuid(true);
            h.data_write = random_uuid(true);
        })
        .await?;
        self.marked.set(true);
        Ok(())
    }

    /// Writes sectors by way of the log; what they refer to is on stable storage already. They are
    /// there when this returns; in between, either all of at most 120 of them are, or none is.
    pub(super) async fn commit(&self, sectors: &[Sector]) -> Result<()> {
        for part in sectors.chunks(MAX_CHANGES) {
            self.write_entry(part).await?;
            self.medium.flush().await?;
            if self.header.borrow().log != self.id {
                self.update_header(|h| {
                    h.log = self.id;
                    h.log_version = 0;
                })
                .await?;
            }
            for (offset, bytes) in part {
                self.medium.write(*offset, IoBuf::from_slice(bytes)).await?;
            }
            // Before the next entry makes this one void.
            self.medium.flush().await?;
        }
        Ok(())
    }

    async fn write_entry(&self, part: &[Sector]) -> Result<()> {
        let header = self.header();
        let (log, length) = (header.log_offset, u64::from(header.log_length));
        let place = self.next_place.get();
        let head = EntryHead {
            id: self.id,
            sequence: self.sequence.get(),
            // An entry by itself: what was before is in its place.
            tail: place as u32,
            file_length: self.medium.len(),
        };
        let changes: Vec<Change> = part
            .iter()
            .map(|(offset, bytes)| Change::Data {
                offset: *offset,
                bytes: bytes.clone(),
            })
            .collect();
        let entry = encode_entry(&head, &changes);
        let first = (length - place).min(entry.len() as u64) as usize;
        let (left, right) = entry.split_at(first);
        self.medium
            .write(log + place, IoBuf::from_slice(left))
            .await?;
        if !right.is_empty() {
            self.medium.write(log, IoBuf::from_slice(right)).await?;
        }
        self.next_place.set((place + entry.len() as u64) % length);
        self.sequence.set(head.sequence + 1);
        Ok(())
    }

    /// Says that there is nothing to replay.
    pub(super) async fn close(&self) -> Result<()> {
        if self.header.borrow().log == [0; 16] {
            return Ok(());
        }
        self.update_header(|h| h.log = [0; 16]).await
    }
}

/// The whole sectors of the file around `bytes` at `offset`, with these bytes in them.
pub(super) async fn patched(medium: &dyn Medium, offset: u64, bytes: &[u8]) -> Result<Vec<Sector>> {
    let sector = SECTOR as u64;
    let start = offset / sector * sector;
    let end = (offset + bytes.len() as u64).next_multiple_of(sector);
    let buffer = IoBuf::zeroed((end - start) as usize);
    medium.read(start, buffer.clone()).await?;
    buffer.copy_from_at((offset - start) as usize, bytes);
    let whole = buffer.to_vec();
    let sectors = whole.chunks_exact(SECTOR).enumerate();
    Ok(sectors
        .map(|(n, s)| (start + n as u64 * sector, s.to_vec()))
        .collect())
}
