//! Debian's unmodified kernel on the software CPU, with the devices that people use.

mod machine;
mod qmp;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;

use machine::{Machine, guest, guest_with, run_to_end};
use qmp::Qmp;

/// QEMU's TCG gets warnings with two vCPUs and more, about memory type registers and clocks; this machine must not.
#[test]
fn boots_with_no_warning_of_the_kernel_and_powers_off() {
    let script = "uname -a;grep -c ^processor /proc/cpuinfo|sed s/^/CPUS-/;dmesg -r|grep '^<[0-4]>'|sed s/^/WARNING:/";
    for cpus in ["1", "2", "4"] {
        let Some(mut run) = guest("boots_with_no_warning_of_the_kernel", script) else {
            return;
        };
        let text = run_to_end(run.args(["--cpus", cpus]));
        assert!(text.contains("cloud-amd64 #1 SMP"), "{text}");
        assert!(text.contains(&format!("CPUS-{cpus}\n")), "{text}");
        // The list of vCPUs that come up is one line in pieces; what another vCPU says between them makes a piece a line of its
        // own, which has no level then and counts as a warning. It is one under QEMU as well.
        let piece = |line: &str| {
            let rest = line.rsplit_once("] ").map_or("", |(_, rest)| rest).trim();
            rest.strip_prefix('#')
                .is_some_and(|n| n.parse::<u32>().is_ok())
        };
        let warnings = text
            .lines()
            .filter(|l| l.starts_with("WARNING:") && !piece(l));
        let warnings: Vec<&str> = warnings.collect();
        assert!(warnings.is_empty(), "{cpus} vCPUs: {warnings:#?}");
    }
}

#[test]
fn a_named_model_is_what_the_guest_sees() {
    let script = "grep -m5 -E 'vendor|family|model|flags' /proc/cpuinfo;dmesg -r|grep '^<[0-4]>'|sed s/^/WARNING:/";
    for (model, vendor, family, name, has, lacks) in [
        (
            // Without it the kernel calibrates the APIC timer, which a busy host upsets.
            "Opteron_G5,+tsc-deadline",
            "AuthenticAMD",
            "21",
            "AMD Opteron 63xx class CPU",
            " fma ",
            " avx2 ",
        ),
        (
            "Haswell-v4,-avx",
            "GenuineIntel",
            "6",
            "Intel Core Processor (Haswell, no TSX, IBRS)",
            " avx2 ",
            " avx ",
        ),
    ] {
        let Some(mut run) = guest("a_named_model", script) else {
            return;
        };
        let text = run_to_end(run.args(["--cpu", model]));
        let line = |start: &str| {
            let found = text.lines().find(|line| line.starts_with(start));
            found
                .unwrap_or_default()
                .split(": ")
                .nth(1)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        assert_eq!(
            (line("vendor_id"), line("cpu family"), line("model name")),
            (vendor.into(), family.into(), name.into()),
            "{text}"
        );
        let flags = format!(" {} ", line("flags"));
        assert!(
            flags.contains(has) && !flags.contains(lacks),
            "{model}: {flags}"
        );
        assert!(!text.lines().any(|l| l.starts_with("WARNING:")), "{text}");
    }
}

#[test]
fn four_vcpus_come_up_and_work() {
    let script = "echo CPUS=$(nproc);for n in 1 2 3 4;do (i=0;while [ $i -lt 20000 ];do i=$((i- -1));done;echo WORKER-$n)& done;wait";
    let Some(mut run) = guest("four_vcpus_come_up_and_work", script) else {
        return;
    };
    let text = run_to_end(run.args(["--cpus", "4"]));
    assert!(text.contains("CPUS=4"), "{text}");
    for n in 1..=4 {
        assert!(text.contains(&format!("WORKER-{n}")), "{text}");
    }
}

#[test]
fn the_debug_console_takes_what_is_written_to_its_port() {
    let dir = tempfile::tempdir().unwrap();
    let (kernel, log) = (dir.path().join("kernel"), dir.path().join("debug"));
    // mov dx, 402h; in al, dx; out dx, al; mov al, 'x'; out dx, al; mov dx, CF9h; mov al, 0Eh; out dx, al; hlt
    let code = [
        0x66, 0xba, 0x02, 0x04, 0xec, 0xee, 0xb0, b'x', 0xee, 0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x0e,
        0xee, 0xf4,
    ];
    std::fs::write(&kernel, machine::elf_of(&code)).unwrap();
    let Some(mut run) = machine::corten() else {
        println!("skipped: the_debug_console_takes_what_is_written_to_its_port: no binary");
        return;
    };
    run.args(["run", "--accel", "soft", "--memory", "16M", "--no-reboot"]);
    run.args(["--serial", "none", "--kernel"]).arg(&kernel);
    run.arg("--debugcon").arg(format!("file:{}", log.display()));
    let (status, text) = Machine::start(&mut run).wait();
    assert!(status.success(), "{text}");
    assert_eq!(std::fs::read(&log).unwrap(), b"\xe9x", "{text}");
}

/// Serves one page on loopback; returns the port.
fn serve(page: String) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            let mut request = [0; 4096];
            let _ = client.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", page.len());
            let _ = client
                .write_all(head.as_bytes())
                .and_then(|()| client.write_all(page.as_bytes()));
        }
    });
    port
}

