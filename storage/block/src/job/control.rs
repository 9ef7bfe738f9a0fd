//! What people see of a job and how they steer it: QEMU's states, commands and rules (`qapi/job.json` there).

use std::cell::{Cell, RefCell};
use std::time::Duration;

use super::speed::Speed;
use crate::error::{BlockError, ErrorKind, Result};
use crate::executor;
use crate::sync::WaitQueue;

/// How long a job that waits for its speed limit sleeps before it looks whether something has changed.
const SLICE: Duration = Duration::from_millis(50);

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// Copies a disk and everything that is written to it.
    Mirror,
    /// Copies a disk as it was when the job began.
    Backup,
    /// Brings the data of backing files into the image above.
    Stream,
    /// Brings the data of images into a backing file of theirs.
    Commit,
}

impl JobKind {
    /// QEMU's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Stream => "stream",
            Self::Commit => "commit",
        }
    }
}

/// Where a job is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobStatus {
    /// It has not begun.
    Created,
    /// It works.
    Running,
    /// It was told to pause, or stopped at an error.
    Paused,
    /// It has done its work and keeps the copy current until it is told to complete.
    Ready,
    /// Paused while it was ready.
    Standby,
    /// Its work is done, and it waits for others.
    Waiting,
    /// It waits to be finalized.
    Pending,
    /// It undoes what it can.
    Aborting,
    /// It has ended; it waits to be dismissed.
    Concluded,
    /// It is gone.
    Null,
}

impl JobStatus {
    /// QEMU's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// What to do when a read or a write of a job fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// End the job.
    #[default]
    Report,
    /// Go on; what could not be copied is tried again later, or left out.
    Ignore,
    /// Pause, and try again when the job is resumed.
    Stop,
    /// Pause if there is no space, else end the job.
    Enospc,
}

/// What is done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// The job ends.
    Report,
    /// The job goes on.
    Ignore,
    /// The job is paused.
    Stop,
}

impl ErrorAction {
    /// QEMU's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// On which side of a copy something failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoSide {
    /// Reading.
    Source,
    /// Writing.
    Target,
}

/// Whether a job stands because of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// It does not.
    #[default]
    Ok,
    /// Something failed.
    Failed,
    /// There was no space.
    NoSpace,
}

impl IoStatus {
    /// QEMU's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// What a job tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEvent {
    /// Its state is another.
    Status(JobStatus),
    /// It can be completed now.
    Ready,
    /// It waits to be finalized.
    Pending,
    /// Something failed.
    Error(IoSide, ErrorAction),
    /// It has ended, well or with [`Job::error`].
    Completed,
    /// It was cancelled.
    Cancelled,
}

/// How a job is begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobOptions {
    /// Its name.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Bytes in a second at most; 0: no limit.
    pub speed: u64,
    /// Whether its last step needs no command.
    pub auto_finalize: bool,
    /// Whether it goes away by itself at its end.
    pub auto_dismiss: bool,
    /// What to do when reading fails.
    pub on_source_error: OnError,
    /// What to do when writing fails.
    pub on_target_error: OnError,
}

/// How somebody wants a job to end before it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cancel {
    No,
    /// At once.
    Hard,
    /// With the copy complete, but the disk as it is.
    Soft,
}

type Teller = dyn Fn(&Job, JobEvent);

/// A job.
pub struct Job {
    options: JobOptions,
    tell: Box<Teller>,
    status: Cell<JobStatus>,
    user_paused: Cell<bool>,
    cancel: Cell<Cancel>,
    completing: Cell<bool>,
    finalized: Cell<bool>,
    dismissed: Cell<bool>,
    io_status: Cell<IoStatus>,
    speed: Speed,
    done: Cell<u64>,
    remaining: Cell<u64>,
    error: RefCell<Option<String>>,
    changed: WaitQueue,
}

impl Job {
    /// A job that has not begun; it tells what happens through `tell`.
    pub fn new(options: JobOptions, tell: impl Fn(&Self, JobEvent) + 'static) -> Self {
        let job = Self {
            tell: Box::new(tell),
            status: Cell::new(JobStatus::Created),
            user_paused: Cell::new(false),
            cancel: Cell::new(Cancel::No),
            completing: Cell::new(false),
            finalized: Cell::new(options.auto_finalize),
            dismissed: Cell::new(options.auto_dismiss),
            io_status: Cell::default(),
            speed: Speed::default(),
            done: Cell::new(0),
            remaining: Cell::new(0),
            error: RefCell::default(),
            changed: WaitQueue::default(),
            options,
        };
        job.speed.set_limit(job.options.speed);
        (job.tell)(&job, JobEvent::Status(JobStatus::Created));
        job
    }

    /// Its options, with the speed that it began with.
    pub fn options(&self) -> &JobOptions {
        &self.options
    }

