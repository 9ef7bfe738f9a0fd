//! `verify`, and the manifests that `convert --checksum` writes: BLAKE3 digests of what a guest sees,
//! so that an image can be checked after a copy, in whatever format it then is.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::executor::{offload, spawn_local};
use block::{Disk, ExtentQuery, IoBuf, Scope};
use image_formats::ImageOptions;
use serde_json::{Value, json};

use super::args::{flag, value};
use super::output::{self, Progress, say};
use super::{Failure, Outcome, Tool, open};

/// The extents that digests are made of, in bytes.
pub(crate) const EXTENT: u64 = 4 << 20;
/// Extents that are read and digested at once.
const PARALLEL: usize = 4;
/// The longest manifest that is read: digests of 8 TiB.
const LONGEST: u64 = 160 << 20;
/// What the first member of a manifest says.
const KIND: &str = "corten-manifest";

/// Digests of a disk's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Of the disk, in bytes.
    size: u64,
    /// Of each extent but the last, in bytes.
    extent: u64,
    /// In hexadecimal, by extent; `None` for one that is all zeroes.
    digests: Vec<Option<String>>,
}

/// Where the manifest of an image is looked for.
pub(crate) fn beside(image: &str) -> PathBuf {
    PathBuf::from(format!("{image}.blake3"))
}

impl Manifest {
    /// Reads disks that follow each other and digests them.
    pub(crate) async fn of(
        disks: &[Rc<Disk>],
        extent: u64,
        progress: &dyn Fn(u64),
    ) -> Result<Self, Failure> {
        let size = disks.iter().map(|disk| disk.size()).sum::<u64>();
        let mut digests = Vec::new();
        let mut running = VecDeque::new();
        let mut offset = 0;
        while offset < size || !running.is_empty() {
            if offset < size && running.len() < PARALLEL {
                let length = extent.min(size - offset);
                let disks = disks.to_vec();
                let digest = spawn_local(async move { digest(&disks, offset, length).await });
                running.push_back((length, digest));
                offset += length;
            } else if let Some((length, digest)) = running.pop_front() {
                digests.push(digest.await?);
                progress(length);
            }
        }
        Ok(Self {
            size,
            extent,
            digests,
        })
    }

    /// Writes it beside an image: whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> Outcome {
        let text = output::json(&json!({
            "kind": KIND,
            "version": 1,
            "digest": "blake3",
            "size": self.size,
            "extent-size": self.extent,
            "digests": self.digests,
        }));
        let failed = |e: std::io::Error| Failure::plain(format!("{}: {e}", path.display()));
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        std::fs::write(&part, text + "\n").map_err(failed)?;
        std::fs::rename(&part, path).map_err(failed)
    }

    /// Reads one that [`Manifest::write`] has written.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |why: String| Failure::plain(format!("{}: {why}", path.display()));
        let length = std::fs::metadata(path).map_err(|e| failed(e.to_string()))?;
        if length.len() > LONGEST {
            return Err(failed(format!(
                "longer than {LONGEST} bytes: not a manifest"
            )));
        }
        let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
        let value: Value = serde_json::from_slice(&text)
            .map_err(|_| failed("not a manifest: JSON was expected".to_owned()))?;
        Self::parse(&value).ok_or_else(|| {
            failed("not a manifest of version 1 as `convert --checksum` writes them".to_owned())
        })
    }

    fn parse(value: &Value) -> Option<Self> {
        let is = |key: &str, word: &str| value.get(key).and_then(Value::as_str) == Some(word);
        if !is("kind", KIND) || !is("digest", "blake3") || value.get("version")?.as_u64()? != 1 {
            return None;
        }
        let (size, extent) = (
            value.get("size")?.as_u64()?,
            value.get("extent-size")?.as_u64()?,
        );
        let digests = value.get("digests")?.as_array()?;
        let known = (512..=64 << 20).contains(&extent) && extent.is_multiple_of(512);
        if !known || digests.len() as u64 != size.div_ceil(extent) {
            return None;
        }
        let one = |digest: &Value| match digest {
            Value::Null => Some(None),
            Value::String(text) if text.len() == 64 => Some(Some(text.clone())),
            _ => None,
        };
        let digests = digests.iter().map(one).collect::<Option<_>>()?;
        Some(Self {
            size,
            extent,
            digests,
        })
    }

    /// The extents (offset and length) in which `found` is otherwise.
    fn differences(&self, found: &Self) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        for (n, digest) in found.digests.iter().enumerate() {
            // What an image has beyond the disk must be zero: formats round sizes up.
            if self.digests.get(n).unwrap_or(&None) != digest {
                let offset = n as u64 * self.extent;
                let end = self.size.max(found.size);
                all.push((offset, self.extent.min(end - offset)));
            }
        }
        if found.size < self.size {
            all.push((found.size, self.size - found.size));
        }
        all
    }
}

