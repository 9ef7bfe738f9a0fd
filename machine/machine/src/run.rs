//! A machine from its specification to its end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use accel::{Accel, CpuIo, Vcpu, VcpuConfig, VmConfig};
use block::ThrottleLimits;
use device_model::{PowerEvent, ResetKind};
use guest_clock::GuestClock;
use guest_memory::{BackingOptions, GuestMemory};
use qmp::{BlockCall, Control, DiskReport, Event, IoErrorAction, JobReport, RunState, Server};
use virtio::blk::{ErrorAction, IoFailure};
use vm_spec::VmSpec;

use crate::MachineError;
use crate::board::{self, Base, Board, Controls, Peripherals};
use crate::cpu_model::CpuModel;
use crate::event_rate::EventRate;
use crate::firmware::{AcpiConfig, SmbiosConfig, write_acpi, write_reset_vector, write_smbios};
use crate::io::Buses;
use crate::lifecycle::{Lifecycle, Request};
use crate::loader::{BootInfo, Entry, KernelCache, LoadError, PreparedKernel};
use crate::memory_map::MemoryMap;
use crate::processor;
use crate::signals;
use crate::statistics;

/// How a machine is run; nothing that the guest can see.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Unix socket for QMP clients.
    pub qmp: Option<PathBuf>,
    /// File for the process ID.
    pub pidfile: Option<PathBuf>,
    /// Wait for QMP's `cont` before the guest runs.
    pub paused: bool,
    /// Folder in which decompressed kernels are kept; without one they are decompressed each time.
    pub kernel_cache: Option<PathBuf>,
    /// Say on standard error when the guest's first instruction runs.
    pub announce_start: bool,
    /// Say on standard error at the end what the vCPUs have done.
    pub statistics: bool,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// A person ended it.
    Quit,
    /// The guest reset or crashed and was not to be booted again; the text says which.
    Ended(String),
}

/// Smallest and largest guest memory, in bytes.
const MIN_MEMORY: u64 = 2 << 20;
const MAX_MEMORY: u64 = 1 << 40;
/// How long output may take to reach the host at the end.
const DRAIN: Duration = Duration::from_secs(2);

/// A machine that has been built.
struct Machine {
    spec: VmSpec,
    base: Base,
    board: Box<dyn Board>,
    controls: Controls,
    lifecycle: Arc<Lifecycle>,
    threads: Vec<JoinHandle<()>>,
    requests: Receiver<Request>,
    sender: Sender<Request>,
    paused: bool,
    balloon_rate: EventRate,
    cache: Option<KernelCache>,
}

/// A kernel that is read while the machine is built.
type Reading = JoinHandle<Result<PreparedKernel, LoadError>>;

fn read_kernel(spec: &VmSpec, cache: Option<&KernelCache>) -> Result<Reading, MachineError> {
    let Some(kernel) = &spec.kernel else {
        let text = "--kernel: needed, as there is no firmware to boot from a disk yet";
        return Err(MachineError::Spec(text.into()));
    };
    let (path, cache) = (kernel.kernel.clone(), cache.cloned());
    std::thread::Builder::new()
        .name("kernel".into())
        .spawn(move || PreparedKernel::read(&path, cache.as_ref()))
        .map_err(|e| MachineError::host("a thread that reads the kernel", e))
}

/// Builds a machine and runs it to its end.
///
/// # Errors
/// When it can't be built, or the guest can't go on.
pub fn run(spec: &VmSpec, options: &RunOptions) -> Result<Outcome, MachineError> {
    raise_file_limit();
    let result = build_and_live(spec, options);
    char_backends::terminal::restore();
    if let Some(path) = &options.pidfile {
        let _ = std::fs::remove_file(path);
    }
    result
}

fn build_and_live(spec: &VmSpec, options: &RunOptions) -> Result<Outcome, MachineError> {
    check_memory(spec.memory.size)?;
    let cache = options.kernel_cache.clone().map(KernelCache::new);
    let kernel = read_kernel(spec, cache.as_ref())?;
    let machine = Machine::build(spec, cache)?;
    if options.announce_start {
        machine.lifecycle.announce_start();
    }
    signals::serve(machine.sender.clone())?;
    machine.live(kernel, options)
}

/// Connections of the user-mode network take a descriptor each.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
}

fn host_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib << 10)
}

fn check_memory(size: u64) -> Result<(), MachineError> {
    let refuse = |text: String| Err(MachineError::Spec(format!("--memory: {text}")));
    let shown = vm_spec::format_size(size);
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) || !size.is_multiple_of(guest_memory::PAGE_SIZE) {
        return refuse(format!(
            "{shown}: expected 2 MiB to 1 TiB, in pages of 4 KiB"
        ));
    }
    let host = host_memory();
    if size > host {
        return refuse(format!(
            "{shown}: the host has {}",
            vm_spec::format_size(host)
        ));
    }
    Ok(())
}

