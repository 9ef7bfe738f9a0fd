//! Address translation: page walks ([`walk`]), translation buffers ([`tlb`]), and the places where a processor
//! consults or empties them.
#![allow(unsafe_code)] // reads and updates page-table entries in guest memory by host address

mod recent;
mod tlb;
mod walk;

use std::ptr::null;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use guest_memory::{PAGE_SIZE, Region};
use x86_defs::control::{Cr0, Cr4, Efer, Rflags};

use crate::cpu::{Access, Cpu, Exception, Mapping, Privilege, Result};

pub(crate) use recent::{RECENT_PAGES, RecentPages, way};
pub(crate) use tlb::{DATA_ENTRIES, DataEntry, SLOT_ROTATION, Tlb};
use tlb::{Entered, Kind};
pub(crate) use walk::{LINEAR_BITS, PHYSICAL_BITS};
use walk::{Paging, PagingMode, Request, Tables, Walked};

/// What address translation keeps besides its buffers.
#[derive(Debug, Default)]
pub(crate) struct MmuState {
    /// Derived from the control registers.
    paging: Paging,
}

/// Guest memory as the page walker sees it.
struct Memory<'a> {
    map: &'a [Region],
}

/// Where a guest-physical page lies in the host.
struct HostPage {
    host: *mut u8,
    flag: *const AtomicU8,
    read_only: bool,
}

fn find(map: &[Region], physical: u64) -> Option<&Region> {
    let after = map.partition_point(|r| r.base <= physical);
    map.get(after.checked_sub(1)?)
        .filter(|r| physical < r.end())
}

/// Host address of a guest-physical address.
fn host_of(map: &[Region], physical: u64) -> Option<HostPage> {
    let region = find(map, physical)?;
    let offset = region.offset + (physical - region.base);
    Some(HostPage {
        host: region.backing.as_ptr().wrapping_add(offset as usize),
        flag: region.backing.page_flag(offset / PAGE_SIZE),
        read_only: region.read_only,
    })
}

impl Memory<'_> {
    fn noted(&self, physical: u64, len: u64) {
        if let Some(region) = find(self.map, physical) {
            let offset = region.offset + (physical - region.base);
            if region
                .backing
                .page_flag(offset / PAGE_SIZE)
                .load(Ordering::SeqCst)
                != 0
            {
                region.backing.note_write(offset, len);
            }
        }
    }
}

impl Tables for Memory<'_> {
    fn read_u32(&mut self, physical: u64) -> Option<u32> {
        let page = host_of(self.map, physical)?;
        // SAFETY: regions are whole pages of live mappings (the map holds them), and the entry is aligned.
        Some(unsafe { AtomicU32::from_ptr(page.host.cast()) }.load(Ordering::Acquire))
    }

    fn read_u64(&mut self, physical: u64) -> Option<u64> {
        let page = host_of(self.map, physical)?;
        // SAFETY: as in `read_u32`.
        Some(unsafe { AtomicU64::from_ptr(page.host.cast()) }.load(Ordering::Acquire))
    }

    fn exchange_u32(&mut self, physical: u64, old: u32, new: u32) -> bool {
        let Some(page) = host_of(self.map, physical) else {
            return true;
        };
        if page.read_only {
            return true;
        }
        // SAFETY: as in `read_u32`.
        let entry = unsafe { AtomicU32::from_ptr(page.host.cast()) };
        let done = entry
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        self.noted(physical, 4);
        done
    }

    fn exchange_u64(&mut self, physical: u64, old: u64, new: u64) -> bool {
        let Some(page) = host_of(self.map, physical) else {
            return true;
        };
        if page.read_only {
            return true;
        }
        // SAFETY: as in `read_u32`.
        let entry = unsafe { AtomicU64::from_ptr(page.host.cast()) };
        let done = entry
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        self.noted(physical, 8);
        done
    }
}

