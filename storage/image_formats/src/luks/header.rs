//! The header of a LUKS1 volume (LUKS On-Disk Format Specification 1.2.3, section 3).

use block::{BlockError, Result};

use super::cipher::{CipherSpec, Hash};
use crate::fields::{Fields, put};

/// The bytes that the header takes.
pub(crate) const HEADER_SIZE: usize = 592;
/// Bytes of a sector, for encryption and for places in the header.
pub(crate) const SECTOR: u64 = 512;
/// Key slots of a volume.
pub(crate) const SLOTS: usize = 8;
/// Stripes that a key is split into by whoever makes volumes today.
pub(crate) const STRIPES: u32 = 4000;
/// Where key material of new volumes begins and what it is aligned to, in sectors.
pub(crate) const KEY_ALIGNMENT: u64 = 8;
/// More iterations of a key derivation than this are refused: they would take minutes.
pub(crate) const MAX_ITERATIONS: u32 = 1 << 26;

pub(crate) const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const ACTIVE: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;
const SLOTS_AT: usize = 208;
const SLOT_SIZE: usize = 48;
/// A volume's data begins no further on than this, in sectors (64 MiB).
const MAX_PAYLOAD: u32 = 1 << 17;

/// One of the places for a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) active: bool,
    pub(crate) iterations: u32,
    pub(crate) salt: [u8; 32],
    /// In sectors.
    pub(crate) key_offset: u32,
    pub(crate) stripes: u32,
}

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cipher: CipherSpec,
    pub(crate) hash: Hash,
    /// In sectors.
    pub(crate) payload: u32,
    pub(crate) digest: [u8; 20],
    pub(crate) digest_salt: [u8; 32],
    pub(crate) digest_iterations: u32,
    pub(crate) uuid: String,
    pub(crate) slots: Vec<Slot>,
}

fn bad(what: impl Into<String>) -> BlockError {
    BlockError::invalid_image(what)
}

/// A text that ends with a zero, in a field of `length` bytes.
fn text(f: &Fields<'_>, at: usize, length: usize) -> Result<String> {
    let field = f.slice(at, length);
    let end = field.iter().position(|b| *b == 0);
    let end = end.ok_or_else(|| bad("a name in the LUKS header has no end"))?;
    let name = std::str::from_utf8(&field[..end]).ok();
    let name = name.filter(|n| n.chars().all(|c| c.is_ascii_graphic()));
    Ok(name
        .ok_or_else(|| bad("a name in the LUKS header is no text"))?
        .to_owned())
}

/// Bytes of key material of a slot.
pub(crate) fn material_size(key_bytes: usize, stripes: u32) -> u64 {
    (key_bytes as u64 * u64::from(stripes)).next_multiple_of(SECTOR)
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// `InvalidImage` for what breaks the format's rules, `Unsupported` for other versions and algorithms,
    /// by name.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let f = Fields(bytes);
        if f.bytes::<6>(0) != *MAGIC {
            return Err(bad("Volume is not in LUKS format"));
        }
        let version = f.be16(6);
        if version != 1 {
            let message = format!("LUKS version {version} is not supported");
            return Err(BlockError::unsupported(message));
        }
        let (name, mode) = (text(&f, 8, 32)?, text(&f, 40, 32)?);
        let key_bytes = f.be32(108);
        let header = Self {
            cipher: CipherSpec::parse(&name, &mode, key_bytes)?,
            hash: Hash::parse(&text(&f, 72, 32)?)?,
            payload: f.be32(104),
            digest: f.bytes(112),
            digest_salt: f.bytes(132),
            digest_iterations: f.be32(164),
            uuid: text(&f, 168, 40)?,
            slots: (0..SLOTS).map(|n| slot(&f, n)).collect::<Result<_>>()?,
        };
        header.validate()?;
        Ok(header)
    }

    /// Nothing overlaps, and nothing takes forever.
    fn validate(&self) -> Result<()> {
        if !(2..=MAX_PAYLOAD).contains(&self.payload) {
            return Err(bad(format!(
                "the data begins at sector {}: expected 2 to {MAX_PAYLOAD}",
                self.payload
            )));
        }
        let iterations = |n: u32| (1..=MAX_ITERATIONS).contains(&n);
        if !iterations(self.digest_iterations) {
            return Err(bad(
                "the key's digest has an impossible count of iterations",
            ));
        }
        let mut ranges = Vec::new();
        for (n, slot) in self.slots.iter().enumerate() {
            if slot.active && !iterations(slot.iterations) {
                return Err(bad(format!(
                    "Keyslot {n} has an impossible count of iterations"
                )));
            }
            if slot.stripes != STRIPES {
                return Err(bad(format!(
                    "Keyslot {n} is corrupted (stripes {} != {STRIPES})",
                    slot.stripes
                )));
            }
            let start = u64::from(slot.key_offset);
            let sectors = material_size(self.cipher.key_bytes, STRIPES) / SECTOR;
            let end = start + sectors;
            if start < HEADER_SIZE as u64 / SECTOR + 1 || end > u64::from(self.payload) {
                return Err(bad(format!(
                    "Keyslot {n} overlaps the LUKS header or the payload"
                )));
            }
            ranges.push((start, end));
        }
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return Err(bad("Keyslots overlap one another"));
        }
        Ok(())
    }

    /// The header as bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_SIZE];
        put(&mut out, 0, MAGIC);
        put(&mut out, 6, &1u16.to_be_bytes());
        put(&mut out, 8, b"aes");
        put(&mut out, 40, self.cipher.mode_text().as_bytes());
        put(&mut out, 72, self.hash.name().as_bytes());
        put(&mut out, 104, &self.payload.to_be_bytes());
        put(&mut out, 108, &(self.cipher.key_bytes as u32).to_be_bytes());
        put(&mut out, 112, &self.digest);
        put(&mut out, 132, &self.digest_salt);
        put(&mut out, 164, &self.digest_iterations.to_be_bytes());
        put(&mut out, 168, self.uuid.as_bytes());
        for (n, slot) in self.slots.iter().enumerate() {
            let at = SLOTS_AT + n * SLOT_SIZE;
            let state = if slot.active { ACTIVE } else { DISABLED };
            put(&mut out, at, &state.to_be_bytes());
            put(&mut out, at + 4, &slot.iterations.to_be_bytes());
            put(&mut out, at + 8, &slot.salt);
            put(&mut out, at + 40, &slot.key_offset.to_be_bytes());
            put(&mut out, at + 44, &slot.stripes.to_be_bytes());
        }
        out
    }
}

fn slot(f: &Fields<'_>, number: usize) -> Result<Slot> {
    let at = SLOTS_AT + number * SLOT_SIZE;
    let active = match f.be32(at) {
        ACTIVE => true,
        DISABLED => false,
        _ => {
            return Err(bad(format!(
                "Keyslot {number} state (active/disable) is corrupted"
            )));
        }
    };
    Ok(Slot {
        active,
        iterations: f.be32(at + 4),
        salt: f.bytes(at + 8),
        key_offset: f.be32(at + 40),
        stripes: f.be32(at + 44),
    })
}
