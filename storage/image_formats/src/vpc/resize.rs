//! Changing the size.

use block::{BlockError, IoBuf, Result, ZeroFlags};

use super::header::{DiskType, DynamicHeader, FOOTER_SIZE, Footer, UNUSED};
use super::{Vpc, end_of_blocks};

impl Vpc {
    /// Changes the disk's size. Where the geometry counts, the disk may become a little larger.
    pub(super) async fn resize_to(&self, size: u64) -> Result<()> {
        // Nobody takes a block where the file is cut off.
        let _held = self.locks.lock(0, u64::MAX).await;
        let old = self.size();
        let mut footer = self.footer.borrow().clone();
        let force = footer.size_counts();
        let new = footer.set_size(size, force)?;
        if self.disk_type() == DiskType::Fixed {
            return self.resize_fixed(footer, old, new).await;
        }
        self.sync().await?;
        if new > old {
            self.grow_table(new).await?;
            self.set_footer(footer).await
        } else {
            self.set_footer(footer).await?;
            self.forget_beyond(new).await
        }
    }

    async fn resize_fixed(&self, footer: Footer, old: u64, new: u64) -> Result<()> {
        let bytes = IoBuf::from_slice(&footer.encode());
        // The new footer is there before the old one goes.
        self.medium
            .set_len(self.medium.len().max(new + 512))
            .await?;
        self.medium.write(new, bytes).await?;
        if new > old {
            self.medium.flush().await?;
            let flags = ZeroFlags::MAY_UNMAP;
            let stale = (new - old).min(FOOTER_SIZE as u64);
            self.medium.write_zeroes(old, stale, flags).await?;
        }
        self.medium.set_len(new + FOOTER_SIZE as u64).await?;
        self.medium.flush().await?;
        *self.footer.borrow_mut() = footer;
        Ok(())
    }

    /// Writes both copies of the footer.
    async fn set_footer(&self, footer: Footer) -> Result<()> {
        let bytes = footer.encode();
        *self.footer.borrow_mut() = footer;
        self.medium.write(0, IoBuf::from_slice(&bytes)).await?;
        self.medium.flush().await?;
        self.medium
            .write(self.end.get(), IoBuf::from_slice(&bytes))
            .await?;
        self.footer_missing.set(false);
        self.medium.flush().await
    }

    /// Makes room in the table for a larger disk; it moves behind the last block if need be.
    async fn grow_table(&self, size: u64) -> Result<()> {
        let (block_size, _) = self.sizes();
        let wanted = size.div_ceil(block_size);
        if wanted as usize <= self.table.len() {
            return Ok(());
        }
        let Some(mut header) = self.header.borrow().clone() else {
            return Ok(());
        };
        let too_large = || BlockError::invalid_argument("the disk is too large");
        header.entries = u32::try_from(wanted).map_err(|_| too_large())?;
        header.table_offset = self.end.get();
        let mut entries = self.table.entries();
        entries.resize(wanted as usize, u64::from(UNUSED));
        let mut bytes: Vec<u8> = entries
            .iter()
            .flat_map(|e| (*e as u32).to_be_bytes())
            .collect();
        bytes.resize(bytes.len().next_multiple_of(512), 0xff);
        let end = header.table_offset + bytes.len() as u64;
        self.medium
            .write(header.table_offset, IoBuf::from_slice(&bytes))
            .await?;
        let footer = self.footer.borrow().encode();
        self.medium.write(end, IoBuf::from_slice(&footer)).await?;
        self.medium.flush().await?;
        self.write_header(&header).await?;
        self.table.resize(wanted as usize, u64::from(UNUSED));
        self.table.moved(header.table_offset);
        self.end.set(end);
        *self.header.borrow_mut() = Some(header);
        Ok(())
    }

    /// Everything that changes is in the header's first sector, so the power cannot fail in between.
    async fn write_header(&self, header: &DynamicHeader) -> Result<()> {
        let place = self.footer.borrow().data_offset;
        let bytes = header.encode();
        self.medium
            .write(place, IoBuf::from_slice(&bytes[..512]))
            .await?;
        self.medium.flush().await
    }

    /// What lies beyond the end must read as zeroes if the disk grows again.
    async fn forget_beyond(&self, size: u64) -> Result<()> {
        let (block_size, bitmap_size) = self.sizes();
        let within = size % block_size;
        let last = size / block_size;
        if within > 0
            && let Some(place) = self.block_place(last)
        {
            let at = place + bitmap_size + within;
            let flags = ZeroFlags::MAY_UNMAP;
            self.medium
                .write_zeroes(at, block_size - within, flags)
                .await?;
        }
        for block in size.div_ceil(block_size) as usize..self.table.len() {
            if self.block_place(block as u64).is_some() {
                self.table.set(block, u64::from(UNUSED));
                self.bitmaps.borrow_mut().remove(&(block as u64));
            }
        }
        self.sync().await?;
        self.shorten().await
    }

    /// Moves the footer up to the last block that is left, and ends the file there.
    async fn shorten(&self) -> Result<()> {
        let end = {
            let (header, footer) = (self.header.borrow(), self.footer.borrow());
            let Some(header) = header.as_ref() else {
                return Ok(());
            };
            end_of_blocks(&self.table, header, &footer)
        };
        if end >= self.end.get() {
            return Ok(());
        }
        self.end.set(end);
        self.footer_missing.set(true);
        self.sync().await?;
        self.medium.set_len(end + FOOTER_SIZE as u64).await?;
        self.medium.flush().await
    }
}
