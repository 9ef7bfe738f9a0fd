//! Looking at an image that nobody trusts: its parser runs in a child that has the image's descriptor and nothing
//! else; a data or extent file that the image names comes from here, if the image may have it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use block::executor::{EngineKind, block_on_with};
use block::{BlockError, ErrorKind, ImplicitFile, Medium, PlainFile, open_to_read};
use image_formats::{External, Files, Image, ImageOptions, Opener, local_path};
use rustix::fs::fstat;
use sandbox::Parent;
use serde_json::{Value, json};

use super::Failure;

/// Opens the image `name` in a confined child, and returns what `tell` says of it and the bytes that its files take;
/// `None` if the kernel lets no sandbox be made.
///
/// # Errors
///
/// What opening it says; or how the child ended.
pub(crate) fn look(
    name: &str,
    options: &ImageOptions,
    tell: impl FnOnce(Image, u64) -> Value,
) -> Result<Option<Value>, Failure> {
    let image = open_to_read(&local_path(name)?)?;
    let mut doorkeeper = Doorkeeper {
        external: options.external,
        opened: vec![name.to_owned()],
        image: Some(image),
    };
    let work = |parent: Parent| inside(parent, options, tell).to_string().into_bytes();
    let failed =
        |e: &dyn std::fmt::Display| Failure::plain(format!("cannot look at '{name}': {e}"));
    let result = match sandbox::run(work, |question| doorkeeper.answer(question)) {
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(None),
        result => result.map_err(|e| failed(&e))?,
    };
    let mut result: Value = serde_json::from_slice(&result).map_err(|e| failed(&e))?;
    match result["error"].as_str() {
        Some(error) => Err(Failure::plain(error)),
        None => Ok(Some(result["told"].take())),
    }
}

/// The parent's side: which files the child gets.
struct Doorkeeper {
    external: External,
    /// The names of the files that the child has.
    opened: Vec<String>,
    /// The image itself, until the child asks for it.
    image: Option<OwnedFd>,
}

impl Doorkeeper {
    fn answer(&mut self, question: &[u8]) -> (Vec<u8>, Option<OwnedFd>) {
        let question = serde_json::from_slice::<Value>(question).unwrap_or_default();
        let text = |key: &str| question[key].as_str();
        let given = match (text("base"), text("name"), text("why")) {
            (Some(base), Some(name), Some(why)) => self.open(base, name, why),
            _ => match self.image.take() {
                Some(image) => Ok((self.opened[0].clone(), image)),
                None => Err(BlockError::invalid_argument("the image is there already")),
            },
        };
        let (answer, file) = match given {
            Ok((name, file)) => (json!({ "name": name }), Some(file)),
            Err(error) => (json!({ "error": error.one_line() }), None),
        };
        (answer.to_string().into_bytes(), file)
    }

    fn open(&mut self, base: &str, name: &str, why: &str) -> Result<(String, OwnedFd), BlockError> {
        let refused = || BlockError::new(ErrorKind::Refused, format!("'{name}' is not for it"));
        let kinds = [ImplicitFile::Data, ImplicitFile::Extent];
        let kind = kinds.iter().find(|kind| kind.describe() == why);
        let kind = kind.ok_or_else(refused)?;
        if !self.opened.iter().any(|opened| opened == base) {
            return Err(refused());
        }
        let name = self.external.admit(base, name, kind)?;
        let file = open_to_read(&local_path(&name)?)?;
        self.opened.push(name.clone());
        Ok((name, file))
    }
}

/// The child's side: files come from the parent.
struct Asked {
    parent: Parent,
    /// 512-byte blocks that each file takes, by device and inode.
    blocks: RefCell<BTreeMap<(u64, u64), u64>>,
}

impl Asked {
    fn ask(&self, question: &Value) -> Result<Rc<PlainFile>, BlockError> {
        let asked = self.parent.ask(question.to_string().as_bytes());
        let lost = |e| BlockError::io("the sandbox has lost its parent", e);
        let (answer, file) = asked.map_err(lost)?;
        let answer = serde_json::from_slice::<Value>(&answer).unwrap_or_default();
        let Some(file) = file else {
            let error = answer["error"].as_str().unwrap_or("no file was given");
            return Err(BlockError::new(ErrorKind::Refused, error));
        };
        let stat = fstat(&file).map_err(|e| BlockError::io("cannot look at a file", e.into()))?;
        let blocks = stat.st_blocks.cast_unsigned();
        let mut known = self.blocks.borrow_mut();
        known.insert((stat.st_dev, stat.st_ino), blocks);
        let name = answer["name"].as_str().unwrap_or_default();
        PlainFile::new(file, name.into()).map(Rc::new)
    }
}

impl Files for Asked {
    fn file(
        &self,
        base: &str,
        name: &str,
        why: &ImplicitFile,
    ) -> Result<Rc<dyn Medium>, BlockError> {
        let why = why.describe();
        let file = self.ask(&json!({ "base": base, "name": name, "why": why }))?;
        Ok(file)
    }
}

fn inside(parent: Parent, options: &ImageOptions, tell: impl FnOnce(Image, u64) -> Value) -> Value {
    let files = Rc::new(Asked {
        parent,
        blocks: RefCell::default(),
    });
    // io_uring is not for a process that may call so little of the kernel; nothing here waits for an engine.
    let told = block_on_with(EngineKind::Threads, async {
        let medium = files.ask(&Value::Null)?;
        let opener = Opener::with_files(options.clone(), files.clone());
        let image = opener.open_format(medium).await?;
        let blocks: u64 = files.blocks.borrow().values().sum();
        Ok(tell(image, blocks * 512))
    });
    let told: Result<Value, BlockError> = told.unwrap_or_else(Err);
    match told {
        Ok(told) => json!({ "told": told }),
        Err(error) => json!({ "error": error.one_line() }),
    }
}
