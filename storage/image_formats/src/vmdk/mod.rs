//! VMDK (Virtual Disk Format 5.0): one file or many, flat or in grains, compressed or not, with a
//! parent or without.
//!
//! A descriptor, in a file of its own or in the only extent, says what the disk consists of. Grains go
//! to the end of their extent; tables refer to them from the next flush on. A stream-optimized disk is
//! written by [`ImageFormat::write_compressed`] alone.

mod check;
mod create;
mod descriptor;
mod header;
mod parent;
mod sparse;

pub use create::{Adapter, CreateOptions, Subformat, create, files, measure};

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::sync::RangeLocks;
use block::{
    BlockBackend, BlockError, BlockFuture, ErrorKind, Extent, ExtentQuery, ImplicitFile, IoBuf,
    Limits, Medium, OpenGate, Result, ZeroFlags,
};

use crate::details::{Compression, Description, ImageFormat, Value, property};
use crate::identity::random_bytes;
use crate::mapped::{self, Mapped, Place, Run, Target, Writable};
use crate::qcow2::{CheckReport, Repair};
use descriptor::{Descriptor, ExtentLine, NO_PARENT};
use header::{HEADER_SIZE, SECTOR, SparseHeader};
use sparse::{Grain, Sparse};

/// A flat extent is locked in pieces of this size while parts of it are zeroed.
const FLAT_PIECE: u64 = 64 << 20;

/// Whether a file that begins so is a VMDK descriptor.
pub(crate) fn is_descriptor(first: &[u8]) -> bool {
    descriptor::is_descriptor(first)
}

async fn read_at(medium: &dyn Medium, offset: u64, length: usize) -> Result<Vec<u8>> {
    let buffer = IoBuf::zeroed(length);
    medium.read(offset, buffer.clone()).await?;
    Ok(buffer.to_vec())
}

/// Where an extent's bytes are.
enum Body {
    /// In a file, from this place on.
    Flat(Rc<dyn Medium>, u64),
    /// Nowhere.
    Zero,
    /// In grains.
    Sparse(Box<Sparse>),
}

/// A part of the disk.
struct Part {
    /// Where it begins on the disk, in bytes.
    start: u64,
    length: u64,
    body: Body,
    /// As the descriptor calls it.
    kind: String,
    writable: bool,
}

/// The descriptor's text and where it stands.
struct Text {
    bytes: Vec<u8>,
    place: u64,
    /// How much room there is for it; `None` if it is the file.
    room: Option<u64>,
}

/// An open VMDK image.
pub struct Vmdk {
    // Configuration.
    medium: Rc<dyn Medium>,
    parts: Vec<Part>,
    size: u64,
    create_type: String,
    parent: Option<Rc<dyn BlockBackend>>,
    parent_name: Option<String>,
    parent_cid: Option<u32>,
    // Runtime.
    text: RefCell<Option<Text>>,
    cid: Cell<u32>,
    /// The content identity is a new one since the image was opened.
    marked: Cell<bool>,
    // Who may do what at once.
    locks: RangeLocks,
    syncing: RangeLocks,
}

/// Reads the header of a hosted sparse extent, from the file's end if it says so.
async fn read_hosted(medium: &dyn Medium, first: &[u8]) -> Result<SparseHeader> {
    if !header::is_in_footer(first) {
        return SparseHeader::parse_hosted(first);
    }
    let at = medium.len().saturating_sub(3 * SECTOR);
    let end = read_at(medium, at, 3 * HEADER_SIZE).await?;
    SparseHeader::parse_hosted(header::footer_of(&end)?)
}

/// Finds the descriptor: in the only extent, or the file itself.
async fn read_text(medium: &dyn Medium) -> Result<Option<Text>> {
    let first = read_at(medium, 0, HEADER_SIZE).await?;
    if header::is_cowd(&first) {
        return Ok(None);
    }
    let (place, room) = if header::is_hosted(&first) {
        match read_hosted(medium, &first).await?.descriptor {
            Some((place, room)) => (place, Some(room.min(descriptor::MAX_SIZE))),
            None => return Ok(None),
        }
    } else {
        (0, None)
    };
    let length = room.unwrap_or(medium.len());
    if length > descriptor::MAX_SIZE {
        return Err(BlockError::invalid_image(
            "this is no VMDK image: neither a sparse extent nor a descriptor",
        ));
    }
    let bytes = read_at(medium, place, length as usize).await?;
    Ok(Some(Text { bytes, place, room }))
}