/// The digest of a part of disks that follow each other; `None` if it is zero.
async fn digest(disks: &[Rc<Disk>], offset: u64, length: u64) -> Result<Option<String>, Failure> {
    // Padding with zeroes to the whole extent lets sizes be rounded up without another digest.
    let whole = IoBuf::zeroed(length.next_multiple_of(512) as usize);
    let mut zero = true;
    let mut start = 0;
    for disk in disks {
        let end = start + disk.size();
        let (low, high) = (offset.max(start), (offset + length).min(end));
        if low < high && !reads_as_zero(disk, low - start, high - low).await? {
            let part = whole.slice((low - offset) as usize, (high - low) as usize);
            disk.read(low - start, part).await?;
            zero = false;
        }
        start = end;
    }
    if zero {
        return Ok(None);
    }
    Ok(offload(move || {
        let bytes = whole.to_vec();
        let content = bytes.iter().rposition(|b| *b != 0)?;
        // Zeroes at the end do not count, so a disk that has grown by some has the same digests.
        Some(blake3::hash(&bytes[..=content]).to_hex().to_string())
    })
    .await)
}

async fn reads_as_zero(disk: &Disk, offset: u64, length: u64) -> Result<bool, Failure> {
    let query = ExtentQuery {
        offset,
        length,
        scope: Scope::Chain,
        limit: 2,
    };
    let extents = disk.extents(query).await?;
    let first = extents.first();
    Ok(first.is_some_and(|e| e.reads_as_zero() && e.end() >= offset + length))
}

pub(crate) async fn verify(tool: Tool, rest: &[String]) -> Outcome {
    let specs = [
        value('f', "format"),
        value('M', "manifest"),
        value('J', "output"),
        flag('p', "progress"),
        flag('q', "quiet"),
        flag('U', "force-share"),
    ];
    // As with `compare`, 1 means that the content differs and 2 that it could not be looked at.
    let failed = |f: Failure| f.with_code(2);
    let parsed = tool
        .parse(rest, &specs)
        .map_err(|f| if f.code == 0 { f } else { failed(f) })?;
    let json = parsed.json().map_err(failed)?;
    let name = parsed.one_name().map_err(failed)?;
    let path = parsed.get('M').map_or_else(|| beside(name), PathBuf::from);
    let manifest = Manifest::read(&path).map_err(failed)?;
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        lock: !parsed.has('U'),
        ..tool.options(&parsed)
    };
    let (disk, _) = open(name, &options).await.map_err(failed)?;
    let progress = Progress::new(parsed.has('p') && !parsed.has('q'), disk.size());
    let callback = progress.callback();
    let found = Manifest::of(&[disk], manifest.extent, &*callback).await;
    let found = found.map_err(failed)?;
    progress.finish();
    let differences = manifest.differences(&found);
    let extents = manifest.digests.len();
    if json {
        let ranges = differences
            .iter()
            .map(|(offset, length)| json!({"offset": offset, "length": length}));
        say(output::json(&json!({
            "filename": name,
            "manifest": path.to_string_lossy(),
            "virtual-size": found.size,
            "manifest-size": manifest.size,
            "extents": extents,
            "valid": differences.is_empty(),
            "differences": ranges.collect::<Vec<_>>(),
        })));
    } else if !parsed.has('q') {
        for (offset, length) in &differences {
            say(format!(
                "Content differs from the manifest in the {length} bytes at offset {offset}"
            ));
        }
        if differences.is_empty() {
            say(format!("All {extents} extents are as the manifest says."));
        }
    }
    if differences.is_empty() {
        Ok(())
    } else {
        Err(Failure::status(1))
    }
}
