//! Which frames the guest wants (section 5.1.6.5.1 to 5.1.6.5.3).

/// A hardware address.
pub(super) type Mac = [u8; 6];

/// The most addresses that are kept of a table; a larger one lets everything of its kind pass.
pub(super) const TABLE: usize = 64;

/// The start of a frame that the filter looks at: addresses, type, VLAN tag.
pub(super) const LOOKED_AT: usize = 16;

/// One table of addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct MacTable {
    pub(super) list: Vec<Mac>,
    pub(super) overflow: bool,
}

impl MacTable {
    fn has(&self, mac: &Mac) -> bool {
        self.overflow || self.list.contains(mac)
    }
}

/// The receive filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RxFilter {
    pub(super) mac: Mac,
    /// The modes that `VIRTIO_NET_CTRL_RX` sets, by command number.
    pub(super) modes: [bool; 6],
    pub(super) unicast: MacTable,
    pub(super) multicast: MacTable,
    /// One bit for each VLAN; `None` lets all pass.
    pub(super) vlans: Option<Box<[u64; 64]>>,
}

const PROMISC: usize = 0;
const ALL_MULTI: usize = 1;
const ALL_UNI: usize = 2;
const NO_MULTI: usize = 3;
const NO_UNI: usize = 4;
const NO_BROADCAST: usize = 5;

const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];

impl RxFilter {
    /// Lets everything pass until the driver says what it wants.
    pub(super) fn open(mac: Mac) -> Self {
        let mut modes = [false; 6];
        modes[PROMISC] = true;
        Self {
            mac,
            modes,
            unicast: MacTable::default(),
            multicast: MacTable::default(),
            vlans: None,
        }
    }

    /// Whether a frame that starts so passes.
    pub(super) fn passes(&self, frame: &[u8; LOOKED_AT]) -> bool {
        let [d0, d1, d2, d3, d4, d5, .., t0, t1, v0, v1] = *frame;
        if let Some(vlans) = &self.vlans
            && [t0, t1] == ETHERTYPE_VLAN
        {
            let id = usize::from(u16::from_be_bytes([v0, v1]) & 0xfff);
            if vlans[id / 64] >> (id % 64) & 1 == 0 {
                return false;
            }
        }
        let to = [d0, d1, d2, d3, d4, d5];
        let modes = &self.modes;
        if modes[PROMISC] {
            true
        } else if to == [0xff; 6] {
            !modes[NO_BROADCAST]
        } else if d0 & 1 != 0 {
            !modes[NO_MULTI] && (modes[ALL_MULTI] || self.multicast.has(&to))
        } else {
            !modes[NO_UNI] && (modes[ALL_UNI] || to == self.mac || self.unicast.has(&to))
        }
    }

    /// Lets a VLAN pass, or not any more.
    pub(super) fn set_vlan(&mut self, id: u16, pass: bool) -> bool {
        let (word, bit) = (usize::from(id / 64), 1 << (id % 64));
        let Some(vlans) = self.vlans.as_mut() else {
            return false;
        };
        match vlans.get_mut(word) {
            Some(bits) if pass => *bits |= bit,
            Some(bits) => *bits &= !bit,
            None => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: Mac, vlan: Option<u16>) -> [u8; LOOKED_AT] {
        let mut frame = [0; LOOKED_AT];
        frame[..6].copy_from_slice(&to);
        if let Some(id) = vlan {
            frame[12..14].copy_from_slice(&ETHERTYPE_VLAN);
            frame[14..].copy_from_slice(&(id | 0x2000).to_be_bytes());
        }
        frame
    }

    #[test]
    fn modes_tables_and_vlans_decide() {
        let own = [2, 0, 0, 0, 0, 1];
        let other = [2, 0, 0, 0, 0, 2];
        let group = [1, 0, 0x5e, 0, 0, 1];
        let mut filter = RxFilter::open(own);
        assert!(filter.passes(&frame(other, None)));
        filter.modes[PROMISC] = false;
        let passing =
            |f: &RxFilter| [own, other, group, [0xff; 6]].map(|m| f.passes(&frame(m, None)));
        assert_eq!(passing(&filter), [true, false, false, true]);
        filter.unicast.list.push(other);
        filter.multicast.overflow = true;
        assert_eq!(passing(&filter), [true; 4]);
        filter.modes[NO_UNI] = true;
        filter.modes[NO_MULTI] = true;
        filter.modes[NO_BROADCAST] = true;
        assert_eq!(passing(&filter), [false; 4]);
        filter.modes[PROMISC] = true;
        assert!(!filter.set_vlan(7, true));
        filter.vlans = Some(Box::new([0; 64]));
        assert!(!filter.passes(&frame(own, Some(7))));
        assert!(filter.passes(&frame(own, None)));
        assert!(filter.set_vlan(7, true) && !filter.set_vlan(4096, true));
        assert!(filter.passes(&frame(own, Some(7))));
        assert!(filter.set_vlan(7, false));
        assert!(!filter.passes(&frame(own, Some(7))));
    }
}