    /// Where it is on its way.
    pub fn status(&self) -> JobStatus {
        self.status.get()
    }

    /// Whether it was told to pause, or stopped at an error.
    pub fn is_paused(&self) -> bool {
        self.user_paused.get()
    }

    /// Whether it stands because of an error.
    pub fn io_status(&self) -> IoStatus {
        self.io_status.get()
    }

    /// The speed limit in bytes per second; 0: none.
    pub fn speed(&self) -> u64 {
        self.speed.limit()
    }

    /// Bytes done, and bytes in all as far as they are known.
    pub fn progress(&self) -> (u64, u64) {
        let done = self.done.get();
        (done, done + self.remaining.get())
    }

    /// Why it failed.
    pub fn error(&self) -> Option<String> {
        self.error.borrow().clone()
    }

    fn move_to(&self, status: JobStatus) {
        if self.status.replace(status) != status {
            (self.tell)(self, JobEvent::Status(status));
            self.changed.wake_all();
        }
    }

    /// Whether a command is taken in this state.
    fn may(&self, verb: &str, states: &[JobStatus]) -> Result<()> {
        let status = self.status.get();
        if states.contains(&status) {
            return Ok(());
        }
        let (id, status) = (&self.options.id, status.word());
        Err(BlockError::invalid_argument(format!(
            "Job '{id}' in state '{status}' cannot accept command verb '{verb}'"
        )))
    }
}

/// States in which a job can still be steered.
const ACTIVE: [JobStatus; 5] = [
    JobStatus::Created,
    JobStatus::Running,
    JobStatus::Paused,
    JobStatus::Ready,
    JobStatus::Standby,
];

/// The commands. Each fails with one line that says why it is not taken.
impl Job {
    /// Lets the job do nothing until it is resumed.
    ///
    /// # Errors
    ///
    /// In a state without anything to pause, or if it was paused before.
    pub fn pause(&self) -> Result<()> {
        self.may("pause", &ACTIVE)?;
        if self.user_paused.replace(true) {
            return Err(BlockError::invalid_argument("Job is already paused"));
        }
        self.changed.wake_all();
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    ///
    /// If it was not paused.
    pub fn resume(&self) -> Result<()> {
        self.may("resume", &ACTIVE)?;
        if !self.user_paused.replace(false) {
            let message = "Can't resume a job that was not paused";
            return Err(BlockError::invalid_argument(message));
        }
        self.io_status.set(IoStatus::Ok);
        self.changed.wake_all();
        Ok(())
    }

    /// Limits the speed to so many bytes per second; 0 lifts the limit.
    ///
    /// # Errors
    ///
    /// In a state without anything that takes time.
    pub fn set_speed(&self, speed: u64) -> Result<()> {
        self.may("set-speed", &ACTIVE)?;
        self.speed.set_limit(speed);
        self.changed.wake_all();
        Ok(())
    }

    /// Ends it. A mirror that is ready ends with a complete copy, unless `force` is set.
    ///
    /// # Errors
    ///
    /// If it has ended already.
    pub fn cancel(&self, force: bool) -> Result<()> {
        let later = [JobStatus::Waiting, JobStatus::Pending];
        self.may("cancel", &[&ACTIVE[..], &later].concat())?;
        // Who pauses a job and then wants it to end wants it to end now.
        let copied = matches!(self.status.get(), JobStatus::Ready | JobStatus::Standby);
        if copied && !force {
            if self.cancel.get() == Cancel::No {
                self.cancel.set(Cancel::Soft);
            }
            if self.user_paused.replace(false) {
                self.io_status.set(IoStatus::Ok);
            }
        } else {
            self.cancel.set(Cancel::Hard);
        }
        self.changed.wake_all();
        Ok(())
    }

    /// Lets a job that is ready end.
    ///
    /// # Errors
    ///
    /// If it is not ready.
    pub fn complete(&self) -> Result<()> {
        self.may("complete", &[JobStatus::Ready])?;
        self.completing.set(true);
        self.changed.wake_all();
        Ok(())
    }

    /// Lets a pending job do its last step.
    ///
    /// # Errors
    ///
    /// If it is not pending.
    pub fn finalize(&self) -> Result<()> {
        self.may("finalize", &[JobStatus::Pending])?;
        self.finalized.set(true);
        self.changed.wake_all();
        Ok(())
    }

    /// Lets a job that has ended go.
    ///
    /// # Errors
    ///
    /// If it has not ended.
    pub fn dismiss(&self) -> Result<()> {
        self.may("dismiss", &[JobStatus::Concluded])?;
        self.dismissed.set(true);
        self.changed.wake_all();
        Ok(())
    }

    /// Ends the job whatever it waits for, because its disk goes away.
    pub fn abandon(&self) {
        self.cancel.set(Cancel::Hard);
        self.dismissed.set(true);
        self.changed.wake_all();
    }
}

/// What the work of a job asks and says.
impl Job {
    /// Begins.
    pub fn start(&self) {
        self.move_to(JobStatus::Running);
    }

