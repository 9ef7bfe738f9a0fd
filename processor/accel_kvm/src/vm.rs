//! A VM.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use accel::{AccelError, Doorbell, Emulator, Msi, Vcpu, VcpuConfig, Vm, VmConfig};
use guest_clock::GuestClock;
use guest_memory::{GuestMemory, MemoryListener};
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_clock_data,
    kvm_enable_cap, kvm_ioeventfd, kvm_msi,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::host::{HostFeatures, refused};
use crate::ioctls;
use crate::routes::{LEVEL_ROUTES, Routes, address};
use crate::run_page::Doorman;
use crate::slots::Slots;
use crate::vcpu::KvmVcpu;

/// Three pages that Intel processors without unrestricted guests need as a task state segment, and one for an identity map; in
/// the hole below the firmware that no machine of ours fills.
const TSS_ADDRESS: usize = 0xfeff_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;

/// `KVM_IOEVENTFD_FLAG_DATAMATCH`.
const IOEVENTFD_DATAMATCH: u32 = 1 << 0;
/// `KVM_IOEVENTFD_FLAG_DEASSIGN`.
const IOEVENTFD_DEASSIGN: u32 = 1 << 2;

/// What a VM's vCPUs share.
pub(crate) struct Shared {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) features: Arc<HostFeatures>,
    pub(crate) memory: GuestMemory,
    pub(crate) clock: GuestClock,
    pub(crate) emulator: Option<Arc<dyn Emulator>>,
    /// The 8259's output.
    pub(crate) extint: AtomicBool,
    /// Where guest time's zero stood when the paravirtual clock was last set by it.
    clock_zero: Mutex<Option<i64>>,
    /// The vCPUs that were made, by APIC ID.
    doormen: Mutex<Vec<(u32, Weak<Doorman>)>>,
}

impl Shared {
    /// Sets the paravirtual clock back by the time that guest time has stood still since the last call.
    pub(crate) fn follow_clock(&self, zero: i64) {
        let mut seen = self.clock_zero.lock();
        if let Some(old) = seen.replace(zero)
            && old != zero
            && let Ok(data) = self.vm.get_clock()
        {
            let stood = zero.saturating_sub(old);
            let clock = data.clock.saturating_add_signed(stood.saturating_neg());
            // A kernel that refuses leaves the clock running: the guest then sees the stop as a leap.
            let _ = self.vm.set_clock(&kvm_clock_data {
                clock,
                ..Default::default()
            });
        }
    }
}

/// A VM under KVM.
pub(crate) struct KvmVm {
    shared: Arc<Shared>,
    slots: Arc<Slots>,
    routes: Mutex<Routes>,
    max_vcpus: u32,
}

impl KvmVm {
    pub(crate) fn new(
        vm: VmFd,
        features: Arc<HostFeatures>,
        emulator: Option<Arc<dyn Emulator>>,
        config: VmConfig,
    ) -> Result<Self, AccelError> {
        let VmConfig {
            memory,
            clock,
            max_vcpus,
        } = config;
        // Only some Intel processors need these, and only such hosts' KVM has them.
        let _ = vm.set_identity_map_address(IDENTITY_MAP_ADDRESS);
        let _ = vm.set_tss_address(TSS_ADDRESS);
        let enable = |cap: u32, arg: u64, what| {
            vm.enable_cap(&kvm_enable_cap {
                cap,
                args: [arg, 0, 0, 0],
                ..Default::default()
            })
            .map_err(|e| refused(what, e))
        };
        enable(
            KVM_CAP_SPLIT_IRQCHIP,
            LEVEL_ROUTES.into(),
            "split the interrupt controller",
        )?;
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(KVM_CAP_X2APIC_API, x2apic.into(), "widen APIC IDs")?;
        if emulator.is_some() && features.exit_on_emulation_failure {
            let what = "hand over instructions that KVM can't emulate";
            enable(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1, what)?;
        }
        let vm = Arc::new(vm);
        let slots = Arc::new(Slots::new(vm.clone(), &features));
        let listener: Arc<dyn MemoryListener> = slots.clone();
        memory
            .listen(&listener)
            .map_err(|e| AccelError::Unsupported(e.to_string()))?;
        Ok(Self {
            shared: Arc::new(Shared {
                vm,
                features,
                memory,
                clock,
                emulator,
                extint: AtomicBool::new(false),
                clock_zero: Mutex::default(),
                doormen: Mutex::default(),
            }),
            slots,
            routes: Mutex::default(),
            max_vcpus,
        })
    }

