//! A port: its registers, its command slots, and the commands that run.

use std::sync::{Arc, Weak};

use block::{Disk, ErrorKind, IoBuf};
use guest_memory::GuestMemory;
use parking_lot::Mutex;

use super::disk::{AtaDisk, DiskLink};
use super::spec::*;
use super::{Hub, PORTS};
use crate::ata::spec::*;
use crate::ata::{BLOCK, Identity, Registers, Work, decode, identify, is_queued};

/// Bytes that a command moves at a time.
const PIECE: usize = 1 << 20;

/// Volatile guest state.
#[derive(Debug, Clone)]
struct State {
    clb: u64,
    fb: u64,
    is: u32,
    ie: u32,
    cmd: u32,
    tfd: u32,
    sig: u32,
    ssts: u32,
    sctl: u32,
    serr: u32,
    sact: u32,
    ci: u32,
    /// The slot whose command, not a queued one, runs.
    running: Option<u32>,
    /// Slots whose queued commands run.
    queued: u32,
    /// A command has failed: nothing starts until the port is stopped.
    halted: bool,
    /// A software reset has begun.
    resetting: bool,
    write_cache: bool,
    /// The last failed queued command: its tag, error and address.
    failed: Option<(u32, u8, u64)>,
}

impl State {
    fn new(present: bool) -> Self {
        let mut state = Self {
            clb: 0,
            fb: 0,
            is: 0,
            ie: 0,
            cmd: CMD_SUD | CMD_POD,
            tfd: TFD_NONE,
            sig: SIG_NONE,
            ssts: 0,
            sctl: 0,
            serr: 0,
            sact: 0,
            ci: 0,
            running: None,
            queued: 0,
            halted: false,
            resetting: false,
            write_cache: true,
            failed: None,
        };
        if present {
            state.connect();
        }
        state
    }

    /// The link has come up, and the disk has told what it is.
    fn connect(&mut self) {
        self.ssts = SSTS_PRESENT;
        self.serr |= SERR_X;
        self.tell_signature();
    }

    fn tell_signature(&mut self) {
        self.sig = SIG_ATA;
        self.set_task_file(STATUS_READY | STATUS_SEEK_COMPLETE, 1);
    }

    fn set_task_file(&mut self, status: u8, error: u8) {
        self.tfd = u32::from(error) << 8 | u32::from(status);
    }

    /// All status, with the bit that follows another register.
    fn status(&self) -> u32 {
        self.is | if self.serr & SERR_X != 0 { IS_PCS } else { 0 }
    }

    fn forget_commands(&mut self) {
        self.ci = 0;
        self.sact = 0;
        self.running = None;
        self.queued = 0;
        self.halted = false;
        self.tfd &= !u32::from(STATUS_BUSY);
    }
}

/// What tasks and the port both count, beside the guest's state.
#[derive(Debug, Default)]
struct Flight {
    /// Rises when the commands that run are forgotten: what they do afterwards is not the guest's business.
    epoch: u64,
    /// Tasks that have not ended, of all epochs.
    tasks: u32,
    /// Those of them that are of earlier epochs.
    forgotten: u32,
}

impl Flight {
    /// Forgets the commands that run. Their tasks go on to their next step.
    fn forget(&mut self) {
        self.epoch += 1;
        self.forgotten = self.tasks;
    }

    /// A task of an epoch has ended. True if its command is still the guest's business.
    fn land(&mut self, epoch: u64) -> bool {
        self.tasks -= 1;
        let wanted = epoch == self.epoch;
        if !wanted {
            self.forgotten -= 1;
        }
        wanted
    }
}

struct Inner {
    state: State,
    flight: Flight,
}

/// What a port knows of its disk.
struct Plugged {
    link: DiskLink,
    identity: Identity,
    read_only: bool,
}

/// A port.
pub(super) struct Port {
    number: usize,
    hub: Arc<Hub>,
    memory: GuestMemory,
    disk: Option<Plugged>,
    own: Weak<Self>,
    inner: Mutex<Inner>,
}

/// Where a command's data is in guest memory, and how a task names its command.
struct Command {
    slot: u32,
    epoch: u64,
    queued: bool,
    table: u64,
    prd_count: u32,
    registers: Registers,
    work: Work,
}

/// How a command ended well.
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    bytes: u32,
    /// The guest sees a PIO setup FIS.
    pio_in: bool,
    /// An answer in the address registers.
    lba: Option<u64>,
    /// An answer in the count register.
    count: Option<u16>,
}

