//! Compiles components in another process: compilation cannot be interrupted, and a fault of a compiler must not reach
//! the daemon. The process is `moeplane-policy compile-child`, which limits itself before it reads a byte.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use crate::limits::{COMPILED_BYTES_MAX, CompileLimits};
use crate::verdict::Verdict;

/// The subcommand of `moeplane-policy` that is the process.
pub const SUBCOMMAND: &str = "compile-child";

/// Exit status by which the process says that it refuses, with the reason on its error output.
pub const REFUSED: u8 = 3;

/// Signal of a process that used up its processor time.
const SIGXCPU: i32 = 24;

/// Bytes kept of what the compiler says.
const MESSAGE_BYTES: u64 = 4096;

/// Starts compiler processes.
#[derive(Debug, Clone)]
pub struct Compiler {
    program: PathBuf,
}

impl Compiler {
    /// `program` is `moeplane-policy`.
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }

    /// Compiled code of `component`.
    ///
    /// # Errors
    /// [`Verdict::Compile`], [`Verdict::CompileTime`], [`Verdict::CompilerDied`]; [`Verdict::Host`] when the program
    /// does not start.
    pub fn compile(&self, component: &[u8], limits: CompileLimits) -> Result<Vec<u8>, Verdict> {
        let failed = |error| Verdict::host(&format!("running {}", self.program.display()), error);
        let mut child = Command::new(&self.program)
            .args([SUBCOMMAND, "--seconds", &limits.seconds.to_string()])
            .args(["--memory-bytes", &limits.memory_bytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let said = exchange(&mut child, component, Duration::from_secs(limits.clock_seconds()));
        let status = child.wait().map_err(failed)?;
        let bytes = component.len() as u64;
        match said {
            Some((code, message)) => judge(status, code, &message, limits, bytes),
            None => Err(Verdict::CompileTime { limit_s: limits.clock_seconds(), bytes }),
        }
    }
}

/// Writes the component and reads code and message, all at once, so that no pipe fills up. `None`, and the child killed,
/// when that takes longer than `time`.
fn exchange(child: &mut Child, component: &[u8], time: Duration) -> Option<(Vec<u8>, String)> {
    let (mut stdin, stdout, stderr) =
        (child.stdin.take()?, child.stdout.take()?, child.stderr.take()?);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A compiler that ends early says why by its status.
            drop(stdin.write_all(component));
        });
        let message = scope.spawn(move || {
            let mut text = Vec::new();
            drop(stderr.take(MESSAGE_BYTES).read_to_end(&mut text));
            String::from_utf8_lossy(&text).trim().to_owned()
        });
        let (send, receive) = sync_channel(1);
        scope.spawn(move || {
            let mut code = Vec::new();
            drop(stdout.take(COMPILED_BYTES_MAX + 1).read_to_end(&mut code));
            drop(send.send(code));
        });
        let code = receive.recv_timeout(time);
        if code.is_err() {
            // Its pipes close, and the threads end. If it has just ended by itself, that is as good.
            drop(child.kill());
        }
        Some((code.ok()?, message.join().unwrap_or_default()))
    })
}

fn judge(
    status: ExitStatus,
    code: Vec<u8>,
    message: &str,
    limits: CompileLimits,
    bytes: u64,
) -> Result<Vec<u8>, Verdict> {
    let length = code.len() as u64;
    if status.success() && (1..=COMPILED_BYTES_MAX).contains(&length) {
        return Ok(code);
    }
    if status.success() {
        let reason = format!("it made {length} bytes of code, expected 1 to {COMPILED_BYTES_MAX}");
        return Err(Verdict::Compile { reason });
    }
    if status.code() == Some(i32::from(REFUSED)) {
        return Err(Verdict::Compile { reason: message.to_owned() });
    }
    if status.signal() == Some(SIGXCPU) {
        return Err(Verdict::CompileTime { limit_s: limits.seconds, bytes });
    }
    let status = format!("{status}: {message}");
    Err(Verdict::CompilerDied { status, limit_bytes: limits.memory_bytes })
}
