//! Changing the passwords of a volume (LUKS On-Disk Format Specification, sections 4.4.4 and 4.4.5).

use block::executor::offload;
use block::{BlockError, ErrorKind, IoBuf, Medium, Result};

use super::create::{iterations, random, random_salt};
use super::encryption::{Encryption, read_material};
use super::header::{Header, SECTOR, SLOTS, STRIPES, material_size};
use super::{Secret, keys};

/// A change of the places for passwords, as qemu-img's options have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyChange {
    /// `state=active`: a password is added. Else (`inactive`) some are erased.
    pub active: bool,
    /// The place; the first free one if it is not given.
    pub slot: Option<u64>,
    /// The password to add.
    pub new: Option<Secret>,
    /// The password to erase, wherever it is.
    pub old: Option<Secret>,
    /// How long unlocking takes on this machine, in milliseconds.
    pub iteration_time: u64,
    /// Also what makes the data unreadable for ever.
    pub force: bool,
}

fn refused(message: impl Into<String>) -> BlockError {
    BlockError::invalid_argument(message)
}

/// The number of a slot that was given.
fn slot_number(given: u64) -> Result<usize> {
    let number = usize::try_from(given).ok().filter(|number| *number < SLOTS);
    number.ok_or_else(|| {
        let last = SLOTS - 1;
        refused(format!(
            "Invalid keyslot {given} specified, must be between 0 and {last}"
        ))
    })
}

impl Encryption {
    /// Changes places for passwords in the header at `base`.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if the change makes no sense, is not possible, or loses the data; `PermissionDenied` if no place has the
    /// old password; what the host reports.
    pub(crate) async fn amend(
        &self,
        medium: &dyn Medium,
        base: u64,
        change: &KeyChange,
    ) -> Result<()> {
        if medium.read_only() {
            let message = "the image is open for reading alone";
            return Err(BlockError::new(ErrorKind::ReadOnly, message));
        }
        if change.active {
            self.add_password(medium, base, change).await
        } else {
            let header = self.header();
            for slot in slots_to_erase(medium, base, &header, change).await? {
                self.erase(medium, base, slot).await?;
            }
            Ok(())
        }
    }

    async fn add_password(&self, medium: &dyn Medium, base: u64, change: &KeyChange) -> Result<()> {
        let Some(secret) = change.new.clone() else {
            return Err(refused("'new-secret' is required to activate a keyslot"));
        };
        if change.old.is_some() {
            return Err(refused(
                "'old-secret' must not be given when activating keyslots",
            ));
        }
        let mut header = self.header();
        let number = match change.slot {
            Some(given) => slot_number(given)?,
            None => {
                let free = header.slots.iter().position(|slot| !slot.active);
                free.ok_or_else(|| refused("Can't add a keyslot - all keyslots are in use"))?
            }
        };
        if header.slots[number].active && !change.force {
            return Err(refused(format!(
                "Refusing to overwrite active keyslot {number} - please erase it first"
            )));
        }
        let key = self.key()?.to_vec();
        let stripes = random(key.len() * STRIPES as usize)?;
        header.slots[number].salt = random_salt()?;
        let time = change.iteration_time;
        let made = offload(move || {
            let count = iterations(header.hash, key.len(), time);
            header.slots[number].active = true;
            header.slots[number].iterations = count;
            let material = keys::lock(&header, &header.slots[number], &key, &secret, stripes)?;
            Some((header, material))
        });
        let (header, material) = made
            .await
            .ok_or_else(|| refused("the key has an impossible size"))?;
        let place = base + u64::from(header.slots[number].key_offset) * SECTOR;
        medium.write(place, IoBuf::from_slice(&material)).await?;
        medium.flush().await?;
        self.write_header(medium, base, header).await
    }

    /// Takes a password away: first the header forgets it, then what it could be had from is written over.
    async fn erase(&self, medium: &dyn Medium, base: u64, number: usize) -> Result<()> {
        let mut header = self.header();
        let slot = &mut header.slots[number];
        slot.active = false;
        slot.iterations = 0;
        slot.salt = [0; 32];
        let place = base + u64::from(slot.key_offset) * SECTOR;
        let size = material_size(header.cipher.key_bytes, slot.stripes);
        self.write_header(medium, base, header).await?;
        let noise = random(size as usize)?;
        medium.write(place, IoBuf::from_slice(&noise)).await?;
        medium.flush().await
    }

    async fn write_header(&self, medium: &dyn Medium, base: u64, header: Header) -> Result<()> {
        medium
            .write(base, IoBuf::from_slice(&header.encode()))
            .await?;
        medium.flush().await?;
        self.set_header(header);
        Ok(())
    }
}

/// Whether a slot has this password.
async fn has(
    medium: &dyn Medium,
    base: u64,
    header: &Header,
    number: usize,
    secret: &Secret,
) -> Result<bool> {
    let material = read_material(medium, base, header, &header.slots[number]).await?;
    let (header, secret) = (header.clone(), secret.clone());
    let unlock = offload(move || keys::unlock(&header, &header.slots[number], material, &secret));
    Ok(unlock.await.is_some())
}

async fn slots_to_erase(
    medium: &dyn Medium,
    base: u64,
    header: &Header,
    change: &KeyChange,
) -> Result<Vec<usize>> {
    if change.new.is_some() {
        return Err(refused(
            "'new-secret' must not be given when erasing keyslots",
        ));
    }
    let active: Vec<usize> = (0..SLOTS).filter(|n| header.slots[*n].active).collect();
    let denied = |message| Err(BlockError::new(ErrorKind::PermissionDenied, message));
    if let Some(given) = change.slot {
        let number = slot_number(given)?;
        if !header.slots[number].active {
            let message = format!("Given keyslot {number} is already erased (inactive) ");
            return Err(refused(message));
        }
        if let Some(old) = &change.old
            && !has(medium, base, header, number, old).await?
        {
            let message =
                format!("Given keyslot {number} doesn't contain the given (old) password");
            return denied(message);
        }
        if active.len() == 1 && !change.force {
            return Err(refused(format!(
                "Attempt to erase the only active keyslot {number} which will erase all the data in the image irreversibly - \
                 refusing operation"
            )));
        }
        return Ok(vec![number]);
    }
    let Some(old) = &change.old else {
        return Err(refused(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given",
        ));
    };
    let mut found = Vec::new();
    for number in active.iter().copied() {
        if has(medium, base, header, number, old).await? {
            found.push(number);
        }
    }
    if found.is_empty() {
        return denied("No keyslots match given (old) password for erase operation".to_owned());
    }
    if found == active && !change.force {
        return Err(refused(
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image \
             irreversibly - refusing operation",
        ));
    }
    Ok(found)
}
