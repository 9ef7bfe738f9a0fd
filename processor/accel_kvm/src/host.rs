//! What the host's KVM can do.

use std::io;
use std::path::Path;
use std::sync::Arc;

use accel::{Accel, AccelError, Emulator, Vm, VmConfig};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_BINARY_STATS_FD, KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD, KVM_CAP_IRQFD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_READONLY_MEM, KVM_CAP_SIGNAL_MSI, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_X2APIC_API, KVM_CAP_XSAVE2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VmFd};
use x86_defs::cpuid::CpuidEntry;
use x86_defs::msr;

use crate::ioctls;
use crate::vm::KvmVm;

/// The error of a refused operation.
pub(crate) fn refused(operation: &'static str, source: impl Into<io::Error>) -> AccelError {
    AccelError::Host {
        operation,
        source: source.into(),
    }
}

fn unavailable(reason: impl Into<String>) -> AccelError {
    AccelError::Unavailable {
        accel: "kvm",
        reason: reason.into(),
    }
}

/// What depends on the host's kernel.
#[derive(Debug, Clone)]
pub(crate) struct HostFeatures {
    pub(crate) read_only_memory: bool,
    pub(crate) manual_dirty_log: bool,
    pub(crate) irqfd: bool,
    pub(crate) ioeventfd: bool,
    pub(crate) exit_on_emulation_failure: bool,
    pub(crate) statistics: bool,
    /// Bytes of extended state.
    pub(crate) xsave_size: usize,
    /// Bytes of a vCPU's run page.
    pub(crate) run_size: usize,
    /// Most memory slots.
    pub(crate) slots: u32,
    /// MSRs to save and restore.
    pub(crate) msrs: Vec<u32>,
}

/// KVM as a processor.
pub struct KvmAccel {
    kvm: Kvm,
    features: Arc<HostFeatures>,
    cpuid: Vec<CpuidEntry>,
    tsc_khz: u32,
    emulator: Option<Arc<dyn Emulator>>,
}

impl KvmAccel {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] when there is none, it may not be used, or its kernel is too old (it must have the
    /// split interrupt controller, which Linux has since 4.5).
    pub fn open() -> Result<Self, AccelError> {
        Self::open_at(Path::new("/dev/kvm"))
    }

    /// Opens a KVM device by its path.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(path: &Path) -> Result<Self, AccelError> {
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| unavailable("the path has a NUL byte"))?;
        let kvm = Kvm::new_with_path(&name).map_err(|e| {
            let reason = io::Error::from(e);
            unavailable(format!("cannot open {}: {reason}", path.display()))
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(unavailable(format!(
                "{} speaks KVM API version {version}, not {KVM_API_VERSION}",
                path.display()
            )));
        }
        for (cap, what) in [
            (KVM_CAP_SPLIT_IRQCHIP, "the split interrupt controller"),
            (KVM_CAP_SIGNAL_MSI, "message-signalled interrupts"),
            (KVM_CAP_IMMEDIATE_EXIT, "immediate exit"),
            (KVM_CAP_X2APIC_API, "the x2APIC interface"),
        ] {
            if kvm.check_extension_raw(cap.into()) <= 0 {
                return Err(unavailable(format!("the host's KVM has not got {what}")));
            }
        }
        let probe = create_vm(&kvm)?;
        let features = Arc::new(HostFeatures::read(&kvm, &probe)?);
        let cpuid = supported_cpuid(&kvm)?;
        let tsc_khz = tsc_khz(&probe)?;
        Ok(Self {
            kvm,
            features,
            cpuid,
            tsc_khz,
            emulator: None,
        })
    }

    /// Lets `emulator` complete the instructions that KVM can't, instead of giving the guest up.
    #[must_use]
    pub fn with_emulator(mut self, emulator: Arc<dyn Emulator>) -> Self {
        self.emulator = Some(emulator);
        self
    }
}

impl Accel for KvmAccel {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, AccelError> {
        Ok(self.cpuid.clone())
    }

    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, AccelError> {
        let most = self.kvm.get_max_vcpus();
        if config.max_vcpus as usize > most {
            return Err(AccelError::Unsupported(format!(
                "{} vCPUs: the host's KVM has at most {most}",
                config.max_vcpus
            )));
        }
        let vm = create_vm(&self.kvm)?;
        let vm = KvmVm::new(vm, self.features.clone(), self.emulator.clone(), config)?;
        Ok(Arc::new(vm))
    }
}

/// `KVM_CREATE_VM`, which a signal may interrupt.
fn create_vm(kvm: &Kvm) -> Result<VmFd, AccelError> {
    loop {
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(refused("create a VM", e)),
        }
    }
}

