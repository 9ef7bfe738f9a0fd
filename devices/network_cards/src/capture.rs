//! Packet capture: a link that writes all frames that pass to a file, for tcpdump, Wireshark and their like.
//!
//! The file has the classic pcap format (draft-ietf-opsawg-pcap), link type Ethernet, in microseconds. Frames are recorded as they pass
//! at the seam, so they can be longer than the MTU and have unfinished checksums, as in captures on a host whose card segments.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
use crate::offload::{MAX_FRAME, OffloadHeader, Offloads};

/// pcap's magic number for times in microseconds, in the byte order of the writer.
const MAGIC: u32 = 0xa1b2_c3d4;
const VERSION: (u16, u16) = (2, 4);
const LINK_TYPE_ETHERNET: u32 = 1;
/// The bytes of a record's header.
const RECORD_LEN: usize = 16;

/// What to record, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureConfig {
    /// The file; it is made, or emptied if it exists.
    pub file: PathBuf,
    /// No more of a frame is recorded, in bytes.
    pub max_len: usize,
}

impl CaptureConfig {
    /// Records whole frames to `file`.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            max_len: MAX_FRAME,
        }
    }
}

/// A link whose frames are recorded.
#[derive(Debug)]
pub struct Captured {
    link: Arc<dyn NetBackend>,
    log: Arc<Mutex<Log>>,
}

#[derive(Debug)]
struct Log {
    /// None after an error: a full disk must not stop the guest's network.
    file: Option<File>,
    max_len: usize,
    record: Vec<u8>,
}

impl Captured {
    /// Records what passes over `link`.
    ///
    /// # Errors
    ///
    /// The file can't be made or written.
    pub fn new(link: Arc<dyn NetBackend>, config: &CaptureConfig) -> Result<Self, NetError> {
        let file = create(&config.file, config.max_len).map_err(|e| {
            NetError::os(
                format!("can't record the network to {}", config.file.display()),
                e,
            )
        })?;
        let max_len = config.max_len.min(MAX_FRAME);
        let log = Log {
            file: Some(file),
            max_len,
            record: Vec::with_capacity(2048),
        };
        Ok(Self {
            link,
            log: Arc::new(Mutex::new(log)),
        })
    }
}

fn create(path: &Path, max_len: usize) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let mut header = Vec::with_capacity(24);
    header.extend_from_slice(&MAGIC.to_ne_bytes());
    header.extend_from_slice(&VERSION.0.to_ne_bytes());
    header.extend_from_slice(&VERSION.1.to_ne_bytes());
    // Two fields that nobody uses.
    header.extend_from_slice(&[0; 8]);
    header.extend_from_slice(&(max_len.min(MAX_FRAME) as u32).to_ne_bytes());
    header.extend_from_slice(&LINK_TYPE_ETHERNET.to_ne_bytes());
    file.write_all(&header)?;
    Ok(file)
}

impl Log {
    /// Writes the first `len` bytes of `parts` as one record.
    fn write<'a>(&mut self, parts: impl Iterator<Item = &'a [u8]>, len: usize) {
        let Some(file) = &mut self.file else { return };
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let kept = len.min(self.max_len);
        let record = &mut self.record;
        record.clear();
        // The format's seconds end in 2106.
        record.extend_from_slice(&(time.as_secs() as u32).to_ne_bytes());
        record.extend_from_slice(&time.subsec_micros().to_ne_bytes());
        record.extend_from_slice(&(kept as u32).to_ne_bytes());
        record.extend_from_slice(&(len as u32).to_ne_bytes());
        for part in parts {
            let left = RECORD_LEN + kept - record.len();
            record.extend_from_slice(&part[..part.len().min(left)]);
        }
        // The record must be as long as it says even if the frame was not.
        record.resize(RECORD_LEN + kept, 0);
        if file.write_all(record).is_err() {
            self.file = None;
        }
    }
}

impl NetBackend for Captured {
    fn describe(&self) -> String {
        self.link.describe()
    }

