//! An export as a backend (a raw disk) and as a medium (under an image format).

use std::rc::Rc;

use block::executor::Socket;
use block::{
    BlockBackend, BlockError, BlockFuture, ErrorKind, Extent, ExtentKind, ExtentQuery, HostRange,
    IoBuf, Limits, Medium, Result, SparseRange, ZeroFlags, push_merged,
};

use super::{Connection, handshake};
use crate::address::NbdName;
use crate::protocol::{Command, CommandFlags, StateFlags, TransmissionFlags};
use crate::tls::TlsClient;

/// An export that a connection is open to.
pub struct NbdDisk {
    connection: Rc<Connection>,
    name: Rc<str>,
    writable: bool,
}

impl NbdDisk {
    /// Connects to an export, on this thread's executor. For a name that asks for TLS the credentials
    /// come from the folder that it names, or from libnbd's usual ones.
    ///
    /// # Errors
    ///
    /// One line that says what the server or the host refused; `ReadOnly` if `write` is asked of a
    /// read-only export.
    pub async fn connect(name: &NbdName, write: bool) -> Result<Rc<Self>> {
        Self::over(name.address.connect().await?, name, write).await
    }

    /// [`Self::connect`] over a connection that is there already.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`].
    pub async fn over(socket: Socket, name: &NbdName, write: bool) -> Result<Rc<Self>> {
        let tls = match (&name.certificates, name.tls) {
            (_, false) => None,
            (Some(folder), true) => Some(TlsClient::load(folder, None)?),
            (None, true) => Some(TlsClient::load_default()?),
        };
        let (transport, reader, agreed) = handshake::connect(socket, name, tls.as_ref()).await?;
        let uri = name.uri();
        if write && agreed.flags.contains(TransmissionFlags::READ_ONLY) {
            transport.shutdown();
            let message = format!("'{uri}': the export is read-only");
            return Err(BlockError::new(ErrorKind::ReadOnly, message));
        }
        Ok(Rc::new(Self {
            connection: Connection::start(transport, reader, agreed),
            name: uri.into(),
            writable: write,
        }))
    }

    /// The size of the export in bytes, which need not be whole sectors.
    pub fn size(&self) -> u64 {
        self.connection.agreed.size
    }

    fn can(&self, flag: TransmissionFlags) -> bool {
        self.connection.agreed.flags.contains(flag)
    }

    async fn command(
        &self,
        command: Command,
        flags: CommandFlags,
        range: (u64, u64),
        payload: Option<IoBuf>,
    ) -> Result<()> {
        let sent = self
            .connection
            .request(command, flags, range, None, payload);
        sent.await.map(|_| ())
    }

    /// Calls for each piece of a range that one request may have.
    fn pieces(&self, offset: u64, length: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
        let count = length.div_ceil(most);
        (0..count).map(move |n| (offset + n * most, most.min(length - n * most)))
    }

    /// The largest range of a request without payload.
    fn most(&self) -> u64 {
        if self.connection.agreed.extended {
            1 << 40
        } else {
            1 << 30
        }
    }

    async fn read_bytes(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let inside = self.size().saturating_sub(offset).min(buf.len() as u64);
        let most = u64::from(self.connection.agreed.maximum);
        for (at, length) in self.pieces(offset, inside, most) {
            let skip = usize::try_from(at - offset).unwrap_or(0);
            let part = buf.slice(skip, usize::try_from(length).unwrap_or(0));
            let flags = CommandFlags::empty();
            let sent =
                self.connection
                    .request(Command::READ, flags, (at, length), Some(part), None);
            sent.await?;
        }
        let inside = usize::try_from(inside).unwrap_or(0);
        buf.fill_at(inside, buf.len() - inside, 0);
        Ok(())
    }

    async fn write_bytes(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.size().next_multiple_of(512) {
            let size = self.size();
            let message = format!("'{}' has {size} bytes and cannot grow to {end}", self.name);
            return Err(BlockError::new(ErrorKind::NoSpace, message));
        }
        let inside = self.size().saturating_sub(offset).min(buf.len() as u64);
        let most = u64::from(self.connection.agreed.maximum);
        for (at, length) in self.pieces(offset, inside, most) {
            let skip = usize::try_from(at - offset).unwrap_or(0);
            let part = buf.slice(skip, usize::try_from(length).unwrap_or(0));
            let flags = CommandFlags::empty();
            self.command(Command::WRITE, flags, (at, length), Some(part))
                .await?;
        }
        Ok(())
    }

    async fn zero(&self, offset: u64, length: u64, wanted: ZeroFlags) -> Result<()> {
        let length = self.size().saturating_sub(offset).min(length);
        let quick = wanted.contains(ZeroFlags::NO_FALLBACK);
        if !self.can(TransmissionFlags::SEND_WRITE_ZEROES) {
            if quick {
                return Err(BlockError::unsupported(
                    "the NBD server cannot zero quickly",
                ));
            }
            let zeroes = IoBuf::zeroed(1 << 20);
            for (at, length) in self.pieces(offset, length, 1 << 20) {
                let part = zeroes.slice(0, usize::try_from(length).unwrap_or(0));
                self.write_bytes(at, part).await?;
            }
            return Ok(());
        }
        let mut flags = CommandFlags::empty();
        flags.set(
            CommandFlags::NO_HOLE,
            !wanted.contains(ZeroFlags::MAY_UNMAP),
        );
        if quick {
            if !self.can(TransmissionFlags::SEND_FAST_ZERO) {
                return Err(BlockError::unsupported(
                    "the NBD server cannot zero quickly",
                ));
            }
            flags |= CommandFlags::FAST_ZERO;
        }
        for range in self.pieces(offset, length, self.most()) {
            self.command(Command::WRITE_ZEROES, flags, range, None)
                .await?;
        }
        Ok(())
    }