#[test]
fn the_user_mode_network_gives_an_address_and_reaches_the_host() {
    let port = serve("a page from the host ".repeat(5000));
    let script = format!(
        "ifconfig eth0 up;udhcpc -i eth0 -n -q -t 20 -s /bin/true;ifconfig eth0 10.0.2.15;wget -q -O - http://10.0.2.2:{port}/|wc -c"
    );
    let Some(mut run) = guest("the_user_mode_network", &script) else {
        return;
    };
    let text = run_to_end(run.args(["--net", "user"]));
    assert!(text.contains("lease of 10.0.2.15 obtained"), "{text}");
    assert!(text.contains("\n105000\n"), "{text}");
}

#[test]
fn a_microvm_has_its_devices_in_memory_space() {
    const NAME: &str = "a_microvm_has_its_devices_in_memory_space";
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("a.raw");
    std::fs::write(&disk, vec![b'x'; 1 << 20]).unwrap();
    let port = serve("a page from the host ".repeat(500));
    let script = format!(
        "ls /sys/bus/pci/devices|wc -l;md5sum /dev/vda;grep -c virtio /proc/interrupts;ifconfig eth0 10.0.2.15 up;wget -q -O - http://10.0.2.2:{port}/|wc -c;head -c 8 /dev/hwrng|wc -c;dmesg -r|grep '^<[0-4]>'|sed s/^/WARNING:/;echo out of the console > /dev/hvc0;seq 1 50000|vsock connect 7000|md5sum;for d in blk net console rng balloon;do ls -d /sys/bus/virtio/drivers/virtio_$d/virtio?;done"
    );
    let (out, socket) = (dir.path().join("console"), dir.path().join("vsock"));
    answer(UnixListener::bind(dir.path().join("vsock_7000")).unwrap());
    let Some(mut run) = guest(NAME, &script) else {
        return;
    };
    run.args([
        "--machine",
        "microvm",
        "--cpus",
        "2",
        "--net",
        "user",
        "--rng",
        "--balloon",
    ]);
    run.arg("--console").arg(format!("file:{}", out.display()));
    run.arg("--vsock")
        .arg(format!("cid=3,path={}", socket.display()));
    let text = run_to_end(
        run.arg("--disk")
            .arg(format!("{},format=raw", disk.display())),
    );
    for wanted in [
        "\n0\n",
        "b561f87202d04959e37588ee05cf5b10  /dev/vda",
        "\n10500\n",
        "\n8\n",
        NUMBERS_HEARD,
        "drivers/virtio_balloon/virtio",
    ] {
        assert!(text.contains(wanted), "{wanted:?}: {text}");
    }
    let said = std::fs::read_to_string(&out).unwrap();
    assert!(said.contains("out of the console"), "{said}");
    // Linux says so of every machine without PCI that it was not built for alone.
    let expected = [
        "PCI: Fatal: No config space access function found",
        "PCI: System does not support PCI",
    ];
    let mut warnings = text.lines().filter(|l| l.starts_with("WARNING:"));
    assert!(
        warnings.all(|line| expected.iter().any(|e| line.contains(e))),
        "{text}"
    );
}

