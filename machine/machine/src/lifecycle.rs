//! Running, pausing, resetting and ending a machine's vCPUs.
//!
//! Each vCPU lives on a thread of its own, which runs it while the machine is to run and parks otherwise. Whoever wants
//! something of the machine posts a [`Request`]; the machine's main thread takes them one by one and drives the threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use accel::{CpuIo, Exit, Vcpu, VcpuHandle, VcpuStatistics};
use block::job::JobEvent;
use device_model::{PowerControl, PowerEvent};
use guest_clock::GuestClock;
use parking_lot::{Condvar, Mutex};
use qmp::JobReport;
use virtio::blk::IoFailure;

use crate::loader::Entry;

/// What the machine's main thread is asked to do.
#[derive(Debug)]
pub(crate) enum Request {
    /// A device asks.
    Power(PowerEvent),
    /// A vCPU met a triple fault.
    TripleFault,
    /// A vCPU can't go on.
    Failed(String),
    /// Pause the guest; answered when it stands.
    Stop(Sender<()>),
    /// Let the guest go on.
    Continue,
    /// Reset the machine for a person.
    Reset,
    /// Press the power button for a person.
    PowerButton,
    /// The balloon has another size.
    BalloonChanged,
    /// The host could not read or write a disk.
    DiskFailed {
        /// The disk's name.
        device: String,
        /// What happened.
        failure: IoFailure,
    },
    /// A job on a disk tells something.
    Job {
        /// The job at that moment.
        report: JobReport,
        /// What it tells.
        event: JobEvent,
    },
    /// End for a person.
    Quit,
    /// The host asks for an end (SIGTERM): the first presses the power button, the next one quits.
    Terminate,
}

/// APIC IDs that are there without x2APIC; the last of eight bits is the broadcast.
const XAPIC_IDS: usize = 255;

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Park,
    End,
}

struct State {
    wanted: Wanted,
    parked: usize,
    /// Counts resets; a thread that has seen fewer resets its vCPU before it runs it again.
    resets: u64,
    /// Threads that have yet to do the latest reset.
    to_reset: usize,
    /// How the bootstrap processor starts after a reset, when not at the reset vector.
    entry: Option<Entry>,
}

/// The vCPUs' side of the machine.
pub(crate) struct Lifecycle {
    // Configuration.
    clock: GuestClock,
    requests: Sender<Request>,
    handles: OnceLock<Vec<Arc<dyn VcpuHandle>>>,
    /// Whether to say when the guest's first instruction runs.
    announce: AtomicBool,
    // Runtime.
    state: Mutex<State>,
    changed: Condvar,
}

