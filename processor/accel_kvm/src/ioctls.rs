//! System calls on KVM's file descriptors that the `kvm-ioctls` crate has not got, or not in the form that is needed here.
//! Linux's `Documentation/virt/kvm/api.rst` describes each under its name.

#![allow(unsafe_code)] // system calls that take pointers

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use kvm_bindings::{
    KVMIO, Xsave, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr,
    kvm_interrupt, kvm_ioeventfd, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use libc::c_ulong;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

const fn number(direction: u32, nr: u32, size: usize) -> c_ulong {
    ioctl_expr(direction, KVMIO, nr, size as u32)
}

const RUN: c_ulong = number(_IOC_NONE, 0x80, 0);
const INTERRUPT: c_ulong = number(_IOC_WRITE, 0x86, size_of::<kvm_interrupt>());
const IOEVENTFD: c_ulong = number(_IOC_WRITE, 0x79, size_of::<kvm_ioeventfd>());
const GET_TSC_KHZ: c_ulong = number(_IOC_NONE, 0xa3, 0);
const CLEAR_DIRTY_LOG: c_ulong = number(
    _IOC_READ | _IOC_WRITE,
    0xc0,
    size_of::<kvm_clear_dirty_log>(),
);
const GET_STATS_FD: c_ulong = number(_IOC_NONE, 0xce, 0);
const SET_DEVICE_ATTR: c_ulong = number(_IOC_WRITE, 0xe1, size_of::<kvm_device_attr>());
const GET_DEVICE_ATTR: c_ulong = number(_IOC_WRITE, 0xe2, size_of::<kvm_device_attr>());

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// `KVM_RUN`.
pub(crate) fn run(vcpu: &VcpuFd) -> io::Result<()> {
    // SAFETY: takes no argument; what it writes is the run page (mapped and only read through raw pointers) and guest
    // memory (of which no references exist).
    checked(unsafe { libc::ioctl(vcpu.as_raw_fd(), RUN, 0) }).map(drop)
}

/// `KVM_INTERRUPT`: hands over the vector that the 8259 acknowledged.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let irq = kvm_interrupt { irq: vector.into() };
    // SAFETY: the kernel reads the structure, which has the size that the number says.
    checked(unsafe { libc::ioctl(vcpu.as_raw_fd(), INTERRUPT, &raw const irq) }).map(drop)
}

/// `KVM_IOEVENTFD`.
pub(crate) fn ioeventfd(vm: &VmFd, event: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: as above.
    checked(unsafe { libc::ioctl(vm.as_raw_fd(), IOEVENTFD, std::ptr::from_ref(event)) }).map(drop)
}

/// `KVM_GET_TSC_KHZ` of a VM: what its vCPUs get unless told otherwise. Kernels before 5.16 refuse.
pub(crate) fn vm_tsc_khz(vm: &VmFd) -> io::Result<u32> {
    // SAFETY: takes no argument.
    checked(unsafe { libc::ioctl(vm.as_raw_fd(), GET_TSC_KHZ, 0) }).map(|khz| khz as u32)
}

/// `KVM_CLEAR_DIRTY_LOG`: the pages whose bits are set, from `first_page` of the slot, are watched again.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    assert!(
        bitmap.len() * 64 >= pages as usize,
        "the kernel reads a bit for each page"
    );
    let clear = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel reads the structure and as much of the bitmap as was checked above.
    checked(unsafe { libc::ioctl(vm.as_raw_fd(), CLEAR_DIRTY_LOG, &raw const clear) }).map(drop)
}

/// `KVM_SET_USER_MEMORY_REGION`.
///
/// # Safety
/// The host range must be a mapping that stays for as long as the slot is there, and of which no Rust references are made.
pub(crate) unsafe fn set_memory_slot(
    vm: &VmFd,
    slot: &kvm_userspace_memory_region,
) -> io::Result<()> {
    // SAFETY: passed on to the caller.
    unsafe { vm.set_user_memory_region(*slot) }.map_err(io::Error::from)
}

/// `KVM_GET_STATS_FD` of a vCPU.
pub(crate) fn statistics_file(vcpu: &VcpuFd) -> io::Result<File> {
    // SAFETY: takes no argument and gives a new descriptor, which the file then owns.
    unsafe {
        checked(libc::ioctl(vcpu.as_raw_fd(), GET_STATS_FD, 0)).map(|fd| File::from_raw_fd(fd))
    }
}

/// `KVM_GET_DEVICE_ATTR` of a vCPU for an attribute of 64 bits.
pub(crate) fn vcpu_attribute(vcpu: &VcpuFd, group: u32, attr: u64) -> io::Result<u64> {
    let mut value = 0u64;
    let attr = kvm_device_attr {
        group,
        attr,
        addr: &raw mut value as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads the structure and writes eight bytes at its address, which is our variable.
    checked(unsafe { libc::ioctl(vcpu.as_raw_fd(), GET_DEVICE_ATTR, &raw const attr) })?;
    Ok(value)
}

/// `KVM_SET_DEVICE_ATTR` of a vCPU for an attribute of 64 bits.
pub(crate) fn set_vcpu_attribute(
    vcpu: &VcpuFd,
    group: u32,
    attr: u64,
    value: u64,
) -> io::Result<()> {
    let attr = kvm_device_attr {
        group,
        attr,
        addr: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads the structure and eight bytes at its address, which is our variable.
    checked(unsafe { libc::ioctl(vcpu.as_raw_fd(), SET_DEVICE_ATTR, &raw const attr) }).map(drop)
}

/// An empty buffer for extended state of `size` bytes (the answer to `KVM_CAP_XSAVE2`).
fn xsave_buffer(size: usize) -> Xsave {
    let more = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
    Xsave::new(more).expect("a few kilobytes are within the wrapper's limit")
}

/// `KVM_GET_XSAVE`, or `KVM_GET_XSAVE2` where the state is larger than a page: `size` bytes.
pub(crate) fn xsave(vcpu: &VcpuFd, size: usize) -> io::Result<Vec<u8>> {
    let mut words = Vec::with_capacity(size / 4);
    if size <= size_of::<kvm_xsave>() {
        words.extend_from_slice(&vcpu.get_xsave()?.region);
    } else {
        let mut buffer = xsave_buffer(size);
        // SAFETY: the buffer is as large as the kernel says that it needs.
        unsafe { vcpu.get_xsave2(&mut buffer)? };
        words.extend_from_slice(&buffer.as_fam_struct_ref().xsave.region);
        words.extend_from_slice(buffer.as_slice());
    }
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.truncate(size);
    Ok(bytes)
}

/// `KVM_SET_XSAVE`: at most `size` bytes, the rest being zero.
pub(crate) fn set_xsave(vcpu: &VcpuFd, size: usize, state: &[u8]) -> io::Result<()> {
    let mut buffer = xsave_buffer(size);
    let words = state.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    let mut region = [0u32; 1024];
    let more = buffer.as_mut_slice();
    for (i, word) in words.enumerate() {
        match region.get_mut(i) {
            Some(place) => *place = word,
            None => match more.get_mut(i - region.len()) {
                Some(place) => *place = word,
                None => break,
            },
        }
    }
    // SAFETY: only the plain array in front of the flexible part is written.
    unsafe { buffer.as_mut_fam_struct() }.xsave.region = region;
    // SAFETY: the buffer is as large as the kernel reads: it knows this VM's size of the state, which `size` is.
    unsafe { vcpu.set_xsave2(&buffer) }.map_err(io::Error::from)
}
