//! Counting tests as `cargo test` tells of them, so that what was skipped shows.
//!
//! A test that lacks something of the machine prints a line `skipped: WHY` and passes; here it counts as skipped. So does one that the
//! harness reports as ignored.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::Command;

use crate::{Result, host};

/// A test program whose tests are listed one by one: the listing is what it is for.
const LISTED: &str = "conformance";

/// Why a test is skipped that the harness did not run.
const IGNORED: &str = "not run here";

/// Where in a test program's output a line stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    /// The list of tests, or cargo's own messages.
    List,
    /// What tests that passed have printed.
    Passed,
    /// What tests that failed have printed.
    Failed,
}

/// The count so far.
pub(crate) struct Tally {
    passed: usize,
    failed: usize,
    /// Why, by name.
    skipped: BTreeMap<String, String>,
    /// The test program that runs.
    program: String,
    /// The test whose output is being read.
    test: String,
    section: Section,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            passed: 0,
            failed: 0,
            skipped: BTreeMap::new(),
            program: String::new(),
            test: String::new(),
            section: Section::List,
        }
    }

    /// Takes a line of output; returns whether people should see it.
    fn take(&mut self, line: &str) -> bool {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.add(result);
            self.section = Section::List;
            return false;
        }
        match line {
            "successes:" => self.section = Section::Passed,
            "failures:" => self.section = Section::Failed,
            _ => return self.take_in_section(line),
        }
        self.section == Section::Failed
    }

    fn take_in_section(&mut self, line: &str) -> bool {
        match self.section {
            Section::List => self.take_from_list(line),
            Section::Failed => true,
            Section::Passed => {
                if let Some(heading) = line.strip_prefix("---- ") {
                    heading
                        .trim_end_matches(" ----")
                        .trim_end_matches(" stdout")
                        .clone_into(&mut self.test);
                } else if let Some(why) = line.strip_prefix("skipped: ") {
                    let test = self.test.clone();
                    self.skip(&test, why);
                }
                false
            }
        }
    }

    fn take_from_list(&mut self, line: &str) -> bool {
        let trimmed = line.trim_start();
        if let Some(program) = trimmed
            .strip_prefix("Running ")
            .or_else(|| trimmed.strip_prefix("Doc-tests "))
        {
            program.clone_into(&mut self.program);
            return true;
        }
        let Some(test) = line.strip_prefix("test ") else {
            let noise = line.is_empty() || line.starts_with("running ");
            return !noise;
        };
        if let Some((name, "ignored")) = test.rsplit_once(" ... ") {
            self.skip(name, IGNORED);
        }
        self.program.contains(LISTED) || test.ends_with("FAILED")
    }

    fn skip(&mut self, test: &str, why: &str) {
        let name = format!("{}: {}", short_name(&self.program), test.trim());
        self.skipped.entry(name).or_insert_with(|| why.to_owned());
    }

    /// Adds `ok. 3 passed; 0 failed; ...`.
    fn add(&mut self, result: &str) {
        for part in result.split([';', '.']) {
            match part.trim().split_once(' ') {
                Some((n, "passed")) => self.passed += n.parse::<usize>().unwrap_or(0),
                Some((n, "failed")) => self.failed += n.parse::<usize>().unwrap_or(0),
                _ => {}
            }
        }
    }

    /// Tests that printed why they were skipped have also passed; those that were ignored have not.
    fn passed_and_not_skipped(&self) -> usize {
        let pretended = self.skipped.values().filter(|why| *why != IGNORED);
        self.passed - pretended.count().min(self.passed)
    }

    /// Runs `cargo test` and counts; what it prints is shown but for the output of tests that passed.
    pub(crate) fn run(&mut self, command: &mut Command) -> Result<()> {
        let text = host::line(command);
        eprintln!("+ {text}");
        let failed = |e: std::io::Error| format!("{text}: {e}");
        let (from, to) = std::io::pipe().map_err(failed)?;
        let errors = to.try_clone().map_err(failed)?;
        let mut child = command.stdout(to).stderr(errors).spawn().map_err(failed)?;
        // The command keeps ends of the pipe of its own, which would keep it open.
        command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        for line in BufReader::new(from).split(b'\n') {
            let line = line.map_err(failed)?;
            let line = String::from_utf8_lossy(&line);
            if self.take(&line) {
                eprintln!("{line}");
            }
        }
        let status = child.wait().map_err(failed)?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("{text}: {status}"))
        }
    }

    /// Names what was skipped, and why; then the closing line.
    pub(crate) fn report(&self) {
        for (name, why) in &self.skipped {
            eprintln!("skipped: {name}: {why}");
        }
        eprintln!(
            "{} passed, {} failed, {} skipped",
            self.passed_and_not_skipped(),
            self.failed,
            self.skipped.len()
        );
    }

    /// Tests of KVM that were skipped.
    pub(crate) fn skipped_for_kvm(&self) -> impl Iterator<Item = &str> {
        let names = self.skipped.keys().map(String::as_str);
        names.filter(|name| name.contains("kvm"))
    }
}

/// `unittests src/lib.rs (target/debug/deps/qmp-0123)` is `qmp`; other programs go by their source.
fn short_name(program: &str) -> &str {
    let (source, binary) = program.split_once(" (").unwrap_or((program, ""));
    let crate_name = binary
        .rsplit('/')
        .next()
        .and_then(|file| file.rsplit_once('-'))
        .map(|(name, _)| name);
    match crate_name {
        Some(name) if source.starts_with("unittests ") => name,
        _ => source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "   Compiling a v0.1.0
     Running unittests src/lib.rs (target/debug/deps/a-1)

running 3 tests
test one ... ok
test two ... ok
test three ... FAILED

successes:

---- one stdout ----
skipped: needs a thing
skipped: and another

successes:
    one
    two

failures:

---- three stdout ----
skipped: is what a failed test printed

failures:
    three

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s

     Running tests/conformance.rs (target/debug/deps/conformance-1)

running 2 tests
test kvm::a           ... ignored
test soft::a [limited] ... ok

test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn counts_what_passed_failed_and_was_skipped() {
        let mut tally = Tally::new();
        let shown: Vec<&str> = OUTPUT.lines().filter(|line| tally.take(line)).collect();
        assert_eq!((tally.passed_and_not_skipped(), tally.failed), (2, 1));
        let skipped: Vec<(&str, &str)> = tally
            .skipped
            .iter()
            .map(|(name, why)| (name.as_str(), why.as_str()))
            .collect();
        assert_eq!(
            skipped,
            [
                ("a: one", "needs a thing"),
                ("tests/conformance.rs: kvm::a", "not run here"),
            ]
        );
        assert_eq!(tally.skipped_for_kvm().count(), 1);
        assert!(shown.contains(&"test three ... FAILED"));
        assert!(shown.contains(&"skipped: is what a failed test printed"));
        assert!(shown.contains(&"test soft::a [limited] ... ok"));
        assert!(!shown.contains(&"test one ... ok"));
        assert!(!shown.contains(&"skipped: needs a thing"));
    }
}