/// How a command failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The disk's error register.
    Disk(u8),
    /// The memory that the guest named is not there.
    Memory,
    /// The command was forgotten meanwhile.
    Forgotten,
}

impl Port {
    pub(super) fn new(
        number: usize,
        hub: Arc<Hub>,
        memory: GuestMemory,
        disk: Option<&AtaDisk>,
    ) -> Arc<Self> {
        debug_assert!(number < PORTS);
        let disk = disk.map(|disk| {
            let sector = disk.limits.logical_block_size.max(BLOCK as u32);
            Plugged {
                link: disk.link.clone(),
                read_only: disk.limits.read_only,
                identity: Identity {
                    sector,
                    physical: disk.limits.physical_block_size.max(sector),
                    sectors: disk.limits.size / u64::from(sector),
                    serial: disk.serial.clone(),
                    model: "Corten disk".into(),
                    trim: disk.limits.discard_granularity != 0,
                    write_cache: true,
                },
            }
        });
        let inner = Mutex::new(Inner {
            state: State::new(disk.is_some()),
            flight: Flight::default(),
        });
        Arc::new_cyclic(|own| Self {
            number,
            hub,
            memory,
            disk,
            own: own.clone(),
            inner,
        })
    }

    /// Tasks that have not ended.
    #[cfg(test)]
    pub(super) fn tasks(&self) -> u32 {
        self.inner.lock().flight.tasks
    }

    pub(super) fn reset(&self) {
        let mut inner = self.inner.lock();
        inner.flight.forget();
        inner.state = State::new(self.disk.is_some());
        self.sync(&inner.state, false);
    }

    /// Tells the controller of the port's interrupt. `event` when something has happened just now.
    fn sync(&self, state: &State, event: bool) {
        let pending = state.status() & state.ie != 0;
        self.hub.port_status(self.number, pending, event);
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        let inner = self.inner.lock();
        let state = &inner.state;
        match register {
            PX_CLB => state.clb as u32,
            PX_CLBU => (state.clb >> 32) as u32,
            PX_FB => state.fb as u32,
            PX_FBU => (state.fb >> 32) as u32,
            PX_IS => state.status(),
            PX_IE => state.ie,
            PX_CMD => {
                let receiving = state.cmd & CMD_FRE != 0;
                let listing = state.cmd & CMD_ST != 0 || inner.flight.tasks > 0;
                let slot = state.running.unwrap_or(0) << 8;
                state.cmd
                    | if receiving { CMD_FR } else { 0 }
                    | if listing { CMD_CR | slot } else { 0 }
            }
            PX_TFD => state.tfd,
            PX_SIG => state.sig,
            PX_SSTS => state.ssts,
            PX_SCTL => state.sctl,
            PX_SERR => state.serr,
            PX_SACT => state.sact,
            PX_CI => state.ci,
            _ => 0,
        }
    }

    pub(super) fn write(&self, register: u64, value: u32) {
        let mut inner = self.inner.lock();
        let state = &mut inner.state;
        let low = |old: u64, mask: u32| old & !0xffff_ffff | u64::from(value & mask);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match register {
            PX_CLB => state.clb = low(state.clb, !0x3ff),
            PX_CLBU => state.clb = high(state.clb),
            PX_FB => state.fb = low(state.fb, !0xff),
            PX_FBU => state.fb = high(state.fb),
            PX_IS => state.is &= !value,
            PX_IE => state.ie = value & IE_WRITABLE,
            PX_CMD => self.write_command(&mut inner, value),
            PX_SCTL => self.write_control(&mut inner, value),
            PX_SERR => state.serr &= !value,
            PX_SACT if state.cmd & CMD_ST != 0 => state.sact |= value,
            PX_CI if state.cmd & CMD_ST != 0 => state.ci |= value,
            _ => {}
        }
        self.start_commands(&mut inner);
        self.sync(&inner.state, false);
    }

    fn write_command(&self, inner: &mut Inner, value: u32) {
        let state = &mut inner.state;
        let stops = state.cmd & !value & CMD_ST != 0;
        state.cmd = CMD_SUD | CMD_POD | value & CMD_WRITABLE;
        if value & CMD_CLO != 0 {
            // Busy and data request.
            state.tfd &= !0x88;
        }
        if stops {
            inner.flight.forget();
            state.forget_commands();
        }
    }