    /// Counts bytes as done, and against the speed limit.
    pub fn did(&self, bytes: u64) {
        self.count_skipped(bytes);
        self.speed.count(bytes);
    }

    /// Counts bytes as done that cost nothing.
    pub fn count_skipped(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        let remaining = self.remaining.get().saturating_sub(bytes);
        self.remaining.set(remaining);
    }

    /// Says how much is left to do.
    pub fn set_remaining(&self, bytes: u64) {
        self.remaining.set(bytes);
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.get() == Cancel::Hard
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(BlockError::new(ErrorKind::Io, "the job was cancelled"));
        }
        Ok(())
    }

    /// Waits while the job is paused.
    ///
    /// # Errors
    ///
    /// If it was cancelled.
    pub async fn breathe(&self) -> Result<()> {
        while self.user_paused.get() && !self.is_cancelled() {
            match self.status.get() {
                JobStatus::Running => self.move_to(JobStatus::Paused),
                JobStatus::Ready => self.move_to(JobStatus::Standby),
                _ => {}
            }
            self.changed.wait().await;
        }
        self.check_cancelled()?;
        match self.status.get() {
            JobStatus::Paused => self.move_to(JobStatus::Running),
            JobStatus::Standby => self.move_to(JobStatus::Ready),
            _ => {}
        }
        Ok(())
    }

    /// Waits until the speed limit allows more, and while the job is paused.
    ///
    /// # Errors
    ///
    /// If it was cancelled, or the host has no timer.
    pub async fn pace(&self) -> Result<()> {
        loop {
            self.breathe().await?;
            // A job that is to end in a moment is not held up.
            let wait = self.speed.wait();
            if wait.is_zero() || self.wants_end().is_some() {
                return Ok(());
            }
            executor::sleep(wait.min(SLICE)).await?;
        }
    }

    /// Says that the copy is complete.
    pub fn ready(&self) {
        self.move_to(JobStatus::Ready);
        (self.tell)(self, JobEvent::Ready);
    }

    /// Whether a job that is ready shall end, and if so whether the disk goes over to the copy.
    pub fn wants_end(&self) -> Option<bool> {
        match self.cancel.get() {
            Cancel::Soft => Some(false),
            _ => self.completing.get().then_some(true),
        }
    }

    /// Waits until a command has come, or [`Self::wake`].
    pub async fn wait(&self) {
        self.changed.wait().await;
    }

    /// Wakes the work.
    pub fn wake(&self) {
        self.changed.wake_all();
    }

    /// Decides about an error by the policy of its side, and pauses the job if that says so.
    pub fn failure(&self, error: &BlockError, side: IoSide) -> ErrorAction {
        let policy = match side {
            IoSide::Source => self.options.on_source_error,
            IoSide::Target => self.options.on_target_error,
        };
        let no_space = error.errno() == libc::ENOSPC;
        let action = match policy {
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc if no_space => ErrorAction::Stop,
            OnError::Report | OnError::Enospc => ErrorAction::Report,
        };
        (self.tell)(self, JobEvent::Error(side, action));
        if action == ErrorAction::Stop {
            self.user_paused.set(true);
            self.io_status.set(if no_space {
                IoStatus::NoSpace
            } else {
                IoStatus::Failed
            });
        }
        action
    }

    /// The work is done but for its last step: waits to be finalized if that was asked for.
    ///
    /// # Errors
    ///
    /// If the job was cancelled.
    pub async fn settle(&self) -> Result<()> {
        self.check_cancelled()?;
        self.move_to(JobStatus::Waiting);
        self.move_to(JobStatus::Pending);
        if !self.finalized.get() {
            (self.tell)(self, JobEvent::Pending);
        }
        while !self.finalized.get() {
            self.check_cancelled()?;
            self.changed.wait().await;
        }
        self.check_cancelled()
    }

    /// The end, good or bad; waits to be dismissed if that was asked for.
    pub async fn end(&self, result: Result<()>) {
        let cancelled = self.is_cancelled();
        if let Err(error) = result {
            self.move_to(JobStatus::Aborting);
            if !cancelled {
                *self.error.borrow_mut() = Some(error.one_line());
            }
            let event = if cancelled {
                JobEvent::Cancelled
            } else {
                JobEvent::Completed
            };
            (self.tell)(self, event);
        } else {
            (self.tell)(self, JobEvent::Completed);
        }
        self.move_to(JobStatus::Concluded);
        while !self.dismissed.get() {
            self.changed.wait().await;
        }
        self.move_to(JobStatus::Null);
    }
}
