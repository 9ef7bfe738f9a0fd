//! The named models beside QEMU's: every model that both know promises the same.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::features::Features;
use super::models::{self, Named};

/// A QEMU that answers QMP commands.
struct Qemu {
    child: std::process::Child,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Qemu {
    fn start() -> Option<Self> {
        let child = Command::new("qemu-system-x86_64")
            .args("-accel tcg -M pc -S -nodefaults -display none -qmp stdio".split(' '))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.ok()?;
        let answers = BufReader::new(child.stdout.take()?).lines();
        let mut qemu = Self { child, answers };
        qemu.ask(&json!({"execute": "qmp_capabilities"}))?;
        Some(qemu)
    }

    fn ask(&mut self, command: &Value) -> Option<Value> {
        let to = self.child.stdin.as_mut()?;
        writeln!(to, "{command}").ok()?;
        loop {
            let mut answer: Value = serde_json::from_str(&self.answers.next()?.ok()?).ok()?;
            if let Some(result) = answer.get_mut("return") {
                return Some(result.take());
            }
            if answer.get("error").is_some() {
                return None;
            }
        }
    }

    fn expand(&mut self, name: &str) -> Option<Value> {
        let mut expanded = self.ask(&json!({
            "execute": "query-cpu-model-expansion",
            "arguments": {"type": "full", "model": {"name": name}},
        }))?;
        Some(expanded["model"]["props"].take())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What QEMU's properties promise, without what it adds to every model.
fn promised(properties: &Value) -> Features {
    let mut set = Features::default();
    for (name, value) in properties.as_object().into_iter().flatten() {
        let ours = name.replace('_', "-");
        if value == &Value::Bool(true)
            && let Some(feature) = Features::named(&ours)
        {
            set.add(feature);
        }
    }
    for added in ["x2apic", "hypervisor"] {
        set.remove(Features::named(added).unwrap());
    }
    set
}

fn number(properties: &Value, name: &str) -> u32 {
    properties[name].as_u64().unwrap() as u32
}

fn compare(name: &str, ours: &Named, theirs: &Value) {
    let mut set = super::set_of(&ours.features.join(" "));
    set.remove(Features::named("x2apic").unwrap());
    assert_eq!(set.names(), promised(theirs).names(), "{name}");
    let vendor = std::str::from_utf8(ours.vendor.letters()).unwrap();
    assert_eq!(theirs["vendor"], vendor, "{name}");
    assert_eq!(theirs["model-id"], ours.brand, "{name}");
    for (what, value) in [
        ("family", ours.family),
        ("model", ours.model),
        ("stepping", ours.stepping),
        ("level", ours.level),
        ("xlevel", ours.extended),
    ] {
        assert_eq!(number(theirs, what), value, "{name}: {what}");
    }
}

#[test]
fn models_promise_what_qemus_do() {
    let Some(mut qemu) = Qemu::start() else {
        eprintln!("no qemu-system-x86_64 here: nothing to compare with");
        return;
    };
    let known = qemu
        .ask(&json!({"execute": "query-cpu-definitions"}))
        .unwrap();
    let known: Vec<&str> = known
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|model| model["name"].as_str())
        .collect();
    let mut compared = 0;
    for name in models::names() {
        // QEMU has none for the levels of the psABI, and other versions of it have other models.
        if !known.contains(&name.as_str()) {
            continue;
        }
        let theirs = qemu.expand(&name).unwrap();
        compare(&name, &models::named(&name).unwrap(), &theirs);
        compared += 1;
    }
    assert!(compared >= 100, "only {compared} models compared");
    println!("{compared} models compared");
}