    fn write_control(&self, inner: &mut Inner, value: u32) {
        let state = &mut inner.state;
        let before = state.sctl & SCTL_DET;
        state.sctl = value & 0xfff;
        let now = state.sctl & SCTL_DET;
        if now == 1 && before != 1 {
            inner.flight.forget();
            state.forget_commands();
            state.ssts = 0;
            state.set_task_file(STATUS_BUSY, 0);
        } else if now == 0 && before == 1 && self.disk.is_some() {
            state.connect();
            self.send_register_fis(state, &Done::default(), false);
        }
        if self.disk.is_none() {
            state.tfd = TFD_NONE;
        }
    }

    /// Starts what waits, if the port can now.
    pub(super) fn kick(&self) {
        let mut inner = self.inner.lock();
        self.start_commands(&mut inner);
        self.sync(&inner.state, false);
    }

    fn start_commands(&self, inner: &mut Inner) {
        loop {
            let state = &inner.state;
            let idle = state.running.is_none() && !state.halted && state.cmd & CMD_ST != 0;
            if !idle || state.ci == 0 || self.disk.is_none() {
                return;
            }
            // A guest that does not wait for PxCMD.CR may not pile up what it has given up.
            if inner.flight.forgotten != 0 || !self.hub.function.is_bus_master() {
                return;
            }
            let slot = state.ci.trailing_zeros();
            if !self.start(inner, slot) {
                return;
            }
        }
    }

    /// Starts the command in a slot, or ends it at once. False when it has to wait.
    fn start(&self, inner: &mut Inner, slot: u32) -> bool {
        let Some((fis, table, prd_count)) = self.fetch(&inner.state, slot) else {
            self.fail(inner, slot, false, 0, Failure::Memory);
            return false;
        };
        if fis[0] != FIS_H2D || fis[1] & FIS_COMMAND == 0 {
            self.control(&mut inner.state, slot, fis[15]);
            return true;
        }
        let registers = Registers::from_fis(&fis);
        let queued = is_queued(registers.command) && inner.state.sact & 1 << slot != 0;
        if queued && inner.state.queued & 1 << slot != 0 {
            // The disk has a command with this tag.
            inner.state.ci &= !(1 << slot);
            let abort = Failure::Disk(ERROR_ABORT);
            self.fail(inner, slot, true, registers.lba, abort);
            return false;
        }
        if !queued && inner.state.queued != 0 {
            return false;
        }
        let mut work = decode(&registers);
        if is_queued(registers.command) && !queued {
            work = Work::Abort;
        }
        let state = &mut inner.state;
        if queued {
            // The disk has taken it over.
            state.ci &= !(1 << slot);
            state.queued |= 1 << slot;
        } else {
            state.running = Some(slot);
            state.tfd |= u32::from(STATUS_BUSY);
        }
        let command = Command {
            slot,
            epoch: inner.flight.epoch,
            queued,
            table,
            prd_count,
            registers,
            work,
        };
        if let Some(result) = self.run_here(state, &command) {
            self.end(inner, &command, result);
        } else if let (Some(disk), Some(own)) = (&self.disk, self.own.upgrade()) {
            inner.flight.tasks += 1;
            disk.link.spawn(move |disk| async move {
                let result = match disk {
                    Some(disk) => own.run_on_disk(&disk, &command).await,
                    None => Err(Failure::Disk(ERROR_ABORT)),
                };
                own.task_ended(&command, result);
            });
        }
        true
    }

    /// Reads a slot's header and its command FIS: with the table's address and its number of region descriptors.
    fn fetch(&self, state: &State, slot: u32) -> Option<([u8; 20], u64, u32)> {
        let at = state.clb.checked_add(u64::from(slot) * HEADER_SIZE)?;
        let mut header = [0; 16];
        self.memory.read(at, &mut header).ok()?;
        let word =
            |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let table = u64::from(word(12)) << 32 | u64::from(word(8) & !0x7f);
        let mut fis = [0; 20];
        self.memory.read(table, &mut fis).ok()?;
        Some((fis, table, word(0) >> 16))
    }

    /// A FIS that updates the device control register: software reset.
    fn control(&self, state: &mut State, slot: u32, control: u8) {
        state.ci &= !(1 << slot);
        let reset = control & CONTROL_SRST != 0;
        if state.resetting && !reset {
            state.tell_signature();
            self.send_register_fis(state, &Done::default(), false);
        }
        state.resetting = reset;
    }

