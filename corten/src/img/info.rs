//! `info`.

use std::os::unix::fs::MetadataExt;

use block::{BlockError, ImplicitFile};
use image_formats::qcow2::{Autoclear, Compatible, Incompatible, Qcow2};
use image_formats::{
    Image, ImageOptions, Property, Value as PropertyValue, local_path, open_image, resolve_name,
};
use serde_json::{Map, Value, json};

use super::args::{flag, value};
use super::output::{self, human_size, say};
use super::{Failure, Outcome, Tool, bitmap, confined, formats, snapshot};

/// What is known of one layer.
struct Layer {
    name: String,
    format: &'static str,
    size: u64,
    file_length: u64,
    disk_size: Option<u64>,
    image: Image,
}

pub(crate) fn info(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('J', "output"),
        flag('C', "backing-chain"),
        flag('U', "force-share"),
        flag('I', "image-opts"),
        value('t', "cache"),
        flag('L', "limits"),
        flag('N', "no-sandbox"),
    ];
    let parsed = tool.parse(rest, &specs)?;
    let json = parsed.json()?;
    let mut name = parsed.one_name()?.to_owned();
    let mut options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        lock: false,
        backing: false,
        for_check: true,
        ..tool.options(&parsed)
    };
    let (mut names, mut looks) = (Vec::new(), Vec::new());
    loop {
        if names.contains(&name) {
            let message = format!("Backing file '{name}' creates an infinite loop.");
            return Err(Failure::plain(message));
        }
        let look = look(tool, parsed.has('N'), &name, &options)?;
        let next = parsed.has('C').then(|| below(&look)).flatten();
        let next = next.map(|(below, format)| {
            let why = ImplicitFile::Backing {
                format: format.clone(),
            };
            let admitted = options.external.admit(&name, &below, &why)?;
            Ok::<_, BlockError>((admitted, format))
        });
        looks.push(look);
        names.push(name);
        let Some((below, format)) = next.transpose()? else {
            break;
        };
        (name, options.format) = (below, format);
    }
    if json {
        let mut values: Vec<Value> = looks.iter_mut().map(|look| look["json"].take()).collect();
        say(output::json(&if parsed.has('C') {
            Value::Array(values)
        } else {
            values.swap_remove(0)
        }));
    } else {
        let texts: Vec<&str> = looks.iter().filter_map(|l| l["text"].as_str()).collect();
        say(texts.join("\n\n"));
    }
    Ok(())
}

/// Looks at an image, in a sandbox if it may be hostile.
fn look(tool: Tool, trusted: bool, name: &str, options: &ImageOptions) -> Result<Value, Failure> {
    if trusted || nbd::NbdName::is_nbd(name) {
        return look_here(name, options);
    }
    let confined = confined::look(name, options, |image, blocks| {
        Layer::new(name, image, Some(blocks)).told()
    });
    match confined? {
        Some(told) => Ok(told),
        // The old tool has no sandbox anywhere.
        None if tool.compatible => look_here(name, options),
        None => Err(Failure::plain(format!(
            "cannot look at '{name}': the kernel does not let a sandbox be made (--no-sandbox)"
        ))),
    }
}

/// Looks at an image in this process: one that comes over a network, or as the user demands.
fn look_here(name: &str, options: &ImageOptions) -> Result<Value, Failure> {
    let looked = block::executor::block_on(async {
        let image = open_image(name, options).await?;
        let disk_size = if nbd::NbdName::is_nbd(name) {
            // Only the server knows.
            None
        } else {
            let metadata = std::fs::metadata(local_path(name)?)
                .map_err(|e| Failure::plain(format!("cannot look at '{name}': {e}")))?;
            let format = image.format.as_ref();
            let files = format.map_or(Vec::new(), |f| f.describe().files);
            let others = files.iter().filter_map(|file| std::fs::metadata(file).ok());
            let blocks = others.fold(metadata.blocks(), |sum, m| sum + m.blocks());
            Some(blocks * 512)
        };
        Ok(Layer::new(name, image, disk_size).told())
    });
    looked?
}

impl Layer {
    fn new(name: &str, image: Image, disk_size: Option<u64>) -> Self {
        Self {
            name: name.to_owned(),
            format: image.backend.format_name(),
            size: image.backend.limits().size,
            file_length: image.medium.len(),
            disk_size,
            image,
        }
    }

