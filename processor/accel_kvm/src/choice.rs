//! Whether KVM is the processor to take on this host.

use accel::AccelError;
use accel::probe::{self, RingZero};

use crate::KvmAccel;

/// What `--accel auto` comes to, with the line that tells a person why.
pub enum Choice {
    /// KVM runs guests in hardware.
    Kvm(KvmAccel, String),
    /// It does not, or is not there: the software CPU.
    Soft(String),
}

impl Choice {
    /// What was taken and why, in one line.
    pub fn line(&self) -> &str {
        match self {
            Self::Kvm(_, line) | Self::Soft(line) => line,
        }
    }
}

/// Opens KVM and measures it. Takes less than 20 ms.
pub fn choose() -> Choice {
    decide(KvmAccel::open(), |kvm| probe::ring_zero(kvm))
}

fn decide(
    kvm: Result<KvmAccel, AccelError>,
    measure: impl FnOnce(&KvmAccel) -> Result<RingZero, AccelError>,
) -> Choice {
    let kvm = match kvm {
        Ok(kvm) => kvm,
        Err(AccelError::Unavailable { reason, .. }) => return Choice::Soft(soft(&reason)),
        Err(e) => return Choice::Soft(soft(&format!("/dev/kvm: {e}"))),
    };
    match measure(&kvm) {
        Ok(seen) if seen.is_hardware_speed() => {
            let line = format!("kvm: hardware speed ({:.0} MIPS in ring 0)", seen.mips);
            Choice::Kvm(kvm, line)
        }
        Ok(seen) => Choice::Soft(soft(&explain(&seen))),
        Err(e) => Choice::Soft(soft(&format!("/dev/kvm: {e}"))),
    }
}

fn soft(why: &str) -> String {
    format!("soft: {why}")
}

fn explain(seen: &RingZero) -> String {
    match &seen.stuck {
        Some(why) if seen.mips >= 100.0 => format!("/dev/kvm does not run ring 0 rightly: {why}"),
        _ => format!("/dev/kvm interprets ring 0 at {:.1} MIPS", seen.mips),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_it_took_and_why() {
        let gone = decide(
            Err(AccelError::Unavailable {
                accel: "kvm",
                reason: "cannot open /dev/kvm: Permission denied (os error 13)".into(),
            }),
            |_| unreachable!("there is nothing to measure"),
        );
        assert_eq!(
            gone.line(),
            "soft: cannot open /dev/kvm: Permission denied (os error 13)"
        );
        let slow = RingZero {
            mips: 0.66,
            stuck: Some("it did not finish in time".into()),
        };
        assert!(!slow.is_hardware_speed());
        assert_eq!(explain(&slow), "/dev/kvm interprets ring 0 at 0.7 MIPS");
        let wrong = RingZero {
            mips: 2000.0,
            stuck: Some("it ended in a triple fault".into()),
        };
        assert!(!wrong.is_hardware_speed());
        assert!(explain(&wrong).contains("triple fault"));
    }
}
