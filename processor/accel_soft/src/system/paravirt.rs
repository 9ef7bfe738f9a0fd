//! KVM's paravirtual interface (Linux's `Documentation/virt/kvm/x86/`: `cpuid.rst`, `msr.rst`, `hypercalls.rst`).
//!
//! The guest's time-stamp counter and its paravirtual clock both derive from the machine's guest clock, which stands still
//! while the machine is stopped. So the clock's parameters never change behind the guest's back, and it need not be told
//! that it was stopped.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use x86_defs::state::{RAX, RCX, RDX};

use crate::apic::{Event, Message};
use crate::cpu::{Cpu, Op, Result};

/// MSR: wall clock (first number).
pub(super) const WALL_CLOCK_OLD: u32 = 0x11;
/// MSR: system time (first number).
pub(super) const SYSTEM_TIME_OLD: u32 = 0x12;
/// MSR: wall clock.
pub(super) const WALL_CLOCK: u32 = 0x4b56_4d00;
/// MSR: system time.
pub(super) const SYSTEM_TIME: u32 = 0x4b56_4d01;
/// MSR: steal time.
pub(super) const STEAL_TIME: u32 = 0x4b56_4d03;
/// MSR: end of interrupt in memory.
pub(super) const PV_EOI: u32 = 0x4b56_4d04;
/// MSR: host-side polling in HLT.
pub(super) const POLL_CONTROL: u32 = 0x4b56_4d05;

/// CPUID 0x4000_0001 EAX: clock at the old MSRs; no port delays needed; clock at the new MSRs; steal time; EOI in memory;
/// kicks out of HLT; TLB flush on entry; IPIs by hypercall; poll control; directed yield; 15-bit MSI destinations; clock is
/// the same on all processors.
pub(super) const FEATURES: u32 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 9
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 15
    | 1 << 24;

/// Steal time: the vCPU does not run now.
const PREEMPTED: u8 = 1 << 0;
/// Steal time: another vCPU wants the TLB flushed before this one runs again.
const FLUSH_TLB: u8 = 1 << 1;

/// Hypercalls.
mod hypercall {
    pub(crate) const KICK_CPU: u64 = 5;
    pub(crate) const SEND_IPI: u64 = 10;
    pub(crate) const SCHED_YIELD: u64 = 11;
}

/// What hypercalls return.
const ENOSYS: i64 = -1000;
const EPERM: i64 = -1;

/// How often stolen time is brought up to date, in nanoseconds.
const STEAL_PERIOD: u64 = 20_000_000;

/// State of the paravirtual interface.
#[derive(Debug, Default)]
pub(super) struct Paravirtual {
    wall_clock: u64,
    system_time: u64,
    steal_time: u64,
    eoi: u64,
    poll_control: u64,
    /// The guest has been told that it may end the interrupt in service by clearing the flag in memory.
    eoi_deferred: bool,
    /// Another vCPU has kicked this one; its next HLT ends at once.
    kicked: bool,
    /// Guest time at which stolen time was last brought up to date.
    steal_updated: u64,
    /// Nanoseconds that the host had stolen when the guest asked first.
    steal_base: Option<u64>,
}

/// Is it one of the interface's?
pub(super) fn is_msr(msr: u32) -> bool {
    matches!(msr, WALL_CLOCK_OLD | SYSTEM_TIME_OLD) || msr & !0xff == WALL_CLOCK
}

/// Multiplier and shift that turn TSC ticks into nanoseconds: `((ticks << shift) * multiplier) >> 32`, a right shift where
/// negative.
fn scale(khz: u32) -> (u32, i8) {
    let mut rate = u64::from(khz.max(1)) * 1000;
    let mut shift = 0i8;
    while rate > 2_000_000_000 {
        rate >>= 1;
        shift -= 1;
    }
    while rate <= 1_000_000_000 {
        rate <<= 1;
        shift += 1;
    }
    (((1_000_000_000u64 << 32) / rate) as u32, shift)
}