    /// All that is said of it, for people and for programs.
    fn told(&self) -> Value {
        let (json, text) = (as_json(self), as_text(self));
        json!({ "json": json, "text": text, "below": backing(self) })
    }
}

/// What is below an image of which this was told: the name as stored, and its format.
fn below(told: &Value) -> Option<(String, Option<String>)> {
    let (name, format) = (told["below"][0].as_str()?, told["below"][1].as_str());
    Some((name.to_owned(), format.map(str::to_owned)))
}

/// What a layer says is below it: the name as stored, and its format.
fn backing(layer: &Layer) -> Option<(String, Option<String>)> {
    if let Some(qcow2) = &layer.image.qcow2 {
        let header = qcow2.header();
        return Some((header.backing_file?, header.backing_format));
    }
    let description = layer.image.format.as_ref()?.describe();
    Some((description.backing_file?, description.backing_format))
}

fn specific(layer: &Layer) -> Option<Vec<Property>> {
    if let Some(qcow2) = &layer.image.qcow2 {
        return Some(qcow2_properties(qcow2));
    }
    let specific = layer.image.format.as_ref()?.describe().specific;
    Some(specific).filter(|list| !list.is_empty())
}

/// The properties of a qcow2 image in the order in which they are shown.
pub(crate) fn qcow2_properties(qcow2: &Qcow2) -> Vec<Property> {
    let header = qcow2.header();
    let of = |label, key, value| Property { label, key, value };
    let text = |label, key, value: &str| of(label, key, PropertyValue::Text(value.to_owned()));
    let truth = |label, key, value| of(label, key, PropertyValue::Bool(value));
    let compat = if header.version >= 3 { "1.1" } else { "0.10" };
    let refcounts = PropertyValue::Number(1 << header.refcount_order);
    let refcounts = of("refcount bits", "refcount-bits", refcounts);
    let encryption = qcow2.encryption().map(encryption);
    let encryption = encryption.map(|list| of("encrypt", "encrypt", PropertyValue::Group(list)));
    let mut list = vec![
        text("compat", "compat", compat),
        text(
            "compression type",
            "compression-type",
            header.compression.name(),
        ),
    ];
    if header.version < 3 {
        list.push(refcounts);
        list.extend(encryption);
        return list;
    }
    let lazy = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
    let corrupt = header.incompatible.contains(Incompatible::CORRUPT);
    list.push(truth("lazy refcounts", "lazy-refcounts", lazy));
    let bitmaps = bitmap::properties(&qcow2.bitmaps());
    if !bitmaps.is_empty() {
        list.push(of("bitmaps", "bitmaps", PropertyValue::List(bitmaps)));
    }
    list.push(refcounts);
    list.extend(encryption);
    if let Some(data) = &header.data_file {
        let raw = header.autoclear.contains(Autoclear::RAW_DATA_FILE);
        list.extend([
            text("data file", "data-file", data),
            truth("data file raw", "data-file-raw", raw),
        ]);
    }
    list.extend([
        truth("corrupt", "corrupt", corrupt),
        truth("extended l2", "extended-l2", header.has_subclusters()),
    ]);
    list
}

/// A LUKS header's properties as those of a qcow2 image: with the name of the method.
fn encryption(mut list: Vec<Property>) -> Vec<Property> {
    let uuid = list.iter().position(|property| property.key == "uuid");
    let format = Property {
        label: "format",
        key: "format",
        value: PropertyValue::Text("luks".into()),
    };
    list.insert(uuid.map_or(0, |at| at + 1), format);
    list
}

