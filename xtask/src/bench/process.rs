//! What a running machine costs its host: processor time and memory, as `/proc` tells (proc(5)).

use std::collections::HashMap;
use std::ops::Sub;

use crate::Result;

/// Seconds of the host's processors.
#[derive(Clone, Copy, Default)]
pub(super) struct Cpu {
    /// Spent by vCPUs: the guest's own code where the processor is software, and what devices do on the vCPU's thread.
    pub(super) vcpus: f64,
    /// Spent by all other threads, the kernel's workers for them included.
    pub(super) others: f64,
}

impl Cpu {
    pub(super) fn total(self) -> f64 {
        self.vcpus + self.others
    }
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            vcpus: self.vcpus - earlier.vcpus,
            others: self.others - earlier.others,
        }
    }
}

/// Adds up a process's processor time. Threads that have ended keep what they had when they were last seen.
pub(super) struct CpuMeter {
    process: u32,
    threads: HashMap<String, (bool, u64)>,
}

impl CpuMeter {
    pub(super) fn new(process: u32) -> Self {
        Self {
            process,
            threads: HashMap::new(),
        }
    }

    /// What all threads have used so far.
    pub(super) fn read(&mut self) -> Result<Cpu> {
        let folder = format!("/proc/{}/task", self.process);
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
        for entry in entries.flatten() {
            let file = |name| std::fs::read_to_string(entry.path().join(name));
            // One that ends just now is gone.
            let (Ok(name), Ok(times)) = (file("comm"), file("schedstat")) else {
                continue;
            };
            // Ours are `vcpu-0`, QEMU's `CPU 0/TCG`.
            let vcpu = name.starts_with("vcpu-") || name.starts_with("CPU ");
            let nanoseconds = times
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok());
            let nanoseconds = nanoseconds.ok_or("this kernel does not count its threads' time")?;
            let thread = entry.file_name().to_string_lossy().into_owned();
            self.threads.insert(thread, (vcpu, nanoseconds));
        }
        let mut sum = Cpu::default();
        for (vcpu, nanoseconds) in self.threads.values() {
            let seconds = *nanoseconds as f64 / 1e9;
            if *vcpu {
                sum.vcpus += seconds;
            } else {
                sum.others += seconds;
            }
        }
        Ok(sum)
    }
}

/// Memory of a machine's process, in bytes, as proportional set size.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub(super) struct Memory {
    /// The guest's pages that have been touched.
    pub(super) guest: u64,
    /// All else.
    pub(super) own: u64,
}

/// What a process has in memory while it runs a guest of `guest_size` bytes.
pub(super) fn memory(process: u32, guest_size: u64) -> Result<Memory> {
    let path = format!("/proc/{process}/smaps");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    split(&text, guest_size).ok_or_else(|| format!("{path}: no mapping is the guest's memory"))
}

/// Tells the guest's memory from the rest: it is the first run of writable mappings, each beginning where the one before it ends, that
/// has the guest's size. (A file may be mapped over a part of it: the decompressed kernel. Guard pages keep it from its neighbours.)
fn split(smaps: &str, guest_size: u64) -> Option<Memory> {
    let mut runs: Vec<Run> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next()?;
        if let Some((start, end)) = range(first) {
            let writable = words.next()?.starts_with("rw");
            match runs.last_mut() {
                Some(run) if run.writable && writable && run.end == start => run.end = end,
                _ => runs.push(Run {
                    start,
                    end,
                    writable,
                    bytes: 0,
                }),
            }
        } else if first == "Pss:" {
            runs.last_mut()?.bytes += words.next()?.parse::<u64>().ok()? << 10;
        }
    }
    let is_guest = |run: &&Run| run.writable && run.end - run.start >= guest_size;
    let guest = runs.iter().find(is_guest)?.bytes;
    let all: u64 = runs.iter().map(|run| run.bytes).sum();
    Some(Memory {
        guest,
        own: all - guest,
    })
}

struct Run {
    start: u64,
    end: u64,
    writable: bool,
    bytes: u64,
}

fn range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_told_from_the_rest() {
        let smaps = "\
55000000-55001000 r-xp 00000000 fe:00 5 /bin/corten
Rss: 4 kB
Pss: 3 kB
Pss_Dirty: 1 kB
VmFlags: rd ex
60000000-60010000 rw-p 00000000 00:00 0
Pss: 20 kB
60010000-60011000 ---p 00000000 00:00 0
Pss: 0 kB
60011000-60111000 rw-p 00000000 00:00 0
Pss: 100 kB
60111000-60211000 rw-p 00000000 fe:00 9 /cache/kernel
Pss: 200 kB
60211000-60411000 rw-p 00000000 00:00 0
Pss: 400 kB
60411000-60412000 ---p 00000000 00:00 0
Pss: 0 kB
7f000000-7f001000 rw-p 00000000 00:00 0 [stack]
Pss: 4 kB
";
        let wanted = Memory {
            guest: 700 << 10,
            own: 27 << 10,
        };
        assert_eq!(split(smaps, 4 << 20), Some(wanted));
        assert_eq!(split(smaps, 5 << 20), None);
    }
}
