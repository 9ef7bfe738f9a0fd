//! IN and OUT.

use x86_defs::state::{RAX, RDX};

use crate::cpu::{Cpu, Op, Result, Value, gpr};

/// A port read that is allowed; all ones when no machine is there.
pub(crate) fn read_port<T: Value>(cpu: &mut Cpu, port: u16) -> T {
    let mut bytes = [0xff; 8];
    let data = &mut bytes[..size_of::<T>()];
    cpu.outside(|io| io.port_read(port, data));
    T::from_bytes(&bytes)
}

/// A port write that is allowed.
pub(crate) fn write_port<T: Value>(cpu: &mut Cpu, port: u16, value: T) {
    let mut bytes = [0; 8];
    value.to_bytes(&mut bytes);
    cpu.outside(|io| io.port_write(port, &bytes[..size_of::<T>()]));
}

fn port_of<const IMMEDIATE: bool>(cpu: &Cpu, op: &Op) -> u16 {
    if IMMEDIATE {
        op.imm as u16 & 0xff
    } else {
        cpu.regs[RDX] as u16
    }
}

/// IN.
pub(crate) fn input<T: Value, const IMMEDIATE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let port = port_of::<IMMEDIATE>(cpu, op);
    cpu.check_port(port, size_of::<T>() as u64)?;
    let value: T = read_port(cpu, port);
    cpu.regs.set(gpr(RAX), value);
    Ok(())
}

/// OUT.
pub(crate) fn output<T: Value, const IMMEDIATE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let port = port_of::<IMMEDIATE>(cpu, op);
    cpu.check_port(port, size_of::<T>() as u64)?;
    write_port(cpu, port, T::from_u64(cpu.regs[RAX]));
    Ok(())
}
