//! The chipset's functions beside QEMU's: which bits a guest can change, and what they are after reset.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;

use device_model::{IoBus, IrqPin, IrqSink, MsiSink};
use pci::{ConfigAccess, Devfn, Fabric, Lpc, Mch, PciBus};

struct Nothing;
impl IrqSink for Nothing {
    fn set_level(&self, _pin: u32, _high: bool) {}
}
impl MsiSink for Nothing {
    fn send(&self, _address: u64, _data: u32) {}
}

/// Runs a list of commands of QEMU's test protocol on a stopped Q35 and returns the answers.
fn ask_qemu(commands: &[String]) -> Option<Vec<u32>> {
    let child = Command::new("qemu-system-x86_64")
        .args("-M q35 -S -m 256 -display none -nodefaults -qtest stdio -qtest-log none".split(' '))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("no qemu-system-x86_64 here: nothing to compare with");
        return None;
    };
    let mut to = child.stdin.take()?;
    let mut lines = BufReader::new(child.stdout.take()?).lines();
    let mut answers = Vec::new();
    for command in commands {
        writeln!(to, "{command}").unwrap();
        let line = lines.next()?.unwrap();
        assert!(line.starts_with("OK"), "{command}: {line}");
        let value = line.split("0x").nth(1).unwrap_or("0");
        answers.push(u64::from_str_radix(value, 16).unwrap() as u32);
    }
    let _ = child.kill();
    let _ = child.wait();
    Some(answers)
}

/// For each register (a bus-0 device and function, an offset and a mask of the bits to compare): its reset value, and what is left of all
/// ones and of all zeros.
fn compare(registers: &[(u8, u16, u32)]) {
    let nothing = Arc::new(Nothing);
    let memory = IoBus::memory();
    let fabric = Fabric {
        ports: IoBus::ports(),
        memory: memory.clone(),
        msi: nothing.clone(),
    };
    let pin = |n: u32| IrqPin::new(nothing.clone(), n);
    let lpc = Lpc::new(
        &std::array::from_fn(|n| pin(n as u32)),
        std::array::from_fn(|n| Some(pin(n as u32))),
        Box::new(|_| {}),
    );
    let wires = lpc.clone();
    let root = PciBus::root(fabric, Arc::new(move |slot, pin| wires.intx(slot, pin)));
    let access = ConfigAccess::new(root.clone());
    let mch = Mch::new(access.clone(), memory);
    let _handles = [
        root.add(Devfn::new(0, 0), mch).unwrap(),
        root.add(Devfn::new(31, 0), lpc).unwrap(),
    ];

    let mut commands = Vec::new();
    for (devfn, offset, _) in registers {
        let address = 0x8000_0000 | u32::from(*devfn) << 8 | u32::from(*offset);
        let select = format!("outl 0xcf8 {address:#x}");
        let read = "inl 0xcfc".to_owned();
        for value in [None, Some(u32::MAX), Some(0)] {
            commands.push(select.clone());
            commands.extend(value.map(|v| format!("outl 0xcfc {v:#x}")));
            commands.push(read.clone());
        }
    }
    let Some(answers) = ask_qemu(&commands) else {
        return;
    };
    let theirs: Vec<u32> = commands
        .iter()
        .zip(answers)
        .filter(|(command, _)| command.starts_with("inl"))
        .map(|(_, answer)| answer)
        .collect();
    let mut differences = Vec::new();
    for ((devfn, offset, mask), theirs) in registers.iter().zip(theirs.chunks(3)) {
        let devfn = Devfn::from_byte(*devfn);
        let read = || {
            let mut data = [0; 4];
            access.read(0, devfn, *offset, &mut data);
            u32::from_le_bytes(data) & mask
        };
        let mut ours = vec![read()];
        for value in [u32::MAX, 0] {
            access.write(0, devfn, *offset, &value.to_le_bytes());
            ours.push(read());
        }
        let theirs: Vec<u32> = theirs.iter().map(|v| v & mask).collect();
        if ours != theirs {
            differences.push(format!(
                "{devfn} {offset:#04x}: ours {ours:08x?}, QEMU's {theirs:08x?}"
            ));
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
}

const HOST_BRIDGE: u8 = 0;
const LPC_BRIDGE: u8 = 0xf8;

#[test]
fn host_bridge() {
    compare(&[
        (HOST_BRIDGE, 0x00, u32::MAX),
        (HOST_BRIDGE, 0x08, 0xffff_ff00),
        (HOST_BRIDGE, 0x0c, 0x00ff_00ff),
        (HOST_BRIDGE, 0x2c, u32::MAX),
        // QEMU lets reserved bits be written here and in the registers below.
        (HOST_BRIDGE, 0x60, 0xfc00_0007),
        (HOST_BRIDGE, 0x64, 0x0f),
        (HOST_BRIDGE, 0x90, 0x3333_3330),
        (HOST_BRIDGE, 0x94, 0x0033_3333),
    ]);
}

#[test]
fn lpc_bridge() {
    compare(&[
        (LPC_BRIDGE, 0x00, u32::MAX),
        (LPC_BRIDGE, 0x08, u32::MAX),
        (LPC_BRIDGE, 0x2c, u32::MAX),
        (LPC_BRIDGE, 0x40, 0xff80),
        (LPC_BRIDGE, 0x44, 0x80),
        (LPC_BRIDGE, 0x60, 0x8f8f_8f8f),
        (LPC_BRIDGE, 0x68, 0x8f8f_8f8f),
        (LPC_BRIDGE, 0xf0, 0xffff_c001),
    ]);
}
