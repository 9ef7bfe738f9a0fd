//! CPUID: the table that a virtual processor answers from (SDM volume 2, CPUID).

/// One answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, for leaves that look at it.
    pub subleaf: Option<u32>,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Vendor of the hypervisor leaves: the first leaf of KVM's paravirtual interface.
pub const KVM_SIGNATURE: u32 = 0x4000_0000;
/// KVM's paravirtual features.
pub const KVM_FEATURES: u32 = 0x4000_0001;