impl Vmdk {
    /// Opens the disk in `medium`, with its other extents and its parent through `gate`; without the
    /// parent if `backing` says so.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported` with what is wrong, or what the gate and the host report.
    pub async fn open(medium: Rc<dyn Medium>, gate: &dyn OpenGate, backing: bool) -> Result<Self> {
        let name = medium.name();
        let opened = Self::open_inner(medium, gate, backing).await;
        opened.map_err(|e| match e.kind() {
            ErrorKind::InvalidImage | ErrorKind::Unsupported => e.context(format!("'{name}'")),
            _ => e,
        })
    }

    async fn open_inner(
        medium: Rc<dyn Medium>,
        gate: &dyn OpenGate,
        backing: bool,
    ) -> Result<Self> {
        let first = read_at(&*medium, 0, HEADER_SIZE).await?;
        let text = read_text(&*medium).await?;
        let found = match &text {
            Some(text) => Descriptor::parse(&text.bytes)?,
            None => Descriptor::default(),
        };
        let mut image = Self {
            parts: Vec::new(),
            size: 0,
            create_type: found.create_type.clone(),
            parent: None,
            parent_name: found
                .parent_name
                .clone()
                .filter(|_| found.parent_cid.is_some()),
            parent_cid: found.parent_cid,
            text: RefCell::new(text),
            cid: Cell::new(found.cid),
            marked: Cell::new(false),
            locks: RangeLocks::default(),
            syncing: RangeLocks::default(),
            medium: medium.clone(),
        };
        if header::is_hosted(&first) {
            let header = read_hosted(&*medium, &first).await?;
            image
                .add_sparse(medium, header, None, String::new())
                .await?;
        } else if header::is_cowd(&first) {
            let header = SparseHeader::parse_cowd(&first)?;
            image.create_type = "vmfsSparse".to_owned();
            image
                .add_sparse(medium, header, None, String::new())
                .await?;
        } else {
            if !descriptor::is_descriptor(&first) && found.create_type.is_empty() {
                let message = "this is no VMDK image: neither a sparse extent nor a descriptor";
                return Err(BlockError::invalid_image(message));
            }
            if found.extents.is_empty() {
                return Err(BlockError::invalid_image("the descriptor names no extent"));
            }
            for line in &found.extents {
                image.add_extent(gate, line).await?;
            }
        }
        if backing && let Some(name) = &image.parent_name {
            let cid = found.parent_cid.unwrap_or(NO_PARENT);
            image.parent = Some(parent::open(&*image.medium, name, cid, gate).await?);
        }
        Ok(image)
    }

    /// Adds an extent that the descriptor names.
    async fn add_extent(&mut self, gate: &dyn OpenGate, line: &ExtentLine) -> Result<()> {
        let length = line.sectors * SECTOR;
        if line.kind == "ZERO" {
            self.push(length, Body::Zero, line.kind.clone(), false);
            return Ok(());
        }
        let known = ["FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE"];
        if !known.contains(&line.kind.as_str()) {
            let message = format!("extents of the type {} are not supported", line.kind);
            return Err(BlockError::unsupported(message));
        }
        let Some(name) = &line.name else {
            return Err(BlockError::invalid_image("an extent has no name"));
        };
        let read_only = ["VMFSSPARSE", "SESPARSE"].contains(&line.kind.as_str());
        let write = !self.medium.read_only() && line.writable && !read_only;
        let base = self.medium.name();
        let medium = gate.open_medium(&base, name, ImplicitFile::Extent, write);
        let medium = medium.await?;
        let kind = line.kind.clone();
        if ["FLAT", "VMFS"].contains(&line.kind.as_str()) {
            let body = Body::Flat(medium, line.offset * SECTOR);
            self.push(length, body, kind, write);
            return Ok(());
        }
        let added = self.add_named(medium, line, length).await;
        added.map_err(|e| match e.kind() {
            ErrorKind::InvalidImage | ErrorKind::Unsupported => {
                e.context(format!("extent '{name}'"))
            }
            _ => e,
        })
    }

    async fn add_named(
        &mut self,
        medium: Rc<dyn Medium>,
        line: &ExtentLine,
        length: u64,
    ) -> Result<()> {
        let first = read_at(&*medium, 0, HEADER_SIZE).await?;
        let header = match line.kind.as_str() {
            "SESPARSE" => SparseHeader::parse_sesparse(&first)?,
            "VMFSSPARSE" => SparseHeader::parse_cowd(&first)?,
            _ if header::is_cowd(&first) => SparseHeader::parse_cowd(&first)?,
            _ => read_hosted(&*medium, &first).await?,
        };
        self.add_sparse(medium, header, Some(length), line.kind.clone())
            .await
    }