impl HostFeatures {
    fn read(kvm: &Kvm, vm: &VmFd) -> Result<Self, AccelError> {
        let has = |cap: u32| vm.check_extension_raw(cap.into()) > 0;
        let xsave = vm.check_extension_raw(KVM_CAP_XSAVE2.into());
        let msrs = kvm
            .get_msr_index_list()
            .map_err(|e| refused("list the MSRs", e))?;
        Ok(Self {
            read_only_memory: has(KVM_CAP_READONLY_MEM),
            // Bit 0: manual protection; only with it is KVM_CLEAR_DIRTY_LOG there.
            manual_dirty_log: vm
                .check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into())
                .max(0)
                & 1
                != 0,
            irqfd: has(KVM_CAP_IRQFD),
            ioeventfd: has(KVM_CAP_IOEVENTFD),
            exit_on_emulation_failure: has(KVM_CAP_EXIT_ON_EMULATION_FAILURE),
            statistics: has(KVM_CAP_BINARY_STATS_FD),
            xsave_size: usize::try_from(xsave)
                .unwrap_or(0)
                .max(size_of::<kvm_xsave>()),
            run_size: vm.run_size(),
            slots: kvm.get_nr_memslots() as u32,
            msrs: msrs
                .as_slice()
                .iter()
                .copied()
                .filter(|msr| !in_system_registers(*msr))
                .collect(),
        })
    }
}

/// MSRs that [`x86_defs::state::SystemRegisters`] and the local APIC's registers carry.
fn in_system_registers(msr: u32) -> bool {
    matches!(msr, msr::EFER | msr::APIC_BASE)
        || (msr::X2APIC_FIRST..=msr::X2APIC_LAST).contains(&msr)
        || matches!(msr, msr::FS_BASE | msr::GS_BASE)
}

/// The frequency of unscaled guests: the VM's answer, or that of a vCPU on kernels where a VM has none.
fn tsc_khz(vm: &VmFd) -> Result<u32, AccelError> {
    if let Ok(khz) = ioctls::vm_tsc_khz(vm)
        && khz != 0
    {
        return Ok(khz);
    }
    let vcpu = vm
        .create_vcpu(0)
        .map_err(|e| refused("create a vCPU to learn the TSC frequency", e))?;
    vcpu.get_tsc_khz()
        .map_err(|e| refused("read the TSC frequency", e))
}

/// Leaf 1, ECX: x2APIC.
const CPUID_1_ECX_X2APIC: u32 = 1 << 21;
/// Leaf 1, ECX: TSC-deadline timer.
const CPUID_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is there.
const CPUID_1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 7, EDX: AMX-BF16, AMX-TILE, AMX-INT8. Their state needs a permission of the process and 8 KiB for each vCPU.
const CPUID_7_EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 7 subleaf 1, EAX: AMX-FP16; EDX: AMX-COMPLEX.
const CPUID_7_1_EAX_AMX: u32 = 1 << 21;
const CPUID_7_1_EDX_AMX: u32 = 1 << 8;
/// Leaf 0xD, EAX: the AMX state components, XTILECFG and XTILEDATA.
const XCR0_AMX: u32 = 3 << 17;

/// What KVM supports, without what this accelerator does not carry: AMX, performance counters.
fn supported_cpuid(kvm: &Kvm) -> Result<Vec<CpuidEntry>, AccelError> {
    let table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| refused("ask for the supported CPUID", e))?;
    let deadline = kvm.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0;
    let mut entries: Vec<CpuidEntry> = from_kvm(&table);
    entries.retain(|e| !matches!(e.leaf, 0x1d | 0x1e) && !is_amx_component(e));
    for entry in &mut entries {
        let CpuidEntry {
            eax, ebx, ecx, edx, ..
        } = entry;
        match (entry.leaf, entry.subleaf.unwrap_or(0)) {
            (1, _) => {
                *ecx |= CPUID_1_ECX_X2APIC | CPUID_1_ECX_HYPERVISOR;
                if deadline {
                    *ecx |= CPUID_1_ECX_TSC_DEADLINE;
                }
            }
            (7, 0) => *edx &= !CPUID_7_EDX_AMX,
            (7, 1) => {
                *eax &= !CPUID_7_1_EAX_AMX;
                *edx &= !CPUID_7_1_EDX_AMX;
            }
            (0xa, _) => (*eax, *ebx, *ecx, *edx) = (0, 0, 0, 0),
            (0xd, 0) => *eax &= !XCR0_AMX,
            _ => {}
        }
    }
    Ok(entries)
}

fn is_amx_component(entry: &CpuidEntry) -> bool {
    entry.leaf == 0xd && matches!(entry.subleaf, Some(17 | 18))
}

fn from_kvm(table: &CpuId) -> Vec<CpuidEntry> {
    table
        .as_slice()
        .iter()
        .map(|e| CpuidEntry {
            leaf: e.function,
            subleaf: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        })
        .collect()
}

/// A CPUID table as KVM wants it.
pub(crate) fn to_kvm(table: &[CpuidEntry]) -> Result<CpuId, AccelError> {
    let entries: Vec<_> = table
        .iter()
        .map(|e| kvm_bindings::kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf.unwrap_or(0),
            flags: e.subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            padding: [0; 3],
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        AccelError::Unsupported(format!(
            "a CPUID table of {} entries: KVM takes {KVM_MAX_CPUID_ENTRIES}",
            entries.len()
        ))
    })
}