/// What md5sum says of the host's line and the numbers from 1 to 50000.
const NUMBERS_HEARD: &str = "1440b9a3f87417a2e27a1a3690e96950  -";

/// Serves the other end of one connection from the guest: says what it hears, with a line of its own before.
fn answer(listener: UnixListener) {
    std::thread::spawn(move || {
        let (mut guest, _) = listener.accept().unwrap();
        guest.write_all(b"the host hears:\n").unwrap();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = guest.read(&mut buffer) {
            guest.write_all(&buffer[..n]).unwrap();
        }
    });
}

#[test]
fn sockets_lead_from_guest_to_host_and_back() {
    const NAME: &str = "sockets_lead_from_guest_to_host_and_back";
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    answer(UnixListener::bind(dir.path().join("vsock_7000")).unwrap());
    let script = "seq 1 50000|vsock connect 7000|md5sum;echo a line of the guest|vsock listen 52;vsock connect 1 < /dev/null";
    let Some(mut run) = guest(NAME, script) else {
        return;
    };
    let mut machine = Machine::start(
        run.arg("--vsock")
            .arg(format!("cid=3,path={}", socket.display())),
    );
    machine.expect("VSOCK-LISTENS");
    let mut to_guest = BufReader::new(UnixStream::connect(&socket).unwrap());
    to_guest.get_mut().write_all(b"CONNECT 52\n").unwrap();
    let mut line = String::new();
    to_guest.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line}");
    to_guest
        .get_mut()
        .write_all(b"a line of the host\n")
        .unwrap();
    line.clear();
    to_guest.read_line(&mut line).unwrap();
    assert_eq!(line, "a line of the guest\n");
    machine.expect("a line of the host");
    drop(to_guest);
    let (status, text) = machine.wait();
    assert!(status.success(), "{text}");
    assert!(text.contains(NUMBERS_HEARD), "{text}");
    assert!(text.contains("vsock: Connection reset by peer"), "{text}");
}

#[test]
fn split_rings_carry_disks_and_packets() {
    const NAME: &str = "split_rings_carry_disks_and_packets";
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("a.raw");
    std::fs::write(&disk, vec![b'x'; 8 << 20]).unwrap();
    let port = serve("a page from the host ".repeat(5000));
    let script = format!(
        "cat /sys/bus/virtio/devices/virtio0/features;md5sum /dev/vda;seq 1 200000|dd of=/dev/vda bs=64k conv=fsync;head -c 1288895 /dev/vda|md5sum;seq 1 200000|md5sum;ifconfig eth0 10.0.2.15 up;wget -q -O - http://10.0.2.2:{port}/|wc -c"
    );
    for packed in [false, true] {
        std::fs::write(&disk, vec![b'x'; 8 << 20]).unwrap();
        let Some(mut run) = guest(NAME, &script) else {
            return;
        };
        let word = if packed { "on" } else { "off" };
        run.args(["--cpus", "2", "--net", &format!("user,packed={word}")]);
        run.arg("--disk")
            .arg(format!("{},format=raw,packed={word}", disk.display()));
        let text = run_to_end(&mut run);
        let features = text
            .lines()
            .find(|l| l.len() == 64 && l.starts_with(['0', '1']));
        let negotiated = features.unwrap_or_default().as_bytes()[34] == b'1';
        assert_eq!(negotiated, packed, "{text}");
        let sums: Vec<&str> = text.lines().filter(|l| l.ends_with("  -")).collect();
        assert!(sums.len() == 2 && sums[0] == sums[1], "{text}");
        assert!(
            text.contains("2058fb53f643fcd58a8d83a05542392b  /dev/vda"),
            "{text}"
        );
        assert!(text.contains("\n105000\n"), "{text}");
    }
}

