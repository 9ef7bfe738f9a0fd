//! The project's own chores: `cargo xtask demo`, `cargo xtask test`, `cargo xtask bench`.
//!
//! Each installs what it needs of Debian's packages, builds what it uses, and says what it does.

mod bench;
mod console;
mod demo;
mod guest;
mod host;
mod tally;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What can go wrong in a chore: one line for a person.
type Result<T> = std::result::Result<T, String>;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Corten's own chores",
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build corten and a Debian guest, and boot it
    Demo(demo::Options),
    /// Check everything: formatting, lints, documentation, all tests
    Test(test::Options),
    /// Measure beside peers and print ratios
    Bench(bench::Options),
    /// Make the guest that the tests boot: a Debian kernel and a small initial RAM disk
    Guest,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().chore {
        Chore::Demo(options) => demo::run(&options),
        Chore::Test(options) => test::run(&options),
        Chore::Bench(options) => bench::run(&options),
        Chore::Guest => guest::test_guest().map(|_| ()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}
