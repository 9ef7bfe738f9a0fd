//! `cargo xtask demo`: from nothing to a login prompt.

use std::io::{IsTerminal, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::Result;
use crate::console::Console;
use crate::guest::{self, Boot};
use crate::host::{self, command};

/// Options of the demo.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Log in, look round, check what is seen, and exit 0 only if all of it was right
    #[arg(long)]
    check: bool,
    /// Make the root disk anew
    #[arg(long)]
    rebuild: bool,
    /// vCPUs of the guest
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Processor: auto, kvm or soft
    #[arg(long, default_value = "auto")]
    accel: String,
}

/// Longest time for a boot on a slow machine.
const BOOT: Duration = Duration::from_secs(300);
/// Longest time for a command in the guest.
const STEP: Duration = Duration::from_secs(60);

pub(crate) fn run(options: &Options) -> Result<()> {
    host::need_packages(&["gcc", "libc6-dev"])?;
    let corten = host::build_corten()?;
    let boot = guest::disk_boot()?;
    let disk = guest::root_disk(&corten, options.rebuild)?;
    let line = || machine(&corten, &boot, &disk, options);
    eprintln!("\n{}\n", host::line(&line()));
    if options.check || !std::io::stdin().is_terminal() {
        return check(line);
    }
    eprintln!("Log in as root; there is no password. Ctrl-A X ends the machine.\n");
    host::run(&mut line())
}

fn machine(corten: &Path, boot: &Boot, disk: &Path, options: &Options) -> Command {
    let mut run = command(corten);
    run.args([
        "run",
        "--name",
        "demo",
        "--accel",
        &options.accel,
        "--memory",
        "1G",
    ]);
    run.args(["--cpus", &options.cpus.to_string()]);
    run.arg("--kernel")
        .arg(&boot.kernel)
        .arg("--initrd")
        .arg(&boot.initrd);
    run.args(["--append", "console=ttyS0 root=/dev/vda rw"]);
    run.arg("--disk").arg(format!(
        "{},format=qcow2",
        disk.display().to_string().replace(',', ",,")
    ));
    run.args(["--net", "user", "--rng", "--serial", "stdio"]);
    run
}

/// Serves one page to whoever asks, on the host's loopback interface; returns the port.
fn serve_page(page: &str) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| format!("a page's port: {e}"))?;
    let port = listener.local_addr().map_err(|e| e.to_string())?.port();
    let answer = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{page}",
        page.len()
    );
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(mut client) = client else { return };
            let mut request: Vec<u8> = Vec::new();
            let mut buffer = [0; 1024];
            while !request.windows(4).any(|w| w == b"\r\n\r\n") {
                match client.read(&mut buffer) {
                    Ok(n @ 1..) if request.len() < 1 << 16 => request.extend(&buffer[..n]),
                    _ => break,
                }
            }
            let _ = client.write_all(answer.as_bytes());
        }
    });
    Ok(port)
}

/// The digest of a text as `md5sum` prints it.
fn md5sum(text: &str) -> Result<String> {
    let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    std::fs::write(file.path(), text).map_err(|e| e.to_string())?;
    let printed = host::run_quietly(command("md5sum").arg("-z").arg(file.path()))?;
    let digest = printed.split(' ').next().unwrap_or_default();
    Ok(format!("{digest}  -"))
}

fn log_in(console: &mut Console) -> Result<()> {
    console.expect("login: ", BOOT)?;
    console.send("root\n")?;
    console.expect("# ", BOOT)?;
    // A plain terminal: no colours, no bracketed paste, no line folding in what is read back.
    let plain = "export TERM=dumb PS1='# '; bind 'set enable-bracketed-paste off'; stty cols 500";
    console.shell(plain, STEP).map(|_| ())
}

fn power_off(mut console: Console) -> Result<()> {
    console.send("systemctl poweroff\n")?;
    let status = console.wait(BOOT)?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("after power-off: {status}"))
    }
}

fn must_contain(what: &str, text: &str, wanted: &str) -> Result<()> {
    if text.contains(wanted) {
        return Ok(());
    }
    Err(format!("{what} should show {wanted:?}, but says:\n{text}"))
}

/// Boots twice and checks what a person would look at.
fn check(machine: impl Fn() -> Command) -> Result<()> {
    let token = format!("corten-{}", std::process::id());
    let page = format!("a page for {token}, {}\n", "and more of it ".repeat(1000));
    let port = serve_page(&page)?;

    let mut console = Console::start(&mut machine(), true)?;
    log_in(&mut console)?;
    must_contain("uname -a", &console.shell("uname -a", STEP)?, "cloud-amd64")?;
    must_contain("lsblk", &console.shell("lsblk", STEP)?, "vda")?;
    must_contain("lspci", &console.shell("lspci", STEP)?, "Virtio")?;
    let wait =
        "for n in $(seq 100); do ip -4 addr show | grep -q 10.0.2.15 && break; sleep 0.2; done";
    console.shell(wait, STEP)?;
    must_contain("ip addr", &console.shell("ip addr", STEP)?, "10.0.2.15")?;
    console.shell(&format!("echo {token} > /root/token"), STEP)?;
    let fetch = format!("wget -q -O - http://10.0.2.2:{port}/ | md5sum");
    let (fetched, local) = (console.shell(&fetch, STEP)?, md5sum(&page)?);
    if fetched != local {
        return Err(format!("the page came as {fetched}, expected {local}"));
    }
    power_off(console)?;

    let mut console = Console::start(&mut machine(), true)?;
    log_in(&mut console)?;
    must_contain(
        "the file written before",
        &console.shell("cat /root/token", STEP)?,
        &token,
    )?;
    power_off(console)?;
    eprintln!("\ndemo: all checks passed");
    Ok(())
}
