//! What needs a host with KVM: VMs, state, dirty log, kicks. Each test says so and ends where there is none.

use std::sync::Arc;
use std::time::Duration;

use accel::{Accel, CpuIo, Exit, VcpuConfig, Vm, VmConfig};
use accel_kvm::KvmAccel;
use guest_clock::GuestClock;
use guest_memory::{BackingOptions, GuestMemory};
use x86_defs::state::VcpuState;

struct NoIo;

impl CpuIo for NoIo {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn acknowledge_extint(&self) -> Option<u8> {
        None
    }
    fn end_of_interrupt(&self, _: u8) {}
}

fn accel() -> Option<KvmAccel> {
    match KvmAccel::open() {
        Ok(accel) => Some(accel),
        Err(e) => {
            assert!(!std::path::Path::new("/dev/kvm").exists(), "{e}");
            eprintln!("skipped: {e}");
            None
        }
    }
}

fn machine(accel: &KvmAccel) -> (Arc<dyn Vm>, GuestMemory, GuestClock) {
    let memory = GuestMemory::new();
    memory
        .add_ram(0, 0x10_0000, BackingOptions::default())
        .unwrap();
    let clock = GuestClock::new();
    let vm = accel
        .create_vm(VmConfig {
            memory: memory.clone(),
            clock: clock.clone(),
            max_vcpus: 4,
        })
        .unwrap();
    (vm, memory, clock)
}

fn config(accel: &KvmAccel, apic_id: u32) -> VcpuConfig {
    VcpuConfig {
        apic_id,
        cpuid: accel.supported_cpuid().unwrap(),
        tsc_khz: accel.tsc_khz(),
    }
}

#[test]
fn state_survives_set_and_get() {
    let Some(accel) = accel() else { return };
    let (vm, _memory, _clock) = machine(&accel);
    let mut vcpu = vm.create_vcpu(config(&accel, 0)).unwrap();
    let reset = vcpu.state().unwrap();
    assert_eq!(reset.registers.rip, 0xfff0);
    let mut changed = reset.clone();
    changed.registers.gpr = std::array::from_fn(|i| 0x1111_1111_1111_1111 * i as u64);
    changed.system.dr = [1, 2, 3, 4];
    changed.xsave[160] = 0x5a;
    changed.xsave[512] |= 2;
    vcpu.set_state(&changed).unwrap();
    let mut back = vcpu.state().unwrap();
    let no_time = |s: &mut VcpuState| s.msrs.retain(|(i, _)| *i != 0x10);
    no_time(&mut back);
    no_time(&mut changed);
    assert_eq!(back, changed);
    vcpu.reset().unwrap();
    let mut again = vcpu.state().unwrap();
    let mut reset = reset;
    no_time(&mut again);
    no_time(&mut reset);
    assert_eq!(again, reset);
}

#[test]
fn a_kick_before_or_during_a_run_ends_it() {
    let Some(accel) = accel() else { return };
    let (vm, memory, _clock) = machine(&accel);
    memory.write(0x1000, &[0xeb, 0xfe]).unwrap(); // jmp $
    let mut vcpu = vm.create_vcpu(config(&accel, 0)).unwrap();
    let mut state = vcpu.state().unwrap();
    state.system.segments[1].base = 0;
    state.system.segments[1].selector = 0;
    state.registers.rip = 0x1000;
    vcpu.set_state(&state).unwrap();
    let handle = vcpu.handle();
    handle.kick();
    assert_eq!(vcpu.run(&NoIo).unwrap(), Exit::Kicked);
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        handle.kick();
    });
    assert_eq!(vcpu.run(&NoIo).unwrap(), Exit::Kicked);
    kicker.join().unwrap();
    assert_eq!(vcpu.state().unwrap().registers.rip, 0x1000);
}

#[test]
fn refuses_what_can_not_be() {
    let Some(accel) = accel() else { return };
    let (vm, _memory, _clock) = machine(&accel);
    let mut vcpu = vm.create_vcpu(config(&accel, 0)).unwrap();
    assert!(vm.create_vcpu(config(&accel, 0)).is_err());
    let good = vcpu.state().unwrap();
    let spoils: [fn(&mut VcpuState); 8] = [
        |s| s.lapic.truncate(5),
        |s| s.xsave.truncate(575),
        |s| s.xsave.resize(1 << 20, 1),
        |s| s.system.cr4 = u64::MAX,
        |s| s.system.dr7 = u64::MAX,
        |s| s.system.xcr0 = u64::MAX,
        |s| s.events.exception = Some((200, None)),
        |s| s.msrs = vec![(0xdead_beef, 7)],
    ];
    for spoil in spoils {
        let mut state = good.clone();
        spoil(&mut state);
        let refusal = vcpu.set_state(&state);
        assert!(
            matches!(refusal, Err(accel::AccelError::BadState(_))),
            "{refusal:?}"
        );
    }
    vcpu.set_state(&good).unwrap();
}

#[test]
fn makes_as_many_vcpus_as_large_machines_have() {
    let Some(accel) = accel() else { return };
    let vm = accel
        .create_vm(VmConfig {
            memory: GuestMemory::new(),
            clock: GuestClock::new(),
            max_vcpus: 288,
        })
        .unwrap();
    let vcpus: Vec<_> = (0..288)
        .map(|id| vm.create_vcpu(config(&accel, id)).unwrap())
        .collect();
    let last = vcpus[287].state().unwrap();
    assert_eq!(
        last.mp_state,
        x86_defs::state::MpState::Uninitialized,
        "application processors wait"
    );
    assert!(vm.create_vcpu(config(&accel, 288)).is_err());
}

#[test]
fn says_why_there_is_no_kvm() {
    let error = KvmAccel::open_at(std::path::Path::new("/dev/null")).err();
    assert!(error.unwrap().to_string().contains("API version"));
    let error = KvmAccel::open_at(std::path::Path::new("/no/such/kvm")).err();
    assert_eq!(
        error.unwrap().to_string(),
        "kvm is not available: cannot open /no/such/kvm: No such file or directory (os error 2)"
    );
}

#[test]
fn the_probe_comes_to_a_choice_and_says_why() {
    let Some(accel) = accel() else { return };
    let seen = accel::probe::ring_zero(&accel).unwrap();
    eprintln!("{seen:?}");
    let start = std::time::Instant::now();
    let choice = accel_kvm::choose();
    eprintln!("{} (in {:?})", choice.line(), start.elapsed());
    match &choice {
        accel_kvm::Choice::Kvm(_, line) => assert!(line.starts_with("kvm: hardware speed (")),
        accel_kvm::Choice::Soft(line) => assert!(line.starts_with("soft: /dev/kvm ")),
    }
}
