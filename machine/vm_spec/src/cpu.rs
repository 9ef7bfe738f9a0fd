//! The processor that a guest sees.

use serde::{Deserialize, Serialize};

use crate::OptionError;

/// Most vCPUs of a machine, as in QEMU's Q35. APIC IDs above 254 are those of x2APICs; message-signalled interrupts reach them
/// by KVM's 15-bit destinations.
pub const MAX_CPUS: u32 = 288;

/// CPU model and features.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSpec {
    /// Model name: `max`, `host`, or a named one such as `Haswell` or `EPYC-v3`.
    pub model: String,
    /// Features added to the model.
    pub add: Vec<String>,
    /// Features taken from the model.
    pub remove: Vec<String>,
    /// Refuse to start when the processor has not got every feature of the model.
    #[serde(default)]
    pub enforce: bool,
}

impl Default for CpuSpec {
    fn default() -> Self {
        Self {
            model: "max".into(),
            add: Vec::new(),
            remove: Vec::new(),
            enforce: false,
        }
    }
}

impl CpuSpec {
    /// Reads `MODEL[,+feature][,-feature][,feature=on|off][,enforce]`.
    ///
    /// # Errors
    /// Says what is wrong. Whether a model or feature exists is the machine's to say.
    pub fn parse(option: &str, text: &str) -> Result<Self, OptionError> {
        let mut parts = text.split(',');
        let model = parts.next().unwrap_or_default();
        if model.is_empty() {
            return Err(OptionError::new(
                option,
                "expected a CPU model first, such as max",
            ));
        }
        let mut spec = Self {
            model: model.to_owned(),
            add: Vec::new(),
            remove: Vec::new(),
            enforce: false,
        };
        for part in parts {
            if let "enforce" | "enforce=on" | "enforce=off" = part {
                spec.enforce = part != "enforce=off";
                continue;
            }
            let (list, name) = if let Some(name) = part.strip_prefix('+') {
                (&mut spec.add, name)
            } else if let Some(name) = part.strip_prefix('-') {
                (&mut spec.remove, name)
            } else {
                match part.split_once('=') {
                    Some((name, "on")) => (&mut spec.add, name),
                    Some((name, "off")) => (&mut spec.remove, name),
                    _ => {
                        let message = format!(
                            "'{part}': expected +feature, -feature, feature=on|off or enforce"
                        );
                        return Err(OptionError::new(option, message));
                    }
                }
            };
            list.push(name.to_ascii_lowercase().replace('_', "-"));
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_and_features() {
        let spec = CpuSpec::parse("--cpu", "max,+avx2,-X2apic,sse4_2=off").unwrap();
        assert_eq!(spec.model, "max");
        assert_eq!(spec.add, ["avx2"]);
        assert_eq!(spec.remove, ["x2apic", "sse4-2"]);
        assert!(CpuSpec::parse("--cpu", "").is_err());
        assert!(CpuSpec::parse("--cpu", "max,avx2").is_err());
    }
}
