//! Checking: every block in the file, none twice, and as many as the header counts.

use std::collections::HashMap;

use block::Result;

use super::Vdi;
use super::header::DISCARDED;
use crate::qcow2::{CheckReport, Repair};

impl Vdi {
    /// Checks the map and the header's count.
    pub(super) async fn check_disk(&self, repair: Repair) -> Result<Option<CheckReport>> {
        self.sync().await?;
        let mut report = CheckReport {
            total_clusters: self.header.size.div_ceil(self.header.block_size),
            ..CheckReport::default()
        };
        let mut owners: HashMap<u64, usize> = HashMap::new();
        let mut end = 0;
        let mut last = None;
        for (number, entry) in self.map.entries().into_iter().enumerate() {
            if entry >= DISCARDED {
                continue;
            }
            report.allocated_clusters += 1;
            report.fragmented_clusters += u64::from(last.is_some_and(|l| l + 1 != entry));
            last = Some(entry);
            if entry >= self.counted.get() || self.place(entry) >= self.medium.len() {
                report.corruption(format!("block {number} lies at {entry}, past the last one"));
            } else if let Some(other) = owners.insert(entry, number) {
                report.corruption(format!("blocks {other} and {number} both lie at {entry}"));
            }
            end = end.max(entry + 1);
        }
        report.image_end_offset = self.place(end);
        let unused = self.counted.get().saturating_sub(owners.len() as u64);
        if report.corruptions > 0 || unused == 0 {
            return Ok(Some(report));
        }
        let text = format!("{unused} blocks are in the file, but not in the map");
        let fixable = self.counted.get().saturating_sub(end);
        if repair == Repair::None || fixable == 0 || self.medium.read_only() {
            report.leaks += unused;
            report.say(format!("Leaked: {text}"));
            return Ok(Some(report));
        }
        self.write_count(end).await?;
        self.medium.set_len(self.place(end)).await?;
        self.next.set(end);
        report.leaks_fixed += fixable;
        report.leaks += unused - fixable;
        report.say(format!("Repairing: {text}"));
        Ok(Some(report))
    }
}
