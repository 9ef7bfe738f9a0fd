//! Debian's installer, unmodified, as its package has it.

mod machine;

use machine::Machine;

/// What the screen shows, without the sequences that place and colour it.
///
/// `ESC [ parameters letter` and `ESC ( letter` are all that the installer's terminal, a `vt102`, is sent.
fn plain(text: &str) -> String {
    let (mut shown, mut rest) = (String::new(), text.chars());
    while let Some(c) = rest.next() {
        if c != '\u{1b}' {
            shown.push(c);
        } else if rest.next() == Some('[') {
            rest.find(char::is_ascii_alphabetic);
        } else {
            rest.next();
        }
    }
    shown
}

#[test]
fn the_installer_asks_for_the_language_and_goes_on() {
    const NAME: &str = "the_installer_asks_for_the_language_and_goes_on";
    let file = |name: &str| std::env::var_os(name);
    let (Some(kernel), Some(initrd), Some(mut run)) = (
        file("CORTEN_TEST_INSTALLER_KERNEL"),
        file("CORTEN_TEST_INSTALLER_INITRD"),
        machine::corten(),
    ) else {
        println!("skipped: {NAME}: needs the installer and the binary that 'cargo xtask test' has");
        return;
    };
    run.args(["run", "--accel", "soft", "--memory", "1G", "--no-reboot"]);
    run.args(["--serial", "stdio", "--append", "console=ttyS0"]);
    let cache = concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels");
    run.args(["--kernel-cache", cache]);
    run.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    let mut installer = Machine::start(&mut run);
    installer.expect("Select a language");
    // The last line of a screen tells what the keys do.
    installer.expect("activates buttons");
    let screen = plain(installer.shown());
    for wanted in [
        "Choose the language to be used for the installation",
        "English",
        "<Go Back>",
    ] {
        assert!(screen.contains(wanted), "{screen}");
    }
    installer.send("\r");
    installer.expect("Select your location");
    installer.expect("United States");
}
