//! `corten nbd`: the options of `qemu-nbd`.

use std::cell::Cell;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::rc::Rc;

use block::executor::{Listener, Socket, block_on, spawn_local};
use block::sync::WaitQueue;
use block::{BlockError, CacheMode, DetectZeroes, DirtyBitmap, Disk, DiskOptions, IoBuf};
use image_formats::{External, ImageOptions, open_image};
use nbd::client::{Listed, list};
use nbd::protocol::TransmissionFlags;
use nbd::server::{Export, Server};
use nbd::{Address, DEFAULT_PORT, TlsClient, TlsServer, inherited_listener};

use crate::img::args::{self, Parsed, Spec, flag, value};
use crate::img::convert::snapshot_name;
use crate::img::output::say;
use crate::img::secrets;

/// Tells the server process that somebody waits for it to be ready.
const READY: &str = "CORTEN_NBD_READY";

const OPTIONS: [Spec; 29] = [
    flag('h', "help"),
    flag('V', "version"),
    value('p', "port"),
    value('b', "bind"),
    value('k', "socket"),
    value('e', "shared"),
    flag('t', "persistent"),
    flag('v', "verbose"),
    value('x', "export-name"),
    value('D', "description"),
    value('o', "offset"),
    flag('A', "allocation-depth"),
    value('B', "bitmap"),
    flag('L', "list"),
    value('1', "object"),
    flag('I', "image-opts"),
    value('2', "tls-creds"),
    value('3', "tls-hostname"),
    flag('4', "fork"),
    value('5', "pid-file"),
    value('f', "format"),
    flag('r', "read-only"),
    flag('s', "snapshot"),
    value('l', "load-snapshot"),
    flag('n', "nocache"),
    value('6', "cache"),
    value('7', "aio"),
    value('8', "discard"),
    value('9', "detect-zeroes"),
];

const HELP: &str = "Serves an image over the NBD protocol. Usage:
  corten nbd [options] FILE      or      corten nbd --list [options]

  -k, --socket PATH        listen on (or list from) a Unix socket
  -p, --port PORT          listen on this TCP port (10809)
  -b, --bind HOST          listen on this address (0.0.0.0)
  -e, --shared N           clients at once (1; 0 for any number)
  -t, --persistent         go on when the last client has gone
  -x, --export-name NAME   the export's name (empty)
  -D, --description TEXT   a description for people
  -o, --offset BYTES       export from this byte of the image on
  -B, --bitmap NAME        offer qemu:dirty-bitmap:NAME of a bitmap that the image has
  -A, --allocation-depth   offer qemu:allocation-depth
  -f, --format FORMAT      the image's format
  -r, --read-only          refuse writes
  -s, --snapshot           keep writes in a temporary file
  -l, --load-snapshot NAME serve an internal snapshot, read-only (also snapshot.id=ID or snapshot.name=NAME)
  -n, --nocache; --cache MODE; --aio MODE; --discard MODE; --detect-zeroes MODE
      --image-opts         FILE is a list of options: driver=FORMAT,file.filename=NAME,encrypt.key-secret=ID
      --object secret,id=ID,file=FILE    a password (or data=TEXT in place of file=)
      --object tls-creds-x509,id=ID,dir=DIR,endpoint=server|client[,verify-peer=on|off]
      --tls-creds ID       use TLS with these credentials
      --tls-hostname HOST  with --list: the name in the server's certificate
      --fork               return when the server is ready, which goes on
      --pid-file PATH      write the server's process number there
  -L, --list               list the exports of another server
  -v, --verbose            say what clients do wrong";

/// One line for a person.
struct Failure(String);

impl From<BlockError> for Failure {
    fn from(error: BlockError) -> Self {
        Self(error.one_line())
    }
}

fn plain(text: impl Into<String>) -> Failure {
    Failure(text.into())
}

