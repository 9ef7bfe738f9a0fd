//! `map`.

use std::rc::Rc;

use block::{Extent, ExtentKind, ExtentQuery, HostRange, Scope};
use image_formats::ImageOptions;

use super::args::{flag, size, value};
use super::output::{put, say};
use super::{Failure, Outcome, Tool, open};

pub(crate) async fn map(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('J', "output"),
        value('s', "start-offset"),
        value('l', "max-length"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let json = parsed.json()?;
    let name = parsed.one_name()?;
    let number = |option, what: &str| match parsed.get(option) {
        None => Ok(None),
        Some(text) => size(text)
            .map(Some)
            .ok_or_else(|| Failure::plain(format!("Invalid {what} specified: '{text}'"))),
    };
    let start = number('s', "start offset")?.unwrap_or(0);
    let most = number('l', "max length")?.unwrap_or(u64::MAX);
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        lock: false,
        ..tool.options(&parsed)
    };
    let (disk, _) = open(name, &options).await?;
    let end = start.saturating_add(most).min(disk.size());
    let mut offset = start;
    let mut last: Option<Extent> = None;
    let mut printer = Printer { json, lines: 0 };
    printer.begin();
    while offset < end {
        let length = end - offset;
        let query = ExtentQuery {
            offset,
            length,
            scope: Scope::Chain,
            limit: 1024,
        };
        for extent in disk.extents(query).await? {
            offset = extent.end();
            let rest = match &mut last {
                Some(last) => last.merge(extent),
                None => Some(extent),
            };
            if let Some(next) = rest
                && let Some(done) = last.replace(next)
            {
                printer.extent(&done)?;
            }
        }
    }
    if let Some(last) = last {
        printer.extent(&last)?;
    }
    printer.end();
    Ok(())
}

struct Printer {
    json: bool,
    lines: usize,
}

impl Printer {
    fn begin(&self) {
        if !self.json {
            say(format!(
                "{:<16}{:<16}{:<16}File",
                "Offset", "Length", "Mapped to"
            ));
        }
    }

    fn extent(&mut self, extent: &Extent) -> Outcome {
        if self.json {
            let comma = if self.lines == 0 { "[" } else { ",\n" };
            self.lines += 1;
            put(&format!("{comma}{}", json_line(extent)));
            return Ok(());
        }
        match &extent.kind {
            ExtentKind::Data(Some(HostRange { file, offset })) => {
                let hex = |n: u64| {
                    if n == 0 {
                        "0".to_owned()
                    } else {
                        format!("{n:#x}")
                    }
                };
                let file: &Rc<str> = file;
                say(format!(
                    "{:<16}{:<16}{:<16}{file}",
                    hex(extent.offset),
                    hex(extent.length),
                    hex(*offset)
                ));
                Ok(())
            }
            ExtentKind::Data(None) | ExtentKind::Compressed => Err(Failure::plain(
                "File contains external, encrypted or compressed clusters.",
            )),
            ExtentKind::Zero(_) | ExtentKind::Unallocated => Ok(()),
        }
    }

    fn end(&self) {
        if self.json {
            say(if self.lines == 0 { "[]" } else { "]" });
        }
    }
}

fn json_line(extent: &Extent) -> String {
    let (present, zero, data, compressed, place) = match &extent.kind {
        ExtentKind::Data(place) => (true, false, true, false, place.as_ref()),
        ExtentKind::Zero(place) => (true, true, false, false, place.as_ref()),
        ExtentKind::Compressed => (true, false, true, true, None),
        ExtentKind::Unallocated => (false, true, false, false, None),
    };
    let offset = place.map_or(String::new(), |p| format!(", \"offset\": {}", p.offset));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}",
        extent.offset, extent.length, extent.depth
    )
}