/// Nanoseconds for which the calling thread has waited for a processor so far.
fn host_steal() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_ascii_whitespace()
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(0)
}

impl Cpu {
    /// Reads one of the interface's MSRs; `None` is #GP.
    pub(super) fn read_paravirtual_msr(&self, msr: u32) -> Option<u64> {
        let p = &self.system.paravirtual;
        Some(match msr {
            WALL_CLOCK | WALL_CLOCK_OLD => p.wall_clock,
            SYSTEM_TIME | SYSTEM_TIME_OLD => p.system_time,
            STEAL_TIME => p.steal_time,
            PV_EOI => p.eoi,
            POLL_CONTROL => p.poll_control,
            _ => return None,
        })
    }

    /// Writes one of the interface's MSRs; `None` is #GP.
    pub(super) fn write_paravirtual_msr(&mut self, msr: u32, value: u64) -> Option<()> {
        match msr {
            WALL_CLOCK | WALL_CLOCK_OLD => {
                self.system.paravirtual.wall_clock = value;
                self.write_wall_clock(value);
            }
            SYSTEM_TIME | SYSTEM_TIME_OLD => {
                self.system.paravirtual.system_time = value;
                self.update_paravirtual_clock();
            }
            STEAL_TIME => {
                (value & 0x3e == 0).then_some(())?;
                self.system.paravirtual.steal_time = value;
                self.update_steal_time(true);
            }
            PV_EOI => {
                (value & 2 == 0).then_some(())?;
                self.settle_deferred_eoi();
                self.system.paravirtual.eoi = value;
            }
            POLL_CONTROL => {
                (value & !1 == 0).then_some(())?;
                self.system.paravirtual.poll_control = value;
            }
            _ => return None,
        }
        Some(())
    }

    fn write_guest(&self, physical: u64, bytes: &[u8]) {
        // A guest that names an address where there is no memory gets nothing.
        let _ = self.machine.memory.write(physical, bytes);
    }

    /// The wall clock at guest time zero.
    fn write_wall_clock(&self, physical: u64) {
        let clock = &self.machine.clock;
        let zero = clock
            .wall()
            .saturating_sub(std::time::Duration::from_nanos(clock.now()));
        let mut version = [0; 4];
        let _ = self.machine.memory.read(physical, &mut version);
        let version = u32::from_le_bytes(version) | 1;
        self.write_guest(physical, &version.to_le_bytes());
        let mut time = [0; 8];
        time[..4].copy_from_slice(&(zero.as_secs() as u32).to_le_bytes());
        time[4..].copy_from_slice(&zero.subsec_nanos().to_le_bytes());
        self.write_guest(physical.wrapping_add(4), &time);
        self.write_guest(physical, &version.wrapping_add(1).to_le_bytes());
    }

    /// Writes the parameters of the paravirtual clock, if the guest has it on. All processors get the same base, so that
    /// their clocks agree to the nanosecond.
    pub(super) fn update_paravirtual_clock(&mut self) {
        let msr = self.system.paravirtual.system_time;
        if msr & 1 == 0 {
            return;
        }
        let physical = msr & !1;
        let (multiplier, shift) = scale(self.tsc_khz);
        let mut version = [0; 4];
        let _ = self.machine.memory.read(physical, &mut version);
        let version = u32::from_le_bytes(version) | 1;
        self.write_guest(physical, &version.to_le_bytes());
        let mut rest = [0; 28];
        rest[4..12].copy_from_slice(&self.tsc_at(0).to_le_bytes());
        // rest[12..20]: system time at that tick, zero.
        rest[20..24].copy_from_slice(&multiplier.to_le_bytes());
        rest[24] = shift as u8;
        const TSC_STABLE: u8 = 1;
        rest[25] = TSC_STABLE;
        self.write_guest(physical.wrapping_add(4), &rest);
        self.write_guest(physical, &version.wrapping_add(1).to_le_bytes());
    }