impl Cpu {
    /// Translates a canonical linear address for an access of one or more bytes inside its page: paging rights, accessed
    /// and dirty bits, physical address to host memory. Enters the page into the TLB where that is allowed.
    ///
    /// # Errors
    /// #PF.
    pub(crate) fn translate(
        &mut self,
        linear: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Mapping> {
        let (user, kind) = self.rights(privilege);
        if access != Access::Fetch
            && let Some(page) = self.tlb.data_page(kind, linear, access == Access::Write)
        {
            let within = (linear & (PAGE_SIZE - 1)) as usize;
            return Ok(Mapping {
                physical: page.physical + within as u64,
                host: page.host.wrapping_add(within),
                flag: page.flag,
            });
        }
        self.translate_by_walk(linear, access, user, kind)
    }

    /// Privilege and rights of an access.
    fn rights(&self, privilege: Privilege) -> (bool, Kind) {
        match privilege {
            Privilege::Current => {
                let kind = self.tlb.kind();
                (kind == Kind::User, kind)
            }
            // Implicit supervisor accesses are not helped by AC.
            Privilege::System => (false, Kind::new(false, self.cr4.contains(Cr4::SMAP))),
        }
    }

    #[inline(never)]
    fn translate_by_walk(
        &mut self,
        linear: u64,
        access: Access,
        user: bool,
        kind: Kind,
    ) -> Result<Mapping> {
        let request = Request {
            write: access == Access::Write,
            fetch: access == Access::Fetch,
            user,
            smap: kind == Kind::Guarded,
        };
        let mut tables = Memory {
            map: &self.memory_map,
        };
        self.counters.page_walks += 1;
        let walked = match self.system.mmu.paging.walk(&mut tables, linear, request) {
            Ok(walked) => walked,
            Err(code) => {
                return Err(self.raise(Exception::Page {
                    code,
                    address: linear,
                }));
            }
        };
        Ok(self.enter(linear, access, request, kind, walked))
    }

    /// Enters a translation into the buffers, if there is memory behind it.
    fn enter(
        &mut self,
        linear: u64,
        access: Access,
        request: Request,
        kind: Kind,
        walked: Walked,
    ) -> Mapping {
        let device = Mapping {
            physical: walked.physical,
            host: std::ptr::null_mut(),
            flag: null(),
        };
        if self.apic_claims(walked.physical) {
            return device;
        }
        let within = walked.physical & (PAGE_SIZE - 1);
        let Some(host) = host_of(&self.memory_map, walked.physical - within) else {
            return device;
        };
        let page = Entered {
            linear,
            physical: walked.physical - within,
            host: host.host,
            flag: host.flag,
            global: walked.global,
            shift: walked.shift,
        };
        if access == Access::Fetch {
            self.tlb.enter_fetch(request.user, &page);
        } else {
            let paging = &self.system.mmu.paging;
            let may = |write| walked.allows(Request { write, ..request }, paging);
            let writable = !host.read_only && walked.dirty && may(true);
            if !self.watches_page(linear) {
                self.tlb.enter_data(kind, &page, may(false), writable);
            }
            if host.read_only && request.write {
                return device;
            }
        }
        Mapping {
            physical: walked.physical,
            host: host.host.wrapping_add(within as usize),
            flag: host.flag,
        }
    }

    /// Reads the PDPTE registers from memory where PAE paging uses them.
    ///
    /// # Errors
    /// #GP for reserved bits.
    pub(crate) fn load_pdptes(&mut self, cr0: Cr0, cr3: u64, cr4: Cr4) -> Result<()> {
        let pae = cr0.contains(Cr0::PG) && cr4.contains(Cr4::PAE) && !self.efer.contains(Efer::LMA);
        if !pae {
            return Ok(());
        }
        let mut tables = Memory {
            map: &self.memory_map,
        };
        match Paging::load_pdptes(&mut tables, cr3) {
            Some(pdpte) => {
                self.system.mmu.paging.pdpte = pdpte;
                Ok(())
            }
            None => Err(self.gp(0)),
        }
    }

    /// Derives what page walks go by from the control registers.
    pub(crate) fn update_paging(&mut self) {
        let (cr0, cr4, efer) = (self.cr0, self.cr4, self.efer);
        self.system.mmu.paging = Paging {
            mode: if !cr0.contains(Cr0::PG) {
                PagingMode::Off
            } else if efer.contains(Efer::LMA) {
                PagingMode::Level4
            } else if cr4.contains(Cr4::PAE) {
                PagingMode::Pae
            } else {
                PagingMode::Bits32
            },
            cr3: self.cr3,
            pdpte: self.system.mmu.paging.pdpte,
            write_protect: cr0.contains(Cr0::WP),
            large_pages: cr4.contains(Cr4::PSE),
            global_pages: cr4.contains(Cr4::PGE),
            smep: cr4.contains(Cr4::SMEP),
            no_execute: efer.contains(Efer::NXE),
        };
    }

    /// Forgets all translations, as a change of CR0, CR4 or EFER that they depend on makes a processor do.
    pub(crate) fn flush_translations(&mut self) {
        self.update_paging();
        self.tlb.flush_all();
        self.leave_block = true;
    }

    /// The PCID in force.
    fn pcid(&self) -> u16 {
        if self.cr4.contains(Cr4::PCIDE) {
            self.cr3 as u16 & 0xfff
        } else {
            0
        }
    }

    /// CR3 has been loaded; `keep` the translations of its PCID.
    pub(crate) fn switch_address_space(&mut self, keep: bool) {
        self.update_paging();
        self.tlb
            .switch(self.pcid(), keep && self.cr4.contains(Cr4::PCIDE));
    }

    /// INVPCID (SDM volume 2): the descriptor's PCID and linear address, already checked.
    pub(crate) fn invalidate_pcid(&mut self, kind: u64, pcid: u16, linear: u64) {
        match kind {
            0 => self.tlb.flush_page(linear, Some(pcid)),
            1 => self.tlb.flush_pcid(pcid),
            2 => self.tlb.flush_all(),
            _ => self.tlb.flush_local(),
        }
    }

    /// True when SMAP keeps explicit supervisor accesses from user pages now.
    pub(crate) fn smap_in_force(&self) -> bool {
        self.cr4.contains(Cr4::SMAP) && self.system_flags & Rflags::AC.bits() == 0
    }
}
