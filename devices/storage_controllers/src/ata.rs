//! What an ATA disk says and understands (ATA/ATAPI Command Set 3, T13/2161-D).

/// Commands, registers and bits.
pub(crate) mod spec {
    pub(crate) const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub(crate) const READ_SECTORS: u8 = 0x20;
    pub(crate) const READ_SECTORS_EXT: u8 = 0x24;
    pub(crate) const READ_DMA_EXT: u8 = 0x25;
    pub(crate) const READ_NATIVE_MAX_EXT: u8 = 0x27;
    pub(crate) const READ_MULTIPLE_EXT: u8 = 0x29;
    pub(crate) const READ_LOG_EXT: u8 = 0x2f;
    pub(crate) const WRITE_SECTORS: u8 = 0x30;
    pub(crate) const WRITE_SECTORS_EXT: u8 = 0x34;
    pub(crate) const WRITE_DMA_EXT: u8 = 0x35;
    pub(crate) const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub(crate) const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub(crate) const READ_VERIFY: u8 = 0x40;
    pub(crate) const READ_VERIFY_EXT: u8 = 0x42;
    pub(crate) const READ_FPDMA_QUEUED: u8 = 0x60;
    pub(crate) const WRITE_FPDMA_QUEUED: u8 = 0x61;
    pub(crate) const INITIALIZE_PARAMETERS: u8 = 0x91;
    pub(crate) const READ_MULTIPLE: u8 = 0xc4;
    pub(crate) const WRITE_MULTIPLE: u8 = 0xc5;
    pub(crate) const SET_MULTIPLE: u8 = 0xc6;
    pub(crate) const READ_DMA: u8 = 0xc8;
    pub(crate) const WRITE_DMA: u8 = 0xca;
    pub(crate) const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub(crate) const IDLE: u8 = 0xe3;
    pub(crate) const CHECK_POWER_MODE: u8 = 0xe5;
    pub(crate) const FLUSH_CACHE: u8 = 0xe7;
    pub(crate) const FLUSH_CACHE_EXT: u8 = 0xea;
    pub(crate) const IDENTIFY_DEVICE: u8 = 0xec;
    pub(crate) const SET_FEATURES: u8 = 0xef;
    pub(crate) const READ_NATIVE_MAX: u8 = 0xf8;

    /// SET FEATURES: write cache on, off; set the transfer mode; look-ahead on, off.
    pub(crate) const FEATURE_WRITE_CACHE: u8 = 0x02;
    pub(crate) const FEATURE_TRANSFER_MODE: u8 = 0x03;
    pub(crate) const FEATURE_NO_LOOK_AHEAD: u8 = 0x55;
    pub(crate) const FEATURE_NO_WRITE_CACHE: u8 = 0x82;
    pub(crate) const FEATURE_LOOK_AHEAD: u8 = 0xaa;
    /// DATA SET MANAGEMENT: trim.
    pub(crate) const DSM_TRIM: u8 = 0x01;
    /// The log in which a failed queued command is described.
    pub(crate) const LOG_NCQ_ERROR: u8 = 0x10;

    pub(crate) const STATUS_ERR: u8 = 0x01;
    pub(crate) const STATUS_SEEK_COMPLETE: u8 = 0x10;
    pub(crate) const STATUS_READY: u8 = 0x40;
    pub(crate) const STATUS_BUSY: u8 = 0x80;
    pub(crate) const ERROR_ABORT: u8 = 0x04;
    pub(crate) const ERROR_ID_NOT_FOUND: u8 = 0x10;
    pub(crate) const ERROR_UNCORRECTABLE: u8 = 0x40;
}
use spec::*;

/// Bytes of the sectors that ATA counts identify data, logs and trim lists in.
pub(crate) const BLOCK: usize = 512;
/// Most 512-byte blocks of ranges in a trim command.
pub(crate) const MAX_TRIM_BLOCKS: u16 = 8;

/// The registers of a command, as a host-to-device FIS carries them (Serial ATA 3.1, section 10.5.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) command: u8,
    pub(crate) features: u16,
    pub(crate) lba: u64,
    pub(crate) device: u8,
    pub(crate) count: u16,
}

impl Registers {
    pub(crate) fn from_fis(fis: &[u8; 20]) -> Self {
        let lba = [fis[4], fis[5], fis[6], fis[8], fis[9], fis[10], 0, 0];
        Self {
            command: fis[2],
            features: u16::from_le_bytes([fis[3], fis[11]]),
            lba: u64::from_le_bytes(lba),
            device: fis[7],
            count: u16::from_le_bytes([fis[12], fis[13]]),
        }
    }

