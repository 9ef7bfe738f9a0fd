//! Opening backends by what a person names.

use std::fs::OpenOptions;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::stream::{Accept, Link, Setup, Stream};

/// Why a backend can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct OpenError {
    /// The file, socket or address.
    what: String,
    /// The host's reason.
    source: std::io::Error,
}

fn error(what: impl ToString) -> impl Fn(std::io::Error) -> OpenError {
    let what = what.to_string();
    move |source| OpenError {
        what: what.clone(),
        source,
    }
}

fn start(what: impl ToString, setup: Setup) -> Result<Stream, OpenError> {
    Stream::start(setup).map_err(error(what))
}

/// The terminal, or standard input and output where they are none. `quit` is called for Ctrl-A X.
///
/// # Errors
/// When the host refuses.
pub fn stdio(quit: impl Fn() + Send + 'static) -> Result<Stream, OpenError> {
    let what = "standard input and output";
    let input = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(error(what))?;
    let output = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(error(what))?;
    crate::terminal::make_raw().map_err(error("the terminal"))?;
    let link = Some(Link {
        input: Some(input),
        output,
    });
    start(
        what,
        Setup {
            link,
            listener: None,
            quit: Some(Box::new(quit)),
            pty: false,
        },
    )
}

/// Appends output to a file.
///
/// # Errors
/// When the file can't be opened.
pub fn file(path: &Path) -> Result<Stream, OpenError> {
    let what = path.display();
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(error(&what))?;
    let link = Some(Link {
        input: None,
        output: file.into(),
    });
    start(
        what,
        Setup {
            link,
            listener: None,
            quit: None,
            pty: false,
        },
    )
}

fn socket(socket: OwnedFd) -> std::io::Result<Link> {
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(Link {
        input: Some(socket.try_clone()?),
        output: socket,
    })
}

fn connected(what: String, fd: OwnedFd) -> Result<Stream, OpenError> {
    let link = Some(socket(fd).map_err(error(&what))?);
    start(
        what,
        Setup {
            link,
            listener: None,
            quit: None,
            pty: false,
        },
    )
}

/// Connects to a Unix socket.
///
/// # Errors
/// When nobody listens.
pub fn unix_client(path: &Path) -> Result<Stream, OpenError> {
    let stream = UnixStream::connect(path).map_err(error(path.display()))?;
    connected(path.display().to_string(), stream.into())
}

/// Connects to a TCP port.
///
/// # Errors
/// When nobody listens.
pub fn tcp_client(host: &str, port: u16) -> Result<Stream, OpenError> {
    let what = format!("{host}:{port}");
    let stream = TcpStream::connect((host, port)).map_err(error(&what))?;
    let _ = stream.set_nodelay(true);
    connected(what, stream.into())
}

/// A server of one client at a time; with `wait`, returns when the first has come.
fn server(what: String, fd: OwnedFd, mut accept: Accept, wait: bool) -> Result<Stream, OpenError> {
    let link = if wait {
        eprintln!("corten: waiting for a connection to {what}");
        Some(accept().map_err(error(&what))?)
    } else {
        None
    };
    start(
        what,
        Setup {
            link,
            listener: Some((fd, accept)),
            quit: None,
            pty: false,
        },
    )
}

/// Listens on a Unix socket, in place of one that a dead server left behind.
///
/// # Errors
/// When the socket can't be made.
pub fn unix_server(path: &Path, wait: bool) -> Result<Stream, OpenError> {
    let what = path.display().to_string();
    if UnixStream::connect(path).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused) {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(path).map_err(error(&what))?;
    let fd = listener.try_clone().map_err(error(&what))?.into();
    let accept = Box::new(move || socket(listener.accept()?.0.into()));
    server(what, fd, accept, wait)
}

/// Listens on a TCP port; 0 lets the host choose one, which is printed.
///
/// # Errors
/// When the port is taken.
pub fn tcp_server(host: &str, port: u16, wait: bool) -> Result<Stream, OpenError> {
    let what = format!("{host}:{port}");
    let listener = TcpListener::bind((host, port)).map_err(error(&what))?;
    if port == 0
        && let Ok(address) = listener.local_addr()
    {
        eprintln!("corten: listening on {address}");
    }
    let fd = listener.try_clone().map_err(error(&what))?.into();
    let accept = Box::new(move || {
        let (stream, _) = listener.accept()?;
        let _ = stream.set_nodelay(true);
        socket(stream.into())
    });
    server(what, fd, accept, wait)
}

