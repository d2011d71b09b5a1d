//! Workers as child processes: found beside the running program, ready when they can be connected
//! to, and ended when dropped, whatever ended the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use protocol::client::{Client, Engine, Options};
use protocol::message::Attach;
use reference::layer::Variant;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::call;
use crate::resident::Resident;

/// How long a worker may take to load a model or to end: far beyond what it needs.
const DEADLINE: Duration = Duration::from_secs(120);
/// Pause between two looks at a process.
const PAUSE: Duration = Duration::from_millis(2);

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    /// Short, because a socket's path must stay under 108 bytes; holds socket and log.
    folder: TempDir,
}

/// The path of a built program: beside the running one, or one level above it for test binaries.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|p| p.is_file());
    found.with_context(|| format!("{name} is not built beside {}; cargo build", own.display()))
}

/// Asks `condition` until it gives a value.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if began.elapsed() >= DEADLINE {
            bail!("{what} did not happen within {} s", DEADLINE.as_secs());
        }
        std::thread::sleep(PAUSE);
    }
}

impl Worker {
    /// Starts a worker on `model` and waits until it is ready.
    pub fn start(model: &Path, options: &[&str]) -> Result<Self> {
        let mut worker = Self::spawn(model, options)?;
        worker.ready()?;
        Ok(worker)
    }

    /// Waits until engines can connect: a socket's file may be there before and after that.
    pub fn ready(&mut self) -> Result<()> {
        until("readiness of the worker", || {
            if self.child.try_wait()?.is_some() {
                bail!("the worker ended: {}", self.log().trim_end());
            }
            Ok(Client::connect(&self.socket(), Options::default()).ok())
        })?;
        Ok(())
    }

    /// Starts a worker and does not wait.
    pub fn spawn(model: &Path, options: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("moe").tempdir_in("/tmp")?;
        let child = Self::child(folder.path(), model, options)?;
        Ok(Self { child, folder })
    }

    /// Starts another process at the same socket, after the first has ended.
    pub fn restart(&mut self, model: &Path) -> Result<()> {
        self.child = Self::child(self.folder.path(), model, &[])?;
        self.ready()
    }

    fn child(folder: &Path, model: &Path, options: &[&str]) -> Result<Child> {
        Command::new(program("moeplane-worker")?)
            .arg("run")
            .arg("--exit-with-parent")
            .arg("--model")
            .arg(model)
            .arg("--socket")
            .arg(folder.join("s"))
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("log"))?)
            .spawn()
            .context("the worker did not start")
    }

    /// The process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The memory that it holds.
    pub fn resident(&self) -> Result<Resident> {
        Resident::of(self.pid())
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// What the worker has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Connects and attaches an engine.
    pub fn engine(&self, variant: Variant, max_tokens: usize) -> Result<Engine> {
        self.attach(&call::attach(variant, max_tokens))
    }

    /// Connects and attaches an engine.
    pub fn attach(&self, attach: &Attach) -> Result<Engine> {
        Ok(Client::connect(&self.socket(), Options::default())?.attach(attach)?)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(pid.context("no such process")?, signal)?)
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        until("the worker's end", || Ok(self.child.try_wait()?))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // There is nobody to report a failure to: it may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
