//! Page walks (SDM volume 3, chapter 5): from a linear address and the paging structures in guest memory to a physical
//! address and the rights that go with it.

use x86_defs::exception::{PF_FETCH, PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE};

/// Width of physical addresses in bits, as CPUID leaf 0x8000_0008 says.
pub(crate) const PHYSICAL_BITS: u32 = 46;
/// Width of linear addresses in bits.
pub(crate) const LINEAR_BITS: u32 = 48;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Address bits of a 64-bit entry.
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;
/// Reserved in every 64-bit entry: address bits that the processor has not got. (Bits 52 to 62 are ignored in 4-level
/// paging, reserved in PAE paging.)
const BEYOND: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);
const PAE_BEYOND: u64 = 0x7fff_ffff_ffff_ffff & !((1 << PHYSICAL_BITS) - 1);

/// Guest-physical memory as the walker reaches it.
pub(crate) trait Tables {
    /// Reads a 4-byte entry in one access; `None` where there is no memory.
    fn read_u32(&mut self, physical: u64) -> Option<u32>;
    /// Reads an 8-byte entry in one access.
    fn read_u64(&mut self, physical: u64) -> Option<u64>;
    /// Atomically replaces a 4-byte entry; false when it was no longer `old`.
    fn exchange_u32(&mut self, physical: u64, old: u32, new: u32) -> bool;
    /// Atomically replaces an 8-byte entry.
    fn exchange_u64(&mut self, physical: u64, old: u64, new: u64) -> bool;
}

/// The paging mode (SDM volume 3, table 5-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum PagingMode {
    /// No paging.
    #[default]
    Off,
    /// 32-bit paging.
    Bits32,
    /// PAE paging.
    Pae,
    /// 4-level paging.
    Level4,
}

/// What decides about walks besides the address.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Paging {
    pub(crate) mode: PagingMode,
    /// CR3.
    pub(crate) cr3: u64,
    /// The four PDPTE registers of PAE paging.
    pub(crate) pdpte: [u64; 4],
    /// CR0.WP.
    pub(crate) write_protect: bool,
    /// CR4.PSE.
    pub(crate) large_pages: bool,
    /// CR4.PGE.
    pub(crate) global_pages: bool,
    /// CR4.SMEP.
    pub(crate) smep: bool,
    /// EFER.NXE.
    pub(crate) no_execute: bool,
}

/// An access to be translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) write: bool,
    pub(crate) fetch: bool,
    /// With user privilege.
    pub(crate) user: bool,
    /// A supervisor data access may not touch user pages (SMAP applies and is not overridden).
    pub(crate) smap: bool,
}

/// A translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Walked {
    /// Physical address of the byte.
    pub(crate) physical: u64,
    /// Base-two logarithm of the page's size.
    pub(crate) shift: u32,
    /// The R/W bits of all levels.
    pub(crate) writable: bool,
    /// The U/S bits of all levels.
    pub(crate) user: bool,
    /// No XD bit on any level.
    pub(crate) executable: bool,
    /// The page is global.
    pub(crate) global: bool,
    /// The dirty bit is set.
    pub(crate) dirty: bool,
}

impl Walked {
    /// Do the rights allow the access?
    pub(crate) fn allows(&self, request: Request, paging: &Paging) -> bool {
        if request.user {
            return self.user
                && (!request.write || self.writable)
                && (!request.fetch || self.executable);
        }
        if request.fetch {
            return self.executable && !(paging.smep && self.user);
        }
        if self.user && request.smap {
            return false;
        }
        !request.write || self.writable || !paging.write_protect
    }
}

/// Where a level's entry is and how the walk goes on.
struct Level {
    /// Lowest bit of the linear address that the level translates.
    shift: u32,
    /// Bits that must be zero if the entry points to a table.
    reserved_table: u64,
    /// Bits that must be zero if the entry maps a page, or `None` when it can't (bit 7 is then in `reserved_table` if it is
    /// reserved).
    reserved_page: Option<u64>,
}