/// A new pseudo-terminal; returns the path of the side that a person opens.
///
/// # Errors
/// When the host gives none.
pub fn pty() -> Result<(Stream, PathBuf), OpenError> {
    let what = "a pseudo-terminal";
    let error = |e: rustix::io::Errno| error(what)(e.into());
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let main = openpt(flags).map_err(error)?;
    grantpt(&main).map_err(error)?;
    unlockpt(&main).map_err(error)?;
    let name = ptsname(&main, Vec::new()).map_err(error)?;
    let path = PathBuf::from(name.to_string_lossy().into_owned());
    // Raw, as a serial line is; and once opened and closed, so that it reads as hung up and not as empty until a user comes.
    let user =
        rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).map_err(error)?;
    let mut settings = rustix::termios::tcgetattr(&user).map_err(error)?;
    settings.make_raw();
    rustix::termios::tcsetattr(&user, rustix::termios::OptionalActions::Now, &settings)
        .map_err(error)?;
    drop(user);
    let link = Some(socket(main).map_err(|source| OpenError {
        what: what.into(),
        source,
    })?);
    let stream = start(
        what,
        Setup {
            link,
            listener: None,
            quit: None,
            pty: true,
        },
    )?;
    Ok((stream, path))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::{Arc, Weak, mpsc};
    use std::time::Duration;

    use device_model::{CharBackend, CharEvent, CharFrontend};
    use parking_lot::Mutex;

    use super::*;

    /// A device that takes at most three bytes at a time.
    struct Slow(Mutex<mpsc::Sender<Vec<u8>>>);

    impl CharFrontend for Slow {
        fn receive(&self, data: &[u8]) -> usize {
            let n = data.len().min(3);
            self.0.lock().send(data[..n].to_vec()).unwrap();
            n
        }
        fn writable(&self) {
            self.0.lock().send(b"[writable]".to_vec()).unwrap();
        }
        fn event(&self, event: CharEvent) {
            self.0
                .lock()
                .send(format!("[{event:?}]").into_bytes())
                .unwrap();
        }
    }

    const LIMIT: Duration = Duration::from_secs(10);

    struct Line {
        backend: Stream,
        device: Arc<Slow>,
        heard: mpsc::Receiver<Vec<u8>>,
    }

    fn line(backend: Stream) -> Line {
        let (send, heard) = mpsc::channel();
        let device = Arc::new(Slow(Mutex::new(send)));
        let front: Arc<dyn CharFrontend> = device.clone();
        backend.connect(Arc::downgrade(&front));
        Line {
            backend,
            device,
            heard,
        }
    }

    impl Line {
        /// What the device has taken, until it makes up `wanted`.
        fn hear(&self, wanted: &str) {
            let mut all = Vec::new();
            while all != wanted.as_bytes() {
                all.extend(self.heard.recv_timeout(LIMIT).expect(wanted));
                assert!(
                    wanted.as_bytes().starts_with(&all),
                    "{:?}",
                    String::from_utf8_lossy(&all)
                );
                self.backend.accept_input();
            }
        }
    }

    #[test]
    fn a_unix_server_serves_one_client_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("line");
        let line = line(unix_server(&path, false).unwrap());
        assert!(!line.backend.is_open());
        assert_eq!(line.backend.write(b"lost"), 4);
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            line.hear("[Opened]");
            client.write_all(b"hello there").unwrap();
            line.hear("hello there");
            assert_eq!(line.backend.write(b"answer"), 6);
            let mut answer = [0; 6];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"answer");
            drop(client);
            line.hear("[Closed]");
        }
        assert!(Arc::strong_count(&line.device) >= 1);
    }

    #[test]
    fn output_is_bounded_and_the_device_is_told_of_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("line");
        let line = line(unix_server(&path, false).unwrap());
        let mut client = UnixStream::connect(&path).unwrap();
        line.hear("[Opened]");
        let data: Vec<u8> = (0..8 << 20).map(|i: u32| i as u8).collect();
        let mut sent = 0;
        loop {
            let n = line.backend.write(&data[sent..]);
            sent += n;
            if n == 0 {
                break;
            }
        }
        let mut back = vec![0; sent];
        client.read_exact(&mut back).unwrap();
        assert!(back == data[..sent]);
        line.hear("[writable]");
        line.backend.drain(LIMIT);
    }

    #[test]
    fn files_ptys_and_tcp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = file(&path).unwrap();
        log.write(b"one\n");
        log.drain(LIMIT);
        drop(log);
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        assert!(file(Path::new("/nonexistent/log")).is_err());

        let (stream, path) = pty().unwrap();
        let line_pty = line(stream);
        let mut user = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        user.write_all(b"abc").unwrap();
        // A pseudo-terminal counts as open until somebody has been there and left.
        let mut heard = line_pty.heard.recv_timeout(LIMIT).unwrap();
        while heard.starts_with(b"[") {
            heard = line_pty.heard.recv_timeout(LIMIT).unwrap();
        }
        assert_eq!(heard, b"abc");
        line_pty.backend.write(b"xyz");
        let mut back = [0; 3];
        user.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"xyz");

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = line(tcp_client("127.0.0.1", port).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"hi").unwrap();
        client.hear("hi");
        assert!(tcp_server("127.0.0.1", port, false).is_err());
        let weak: Weak<Slow> = Arc::downgrade(&client.device);
        drop(client);
        assert!(weak.upgrade().is_none());
    }
}