    /// Adds a sparse extent; the descriptor says how much of it belongs to the disk, if there is one.
    async fn add_sparse(
        &mut self,
        medium: Rc<dyn Medium>,
        header: SparseHeader,
        length: Option<u64>,
        kind: String,
    ) -> Result<()> {
        let capacity = header.capacity;
        let length = length.unwrap_or(capacity);
        if length > capacity {
            return Err(BlockError::invalid_image(
                "the extent is smaller than the descriptor says",
            ));
        }
        // Version 3 without compression has marks of changed blocks, which we do not keep up.
        let tracked = header.version == 3 && !header.compressed;
        let hosted = header.family == header::Family::Hosted;
        let writable = !medium.read_only() && hosted && !tracked;
        let sparse = Sparse::open(medium, header).await?;
        self.push(length, Body::Sparse(Box::new(sparse)), kind, writable);
        Ok(())
    }

    fn push(&mut self, length: u64, body: Body, kind: String, writable: bool) {
        if length == 0 {
            return;
        }
        self.parts.push(Part {
            start: self.size,
            length,
            body,
            kind,
            writable,
        });
        self.size += length;
    }

    /// The part that holds `offset`, and the offset in it.
    fn part(&self, offset: u64) -> Result<(&Part, u64)> {
        let number = self.parts.partition_point(|p| p.start <= offset);
        let part = number.checked_sub(1).and_then(|n| self.parts.get(n));
        let inside = part.filter(|p| offset - p.start < p.length);
        let part = inside.ok_or_else(|| BlockError::new(ErrorKind::OutOfRange, "past the end"))?;
        Ok((part, offset - part.start))
    }

    fn sparse_parts(&self) -> impl Iterator<Item = &Sparse> {
        self.parts.iter().filter_map(|part| match &part.body {
            Body::Sparse(sparse) => Some(&**sparse),
            Body::Flat(..) | Body::Zero => None,
        })
    }

    /// The only extent, if it is compressed.
    fn stream(&self) -> Option<&Sparse> {
        match &self.parts[..] {
            [part] => match &part.body {
                Body::Sparse(sparse) if sparse.header.compressed => Some(sparse),
                _ => None,
            },
            _ => None,
        }
    }

    async fn run_at(&self, offset: u64, length: u64) -> Result<Run> {
        let (part, within) = self.part(offset)?;
        let length = length.min(part.length - within);
        let place = match &part.body {
            Body::Sparse(sparse) => return sparse.find(within, length).await,
            Body::Zero => Place::Zero,
            Body::Flat(medium, start) => Place::Host {
                medium: medium.clone(),
                offset: start + within,
                holes: true,
            },
        };
        Ok(Run { place, length })
    }

    /// Gives the content a new identity, once: what was made on top of it must not be used any more.
    async fn mark_changed(&self) -> Result<()> {
        if self.marked.get() {
            return Ok(());
        }
        let _turn = self.syncing.lock(0, 1).await;
        if self.marked.get() {
            return Ok(());
        }
        let cid = loop {
            let cid = u32::from_le_bytes(random_bytes());
            if cid != NO_PARENT && cid != self.cid.get() {
                break cid;
            }
        };
        self.write_cid(cid).await?;
        self.marked.set(true);
        Ok(())
    }

    async fn write_cid(&self, cid: u32) -> Result<()> {
        let written = {
            let text = self.text.borrow();
            let Some(text) = &*text else { return Ok(()) };
            let Some(bytes) = descriptor::with_cid(&text.bytes, cid) else {
                return Ok(());
            };
            if text.room.is_some_and(|room| bytes.len() as u64 > room) {
                return Err(BlockError::invalid_image("the descriptor has no room left"));
            }
            (text.place, text.room, bytes)
        };
        let (place, room, mut bytes) = written;
        if let Some(room) = room {
            bytes.resize(room as usize, 0);
        }
        let buffer = IoBuf::from_slice(&bytes);
        if room.is_none() {
            self.medium.set_len(bytes.len() as u64).await?;
        }
        self.medium.write(place, buffer).await?;
        self.cid.set(cid);
        if let Some(text) = &mut *self.text.borrow_mut() {
            text.bytes = bytes;
        }
        Ok(())
    }