/// Says in one line what of the CPU model the guest goes without.
fn tell_missing(spec: &VmSpec, model: &CpuModel) {
    let missing = model.missing();
    if !missing.is_empty() {
        let name = &spec.cpu.model;
        eprintln!(
            "corten: --cpu {name}: this processor has no {}; the guest goes without",
            missing.join(", ")
        );
    }
}

impl Machine {
    fn build(spec: &VmSpec, cache: Option<KernelCache>) -> Result<Self, MachineError> {
        let accel = processor::choose(spec)?;
        let model = CpuModel::new(&spec.cpu, accel.supported_cpuid()?, spec.cpus)?;
        tell_missing(spec, &model);
        let clock = GuestClock::new();
        let memory = GuestMemory::new();
        let map = MemoryMap::new(spec.memory.size, board::has_pci(spec.machine));
        let backing = BackingOptions {
            shared: false,
            huge_pages: spec.memory.huge_pages,
            mergeable: spec.memory.mergeable,
        };
        map.allocate(&memory, backing)?;
        let config = VmConfig {
            memory: memory.clone(),
            clock: clock.clone(),
            max_vcpus: spec.cpus,
        };
        let vm = accel.create_vm(config)?;
        let (sender, requests) = channel();
        let lifecycle = Lifecycle::new(clock.clone(), sender.clone());
        let base = Base {
            vm,
            memory,
            clock,
            power: lifecycle.clone(),
            map,
        };
        let mut board = board::build(&base, spec)?;
        let mut controls = Controls::default();
        Peripherals {
            base: &base,
            board: &mut *board,
            lifecycle: &lifecycle,
            controls: &mut controls,
        }
        .add(spec)?;
        let mut machine = Self {
            spec: spec.clone(),
            base,
            board,
            controls,
            lifecycle,
            threads: Vec::new(),
            requests,
            sender,
            paused: false,
            balloon_rate: EventRate::default(),
            cache,
        };
        let vcpus = machine.vcpus(&*accel, &model)?;
        let io: Arc<dyn CpuIo> = Arc::new(Buses {
            ports: machine.board.ports(),
            memory: machine.board.memory(),
            controllers: machine.board.controllers(),
        });
        machine.threads = machine
            .lifecycle
            .start(vcpus, &io)
            .map_err(|e| MachineError::host("a vCPU's thread", e))?;
        Ok(machine)
    }

    fn vcpus(
        &self,
        accel: &dyn Accel,
        model: &CpuModel,
    ) -> Result<Vec<Box<dyn Vcpu>>, MachineError> {
        let tsc_khz = accel.tsc_khz();
        let make = |apic_id| {
            let cpuid = model.table(apic_id);
            Ok(self.base.vm.create_vcpu(VcpuConfig {
                apic_id,
                cpuid,
                tsc_khz,
            })?)
        };
        (0..self.spec.cpus).map(make).collect()
    }

    /// Writes firmware tables and the kernel into fresh memory.
    fn load(&self, kernel: &PreparedKernel) -> Result<Option<Entry>, MachineError> {
        let apic_ids: Vec<u32> = (0..self.spec.cpus).collect();
        let acpi = AcpiConfig {
            apic_ids: &apic_ids,
            ram: &self.base.map.ram(),
            serial_ports: &self.board.serial_ports(),
            platform: self.board.platform(),
        };
        let rsdp = write_acpi(&self.base.memory, &acpi)?;
        let smbios = SmbiosConfig {
            uuid: self.spec.uuid,
            cpus: self.spec.cpus,
            memory: self.spec.memory.size,
        };
        write_smbios(&self.base.memory, &smbios)?;
        write_reset_vector(&self.base.memory)?;
        self.board.set_up_for_kernel()?;
        let Some(given) = &self.spec.kernel else {
            return Ok(None);
        };
        let info = BootInfo {
            append: &given.append,
            initrd: given.initrd.as_deref(),
            map: &self.base.map,
            rsdp,
        };
        Ok(Some(kernel.load(&self.base.memory, &info)?))
    }