/// Runs `corten nbd`, or `qemu-nbd`, with the arguments that follow it.
pub(crate) fn main(arguments: &[String], compatible: bool) -> ExitCode {
    let program = if compatible { "qemu-nbd" } else { "corten nbd" };
    match run(arguments, program, compatible) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(text)) => {
            eprintln!("{program}: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String], program: &str, compatible: bool) -> Result<(), Failure> {
    let mut parsed = args::parse(arguments, &OPTIONS).map_err(|f| plain(f.text()))?;
    if parsed.has('h') {
        say(HELP);
        return Ok(());
    }
    if parsed.has('V') {
        say(format!(
            "{program} (Corten) version {}",
            env!("CARGO_PKG_VERSION")
        ));
        return Ok(());
    }
    take_secrets(&mut parsed)?;
    if parsed.has('L') {
        return list_exports(&parsed);
    }
    let [file] = &parsed.names[..] else {
        return Err(plain("Expecting one image file name"));
    };
    if parsed.has('4') && std::env::var_os(READY).is_none() {
        return fork(arguments);
    }
    block_on(serve(&parsed, file, compatible))?
}

/// Reads the passwords among the objects, and image names that are options.
fn take_secrets(parsed: &mut Parsed) -> Result<(), Failure> {
    let objects = parsed.all(&['1']);
    let is_secret = |text: &str| {
        let kind = text.split(',').next().unwrap_or("");
        kind.trim_start_matches("qom-type=") == "secret"
    };
    let secret_texts: Vec<_> = objects
        .into_iter()
        .filter(|(_, text)| is_secret(text))
        .collect();
    let found = secrets::objects(&secret_texts).map_err(|f| plain(f.text()))?;
    parsed.secrets = found;
    if parsed.has('I') {
        secrets::image_options(parsed).map_err(|f| plain(f.text()))?;
    }
    Ok(())
}

/// Starts the same program again and waits until it is ready or has failed.
fn fork(arguments: &[String]) -> Result<(), Failure> {
    use std::os::unix::process::CommandExt;
    let failed = |e: std::io::Error| plain(format!("cannot start the server: {e}"));
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    let name = std::env::args_os().next().unwrap_or_default();
    // Called by its own name, the first argument says what to be.
    let first = std::env::args()
        .nth(1)
        .filter(|first| first == "nbd" && arguments.first() != Some(first));
    command.arg0(name).args(first).args(arguments);
    command
        .env(READY, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output)
            .read_line(&mut line)
            .map_err(failed)?;
    }
    if line == "ready\n" {
        return Ok(());
    }
    let status = child.wait().map_err(failed)?;
    std::process::exit(status.code().unwrap_or(1));
}

/// Tells the process that waits, and lets go of its terminal.
fn detach() -> Result<(), Failure> {
    if std::env::var_os(READY).is_none() {
        return Ok(());
    }
    say("ready");
    let failed = |e: std::io::Error| plain(format!("cannot detach: {e}"));
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null");
    let null = null.map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
    rustix::stdio::dup2_stderr(&null).map_err(|e| failed(e.into()))?;
    rustix::process::setsid().map_err(|e| failed(e.into()))?;
    Ok(())
}

fn number<T: std::str::FromStr>(
    parsed: &Parsed,
    letter: char,
    what: &str,
    default: T,
) -> Result<T, Failure> {
    match parsed.get(letter) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| plain(format!("Invalid {what} '{text}'"))),
    }
}

fn address(parsed: &Parsed, host: &str) -> Result<Address, Failure> {
    if let Some(path) = parsed.get('k') {
        if !path.starts_with('/') {
            return Err(plain("socket path must be absolute"));
        }
        return Ok(Address::Unix(path.into()));
    }
    let port = number(parsed, 'p', "port", DEFAULT_PORT)?;
    Ok(Address::Tcp(
        parsed.get('b').unwrap_or(host).to_owned(),
        port,
    ))
}

/// The folder, end point and peer verification of the `--object` that `--tls-creds` names.
fn credentials(parsed: &Parsed, endpoint: &str) -> Result<Option<(PathBuf, bool)>, Failure> {
    let Some(id) = parsed.get('2') else {
        return Ok(None);
    };
    for (_, text) in parsed.all(&['1']) {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or("").trim_start_matches("qom-type=");
        let pairs: Vec<_> = parts.filter_map(|p| p.split_once('=')).collect();
        let get = |key: &str| pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        if get("id") != Some(id) {
            continue;
        }
        if kind != "tls-creds-x509" {
            return Err(plain(format!(
                "--object {kind}: only tls-creds-x509 is supported"
            )));
        }
        if get("endpoint").unwrap_or("client") != endpoint {
            return Err(plain(format!(
                "--tls-creds {id}: expected endpoint={endpoint}"
            )));
        }
        let folder = get("dir").ok_or_else(|| plain("--object tls-creds-x509 needs dir="))?;
        let verify = !matches!(get("verify-peer"), Some("no" | "off"));
        return Ok(Some((folder.into(), verify)));
    }
    Err(plain(format!("No TLS credentials with id '{id}'")))
}

