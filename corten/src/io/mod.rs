//! `corten io`: the commands of `qemu-io`, which reads, writes and looks at images for tests.

// Sizes and rates are shown as fractions for people; nothing is computed with them.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

mod commands;
mod image;
mod transfer;
mod words;

use std::io::{BufRead, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use block::executor::{block_on, sleep};
use image_formats::External;
use image_formats::luks::Secret;

use crate::img::args::{self, Spec, flag, value};
use crate::img::output::{put, say};
use crate::img::secrets;
use commands::COMMANDS;
use image::Open;
use words::Words;

const OPTIONS: [Spec; 17] = [
    flag('h', "help"),
    flag('V', "version"),
    value('c', "cmd"),
    value('f', "format"),
    flag('r', "read-only"),
    flag('s', "snapshot"),
    flag('n', "nocache"),
    flag('C', "copy-on-read"),
    flag('m', "misalign"),
    flag('k', "native-aio"),
    value('i', "aio"),
    value('t', "cache"),
    value('d', "discard"),
    value('T', "trace"),
    flag('U', "force-share"),
    flag('1', "image-opts"),
    value('2', "object"),
];

const HELP: &str = "Reads, writes and looks at an image. Usage:
  corten io [options] [-c COMMAND]... [FILE]      (without -c, commands come from standard input)

  -c, --cmd COMMAND        run this command; may be given several times
  -f, --format FORMAT      the image's format
  -r, --read-only          refuse writes
  -s, --snapshot           keep writes in a temporary file
  -n, --nocache            short for -t none
  -t, --cache MODE         none, writeback, writethrough, directsync or unsafe
  -d, --discard MODE       ignore or unmap
  -i, --aio MODE           threads, native or io_uring (the best that there is is taken)
  -U, --force-share        do not lock the image
      --image-opts         FILE is a list of options: driver=FORMAT,file.filename=NAME,encrypt.key-secret=ID
      --object secret,id=ID,file=FILE    a password (or data=TEXT in place of file=)
  -m, -k, -T               accepted, and without effect

'corten io -c help' lists the commands.";

/// A command that did not succeed; why has been printed.
pub(crate) struct Failed;

/// What a command ends with.
type Done = Result<(), Failed>;

/// Says on standard output why a command fails.
fn print(text: impl AsRef<str>) -> Failed {
    say(text);
    Failed
}

/// Shows how a command is used.
fn usage(name: &str) -> Failed {
    if let Some(spec) = commands::find(name) {
        say(spec.line());
    }
    Failed
}

/// A run of the tool.
struct Session {
    program: &'static str,
    compatible: bool,
    /// Passwords, by their ids.
    secrets: Vec<(String, Secret)>,
    image: Option<Open>,
    ended: bool,
}

/// Runs `corten io`, or `qemu-io` (`compatible`: then names in images are followed wherever they
/// lead), with the arguments that follow it.
pub(crate) fn main(arguments: &[String], compatible: bool) -> ExitCode {
    let program = if compatible { "qemu-io" } else { "corten io" };
    let parsed = match args::parse(arguments, &OPTIONS) {
        Ok(parsed) => parsed,
        Err(failure) => {
            eprintln!("{program}: {}", failure.text());
            eprintln!("{HELP}");
            return ExitCode::FAILURE;
        }
    };
    if parsed.has('h') {
        say(HELP);
        return ExitCode::SUCCESS;
    }
    if parsed.has('V') {
        let version = env!("CARGO_PKG_VERSION");
        say(format!("{program} (Corten) version {version}"));
        return ExitCode::SUCCESS;
    }
    if parsed.names.len() > 1 {
        eprintln!("{HELP}");
        return ExitCode::FAILURE;
    }
    let secrets = match secrets::objects(&parsed.all(&['2'])) {
        Ok(secrets) => secrets,
        Err(failure) => {
            eprintln!("{program}: {}", failure.text());
            return ExitCode::FAILURE;
        }
    };
    let mut session = Session {
        program,
        compatible,
        secrets,
        image: None,
        ended: false,
    };
    match block_on(session.run(&parsed)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(Failed)) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{program}: {}", error.one_line());
            ExitCode::FAILURE
        }
    }
}

impl Session {
    /// Says on standard error why a command fails.
    fn complain(&self, text: &str) -> Failed {
        eprintln!("{}: {text}", self.program);
        Failed
    }

    fn external(&self) -> External {
        if self.compatible {
            External::Follow
        } else {
            External::SameDirectory
        }
    }

    async fn run(&mut self, parsed: &args::Parsed) -> Done {
        self.open_first(parsed).await?;
        let given = parsed.all(&['c']);
        let mut result = Ok(());
        for (_, line) in &given {
            if self.ended {
                break;
            }
            let done = self.command(line).await;
            result = result.and(done);
        }
        if given.is_empty() {
            result = self.take_input().await;
        }
        let closed = self.close().await;
        result.and(closed)
    }