    /// The 28-bit address, whose upper bits are in the device register.
    fn lba28(&self) -> u64 {
        self.lba & 0xff_ffff | u64::from(self.device & 15) << 24
    }

    fn sectors28(&self) -> u32 {
        match self.count as u8 {
            0 => 256,
            n => n.into(),
        }
    }

    fn sectors48(count: u16) -> u32 {
        match count {
            0 => 0x1_0000,
            n => n.into(),
        }
    }
}

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Data from the disk, or to it.
    Transfer {
        write: bool,
        lba: u64,
        sectors: u32,
        /// On stable storage before it ends.
        through: bool,
        /// By programmed I/O: the guest sees another FIS.
        pio: bool,
    },
    /// Only checks that the sectors are there.
    Verify { lba: u64, sectors: u32 },
    /// A block of data that the disk makes up.
    Identify,
    /// The log of the last failed queued command.
    NcqErrorLog,
    /// Ranges that are not needed any more.
    Trim { blocks: u16 },
    /// Everything to stable storage.
    Flush,
    /// Answers with the last address.
    NativeMax { wide: bool },
    /// Answers with the power mode: active.
    PowerMode,
    /// Turns the write cache on or off.
    WriteCache(bool),
    /// Nothing to do.
    Nothing,
    /// Not a command of this disk.
    Abort,
}

/// True for commands that are queued by tag.
pub(crate) fn is_queued(command: u8) -> bool {
    matches!(command, READ_FPDMA_QUEUED | WRITE_FPDMA_QUEUED)
}

/// What a command's registers ask for.
pub(crate) fn decode(r: &Registers) -> Work {
    let transfer = |write, pio, wide: bool| Work::Transfer {
        write,
        lba: if wide { r.lba } else { r.lba28() },
        sectors: if wide {
            Registers::sectors48(r.count)
        } else {
            r.sectors28()
        },
        through: r.command == WRITE_DMA_FUA_EXT,
        pio,
    };
    match r.command {
        READ_DMA => transfer(false, false, false),
        READ_DMA_EXT => transfer(false, false, true),
        WRITE_DMA => transfer(true, false, false),
        WRITE_DMA_EXT | WRITE_DMA_FUA_EXT => transfer(true, false, true),
        READ_SECTORS | READ_MULTIPLE => transfer(false, true, false),
        READ_SECTORS_EXT | READ_MULTIPLE_EXT => transfer(false, true, true),
        WRITE_SECTORS | WRITE_MULTIPLE => transfer(true, true, false),
        WRITE_SECTORS_EXT | WRITE_MULTIPLE_EXT => transfer(true, true, true),
        READ_FPDMA_QUEUED | WRITE_FPDMA_QUEUED => Work::Transfer {
            write: r.command == WRITE_FPDMA_QUEUED,
            lba: r.lba,
            sectors: Registers::sectors48(r.features),
            through: r.device & 0x80 != 0,
            pio: false,
        },
        READ_VERIFY => Work::Verify {
            lba: r.lba28(),
            sectors: r.sectors28(),
        },
        READ_VERIFY_EXT => Work::Verify {
            lba: r.lba,
            sectors: Registers::sectors48(r.count),
        },
        IDENTIFY_DEVICE => Work::Identify,
        READ_LOG_EXT if r.lba as u8 == LOG_NCQ_ERROR && r.count == 1 => Work::NcqErrorLog,
        DATA_SET_MANAGEMENT if r.features & 0xff == DSM_TRIM.into() => {
            if (1..=MAX_TRIM_BLOCKS).contains(&r.count) {
                Work::Trim { blocks: r.count }
            } else {
                Work::Abort
            }
        }
        FLUSH_CACHE | FLUSH_CACHE_EXT => Work::Flush,
        READ_NATIVE_MAX => Work::NativeMax { wide: false },
        READ_NATIVE_MAX_EXT => Work::NativeMax { wide: true },
        CHECK_POWER_MODE => Work::PowerMode,
        SET_MULTIPLE | INITIALIZE_PARAMETERS | STANDBY_IMMEDIATE..=IDLE => Work::Nothing,
        SET_FEATURES => match r.features as u8 {
            FEATURE_WRITE_CACHE => Work::WriteCache(true),
            FEATURE_NO_WRITE_CACHE => Work::WriteCache(false),
            FEATURE_TRANSFER_MODE | FEATURE_LOOK_AHEAD | FEATURE_NO_LOOK_AHEAD => Work::Nothing,
            _ => Work::Abort,
        },
        _ => Work::Abort,
    }
}