impl Lifecycle {
    pub(crate) fn new(clock: GuestClock, requests: Sender<Request>) -> Arc<Self> {
        let state = State {
            wanted: Wanted::Park,
            parked: 0,
            resets: 0,
            to_reset: 0,
            entry: None,
        };
        Arc::new(Self {
            clock,
            requests,
            handles: OnceLock::new(),
            announce: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    /// Has the first instruction of the guest announced on standard error.
    pub(crate) fn announce_start(&self) {
        self.announce.store(true, Ordering::Relaxed);
    }

    /// Posts a request.
    pub(crate) fn post(&self, request: Request) {
        // The main thread is gone only when the machine has ended.
        let _ = self.requests.send(request);
    }

    /// Starts a thread for each vCPU; they park until [`Self::run`].
    pub(crate) fn start(
        self: &Arc<Self>,
        vcpus: Vec<Box<dyn Vcpu>>,
        io: &Arc<dyn CpuIo>,
    ) -> std::io::Result<Vec<JoinHandle<()>>> {
        let _ = self
            .handles
            .set(vcpus.iter().map(|vcpu| vcpu.handle()).collect());
        let mut threads = Vec::with_capacity(vcpus.len());
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let (shared, io) = (self.clone(), io.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu-{number}"))
                .spawn(move || {
                    Thread {
                        number,
                        vcpu,
                        shared,
                        io,
                        resets: 0,
                        stuck: false,
                    }
                    .live()
                });
            threads.push(thread?);
        }
        Ok(threads)
    }

    /// The counters of the vCPUs.
    pub(crate) fn statistics(&self) -> Vec<VcpuStatistics> {
        let handles = self.handles().iter();
        handles.map(|handle| handle.statistics()).collect()
    }

    /// Time that the guest has had.
    pub(crate) fn elapsed(&self) -> std::time::Duration {
        std::time::Duration::from_nanos(self.clock.now())
    }

    fn handles(&self) -> &[Arc<dyn VcpuHandle>] {
        self.handles.get().map_or(&[], Vec::as_slice)
    }

    /// Lets the guest run, and guest time with it.
    pub(crate) fn run(&self) {
        let mut state = self.state.lock();
        if state.wanted == Wanted::Park {
            state.wanted = Wanted::Run;
            self.clock.resume();
            self.changed.notify_all();
        }
    }

    /// Stops all vCPUs and guest time. Returns when they stand.
    pub(crate) fn park(&self) {
        let mut state = self.state.lock();
        if state.wanted == Wanted::Run {
            state.wanted = Wanted::Park;
        }
        self.handles().iter().for_each(|handle| handle.kick());
        while state.parked < self.handles().len() {
            self.changed.wait(&mut state);
        }
        self.clock.stop();
    }

    /// Has every vCPU reset, the bootstrap processor then put at `entry`. Only while they are parked. Returns when it is done.
    pub(crate) fn reset(&self, entry: Option<Entry>) {
        let mut state = self.state.lock();
        state.entry = entry;
        state.resets += 1;
        state.to_reset = self.handles().len();
        self.changed.notify_all();
        while state.to_reset > 0 {
            self.changed.wait(&mut state);
        }
    }

    /// Ends the threads.
    pub(crate) fn end(&self) {
        self.state.lock().wanted = Wanted::End;
        self.changed.notify_all();
        self.handles().iter().for_each(|handle| handle.kick());
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state.lock().wanted == Wanted::Run
    }
}

impl PowerControl for Lifecycle {
    fn request(&self, event: PowerEvent) {
        self.post(Request::Power(event));
    }
}

/// A vCPU's thread.
struct Thread {
    number: usize,
    vcpu: Box<dyn Vcpu>,
    shared: Arc<Lifecycle>,
    io: Arc<dyn CpuIo>,
    /// Resets that this vCPU has seen.
    resets: u64,
    /// The vCPU can't go on before a reset.
    stuck: bool,
}

impl Thread {
    fn live(mut self) {
        while self.wait_to_run() {
            if self.number == 0 && self.shared.announce.swap(false, Ordering::Relaxed) {
                eprintln!("corten: the guest starts");
            }
            match self.vcpu.run(&*self.io) {
                Ok(Exit::Kicked) => {}
                Ok(Exit::Shutdown) => {
                    self.stuck = true;
                    self.shared.post(Request::TripleFault);
                }
                Ok(Exit::InternalError(why)) => self.fail(why),
                Err(why) => self.fail(why.to_string()),
            }
        }
    }

    fn fail(&mut self, why: String) {
        self.stuck = true;
        self.shared
            .post(Request::Failed(format!("vCPU {}: {why}", self.number)));
    }

    /// Parks while the machine is not to run. Returns false when the thread is to end.
    fn wait_to_run(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut state = shared.state.lock();
        state.parked += 1;
        shared.changed.notify_all();
        loop {
            if state.wanted == Wanted::End {
                return false;
            }
            if state.resets != self.resets {
                self.resets = state.resets;
                self.reset(state.entry.as_ref());
                state.to_reset -= 1;
                shared.changed.notify_all();
            } else if state.wanted == Wanted::Run && !self.stuck {
                state.parked -= 1;
                return true;
            } else {
                shared.changed.wait(&mut state);
            }
        }
    }

    fn reset(&mut self, entry: Option<&Entry>) {
        self.stuck = false;
        let result = self.vcpu.reset().and_then(|()| {
            let Some(entry) = entry else {
                return Ok(());
            };
            let mut state = self.vcpu.state()?;
            crate::loader::set_memory_types(&mut state);
            if self.shared.handles().len() > XAPIC_IDS {
                // vCPUs have their numbers as IDs.
                crate::loader::enable_x2apic(&mut state, self.number as u32);
            }
            if self.number == 0 {
                crate::loader::prepare(&mut state, entry);
            }
            self.vcpu.set_state(&state)
        });
        if let Err(why) = result {
            self.fail(why.to_string());
        }
    }
}
