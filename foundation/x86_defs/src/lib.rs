//! The x86 architecture's names: registers, CPUID leaves, MSRs, exception vectors. No logic.
