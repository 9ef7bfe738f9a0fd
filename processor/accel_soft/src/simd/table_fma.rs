//! Stubs of the fused multiply-add instructions (FMA3).
#![allow(unsafe_code)] // The stubs are naked functions.

use iced_x86::Mnemonic;

use super::call::stub;
use super::table::{Entry, Float};

macro_rules! packed {
    ($op:literal, $float:ident) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1, xmm2"))),
            ymm: Some(stub!(concat!($op, " ymm0, ymm1, ymm2"))),
            float: Float::$float,
            ..Entry::NONE
        }
    };
}

macro_rules! scalar {
    ($op:literal, $float:ident) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1, xmm2"))),
            float: Float::$float,
            ..Entry::NONE
        }
    };
}

/// The entry of a mnemonic in this table.
#[rustfmt::skip]
pub(crate) fn entry(mnemonic: Mnemonic) -> Option<Entry> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Vfmadd132ps => packed!("vfmadd132ps", Single),
        M::Vfmadd132pd => packed!("vfmadd132pd", Double),
        M::Vfmadd132ss => scalar!("vfmadd132ss", SingleScalar),
        M::Vfmadd132sd => scalar!("vfmadd132sd", DoubleScalar),
        M::Vfmadd213ps => packed!("vfmadd213ps", Single),
        M::Vfmadd213pd => packed!("vfmadd213pd", Double),
        M::Vfmadd213ss => scalar!("vfmadd213ss", SingleScalar),
        M::Vfmadd213sd => scalar!("vfmadd213sd", DoubleScalar),
        M::Vfmadd231ps => packed!("vfmadd231ps", Single),
        M::Vfmadd231pd => packed!("vfmadd231pd", Double),
        M::Vfmadd231ss => scalar!("vfmadd231ss", SingleScalar),
        M::Vfmadd231sd => scalar!("vfmadd231sd", DoubleScalar),
        M::Vfmsub132ps => packed!("vfmsub132ps", Single),
        M::Vfmsub132pd => packed!("vfmsub132pd", Double),
        M::Vfmsub132ss => scalar!("vfmsub132ss", SingleScalar),
        M::Vfmsub132sd => scalar!("vfmsub132sd", DoubleScalar),
        M::Vfmsub213ps => packed!("vfmsub213ps", Single),
        M::Vfmsub213pd => packed!("vfmsub213pd", Double),
        M::Vfmsub213ss => scalar!("vfmsub213ss", SingleScalar),
        M::Vfmsub213sd => scalar!("vfmsub213sd", DoubleScalar),
        M::Vfmsub231ps => packed!("vfmsub231ps", Single),
        M::Vfmsub231pd => packed!("vfmsub231pd", Double),
        M::Vfmsub231ss => scalar!("vfmsub231ss", SingleScalar),
        M::Vfmsub231sd => scalar!("vfmsub231sd", DoubleScalar),
        M::Vfnmadd132ps => packed!("vfnmadd132ps", Single),
        M::Vfnmadd132pd => packed!("vfnmadd132pd", Double),
        M::Vfnmadd132ss => scalar!("vfnmadd132ss", SingleScalar),
        M::Vfnmadd132sd => scalar!("vfnmadd132sd", DoubleScalar),
        M::Vfnmadd213ps => packed!("vfnmadd213ps", Single),
        M::Vfnmadd213pd => packed!("vfnmadd213pd", Double),
        M::Vfnmadd213ss => scalar!("vfnmadd213ss", SingleScalar),
        M::Vfnmadd213sd => scalar!("vfnmadd213sd", DoubleScalar),
        M::Vfnmadd231ps => packed!("vfnmadd231ps", Single),
        M::Vfnmadd231pd => packed!("vfnmadd231pd", Double),
        M::Vfnmadd231ss => scalar!("vfnmadd231ss", SingleScalar),
        M::Vfnmadd231sd => scalar!("vfnmadd231sd", DoubleScalar),
        M::Vfnmsub132ps => packed!("vfnmsub132ps", Single),
        M::Vfnmsub132pd => packed!("vfnmsub132pd", Double),
        M::Vfnmsub132ss => scalar!("vfnmsub132ss", SingleScalar),
        M::Vfnmsub132sd => scalar!("vfnmsub132sd", DoubleScalar),
        M::Vfnmsub213ps => packed!("vfnmsub213ps", Single),
        M::Vfnmsub213pd => packed!("vfnmsub213pd", Double),
        M::Vfnmsub213ss => scalar!("vfnmsub213ss", SingleScalar),
        M::Vfnmsub213sd => scalar!("vfnmsub213sd", DoubleScalar),
        M::Vfnmsub231ps => packed!("vfnmsub231ps", Single),
        M::Vfnmsub231pd => packed!("vfnmsub231pd", Double),
        M::Vfnmsub231ss => scalar!("vfnmsub231ss", SingleScalar),
        M::Vfnmsub231sd => scalar!("vfnmsub231sd", DoubleScalar),
        M::Vfmaddsub132ps => packed!("vfmaddsub132ps", Single),
        M::Vfmaddsub132pd => packed!("vfmaddsub132pd", Double),
        M::Vfmaddsub213ps => packed!("vfmaddsub213ps", Single),
        M::Vfmaddsub213pd => packed!("vfmaddsub213pd", Double),
        M::Vfmaddsub231ps => packed!("vfmaddsub231ps", Single),
        M::Vfmaddsub231pd => packed!("vfmaddsub231pd", Double),
        M::Vfmsubadd132ps => packed!("vfmsubadd132ps", Single),
        M::Vfmsubadd132pd => packed!("vfmsubadd132pd", Double),
        M::Vfmsubadd213ps => packed!("vfmsubadd213ps", Single),
        M::Vfmsubadd213pd => packed!("vfmsubadd213pd", Double),
        M::Vfmsubadd231ps => packed!("vfmsubadd231ps", Single),
        M::Vfmsubadd231pd => packed!("vfmsubadd231pd", Double),
        _ => return None,
    })
}
