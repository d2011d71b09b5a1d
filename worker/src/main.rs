//! `moeplane-worker`: the command line of the worker daemon.
#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "commands answer on the terminal")]

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use kernels::cpu::Isa;
use settings::BAD_CONFIG;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use tracing_subscriber::EnvFilter;
use worker::check::Question;
use worker::config::{
    Config, ConfigError, ControlSettings, DeviceConfig, DeviceKind, DeviceSettings, EngineSettings,
    GroupSettings, LogConfig, LogFormat, LogSettings, Settings,
};
use worker::tactics::{Shown, Tune, TuneError};
use worker::{Rank, StartError};

#[derive(Parser)]
#[command(name = "moeplane-worker", version, about = "Serves the MoE layers of a model")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Loads a model and serves calls until SIGTERM or SIGINT.
    Run {
        #[command(flatten)]
        options: Options,
        /// End when the process that started this one does, however that ends.
        #[arg(long)]
        exit_with_parent: bool,
    },
    /// Prints what of a checkpoint would be served, what not and why, and the memory it would take;
    /// reads every scale. Exit code 1 if a worker would not start on it.
    Check {
        /// Folder of the checkpoint.
        #[arg(long)]
        model: PathBuf,
        /// Ranks that would hold the experts together; one alone without.
        #[arg(long)]
        ranks: Option<u32>,
        /// Slots of each rank and layer; as few as hold every expert once without.
        #[arg(long, visible_alias = "slots-per-rank", default_value_t = 0)]
        slots: u32,
        /// Most tokens of a call.
        #[arg(long)]
        max_tokens: Option<u32>,
    },
    /// Times every tactic that can run the model's layers on this device, for calls of several sizes, and writes what is
    /// fastest to a file for `run --tactics`.
    Tune {
        /// Folder of the checkpoint.
        #[arg(long)]
        model: PathBuf,
        /// Where the table is written.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Tokens of calls, ascending.
        #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,256,1024")]
        tokens: Vec<u32>,
        /// What computes: cpu or cuda.
        #[arg(long)]
        device: Option<DeviceKind>,
        /// Number of the GPU.
        #[arg(long, default_value_t = 0)]
        gpu: usize,
        /// Folder of compiled device code; the user's cache by default.
        #[arg(long)]
        cubin_cache: Option<PathBuf>,
        /// Threads of the CPU device; 0 takes one for each core.
        #[arg(long, default_value_t = 0)]
        threads: usize,
        /// Instructions of the CPU device: scalar, avx2 or avx512; the fastest otherwise.
        #[arg(long)]
        isa: Option<Isa>,
    },
    /// Prints the configuration with every default filled in.
    Config(Options),
}

/// Each takes the place of a value of the file.
#[derive(clap::Args)]
struct Options {
    /// The configuration, TOML.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Folder of the checkpoint.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Path of the socket for engines.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Most tokens of a call.
    #[arg(long)]
    max_tokens: Option<u32>,
    /// Name of the group of ranks that serve the model together; alone without.
    #[arg(long)]
    group: Option<String>,
    /// This rank of the group.
    #[arg(long)]
    rank: Option<u32>,
    /// Ranks of the group.
    #[arg(long)]
    ranks: Option<u32>,
    /// Folder in shared memory where the group's heap is.
    #[arg(long)]
    group_dir: Option<PathBuf>,
    /// How long a peer that makes no progress is waited for.
    #[arg(long)]
    deadline_ms: Option<u64>,
    /// Slots of each rank and layer; 0 takes as few as hold every expert once.
    #[arg(long)]
    slots_per_rank: Option<u32>,
    /// File with the expert of every slot, JSON [layer][slot].
    #[arg(long)]
    placement: Option<PathBuf>,
    /// Address of the control plane, ws://HOST:PORT or wss://HOST:PORT.
    #[arg(long)]
    control: Option<String>,
    /// File with the certificates of those who vouch for a control plane with TLS.
    #[arg(long)]
    control_ca: Option<PathBuf>,
    /// File with the credential of workers.
    #[arg(long)]
    credential: Option<PathBuf>,
    /// What computes: cpu or cuda.
    #[arg(long)]
    device: Option<DeviceKind>,
    /// Number of the GPU.
    #[arg(long)]
    gpu: Option<usize>,
    /// Folder of compiled device code; the user's cache by default.
    #[arg(long)]
    cubin_cache: Option<PathBuf>,
    /// Threads of the CPU device; 0 takes this rank's share of the cores.
    #[arg(long)]
    threads: Option<usize>,
    /// Instructions of the CPU device: scalar, avx2 or avx512; the fastest otherwise.
    #[arg(long)]
    isa: Option<Isa>,
    /// One tactic for every call, such as avx512-t12-p256.
    #[arg(long)]
    tactic: Option<String>,
    /// File with tactics as `tune` measured them.
    #[arg(long, value_name = "FILE")]
    tactics: Option<PathBuf>,
    /// What is logged, such as info or worker=debug.
    #[arg(long)]
    log: Option<String>,
    /// Log lines of JSON.
    #[arg(long)]
    log_json: bool,
}