    /// Does what needs no disk. `None` for the rest.
    fn run_here(&self, state: &mut State, command: &Command) -> Option<Result<Done, Failure>> {
        let disk = self.disk.as_ref()?;
        let last = disk.identity.sectors.saturating_sub(1);
        Some(match command.work {
            Work::Abort => Err(Failure::Disk(ERROR_ABORT)),
            Work::Nothing => Ok(Done::default()),
            Work::PowerMode => Ok(Done {
                count: Some(0xff),
                ..Done::default()
            }),
            Work::NativeMax { wide } => Ok(Done {
                lba: Some(if wide { last } else { last.min(0x0fff_ffff) }),
                ..Done::default()
            }),
            Work::WriteCache(on) => {
                state.write_cache = on;
                Ok(Done::default())
            }
            Work::Identify => {
                let identity = Identity {
                    write_cache: state.write_cache,
                    ..disk.identity.clone()
                };
                self.give_block(command, &identify(&identity), true)
            }
            Work::NcqErrorLog => self.give_block(command, &error_log(state.failed.take()), false),
            Work::Transfer { write: true, .. } | Work::Trim { .. } if disk.read_only => {
                Err(Failure::Disk(ERROR_ABORT))
            }
            _ => return None,
        })
    }

    fn give_block(
        &self,
        command: &Command,
        block: &[u8; BLOCK],
        pio_in: bool,
    ) -> Result<Done, Failure> {
        let mut regions = self.regions(command, BLOCK)?;
        regions.copy_out(&self.memory, block)?;
        Ok(Done {
            bytes: BLOCK as u32,
            pio_in,
            ..Done::default()
        })
    }

    /// The guest's memory for `bytes` of data.
    fn regions(&self, command: &Command, bytes: usize) -> Result<Regions, Failure> {
        let mut list = Vec::new();
        let mut left = bytes as u64;
        for n in 0..u64::from(command.prd_count) {
            if left == 0 {
                break;
            }
            let at = command.table.checked_add(PRDT + n * PRD_SIZE);
            let mut entry = [0; PRD_SIZE as usize];
            let at = at.ok_or(Failure::Memory)?;
            if self.memory.read(at, &mut entry).is_err() {
                return Err(Failure::Memory);
            }
            let address: [u8; 8] = std::array::from_fn(|i| entry[i]);
            let count: [u8; 4] = std::array::from_fn(|i| entry[12 + i]);
            let len = u64::from(u32::from_le_bytes(count) & PRD_COUNT) + 1;
            let len = len.min(left);
            list.push((u64::from_le_bytes(address) & !1, len));
            left -= len;
        }
        if left != 0 {
            // Too little memory for the data.
            return Err(Failure::Memory);
        }
        list.reverse();
        Ok(Regions(list))
    }

    async fn run_on_disk(&self, disk: &Disk, command: &Command) -> Result<Done, Failure> {
        let plugged = self.disk.as_ref().ok_or(Failure::Forgotten)?;
        let sectors_of_disk = plugged.identity.sectors;
        let in_range = |lba: u64, sectors: u32| {
            let end = lba.checked_add(sectors.into());
            match end.filter(|end| *end <= sectors_of_disk) {
                Some(_) => Ok(()),
                None => Err(Failure::Disk(ERROR_ID_NOT_FOUND)),
            }
        };
        match command.work {
            Work::Transfer {
                write,
                lba,
                sectors,
                through,
                pio,
            } => {
                in_range(lba, sectors)?;
                let sector = plugged.identity.sector;
                let bytes = sectors as usize * sector as usize;
                let offset = lba * u64::from(sector);
                self.transfer(disk, command, write, offset, bytes).await?;
                // Without the write cache everything is stable before it ends.
                if write && (through || !self.inner.lock().state.write_cache) {
                    disk.flush().await.map_err(disk_failure)?;
                }
                Ok(Done {
                    bytes: bytes as u32,
                    pio_in: pio && !write,
                    ..Done::default()
                })
            }
            Work::Verify { lba, sectors } => in_range(lba, sectors).map(|()| Done::default()),
            Work::Trim { blocks } => {
                let mut ranges = vec![0; usize::from(blocks) * BLOCK];
                let mut regions = self.regions(command, ranges.len())?;
                regions.copy_in(&self.memory, &mut ranges)?;
                for range in ranges.chunks_exact(8) {
                    let range = u64::from_le_bytes(std::array::from_fn(|i| range[i]));
                    let (lba, sectors) = (range & 0xffff_ffff_ffff, (range >> 48) as u32);
                    if sectors == 0 {
                        continue;
                    }
                    in_range(lba, sectors)?;
                    let sector = u64::from(plugged.identity.sector);
                    let done = disk.discard(lba * sector, u64::from(sectors) * sector);
                    done.await.map_err(disk_failure)?;
                }
                Ok(Done::default())
            }
            Work::Flush => {
                disk.flush().await.map_err(disk_failure)?;
                Ok(Done::default())
            }
            _ => Err(Failure::Disk(ERROR_ABORT)),
        }
    }