impl Paging {
    /// The error code of a fault of this access; `bits` are P and RSVD.
    fn code(&self, request: Request, bits: u32) -> u32 {
        let mut code = bits;
        if request.write {
            code |= PF_WRITE;
        }
        if request.user {
            code |= PF_USER;
        }
        let wide = matches!(self.mode, PagingMode::Pae | PagingMode::Level4);
        if request.fetch && (self.smep || (wide && self.no_execute)) {
            code |= PF_FETCH;
        }
        code
    }

    /// Translates an address. Sets accessed and dirty bits as the processor does.
    ///
    /// # Errors
    /// The error code of the page fault.
    pub(crate) fn walk(
        &self,
        tables: &mut impl Tables,
        linear: u64,
        request: Request,
    ) -> Result<Walked, u32> {
        loop {
            let walked = match self.mode {
                PagingMode::Off => Some(Ok(Walked {
                    physical: linear,
                    shift: 30,
                    writable: true,
                    user: true,
                    executable: true,
                    global: false,
                    dirty: true,
                })),
                PagingMode::Bits32 => self.walk_32(tables, linear, request),
                PagingMode::Pae | PagingMode::Level4 => self.walk_64(tables, linear, request),
            };
            // An entry that another processor changed between our read and our update starts the walk over.
            if let Some(result) = walked {
                return result;
            }
        }
    }

    /// `None` when an entry changed under the walk.
    fn walk_64(
        &self,
        tables: &mut impl Tables,
        linear: u64,
        request: Request,
    ) -> Option<Result<Walked, u32>> {
        let level4 = self.mode == PagingMode::Level4;
        let nx = if self.no_execute { 0 } else { NO_EXECUTE };
        let beyond = nx | if level4 { BEYOND } else { PAE_BEYOND };
        let large_2m = Some(beyond | 0x1f_e000);
        let all = [
            Level {
                shift: 39,
                reserved_table: beyond | LARGE,
                reserved_page: None,
            },
            Level {
                shift: 30,
                reserved_table: beyond,
                reserved_page: Some(beyond | 0x3fff_e000),
            },
            Level {
                shift: 21,
                reserved_table: beyond,
                reserved_page: large_2m,
            },
        ];
        let (levels, mut table) = if level4 {
            (&all[..], self.cr3 & ADDRESS)
        } else {
            // The PDPTE registers were checked when CR3 was loaded and carry no rights.
            let pdpte = self.pdpte[(linear >> 30 & 3) as usize];
            if pdpte & PRESENT == 0 {
                return Some(Err(self.code(request, 0)));
            }
            (&all[2..], pdpte & ADDRESS)
        };
        let (mut rights, mut deny) = (WRITABLE | USER, 0);
        for level in levels {
            let at = table + (linear >> level.shift & 0x1ff) * 8;
            let entry = tables.read_u64(at).unwrap_or(u64::MAX);
            if entry & PRESENT == 0 {
                return Some(Err(self.code(request, 0)));
            }
            let page = entry & LARGE != 0 && level.reserved_page.is_some();
            let reserved = match level.reserved_page {
                Some(bits) if page => bits,
                _ => level.reserved_table,
            };
            if entry & reserved != 0 {
                return Some(Err(self.code(request, PF_PRESENT | PF_RESERVED)));
            }
            rights &= entry;
            deny |= entry & NO_EXECUTE;
            if page {
                return self.leaf_64(
                    tables,
                    (at, entry, level.shift),
                    linear,
                    request,
                    (rights, deny),
                );
            }
            if entry & ACCESSED == 0 && !tables.exchange_u64(at, entry, entry | ACCESSED) {
                return None;
            }
            table = entry & ADDRESS;
        }
        let at = table + (linear >> 12 & 0x1ff) * 8;
        let entry = tables.read_u64(at).unwrap_or(u64::MAX);
        if entry & PRESENT == 0 {
            return Some(Err(self.code(request, 0)));
        }
        if entry & beyond != 0 {
            return Some(Err(self.code(request, PF_PRESENT | PF_RESERVED)));
        }
        rights &= entry;
        deny |= entry & NO_EXECUTE;
        self.leaf_64(tables, (at, entry, 12), linear, request, (rights, deny))
    }