    /// Runs the machine to its end.
    fn live(mut self, kernel: Reading, options: &RunOptions) -> Result<Outcome, MachineError> {
        let kernel = finish(kernel)?;
        let entry = self.load(&kernel)?;
        self.lifecycle.reset(entry);
        let control = Arc::new(QmpControl {
            requests: self.sender.clone(),
            lifecycle: self.lifecycle.clone(),
            controls: self.controls.clone(),
            memory: self.spec.memory.size,
        });
        let qmp = options
            .qmp
            .as_deref()
            .map(|path| Server::listen(path, control))
            .transpose()?;
        if let Some(path) = &options.pidfile {
            let text = format!("{}\n", std::process::id());
            std::fs::write(path, text)
                .map_err(|e| MachineError::host(format!("--pidfile {}", path.display()), e))?;
        }
        self.paused = options.paused;
        if !self.paused {
            self.lifecycle.run();
        }
        kernel.keep();
        let result = self.serve(qmp.as_ref());
        self.lifecycle.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.controls.disks.end_jobs();
        self.board.drain(DRAIN);
        if options.statistics {
            let lines = statistics::report(&self.lifecycle.statistics(), self.lifecycle.elapsed());
            lines.iter().for_each(|line| eprintln!("corten: {line}"));
        }
        result
    }

    /// Takes requests until one ends the machine.
    fn serve(&mut self, qmp: Option<&Server>) -> Result<Outcome, MachineError> {
        let tell = |event: Event| {
            if let Some(server) = qmp {
                server.event(&event);
            }
        };
        let mut terminating = false;
        loop {
            let Some(request) = self.next_request() else {
                return Ok(Outcome::Quit);
            };
            match request {
                Request::Power(PowerEvent::Shutdown(_)) => {
                    tell(Event::Shutdown {
                        guest: true,
                        reason: "guest-shutdown",
                    });
                    return Ok(Outcome::PoweredOff);
                }
                Request::Power(PowerEvent::Reset(_)) => {
                    if let Some(outcome) = self.guest_reset("the guest has reset", &tell)? {
                        return Ok(outcome);
                    }
                }
                Request::TripleFault => {
                    let why = "the guest has reset by a triple fault";
                    if let Some(outcome) = self.guest_reset(why, &tell)? {
                        return Ok(outcome);
                    }
                }
                Request::Power(PowerEvent::Panic(_)) => tell(Event::GuestPanicked),
                Request::Power(PowerEvent::Suspend | PowerEvent::Wake(_)) => {}
                Request::Failed(why) => {
                    tell(Event::Stop);
                    return Err(MachineError::Guest(why));
                }
                Request::Stop(done) => {
                    if !self.paused {
                        self.lifecycle.park();
                        self.paused = true;
                        tell(Event::Stop);
                    }
                    let _ = done.send(());
                }
                Request::DiskFailed { device, failure } => {
                    let stops = failure.action == ErrorAction::Stop;
                    tell(io_error(device, failure));
                    if stops && !self.paused {
                        self.lifecycle.park();
                        self.paused = true;
                        self.controls.io_error.store(true, Ordering::SeqCst);
                        tell(Event::Stop);
                    }
                }
                Request::Job { report, event } => tell(Event::Job { report, event }),
                Request::Continue => {
                    if self.paused {
                        self.paused = false;
                        self.controls.io_error.store(false, Ordering::SeqCst);
                        self.controls.disks.retry();
                        self.lifecycle.run();
                        tell(Event::Resume);
                    }
                }
                Request::Reset => {
                    self.reset()?;
                    tell(Event::Reset {
                        guest: false,
                        reason: "host-qmp-system-reset",
                    });
                }
                Request::BalloonChanged if !self.balloon_rate.admit(Instant::now()) => {}
                Request::BalloonChanged => {
                    // First, so that a change from now on is told again.
                    self.controls.balloon_pending.store(false, Ordering::SeqCst);
                    if let Some(balloon) = &self.controls.balloon {
                        let actual = self.spec.memory.size.saturating_sub(balloon.actual());
                        tell(Event::BalloonChange { actual });
                    }
                }
                Request::PowerButton => {
                    tell(Event::Powerdown);
                    self.board.press_power_button();
                }
                Request::Terminate if !terminating => {
                    terminating = true;
                    tell(Event::Powerdown);
                    self.board.press_power_button();
                }
                Request::Terminate => {
                    tell(Event::Shutdown {
                        guest: false,
                        reason: "host-signal",
                    });
                    return Ok(Outcome::Quit);
                }
                Request::Quit => {
                    tell(Event::Shutdown {
                        guest: false,
                        reason: "host-qmp-quit",
                    });
                    return Ok(Outcome::Quit);
                }
            }
        }
    }

