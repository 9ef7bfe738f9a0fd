//! `check`.

use image_formats::ImageOptions;
use image_formats::qcow2::{CheckReport, Repair};
use serde_json::json;

use super::args::{flag, value};
use super::output::{self, say};
use super::{Failure, Outcome, Tool, open};

pub(crate) async fn check(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('r', "repair"),
        value('J', "output"),
        value('T', "cache"),
        flag('q', "quiet"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let json = parsed.json()?;
    let name = parsed.one_name()?;
    let repair = match parsed.get('r') {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            let message = format!("--repair (-r) expects 'leaks' or 'all' not '{other}'");
            return Err(Failure::plain(message));
        }
    };
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: repair != Repair::None,
        for_check: true,
        backing: false,
        lock: !parsed.has('U'),
        ..tool.options(&parsed)
    };
    let (disk, image) = open(name, &options).await?;
    let format = image.backend.format_name();
    let report = match (&image.qcow2, &image.format) {
        (Some(qcow2), _) => Some(qcow2.check(repair).await?),
        (None, Some(other)) => other.check(repair).await?,
        (None, None) => None,
    };
    let Some(report) = report else {
        return Err(Failure::plain("This image format does not support checks").with_code(63));
    };
    drop(disk);
    if repair != Repair::None {
        image.backend.close().await?;
    }
    let repaired = report.corruptions_fixed + report.leaks_fixed > 0;
    if json {
        let mut object = serde_json::Map::new();
        let mut add = |key: &str, value: u64, always: bool| {
            if always || value > 0 {
                object.insert(key.to_owned(), json!(value));
            }
        };
        add("image-end-offset", report.image_end_offset, true);
        add("corruptions-fixed", report.corruptions_fixed, false);
        add("leaks-fixed", report.leaks_fixed, false);
        add("total-clusters", report.total_clusters, true);
        add("check-errors", 0, true);
        add("corruptions", report.corruptions, false);
        add("leaks", report.leaks, false);
        add("allocated-clusters", report.allocated_clusters, false);
        add("fragmented-clusters", report.fragmented_clusters, false);
        add("compressed-clusters", report.compressed_clusters, false);
        object.insert("filename".into(), json!(name));
        object.insert("format".into(), json!(format));
        say(output::json(&object.into()));
    } else if !parsed.has('q') {
        for message in &report.messages {
            eprintln!("{message}");
        }
        if repaired {
            say("The following inconsistencies were found and repaired:\n");
            say(format!("    {} leaked clusters", report.leaks_fixed));
            say(format!("    {} corruptions\n", report.corruptions_fixed));
            say("Double checking the fixed image now...");
        }
        print_text(&report);
    }
    match (report.corruptions, report.leaks) {
        (0, 0) => Ok(()),
        (0, _) => Err(Failure::status(3)),
        _ => Err(Failure::status(2)),
    }
}

fn print_text(report: &CheckReport) {
    if report.corruptions == 0 && report.leaks == 0 {
        say("No errors were found on the image.");
    }
    if report.corruptions > 0 {
        say(format!(
            "\n{} errors were found on the image.",
            report.corruptions
        ));
        say("Data may be corrupted, or further writes to the image may corrupt it.");
    }
    if report.leaks > 0 {
        say(format!(
            "\n{} leaked clusters were found on the image.",
            report.leaks
        ));
        say("This means waste of disk space, but no harm to data.");
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let share = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        say(format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            share(report.allocated_clusters, report.total_clusters),
            share(report.fragmented_clusters, report.allocated_clusters),
            share(report.compressed_clusters, report.allocated_clusters)
        ));
    }
    if report.image_end_offset > 0 {
        say(format!("Image end offset: {}", report.image_end_offset));
    }
}
