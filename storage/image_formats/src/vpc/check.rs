//! Checking: every block in the file, none twice, and the footer at both ends.

use std::collections::HashMap;

use block::Result;

use super::Vpc;
use super::header::{DiskType, UNUSED};
use crate::qcow2::{CheckReport, Repair};

impl Vpc {
    /// Checks the table and the footer behind the last block.
    pub(super) async fn check_disk(&self, repair: Repair) -> Result<Option<CheckReport>> {
        let mut report = CheckReport::default();
        if self.disk_type() == DiskType::Fixed {
            report.image_end_offset = self.medium.len();
            return Ok(Some(report));
        }
        let (block_size, bitmap_size) = self.sizes();
        let total = block_size + bitmap_size;
        report.total_clusters = self.size().div_ceil(block_size);
        let metadata_end = self.metadata_end();
        let mut owners: HashMap<u64, usize> = HashMap::new();
        let mut starts = Vec::new();
        for (number, entry) in self.table.entries().into_iter().enumerate() {
            if entry == u64::from(UNUSED) {
                continue;
            }
            let place = entry * 512;
            report.allocated_clusters += 1;
            if place < metadata_end || place + bitmap_size > self.medium.len() {
                report.corruption(format!(
                    "block {number} lies at {place}, outside the blocks"
                ));
            }
            if let Some(other) = owners.insert(place, number) {
                report.corruption(format!("blocks {other} and {number} both lie at {place}"));
            } else {
                starts.push(place);
            }
        }
        starts.sort_unstable();
        for pair in starts.windows(2).filter(|pair| pair[1] - pair[0] < total) {
            report.corruption(format!("the blocks at {} and {} overlap", pair[0], pair[1]));
        }
        report.image_end_offset = self.end.get();
        if self.footer_missing.get() {
            let text = "the footer behind the last block is missing".to_owned();
            if repair == Repair::None {
                report.leaks += 1;
                report.say(format!("Leaked: {text}"));
            } else {
                self.sync().await?;
                self.medium.set_len(self.end.get() + 512).await?;
                report.leaks_fixed += 1;
                report.say(format!("Repairing: {text}"));
            }
        }
        Ok(Some(report))
    }

    /// Where blocks may begin: behind the headers; the table may have been moved behind blocks.
    fn metadata_end(&self) -> u64 {
        let data_offset = self.footer.borrow().data_offset;
        data_offset + super::HEADER_SIZE as u64
    }
}
