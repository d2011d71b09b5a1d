//! `moeplane-control`: the command line of the control plane.
#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "commands answer on the terminal")]

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use control::Server;
use control::config::{Config, ConfigError, Settings};
use control::tls::TlsConfig;
use settings::BAD_CONFIG;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "moeplane-control", version, about = "Sees every worker, and says what it sees")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes the data folder and the first admin token, which is printed and stored nowhere.
    Init {
        #[command(flatten)]
        options: Options,
        /// Makes another admin token although there is one: whoever can write the folder may.
        #[arg(long)]
        another: bool,
    },
    /// Serves until SIGTERM or SIGINT.
    Serve {
        #[command(flatten)]
        options: Options,
        /// End when the process that started this one does, however that ends.
        #[arg(long)]
        exit_with_parent: bool,
    },
    /// Prints the configuration with every default filled in.
    Check(Options),
    /// Prints the OpenAPI document of the API.
    Openapi,
}

/// Each takes the place of a value of the file.
#[derive(clap::Args)]
struct Options {
    /// The configuration, TOML.
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// Certificate of the listener, PEM; with its key, control may listen beyond loopback.
    #[arg(long, requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    #[arg(long, requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// File with the placement that a group starts with, JSON [layer][slot]; may be given for several.
    #[arg(long, value_name = "GROUP=FILE", value_parser = placement)]
    placement: Vec<(String, PathBuf)>,
}

fn placement(option: &str) -> Result<(String, PathBuf), String> {
    let (group, file) = option.split_once('=').ok_or("expected GROUP=FILE")?;
    Ok((group.to_owned(), file.into()))
}

impl Options {
    fn config(self) -> Result<Config, ConfigError> {
        let Self { config, settings, tls_certificate, tls_key, placement } = self;
        let placements = placement.into_iter().collect();
        let tls = tls_certificate.zip(tls_key);
        let tls = tls.map(|(certificate, key)| TlsConfig { certificate, key });
        let options = Settings { placements, tls, ..settings };
        settings::load(config.as_deref(), |file| options.over(file))
    }
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Openapi => print_document(),
        Command::Check(options) => options.config().map_err(Into::into).and_then(print_config),
        Command::Init { options, another } => {
            options.config().map_err(Into::into).and_then(|config| init(&config, another))
        }
        Command::Serve { options, exit_with_parent } => {
            let config = options.config().map_err(anyhow::Error::from);
            let tied = if exit_with_parent { end_with_parent() } else { Ok(()) };
            tied.and(config).and_then(serve)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<ConfigError>() { BAD_CONFIG } else { 1 })
        }
    }
}

fn end_with_parent() -> anyhow::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    // It may have ended before the signal was asked for.
    anyhow::ensure!(rustix::process::getppid() == parent, "the parent process has ended");
    Ok(())
}

fn init(config: &Config, another: bool) -> anyhow::Result<()> {
    let made = control::init(config, another);
    let secret =
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(made)?;
    eprintln!("the admin token, shown this once (authorization: Bearer TOKEN):");
    Ok(writeln!(io::stdout(), "{secret}")?)
}

fn print_document() -> anyhow::Result<()> {
    Ok(io::stdout().write_all(control::document()?.as_bytes())?)
}

fn print_config(config: Config) -> anyhow::Result<()> {
    Ok(io::stdout().write_all(toml::to_string(&config)?.as_bytes())?)
}

fn serve(config: Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|_unclear| ConfigError::value("log", &config.log, "a filter such as info"))?;
    let ansi = io::IsTerminal::is_terminal(&io::stderr());
    let lines = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(filter);
    lines.with_ansi(ansi).init();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(config))
}

async fn run(config: Config) -> anyhow::Result<()> {
    let [mut term, mut int] = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let server = Server::start(config).await?;
    let end = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    Ok(server.serve(end).await?)
}
