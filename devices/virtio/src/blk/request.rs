//! One request: what it says, and doing it.

use block::{BlockError, Disk, ZeroFlags};

use super::errors::status;
use super::spec::{ID_SIZE, SECTOR, Status, request};
use crate::guest_io::io_buf;
use crate::queue::{Buffers, Chain};

/// The most ranges that one discard or write-zeroes request may have.
pub(super) const MAX_RANGES: usize = 64;
/// The most sectors in one such range.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// How a request ends.
pub(super) type Outcome = Result<Status, BlockError>;

/// What requests need to know of the device.
pub(super) struct Policy {
    /// Each write goes to stable storage before it ends.
    pub(super) write_through: bool,
    /// What `GET_ID` answers.
    pub(super) id: [u8; ID_SIZE],
}

/// A request with its buffers: the header has been taken off the readable part, the status byte off the writable one.
pub(super) struct Request {
    kind: u32,
    sector: u64,
    from_guest: Buffers,
    to_guest: Buffers,
}

impl Request {
    /// Reads a chain.
    ///
    /// # Errors
    /// What the chain lacks.
    pub(super) fn parse(chain: &Chain) -> Result<Self, &'static str> {
        let header: [u8; request::HEADER] = chain
            .readable
            .array_at(0)
            .ok_or("a disk request without a whole header")?;
        let room = chain
            .writable
            .len()
            .checked_sub(1)
            .ok_or("a disk request without room for its status")?;
        let word = u128::from_le_bytes(header);
        Ok(Self {
            kind: word as u32,
            sector: (word >> 64) as u64,
            from_guest: chain.readable.part(request::HEADER, usize::MAX),
            to_guest: chain.writable.part(0, room),
        })
    }

    /// True when a failure is one of a write.
    pub(super) fn writes(&self) -> bool {
        self.kind != request::IN
    }

    /// Does it. May be done again when it has failed.
    ///
    /// # Errors
    /// The host's; what is wrong with the request itself is a status.
    pub(super) async fn run(&self, disk: &Disk, policy: &Policy) -> Outcome {
        match self.kind {
            request::IN => self.read(disk).await,
            request::OUT => self.write(disk, policy).await,
            request::FLUSH => status(disk.flush().await),
            request::GET_ID => {
                self.to_guest.write_at(0, &policy.id);
                Ok(Status::Ok)
            }
            request::DISCARD | request::WRITE_ZEROES => self.ranges(disk, policy).await,
            _ => Ok(Status::Unsupported),
        }
    }

    fn offset(&self, length: usize) -> Option<u64> {
        if !(length as u64).is_multiple_of(SECTOR) {
            return None;
        }
        self.sector.checked_mul(SECTOR)
    }

    async fn read(&self, disk: &Disk) -> Outcome {
        let Some(offset) = self.offset(self.to_guest.len()) else {
            return Ok(Status::IoError);
        };
        let result = disk.read(offset, io_buf(&self.to_guest)).await;
        self.to_guest.written(self.to_guest.len());
        status(result)
    }

    async fn write(&self, disk: &Disk, policy: &Policy) -> Outcome {
        let Some(offset) = self.offset(self.from_guest.len()) else {
            return Ok(Status::IoError);
        };
        let buffer = io_buf(&self.from_guest);
        status(disk.write(offset, buffer, policy.write_through).await)
    }

    async fn ranges(&self, disk: &Disk, policy: &Policy) -> Outcome {
        let length = self.from_guest.len();
        if length == 0
            || !length.is_multiple_of(request::RANGE)
            || length > MAX_RANGES * request::RANGE
        {
            return Ok(Status::IoError);
        }
        for bytes in self.from_guest.to_vec(length).chunks_exact(request::RANGE) {
            let mut word = [0; request::RANGE];
            word.copy_from_slice(bytes);
            let word = u128::from_le_bytes(word);
            let (sector, count, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
            let done = self.range(disk, policy, (sector, count, flags)).await?;
            if done != Status::Ok {
                return Ok(done);
            }
        }
        Ok(Status::Ok)
    }

    async fn range(
        &self,
        disk: &Disk,
        policy: &Policy,
        (sector, count, flags): (u64, u32, u32),
    ) -> Outcome {
        let zeroes = self.kind == request::WRITE_ZEROES;
        let known = if zeroes { request::UNMAP } else { 0 };
        if flags & !known != 0 {
            return Ok(Status::Unsupported);
        }
        let Some(offset) = sector.checked_mul(SECTOR) else {
            return Ok(Status::IoError);
        };
        if count > MAX_RANGE_SECTORS {
            return Ok(Status::IoError);
        }
        let length = u64::from(count) * SECTOR;
        if !zeroes {
            return status(disk.discard(offset, length).await);
        }
        let how = if flags & request::UNMAP != 0 {
            ZeroFlags::MAY_UNMAP
        } else {
            ZeroFlags::empty()
        };
        status(
            disk.write_zeroes(offset, length, how, policy.write_through)
                .await,
        )
    }
}
