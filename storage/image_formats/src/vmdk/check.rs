//! Checking: every grain in the file, none twice, and both copies of the tables the same.

use std::collections::HashMap;

use block::Result;

use super::Vmdk;
use super::sparse::{Grain, Sparse};
use crate::qcow2::{CheckReport, Repair};

impl Vmdk {
    /// Checks the tables of all sparse extents; copies that differ are written anew.
    pub(super) async fn check_disk(&self, repair: Repair) -> Result<Option<CheckReport>> {
        let mut report = CheckReport::default();
        for sparse in self.sparse_parts() {
            check_extent(sparse, &mut report).await?;
            let differing = sparse.differing_copies().await?;
            for number in differing {
                let what = format!("the copy of grain table {number} differs");
                if repair == Repair::None {
                    report.leaks += 1;
                    report.say(format!("Leaked: {what}"));
                } else if sparse.repair_copy(number).await? {
                    report.leaks_fixed += 1;
                    report.say(format!("Repairing: {what}"));
                } else {
                    report.corruption(what);
                }
            }
        }
        report.image_end_offset = self.medium.len();
        Ok(Some(report))
    }
}

async fn check_extent(sparse: &Sparse, report: &mut CheckReport) -> Result<()> {
    let file = sparse.medium.len();
    let header = &sparse.header;
    let total = header.capacity.div_ceil(header.grain);
    report.total_clusters += total;
    let mut owners: HashMap<u64, u64> = HashMap::new();
    let mut tables = Vec::new();
    let mut last = 0;
    sparse
        .each_grain(
            |number, grain| {
                let place = match grain {
                    Ok(Grain::At(place)) if number < total => place,
                    Ok(_) => return,
                    Err(error) => return report.corruption(error.one_line()),
                };
                report.allocated_clusters += 1;
                report.compressed_clusters += u64::from(header.compressed);
                if number > 0 && place != last + header.grain && !header.compressed {
                    report.fragmented_clusters += u64::from(last != 0);
                }
                last = place;
                if place >= file || place < header.data.min(512) {
                    report.corruption(format!("grain {number} lies at {place}, past the end"));
                } else if let Some(other) = owners.insert(place, number) {
                    report.corruption(format!("grains {other} and {number} both lie at {place}"));
                }
            },
            |number, place| tables.push((number, place)),
        )
        .await?;
    for (number, place) in tables {
        report.corruption(format!(
            "grain table {number} at {place} is another's, or past the end of the file"
        ));
    }
    Ok(())
}