    fn set_routes(&self, routes: &Routes) -> bool {
        self.shared.vm.set_gsi_routing(&routes.table()).is_ok()
    }

    fn ioeventfd(&self, doorbell: Doorbell, event: &EventFd, flags: u32) -> bool {
        let matched = doorbell.value.map_or(0, |_| IOEVENTFD_DATAMATCH);
        let request = kvm_ioeventfd {
            datamatch: doorbell.value.unwrap_or(0),
            addr: doorbell.address,
            len: doorbell.len,
            fd: event.as_raw_fd(),
            flags: flags | matched,
            ..Default::default()
        };
        ioctls::ioeventfd(&self.shared.vm, &request).is_ok()
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, AccelError> {
        let mut doormen = self.shared.doormen.lock();
        if doormen.len() >= self.max_vcpus as usize {
            return Err(AccelError::Unsupported(format!(
                "the VM was made for {} vCPUs",
                self.max_vcpus
            )));
        }
        let id = config.apic_id;
        let vcpu = KvmVcpu::new(self.shared.clone(), config)?;
        doormen.push((id, Arc::downgrade(vcpu.doorman())));
        Ok(Box::new(vcpu))
    }

    fn send_msi(&self, msi: Msi) {
        {
            let mut routes = self.routes.lock();
            if routes.note_level(msi) {
                self.set_routes(&routes);
            }
        }
        let (address_lo, address_hi) = address(msi);
        // A message that no local APIC takes is lost, as on a real bus.
        let _ = self.shared.vm.signal_msi(kvm_msi {
            address_lo,
            address_hi,
            data: msi.data,
            ..Default::default()
        });
    }

    fn set_extint(&self, raised: bool) {
        let was = self.shared.extint.swap(raised, Ordering::SeqCst);
        if raised && !was {
            let doormen = self.shared.doormen.lock();
            let bootstrap = doormen.iter().find(|(id, _)| *id == 0);
            if let Some(doorman) = bootstrap.and_then(|(_, weak)| weak.upgrade()) {
                doorman.nudge();
            }
        }
    }

    fn add_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> bool {
        self.shared.features.ioeventfd && self.ioeventfd(doorbell, event, 0)
    }

    fn remove_doorbell(&self, doorbell: Doorbell, event: &EventFd) {
        self.ioeventfd(doorbell, event, IOEVENTFD_DEASSIGN);
    }

    fn set_irq_event(&self, event: &EventFd, msi: Msi) -> bool {
        if !self.shared.features.irqfd {
            return false;
        }
        let mut routes = self.routes.lock();
        let known = routes.of_event(event.as_raw_fd()).is_some();
        let Some(gsi) = routes.set_event(event.as_raw_fd(), msi) else {
            return false;
        };
        let done = self.set_routes(&routes)
            && (known || self.shared.vm.register_irqfd(event, gsi).is_ok());
        if !done && !known {
            routes.remove_event(event.as_raw_fd());
        }
        done
    }

    fn remove_irq_event(&self, event: &EventFd) {
        let mut routes = self.routes.lock();
        if let Some(gsi) = routes.remove_event(event.as_raw_fd()) {
            let _ = self.shared.vm.unregister_irqfd(event, gsi);
            self.set_routes(&routes);
        }
    }

    fn sync_dirty_log(&self) -> Result<(), AccelError> {
        self.slots.sync_dirty_log()
    }
}
