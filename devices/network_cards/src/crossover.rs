//! A cable between two cards in one process: what one transmits the other receives.
//!
//! One queue pair at each end. Frames pass unchanged, offload headers included, so each card must accept what the
//! other leaves undone ([`NetBackend::set_offloads`] changes nothing). Useful in tests of cards.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use crate::backend::{Interest, LinkState, NetBackend, NetError, NetQueue, Transmit};
use crate::offload::{MAX_FRAME, OffloadHeader, Offloads};

/// How many frames wait in one direction before the sender is told to wait.
const DEPTH: usize = 256;

/// What lies in front of one end: the frames on their way to it, and its wake-up.
#[derive(Debug)]
struct Port {
    inbound: Mutex<Inbound>,
    /// Readable when frames have come, or when the other end has room again.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Inbound {
    frames: VecDeque<(OffloadHeader, Vec<u8>)>,
    sender_waits: bool,
}

impl Port {
    fn new() -> Result<Arc<Self>, NetError> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| NetError::os("can't make an event descriptor", e))?;
        Ok(Arc::new(Self {
            inbound: Mutex::default(),
            wake,
        }))
    }

    fn raise(&self) {
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// One end of a cable, see [`crossover`].
#[derive(Debug)]
pub struct Crossover {
    queue: Mutex<Option<Box<CrossoverQueue>>>,
}

/// Makes a cable and returns its two ends.
pub fn crossover() -> Result<(Crossover, Crossover), NetError> {
    let (a, b) = (Port::new()?, Port::new()?);
    let end = |own: &Arc<Port>, peer: &Arc<Port>| Crossover {
        queue: Mutex::new(Some(Box::new(CrossoverQueue {
            own: own.clone(),
            peer: peer.clone(),
        }))),
    };
    Ok((end(&a, &b), end(&b, &a)))
}

impl NetBackend for Crossover {
    fn describe(&self) -> String {
        "crossover cable".into()
    }

    fn max_queue_pairs(&self) -> u16 {
        1
    }

    fn transmit_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&self, _accepted: Offloads) -> Result<(), NetError> {
        Ok(())
    }

    fn take_queues(&self, pairs: u16) -> Result<Vec<Box<dyn NetQueue>>, NetError> {
        self.set_active_queues(pairs)?;
        match self.queue.lock().take() {
            Some(queue) => Ok(vec![queue]),
            None => Err(NetError::QueuesTaken(self.describe())),
        }
    }

    fn set_active_queues(&self, pairs: u16) -> Result<(), NetError> {
        if pairs == 1 {
            return Ok(());
        }
        Err(NetError::QueueCount {
            link: self.describe(),
            asked: pairs,
            max: 1,
        })
    }

    fn link(&self) -> LinkState {
        LinkState::Up
    }
}

#[derive(Debug)]
struct CrossoverQueue {
    own: Arc<Port>,
    peer: Arc<Port>,
}

impl NetQueue for CrossoverQueue {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.own.wake.as_fd()
    }

    fn interest(&self, _has_room: bool) -> Interest {
        Interest {
            readable: true,
            writable: false,
        }
    }

    fn process(&mut self) -> Result<(), NetError> {
        // Nothing to read means that it was cleared already.
        let _ = rustix::io::read(&self.own.wake, &mut [0u8; 8]);
        Ok(())
    }

    fn transmit(
        &mut self,
        header: &OffloadHeader,
        frame: &[IoSlice<'_>],
    ) -> Result<Transmit, NetError> {
        let len: usize = frame.iter().map(|s| s.len()).sum();
        if !(14..=MAX_FRAME).contains(&len) {
            return Ok(Transmit::Accepted);
        }
        let mut inbound = self.peer.inbound.lock();
        if inbound.frames.len() >= DEPTH {
            inbound.sender_waits = true;
            return Ok(Transmit::WouldBlock);
        }
        let mut bytes = Vec::with_capacity(len);
        frame.iter().for_each(|part| bytes.extend_from_slice(part));
        inbound.frames.push_back((*header, bytes));
        if inbound.frames.len() == 1 {
            self.peer.raise();
        }
        Ok(Transmit::Accepted)
    }

    fn receive(
        &mut self,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(OffloadHeader, usize)>, NetError> {
        let room: usize = buffers.iter().map(|b| b.len()).sum();
        let mut inbound = self.own.inbound.lock();
        while let Some((header, bytes)) = inbound.frames.pop_front() {
            if inbound.sender_waits && inbound.frames.len() < DEPTH / 2 {
                inbound.sender_waits = false;
                self.peer.raise();
            }
            if bytes.len() > room {
                continue;
            }
            let mut rest = &bytes[..];
            for buffer in buffers {
                let (now, later) = rest.split_at(rest.len().min(buffer.len()));
                buffer[..now.len()].copy_from_slice(now);
                rest = later;
            }
            return Ok(Some((header, bytes.len())));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(end: &Crossover) -> Box<dyn NetQueue> {
        end.take_queues(1).unwrap().remove(0)
    }

    #[test]
    fn frames_come_out_at_the_other_end_in_pieces_of_any_size() {
        let (a, b) = crossover().unwrap();
        let (mut a, mut b) = (take(&a), take(&b));
        let frame: Vec<u8> = (0..100).collect();
        let header = OffloadHeader {
            hdr_len: 7,
            ..Default::default()
        };
        let sent = a.transmit(
            &header,
            &[IoSlice::new(&frame[..33]), IoSlice::new(&frame[33..])],
        );
        assert_eq!(sent.unwrap(), Transmit::Accepted);
        b.process().unwrap();
        let (mut x, mut y) = ([0u8; 64], [0u8; 2000]);
        let got = b
            .receive(&mut [IoSliceMut::new(&mut x), IoSliceMut::new(&mut y)])
            .unwrap();
        assert_eq!(got, Some((header, 100)));
        assert_eq!([&x[..], &y[..36]].concat(), frame);
    }

    #[test]
    fn a_full_cable_blocks_and_wakes_the_sender_when_there_is_room() {
        let (a, b) = crossover().unwrap();
        let (mut a, mut b) = (take(&a), take(&b));
        let send = |q: &mut Box<dyn NetQueue>| {
            q.transmit(&OffloadHeader::default(), &[IoSlice::new(&[0; 60])])
                .unwrap()
        };
        for _ in 0..DEPTH {
            assert_eq!(send(&mut a), Transmit::Accepted);
        }
        assert_eq!(send(&mut a), Transmit::WouldBlock);
        let mut buffer = [0u8; 100];
        while b
            .receive(&mut [IoSliceMut::new(&mut buffer)])
            .unwrap()
            .is_some()
        {}
        let mut counter = [0u8; 8];
        assert_eq!(rustix::io::read(a.poll_fd(), &mut counter), Ok(8));
        assert_eq!(send(&mut a), Transmit::Accepted);
    }

    #[test]
    fn queues_are_given_out_once() {
        let (a, _b) = crossover().unwrap();
        assert!(matches!(a.take_queues(2), Err(NetError::QueueCount { .. })));
        assert!(a.take_queues(1).is_ok());
        assert!(matches!(a.take_queues(1), Err(NetError::QueuesTaken(_))));
    }
}