impl Options {
    fn config(self) -> Result<Config, ConfigError> {
        let Self { config, model, socket, max_tokens, threads, isa, tactic, log, log_json, .. } =
            self;
        let format = log_json.then_some(LogFormat::Json);
        let options = Settings {
            model,
            engine: EngineSettings { socket, max_tokens },
            group: GroupSettings {
                name: self.group,
                rank: self.rank,
                ranks: self.ranks,
                dir: self.group_dir,
                deadline_ms: self.deadline_ms,
                slots_per_rank: self.slots_per_rank,
                placement: self.placement,
            },
            control: ControlSettings {
                url: self.control,
                ca: self.control_ca,
                credential: self.credential,
            },
            device: DeviceSettings {
                kind: self.device,
                gpu: self.gpu,
                cubin_cache: self.cubin_cache,
                threads,
                isa,
                tactic,
                tactics: self.tactics,
            },
            log: LogSettings { filter: log, format },
        };
        let config = settings::load(config.as_deref(), |file| options.over(file))?;
        config.device.cpu(1)?;
        Ok(config)
    }
}

fn main() -> ExitCode {
    let (run, options) = match Arguments::parse().command {
        Command::Run { options, exit_with_parent } => {
            if exit_with_parent && let Err(error) = end_with_parent() {
                return failed(&error, 1);
            }
            (true, options)
        }
        Command::Config(options) => (false, options),
        Command::Tune { model, out, tokens, device, gpu, cubin_cache, threads, isa } => {
            let kind = device.unwrap_or_default();
            let (tactic, tactics) = (None, None);
            let device = DeviceConfig { kind, gpu, cubin_cache, threads, isa, tactic, tactics };
            return match tune(&Tune { model, device, tokens }, &out) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) if error.is::<ConfigError>() => failed(&error, BAD_CONFIG),
                Err(error) => failed(&error, 1),
            };
        }
        Command::Check { model, ranks, slots, max_tokens } => {
            return match check(&Question { model, ranks, slots, max_tokens }) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) if error.is::<ConfigError>() => failed(&error, BAD_CONFIG),
                Err(error) => failed(&error, 1),
            };
        }
    };
    let config = match options.config().and_then(log_to_stderr) {
        Ok(config) => config,
        Err(error) => return failed(&error.into(), BAD_CONFIG),
    };
    let done = if run { serve(&config) } else { print(&config) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, 1),
    }
}

fn end_with_parent() -> anyhow::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    // It may have ended before the signal was asked for.
    anyhow::ensure!(rustix::process::getppid() == parent, "the parent process has ended");
    Ok(())
}

/// The chain of causes on one line, each once.
fn failed(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::from(code)
}

fn log_to_stderr(config: Config) -> Result<Config, ConfigError> {
    let LogConfig { filter, format } = &config.log;
    let parsed = EnvFilter::try_new(filter).map_err(|error| ConfigError::Value {
        key: "log.filter",
        value: filter.clone(),
        expected: format!("a filter such as info ({error})"),
    })?;
    let lines = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(parsed);
    match format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(config)
}

fn serve(config: &Config) -> anyhow::Result<()> {
    let (stop, signalled) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        pipe::register(signal, signalled.try_clone()?)?;
    }
    Ok(Rank::start(config)?.serve(&stop)?)
}

fn tune(tune: &Tune, out: &Path) -> anyhow::Result<()> {
    use io::Write;
    let table = tune.run().map_err(|error| match error {
        TuneError::Config(error) => error.into(),
        error => anyhow::Error::from(error),
    })?;
    let text = serde_json::to_vec_pretty(&table)?;
    fs::write(out, text).with_context(|| format!("cannot write {}", out.display()))?;
    Ok(write!(io::stdout(), "{}", Shown(&table))?)
}

fn check(question: &Question) -> anyhow::Result<()> {
    use io::Write;
    let report = question.answer().map_err(|error| match error {
        StartError::Config(error) => error.into(),
        error => anyhow::Error::from(error),
    })?;
    Ok(write!(io::stdout(), "{report}")?)
}

fn print(config: &Config) -> anyhow::Result<()> {
    use io::Write;
    Ok(io::stdout().write_all(toml::to_string(config)?.as_bytes())?)
}
