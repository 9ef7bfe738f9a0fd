//! The options of new images of the formats of other products.

use image_formats::luks::{self, Hash, IvGenerator, Mode};
use image_formats::qcow2::CreateOptions;
use image_formats::vmdk::{self, Adapter, Subformat};
use image_formats::{NewImage, Property, Value};
use serde_json::{Map, json};

use super::Failure;
use super::args::size;
use super::create::{preallocation, switch};

/// An option's name with its kind of value, and what it means.
pub(crate) type OptionHelp = (&'static str, &'static str);

const SIZE: OptionHelp = ("size=<size>", "Virtual disk size");
const BACKING_FILE: OptionHelp = ("backing_file=<str>", "File name of a base image");

const VPC: &[OptionHelp] = &[
    (
        "force_size=<bool (on/off)>",
        "Keep the size as it is, rather than rounding it up to a disk geometry",
    ),
    BACKING_FILE,
    (
        "preallocation=<str>",
        "Space of a fixed disk (allowed values: off, falloc, full)",
    ),
    SIZE,
    (
        "subformat=<str>",
        "Type of virtual hard disk format: dynamic (default) or fixed",
    ),
];

const VHDX: &[OptionHelp] = &[
    BACKING_FILE,
    (
        "block_size=<size>",
        "Block size: a power of two from 1 MiB to 256 MiB; 0 chooses one by the image's size",
    ),
    (
        "block_state_zero=<bool (on/off)>",
        "Blocks of a dynamic disk begin in the state 'zero' rather than 'not present' (default: on)",
    ),
    ("log_size=<size>", "Log size: at least 1 MiB"),
    (
        "logical_sector_size=<size>",
        "Size of the disk's sectors: 512 (default) or 4096",
    ),
    (
        "preallocation=<str>",
        "Space of a fixed disk (allowed values: off, falloc, full)",
    ),
    SIZE,
    (
        "subformat=<str>",
        "VHDX format type: dynamic (default) or fixed",
    ),
];

const VDI: &[OptionHelp] = &[
    (
        "preallocation=<str>",
        "Space of a static disk (allowed values: off, falloc, full)",
    ),
    SIZE,
    ("static=<bool (on/off)>", "VDI static (pre-allocated) image"),
];

const VMDK: &[OptionHelp] = &[
    (
        "adapter_type=<str>",
        "Virtual adapter type: ide (default), lsilogic, buslogic or legacyESX",
    ),
    BACKING_FILE,
    ("backing_fmt=<str>", "Must be 'vmdk' if present"),
    ("compat6=<bool (on/off)>", "VMDK version 6 image"),
    ("hwversion=<str>", "VMDK hardware version"),
    (
        "preallocation=<str>",
        "Space of a flat disk (allowed values: off, falloc, full)",
    ),
    SIZE,
    (
        "subformat=<str>",
        "VMDK flat extent format: monolithicSparse (default), monolithicFlat, twoGbMaxExtentSparse, \
         twoGbMaxExtentFlat or streamOptimized",
    ),
    ("toolsversion=<str>", "VMware guest tools version"),
    (
        "zeroed_grain=<bool (on/off)>",
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    ),
];

const LUKS: &[OptionHelp] = &[
    (
        "cipher-alg=<str>",
        "Name of encryption cipher algorithm: aes-128, aes-192 or aes-256 (default)",
    ),
    (
        "cipher-mode=<str>",
        "Name of encryption cipher mode: xts (default) or cbc",
    ),
    (
        "hash-alg=<str>",
        "Name of encryption hash algorithm: sha1, sha256 (default) or sha512",
    ),
    (
        "iter-time=<num>",
        "Time to spend in PBKDF in milliseconds (default: 2000)",
    ),
    (
        "ivgen-alg=<str>",
        "Name of IV generator algorithm: plain, plain64 (default) or essiv",
    ),
    (
        "ivgen-hash-alg=<str>",
        "Name of IV generator hash algorithm: sha256",
    ),
    (
        "key-secret=<str>",
        "ID of the secret that provides the keyslot passphrase",
    ),
    SIZE,
];

/// The options that a format has for new images; `None` if it is not one of these.
pub(crate) fn option_list(format: &str) -> Option<&'static [OptionHelp]> {
    Some(match format {
        "vpc" => VPC,
        "vdi" => VDI,
        "vhdx" => VHDX,
        "vmdk" => VMDK,
        "luks" => LUKS,
        _ => return None,
    })
}

