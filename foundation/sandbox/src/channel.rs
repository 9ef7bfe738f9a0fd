//! Messages over a stream socket: a kind, a length, bytes, and perhaps a descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, send, sendmsg,
};

use crate::MAX_MESSAGE;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Question,
    Answer,
    Result,
}

/// A message: what it is, its bytes, and the descriptor that came with it.
pub(crate) type Message = (Kind, Vec<u8>, Option<OwnedFd>);

/// Kind and length.
const HEADER: usize = 5;

pub(crate) struct Channel(OwnedFd);

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends a message as a whole.
    pub(crate) fn send(
        &self,
        kind: Kind,
        bytes: &[u8],
        descriptor: Option<&OwnedFd>,
    ) -> io::Result<()> {
        let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
        let length = u32::try_from(bytes.len()).map_err(|_| too_long())?;
        if bytes.len() > MAX_MESSAGE {
            return Err(too_long());
        }
        let mut header = [kind as u8; HEADER];
        header[1..].copy_from_slice(&length.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(AsFd::as_fd);
        let descriptors = descriptors.as_slice();
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        // A short header cannot be: a socket takes 5 bytes or none.
        let flags = SendFlags::NOSIGNAL;
        rustix::io::retry_on_intr(|| {
            sendmsg(&self.0, &[IoSlice::new(&header)], &mut control, flags)
        })?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let sent = rustix::io::retry_on_intr(|| send(&self.0, rest, flags))?;
            rest = &rest[sent..];
        }
        Ok(())
    }

    /// The next message; `None` when the other side is gone.
    pub(crate) fn receive(&self) -> io::Result<Option<Message>> {
        let mut header = [0; HEADER];
        let mut descriptor = None;
        let got = self.receive_first(&mut header, &mut descriptor)?;
        if got == 0 {
            return Ok(None);
        }
        self.fill(&mut header[got..])?;
        let [kind, length @ ..] = header;
        let kind = [Kind::Question, Kind::Answer, Kind::Result]
            .into_iter()
            .find(|k| *k as u8 == kind)
            .ok_or(io::ErrorKind::InvalidData)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_MESSAGE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        Ok(Some((kind, bytes, descriptor)))
    }

    fn receive_first(
        &self,
        header: &mut [u8],
        descriptor: &mut Option<OwnedFd>,
    ) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            let parts = &mut [IoSliceMut::new(header)];
            recvmsg(&self.0, parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                *descriptor = descriptors.next();
            }
        }
        Ok(received.bytes)
    }

    fn fill(&self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (got, _) =
                rustix::io::retry_on_intr(|| recv(&self.0, &mut *bytes, RecvFlags::empty()))?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes = &mut bytes[got..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Channel, Channel) {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (Channel::new(one), Channel::new(other))
    }

    #[test]
    fn messages_come_as_they_were_sent() {
        let (one, other) = pair();
        let long = vec![7; 3 << 20];
        let sent = long.clone();
        let sender = std::thread::spawn(move || {
            let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
            one.send(Kind::Question, b"", Some(&file)).unwrap();
            one.send(Kind::Result, &sent, None).unwrap();
        });
        let (kind, bytes, descriptor) = other.receive().unwrap().unwrap();
        assert_eq!((kind, &bytes[..]), (Kind::Question, &b""[..]));
        assert!(descriptor.is_some());
        let (kind, bytes, descriptor) = other.receive().unwrap().unwrap();
        assert!(kind == Kind::Result && bytes == long && descriptor.is_none());
        sender.join().unwrap();
        assert!(other.receive().unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        for bytes in [&[9, 0, 0, 0, 0][..], &[0, 255, 255, 255, 255], &[0, 1]] {
            let (one, other) = pair();
            send(&one.0, bytes, SendFlags::empty()).unwrap();
            drop(one);
            assert!(other.receive().is_err(), "{bytes:?}");
        }
    }
}
