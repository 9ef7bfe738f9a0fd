//! The kernel's counters of a vCPU (`KVM_GET_STATS_FD`, "binary statistics" in Linux's `Documentation/virt/kvm/api.rst`,
//! section 4.133).

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

use crate::ioctls;

/// Bytes of `struct kvm_stats_header`.
const HEADER_SIZE: usize = 24;
/// Bytes of `struct kvm_stats_desc` without the name.
const DESCRIPTOR_SIZE: usize = 16;
/// More descriptors than any kernel has.
const MOST_DESCRIPTORS: usize = 1024;

/// The file with the counters and where in it the ones are that we show.
pub(crate) struct KernelStatistics {
    file: File,
    interrupts: Option<u64>,
    halted_ns: Option<u64>,
}

fn word(bytes: &[u8], at: usize) -> usize {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes) as usize
}

impl KernelStatistics {
    /// Opens the counters of a vCPU; `None` on kernels without them.
    pub(crate) fn open(vcpu: &VcpuFd) -> Option<Self> {
        let file = ioctls::statistics_file(vcpu).ok()?;
        let mut header = [0; HEADER_SIZE];
        file.read_exact_at(&mut header, 0).ok()?;
        let name_size = word(&header, 4);
        let count = word(&header, 8).min(MOST_DESCRIPTORS);
        let descriptors_at = word(&header, 16) as u64;
        let data_at = word(&header, 20) as u64;
        let size = DESCRIPTOR_SIZE.checked_add(name_size.min(256))?;
        let mut descriptors = vec![0; count * size];
        file.read_exact_at(&mut descriptors, descriptors_at).ok()?;
        let find = |wanted: &str| {
            descriptors
                .chunks_exact(size)
                .find(|d| d[DESCRIPTOR_SIZE..].split(|b| *b == 0).next() == Some(wanted.as_bytes()))
                .map(|d| data_at + word(d, 8) as u64)
        };
        Some(Self {
            interrupts: find("irq_injections"),
            halted_ns: find("halt_wait_ns"),
            file,
        })
    }

    fn value(&self, at: Option<u64>) -> u64 {
        let mut value = [0; 8];
        match at.map(|at| self.file.read_exact_at(&mut value, at)) {
            Some(Ok(())) => u64::from_ne_bytes(value),
            _ => 0,
        }
    }

    /// Interrupts delivered.
    pub(crate) fn interrupts(&self) -> u64 {
        self.value(self.interrupts)
    }

    /// Nanoseconds spent halted.
    pub(crate) fn halted_ns(&self) -> u64 {
        self.value(self.halted_ns)
    }
}