fn number(key: &str, value: &str) -> Result<u64, Failure> {
    size(value)
        .ok_or_else(|| Failure::plain(format!("Parameter '{key}' expects a size, not '{value}'")))
}

fn is_fixed(value: &str) -> Result<bool, Failure> {
    match value {
        "fixed" => Ok(true),
        "dynamic" => Ok(false),
        _ => Err(Failure::plain(format!(
            "Parameter 'subformat' does not accept value '{value}'"
        ))),
    }
}

fn invalid(value: &str) -> Failure {
    Failure::plain(format!("Invalid parameter '{value}'"))
}

/// Sets an option of a new image; `false` if the format does not have it.
pub(crate) fn set(image: &mut NewImage, key: &str, value: &str) -> Result<bool, Failure> {
    match image {
        NewImage::Vpc(o) => match key {
            "subformat" => o.fixed = is_fixed(value)?,
            "force_size" => o.force_size = switch(key, value)?,
            "preallocation" => o.preallocation = preallocation(value)?,
            _ => return Ok(false),
        },
        NewImage::Vdi(o) => match key {
            "static" => o.fixed = switch(key, value)?,
            "preallocation" => o.preallocation = preallocation(value)?,
            _ => return Ok(false),
        },
        NewImage::Vhdx(o) => match key {
            "subformat" => o.fixed = is_fixed(value)?,
            "block_size" => o.block_size = number(key, value)?,
            "log_size" => o.log_size = number(key, value)?,
            "block_state_zero" => o.block_state_zero = switch(key, value)?,
            "logical_sector_size" => {
                o.logical_sector =
                    u32::try_from(number(key, value)?).map_err(|_| invalid(value))?;
            }
            "preallocation" => o.preallocation = preallocation(value)?,
            _ => return Ok(false),
        },
        NewImage::Vmdk(o) => return set_vmdk(o, key, value),
        NewImage::Luks(o) => return set_luks(o, key, value),
    }
    Ok(true)
}

