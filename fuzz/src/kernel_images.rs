//! Kernels: ELF files, bzImages, and what they are compressed with.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use guest_memory::{BackingOptions, GuestMemory};
use machine::loader::{BootInfo, PreparedKernel};
use machine::memory_map::MemoryMap;
use rustix::fs::{MemfdFlags, memfd_create};

/// Bytes of guest memory; less than some headers ask for.
const RAM: u64 = 48 << 20;

/// Loads any bytes as a kernel, with the same bytes as initial RAM disk. Nothing may panic, hang, or take memory without a
/// bound.
pub fn kernel(data: &[u8]) {
    let descriptor = memfd_create("kernel", MemfdFlags::CLOEXEC).expect("memory");
    let mut file = File::from(descriptor);
    file.write_all(data).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(kernel) = PreparedKernel::read(&path, None) else {
        return;
    };
    let map = MemoryMap::new(RAM, true);
    let memory = GuestMemory::new();
    map.allocate(&memory, BackingOptions::default())
        .expect("memory");
    for initrd in [None, Some(path.as_path())] {
        let info = BootInfo {
            append: "console=ttyS0",
            initrd,
            map: &map,
            rsdp: 0xe_0000,
        };
        let _ = kernel.load(&memory, &info);
    }
}