#[test]
fn a_tap_of_two_queues_carries_the_guest_to_the_host() {
    const NAME: &str = "a_tap_of_two_queues_carries_the_guest_to_the_host";
    // In a network of its own, which goes with the shell.
    const HOST: &str = "ip link set lo up && ip tuntap add dev tap0 mode tap multi_queue && ip addr add 10.77.0.1/24 dev tap0 \
        && ip link set tap0 up && echo THE-NETWORK-IS-UP || exit 99; cd $0; busybox httpd -f -p 10.77.0.1:80 & server=$!; \"$@\"; status=$?; kill $server; exit $status";
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("page"),
        "a page from the host ".repeat(50_000),
    )
    .unwrap();
    let script = "ifconfig eth0 10.77.0.2 up;ls /sys/class/net/eth0/queues;for n in 1 2 3 4;do (wget -q -O - http://10.77.0.1/page|md5sum)& done;wait;cat /proc/interrupts";
    let Some(mut run) = guest(NAME, script) else {
        return;
    };
    run.args(["--cpus", "2", "--net", "tap,ifname=tap0,queues=2"]);
    let mut shell = std::process::Command::new("unshare");
    shell.args(["--net", "sh", "-c", HOST]).arg(dir.path());
    shell.arg(run.get_program()).args(run.get_args());
    let (status, text) = Machine::start(&mut shell).wait();
    // What the machine itself refuses comes after this, and is a failure.
    if !text.contains("THE-NETWORK-IS-UP") {
        println!("skipped: {NAME}: needs root and /dev/net/tun");
        return;
    }
    assert!(status.success(), "{status} {text}");
    for queue in ["rx-0", "rx-1", "tx-0", "tx-1"] {
        assert!(text.contains(queue), "{queue}: {text}");
    }
    assert_eq!(
        text.matches("39f6d3485829a76f6580d6611d10bff0  -").count(),
        4,
        "{text}"
    );
}

#[test]
fn the_power_button_reaches_the_guest_on_every_board() {
    // A key of any input device; there are others than the button.
    let script = "mkdir /t;for e in /dev/input/event*;do (head -c 1 $e > /t/key;echo PRESSED-$(cat /sys/class/input/${e##*/}/device/name) > /t/name)& done;sleep 1;echo READY-$(ls /dev/input|wc -l);while ! [ -s /t/name ];do sleep 0.1;done;cat /t/name";
    for board in ["q35", "microvm"] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let Some(mut run) = guest("the_power_button", script) else {
            return;
        };
        run.arg("--qmp").arg(format!("unix:{}", socket.display()));
        let mut machine = Machine::start(run.args(["--machine", board]));
        machine.expect("\nREADY-");
        let mut qmp = Qmp::connect(&socket);
        assert!(qmp.say(r#"{"execute":"system_powerdown"}"#)["return"].is_object());
        let (status, text) = machine.wait();
        assert!(status.success(), "{board}: {text}");
        assert!(text.contains("PRESSED-Power Button"), "{board}: {text}");
    }
}

#[test]
fn every_way_to_reset_ends_in_a_reset() {
    for (machine, way) in [
        ("microvm", "acpi"),
        ("microvm", "bios"),
        ("microvm", "triple"),
        ("q35", "acpi"),
        ("q35", "bios"),
        ("q35", "kbd"),
        ("q35", "pci"),
    ] {
        let way_argument = format!("reboot={way}");
        let Some(mut run) = guest_with(
            "every_way_to_reset_ends_in_a_reset",
            "reboot -f",
            &way_argument,
        ) else {
            return;
        };
        let mut machine_run =
            Machine::start(run.args(["--machine", machine]).stderr(Stdio::piped()));
        let said = machine_run.errors();
        let (status, text) = machine_run.wait();
        let said = said.join().unwrap();
        assert!(status.success(), "{machine}, {way}: {said}");
        assert!(
            said.contains("corten: the guest has reset"),
            "{machine}, {way}: {said} {text}"
        );
    }
}

#[test]
fn qmp_stops_continues_and_quits() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let Some(mut run) = guest("qmp_stops_continues_and_quits", "sleep 1000") else {
        return;
    };
    run.arg("--qmp").arg(format!("unix:{}", socket.display()));
    let mut machine = Machine::start(&mut run);
    machine.expect("GUEST-USER-SPACE");
    let mut qmp = BufReader::new(UnixStream::connect(&socket).unwrap());
    let read = |qmp: &mut BufReader<UnixStream>| -> serde_json::Value {
        let mut line = String::new();
        qmp.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    };
    assert!(read(&mut qmp)["QMP"].is_object());
    // The answer to a command and the event that it causes may come in either order.
    let mut say = |command: &str, event: Option<&str>| {
        let text = format!("{{\"execute\":\"{command}\"}}\n");
        qmp.get_mut().write_all(text.as_bytes()).unwrap();
        let (mut answer, mut heard) = (None, event.is_none());
        while answer.is_none() || !heard {
            let message = read(&mut qmp);
            match event {
                Some(name) if message["event"] == name => heard = true,
                _ if message.get("return").is_some() => answer = Some(message["return"].clone()),
                _ => panic!("{command}: {message}"),
            }
        }
        answer.unwrap()
    };
    say("qmp_capabilities", None);
    assert_eq!(say("query-status", None)["status"], "running");
    say("stop", Some("STOP"));
    assert_eq!(say("query-status", None)["status"], "paused");
    say("cont", Some("RESUME"));
    assert_eq!(say("query-status", None)["running"], true);
    say("quit", Some("SHUTDOWN"));
    let (status, _) = machine.wait();
    assert!(status.success());
}

