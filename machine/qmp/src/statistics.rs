//! `query-stats` and `query-stats-schemas` (QEMU `qapi/stats.json`).
//!
//! The commands, their arguments and the form of their answers are QEMU's. The provider is one that QEMU has not got, `corten`:
//! its figures are those of `corten run --stats`, whatever the processor. Times are in nanoseconds, as the schema says.

use serde_json::{Map, Value, json};

use crate::commands::{Arguments, Control, Refusal};

/// The provider's name.
const PROVIDER: &str = "corten";
/// QEMU's targets. There are no figures of the last.
const TARGETS: [&str; 3] = ["vm", "vcpu", "cryptodev"];

/// A name and its value.
pub type Figure = (&'static str, u64);

/// What the machine and its vCPUs have done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Of the machine as a whole.
    pub vm: Vec<Figure>,
    /// Of each vCPU.
    pub vcpus: Vec<Vec<Figure>>,
}

/// What a figure means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// A count that only grows.
    Count,
    /// Nanoseconds, that only grow.
    Time,
    /// Bytes, that only grow.
    Bytes,
    /// Bytes of now.
    BytesNow,
    /// A number of now.
    Now,
}

impl Meaning {
    fn schema(self, name: &str) -> Value {
        match self {
            Self::Count => json!({ "name": name, "type": "cumulative" }),
            Self::Now => json!({ "name": name, "type": "instant" }),
            Self::Bytes => json!({ "name": name, "type": "cumulative", "unit": "bytes" }),
            Self::BytesNow => json!({ "name": name, "type": "instant", "unit": "bytes" }),
            Self::Time => json!({
                "name": name, "type": "cumulative", "unit": "seconds", "base": 10, "exponent": -9
            }),
        }
    }
}

fn wrong_type(name: &str, kind: &str) -> Refusal {
    Refusal::generic(format!(
        "Invalid parameter type for '{name}', expected: {kind}"
    ))
}

fn not_accepted(name: &str, value: &str) -> Refusal {
    Refusal::generic(format!(
        "Parameter '{name}' does not accept value '{value}'"
    ))
}

/// An optional list of strings.
fn strings(list: Option<Value>, name: &str) -> Result<Option<Vec<String>>, Refusal> {
    let list = match list {
        None => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(wrong_type(name, "array")),
    };
    let read = |(i, value)| match value {
        Value::String(text) => Ok(text),
        _ => Err(wrong_type(&format!("{name}[{i}]"), "string")),
    };
    list.into_iter()
        .enumerate()
        .map(read)
        .collect::<Result<_, _>>()
        .map(Some)
}

/// Which figures a request names.
enum Wanted {
    All,
    Nothing,
    Named(Vec<String>),
}

impl Wanted {
    /// Reads the list of providers.
    fn read(arguments: &mut Arguments) -> Result<Self, Refusal> {
        let list = match arguments.0.remove("providers") {
            None => return Ok(Self::All),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(wrong_type("providers", "array")),
        };
        let mut wanted = Self::Nothing;
        for (i, value) in list.into_iter().enumerate() {
            let at = format!("providers[{i}]");
            let Value::Object(mut one) = value else {
                return Err(wrong_type(&at, "object"));
            };
            let provider = one.remove("provider");
            let names = strings(one.remove("names"), &format!("{at}.names"))?;
            if let Some(key) = one.keys().next() {
                let text = format!("Parameter '{at}.{key}' is unexpected");
                return Err(Refusal::generic(text));
            }
            match provider {
                Some(Value::String(name)) if is_provider(&name)? => {
                    wanted = wanted.and(names);
                }
                Some(Value::String(_)) => {}
                Some(_) => return Err(wrong_type(&format!("{at}.provider"), "string")),
                None => {
                    let text = format!("Parameter '{at}.provider' is missing");
                    return Err(Refusal::generic(text));
                }
            }
        }
        Ok(wanted)
    }

    fn and(self, names: Option<Vec<String>>) -> Self {
        match (self, names) {
            (Self::All, _) | (_, None) => Self::All,
            (Self::Nothing, Some(names)) => Self::Named(names),
            (Self::Named(mut all), Some(names)) => {
                all.extend(names);
                Self::Named(all)
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Nothing => false,
            Self::Named(names) => names.iter().any(|n| n == name),
        }
    }
}

/// True for ours, false for QEMU's, which have nothing to say here.
fn is_provider(name: &str) -> Result<bool, Refusal> {
    match name {
        PROVIDER => Ok(true),
        "kvm" | "cryptodev" => Ok(false),
        _ => Err(not_accepted("provider", name)),
    }
}

/// The name of a vCPU.
fn path(number: usize) -> String {
    format!("/machine/cpu[{number}]")
}

fn answer(figures: &[Figure], wanted: &Wanted, vcpu: Option<usize>) -> Option<Value> {
    let shown = figures.iter().filter(|(name, _)| wanted.has(name));
    let stats: Vec<Value> = shown
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    if stats.is_empty() {
        return None;
    }
    let mut result = Map::new();
    result.insert("provider".into(), PROVIDER.into());
    if let Some(number) = vcpu {
        result.insert("qom-path".into(), path(number).into());
    }
    result.insert("stats".into(), stats.into());
    Some(result.into())
}

/// `query-stats`.
pub(crate) fn query(machine: &dyn Control, arguments: &mut Arguments) -> Result<Value, Refusal> {
    let target = arguments.take("target", "string", |v| v.as_str().map(str::to_owned))?;
    if !TARGETS.contains(&target.as_str()) {
        return Err(not_accepted("target", &target));
    }
    let vcpus = match target.as_str() {
        "vcpu" => strings(arguments.0.remove("vcpus"), "vcpus")?,
        _ => None,
    };
    let wanted = Wanted::read(arguments)?;
    arguments.finish()?;
    if matches!(wanted, Wanted::Nothing) || target == "cryptodev" {
        return Ok(json!([]));
    }
    let all = machine.statistics();
    if target == "vm" {
        return Ok(answer(&all.vm, &wanted, None).into_iter().collect());
    }
    let meant = |number| {
        let listed = |list: &Vec<String>| list.contains(&path(number));
        vcpus.as_ref().is_none_or(listed)
    };
    let shown = all.vcpus.iter().enumerate().filter(|(i, _)| meant(*i));
    Ok(shown
        .filter_map(|(i, figures)| answer(figures, &wanted, Some(i)))
        .collect())
}

/// `query-stats-schemas`.
pub(crate) fn schemas(machine: &dyn Control, arguments: &mut Arguments) -> Result<Value, Refusal> {
    let ours = match arguments.0.remove("provider") {
        None => true,
        Some(Value::String(name)) => is_provider(&name)?,
        Some(_) => return Err(wrong_type("provider", "string")),
    };
    arguments.finish()?;
    if !ours {
        return Ok(json!([]));
    }
    let names = machine.statistics_names();
    let stats: Vec<Value> = names.iter().map(|(name, m)| m.schema(name)).collect();
    let of = |target| json!({ "provider": PROVIDER, "target": target, "stats": stats });
    Ok(json!([of("vm"), of("vcpu")]))
}
