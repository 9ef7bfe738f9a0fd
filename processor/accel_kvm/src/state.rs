//! A vCPU's state out of KVM and into it.

use accel::AccelError;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, Msrs, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use x86_defs::msr;
use x86_defs::state::{
    CS, DS, DescriptorTable, ES, Events, FS, GS, LAPIC_SIZE, MpState, Registers, SS, Segment,
    SystemRegisters, VcpuState,
};

use crate::host::refused;
use crate::ioctls;

/// Bytes of the legacy area and the header, which every extended state has.
const XSAVE_LEAST: usize = 576;
/// `KVM_X86_SHADOW_INT_MOV_SS` and `KVM_X86_SHADOW_INT_STI`.
const SHADOW_MOV_SS: u8 = 1 << 0;
const SHADOW_STI: u8 = 1 << 1;

/// Bit of [`Segment::attributes`] for a register that can't be used.
const UNUSABLE: u32 = 1 << 16;

fn bad(what: impl Into<String>) -> AccelError {
    AccelError::BadState(what.into())
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: u32::from(s.type_ & 15)
            | bit(s.s, 4)
            | u32::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15)
            | bit(s.unusable, 16),
    }
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    let bit = |at: u32| (s.attributes >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 15) as u8,
        present: bit(7),
        dpl: (s.attributes >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(s.attributes & UNUSABLE != 0),
        padding: 0,
    }
}

fn table_from_kvm(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: t.base,
        limit: t.limit,
    }
}