    /// Makes everything durable that was written before.
    async fn sync(&self) -> Result<()> {
        let _turn = self.syncing.lock(0, 1).await;
        if self.medium.read_only() {
            return Ok(());
        }
        let pending: Vec<_> = self.sparse_parts().map(|s| (s, s.begin())).collect();
        self.flush_all().await?;
        let mut written = false;
        for (sparse, changes) in &pending {
            if !changes.is_empty() {
                sparse.write(changes).await?;
                written = true;
            }
        }
        if written {
            self.flush_all().await?;
        }
        Ok(())
    }

    async fn flush_all(&self) -> Result<()> {
        self.medium.flush().await?;
        for part in self.parts.iter().filter(|p| p.writable) {
            match &part.body {
                Body::Flat(medium, _) => medium.flush().await?,
                Body::Sparse(sparse) if !Rc::ptr_eq(&sparse.medium, &self.medium) => {
                    sparse.medium.flush().await?;
                }
                Body::Sparse(_) | Body::Zero => {}
            }
        }
        Ok(())
    }

    /// The files beside the one that was opened.
    fn files(&self) -> Vec<String> {
        let media = self.parts.iter().filter_map(|part| match &part.body {
            Body::Sparse(sparse) => Some(&sparse.medium),
            Body::Flat(medium, _) => Some(medium),
            Body::Zero => None,
        });
        let others = media.filter(|medium| !Rc::ptr_eq(medium, &self.medium));
        let mut names: Vec<String> = others.map(|m| (*m.name()).to_owned()).collect();
        names.sort();
        names.dedup();
        names
    }

    fn describe_part(&self, part: &Part) -> Vec<crate::Property> {
        let mut list = Vec::new();
        let number = |n: u64| Value::Number(n.cast_signed());
        let (name, grain) = match &part.body {
            Body::Sparse(sparse) => {
                if sparse.header.compressed {
                    list.push(property("compressed", "compressed", Value::Bool(true)));
                }
                (sparse.medium.name(), Some(sparse.header.grain))
            }
            Body::Flat(medium, _) => (medium.name(), None),
            Body::Zero => ("".into(), None),
        };
        list.push(property(
            "virtual size",
            "virtual-size",
            number(part.length),
        ));
        list.push(property(
            "filename",
            "filename",
            Value::Text((*name).to_owned()),
        ));
        if let Some(grain) = grain {
            list.push(property("cluster size", "cluster-size", number(grain)));
        }
        list.push(property("format", "format", Value::Text(part.kind.clone())));
        list
    }
}

fn unwritable() -> BlockError {
    let message = "a stream-optimized disk is written by converting to it alone";
    BlockError::unsupported(message)
}

impl Mapped for Vmdk {
    fn find(&self, offset: u64, length: u64) -> BlockFuture<'_, Run> {
        Box::pin(self.run_at(offset, length))
    }

    fn read_encoded(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let (part, within) = self.part(offset)?;
            match &part.body {
                Body::Sparse(sparse) => sparse.read_compressed(within, buf).await,
                Body::Flat(..) | Body::Zero => Err(unwritable()),
            }
        })
    }

    fn parent(&self) -> Option<Rc<dyn BlockBackend>> {
        self.parent.clone()
    }

    fn tells_unallocated(&self) -> bool {
        true
    }
}

impl Writable for Vmdk {
    fn block_at(&self, offset: u64) -> (u64, u64) {
        let Ok((part, within)) = self.part(offset) else {
            return (offset, SECTOR);
        };
        let size = match &part.body {
            Body::Sparse(sparse) => sparse.header.grain,
            Body::Flat(..) | Body::Zero => FLAT_PIECE,
        };
        let first = within / size * size;
        (part.start + first, size.min(part.length - first))
    }

    fn locks(&self) -> &RangeLocks {
        &self.locks
    }

    fn copies_parent(&self) -> bool {
        true
    }

