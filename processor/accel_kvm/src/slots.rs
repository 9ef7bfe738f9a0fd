//! Guest memory as KVM's memory slots, and the dirty log.

#![allow(unsafe_code)] // hands host memory to the kernel

use std::io;
use std::sync::Arc;

use accel::AccelError;
use guest_memory::{MemoryListener, PAGE_SHIFT, Region};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use crate::host::{HostFeatures, refused};
use crate::ioctls;

struct Slot {
    region: Region,
    logging: bool,
}

/// The slots of a VM: number `n` is element `n`.
pub(crate) struct Slots {
    vm: Arc<VmFd>,
    most: u32,
    read_only: bool,
    manual: bool,
    slots: Mutex<Vec<Option<Slot>>>,
}

impl Slots {
    pub(crate) fn new(vm: Arc<VmFd>, features: &HostFeatures) -> Self {
        let manual = features.manual_dirty_log
            && vm
                .enable_cap(&kvm_enable_cap {
                    cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                    args: [1, 0, 0, 0],
                    ..Default::default()
                })
                .is_ok();
        Self {
            vm,
            most: features.slots,
            read_only: features.read_only_memory,
            manual,
            slots: Mutex::default(),
        }
    }

    /// Creates, changes (flags) or, with `size` 0, deletes a slot.
    fn set(&self, number: usize, region: &Region, size: u64, logging: bool) -> io::Result<()> {
        let mut flags = 0;
        if region.read_only {
            flags |= KVM_MEM_READONLY;
        }
        if logging {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let slot = kvm_userspace_memory_region {
            slot: number as u32,
            flags: if size == 0 { 0 } else { flags },
            guest_phys_addr: region.base,
            memory_size: size,
            userspace_addr: region.backing.as_ptr() as u64 + region.offset,
        };
        // SAFETY: a region lies inside its backing, whose mapping lives as long as the `Arc` that the slot table keeps
        // until the slot is deleted; guest memory has no references to it anywhere.
        unsafe { ioctls::set_memory_slot(&self.vm, &slot) }
    }

    /// Starts and stops the logs of slots as their backings ask, and merges what the others have found.
    pub(crate) fn sync_dirty_log(&self) -> Result<(), AccelError> {
        for (number, slot) in self.slots.lock().iter_mut().enumerate() {
            let Some(slot) = slot else { continue };
            let wanted = slot.region.backing.is_logging() && !slot.region.read_only;
            if slot.logging {
                self.collect(number as u32, &slot.region)?;
            }
            if wanted != slot.logging {
                self.set(number, &slot.region, slot.region.size, wanted)
                    .map_err(|e| refused("switch the dirty log", e))?;
                slot.logging = wanted;
            }
        }
        Ok(())
    }

    fn collect(&self, number: u32, region: &Region) -> Result<(), AccelError> {
        let dirty = self
            .vm
            .get_dirty_log(number, region.size as usize)
            .map_err(|e| refused("read the dirty log", e))?;
        if dirty.iter().all(|word| *word == 0) {
            return Ok(());
        }
        if self.manual {
            let pages = (region.size >> PAGE_SHIFT) as u32;
            ioctls::clear_dirty_log(&self.vm, number, 0, pages, &dirty)
                .map_err(|e| refused("clear the dirty log", e))?;
        }
        region
            .backing
            .merge_log(region.offset >> PAGE_SHIFT, &dirty);
        Ok(())
    }
}

impl MemoryListener for Slots {
    fn region_added(&self, region: &Region) -> Result<(), String> {
        if region.read_only && !self.read_only {
            return Err("the host's KVM has no read-only memory".into());
        }
        let mut slots = self.slots.lock();
        let free = slots.iter().position(Option::is_none);
        let number = free.unwrap_or(slots.len());
        if number as u64 >= self.most.into() {
            return Err(format!(
                "the host's KVM has only {} memory slots",
                self.most
            ));
        }
        let logging = region.backing.is_logging() && !region.read_only;
        self.set(number, region, region.size, logging)
            .map_err(|e| format!("KVM memory slot {number}: {e}"))?;
        let slot = Some(Slot {
            region: region.clone(),
            logging,
        });
        match free {
            Some(number) => slots[number] = slot,
            None => slots.push(slot),
        }
        Ok(())
    }

    fn region_removed(&self, region: &Region) {
        let mut slots = self.slots.lock();
        let is_it = |slot: &Option<Slot>| {
            slot.as_ref()
                .is_some_and(|slot| slot.region.base == region.base)
        };
        let Some(number) = slots.iter().position(is_it) else {
            return;
        };
        if let Some(slot) = slots[number].take() {
            if slot.logging {
                // What was written until now must not be lost with the slot.
                let _ = self.collect(number as u32, &slot.region);
            }
            self.set(number, &slot.region, 0, false)
                .expect("KVM deletes any slot that is there");
        }
    }
}