    async fn transfer(
        &self,
        disk: &Disk,
        command: &Command,
        write: bool,
        offset: u64,
        bytes: usize,
    ) -> Result<(), Failure> {
        let mut regions = self.regions(command, bytes)?;
        let mut done = 0;
        while done < bytes {
            let step = PIECE.min(bytes - done);
            let buffer = IoBuf::zeroed(step);
            let at = offset + done as u64;
            let mut data = vec![0; step];
            if write {
                self.still_wanted(command)?;
                regions.copy_in(&self.memory, &mut data)?;
                buffer.copy_from(&data);
                let written = disk.write(at, buffer, false).await;
                written.map_err(disk_failure)?;
            } else {
                disk.read(at, buffer.clone()).await.map_err(disk_failure)?;
                buffer.copy_to(&mut data);
                // With the port locked: a guest that has stopped it may use the memory for something else.
                let inner = self.inner.lock();
                if inner.flight.epoch != command.epoch {
                    return Err(Failure::Forgotten);
                }
                regions.copy_out(&self.memory, &data)?;
            }
            done += step;
        }
        Ok(())
    }

    fn still_wanted(&self, command: &Command) -> Result<(), Failure> {
        if self.inner.lock().flight.epoch == command.epoch {
            Ok(())
        } else {
            Err(Failure::Forgotten)
        }
    }

    fn task_ended(&self, command: &Command, result: Result<Done, Failure>) {
        let mut inner = self.inner.lock();
        let wanted = inner.flight.land(command.epoch);
        if wanted {
            self.end(&mut inner, command, result);
        }
        self.start_commands(&mut inner);
        self.sync(&inner.state, wanted);
    }

    fn end(&self, inner: &mut Inner, command: &Command, result: Result<Done, Failure>) {
        let Command { slot, queued, .. } = *command;
        let done = match result {
            Ok(done) => done,
            Err(failure) => {
                self.fail(inner, slot, queued, command.registers.lba, failure);
                return;
            }
        };
        let state = &mut inner.state;
        let bit = 1 << slot;
        state.set_task_file(STATUS_READY | STATUS_SEEK_COMPLETE, 0);
        if queued {
            state.queued &= !bit;
            state.sact &= !bit;
            self.send_device_bits(state, bit);
            return;
        }
        state.ci &= !bit;
        state.running = None;
        // The byte count in the slot's header.
        let at = state.clb + u64::from(slot) * HEADER_SIZE + 4;
        let _ = self.memory.write(at, &done.bytes.to_le_bytes());
        if done.pio_in {
            self.send_pio_setup(state, done.bytes);
        } else {
            self.send_register_fis(state, &done, true);
        }
        self.sync(state, true);
    }

    fn fail(&self, inner: &mut Inner, slot: u32, queued: bool, lba: u64, failure: Failure) {
        let state = &mut inner.state;
        state.halted = true;
        let error = match failure {
            Failure::Forgotten => return,
            Failure::Memory => {
                state.is |= IS_HBFS;
                ERROR_ABORT
            }
            Failure::Disk(error) => error,
        };
        let status = STATUS_READY | STATUS_SEEK_COMPLETE | STATUS_ERR;
        state.set_task_file(status, error);
        state.running = None;
        if queued {
            state.failed = Some((slot, error, lba));
            // The disk gives the others up with it.
            inner.flight.forget();
            state.queued = 0;
            self.send_device_bits(state, 0);
        } else {
            self.send_register_fis(state, &Done::default(), true);
        }
        state.is |= IS_TFES;
        self.sync(state, true);
    }