    // ---- Steal time and TLB flushes ----

    /// The address of the steal-time record, if the guest has it on.
    fn steal_record(&self) -> Option<u64> {
        let msr = self.system.paravirtual.steal_time;
        (msr & 1 != 0).then_some(msr & !0x3f)
    }

    /// Brings the stolen time up to date, not more often than every so many milliseconds unless `now`.
    pub(crate) fn update_steal_time(&mut self, now: bool) {
        let Some(record) = self.steal_record() else {
            return;
        };
        let time = self.machine.clock.now();
        let last = self.system.paravirtual.steal_updated;
        if !now && time.saturating_sub(last) < STEAL_PERIOD {
            return;
        }
        self.system.paravirtual.steal_updated = time;
        let total = host_steal();
        let base = *self.system.paravirtual.steal_base.get_or_insert(total);
        let mut version = [0; 4];
        let _ = self.machine.memory.read(record + 8, &mut version);
        let version = u32::from_le_bytes(version) | 1;
        self.write_guest(record + 8, &version.to_le_bytes());
        self.write_guest(record, &total.saturating_sub(base).to_le_bytes());
        self.write_guest(record + 8, &version.wrapping_add(1).to_le_bytes());
    }

    /// The record's byte that says whether this vCPU runs.
    fn with_preempted<R>(&self, f: impl FnOnce(&AtomicU8) -> R) -> Option<R> {
        let slice = self
            .machine
            .memory
            .slice(self.steal_record()? + 16, 1)
            .ok()?;
        // SAFETY: one live byte of guest memory, which the slice keeps mapped; all others use it by atomics or raw accesses.
        let result = f(unsafe { AtomicU8::from_ptr(slice.as_ptr()) });
        slice.written(1);
        Some(result)
    }

    /// Before the vCPU's thread sleeps: other vCPUs may leave a note instead of waking it to flush its TLB.
    pub(crate) fn before_sleep(&mut self) {
        self.with_preempted(|byte| byte.store(PREEMPTED, Ordering::SeqCst));
    }

    /// After the sleep: looks at the notes.
    pub(crate) fn after_sleep(&mut self) {
        let left = self.with_preempted(|byte| byte.swap(0, Ordering::SeqCst));
        if left.is_some_and(|notes| notes & FLUSH_TLB != 0) {
            self.counters.paravirtual.tlb_flushes += 1;
            self.tlb.flush_local();
            self.leave_block = true;
        }
        self.update_steal_time(false);
    }

    // ---- End of interrupt in memory ----

    fn with_eoi_flag<R>(&self, f: impl FnOnce(&AtomicU32) -> R) -> Option<R> {
        let address = self.system.paravirtual.eoi & !3;
        let slice = self.machine.memory.slice(address, 4).ok()?;
        // SAFETY: four live, aligned bytes of guest memory, as in `with_preempted`.
        let result = f(unsafe { AtomicU32::from_ptr(slice.as_ptr().cast()) });
        slice.written(4);
        Some(result)
    }

    /// An interrupt has just been taken into service: lets the guest end it without a trap where nothing hangs on its end.
    pub(super) fn defer_eoi(&mut self) {
        if self.system.paravirtual.eoi & 1 == 0 || !self.apic.may_defer_eoi() {
            return;
        }
        let told = self.with_eoi_flag(|flag| flag.fetch_or(1, Ordering::SeqCst));
        self.system.paravirtual.eoi_deferred = told.is_some();
    }

    /// True when the end of the last interrupt may be noted in memory.
    pub(crate) fn has_deferred_eoi(&self) -> bool {
        self.system.paravirtual.eoi_deferred
    }

