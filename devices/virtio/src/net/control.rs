//! The control queue (section 5.1.6.5).

use std::sync::atomic::Ordering;

use super::filter::{MacTable, TABLE};
use super::spec::{ANNOUNCE, config, control, feature};
use super::{Shared, guest_offloads};
use crate::queue::{Buffers, Chain};

/// The longest command that is looked at: a MAC table of a thousand entries and more.
const MAX_COMMAND: usize = 16 << 10;

/// Why a command is not done. The driver sees no more than that.
struct Refused;

/// Reads a command's data from its start.
struct Data<'a> {
    bytes: &'a [u8],
}

impl Data<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Refused> {
        let (head, rest) = self.bytes.split_first_chunk::<N>().ok_or(Refused)?;
        self.bytes = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, Refused> {
        self.take().map(u16::from_le_bytes)
    }

    fn table(&mut self) -> Result<MacTable, Refused> {
        let entries = u32::from_le_bytes(self.take()?) as usize;
        let len = entries.checked_mul(6).ok_or(Refused)?;
        let (macs, rest) = self.bytes.split_at_checked(len).ok_or(Refused)?;
        self.bytes = rest;
        if entries > TABLE {
            return Ok(MacTable {
                list: Vec::new(),
                overflow: true,
            });
        }
        Ok(MacTable {
            list: macs.as_chunks().0.to_vec(),
            overflow: false,
        })
    }
}

/// Does the command in a chain and writes its acknowledgement.
///
/// # Errors
/// What the chain lacks.
pub(super) fn serve(shared: &Shared, chain: &Chain) -> Result<u32, &'static str> {
    if chain.writable.is_empty() {
        return Err("a network command without room for its acknowledgement");
    }
    let [class, command] = chain
        .readable
        .array_at(0)
        .ok_or("a network command without its class")?;
    let data: Buffers = chain.readable.part(2, MAX_COMMAND);
    let bytes = data.to_vec(MAX_COMMAND);
    let mut data = Data { bytes: &bytes };
    let ack = match run(shared, class, command, &mut data) {
        Ok(()) => control::OK,
        Err(Refused) => control::ERR,
    };
    chain.writable.write_at(0, &[ack]);
    Ok(1)
}

fn run(shared: &Shared, class: u8, command: u8, data: &mut Data<'_>) -> Result<(), Refused> {
    let features = shared.features.load(Ordering::Acquire);
    let need = |bits: u64| {
        if features & bits == 0 {
            Err(Refused)
        } else {
            Ok(())
        }
    };
    match (class, command) {
        (control::RX, mode @ 0..6) => {
            need(if mode < 2 {
                feature::CTRL_RX
            } else {
                feature::CTRL_RX_EXTRA
            })?;
            let [on] = data.take()?;
            shared.filter.write().modes[usize::from(mode)] = on != 0;
            Ok(())
        }
        (control::MAC, control::MAC_TABLE_SET) => {
            need(feature::CTRL_RX)?;
            let (unicast, multicast) = (data.table()?, data.table()?);
            let mut filter = shared.filter.write();
            (filter.unicast, filter.multicast) = (unicast, multicast);
            Ok(())
        }
        (control::MAC, control::MAC_ADDR_SET) => {
            need(feature::CTRL_MAC_ADDR)?;
            let mac = data.take()?;
            shared.filter.write().mac = mac;
            shared.config.lock()[config::MAC..config::MAC + 6].copy_from_slice(&mac);
            Ok(())
        }
        (control::VLAN, control::VLAN_ADD | control::VLAN_DEL) => {
            let id = data.u16()?;
            let add = command == control::VLAN_ADD;
            let done = shared.filter.write().set_vlan(id, add);
            done.then_some(()).ok_or(Refused)
        }
        (control::ANNOUNCE, 0) => {
            shared.change_status(|status| status & !ANNOUNCE);
            Ok(())
        }
        (control::MQ, 0) => {
            need(feature::MQ)?;
            set_pairs(shared, data.u16()?)
        }
        (control::GUEST_OFFLOADS, 0) => {
            need(feature::CTRL_GUEST_OFFLOADS)?;
            let wanted = u64::from_le_bytes(data.take()?);
            // Those that were negotiated can be switched off and on again.
            if wanted & !features != 0 {
                return Err(Refused);
            }
            shared.accept(guest_offloads(wanted)).map_err(|_| Refused)
        }
        _ => Err(Refused),
    }
}

fn set_pairs(shared: &Shared, pairs: u16) -> Result<(), Refused> {
    if !(1..=shared.max_pairs).contains(&pairs) {
        return Err(Refused);
    }
    shared
        .backend
        .set_active_queues(pairs)
        .map_err(|_| Refused)?;
    shared.active_pairs.store(pairs, Ordering::Release);
    shared.wake_pairs();
    Ok(())
}