fn table_to_kvm(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

fn registers_from_kvm(r: &kvm_regs) -> Registers {
    Registers {
        gpr: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn registers_to_kvm(r: &Registers) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = r.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn system_to_kvm(s: &SystemRegisters) -> kvm_sregs {
    let segment = |at: usize| segment_to_kvm(&s.segments[at]);
    kvm_sregs {
        cs: segment(CS),
        ds: segment(DS),
        es: segment(ES),
        fs: segment(FS),
        gs: segment(GS),
        ss: segment(SS),
        tr: segment_to_kvm(&s.tr),
        ldt: segment_to_kvm(&s.ldtr),
        gdt: table_to_kvm(&s.gdtr),
        idt: table_to_kvm(&s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        // Interrupts under way go in with the events.
        interrupt_bitmap: [0; 4],
    }
}

fn events_from_kvm(e: &kvm_vcpu_events) -> Events {
    let exception = e.exception;
    let interrupt = e.interrupt;
    Events {
        exception: (exception.injected != 0 || exception.pending != 0).then(|| {
            let code = (exception.has_error_code != 0).then_some(exception.error_code);
            (exception.nr, code)
        }),
        // A software interrupt under way is the INT instruction at RIP, which runs again.
        interrupt: (interrupt.injected != 0 && interrupt.soft == 0).then_some(interrupt.nr),
        sti_shadow: interrupt.shadow & SHADOW_STI != 0,
        mov_ss_shadow: interrupt.shadow & SHADOW_MOV_SS != 0,
        nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
        nmi_masked: e.nmi.masked != 0 && e.nmi.injected == 0,
    }
}

/// The events as KVM takes them; with `nmi`, whether an NMI is pending is among them.
fn events_to_kvm(e: &Events, nmi: bool) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if nmi {
        events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    }
    if let Some((vector, code)) = e.exception {
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = code.is_some().into();
        events.exception.error_code = code.unwrap_or(0);
    }
    if let Some(vector) = e.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    if e.sti_shadow {
        events.interrupt.shadow |= SHADOW_STI;
    }
    if e.mov_ss_shadow {
        events.interrupt.shadow |= SHADOW_MOV_SS;
    }
    events.nmi.pending = e.nmi_pending.into();
    events.nmi.masked = e.nmi_masked.into();
    events
}

fn mp_state_to_kvm(state: MpState) -> kvm_mp_state {
    let mp_state = match state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        MpState::Halted => KVM_MP_STATE_HALTED,
    };
    kvm_mp_state { mp_state }
}

fn mp_state_from_kvm(state: kvm_mp_state) -> MpState {
    match state.mp_state {
        KVM_MP_STATE_UNINITIALIZED => MpState::Uninitialized,
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => MpState::WaitForSipi,
        KVM_MP_STATE_HALTED => MpState::Halted,
        _ => MpState::Runnable,
    }
}

/// Reads MSRs; those that the vCPU has not got are taken off the list.
fn read_msrs(vcpu: &VcpuFd, list: &mut Vec<u32>) -> Result<Vec<(u32, u64)>, AccelError> {
    let mut values = Vec::with_capacity(list.len());
    while values.len() < list.len() {
        let rest: Vec<_> = list[values.len()..]
            .iter()
            .take(256)
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut buffer = Msrs::from_entries(&rest).expect("within KVM's limit");
        let read = vcpu
            .get_msrs(&mut buffer)
            .map_err(|e| refused("read MSRs", e))?;
        let got = &buffer.as_slice()[..read.min(rest.len())];
        values.extend(got.iter().map(|e| (e.index, e.data)));
        if read < rest.len() {
            list.remove(values.len());
        }
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), AccelError> {
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .take(256)
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let buffer = Msrs::from_entries(&entries).expect("within KVM's limit");
        let written = vcpu
            .set_msrs(&buffer)
            .map_err(|e| refused("write MSRs", e))?;
        if written < entries.len() {
            let (index, value) = rest[written];
            let mut one = vec![index];
            if read_msrs(vcpu, &mut one)? != [(index, value)] {
                return Err(bad(format!("MSR {index:#x} = {value:#x}")));
            }
            rest = &rest[written + 1..];
        } else {
            rest = &rest[written..];
        }
    }
    Ok(())
}

/// The MSRs of `list` that the vCPU has.
pub(crate) fn present_msrs(vcpu: &VcpuFd, list: &[u32]) -> Result<Vec<u32>, AccelError> {
    let mut list = list.to_vec();
    read_msrs(vcpu, &mut list)?;
    Ok(list)
}

/// Reads all of a vCPU's state. `msrs` are those that it has.
pub(crate) fn get(vcpu: &VcpuFd, msrs: &[u32], xsave_size: usize) -> Result<VcpuState, AccelError> {
    // First: KVM works off pending INIT and startup IPIs here, which changes all the rest.
    let mp_state = vcpu
        .get_mp_state()
        .map_err(|e| refused("read the running state", e))?;
    let regs = vcpu.get_regs().map_err(|e| refused("read registers", e))?;
    let events = vcpu
        .get_vcpu_events()
        .map_err(|e| refused("read events", e))?;
    let lapic = vcpu
        .get_lapic()
        .map_err(|e| refused("read the local APIC", e))?;
    let xsave = ioctls::xsave(vcpu, xsave_size).map_err(|e| refused("read extended state", e))?;
    Ok(VcpuState {
        registers: registers_from_kvm(&regs),
        system: get_system(vcpu)?,
        xsave,
        msrs: read_msrs(vcpu, &mut msrs.to_vec())?,
        events: events_from_kvm(&events),
        mp_state: mp_state_from_kvm(mp_state),
        lapic: lapic.regs.iter().map(|b| *b as u8).collect(),
    })
}

fn get_system(vcpu: &VcpuFd) -> Result<SystemRegisters, AccelError> {
    let s = vcpu
        .get_sregs()
        .map_err(|e| refused("read system registers", e))?;
    let debug = vcpu
        .get_debug_regs()
        .map_err(|e| refused("read debug registers", e))?;
    let xcrs = vcpu.get_xcrs().map_err(|e| refused("read XCR0", e))?;
    let mut segments = [Segment::default(); 6];
    for (at, segment) in [
        (ES, &s.es),
        (CS, &s.cs),
        (SS, &s.ss),
        (DS, &s.ds),
        (FS, &s.fs),
        (GS, &s.gs),
    ] {
        segments[at] = segment_from_kvm(segment);
    }
    Ok(SystemRegisters {
        segments,
        tr: segment_from_kvm(&s.tr),
        ldtr: segment_from_kvm(&s.ldt),
        gdtr: table_from_kvm(&s.gdt),
        idtr: table_from_kvm(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        dr: debug.db,
        dr6: debug.dr6,
        dr7: debug.dr7,
        xcr0: xcr0(&xcrs),
    })
}

fn xcr0(xcrs: &kvm_xcrs) -> u64 {
    let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    xcrs.xcrs[..count]
        .iter()
        .find(|x| x.xcr == 0)
        .map_or(1, |x| x.value)
}

fn put_system(
    vcpu: &VcpuFd,
    old: Option<&SystemRegisters>,
    new: &SystemRegisters,
) -> Result<(), AccelError> {
    vcpu.set_sregs(&system_to_kvm(new))
        .map_err(|e| bad(format!("system registers: {}", std::io::Error::from(e))))?;
    let debug = |s: &SystemRegisters| (s.dr, s.dr6, s.dr7);
    if old.map(debug) != Some(debug(new)) {
        vcpu.set_debug_regs(&kvm_debugregs {
            db: new.dr,
            dr6: new.dr6,
            dr7: new.dr7,
            ..Default::default()
        })
        .map_err(|_| bad(format!("DR6 {:#x}, DR7 {:#x}", new.dr6, new.dr7)))?;
    }
    if old.map(|s| s.xcr0) != Some(new.xcr0) {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = new.xcr0;
        vcpu.set_xcrs(&xcrs)
            .map_err(|_| bad(format!("XCR0 {:#x}", new.xcr0)))?;
    }
    Ok(())
}

fn put_lapic(vcpu: &VcpuFd, registers: &[u8]) -> Result<(), AccelError> {
    let mut lapic = kvm_lapic_state::default();
    if registers.len() != lapic.regs.len() {
        return Err(bad(format!(
            "{} bytes of local APIC registers, not {LAPIC_SIZE}",
            registers.len()
        )));
    }
    for (to, from) in lapic.regs.iter_mut().zip(registers) {
        *to = *from as std::os::raw::c_char;
    }
    vcpu.set_lapic(&lapic)
        .map_err(|e| bad(format!("local APIC: {}", std::io::Error::from(e))))
}

fn put_xsave(vcpu: &VcpuFd, size: usize, state: &[u8]) -> Result<(), AccelError> {
    if state.len() < XSAVE_LEAST {
        return Err(bad(format!("{} bytes of extended state", state.len())));
    }
    if state.iter().skip(size).any(|byte| *byte != 0) {
        return Err(bad(format!(
            "extended state beyond the {size} bytes that the host has"
        )));
    }
    ioctls::set_xsave(vcpu, size, &state[..state.len().min(size)])
        .map_err(|e| bad(format!("extended state: {e}")))
}

/// Writes a vCPU's state: all of it, or what differs from `old`, which must be what it is.
pub(crate) fn put(
    vcpu: &VcpuFd,
    xsave_size: usize,
    old: Option<&VcpuState>,
    new: &VcpuState,
) -> Result<(), AccelError> {
    // The order matters: the APIC's mode (in the system registers) before its registers, those and the TSC before the
    // deadline that is compared with it, the registers before what waits to change them.
    if old.map(|o| &o.system) != Some(&new.system) {
        put_system(vcpu, old.map(|o| &o.system), &new.system)?;
    }
    if old.map(|o| &o.lapic) != Some(&new.lapic) {
        put_lapic(vcpu, &new.lapic)?;
    }
    if old.map(|o| &o.xsave) != Some(&new.xsave) {
        put_xsave(vcpu, xsave_size, &new.xsave)?;
    }
    let changed = |entry: &&(u32, u64)| old.is_none_or(|o| !o.msrs.contains(entry));
    let (deadline, others): (Vec<_>, Vec<_>) = new
        .msrs
        .iter()
        .filter(changed)
        .copied()
        .partition(|(index, _)| *index == msr::TSC_DEADLINE);
    write_msrs(vcpu, &others)?;
    write_msrs(vcpu, &deadline)?;
    if old.map(|o| &o.registers) != Some(&new.registers) {
        vcpu.set_regs(&registers_to_kvm(&new.registers))
            .map_err(|e| bad(format!("registers: {}", std::io::Error::from(e))))?;
    }
    // KVM drops some events when registers are written, so these always follow.
    // An NMI that came since the old state was read must not get lost.
    let nmi = old.map(|o| o.events.nmi_pending) != Some(new.events.nmi_pending);
    vcpu.set_vcpu_events(&events_to_kvm(&new.events, nmi))
        .map_err(|_| bad(format!("events {:?}", new.events)))?;
    if old.map(|o| o.mp_state) != Some(new.mp_state) {
        vcpu.set_mp_state(mp_state_to_kvm(new.mp_state))
            .map_err(|e| bad(format!("{:?}: {}", new.mp_state, std::io::Error::from(e))))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_way_there_and_back() {
        for attributes in [0x93, 0xa09b, 0xc0f3, 0x8b, 0x1_0000, 0xf0ff] {
            let segment = Segment {
                selector: 0x2b,
                base: 0x1234_5678_9abc,
                limit: 0xffff_ffff,
                attributes,
            };
            assert_eq!(segment_from_kvm(&segment_to_kvm(&segment)), segment);
        }
    }

    #[test]
    fn events_survive_the_way_there_and_back() {
        let events = Events {
            exception: Some((14, Some(2))),
            interrupt: Some(0x41),
            sti_shadow: true,
            mov_ss_shadow: false,
            nmi_pending: true,
            nmi_masked: true,
        };
        assert_eq!(events_from_kvm(&events_to_kvm(&events, true)), events);
        assert_eq!(
            events_from_kvm(&events_to_kvm(&Events::default(), true)),
            Events::default()
        );
    }
}