    fn leaf_64(
        &self,
        tables: &mut impl Tables,
        (at, entry, shift): (u64, u64, u32),
        linear: u64,
        request: Request,
        (rights, deny): (u64, u64),
    ) -> Option<Result<Walked, u32>> {
        let within = (1 << shift) - 1;
        let mut walked = Walked {
            physical: (entry & ADDRESS & !within) | (linear & within),
            shift,
            writable: rights & WRITABLE != 0,
            user: rights & USER != 0,
            executable: deny == 0,
            global: self.global_pages && entry & GLOBAL != 0,
            dirty: entry & DIRTY != 0,
        };
        if !walked.allows(request, self) {
            return Some(Err(self.code(request, PF_PRESENT)));
        }
        let new = entry | ACCESSED | if request.write { DIRTY } else { 0 };
        if new != entry && !tables.exchange_u64(at, entry, new) {
            return None;
        }
        walked.dirty |= request.write;
        Some(Ok(walked))
    }

    fn walk_32(
        &self,
        tables: &mut impl Tables,
        linear: u64,
        request: Request,
    ) -> Option<Result<Walked, u32>> {
        let at = (self.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
        let entry = tables.read_u32(at).unwrap_or(u32::MAX);
        if entry & PRESENT as u32 == 0 {
            return Some(Err(self.code(request, 0)));
        }
        if self.large_pages && entry & LARGE as u32 != 0 {
            // PSE-36: bits 13 to 20 are address bits 32 to 39; bit 21 is reserved.
            if entry & 1 << 21 != 0 {
                return Some(Err(self.code(request, PF_PRESENT | PF_RESERVED)));
            }
            let base = u64::from(entry & 0xffc0_0000) | u64::from(entry >> 13 & 0xff) << 32;
            let physical = base | (linear & 0x3f_ffff);
            return self.leaf_32(tables, (at, entry, 22), physical, request, entry);
        }
        if entry & ACCESSED as u32 == 0 && !tables.exchange_u32(at, entry, entry | ACCESSED as u32)
        {
            return None;
        }
        let rights = entry;
        let at = u64::from(entry & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
        let entry = tables.read_u32(at).unwrap_or(u32::MAX);
        if entry & PRESENT as u32 == 0 {
            return Some(Err(self.code(request, 0)));
        }
        let physical = u64::from(entry & 0xffff_f000) | (linear & 0xfff);
        self.leaf_32(tables, (at, entry, 12), physical, request, rights & entry)
    }

    fn leaf_32(
        &self,
        tables: &mut impl Tables,
        (at, entry, shift): (u64, u32, u32),
        physical: u64,
        request: Request,
        rights: u32,
    ) -> Option<Result<Walked, u32>> {
        let mut walked = Walked {
            physical,
            shift,
            writable: rights & WRITABLE as u32 != 0,
            user: rights & USER as u32 != 0,
            executable: true,
            global: self.global_pages && entry & GLOBAL as u32 != 0,
            dirty: entry & DIRTY as u32 != 0,
        };
        if !walked.allows(request, self) {
            return Some(Err(self.code(request, PF_PRESENT)));
        }
        let dirty = if request.write { DIRTY as u32 } else { 0 };
        let new = entry | ACCESSED as u32 | dirty;
        if new != entry && !tables.exchange_u32(at, entry, new) {
            return None;
        }
        walked.dirty |= request.write;
        Some(Ok(walked))
    }

    /// The four PDPTEs that CR3 points to, or `None` when one of them has reserved bits set: loading CR3 is then #GP
    /// (SDM volume 3, section 5.4.1).
    pub(crate) fn load_pdptes(tables: &mut impl Tables, cr3: u64) -> Option<[u64; 4]> {
        const RESERVED: u64 = !ADDRESS & !(PRESENT | 3 << 3 | 7 << 9);
        let mut pdpte = [0; 4];
        for (i, slot) in pdpte.iter_mut().enumerate() {
            let entry = tables
                .read_u64((cr3 & 0xffff_ffe0) + i as u64 * 8)
                .unwrap_or(u64::MAX);
            if entry & PRESENT != 0 && entry & RESERVED != 0 {
                return None;
            }
            *slot = entry;
        }
        Some(pdpte)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default, Clone)]
    struct Memory(HashMap<u64, u64>);

    impl Tables for Memory {
        fn read_u32(&mut self, at: u64) -> Option<u32> {
            let word = self.0.get(&(at & !7)).copied().unwrap_or(0);
            Some((word >> ((at & 4) * 8)) as u32)
        }
        fn read_u64(&mut self, at: u64) -> Option<u64> {
            Some(self.0.get(&at).copied().unwrap_or(0))
        }
        fn exchange_u32(&mut self, at: u64, old: u32, new: u32) -> bool {
            assert_eq!(self.read_u32(at), Some(old));
            let shift = (at & 4) * 8;
            let word = self.0.entry(at & !7).or_default();
            *word = *word & !(0xffff_ffff << shift) | u64::from(new) << shift;
            true
        }
        fn exchange_u64(&mut self, at: u64, old: u64, new: u64) -> bool {
            assert_eq!(self.0.insert(at, new), Some(old));
            true
        }
    }

    fn any_request() -> impl Strategy<Value = Request> {
        (0..3u8, any::<bool>(), any::<bool>()).prop_map(|(kind, user, smap)| Request {
            write: kind == 1,
            fetch: kind == 2,
            user,
            smap: smap && !user,
        })
    }

    fn any_paging(mode: PagingMode) -> impl Strategy<Value = Paging> {
        any::<[bool; 5]>().prop_map(move |b| Paging {
            mode,
            cr3: 0x1000,
            pdpte: [0x2001; 4],
            write_protect: b[0],
            large_pages: b[1],
            global_pages: b[2],
            smep: b[3],
            no_execute: b[4],
        })
    }

    /// The page-fault error code or physical address by the manual's tables, written without regard to how the walker
    /// works: `entries` from the top, the last one maps a page of `size` bytes.
    fn model(
        p: &Paging,
        r: Request,
        entries: &[u64],
        reserved: &[u64],
        base: u64,
        offset: u64,
    ) -> Result<u64, u32> {
        let wide = p.mode != PagingMode::Bits32;
        let fetch_bit = r.fetch && (p.smep || (wide && p.no_execute));
        let code = u32::from(r.write) << 1 | u32::from(r.user) << 2 | u32::from(fetch_bit) << 4;
        for (entry, reserved) in entries.iter().zip(reserved) {
            if entry & 1 == 0 {
                return Err(code);
            }
            if entry & reserved != 0 {
                return Err(code | 9);
            }
        }
        let user_page = entries.iter().all(|e| e & 4 != 0);
        let read_only = entries.iter().any(|e| e & 2 == 0);
        let xd = wide && p.no_execute && entries.iter().any(|e| e >> 63 != 0);
        let denied = [
            r.user && !user_page,
            r.user && r.write && read_only,
            !r.user && r.write && read_only && p.write_protect,
            r.fetch && xd,
            r.fetch && !r.user && p.smep && user_page,
            !r.fetch && !r.user && r.smap && user_page,
        ];
        if denied.contains(&true) {
            return Err(code | 1);
        }
        Ok(base + offset)
    }

    /// Rights, ignored bits and now and then a reserved one, on top of an address.
    fn any_bits() -> impl Strategy<Value = u64> {
        (
            0..8u64,
            prop::bool::weighted(0.9),
            prop::bool::weighted(0.2),
            0..12u32,
        )
            .prop_map(|(low, present, nx, odd)| {
                let odd = match odd {
                    0 => 1 << 50,
                    1 => 1 << 60,
                    2 => 1 << 8 | 1 << 9,
                    3 => 1 << 5 | 1 << 6,
                    _ => 0,
                };
                low | u64::from(present) | u64::from(nx) << 63 | odd
            })
    }

    proptest! {
        #[test]
        fn four_levels_agree_with_the_manuals_tables(
            p in any_paging(PagingMode::Level4), r in any_request(),
            bits in prop::array::uniform4(any_bits()), depth in 2..5usize, offset in 0..0x1000u64,
        ) {
            let linear = 1u64 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | offset;
            let mut m = Memory::default();
            let mut entries = Vec::new();
            let shift = [39, 30, 21, 12][depth - 1];
            for (i, bits) in bits.iter().enumerate().take(depth) {
                let leaf = i == depth - 1;
                let address = if leaf { 0x8_0000_0000 } else { 0x2000 + i as u64 * 0x1000 };
                let entry = *bits | address | if leaf && shift > 12 { 0x80 } else { 0 };
                m.0.insert(0x1000 + i as u64 * 0x1000 + (i as u64 + 1) * 8, entry);
                entries.push(entry);
            }
            let nx = if p.no_execute { 0 } else { 1 << 63 };
            let high = nx | ((1u64 << 52) - (1 << PHYSICAL_BITS));
            let reserved = vec![high; depth];
            let within = linear & ((1 << shift) - 1);
            let expected = model(&p, r, &entries, &reserved, 0x8_0000_0000, within);
            let before = m.clone();
            let got = p.walk(&mut m, linear, r);
            prop_assert_eq!(got.map(|w| w.physical), expected);
            if let Ok(w) = got {
                prop_assert_eq!(w.shift, shift);
                for i in 0..depth {
                    let at = 0x1000 + i as u64 * 0x1000 + (i as u64 + 1) * 8;
                    let dirty = if i == depth - 1 && r.write { 0x40 } else { 0 };
                    prop_assert_eq!(m.0[&at], before.0[&at] | 0x20 | dirty);
                }
                prop_assert_eq!(w.global, p.global_pages && entries[depth - 1] & 0x100 != 0);
                prop_assert_eq!(w.dirty, entries[depth - 1] & 0x40 != 0 || r.write);
            } else {
                // A fault leaves the last entry as it was.
                let at = 0x1000 + (depth as u64 - 1) * 0x1000 + depth as u64 * 8;
                prop_assert_eq!(m.0[&at], before.0[&at]);
            }
        }

        #[test]
        fn pae_agrees_with_the_manuals_tables(
            p in any_paging(PagingMode::Pae), r in any_request(),
            bits in prop::array::uniform2(any_bits()), large in any::<bool>(), offset in 0..0x1000u64,
        ) {
            let linear = 3u64 << 21 | 4 << 12 | offset;
            let mut m = Memory::default();
            let mut entries = vec![bits[0] | if large { 0x4000_0080 } else { 0x3000 }];
            m.0.insert(0x2018, entries[0]);
            if !large {
                entries.push(bits[1] | 0x4000_0000);
                m.0.insert(0x3020, entries[1]);
            }
            let nx = if p.no_execute { 0 } else { 1 << 63 };
            let high = nx | ((1u64 << 63) - (1 << PHYSICAL_BITS));
            let within = linear & if large { 0x1f_ffff } else { 0xfff };
            let expected = model(&p, r, &entries, &[high; 2], 0x4000_0000, within);
            prop_assert_eq!(p.walk(&mut m, linear, r).map(|w| w.physical), expected);
        }

        #[test]
        fn thirty_two_bits_agree_with_the_manuals_tables(
            p in any_paging(PagingMode::Bits32), r in any_request(),
            bits in prop::array::uniform2(0..8u64), large in any::<bool>(), offset in 0..0x1000u64,
        ) {
            let linear = 3u64 << 22 | 5 << 12 | offset;
            let mut m = Memory::default();
            let first = bits[0] | if large { 0x4000_0080 } else { 0x3000 };
            m.0.insert(0x1008, first << 32);
            let mut entries = vec![first];
            let is_large = large && p.large_pages;
            if !is_large {
                // Without PSE the entry with bit 7 set points to a table at its address.
                let table = if large { 0x4000_0000 } else { 0x3000 };
                entries.push(bits[1] | 0x5000);
                m.0.insert(table + 0x10, entries[1] << 32);
            }
            let (base, within) = if is_large { (0x4000_0000, linear & 0x3f_ffff) } else { (0x5000, offset) };
            let expected = model(&p, r, &entries, &[0; 2], base, within);
            prop_assert_eq!(p.walk(&mut m, linear, r).map(|w| w.physical), expected);
        }
    }

    #[test]
    fn large_pages_check_their_reserved_bits() {
        let p = Paging {
            mode: PagingMode::Level4,
            cr3: 0x1000,
            ..Paging::default()
        };
        let r = Request {
            write: false,
            fetch: false,
            user: false,
            smap: false,
        };
        let mut m = Memory::default();
        m.0.insert(0x1000, 0x2003);
        m.0.insert(0x2000, 0x4000_0083);
        assert_eq!(p.walk(&mut m, 0x12_3456, r).unwrap().physical, 0x4012_3456);
        // PAT (bit 12) is no reserved bit, bit 13 is.
        m.0.insert(0x2000, 0x4000_1083);
        assert_eq!(p.walk(&mut m, 0x12_3456, r).unwrap().physical, 0x4012_3456);
        m.0.insert(0x2000, 0x4000_2083);
        assert_eq!(p.walk(&mut m, 0x12_3456, r), Err(9));
        m.0.insert(0x2000, 0x3003);
        m.0.insert(0x3000, 0x4010_0083);
        assert_eq!(p.walk(&mut m, 0x12_3456, r), Err(9));
        m.0.insert(0x1000, 0x2083);
        assert_eq!(p.walk(&mut m, 0, r), Err(9));
        let p = Paging {
            mode: PagingMode::Bits32,
            cr3: 0x1000,
            large_pages: true,
            ..p
        };
        m.0.insert(0x1000, 0x0020_0083);
        assert_eq!(p.walk(&mut m, 0, r), Err(9));
        m.0.insert(0x1000, 0x0040_6083);
        assert_eq!(p.walk(&mut m, 0x1234, r).unwrap().physical, 0x3_0040_1234);
    }

    #[test]
    fn pdptes_are_checked_when_loaded() {
        let mut m = Memory::default();
        m.0.insert(0x1020, 0x2001);
        m.0.insert(0x1028, 0x1e6); // not present: nothing is reserved
        assert_eq!(
            Paging::load_pdptes(&mut m, 0x1020),
            Some([0x2001, 0x1e6, 0, 0])
        );
        m.0.insert(0x1030, 0x2003);
        assert_eq!(Paging::load_pdptes(&mut m, 0x1020), None);
        let p = Paging {
            mode: PagingMode::Pae,
            pdpte: [0; 4],
            ..Paging::default()
        };
        let r = Request {
            write: true,
            fetch: false,
            user: true,
            smap: false,
        };
        assert_eq!(p.walk(&mut m, 0, r), Err(6));
    }

    #[test]
    fn without_paging_addresses_are_physical() {
        let p = Paging::default();
        let r = Request {
            write: true,
            fetch: false,
            user: true,
            smap: false,
        };
        assert_eq!(
            p.walk(&mut Memory::default(), 0xffff_fff0, r)
                .unwrap()
                .physical,
            0xffff_fff0
        );
    }
}