fn set_vmdk(o: &mut vmdk::CreateOptions, key: &str, value: &str) -> Result<bool, Failure> {
    let unknown = || Failure::plain(format!("invalid parameter value: {value}"));
    match key {
        "adapter_type" => {
            let found = Adapter::ALL.into_iter().find(|a| a.name() == value);
            o.adapter = found.ok_or_else(unknown)?;
        }
        "subformat" => {
            let found = Subformat::ALL.into_iter().find(|s| s.name() == value);
            o.subformat = found.ok_or_else(unknown)?;
        }
        "compat6" => o.compat6 = switch(key, value)?,
        "zeroed_grain" => o.zeroed_grain = switch(key, value)?,
        "hwversion" => o.hardware_version = Some(value.to_owned()).filter(|v| v != "undefined"),
        "toolsversion" => o.tools_version = Some(value.to_owned()),
        "preallocation" => o.preallocation = preallocation(value)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// Sets an option of a LUKS header; `false` if there is none of this name.
pub(crate) fn set_luks(
    o: &mut luks::CreateOptions,
    key: &str,
    value: &str,
) -> Result<bool, Failure> {
    match key {
        "cipher-alg" => {
            o.key_bits = match value {
                "aes-128" => 128,
                "aes-192" => 192,
                "aes-256" => 256,
                _ => return Err(invalid(value)),
            }
        }
        "cipher-mode" => {
            o.mode = match value {
                "xts" => Mode::Xts,
                "cbc" => Mode::Cbc,
                _ => return Err(invalid(value)),
            }
        }
        "ivgen-alg" => {
            o.iv = match value {
                "plain" => IvGenerator::Plain,
                "plain64" => IvGenerator::Plain64,
                "essiv" => IvGenerator::Essiv(Hash::Sha256),
                _ => return Err(invalid(value)),
            }
        }
        "ivgen-hash-alg" if value == "sha256" => {}
        "ivgen-hash-alg" => return Err(invalid(value)),
        "hash-alg" => o.hash = Hash::parse(value)?,
        "iter-time" => {
            let time = value.parse().ok().filter(|n| *n > 0);
            o.iteration_time = time.ok_or_else(|| invalid(value))?;
        }
        "key-secret" => o.key_secret = Some(value.to_owned()),
        _ => return Ok(false),
    }
    Ok(true)
}

/// The line that announces a new image.
pub(crate) fn describe(image: &NewImage, name: &str, common: &CreateOptions) -> String {
    let mut text = format!(
        "Formatting '{name}', fmt={} size={}",
        image.format(),
        image.size()
    );
    if let Some(file) = &common.backing_file {
        text.push_str(&format!(" backing_file={file}"));
    }
    if let Some(format) = &common.backing_format {
        text.push_str(&format!(" backing_fmt={format}"));
    }
    let on = |value: bool| if value { "on" } else { "off" };
    match image {
        NewImage::Vpc(o) => {
            if o.fixed {
                text.push_str(" subformat=fixed");
            }
            if o.force_size {
                text.push_str(&format!(" force_size={}", on(o.force_size)));
            }
        }
        NewImage::Vdi(o) => text.push_str(&format!(" static={}", on(o.fixed))),
        NewImage::Vhdx(o) => {
            text.push_str(&format!(
                " log_size={} block_size={}",
                o.log_size, o.block_size
            ));
            if o.fixed {
                text.push_str(" subformat=fixed");
            }
            if !o.block_state_zero {
                text.push_str(" block_state_zero=off");
            }
            if o.logical_sector != 512 {
                text.push_str(&format!(" logical_sector_size={}", o.logical_sector));
            }
        }
        NewImage::Vmdk(o) => {
            if o.adapter != Adapter::default() {
                text.push_str(&format!(" adapter_type={}", o.adapter.name()));
            }
            let hardware = o.hardware_version.as_deref().unwrap_or("undefined");
            let compat6 = on(o.compat6);
            text.push_str(&format!(" compat6={compat6} hwversion={hardware}"));
            if o.subformat != Subformat::default() {
                text.push_str(&format!(" subformat={}", o.subformat.name()));
            }
            if let Some(tools) = &o.tools_version {
                text.push_str(&format!(" toolsversion={tools}"));
            }
            if o.zeroed_grain {
                text.push_str(" zeroed_grain=on");
            }
        }
        NewImage::Luks(o) => {
            describe_luks(o, |key, value| text.push_str(&format!(" {key}={value}")));
        }
    }
    text
}

/// The options of a LUKS header that were given.
pub(crate) fn describe_luks(o: &luks::CreateOptions, mut add: impl FnMut(&str, &str)) {
    let default = luks::CreateOptions::default();
    if let Some(id) = &o.key_secret {
        add("key-secret", id);
    }
    if o.key_bits != default.key_bits {
        add("cipher-alg", &format!("aes-{}", o.key_bits));
    }
    if o.mode != default.mode {
        add("cipher-mode", "cbc");
    }
    if o.iv != default.iv {
        add(
            "ivgen-alg",
            match o.iv {
                IvGenerator::Plain => "plain",
                IvGenerator::Plain64 => "plain64",
                IvGenerator::Essiv(_) => "essiv",
            },
        );
    }
    if o.hash != default.hash {
        add("hash-alg", o.hash.name());
    }
    if o.iteration_time != default.iteration_time {
        add("iter-time", &o.iteration_time.to_string());
    }
}

/// Properties as JSON.
pub(crate) fn as_json(properties: &[Property]) -> serde_json::Value {
    let value = |value: &Value| match value {
        Value::Bool(b) => json!(b),
        Value::Number(n) => json!(n),
        Value::Text(t) => json!(t),
        Value::Texts(list) => json!(list),
        Value::Group(group) => as_json(group),
        Value::List(items) => items.iter().map(|item| as_json(item)).collect(),
    };
    let object: Map<String, serde_json::Value> = properties
        .iter()
        .map(|p| (p.key.to_owned(), value(&p.value)))
        .collect();
    object.into()
}

/// Properties as lines for people, indented.
pub(crate) fn as_lines(properties: &[Property], depth: usize) -> Vec<String> {
    let indent = "    ".repeat(depth);
    let mut lines = Vec::new();
    for property in properties {
        let label = property.label;
        match &property.value {
            Value::Bool(b) => lines.push(format!("{indent}{label}: {b}")),
            Value::Number(n) => lines.push(format!("{indent}{label}: {n}")),
            Value::Text(t) => lines.push(format!("{indent}{label}: {t}")),
            Value::Texts(list) => {
                lines.push(format!("{indent}{label}:"));
                let line = |(n, text)| format!("{indent}    [{n}]: {text}");
                lines.extend(list.iter().enumerate().map(line));
            }
            Value::Group(group) => {
                lines.push(format!("{indent}{label}:"));
                lines.extend(as_lines(group, depth + 1));
            }
            Value::List(items) => {
                lines.push(format!("{indent}{label}:"));
                for (n, item) in items.iter().enumerate() {
                    lines.push(format!("{indent}    [{n}]:"));
                    lines.extend(as_lines(item, depth + 2));
                }
            }
        }
    }
    lines
}
