//! What the host's processor can execute, and so what CPUID may promise.

use std::sync::LazyLock;

use iced_x86::CpuidFeature;

/// Vector extensions of the host. Those up to SSE4.2 are always there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostFeatures {
    /// AES.
    pub(crate) aes: bool,
    /// PCLMULQDQ.
    pub(crate) pclmulqdq: bool,
    /// SHA.
    pub(crate) sha: bool,
    /// AVX, with YMM state enabled by the host's kernel.
    pub(crate) avx: bool,
    /// AVX2.
    pub(crate) avx2: bool,
    /// FMA3.
    pub(crate) fma: bool,
    /// F16C.
    pub(crate) f16c: bool,
    /// GFNI.
    pub(crate) gfni: bool,
    /// VAES.
    pub(crate) vaes: bool,
    /// VPCLMULQDQ.
    pub(crate) vpclmulqdq: bool,
}

static HOST: LazyLock<HostFeatures> = LazyLock::new(|| HostFeatures {
    aes: is_x86_feature_detected!("aes"),
    pclmulqdq: is_x86_feature_detected!("pclmulqdq"),
    sha: is_x86_feature_detected!("sha"),
    avx: is_x86_feature_detected!("avx"),
    avx2: is_x86_feature_detected!("avx2"),
    fma: is_x86_feature_detected!("fma"),
    f16c: is_x86_feature_detected!("f16c"),
    gfni: is_x86_feature_detected!("gfni"),
    vaes: is_x86_feature_detected!("vaes"),
    vpclmulqdq: is_x86_feature_detected!("vpclmulqdq"),
});

/// The host's vector extensions: CPUID promises no others. SSE to SSE4.2, MMX and FXSR are always supported.
pub(crate) fn host_features() -> HostFeatures {
    *HOST
}

/// True when instructions of this feature can be executed here.
pub(crate) fn supports(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    let host = host_features();
    match feature {
        F::MMX | F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2 => true,
        F::AES => host.aes,
        F::PCLMULQDQ => host.pclmulqdq,
        F::SHA => host.sha,
        F::AVX => host.avx,
        F::AVX2 => host.avx2,
        F::FMA => host.fma,
        F::F16C => host.f16c,
        F::GFNI => host.gfni,
        F::VAES => host.vaes,
        F::VPCLMULQDQ => host.vpclmulqdq,
        _ => false,
    }
}