    async fn trim(&self, offset: u64, length: u64) -> Result<()> {
        let length = self.size().saturating_sub(offset).min(length);
        if self.can(TransmissionFlags::SEND_TRIM) {
            for range in self.pieces(offset, length, self.most()) {
                let flags = CommandFlags::empty();
                self.command(Command::TRIM, flags, range, None).await?;
            }
        }
        Ok(())
    }

    async fn sync(&self) -> Result<()> {
        if self.writable && self.can(TransmissionFlags::SEND_FLUSH) {
            let flags = CommandFlags::empty();
            self.command(Command::FLUSH, flags, (0, 0), None).await?;
        }
        Ok(())
    }

    fn extent(&self, offset: u64, length: u64, zero: bool) -> Extent {
        let place = Some(HostRange {
            file: self.name.clone(),
            offset,
        });
        let kind = if zero {
            ExtentKind::Zero(place)
        } else {
            ExtentKind::Data(place)
        };
        Extent {
            offset,
            length,
            kind,
            depth: 0,
        }
    }

    async fn ask_extents(&self, query: ExtentQuery) -> Result<Vec<Extent>> {
        let end = query.offset + query.length;
        let stored = self.size().min(end);
        if self.connection.agreed.base_allocation.is_none() {
            return Ok(vec![self.extent(query.offset, query.length, false)]);
        }
        let mut found: Vec<Extent> = Vec::new();
        let mut at = query.offset;
        while at < stored && found.len() < query.limit {
            let length = (stored - at).min(self.most());
            let flags = CommandFlags::empty();
            let sent =
                self.connection
                    .request(Command::BLOCK_STATUS, flags, (at, length), None, None);
            let answer = sent.await?;
            let status = answer.status.borrow();
            if status.is_empty() {
                return Err(super::broken("a block status without extents"));
            }
            for part in status.iter() {
                let length = part.length.min(stored - at);
                if length == 0 {
                    break;
                }
                let zero = part.flags & u64::from(StateFlags::ZERO.bits()) != 0;
                push_merged(&mut found, self.extent(at, length, zero));
                at += length;
            }
        }
        if at == stored && stored < end {
            push_merged(&mut found, self.extent(stored, end - stored, true));
        }
        found.truncate(query.limit);
        Ok(found)
    }

    async fn end(&self) -> Result<()> {
        let synced = self.sync().await;
        let goodbye = crate::protocol::Request {
            flags: CommandFlags::empty(),
            command: Command::DISC,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        let extended = self.connection.agreed.extended;
        let bytes = crate::protocol::encode_request(&goodbye, extended);
        self.connection.outbox.push(IoBuf::from_slice(&bytes));
        self.connection.outbox.close();
        synced
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        // Lets both tasks of the connection end.
        self.connection.outbox.close();
    }
}

impl BlockBackend for NbdDisk {
    fn limits(&self) -> Limits {
        Limits {
            size: self.size().next_multiple_of(512),
            logical_block_size: self.connection.agreed.minimum.max(512),
            physical_block_size: 4096,
            buffer_alignment: 1,
            discard_granularity: 4096,
            zero_granularity: 4096,
            max_transfer: self.connection.agreed.maximum,
            read_only: !self.writable,
        }
    }

    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.read_bytes(offset, buf))
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.write_bytes(offset, buf))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(self.zero(offset, length, flags))
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(self.trim(offset, length))
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.sync())
    }

    fn extents(&self, query: ExtentQuery) -> BlockFuture<'_, Vec<Extent>> {
        Box::pin(self.ask_extents(query))
    }

    fn resize(&self, size: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move { NbdMedium::resized(&self.name, self.size(), size) })
    }

    fn close(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.end())
    }
}

/// An export as the file under an image format. Its length never changes.
pub struct NbdMedium(pub Rc<NbdDisk>);

impl NbdMedium {
    fn resized(name: &str, have: u64, wanted: u64) -> Result<()> {
        if wanted <= have.next_multiple_of(512) {
            return Ok(());
        }
        let message = format!("'{name}' has {have} bytes and cannot grow to {wanted}");
        Err(BlockError::new(ErrorKind::NoSpace, message))
    }
}

impl Medium for NbdMedium {
    fn name(&self) -> Rc<str> {
        self.0.name.clone()
    }

    fn len(&self) -> u64 {
        self.0.size()
    }

    fn read_only(&self) -> bool {
        !self.0.writable
    }

    fn alignment(&self) -> u32 {
        self.0.connection.agreed.minimum
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.0.read_bytes(offset, buf))
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.0.write_bytes(offset, buf))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(self.0.zero(offset, length, flags))
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(self.0.trim(offset, length))
    }

    fn preallocate(&self, _offset: u64, _length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(self.0.sync())
    }

    fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move { Self::resized(&self.0.name, self.0.size(), length) })
    }

    fn sparse_range(&self, _offset: u64, length: u64) -> Result<SparseRange> {
        Ok(SparseRange { data: true, length })
    }
}