    /// Puts a FIS into the guest's memory, if it receives any.
    fn receive(&self, state: &State, offset: u64, fis: &[u8]) {
        if state.cmd & CMD_FRE != 0
            && let Some(at) = state.fb.checked_add(offset)
        {
            // A guest that names no memory gets no FIS.
            let _ = self.memory.write(at, fis);
        }
    }

    fn send_register_fis(&self, state: &mut State, done: &Done, interrupt: bool) {
        let [status, error, ..] = state.tfd.to_le_bytes();
        // Without an answer, the signature's values.
        let lba = done.lba.unwrap_or(1).to_le_bytes();
        let [count, count_high] = done.count.unwrap_or(1).to_le_bytes();
        let flags = if interrupt { FIS_INTERRUPT } else { 0 };
        let fis = [
            FIS_D2H, flags, status, error, lba[0], lba[1], lba[2], 0, lba[3], lba[4], lba[5], 0,
            count, count_high, 0, 0, 0, 0, 0, 0,
        ];
        self.receive(state, RFIS_D2H, &fis);
        if interrupt {
            state.is |= IS_DHRS;
        }
    }

    fn send_pio_setup(&self, state: &mut State, bytes: u32) {
        let [status, error, ..] = state.tfd.to_le_bytes();
        let mut fis = [0; 20];
        fis[0] = FIS_PIO;
        fis[1] = FIS_INTERRUPT | FIS_TO_HOST;
        fis[2] = status | 0x08; // data request
        fis[3] = error;
        fis[15] = status;
        fis[16..18].copy_from_slice(&(bytes.min(0xffff) as u16).to_le_bytes());
        self.receive(state, RFIS_PIO, &fis);
        state.is |= IS_PSS;
    }

    fn send_device_bits(&self, state: &mut State, finished: u32) {
        let [status, error, ..] = state.tfd.to_le_bytes();
        let mut fis = [FIS_SDB, FIS_INTERRUPT, status & 0x77, error, 0, 0, 0, 0];
        fis[4..].copy_from_slice(&finished.to_le_bytes());
        self.receive(state, RFIS_SDB, &fis);
        state.is |= IS_SDBS;
    }
}

fn disk_failure(error: block::BlockError) -> Failure {
    Failure::Disk(match error.kind() {
        ErrorKind::OutOfRange => ERROR_ID_NOT_FOUND,
        ErrorKind::ReadOnly | ErrorKind::Misaligned => ERROR_ABORT,
        _ => ERROR_UNCORRECTABLE,
    })
}

/// The queued error log (ACS-3, section A.14).
fn error_log(failed: Option<(u32, u8, u64)>) -> [u8; BLOCK] {
    let mut log = [0; BLOCK];
    match failed {
        None => log[0] = 0x80, // no queued command has failed
        Some((tag, error, lba)) => {
            let lba = lba.to_le_bytes();
            log[0] = tag as u8;
            log[2] = STATUS_READY | STATUS_SEEK_COMPLETE | STATUS_ERR;
            log[3] = error;
            log[4..7].copy_from_slice(&lba[..3]);
            log[8..11].copy_from_slice(&lba[3..6]);
        }
    }
    let sum = log.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    log[511] = sum.wrapping_neg();
    log
}

/// Pieces of guest memory that are used up from the end of the list.
struct Regions(Vec<(u64, u64)>);

impl Regions {
    /// Goes through the next `len` bytes as pieces: the guest's address and the range of the data.
    fn walk(
        &mut self,
        len: usize,
        mut each: impl FnMut(u64, std::ops::Range<usize>) -> bool,
    ) -> Result<(), Failure> {
        let mut done = 0;
        while done < len {
            let (address, left) = self.0.pop().ok_or(Failure::Memory)?;
            let step = left.min((len - done) as u64);
            if !each(address, done..done + step as usize) {
                return Err(Failure::Memory);
            }
            done += step as usize;
            if step < left {
                let next = address.checked_add(step).ok_or(Failure::Memory)?;
                self.0.push((next, left - step));
            }
        }
        Ok(())
    }

    fn copy_out(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), Failure> {
        self.walk(data.len(), |at, range| {
            memory.write(at, &data[range]).is_ok()
        })
    }

    fn copy_in(&mut self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), Failure> {
        self.walk(data.len(), |at, range| {
            memory.read(at, &mut data[range]).is_ok()
        })
    }
}
