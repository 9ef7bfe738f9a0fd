//! A header with its places for passwords, and encrypting sectors with what it guards: what a volume and an encrypted qcow2 image
//! have in common.

use std::cell::RefCell;

use block::executor::offload;
use block::{BlockError, ErrorKind, IoBuf, Medium, Result};

use super::Secret;
use super::cipher::{IvGenerator, SectorCipher};
use super::header::{HEADER_SIZE, Header, SECTOR, Slot, material_size};
use super::keys;
use crate::details::{Property, Value, property};

/// A header, and its key where a password has been given.
pub(crate) struct Encryption {
    header: RefCell<Header>,
    /// The key and its cipher; `None` without a password.
    unlocked: Option<(Vec<u8>, SectorCipher)>,
}

impl Encryption {
    /// Reads the header at `base`, and gets its key out with `secret`.
    ///
    /// # Errors
    ///
    /// `InvalidImage` or `Unsupported` with what is wrong, `PermissionDenied` if the password is wrong, or what the
    /// host reports.
    pub(crate) async fn open(
        medium: &dyn Medium,
        base: u64,
        secret: Option<&Secret>,
    ) -> Result<Self> {
        let first = IoBuf::zeroed(HEADER_SIZE);
        medium.read(base, first.clone()).await?;
        let header = Header::parse(&first.to_vec())?;
        let unlocked = match secret {
            Some(secret) => Some(unlock(medium, base, &header, secret).await?),
            None => None,
        };
        Ok(Self {
            header: RefCell::new(header),
            unlocked,
        })
    }

    /// Bytes from the header to where a volume's data begins.
    pub(crate) fn payload(&self) -> u64 {
        u64::from(self.header.borrow().payload) * SECTOR
    }

    /// The header as it is now.
    pub(super) fn header(&self) -> Header {
        self.header.borrow().clone()
    }

    /// Takes over a header that has been written.
    pub(super) fn set_header(&self, header: Header) {
        *self.header.borrow_mut() = header;
    }

    fn unlocked(&self) -> Result<&(Vec<u8>, SectorCipher)> {
        self.unlocked.as_ref().ok_or_else(|| {
            BlockError::invalid_argument("the image is encrypted, and no password was given")
        })
    }

    fn cipher(&self) -> Result<&SectorCipher> {
        self.unlocked().map(|(_, cipher)| cipher)
    }

    /// What all is encrypted with.
    pub(super) fn key(&self) -> Result<&[u8]> {
        self.unlocked().map(|(key, _)| key.as_slice())
    }

    /// Whether there is a key.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if there is none.
    pub(crate) fn check_unlocked(&self) -> Result<()> {
        self.cipher().map(|_| ())
    }

    /// Encrypts whole sectors, the first of which is at `offset` in what is encrypted.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` without a password, `Misaligned` for parts of sectors.
    pub(crate) fn encrypt(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.cipher()?.encrypt(sector(offset, bytes)?, bytes);
        Ok(())
    }

    /// Decrypts what [`Self::encrypt`] has encrypted.
    ///
    /// # Errors
    ///
    /// As for that.
    pub(crate) fn decrypt(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.cipher()?.decrypt(sector(offset, bytes)?, bytes);
        Ok(())
    }

    /// What the header says, in the order in which it is shown.
    pub(crate) fn describe(&self) -> Vec<Property> {
        let header = self.header();
        let cipher = header.cipher;
        let text = |label, key, value: &str| property(label, key, Value::Text(value.to_owned()));
        let mut list = vec![text("ivgen alg", "ivgen-alg", cipher.iv_name())];
        if let IvGenerator::Essiv(hash) = cipher.iv {
            list.push(text("ivgen hash alg", "ivgen-hash-alg", hash.name()));
        }
        let slots = header.slots.iter().map(slot_properties).collect();
        list.extend([
            text("hash alg", "hash-alg", header.hash.name()),
            text("cipher alg", "cipher-alg", cipher.cipher_name()),
            text("uuid", "uuid", &header.uuid),
            text("cipher mode", "cipher-mode", cipher.mode_name()),
            property("slots", "slots", Value::List(slots)),
            property(
                "payload offset",
                "payload-offset",
                Value::Number(self.payload() as i64),
            ),
            property(
                "master key iters",
                "master-key-iters",
                Value::Number(i64::from(header.digest_iterations)),
            ),
        ]);
        list
    }
}

fn sector(offset: u64, bytes: &[u8]) -> Result<u64> {
    if !offset.is_multiple_of(SECTOR) || !(bytes.len() as u64).is_multiple_of(SECTOR) {
        let message = "only whole sectors of 512 bytes are encrypted";
        return Err(BlockError::new(ErrorKind::Misaligned, message));
    }
    Ok(offset / SECTOR)
}

fn slot_properties(slot: &Slot) -> Vec<Property> {
    let mut list = vec![property("active", "active", Value::Bool(slot.active))];
    let number = |label, key, value: u64| property(label, key, Value::Number(value as i64));
    if slot.active {
        list.push(number("iters", "iters", u64::from(slot.iterations)));
    }
    let place = u64::from(slot.key_offset) * SECTOR;
    list.push(number("key offset", "key-offset", place));
    if slot.active {
        list.push(number("stripes", "stripes", u64::from(slot.stripes)));
    }
    list
}

/// The key material of a slot, as it is stored.
pub(super) async fn read_material(
    medium: &dyn Medium,
    base: u64,
    header: &Header,
    slot: &Slot,
) -> Result<Vec<u8>> {
    let size = material_size(header.cipher.key_bytes, slot.stripes);
    let buffer = IoBuf::zeroed(size as usize);
    let place = base + u64::from(slot.key_offset) * SECTOR;
    medium.read(place, buffer.clone()).await?;
    Ok(buffer.to_vec())
}

/// Looks for the slot whose password `secret` is.
async fn unlock(
    medium: &dyn Medium,
    base: u64,
    header: &Header,
    secret: &Secret,
) -> Result<(Vec<u8>, SectorCipher)> {
    for slot in header.slots.iter().filter(|slot| slot.active) {
        let material = read_material(medium, base, header, slot).await?;
        let (header, slot, password) = (header.clone(), slot.clone(), secret.bytes().to_vec());
        let spec = header.cipher;
        let key = offload(move || {
            let secret = Secret::new(&password);
            keys::unlock(&header, &slot, material, &secret)
        });
        if let Some(key) = key.await
            && let Some(cipher) = SectorCipher::new(spec, &key)
        {
            return Ok((key, cipher));
        }
    }
    let message = "Invalid password, cannot unlock any keyslot";
    Err(BlockError::new(ErrorKind::PermissionDenied, message))
}