    /// Finds out whether the guest has ended the interrupt that it was allowed to end in memory, and takes that right back.
    /// Done before anything that depends on what is in service.
    pub(crate) fn settle_deferred_eoi(&mut self) {
        if !self.system.paravirtual.eoi_deferred {
            return;
        }
        self.system.paravirtual.eoi_deferred = false;
        let left = self.with_eoi_flag(|flag| flag.fetch_and(!1, Ordering::SeqCst));
        if left.is_some_and(|flag| flag & 1 == 0)
            && let Some(vector) = self.apic.end_of_interrupt()
        {
            self.outside(|io| io.end_of_interrupt(vector));
        }
    }

    // ---- Kicks and hypercalls ----

    /// Another vCPU has kicked this one ([`Event::WAKE`]).
    pub(crate) fn kicked(&mut self) {
        self.system.paravirtual.kicked = true;
    }

    /// HLT asks whether there was a kick, which is thereby used up.
    pub(crate) fn take_kick(&mut self) -> bool {
        std::mem::take(&mut self.system.paravirtual.kicked)
    }

    fn hypercall(&mut self, number: u64, arguments: [u64; 4]) -> i64 {
        let [a0, a1, a2, a3] = arguments;
        match number {
            hypercall::KICK_CPU => {
                let Some(mailbox) = self.machine.apics.get(a1 as u32) else {
                    return 0;
                };
                self.counters.paravirtual.kicks += 1;
                mailbox.raise(Event::WAKE);
                0
            }
            hypercall::SEND_IPI => self.send_many([a0, a1], a2 as u32, a3 as u32),
            hypercall::SCHED_YIELD => {
                self.counters.paravirtual.yields += 1;
                std::thread::yield_now();
                0
            }
            _ => ENOSYS,
        }
    }

    /// Sends an interrupt command to the vCPUs of a bitmap whose first bit is APIC ID `first`. Returns how many got it.
    fn send_many(&mut self, bitmap: [u64; 2], first: u32, command: u32) -> i64 {
        let word_bits = if self.mode.is_64bit() { 64 } else { 32 };
        let mut sent = 0;
        for (i, word) in bitmap.into_iter().enumerate() {
            let mut rest = if word_bits == 64 {
                word
            } else {
                word & 0xffff_ffff
            };
            while rest != 0 {
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                let Some(id) = first.checked_add(i as u32 * word_bits + bit) else {
                    break;
                };
                let message = Message::from_icr(command & !(1 << 11), id, true);
                sent += self.machine.apics.send(message) as i64;
            }
        }
        self.counters.paravirtual.ipis += sent as u64;
        sent
    }
}

/// VMCALL and VMMCALL.
pub(super) fn vmcall(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let mask = if cpu.mode.is_64bit() {
        u64::MAX
    } else {
        0xffff_ffff
    };
    const RBX: usize = x86_defs::state::RBX;
    const RSI: usize = x86_defs::state::RSI;
    let arguments = [RBX, RCX, RDX, RSI].map(|r| cpu.regs[r] & mask);
    let result = if cpu.cpl == 0 {
        cpu.hypercall(cpu.regs[RAX] & mask, arguments)
    } else {
        EPERM
    };
    cpu.regs[RAX] = result as u64 & mask;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_nanoseconds() {
        for khz in [1_000_000, 2_000_000, 2_100_000, 999_999, 3_700_001, 19_200] {
            let (multiplier, shift) = scale(khz);
            let ticks = u128::from(khz) * 1000 * 5;
            let shifted = if shift < 0 {
                ticks >> -shift
            } else {
                ticks << shift
            };
            let ns = (shifted * u128::from(multiplier)) >> 32;
            assert!(ns.abs_diff(5_000_000_000) <= 10, "{khz}: {ns}");
        }
    }

    #[test]
    fn the_interfaces_registers() {
        assert!(is_msr(0x11) && is_msr(0x12) && is_msr(0x4b56_4d07));
        assert!(!is_msr(0x10) && !is_msr(0x4b56_4e00));
    }
}
