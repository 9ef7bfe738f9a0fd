//! Limits on how fast a disk is used: bytes and operations in a second, reads, writes and both together, with bursts.
//!
//! Names and rules are those of QEMU's `throttling.*` options (`docs/throttle.txt` there). Each limit is a bucket that leaks at the
//! average rate. A request may begin while the bucket is not over its capacity, and is then poured in whole, so requests larger
//! than the capacity pass too, and pay for it afterwards. The capacity is a tenth of a second's average; with a burst it is what the
//! burst holds, and bursts of more than a second can't be faster than their own rate.
//!
//! A bucket is kept as the time at which it will be empty (the generic cell rate algorithm): a request knows at once when it may
//! begin, in the order of arrival, whichever of a group's disks, on whichever thread, it is for.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{Result, executor};

const SECOND: u64 = 1_000_000_000;
/// How long a request sleeps before it looks whether limits have changed.
const SLICE: u64 = SECOND / 20;
/// The largest rate that is taken, as in QEMU.
const MAX_RATE: u64 = 1_000_000_000_000_000;

/// A limit; all zeroes: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Rate {
    /// What is allowed in a second, in the long run.
    pub average: u64,
    /// What is allowed in a second of a burst; 0: no bursts.
    pub max: u64,
    /// How many seconds a burst may last; 0 counts as 1.
    pub max_length: u64,
}

impl Rate {
    /// The time, in nanoseconds, that `units` take at `rate`.
    fn time(units: u128, rate: u64) -> u64 {
        let nanoseconds = units.saturating_mul(u128::from(SECOND)) / u128::from(rate.max(1));
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    /// How far behind the average's bucket may be.
    fn tolerance(&self) -> u64 {
        if self.max == 0 {
            return SECOND / 10;
        }
        let held = u128::from(self.max) * u128::from(self.max_length.max(1));
        Self::time(held, self.average)
    }

    fn check(&self, name: &str) -> std::result::Result<(), String> {
        if self.average > MAX_RATE || self.max > MAX_RATE {
            return Err(format!("{name}: expected 0 to {MAX_RATE}"));
        }
        if self.max != 0 && self.average == 0 {
            return Err(format!("{name}-max: wants {name} too"));
        }
        if self.max != 0 && self.max < self.average {
            return Err(format!("{name}-max: expected no less than {name}"));
        }
        if self.max_length > 1 && self.max == 0 {
            return Err(format!("{name}-max-length: wants {name}-max too"));
        }
        // As QEMU has it: what a burst holds must be a number that it can count.
        if self
            .max
            .checked_mul(self.max_length)
            .is_none_or(|held| held > MAX_RATE)
        {
            return Err(format!(
                "{name}-max-length: expected a burst of at most {MAX_RATE} in all"
            ));
        }
        Ok(())
    }
}

/// All limits of a disk or of a group of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ThrottleLimits {
    /// Bytes read and written.
    pub bps_total: Rate,
    /// Bytes read.
    pub bps_read: Rate,
    /// Bytes written.
    pub bps_write: Rate,
    /// Operations of both kinds.
    pub iops_total: Rate,
    /// Reads.
    pub iops_read: Rate,
    /// Writes.
    pub iops_write: Rate,
    /// Bytes that count as one operation, so that larger requests count as several; 0: a request is one.
    pub iops_size: u64,
}

impl ThrottleLimits {
    /// The limits with QEMU's names for them.
    pub fn named(&mut self) -> [(&'static str, &mut Rate); 6] {
        [
            ("bps-total", &mut self.bps_total),
            ("bps-read", &mut self.bps_read),
            ("bps-write", &mut self.bps_write),
            ("iops-total", &mut self.iops_total),
            ("iops-read", &mut self.iops_read),
            ("iops-write", &mut self.iops_write),
        ]
    }

    /// True when nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        let mut copy = *self;
        copy.named().iter().all(|(_, rate)| rate.average == 0)
    }

