//! Memory that changes under a running guest, and the dirty log.

use std::sync::Arc;

use accel::Accel;
use guest_memory::{Backing, BackingOptions, Region};
use parking_lot::Mutex;

use super::{Test, expect_pass};
use crate::board::{Board, Failure, Io, fail};
use crate::guest;

pub(super) const TESTS: [Test; 2] = [
    Test {
        name: "memory_slots",
        limit: None,
        run: slots,
    },
    Test {
        name: "dirty_log",
        limit: None,
        run: dirty_log,
    },
];

const PLACE: u64 = 0x1000_0000;

fn region(fill: u8, read_only: bool) -> Result<Region, Failure> {
    let size = 0x2000;
    let backing = Arc::new(Backing::new(size, BackingOptions::default()).map_err(fail)?);
    let region = Region {
        base: PLACE,
        size: 0x1000,
        backing,
        // Not the backing's start, so that an accelerator that forgets the offset is found out.
        offset: 0x1000,
        read_only,
    };
    let bytes = vec![fill; 0x1000];
    let memory = guest_memory::GuestMemory::new();
    memory.add(region.clone()).map_err(fail)?;
    memory.load(PLACE, &bytes).map_err(fail)?;
    Ok(region)
}

fn slots(accel: &dyn Accel) -> Result<(), Failure> {
    let (ram, rom) = (region(0x11, false)?, region(0x22, true)?);
    let command = move |io: &Io, command| {
        let done = match command {
            1 => io.memory.add(ram.clone()).map_err(fail),
            2 => io.memory.remove(PLACE).map(drop).map_err(fail),
            _ => io.memory.add(rom.clone()).map_err(fail),
        };
        done.expect("the map changes");
    };
    let mut board = Board::with_command(accel, guest("slots"), 1, command)?;
    expect_pass(&mut board)?;
    let stray = board.io.stray_writes.lock().clone();
    let plain: Vec<_> = stray.iter().filter(|(at, _)| *at == PLACE + 8).collect();
    let one = (PLACE + 8, 0x1234u32.to_le_bytes().to_vec());
    if plain != [&one; 3] {
        return Err(format!("writes to ROM came out as {stray:x?}"));
    }
    Ok(())
}

fn dirty_log(accel: &dyn Accel) -> Result<(), Failure> {
    let seen: Arc<Mutex<Vec<Vec<u64>>>> = Arc::default();
    let log = seen.clone();
    let command = move |io: &Io, command| {
        let backing = io.memory.translate(0).expect("RAM is there").backing;
        if command == 1 {
            backing.start_log();
        }
        io.vm.sync_dirty_log().expect("the host gives its log");
        log.lock().push(backing.take_log());
        if command == 4 {
            backing.stop_log();
            io.vm.sync_dirty_log().expect("the host stops its log");
        }
    };
    let mut board = Board::with_command(accel, guest("dirty"), 1, command)?;
    expect_pass(&mut board)?;
    let data_pages = |log: &Vec<u64>| -> Vec<usize> {
        (0x200..0x400)
            .filter(|page| log[page / 64] >> (page % 64) & 1 != 0)
            .collect()
    };
    let pages: Vec<_> = seen.lock().iter().map(data_pages).collect();
    let wanted = [
        vec![],
        vec![0x210, 0x215, 0x2ff, 0x300],
        vec![],
        vec![0x210],
    ];
    if pages != wanted {
        return Err(format!("dirty pages {pages:x?}, not {wanted:x?}"));
    }
    Ok(())
}