    fn writable_place(&self, offset: u64) -> BlockFuture<'_, Option<Target>> {
        Box::pin(async move {
            self.mark_changed().await?;
            let (part, within) = self.part(offset)?;
            match &part.body {
                Body::Flat(medium, start) => Ok(Some(Target {
                    medium: medium.clone(),
                    offset: start + within,
                    length: part.length - within,
                })),
                Body::Zero => Err(BlockError::new(ErrorKind::ReadOnly, "the extent is zero")),
                Body::Sparse(sparse) => {
                    let within_grain = within % sparse.header.grain;
                    match sparse.grain(within).await? {
                        Grain::At(_) if sparse.header.compressed => Err(unwritable()),
                        Grain::At(place) => Ok(Some(Target {
                            medium: sparse.medium.clone(),
                            offset: place + within_grain,
                            length: (sparse.header.grain - within_grain).min(part.length - within),
                        })),
                        Grain::Zero | Grain::Unallocated => Ok(None),
                    }
                }
            }
        })
    }

    fn allocate(&self, offset: u64) -> BlockFuture<'_, Target> {
        Box::pin(async move {
            let (part, _) = self.part(offset)?;
            match &part.body {
                Body::Sparse(sparse) if !sparse.header.compressed => Ok(Target {
                    medium: sparse.medium.clone(),
                    offset: sparse.allocate().await?,
                    length: sparse.header.grain,
                }),
                _ => Err(unwritable()),
            }
        })
    }

    fn install(&self, offset: u64, target: Target) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let (part, within) = self.part(offset)?;
            match &part.body {
                Body::Sparse(sparse) => sparse.install(within, Grain::At(target.offset)).await,
                Body::Flat(..) | Body::Zero => Ok(()),
            }
        })
    }

    fn wrote(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_zero(&self, offset: u64) -> BlockFuture<'_, bool> {
        Box::pin(async move {
            let (part, within) = self.part(offset)?;
            match &part.body {
                Body::Sparse(sparse) if sparse.header.zeroed => {
                    sparse.install(within, Grain::Zero).await?;
                    Ok(true)
                }
                _ => Ok(false),
            }
        })
    }
}

impl BlockBackend for Vmdk {
    fn limits(&self) -> Limits {
        let parts_read_only = self.parts.iter().any(|part| !part.writable);
        let grain = self.sparse_parts().next().map_or(4096, |s| s.header.grain);
        Limits {
            size: self.size,
            logical_block_size: 512,
            physical_block_size: self.medium.alignment().max(512),
            buffer_alignment: self.medium.alignment(),
            discard_granularity: 4096,
            zero_granularity: grain as u32,
            max_transfer: 1 << 30,
            read_only: self.medium.read_only() || parts_read_only,
        }
    }

    fn format_name(&self) -> &'static str {
        "vmdk"
    }

    fn file_name(&self) -> Option<Rc<str>> {
        Some(self.medium.name())
    }

    fn backing(&self) -> Option<Rc<dyn BlockBackend>> {
        self.parent.clone()
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(mapped::read(self, offset, buf))
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(mapped::write(self, offset, buf))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(mapped::write_zeroes(self, offset, length, flags))
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            self.mark_changed().await?;
            mapped::discard(self, offset, length).await
        })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.sync())
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        Box::pin(mapped::extents(self, query))
    }

    fn resize(&self, _size: u64) -> BlockFuture<'_, ()> {
        let message = "Image format driver does not support resize";
        Box::pin(async move { Err(BlockError::unsupported(message)) })
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.sync())
    }
}

impl ImageFormat for Vmdk {
    fn describe(&self) -> Description {
        let grains: Vec<u64> = self.sparse_parts().map(|s| s.header.grain).collect();
        let all_same = grains.len() == self.parts.len() && grains.windows(2).all(|w| w[0] == w[1]);
        let parent_cid = self.parent_cid.unwrap_or(NO_PARENT);
        let number = |n: u32| Value::Number(i64::from(n));
        let parts = self.parts.iter().map(|p| self.describe_part(p)).collect();
        Description {
            cluster_size: grains.first().copied().filter(|_| all_same),
            backing_file: self.parent_name.clone(),
            backing_format: self.parent_name.as_ref().map(|_| "vmdk".to_owned()),
            encrypted: false,
            files: self.files(),
            specific: vec![
                property("cid", "cid", number(self.cid.get())),
                property("parent cid", "parent-cid", number(parent_cid)),
                property(
                    "create type",
                    "create-type",
                    Value::Text(self.create_type.clone()),
                ),
                property("extents", "extents", Value::List(parts)),
            ],
        }
    }

    fn check(&self, repair: Repair) -> BlockFuture<'_, Option<CheckReport>> {
        Box::pin(self.check_disk(repair))
    }

    fn compression(&self) -> Option<Compression> {
        self.stream().map(|sparse| Compression {
            unit: sparse.header.grain,
            zlib_wrapper: true,
        })
    }

    fn write_compressed(&self, offset: u64, data: Vec<u8>) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let Some(sparse) = self.stream() else {
                return crate::details::no_compression().await;
            };
            if self.limits().read_only || !offset.is_multiple_of(sparse.header.grain) {
                return Err(unwritable());
            }
            self.mark_changed().await?;
            sparse.append(offset, &data).await
        })
    }
}
