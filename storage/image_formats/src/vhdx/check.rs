//! Checking: every block in the file, none twice, none over the metadata.

use std::collections::BTreeMap;

use block::Result;

use super::Vhdx;
use super::header::{MIB, State};
use crate::qcow2::{CheckReport, Repair};

/// Something that has a place in the file.
#[derive(Clone, Copy)]
enum Owner {
    Metadata(&'static str),
    Block(u64),
    Bitmap(u64),
}

impl Owner {
    fn describe(self) -> String {
        match self {
            Self::Metadata(what) => what.to_owned(),
            Self::Block(n) => format!("block {n}"),
            Self::Bitmap(n) => format!("the sector bitmap of chunk {n}"),
        }
    }
}

impl Vhdx {
    /// Checks the table. A log that was left has been replayed when the image was opened; that
    /// counts as a repair.
    pub(super) async fn check_disk(&self, repair: Repair) -> Result<Option<CheckReport>> {
        let mut report = CheckReport::default();
        if self.log_was_dirty {
            if self.medium.read_only() {
                let hint = "The log holds changes that are not in their places yet ('check -r all' makes them)";
                report.say(hint.to_owned());
            } else {
                report.corruptions_fixed += 1;
                report.say("Repairing: the log has been replayed".to_owned());
            }
        }
        let mut places: BTreeMap<u64, (u64, Owner)> = BTreeMap::new();
        self.claim_metadata(&mut places, &mut report);
        self.claim_blocks(&mut places, &mut report);
        let mut last: Option<(u64, Owner)> = None;
        for (place, (length, owner)) in &places {
            if let Some((end, other)) = last
                && end > *place
            {
                let (a, b) = (other.describe(), owner.describe());
                report.corruption(format!("{b} at {place} overlaps {a}"));
            }
            let end = place + length;
            if last.is_none_or(|(known, _)| known < end) {
                last = Some((end, *owner));
            }
        }
        report.total_clusters = self.size().div_ceil(self.block_size());
        report.image_end_offset = self.end.get();
        if repair != Repair::None {
            self.sync().await?;
        }
        Ok(Some(report))
    }

    fn claim_metadata(&self, places: &mut BTreeMap<u64, (u64, Owner)>, report: &mut CheckReport) {
        let mut claim = |place: u64, length: u64, what| {
            claim(places, report, place, length, Owner::Metadata(what));
        };
        claim(0, MIB, "the header");
        let header = self.journal.header();
        if header.log_length > 0 {
            claim(header.log_offset, u64::from(header.log_length), "the log");
        }
        for region in self.regions.borrow().iter() {
            claim(region.offset, u64::from(region.length), "a region");
        }
    }

    fn claim_blocks(&self, places: &mut BTreeMap<u64, (u64, Owner)>, report: &mut CheckReport) {
        let metadata = self.metadata.borrow();
        let ratio = metadata.chunk_ratio();
        let file = self.medium.len();
        for (n, entry) in self.table.entries().into_iter().enumerate() {
            let (chunk, index) = (n as u64 / (ratio + 1), n as u64 % (ratio + 1));
            let is_bitmap = index == ratio;
            let (length, owner) = if is_bitmap {
                (MIB, Owner::Bitmap(chunk))
            } else {
                (metadata.block_size, Owner::Block(chunk * ratio + index))
            };
            let what = || owner.describe();
            let place = match State::of(entry) {
                None => {
                    let state = entry & 7;
                    report.corruption(format!("{} is in the unknown state {state}", what()));
                    continue;
                }
                Some(State::Full(place)) => place,
                Some(State::Partial(place)) if !is_bitmap => {
                    if !metadata.has_parent {
                        let text = "is partly present, but there is no parent";
                        report.corruption(format!("{} {text}", what()));
                    } else if self.bitmap_block(chunk * ratio).is_none() {
                        report.corruption(format!("{} has no sector bitmap", what()));
                    }
                    place
                }
                Some(_) => continue,
            };
            if is_bitmap && !metadata.has_parent {
                report.corruption(format!("{} is there without a parent", what()));
            }
            if !is_bitmap {
                report.allocated_clusters += 1;
            }
            // A file may end inside its last block.
            if place >= file {
                report.corruption(format!("{} lies at {place}, past the end", what()));
            }
            claim(places, report, place, length, owner);
        }
    }
}

fn claim(
    places: &mut BTreeMap<u64, (u64, Owner)>,
    report: &mut CheckReport,
    place: u64,
    length: u64,
    owner: Owner,
) {
    if let Some((_, other)) = places.insert(place, (length, owner)) {
        let (a, b) = (other.describe(), owner.describe());
        report.corruption(format!("{a} and {b} both lie at {place}"));
    }
}