/// What IDENTIFY DEVICE tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Bytes of a logical sector.
    pub(crate) sector: u32,
    /// Bytes of a physical sector.
    pub(crate) physical: u32,
    pub(crate) sectors: u64,
    pub(crate) serial: String,
    pub(crate) model: String,
    pub(crate) trim: bool,
    pub(crate) write_cache: bool,
}

/// Puts text into words as ATA has it: two characters each, the first in the upper half, filled up with spaces.
fn put_text(words: &mut [u16; 256], at: usize, len: usize, text: &str) {
    let mut bytes = text.bytes().filter(|b| (0x20..0x7f).contains(b));
    for word in &mut words[at..at + len] {
        let high = bytes.next().unwrap_or(b' ');
        let low = bytes.next().unwrap_or(b' ');
        *word = u16::from_be_bytes([high, low]);
    }
}

/// The data of IDENTIFY DEVICE (section 7.12.7).
pub(crate) fn identify(id: &Identity) -> [u8; BLOCK] {
    let mut words = [0u16; 256];
    put_text(&mut words, 10, 10, &id.serial);
    put_text(&mut words, 23, 4, env!("CARGO_PKG_VERSION"));
    put_text(&mut words, 27, 20, &id.model);
    let short = id.sectors.min(0x0fff_ffff) as u32;
    let ratio = (id.physical / id.sector.max(1)).max(1).ilog2() as u16;
    let words_per_sector = id.sector / 2;
    // The command sets: flush, write cache, look-ahead, 48-bit addresses, forced writes.
    let (set1, set2, set3) = (0x4060, 0x7400, 0x4040);
    let enabled1 = if id.write_cache { set1 } else { set1 & !0x20 };
    for (at, value) in [
        (0, 0x0040), // not removable
        (47, 0x8010),
        (49, 0x0f00), // LBA, DMA
        (50, 0x4000),
        (53, 0x0006),
        (59, 0x0110),
        (60, short as u16),
        (61, (short >> 16) as u16),
        (63, 0x0007), // multiword DMA 0 to 2
        (64, 0x0003), // PIO 3 and 4
        (65, 120),
        (66, 120),
        (67, 120),
        (68, 120),
        (75, 31),     // queue depth, less one
        (76, 0x010e), // all three speeds, queueing
        (80, 0x03f0), // up to ACS-3
        (82, set1),
        (83, set2),
        (84, set3),
        (85, enabled1),
        (86, set2 & 0x3fff),
        (87, set3),
        (88, 0x407f), // Ultra DMA 6
        (93, 0),
        (105, MAX_TRIM_BLOCKS),
        (106, 0x4000 | if ratio > 0 { 0x2000 | ratio } else { 0 }),
        (169, u16::from(id.trim)),
        (217, 1), // does not rotate
        (222, 0x107f),
    ] {
        words[at] = value;
    }
    for n in 0..4 {
        words[100 + n] = (id.sectors >> (16 * n)) as u16;
    }
    if id.sector != BLOCK as u32 {
        words[106] |= 0x1000;
        words[117] = words_per_sector as u16;
        words[118] = (words_per_sector >> 16) as u16;
    }
    let mut bytes = [0; BLOCK];
    for (to, word) in bytes.chunks_exact_mut(2).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes[510] = 0xa5;
    let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    bytes[511] = sum.wrapping_neg();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_come_out_of_a_fis() {
        let mut fis = [0; 20];
        fis[..16].copy_from_slice(&[
            0x27, 0x80, 0x25, 0, 1, 2, 3, 0x40, 4, 5, 6, 0, 0x10, 0x01, 0, 0,
        ]);
        let registers = Registers::from_fis(&fis);
        assert_eq!(
            decode(&registers),
            Work::Transfer {
                write: false,
                lba: 0x0605_0403_0201,
                sectors: 0x110,
                through: false,
                pio: false
            }
        );
    }

    #[test]
    fn identify_data_has_size_names_and_a_checksum() {
        let data = identify(&Identity {
            sector: 512,
            physical: 4096,
            sectors: 0x1_2345_6789,
            serial: "S123".into(),
            model: "Corten".into(),
            trim: true,
            write_cache: true,
        });
        let word = |n: usize| u16::from_le_bytes([data[2 * n], data[2 * n + 1]]);
        assert_eq!((word(60), word(61)), (0xffff, 0x0fff));
        assert_eq!((word(100), word(101), word(102)), (0x6789, 0x2345, 1));
        assert_eq!(word(10), 0x5331);
        assert_eq!(word(106), 0x6003);
        assert_eq!(data.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
    }
}