    /// The next request; `None` when nobody is left to ask.
    fn next_request(&self) -> Option<Request> {
        let Some(due) = self.balloon_rate.due() else {
            return self.requests.recv().ok();
        };
        let left = due.saturating_duration_since(Instant::now());
        match self.requests.recv_timeout(left) {
            Ok(request) => Some(request),
            Err(RecvTimeoutError::Timeout) => Some(Request::BalloonChanged),
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }

    fn guest_reset(
        &mut self,
        why: &str,
        tell: &impl Fn(Event),
    ) -> Result<Option<Outcome>, MachineError> {
        if self.spec.no_reboot {
            tell(Event::Shutdown {
                guest: true,
                reason: "guest-reset",
            });
            return Ok(Some(Outcome::Ended(why.into())));
        }
        self.reset()?;
        tell(Event::Reset {
            guest: true,
            reason: "guest-reset",
        });
        Ok(None)
    }

    /// Resets the machine and boots it again.
    fn reset(&mut self) -> Result<(), MachineError> {
        self.lifecycle.park();
        self.board.reset(ResetKind::Cold);
        // A kernel that is loaded without firmware relies on memory that is zero where it has no bytes.
        for region in self.base.memory.regions().iter().filter(|r| !r.read_only) {
            region.backing.discard(region.offset, region.size);
        }
        // Requests from before the reset are of a machine that is gone.
        let stale = |r: &Request| matches!(r, Request::Power(_) | Request::TripleFault);
        let kept: Vec<Request> = self.requests.try_iter().filter(|r| !stale(r)).collect();
        for request in kept {
            let _ = self.sender.send(request);
        }
        let kernel = finish(read_kernel(&self.spec, self.cache.as_ref())?)?;
        let entry = self.load(&kernel)?;
        self.lifecycle.reset(entry);
        if !self.paused {
            self.lifecycle.run();
        }
        Ok(())
    }
}

fn finish(kernel: Reading) -> Result<PreparedKernel, MachineError> {
    let why = || MachineError::Guest("the kernel's reader has failed".into());
    Ok(kernel.join().map_err(|_| why())??)
}

/// The event that tells of a disk's failure.
fn io_error(device: String, failure: IoFailure) -> Event {
    Event::BlockIoError {
        device,
        write: failure.write,
        action: match failure.action {
            ErrorAction::Report => IoErrorAction::Report,
            ErrorAction::Ignore => IoErrorAction::Ignore,
            ErrorAction::Stop => IoErrorAction::Stop,
        },
        no_space: failure.no_space,
        reason: failure.reason,
    }
}

/// QMP's hand on the machine.
struct QmpControl {
    requests: Sender<Request>,
    lifecycle: Arc<Lifecycle>,
    controls: Controls,
    /// Bytes of memory that the guest has without a balloon.
    memory: u64,
}

impl QmpControl {
    fn post(&self, request: Request) {
        // The main thread is gone only when the machine has ended.
        let _ = self.requests.send(request);
    }
}

impl Control for QmpControl {
    fn status(&self) -> RunState {
        if self.lifecycle.is_running() {
            RunState::Running
        } else if self.controls.io_error.load(Ordering::SeqCst) {
            RunState::IoError
        } else {
            RunState::Paused
        }
    }

    fn stop(&self) {
        let (done, stopped) = channel();
        self.post(Request::Stop(done));
        let _ = stopped.recv();
    }

    fn cont(&self) {
        self.post(Request::Continue);
    }

    fn system_reset(&self) {
        self.post(Request::Reset);
    }

    fn system_powerdown(&self) {
        self.post(Request::PowerButton);
    }

    fn quit(&self) {
        self.post(Request::Quit);
    }

    fn balloon(&self, target: u64) -> bool {
        let Some(balloon) = &self.controls.balloon else {
            return false;
        };
        balloon.set_target(self.memory.saturating_sub(target));
        true
    }

    fn query_balloon(&self) -> Option<u64> {
        let balloon = self.controls.balloon.as_ref()?;
        Some(self.memory.saturating_sub(balloon.actual()))
    }

    fn set_link(&self, name: &str, up: bool) -> bool {
        let card = self.controls.nets.iter().find(|(n, _)| n == name);
        if let Some((_, card)) = card {
            card.set_link(up);
        }
        card.is_some()
    }

    fn disks(&self) -> Vec<DiskReport> {
        self.controls.disks.report()
    }

    fn set_throttle(&self, disk: &str, group: Option<&str>, limits: ThrottleLimits) {
        self.controls.disks.set_throttle(disk, group, limits);
    }

    fn resize_disk(&self, disk: &str, size: u64) -> Result<(), String> {
        self.controls.disks.resize(disk, size)
    }

    fn jobs(&self) -> Vec<JobReport> {
        self.controls.disks.jobs()
    }

    fn block(&self, call: BlockCall) -> Result<(), String> {
        self.controls.disks.block(call, &self.lifecycle)
    }

    fn statistics(&self) -> qmp::Statistics {
        statistics::query(&self.lifecycle.statistics(), self.lifecycle.elapsed())
    }

    fn statistics_names(&self) -> &'static [(&'static str, qmp::Meaning)] {
        statistics::names()
    }
}