/// Properties for people, a line for each.
pub(crate) fn property_lines(list: &[Property]) -> String {
    let lines = formats::as_lines(list, 1);
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Whether what is stored can't be read without a password.
fn is_encrypted(layer: &Layer) -> bool {
    match &layer.image.qcow2 {
        Some(qcow2) => qcow2.encryption().is_some(),
        None => {
            let format = layer.image.format.as_ref();
            format.is_some_and(|format| format.describe().encrypted)
        }
    }
}

fn as_text(layer: &Layer) -> String {
    let mut lines = vec![
        format!("image: {}", layer.name),
        format!("file format: {}", layer.format),
        format!(
            "virtual size: {} ({} bytes)",
            human_size(layer.size),
            layer.size
        ),
        format!("disk size: {}", shown_disk_size(layer)),
    ];
    if is_encrypted(layer) {
        lines.push("encrypted: yes".to_owned());
    }
    if let Some(qcow2) = &layer.image.qcow2 {
        let header = qcow2.header();
        if header.incompatible.contains(Incompatible::DIRTY) {
            lines.push("cleanly shut down: no".to_owned());
        }
    }
    if let Some(size) = cluster_size(layer) {
        lines.push(format!("cluster_size: {size}"));
    }
    if let Some((backing, format)) = backing(layer) {
        let full = resolve_name(&layer.name, &backing);
        let actual = if full == backing {
            String::new()
        } else {
            format!(" (actual path: {full})")
        };
        lines.push(format!("backing file: {backing}{actual}"));
        if let Some(format) = format {
            lines.push(format!("backing file format: {format}"));
        }
    }
    if let Some(qcow2) = &layer.image.qcow2 {
        let snapshots = qcow2.snapshots();
        if !snapshots.is_empty() {
            lines.extend(snapshot::table(&snapshots));
        }
    }
    if let Some(list) = specific(layer) {
        lines.push("Format specific information:".to_owned());
        lines.extend(formats::as_lines(&list, 1));
    }
    lines.push("Child node '/file':".to_owned());
    lines.push(format!("    filename: {}", layer.name));
    lines.push("    protocol type: file".to_owned());
    let length = shown_length(layer.file_length);
    lines.push(format!(
        "    file length: {} ({length} bytes)",
        human_size(length)
    ));
    lines.push(format!("    disk size: {}", shown_disk_size(layer)));
    lines.join("\n")
}

/// The unit of allocation in bytes.
fn cluster_size(layer: &Layer) -> Option<u64> {
    match &layer.image.qcow2 {
        Some(qcow2) => Some(qcow2.cluster_size()),
        None => layer.image.format.as_ref()?.describe().cluster_size,
    }
}

fn shown_disk_size(layer: &Layer) -> String {
    layer
        .disk_size
        .map_or_else(|| "unavailable".to_owned(), human_size)
}

/// Files count in whole sectors.
fn shown_length(length: u64) -> u64 {
    length.next_multiple_of(512)
}

fn as_json(layer: &Layer) -> Value {
    let length = shown_length(layer.file_length);
    let mut object = Map::new();
    let file = json!({
        "children": [],
        "virtual-size": length,
        "filename": layer.name,
        "format": "file",
        "actual-size": layer.disk_size,
        "format-specific": { "type": "file", "data": {} },
        "dirty-flag": false,
    });
    object.insert("children".into(), json!([{ "name": "file", "info": file }]));
    let header = layer.image.qcow2.as_ref().map(|q| q.header());
    let header = header.as_ref();
    if let Some(qcow2) = &layer.image.qcow2 {
        let snapshots = qcow2.snapshots();
        if !snapshots.is_empty() {
            let list: Vec<Value> = snapshots.iter().map(snapshot::as_json).collect();
            object.insert("snapshots".into(), Value::Array(list));
        }
    }
    let backing = backing(layer);
    if let Some(format) = backing.as_ref().and_then(|(_, format)| format.as_ref()) {
        object.insert("backing-filename-format".into(), json!(format));
    }
    object.insert("virtual-size".into(), json!(layer.size));
    object.insert("filename".into(), json!(layer.name));
    if let Some(size) = cluster_size(layer) {
        object.insert("cluster-size".into(), json!(size));
    }
    object.insert("format".into(), json!(layer.format));
    object.insert("actual-size".into(), json!(layer.disk_size));
    if let Some(list) = specific(layer) {
        let data = formats::as_json(&list);
        let specific = json!({ "type": layer.format, "data": data });
        object.insert("format-specific".into(), specific);
    }
    if is_encrypted(layer) {
        object.insert("encrypted".into(), json!(true));
    }
    if let Some((backing, _)) = &backing {
        let full = resolve_name(&layer.name, backing);
        object.insert("full-backing-filename".into(), json!(full));
        object.insert("backing-filename".into(), json!(backing));
    }
    let dirty = header.is_some_and(|h| h.incompatible.contains(Incompatible::DIRTY));
    object.insert("dirty-flag".into(), json!(dirty));
    Value::Object(object)
}