    /// Looks whether the limits make sense.
    ///
    /// # Errors
    /// A line that names the limit and what was expected.
    pub fn check(&self) -> std::result::Result<(), String> {
        let mut copy = *self;
        for (name, rate) in copy.named() {
            rate.check(name)?;
        }
        let conflict = |total: Rate, read: Rate, write: Rate| {
            (total.average != 0 && (read.average != 0 || write.average != 0))
                || (total.max != 0 && (read.max != 0 || write.max != 0))
        };
        if conflict(self.bps_total, self.bps_read, self.bps_write)
            || conflict(self.iops_total, self.iops_read, self.iops_write)
        {
            return Err(
                "bps-total and iops-total: expected without the same limit of reads or writes"
                    .into(),
            );
        }
        if self.iops_size != 0
            && [self.iops_total, self.iops_read, self.iops_write]
                .iter()
                .all(|rate| rate.average == 0)
        {
            return Err("iops-size: wants a limit of operations too".into());
        }
        Ok(())
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// It reads.
    Read,
    /// It writes, data or zeroes.
    Write,
}

/// A limit's bucket.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    /// When it is empty at the average rate.
    empty_at: u64,
    /// The same at the rate of a burst.
    burst_empty_at: u64,
}

impl Bucket {
    /// When a request may begin.
    fn opens(&self, rate: &Rate) -> u64 {
        let average = self.empty_at.saturating_sub(rate.tolerance());
        let burst = self.burst_empty_at.saturating_sub(SECOND / 10);
        if rate.max_length > 1 {
            average.max(burst)
        } else {
            average
        }
    }

    fn pour(&mut self, rate: &Rate, at: u64, time: impl Fn(u64) -> u64) {
        self.empty_at = self.empty_at.max(at).saturating_add(time(rate.average));
        if rate.max != 0 {
            self.burst_empty_at = self.burst_empty_at.max(at).saturating_add(time(rate.max));
        }
    }
}

/// The state of a group.
#[derive(Default)]
struct Buckets {
    limits: ThrottleLimits,
    /// In the order of [`ThrottleLimits::named`].
    buckets: [Bucket; 6],
}

impl Buckets {
    /// Takes a request in that comes at `now`; returns when it may begin.
    fn reserve(&mut self, now: u64, direction: Direction, bytes: u64) -> u64 {
        // In parts of an operation, `size` of which are a whole one.
        let size = self.limits.iops_size.max(1);
        let parts = if self.limits.iops_size == 0 {
            1
        } else {
            bytes.max(size)
        };
        let skipped = match direction {
            Direction::Read => 2,
            Direction::Write => 1,
        };
        let rates = self.limits.named().map(|(_, rate)| *rate);
        let applies = |n: usize| rates[n].average != 0 && n % 3 != skipped;
        let mut start = now;
        for n in (0..6).filter(|n| applies(*n)) {
            start = start.max(self.buckets[n].opens(&rates[n]));
        }
        for n in (0..6).filter(|n| applies(*n)) {
            let time = |rate: u64| {
                if n < 3 {
                    Rate::time(u128::from(bytes), rate)
                } else {
                    Rate::time(u128::from(parts), rate) / size
                }
            };
            self.buckets[n].pour(&rates[n], start, time);
        }
        start
    }
}

/// Disks that share limits; a disk with limits of its own is a group of one.
pub struct ThrottleGroup {
    name: String,
    start: Instant,
    buckets: Mutex<Buckets>,
    unlimited: AtomicBool,
    /// Counts changes of the limits.
    changes: AtomicU64,
}

