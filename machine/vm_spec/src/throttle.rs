//! Limits on a disk's rate.

use block::ThrottleLimits;
use serde::{Deserialize, Serialize};

use crate::{OptionError, Options};

/// QEMU's `throttling.*` options of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ThrottleSpec {
    /// The group that the disk shares its limits with; `None`: no other.
    pub group: Option<String>,
    /// The limits.
    pub limits: ThrottleLimits,
}

/// What messages call the keys.
pub(crate) const KEYS: &str = "throttling.{bps,iops}-{total,read,write}[-max[-length]], throttling.iops-size, throttling.group";

impl ThrottleSpec {
    /// Takes the options that begin with `throttling.`.
    ///
    /// # Errors
    /// Says what is wrong with one, or with all of them together.
    pub(crate) fn take(options: &mut Options) -> Result<Self, OptionError> {
        let mut spec = Self {
            group: options
                .take("throttling.group")?
                .filter(|name| !name.is_empty()),
            limits: ThrottleLimits::default(),
        };
        let mut number = |name: String, to: &mut u64| {
            let key = format!("throttling.{name}");
            let value = options.take_parsed(&key, "a number", |text| text.parse().ok())?;
            *to = value.unwrap_or(0);
            Ok::<(), OptionError>(())
        };
        for (name, rate) in spec.limits.named() {
            number(name.to_owned(), &mut rate.average)?;
            number(format!("{name}-max"), &mut rate.max)?;
            number(format!("{name}-max-length"), &mut rate.max_length)?;
        }
        number("iops-size".to_owned(), &mut spec.limits.iops_size)?;
        let sensible = spec.limits.check();
        sensible.map_err(|why| options.error(format!("throttling.{why}")))?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use crate::DiskSpec;

    #[test]
    fn options() {
        let text = "a,throttling.bps-total=1048576,throttling.bps-total-max=2097152,throttling.bps-total-max-length=3,\
                    throttling.iops-read=100,throttling.iops-size=4096,throttling.group=slow";
        let throttle = DiskSpec::parse("--disk", text).unwrap().throttle;
        let rate = throttle.limits.bps_total;
        assert_eq!(
            (rate.average, rate.max, rate.max_length),
            (1 << 20, 2 << 20, 3)
        );
        assert_eq!(
            (throttle.limits.iops_read.average, throttle.limits.iops_size),
            (100, 4096)
        );
        assert_eq!(throttle.group.as_deref(), Some("slow"));
        let error = |text| DiskSpec::parse("--disk", text).unwrap_err().to_string();
        assert_eq!(
            error("a,throttling.bps-read=fast"),
            "--disk: throttling.bps-read=fast: expected a number"
        );
        assert_eq!(
            error("a,throttling.bps-read-max=5"),
            "--disk: throttling.bps-read-max: wants bps-read too"
        );
        assert!(error("a,throttling.bps=5").contains("unknown key"));
    }
}