/// A guest is counted while it works and while it stands.
#[test]
fn qmp_tells_what_the_vcpus_have_done() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let script = "while :;do :;done";
    let Some(mut run) = guest("qmp_tells_what_the_vcpus_have_done", script) else {
        return;
    };
    run.args(["--cpus", "3"]);
    run.arg("--qmp").arg(format!("unix:{}", socket.display()));
    let mut machine = Machine::start(&mut run);
    machine.expect("GUEST-USER-SPACE");
    let mut qmp = Qmp::connect(&socket);
    let mut ask = |target: &str| {
        let arguments = serde_json::json!({ "target": target });
        let request = serde_json::json!({ "execute": "query-stats", "arguments": arguments });
        qmp.say(&request.to_string())["return"].clone()
    };
    let get = |one: &serde_json::Value, name: &str| {
        let stats = one["stats"].as_array().expect("figures");
        let found = stats.iter().find(|s| s["name"] == name);
        found.and_then(|s| s["value"].as_u64()).expect("a number")
    };
    let vcpus = ask("vcpu");
    assert_eq!(vcpus.as_array().unwrap().len(), 3);
    assert_eq!(vcpus[1]["qom-path"], "/machine/cpu[1]");
    let first = ask("vm");
    // The bounds are of what any boot does.
    for (name, least) in [
        ("instructions", 10_000_000),
        ("page-walks", 1000),
        ("device-accesses", 1000),
        ("device-time", 1000),
        ("running-time", 1_000_000),
        ("interrupts", 10),
        ("translated-blocks", 1000),
        ("translation-time", 1000),
        ("code-cache-used", 10_000),
        ("exits-unlinked", 100),
        ("exits-fault", 1),
    ] {
        assert!(get(&first[0], name) >= least, "{name}: {first}");
    }
    assert_eq!((get(&first[0], "code-cache-size") / 3) >> 20, 64);
    // A vCPU that never comes out of the guest's code by itself is asked too.
    let mut more = ask("vm");
    for _ in 0..1000 {
        if get(&more[0], "instructions") > get(&first[0], "instructions") {
            break;
        }
        more = ask("vm");
    }
    assert!(get(&more[0], "instructions") > get(&first[0], "instructions"));
    assert!(qmp.say(r#"{"execute":"stop"}"#)["return"].is_object());
    let mut still = || qmp.say(r#"{"execute":"query-stats","arguments":{"target":"vm"}}"#);
    assert_eq!(still(), still());
    assert!(qmp.say(r#"{"execute":"quit"}"#)["return"].is_object());
    assert!(machine.wait().0.success());
}

/// As many vCPUs as a machine may have: APIC IDs above 254 need x2APICs, and tables that name them.
#[test]
fn two_hundred_and_eighty_eight_vcpus_come_up() {
    let script = "echo CPUS=$(nproc);grep 'apicid.*: 287' /proc/cpuinfo;dmesg -r|grep '^<[0-3]>'|sed s/^/WARNING:/";
    let Some(mut run) = guest("two_hundred_and_eighty_eight_vcpus_come_up", script) else {
        return;
    };
    let text = run_to_end(run.args(["--cpus", "288"]));
    assert!(text.contains("CPUS=288"), "{text}");
    assert!(text.contains(": 287"), "{text}");
    assert!(!text.lines().any(|l| l.starts_with("WARNING:")), "{text}");
}

#[test]
fn the_balloon_takes_memory_and_gives_it_back() {
    const NAME: &str = "the_balloon_takes_memory_and_gives_it_back";
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    // The guest goes on once its memory has shrunk by all of 128 MiB, and then once it is back.
    let script = "t(){ while read a b c;do case $a in MemTotal:) m=$b;;esac;done < /proc/meminfo; };t;o=$m;echo READY-$o;while t;[ $m -gt $((o-131072)) ];do sleep 0.1;done;echo SMALL-$((o-m));while t;[ $m -lt $o ];do sleep 0.1;done";
    let Some(mut run) = guest(NAME, script) else {
        return;
    };
    run.arg("--qmp").arg(format!("unix:{}", socket.display()));
    let mut machine = Machine::start(run.arg("--balloon"));
    machine.expect("READY-4");
    let mut qmp = Qmp::connect(&socket);
    let actual =
        |qmp: &mut Qmp| qmp.say(r#"{"execute":"query-balloon"}"#)["return"]["actual"].as_u64();
    assert_eq!(actual(&mut qmp), Some(512 << 20));
    let less = r#"{"execute":"balloon","arguments":{"value":402653184}}"#;
    assert!(qmp.say(less)["return"].is_object());
    machine.expect("SMALL-131072");
    while qmp.hear("BALLOON_CHANGE")["actual"] != 402_653_184 {}
    assert_eq!(actual(&mut qmp), Some(384 << 20));
    let all = r#"{"execute":"balloon","arguments":{"value":536870912}}"#;
    assert!(qmp.say(all)["return"].is_object());
    let (status, text) = machine.wait();
    assert!(status.success() && text.contains("GUEST-DONE"), "{text}");
}

#[test]
fn a_cable_can_be_pulled() {
    const NAME: &str = "a_cable_can_be_pulled";
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let script = "ifconfig eth0 up;c(){ while [ $(cat /sys/class/net/eth0/carrier) != $1 ];do sleep 0.1;done;echo CARRIER-$1; };c 1;c 0;c 1";
    let Some(mut run) = guest(NAME, script) else {
        return;
    };
    run.arg("--qmp").arg(format!("unix:{}", socket.display()));
    let mut machine = Machine::start(run.args(["--net", "user"]));
    machine.expect("CARRIER-1");
    let mut qmp = Qmp::connect(&socket);
    let link = |name: &str, up: bool| {
        format!(r#"{{"execute":"set_link","arguments":{{"name":"{name}","up":{up}}}}}"#)
    };
    assert!(qmp.say(&link("net0", false))["return"].is_object());
    machine.expect("CARRIER-0");
    assert!(qmp.say(&link("net0", true))["return"].is_object());
    let wrong = qmp.say(&link("net7", true));
    assert_eq!(wrong["error"]["class"], "DeviceNotFound", "{wrong}");
    let none = qmp.say(r#"{"execute":"query-balloon"}"#);
    assert_eq!(none["error"]["class"], "DeviceNotActive", "{none}");
    let (status, text) = machine.wait();
    assert!(status.success() && text.contains("GUEST-DONE"), "{text}");
}

#[test]
fn a_panic_with_no_reboot_ends_with_a_line_that_says_so() {
    let script = "echo c > /proc/sysrq-trigger";
    let Some(mut run) = guest("a_panic_with_no_reboot", script) else {
        return;
    };
    let output = run.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(text.contains("Kernel panic - not syncing"), "{text}");
    assert!(said.contains("corten: the guest has reset"), "{said}");
}
