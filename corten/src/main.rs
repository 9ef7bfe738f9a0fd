//! The corten binary: argument parsing, progress, output; no logic.

mod img;
mod io;
mod nbd;
mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "corten",
    version,
    about = "An x86 virtualization stack",
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a virtual machine
    Run(Box<run::RunArguments>),
    /// Disk images: the verbs and options of qemu-img
    #[command(disable_help_flag = true)]
    Img {
        /// The verb, then its options and file names
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Read, write and look at an image, for tests: the commands of qemu-io
    #[command(disable_help_flag = true)]
    Io {
        /// Options, commands and the image's name
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Serve an image over the NBD protocol: the options of qemu-nbd
    #[command(disable_help_flag = true)]
    Nbd {
        /// Options and the image's name
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().map(|a| a.to_string_lossy().into_owned());
    let program = arguments.next().unwrap_or_default();
    match program.rsplit('/').next() {
        Some("qemu-img") => return img::main(&arguments.collect::<Vec<_>>(), true),
        Some("qemu-io") => return io::main(&arguments.collect::<Vec<_>>(), true),
        Some("qemu-nbd") => return nbd::main(&arguments.collect::<Vec<_>>(), true),
        _ => {}
    }
    match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Img { arguments } => img::main(&arguments, false),
        Command::Io { arguments } => io::main(&arguments, false),
        Command::Nbd { arguments } => nbd::main(&arguments, false),
    }
}