fn list_exports(parsed: &Parsed) -> Result<(), Failure> {
    if !parsed.names.is_empty() {
        return Err(plain("List mode is incompatible with a file name"));
    }
    let address = address(parsed, "localhost")?;
    let tls = match credentials(parsed, "client")? {
        Some((_, false)) => {
            return Err(plain(
                "verify-peer=no is for servers: a client always verifies",
            ));
        }
        Some((folder, true)) => Some(TlsClient::load(
            &folder,
            parsed.get('3').map(str::to_owned),
        )?),
        None => None,
    };
    let found = block_on(list(&address, tls.as_ref()))??;
    say(format!("exports available: {}", found.len()));
    found.iter().for_each(show);
    Ok(())
}

fn show(export: &Listed) {
    type F = TransmissionFlags;
    say(format!(" export: '{}'", export.name));
    if !export.description.is_empty() {
        say(format!("  description: {}", export.description));
    }
    if let Some((size, flags)) = export.export {
        say(format!("  size:  {size}"));
        let names = [
            (F::READ_ONLY, "readonly"),
            (F::SEND_FLUSH, "flush"),
            (F::SEND_FUA, "fua"),
            (F::ROTATIONAL, "rotational"),
            (F::SEND_TRIM, "trim"),
            (F::SEND_WRITE_ZEROES, "zeroes"),
            (F::SEND_DF, "df"),
            (F::CAN_MULTI_CONN, "multi"),
            (F::SEND_RESIZE, "resize"),
            (F::SEND_CACHE, "cache"),
            (F::SEND_FAST_ZERO, "fast-zero"),
            (F::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
        ];
        let set = names.iter().filter(|(flag, _)| flags.contains(*flag));
        let words: String = set.map(|(_, name)| format!(" {name}")).collect();
        say(format!("  flags: {:#x} ({words} )", flags.bits()));
    }
    if let Some((minimum, preferred, maximum)) = export.block_size {
        say(format!("  min block: {minimum}"));
        say(format!("  opt block: {preferred}"));
        say(format!("  max block: {maximum}"));
    }
    say(format!(
        "  available meta contexts: {}",
        export.contexts.len()
    ));
    for context in &export.contexts {
        say(format!("   {context}"));
    }
}

/// Opens the image, and those of its bitmaps that are to be offered.
async fn open(
    parsed: &Parsed,
    file: &str,
    compatible: bool,
) -> Result<(Rc<Disk>, Vec<Rc<DirtyBitmap>>), Failure> {
    let cache = if parsed.has('n') {
        "none"
    } else {
        parsed.get('6').unwrap_or("writeback")
    };
    let cache = CacheMode::parse(cache)?;
    let discard = match parsed.get('8') {
        None | Some("unmap" | "on") => true,
        Some("ignore" | "off") => false,
        Some(mode) => return Err(plain(format!("Invalid discard mode `{mode}'"))),
    };
    let detect_zeroes = match parsed.get('9') {
        None | Some("off") => DetectZeroes::Off,
        Some("on") => DetectZeroes::On,
        Some("unmap") if discard => DetectZeroes::Unmap,
        Some("unmap") => {
            let text = "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap";
            return Err(plain(text));
        }
        Some(mode) => return Err(plain(format!("Failed to parse detect_zeroes mode: {mode}"))),
    };
    if let Some(mode) = parsed.get('7')
        && !matches!(mode, "threads" | "native" | "io_uring")
    {
        return Err(plain(format!("Invalid aio mode '{mode}'")));
    }
    let read_only = parsed.has('r') || parsed.has('l');
    let options = ImageOptions {
        format: parsed.get('f').map(str::to_owned),
        write: !read_only,
        cache,
        discard,
        detect_zeroes,
        external: if compatible {
            External::Follow
        } else {
            External::SameDirectory
        },
        snapshot: parsed.has('s'),
        secret: parsed.key.clone(),
        ..ImageOptions::default()
    };
    let image = open_image(file, &options).await?;
    if options.format.is_none() && options.write && image.backend.format_name() == "raw" {
        eprintln!(
            "WARNING: Image format was not specified for '{file}' and probing guessed raw.\n         \
             Specify the 'raw' format explicitly to remove the restrictions on writes to block 0."
        );
    }
    if let Some(which) = parsed.get('l') {
        let Some(qcow2) = &image.qcow2 else {
            return Err(plain("Failed to load snapshot: this format has none"));
        };
        qcow2.view_snapshot(snapshot_name(which)).await?;
    }
    let policies = DiskOptions {
        cache,
        discard: discard || options.snapshot,
        detect_zeroes,
        read_only,
        ..DiskOptions::default()
    };
    let mut bitmaps = Vec::new();
    for (_, name) in parsed.all(&['B']) {
        let Some(qcow2) = &image.qcow2 else {
            return Err(plain(format!("Bitmap '{name}' is not found")));
        };
        bitmaps.push(qcow2.bitmap(name).await?);
    }
    Ok((Rc::new(Disk::new(image.backend, policies)), bitmaps))
}

/// The clients of a server.
#[derive(Default)]
struct Clients {
    now: Cell<u32>,
    seen: Cell<bool>,
    stop: Cell<bool>,
    changed: WaitQueue,
}

async fn serve(parsed: &Parsed, file: &str, compatible: bool) -> Result<(), Failure> {
    let shared: u32 = number(parsed, 'e', "shared device number", 1)?;
    let tls = match credentials(parsed, "server")? {
        Some((folder, verify)) => Some(TlsServer::load(&folder, verify)?),
        None => None,
    };
    let offset = match parsed.get('o') {
        None => 0,
        Some(text) => args::size(text).ok_or_else(|| plain(format!("Invalid offset '{text}'")))?,
    };
    let (disk, bitmaps) = open(parsed, file, compatible).await?;
    let name = parsed.get('x').unwrap_or("");
    let mut export = Export::new(name, disk.clone(), offset, shared != 1)?;
    if let Some(text) = parsed.get('D') {
        export = export.described(text);
    }
    if parsed.has('A') {
        export = export.with_allocation_depth();
    }
    for bitmap in bitmaps {
        export = export.with_bitmap(bitmap);
    }
    let server = Server::new(vec![Rc::new(export)], tls);
    let (descriptor, socket) = listen(parsed)?;
    let listener = Rc::new(Listener::new(descriptor)?);
    if let Some(path) = parsed.get('5') {
        std::fs::write(path, format!("{}\n", std::process::id()))
            .map_err(|e| plain(format!("cannot write '{path}': {e}")))?;
    }
    let clients = Rc::new(Clients::default());
    watch_signals(&clients)?;
    detach()?;
    let accepting = {
        let (clients, verbose) = (clients.clone(), parsed.has('v'));
        async move {
            loop {
                while shared != 0 && clients.now.get() >= shared {
                    clients.changed.wait().await;
                }
                match listener.accept().await {
                    Ok(socket) => start(&server, socket, &clients, verbose),
                    Err(error) => eprintln!("corten nbd: {}", error.one_line()),
                }
            }
        }
    };
    spawn_local(accepting);
    let persistent = parsed.has('t');
    while !clients.stop.get() && (persistent || !clients.seen.get() || clients.now.get() > 0) {
        clients.changed.wait().await;
    }
    disk.close().await?;
    for path in socket
        .iter()
        .map(PathBuf::as_path)
        .chain(parsed.get('5').map(Path::new))
    {
        // Somebody may have tidied up already.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// The listening socket, and the path to remove at the end.
fn listen(parsed: &Parsed) -> Result<(OwnedFd, Option<PathBuf>), Failure> {
    if let Some(inherited) = inherited_listener()? {
        for (letter, what) in [('k', "socket"), ('p', "port"), ('b', "bind")] {
            if parsed.has(letter) {
                let text = format!("--{what} cannot be combined with socket activation");
                return Err(plain(text));
            }
        }
        return Ok((inherited, None));
    }
    let address = address(parsed, "0.0.0.0")?;
    let descriptor = address.listen()?;
    Ok(match address {
        Address::Unix(path) => (descriptor, Some(path)),
        Address::Tcp(..) => (descriptor, None),
    })
}

fn start(server: &Rc<Server>, socket: Socket, clients: &Rc<Clients>, verbose: bool) {
    clients.now.set(clients.now.get() + 1);
    let (server, clients) = (server.clone(), clients.clone());
    spawn_local(async move {
        if let Err(error) = server.serve(socket).await
            && verbose
        {
            eprintln!("corten nbd: {}", error.one_line());
        }
        clients.now.set(clients.now.get() - 1);
        clients.seen.set(true);
        clients.changed.wake_all();
    });
}

/// An orderly end on the signals that ask for one.
fn watch_signals(clients: &Rc<Clients>) -> Result<(), Failure> {
    let failed = |e: std::io::Error| plain(format!("cannot watch signals: {e}"));
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    for signal in [
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGHUP,
    ] {
        let end = theirs.try_clone().map_err(failed)?;
        signal_hook::low_level::pipe::register(signal, end).map_err(failed)?;
    }
    let socket = Socket::new(ours.into())?;
    let clients = clients.clone();
    spawn_local(async move {
        // The other end stays with the handlers, so this returns only when a signal has come.
        let _ = socket.read(IoBuf::zeroed(1)).await;
        clients.stop.set(true);
        clients.changed.wake_all();
    });
    Ok(())
}
