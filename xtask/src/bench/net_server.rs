//! The host's end of the network measurements: what `iobench` connects to.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::Result;

const PIECE: usize = 256 << 10;

/// A server on the host's loopback. Serves one connection after the other: the guest has one at a time.
pub(super) struct NetServer {
    port: u16,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NetServer {
    pub(super) fn start() -> Result<Self> {
        let failed = |e: std::io::Error| format!("a server on the host: {e}");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let ended = Arc::new(AtomicBool::new(false));
        let of_thread = ended.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if of_thread.load(Ordering::SeqCst) {
                    return;
                }
                // A guest that goes away in the middle is what a measurement ends with.
                let _ = serve(stream);
            }
        });
        Ok(Self {
            port,
            ended,
            thread: Some(thread),
        })
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for NetServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the thread; if it can't be reached it has nothing to wait for.
        if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// Does what the first byte asks for: `S`ends a stream, `K`eeps what comes, `E`choes, or answers one `C`onnection with a byte.
fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut service = [0];
    stream.read_exact(&mut service)?;
    let mut piece = vec![0; if service == *b"C" { 1 } else { PIECE }];
    match &service {
        b"S" => loop {
            stream.write_all(&piece)?;
        },
        b"K" => {
            while stream.read(&mut piece)? > 0 {}
            Ok(())
        }
        b"E" => loop {
            match stream.read(&mut piece)? {
                0 => return Ok(()),
                n => stream.write_all(&piece[..n])?,
            }
        },
        _ => {
            stream.write_all(&service)?;
            stream.read(&mut piece).map(|_| ())
        }
    }
}
