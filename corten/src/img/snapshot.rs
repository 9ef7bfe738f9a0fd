//! `snapshot`.

use std::time::{SystemTime, UNIX_EPOCH};

use block::BlockBackend;
use image_formats::ImageOptions;
use image_formats::qcow2::Snapshot;
use serde_json::{Value, json};

use super::args::{flag, value};
use super::output::{human_size, local_time, say};
use super::{Failure, Outcome, Tool, open};

/// Snapshots as a table for people.
pub(crate) fn table(snapshots: &[Snapshot]) -> Vec<String> {
    let heading = format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    let mut lines = vec!["Snapshot list:".to_owned(), heading];
    for s in snapshots {
        let seconds = s.vm_clock / 1_000_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            s.vm_clock / 1_000_000 % 1000
        );
        let instructions = s.instructions.map_or("--".to_owned(), |n| n.to_string());
        lines.push(format!(
            "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
            s.id,
            s.name,
            human_size(s.vm_state_size),
            local_time(s.seconds),
            clock,
            instructions
        ));
    }
    lines
}

/// A snapshot as `info` shows it.
pub(crate) fn as_json(s: &Snapshot) -> Value {
    let mut object = serde_json::Map::new();
    if let Some(instructions) = s.instructions {
        object.insert("icount".into(), json!(instructions));
    }
    object.insert("vm-clock-nsec".into(), json!(s.vm_clock % 1_000_000_000));
    object.insert("name".into(), json!(s.name));
    object.insert("date-sec".into(), json!(s.seconds));
    object.insert("date-nsec".into(), json!(s.nanoseconds));
    object.insert("vm-clock-sec".into(), json!(s.vm_clock / 1_000_000_000));
    object.insert("id".into(), json!(s.id));
    object.insert("vm-state-size".into(), json!(s.vm_state_size));
    Value::Object(object)
}

pub(crate) async fn snapshot(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        flag('l', "list"),
        value('c', "create"),
        value('a', "apply"),
        value('d', "delete"),
        flag('q', "quiet"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let name = parsed.one_name()?;
    let actions = parsed.all(&['l', 'c', 'a', 'd']);
    let (action, which) = match actions[..] {
        [] => ('l', ""),
        [one] => one,
        _ => return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'")),
    };
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: action != 'l',
        backing: action != 'l',
        lock: action != 'l' && !parsed.has('U'),
        ..tool.options(&parsed)
    };
    let (disk, image) = open(name, &options).await?;
    let Some(qcow2) = image.qcow2 else {
        if action == 'l' {
            return Ok(());
        }
        let verb = match action {
            'c' => "create",
            'a' => "apply",
            _ => "delete",
        };
        let format = image.backend.format_name();
        let message =
            format!("Could not {verb} snapshot '{which}': {format} images have no snapshots");
        return Err(Failure::plain(message));
    };
    match action {
        'c' => {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
            let micros = now.subsec_micros() * 1000;
            qcow2.create_snapshot(which, (seconds, micros)).await?;
        }
        'a' => qcow2.apply_snapshot(which).await?,
        'd' => qcow2.delete_snapshot(which).await?,
        _ => {
            let snapshots = qcow2.snapshots();
            if !snapshots.is_empty() {
                table(&snapshots).iter().for_each(say);
            }
            return Ok(());
        }
    }
    drop(disk);
    qcow2.close().await?;
    Ok(())
}