impl ThrottleGroup {
    /// A group with these limits.
    pub fn new(name: impl Into<String>, limits: ThrottleLimits) -> Self {
        Self {
            name: name.into(),
            start: Instant::now(),
            unlimited: AtomicBool::new(limits.is_unlimited()),
            buckets: Mutex::new(Buckets {
                limits,
                ..Buckets::default()
            }),
            changes: AtomicU64::new(0),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limits in force.
    pub fn limits(&self) -> ThrottleLimits {
        self.buckets.lock().limits
    }

    /// Puts other limits in force, also for requests that wait.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let mut buckets = self.buckets.lock();
        *buckets = Buckets {
            limits,
            ..Buckets::default()
        };
        self.unlimited
            .store(limits.is_unlimited(), Ordering::Release);
        self.changes.fetch_add(1, Ordering::Release);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Waits until a request may begin, or `hurry` is set.
    ///
    /// # Errors
    /// When the host has no timer.
    pub async fn admit(&self, direction: Direction, bytes: u64, hurry: &Cell<bool>) -> Result<()> {
        while !self.unlimited.load(Ordering::Acquire) {
            let changes = self.changes.load(Ordering::Acquire);
            let start = self.buckets.lock().reserve(self.now(), direction, bytes);
            while self.changes.load(Ordering::Acquire) == changes {
                let left = start.saturating_sub(self.now());
                if left == 0 || hurry.get() {
                    return Ok(());
                }
                executor::sleep(Duration::from_nanos(left.min(SLICE))).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::{Disk, DiskOptions, IoBuf, MemoryMedium, RawBackend, ZeroFlags};

    const fn rate(average: u64, max: u64, max_length: u64) -> Rate {
        Rate {
            average,
            max,
            max_length,
        }
    }

    fn buckets(limits: ThrottleLimits) -> Buckets {
        limits.check().unwrap();
        Buckets {
            limits,
            ..Buckets::default()
        }
    }

    /// When each of many requests begins that come at once.
    fn starts(limits: ThrottleLimits, count: usize, direction: Direction, bytes: u64) -> Vec<u64> {
        let mut buckets = buckets(limits);
        let ms = |_| buckets.reserve(0, direction, bytes) / (SECOND / 1000);
        (0..count).map(ms).collect()
    }

    #[test]
    fn operations_come_at_their_rate() {
        let limits = ThrottleLimits {
            iops_total: rate(10, 0, 0),
            ..ThrottleLimits::default()
        };
        // A tenth of a second's operations, and one that fills the bucket over.
        let wanted = [0, 0, 100, 200, 300];
        assert_eq!(starts(limits, 5, Direction::Read, 4096), wanted);
        let sized = ThrottleLimits {
            iops_size: 1024,
            ..limits
        };
        assert_eq!(starts(sized, 3, Direction::Write, 4096), [0, 300, 700]);
        assert_eq!(starts(sized, 3, Direction::Write, 100), [0, 0, 100]);
    }

    #[test]
    fn bytes_of_one_direction_do_not_count_for_the_other() {
        let limits = ThrottleLimits {
            bps_read: rate(1 << 20, 0, 0),
            ..ThrottleLimits::default()
        };
        assert_eq!(starts(limits, 3, Direction::Read, 1 << 20), [0, 900, 1900]);
        assert_eq!(starts(limits, 3, Direction::Write, 1 << 20), [0, 0, 0]);
        let mut both = buckets(ThrottleLimits {
            bps_total: rate(1 << 20, 0, 0),
            ..ThrottleLimits::default()
        });
        both.reserve(0, Direction::Read, 1 << 20);
        assert_eq!(both.reserve(0, Direction::Write, 1), 900_000_000);
    }

    #[test]
    fn a_burst_lasts_as_long_as_it_may() {
        // 100 in a second for 2 seconds, behind which 10 in a second remain.
        let limits = ThrottleLimits {
            iops_write: rate(10, 100, 2),
            ..ThrottleLimits::default()
        };
        let starts = starts(limits, 300, Direction::Write, 512);
        let by = |ms: u64| starts.iter().filter(|start| **start < ms).count();
        assert!((105..=115).contains(&by(1000)), "{}", by(1000));
        assert!((205..=235).contains(&by(2000)), "{}", by(2000));
        assert!((8..=12).contains(&(by(7000) - by(6000))));
    }

    #[test]
    fn limits_that_make_no_sense_are_refused() {
        let why = |change: fn(&mut ThrottleLimits)| {
            let mut limits = ThrottleLimits::default();
            change(&mut limits);
            limits.check().unwrap_err()
        };
        assert!(why(|l| l.bps_read = rate(MAX_RATE + 1, 0, 0)).starts_with("bps-read: expected"));
        assert!(why(|l| l.bps_read = rate(0, 5, 0)).contains("wants bps-read"));
        assert!(why(|l| l.iops_write = rate(5, 4, 0)).contains("no less"));
        assert!(why(|l| l.iops_write = rate(5, 0, 4)).contains("wants iops-write-max"));
        assert!(why(|l| l.iops_write = rate(5, 10, u64::MAX)).contains("at most"));
        assert!(why(|l| l.iops_size = 5).contains("iops-size"));
        assert!(
            why(|l| (l.bps_total, l.bps_read) = (rate(5, 0, 0), rate(5, 0, 0))).contains("without")
        );
    }

    fn disk(group: &Arc<ThrottleGroup>) -> Disk {
        let medium = Rc::new(MemoryMedium::new(1 << 20));
        let backend = executor::block_on(RawBackend::open(medium))
            .unwrap()
            .unwrap();
        Disk::throttled(Rc::new(backend), DiskOptions::default(), group.clone())
    }

    #[test]
    fn disks_of_a_group_share_its_limits() {
        let limits = ThrottleLimits {
            iops_total: rate(5, 0, 0),
            ..ThrottleLimits::default()
        };
        let group = Arc::new(ThrottleGroup::new("both", limits));
        let (a, b) = (disk(&group), disk(&group));
        let start = Instant::now();
        executor::block_on(async {
            a.read(0, IoBuf::zeroed(512)).await.unwrap();
            b.write(0, IoBuf::zeroed(512), false).await.unwrap();
            a.write_zeroes(0, 512, ZeroFlags::empty(), false)
                .await
                .unwrap();
            b.flush().await.unwrap();
            b.read(0, IoBuf::zeroed(512)).await.unwrap();
        })
        .unwrap();
        assert!(
            start.elapsed() >= Duration::from_millis(490),
            "{:?}",
            start.elapsed()
        );
    }

    /// The third request would begin in more than a quarter of an hour.
    #[test]
    fn who_waits_hears_of_other_limits_and_of_hurry() {
        let limits = ThrottleLimits {
            bps_write: rate(1, 0, 0),
            ..ThrottleLimits::default()
        };
        for end in [
            (|_, group| group.set_limits(ThrottleLimits::default())) as fn(&Disk, &ThrottleGroup),
            |disk, _| disk.set_hurry(true),
        ] {
            let group = Arc::new(ThrottleGroup::new("slow", limits));
            let disk = Rc::new(disk(&group));
            executor::block_on(async {
                let writer = disk.clone();
                let writes = executor::spawn_local(async move {
                    for _ in 0..3 {
                        writer.write(0, IoBuf::zeroed(512), false).await.unwrap();
                    }
                });
                while disk.statistics().writes.done < 1 {
                    executor::sleep(Duration::from_millis(1)).await.unwrap();
                }
                executor::sleep(Duration::from_millis(20)).await.unwrap();
                assert_eq!(disk.statistics().writes.done, 1);
                end(&disk, &group);
                writes.await;
                assert_eq!(disk.statistics().writes.done, 3);
            })
            .unwrap();
        }
    }

    proptest! {
        /// In every stretch of time no more begins than the bucket holds, what leaks meanwhile, and one request.
        #[test]
        fn never_faster_than_allowed(
            average in 1u64..10_000,
            burst in 0u64..20_000,
            length in 1u64..5,
            requests in prop::collection::vec((0u64..50_000_000, 1u64..5_000, any::<bool>()), 1..200),
        ) {
            let max = if burst < average { 0 } else { burst };
            let max_length = if max == 0 { 0 } else { length };
            let limit = rate(average, max, max_length);
            let mut buckets = buckets(ThrottleLimits { bps_total: limit, ..ThrottleLimits::default() });
            let (mut now, mut begun) = (0, Vec::new());
            for (pause, bytes, write) in requests {
                now += pause;
                let direction = if write { Direction::Write } else { Direction::Read };
                let start = buckets.reserve(now, direction, bytes);
                prop_assert!(start >= now);
                prop_assert!(begun.last().is_none_or(|(last, _)| start >= *last));
                begun.push((start, bytes));
            }
            let capacity = if max == 0 { average as f64 / 10.0 } else { (max * max_length) as f64 };
            for (n, (first, _)) in begun.iter().enumerate() {
                let mut sum = 0;
                for (at, bytes) in &begun[n..] {
                    let leaked = average as f64 * (at - first) as f64 / SECOND as f64;
                    prop_assert!(sum as f64 <= capacity + leaked + 1.0);
                    sum += bytes;
                }
            }
        }
    }
}
