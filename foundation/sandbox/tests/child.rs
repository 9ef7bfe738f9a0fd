//! A confined child answers, and can do nothing else. In one thread, as the child is a fork.

use std::fs::File;
use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::process::Command;

fn refuse(_: &[u8]) -> (Vec<u8>, Option<OwnedFd>) {
    (Vec::new(), None)
}

fn kind<T>(result: io::Result<T>) -> String {
    result.map_or_else(|e| format!("{:?}", e.kind()), |_| "done".into())
}

/// What the child may not do; each line of the result is what one attempt brought.
fn attempts() -> Vec<u8> {
    let results = [
        kind(File::open("/etc/passwd")),
        kind(File::create("/tmp/sandbox_was_here")),
        kind(std::fs::read_dir("/")),
        kind(std::fs::metadata("/etc")),
        kind(TcpStream::connect("127.0.0.1:1")),
        kind(Command::new("/bin/true").spawn()),
        kind(std::thread::Builder::new().spawn(|| ())),
        kind(map_code()),
    ];
    results.join("\n").into_bytes()
}

/// Asks for memory that runs.
fn map_code() -> io::Result<()> {
    // SAFETY: a new mapping, of which nothing is used.
    #[allow(unsafe_code)]
    let address = unsafe {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0)
    };
    match address {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn asks_and_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "what is in the file").unwrap();
    let mut questions = Vec::new();
    let result = sandbox::run(
        |parent| {
            let (answer, descriptor) = parent.ask(b"the file").unwrap();
            let mut file = File::from(descriptor.unwrap());
            let mut text = String::from_utf8(answer).unwrap();
            file.read_to_string(&mut text).unwrap();
            assert!(parent.ask(b"another").unwrap().1.is_none());
            text.into_bytes()
        },
        |question| {
            questions.push(question.to_vec());
            let file = File::open(&path).unwrap();
            match question {
                b"the file" => (b"here is ".to_vec(), Some(file.into())),
                _ => (b"no".to_vec(), None),
            }
        },
    );
    assert_eq!(result.unwrap(), b"here is what is in the file");
    assert_eq!(questions, [&b"the file"[..], b"another"]);
}

fn can_do_nothing() {
    let result = sandbox::run(|_| attempts(), refuse).unwrap();
    let text = String::from_utf8(result).unwrap();
    for line in text.lines() {
        assert_eq!(line, "PermissionDenied", "{text}");
    }
    assert_eq!(text.lines().count(), 8);
}

/// Reads where nothing is.
fn fault() -> Vec<u8> {
    // SAFETY: not at all; the fault is what is asked for, in a process of its own.
    #[allow(unsafe_code)]
    let byte = unsafe { std::ptr::without_provenance::<u8>(8).read_volatile() };
    vec![byte]
}

fn long_results_come_whole() {
    let long: Vec<u8> = (0..5_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    assert_eq!(sandbox::run(|_| long.clone(), refuse).unwrap(), long);
}

fn ends_are_told() {
    let panicked = sandbox::run(|_| panic!("no"), refuse).unwrap_err();
    assert!(panicked.to_string().contains("without a result"));
    let killed = sandbox::run(|_| std::process::abort(), refuse).unwrap_err();
    assert!(killed.to_string().contains("signal 6"), "{killed}");
    let fault = sandbox::run(|_| fault(), refuse).unwrap_err();
    assert!(fault.to_string().contains("signal 11"), "{fault}");
    let lost = sandbox::run(|_| vec![0; sandbox::MAX_MESSAGE + 1], refuse).unwrap_err();
    assert!(lost.to_string().contains("without a result"));
}

fn main() {
    let mut arguments = libtest_mimic::Arguments::from_args();
    arguments.test_threads = Some(1);
    let tests: [(&str, fn()); 4] = [
        ("asks_and_answers", asks_and_answers),
        ("can_do_nothing", can_do_nothing),
        ("long_results_come_whole", long_results_come_whole),
        ("ends_are_told", ends_are_told),
    ];
    let trial = |(name, test): (&str, fn())| {
        libtest_mimic::Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    let tests = tests.into_iter().map(trial).collect();
    libtest_mimic::run(&arguments, tests).exit();
}