    /// Opens the image that the command line names.
    async fn open_first(&mut self, parsed: &args::Parsed) -> Done {
        // The same letters as those of the command `open`.
        let mut line = vec!["open".to_owned()];
        line.extend(
            "rsCnkU"
                .chars()
                .filter(|c| parsed.has(*c))
                .map(|c| format!("-{c}")),
        );
        for letter in ['t', 'd', 'i'] {
            line.extend(parsed.get(letter).map(|value| format!("-{letter}{value}")));
        }
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let Ok(words) = Words::parse(&line, "snCrki:t:d:U") else {
            return Err(Failed);
        };
        let mut options = image::options(self, &words).map_err(|e| self.complain(&e))?;
        options.format = parsed.get('f').map(str::to_owned);
        let Some(name) = parsed.names.first() else {
            return Ok(());
        };
        if !parsed.has('1') {
            return self.open(name, options).await;
        }
        let file = image::driver_options(&[('o', name)], &self.secrets, &mut options);
        match file.map_err(|e| self.complain(&e))? {
            Some(file) => self.open(&file, options).await,
            None => Err(self.complain("--image-opts: expected file.filename=NAME")),
        }
    }

    /// Takes commands from standard input, one in each line.
    async fn take_input(&mut self) -> Done {
        let mut result = Ok(());
        let prompt = format!("{}> ", self.program);
        let mut lines = std::io::stdin().lock().lines();
        loop {
            put(&prompt);
            let Some(Ok(line)) = lines.next() else {
                if std::io::stdin().is_terminal() {
                    say("");
                }
                break;
            };
            let done = self.command(&line).await;
            result = result.and(done);
            if self.ended {
                break;
            }
        }
        result
    }

    /// Runs one command.
    async fn command(&mut self, line: &str) -> Done {
        let line: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some(name) = line.first() else {
            return Ok(());
        };
        let Some(spec) = commands::find(name) else {
            eprintln!("command \"{name}\" not found");
            return Err(Failed);
        };
        if spec.image && self.image.is_none() {
            eprintln!("no file open, try 'help open'");
            return Err(Failed);
        }
        let count = line.len() - 1;
        if count < spec.least || spec.most.is_some_and(|most| count > most) {
            let expected = spec.expected();
            eprintln!(
                "bad argument count {count} to {}, expected {expected} arguments",
                spec.name
            );
            return Err(Failed);
        }
        if spec.writes && self.image.as_ref().is_some_and(|open| open.read_only) {
            return Err(self.complain("Block node is read-only"));
        }
        let Ok(words) = Words::parse(&line, spec.letters) else {
            return Err(usage(spec.name));
        };
        self.run_command(spec.name, &words).await
    }

    async fn run_command(&mut self, name: &str, words: &Words) -> Done {
        match name {
            "abort" => std::process::abort(),
            "help" => return help(words),
            "quit" => {
                self.ended = true;
                return Ok(());
            }
            "sigraise" => return sigraise(words),
            "open" => return self.open_command(words).await,
            "close" => return self.close().await,
            "reopen" => return self.reopen(words).await,
            _ => {}
        }
        let Some(open) = &self.image else {
            return Ok(());
        };
        match name {
            "aio_flush" => {
                open.pending.wait().await;
                Ok(())
            }
            "aio_read" => transfer::aio_read(open, words),
            "aio_write" => transfer::aio_write(open, words),
            "alloc" => image::alloc(open, words).await,
            "discard" => transfer::discard(open, words).await,
            "flush" => {
                let flushed = open.bytes().disk().flush().await;
                flushed.map_err(|e| self.complain(&e.one_line()))
            }
            "info" => {
                image::describe(open);
                Ok(())
            }
            "length" => {
                image::length(open);
                Ok(())
            }
            "map" => image::map(open).await,
            "read" => transfer::read(open, words).await,
            "readv" => transfer::readv(open, words).await,
            "sleep" => pause(words).await,
            "truncate" => image::truncate(self, open, words).await,
            "write" => transfer::write(open, words).await,
            "writev" => transfer::writev(open, words).await,
            "break" => Err(print("Could not set breakpoint: Operation not supported")),
            "remove_break" => {
                let tag = &words.rest[0];
                let text = format!("Could not remove breakpoint {tag}: Operation not supported");
                Err(print(text))
            }
            "resume" => Err(print("Could not resume request: Operation not supported")),
            // QEMU would wait for ever for a request that nothing can stop.
            "wait_break" => Err(print("Could not wait for request: Operation not supported")),
            _ => Err(usage(name)),
        }
    }
}

fn help(words: &Words) -> Done {
    let Some(name) = words.rest.first() else {
        COMMANDS.iter().for_each(|spec| say(spec.line()));
        say("\nUse 'help commandname' for extended help.");
        return Ok(());
    };
    match commands::find(name) {
        Some(spec) => say(spec.line()),
        None => say(format!("command {name} not found")),
    }
    Ok(())
}

async fn pause(words: &Words) -> Done {
    let text = &words.rest[0];
    let Ok(milliseconds) = text.parse::<u32>() else {
        return Err(print(format!("{text} is not a valid number")));
    };
    let slept = sleep(Duration::from_millis(milliseconds.into())).await;
    slept.map_err(|e| print(e.one_line()))
}

fn sigraise(words: &Words) -> Done {
    let text = &words.rest[0];
    let signal = match words::number(text) {
        Ok(number) => i32::try_from(number).unwrap_or(0),
        Err(why) => return Err(print(why)),
    };
    let raised = signal_hook::low_level::raise(signal);
    raised.map_err(|e| print(format!("cannot raise signal {signal}: {e}")))
}
