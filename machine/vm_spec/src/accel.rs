//! What executes the guest's instructions.

use serde::{Deserialize, Serialize};

use crate::disk::named;
use crate::{OptionError, parse_size};

named! {
    /// The processor that executes the guest.
    AccelChoice {
        /// KVM where it runs at hardware speed, else the software CPU.
        #[default]
        Auto = "auto",
        /// KVM.
        Kvm = "kvm",
        /// The software CPU.
        Soft = "soft",
    }
}

/// Least bytes of translated code for a vCPU.
const LEAST_CACHE: u64 = 1 << 20;
/// Most bytes of translated code for a vCPU: jumps in it reach no farther.
const MOST_CACHE: u64 = 1 << 30;

/// How the software CPU works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftSpec {
    /// Code that runs often is translated to host code; else the interpreter executes everything.
    pub translate: bool,
    /// Bytes of translated code that a vCPU keeps.
    pub cache_size: u64,
}

impl Default for SoftSpec {
    fn default() -> Self {
        Self {
            translate: true,
            cache_size: 64 << 20,
        }
    }
}

/// Reads `ACCEL[,translate=on|off][,cache-size=SIZE]`.
///
/// # Errors
/// Says what is wrong.
pub fn parse_accel(option: &str, text: &str) -> Result<(AccelChoice, SoftSpec), OptionError> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default();
    let choice = AccelChoice::parse(name).ok_or_else(|| {
        let message = format!("'{name}': expected one of {}", AccelChoice::NAMES);
        OptionError::new(option, message)
    })?;
    let mut soft = SoftSpec::default();
    for part in parts {
        let wrong =
            |expected: &str| OptionError::new(option, format!("'{part}': expected {expected}"));
        match part.split_once('=') {
            _ if choice == AccelChoice::Kvm => {
                return Err(wrong("nothing after kvm, which has no options"));
            }
            Some(("translate", "on")) => soft.translate = true,
            Some(("translate", "off")) => soft.translate = false,
            Some(("translate", _)) => return Err(wrong("translate=on or translate=off")),
            Some(("cache-size", size)) => {
                soft.cache_size = parse_size(size, 0)
                    .filter(|size| (LEAST_CACHE..=MOST_CACHE).contains(size))
                    .ok_or_else(|| wrong("cache-size of 1M to 1G"))?;
            }
            _ => return Err(wrong("translate=on|off or cache-size=SIZE")),
        }
    }
    Ok((choice, soft))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_software_cpu() {
        let parse = |text| parse_accel("--accel", text);
        assert_eq!(parse("auto"), Ok((AccelChoice::Auto, SoftSpec::default())));
        let (choice, soft) = parse("soft,translate=off,cache-size=16M").unwrap();
        assert_eq!(choice, AccelChoice::Soft);
        assert_eq!((soft.translate, soft.cache_size), (false, 16 << 20));
        for wrong in [
            "tcg",
            "kvm,translate=on",
            "soft,translate=maybe",
            "soft,cache-size=1",
            "soft,cache-size=2G",
            "soft,threads=4",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