    fn max_queue_pairs(&self) -> u16 {
        self.link.max_queue_pairs()
    }

    fn transmit_offloads(&self) -> Offloads {
        self.link.transmit_offloads()
    }

    fn receive_offloads(&self) -> Offloads {
        self.link.receive_offloads()
    }

    fn set_offloads(&self, accepted: Offloads) -> Result<(), NetError> {
        self.link.set_offloads(accepted)
    }

    fn take_queues(&self, pairs: u16) -> Result<Vec<Box<dyn NetQueue>>, NetError> {
        let wrap = |queue| -> Box<dyn NetQueue> {
            Box::new(CapturedQueue {
                queue,
                log: self.log.clone(),
            })
        };
        Ok(self
            .link
            .take_queues(pairs)?
            .into_iter()
            .map(wrap)
            .collect())
    }

    fn set_active_queues(&self, pairs: u16) -> Result<(), NetError> {
        self.link.set_active_queues(pairs)
    }

    fn link(&self) -> LinkState {
        self.link.link()
    }
}

struct CapturedQueue {
    queue: Box<dyn NetQueue>,
    log: Arc<Mutex<Log>>,
}

impl NetQueue for CapturedQueue {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.queue.poll_fd()
    }

    fn interest(&self, has_room: bool) -> Interest {
        self.queue.interest(has_room)
    }

    fn process(&mut self) -> Result<(), NetError> {
        self.queue.process()
    }

    fn transmit(
        &mut self,
        header: &OffloadHeader,
        frame: &[IoSlice<'_>],
    ) -> Result<Transmit, NetError> {
        let result = self.queue.transmit(header, frame)?;
        let len: usize = frame.iter().map(|part| part.len()).sum();
        if result == Transmit::Accepted && len <= MAX_FRAME {
            self.log.lock().write(frame.iter().map(|part| &**part), len);
        }
        Ok(result)
    }

    fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(OffloadHeader, usize)>, NetError> {
        let result = self.queue.receive(buffers)?;
        if let Some((_, len)) = result {
            self.log
                .lock()
                .write(buffers.iter().map(|part| &**part), len);
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crossover::crossover;

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    #[test]
    fn frames_of_both_directions_are_recorded_and_cut() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("net.pcap");
        let (a, b) = crossover().unwrap();
        let config = CaptureConfig {
            file: file.clone(),
            max_len: 100,
        };
        let a = Captured::new(Arc::new(a), &config).unwrap();
        let mut near = a.take_queues(1).unwrap().remove(0);
        let mut far = b.take_queues(1).unwrap().remove(0);
        let header = OffloadHeader::default();
        let (out, back) = ([1u8; 60], [2u8; 300]);
        let parts = [IoSlice::new(&out[..14]), IoSlice::new(&out[14..])];
        let _ = near.transmit(&header, &parts).unwrap();
        let _ = far.transmit(&header, &[IoSlice::new(&back)]).unwrap();
        let mut buffer = [0; 1000];
        near.receive(&mut [IoSliceMut::new(&mut buffer)])
            .unwrap()
            .unwrap();
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(
            (u32_at(&bytes, 0), u32_at(&bytes, 16), u32_at(&bytes, 20)),
            (0xa1b2_c3d4, 100, 1)
        );
        let (first, second) = (&bytes[24..], &bytes[24 + 16 + 60..]);
        assert_eq!(
            (u32_at(first, 8), u32_at(first, 12), &first[16..76]),
            (60, 60, &out[..])
        );
        assert_eq!(
            (u32_at(second, 8), u32_at(second, 12), &second[16..]),
            (100, 300, &back[..100])
        );
    }

    #[test]
    fn a_file_that_can_not_be_made_is_told_in_a_line() {
        let (a, _b) = crossover().unwrap();
        let error =
            Captured::new(Arc::new(a), &CaptureConfig::new("/nowhere/net.pcap")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "can't record the network to /nowhere/net.pcap"
        );
    }
}
