//! `moeplane`: the operator's command. A client of control's public API and nothing else.
#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "the command talks to a person")]

mod client;
mod commands;
mod table;

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::client::{Client, Failed};

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  control could not be reached, failed, or is too busy: trying again may help
   2  control refused: the request must change
   3  the token is missing, unknown, or of too low a role
  64  the command line is wrong";

#[derive(Parser)]
#[command(name = "moeplane", version, about = "Operates moeplane by asking its control plane")]
#[command(after_help = EXIT_CODES)]
struct Arguments {
    #[command(flatten)]
    access: Access,
    /// Prints control's answer as JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Access {
    /// Address of control.
    #[arg(long, global = true, env = "MOEPLANE_URL", default_value = "http://127.0.0.1:7410")]
    url: String,
    /// The token; better in the environment or a file than on the command line.
    #[arg(long, global = true, env = "MOEPLANE_TOKEN", hide_env_values = true, hide = true)]
    token: Option<String>,
    /// File with the token.
    #[arg(long, global = true, env = "MOEPLANE_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// File with the certificates of those who vouch for control, PEM; the system's without.
    #[arg(long, global = true, env = "MOEPLANE_CA")]
    ca: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Groups: ranks that are missing, and how evenly they are loaded.
    Status,
    /// Workers: state, device, engine, calls.
    Workers,
    /// Layers of a group: those that are served, and why the others are not.
    Layers(Group),
    /// Windows of load of a group, newest first.
    Windows {
        #[command(flatten)]
        group: Group,
        /// Only this layer.
        #[arg(long)]
        layer: Option<u32>,
        /// Sums by the hour.
        #[arg(long)]
        hours: bool,
        /// Most rows.
        #[arg(long, default_value_t = 40)]
        limit: u16,
        /// First closes the open window of every rank, for this reason.
        #[arg(long, value_name = "REASON")]
        close: Option<String>,
    },
    /// How evenly the newest window of a group falls on its ranks, by layer.
    Balance(Group),
    /// Placements of a group: what is in force, what is asked for, which ranks wait.
    Placement {
        #[command(flatten)]
        group: Group,
        /// The expert of every slot of this layer, and its history.
        #[arg(long)]
        layer: Option<u32>,
    },
    /// Asks a placement policy what it would change in a group, and why. Nothing moves.
    Propose(Propose),
    /// What evenness costs: a policy asked with budgets of 0, 1, 2, 4 and 8 moves a layer.
    Tradeoffs {
        #[command(flatten)]
        group: Group,
        /// The policy, by its name.
        #[arg(long, default_value = "greedy_swap")]
        policy: String,
    },
    /// What was proposed for a group, newest first.
    Proposals {
        #[command(flatten)]
        group: Group,
        /// Most rows.
        #[arg(long, default_value_t = 40)]
        limit: u16,
    },
    /// What a proposal would change: layers, and the moves that the policy tells a reason for.
    Diff {
        /// The proposal.
        id: String,
    },
    /// How a group is balanced: shows it, or with --reason changes what is given.
    Balancing(Balancing),
    /// Approves a proposal: ranks take its placements up, while calls go on where they can.
    Approve(Decide),
    /// Rejects a proposal.
    Reject(Decide),
    /// What would be if ranks were lost: experts without a replica elsewhere, room for them, evenness of the others.
    Whatif {
        #[command(flatten)]
        group: Group,
        /// Ranks that would be lost together, such as 2 or 2,3.
        #[arg(long, value_name = "RANKS")]
        lost: String,
    },
    /// What plans have to keep: ranks that are to leave, speeds, experts that must or must not be somewhere.
    Constraints(Constraints),
    /// What is on its way to other placements, and how far it is; pauses it, goes on, or changes how fast.
    Migration(Migration),
    /// Who is lost, what calls lack, and what is done about it; changes that if anything is given.
    Recovery(Recovery),
    /// Gives up what is on its way: every layer keeps what is in force. With --layer and --epoch that layer goes back to a
    /// placement that it had.
    Rollback(Rollback),
    /// Takes placements of another engine over; ranks take them up, while calls go on where they can.
    Import {
        /// The file.
        file: PathBuf,
        #[command(flatten)]
        group: Group,
        /// Its form.
        #[arg(long)]
        format: Format,
        /// Only checks it, and says what would change.
        #[arg(long)]
        dry_run: bool,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
    /// Prints what is in force in the form of another engine.
    Export {
        #[command(flatten)]
        group: Group,
        /// The form.
        #[arg(long)]
        format: Format,
        /// Writes to this file instead.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Tactics: what was measured, what was chosen by it, and which ranks use that.
    Tactics {
        #[command(flatten)]
        group: Group,
        /// Has another policy choose, by its name or the digest of a version.
        #[arg(long, requires = "reason")]
        policy: Option<String>,
        /// Its settings, a JSON object.
        #[arg(long, requires = "policy", default_value = "{}")]
        settings: String,
        /// Kept in the audit log.
        #[arg(long)]
        reason: Option<String>,
    },
    /// Who decides how an expert's tokens are split over its replicas.
    Splitting(Splitting),
    /// Policies: versions of them, and which are asked.
    #[command(subcommand)]
    Policy(Policy),
    /// Tokens: who may do what.
    #[command(subcommand)]
    Token(Token),
    /// Who changed what, when and why; newest first.
    Audit {
        /// Most rows.
        #[arg(long, default_value_t = 40)]
        limit: u16,
    },
    /// Prints completions, for example: moeplane completions bash > moeplane.bash
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Args)]
struct Propose {
    #[command(flatten)]
    group: Group,
    /// The policy, by its name.
    #[arg(long, default_value = "greedy_swap")]
    policy: String,
    /// Its settings, a JSON object.
    #[arg(long, default_value = "{}")]
    settings: String,
    /// Most layers that may change.
    #[arg(long)]
    layers: Option<u32>,
    /// Most experts that may come to ranks in one layer.
    #[arg(long)]
    moves_per_layer: Option<u32>,
    /// Most bytes of all moves.
    #[arg(long)]
    bytes: Option<u64>,
    /// What a layer has to gain in rows of the busiest rank beside the mean to be changed.
    #[arg(long, default_value_t = 0.0)]
    minimum_gain: f32,
    /// Seconds for which it may be approved.
    #[arg(long, default_value_t = 3_600)]
    valid_for_s: u64,
    /// Kept in the audit log.
    #[arg(long)]
    reason: String,
}

#[derive(Args)]
struct Balancing {
    #[command(flatten)]
    group: Group,
    /// manual: operators ask and decide; advise: control asks when there is new load; auto: it also approves.
    #[arg(long, requires = "reason")]
    mode: Option<String>,
    /// The policy that control asks, by its name.
    #[arg(long, requires = "reason")]
    policy: Option<String>,
    /// Its settings, a JSON object.
    #[arg(long, requires = "reason")]
    settings: Option<String>,
    /// Most experts that may come to ranks in one layer.
    #[arg(long, requires = "reason")]
    moves_per_layer: Option<u32>,
    /// What a layer has to gain in rows of the busiest rank beside the mean to be changed.
    #[arg(long, requires = "reason")]
    minimum_gain: Option<f32>,
    /// Seconds between two questions at least.
    #[arg(long, requires = "reason")]
    every_s: Option<u64>,
    /// Most experts of a proposal that is approved in mode auto.
    #[arg(long, requires = "reason")]
    approve_moved: Option<u64>,
    /// Most bytes of one.
    #[arg(long, requires = "reason")]
    approve_bytes: Option<u64>,
    /// Kept in the audit log.
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Args)]
struct Constraints {
    #[command(flatten)]
    group: Group,
    /// Has the next plans find a place elsewhere for all that a rank has, so that it can be taken away.
    #[arg(long, value_name = "RANK", requires = "reason")]
    drain: Vec<u32>,
    /// Gives a rank experts again.
    #[arg(long, value_name = "RANK", requires = "reason")]
    rejoin: Vec<u32>,
    /// Says how fast a rank is beside the others, such as 3=0.8; 1 where nobody says so.
    #[arg(long, value_name = "RANK=SPEED", requires = "reason")]
    speed: Vec<String>,
    /// An expert that must have a replica on a rank, such as 5@2, or 7:5@2 in layer 7 alone.
    #[arg(long, value_name = "[LAYER:]EXPERT@RANK", requires = "reason")]
    must: Vec<String>,
    /// An expert that must have none there.
    #[arg(long, value_name = "[LAYER:]EXPERT@RANK", requires = "reason")]
    never: Vec<String>,
    /// Takes a pin away.
    #[arg(long, value_name = "[LAYER:]EXPERT@RANK", requires = "reason")]
    unpin: Vec<String>,
    /// Kept in the audit log.
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Args)]
struct Splitting {
    #[command(flatten)]
    group: Group,
    /// Has a routing policy decide, by its name or the digest of a version, whenever something is proposed.
    #[arg(long, requires = "reason")]
    policy: Option<String>,
    /// Its settings, a JSON object.
    #[arg(long, requires = "policy", default_value = "{}")]
    settings: String,
    /// Has tokens split evenly from the next change of a layer on: the default.
    #[arg(long, requires = "reason", conflicts_with = "policy")]
    even: bool,
    /// Kept in the audit log.
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Args)]
struct Recovery {
    #[command(flatten)]
    group: Group,
    /// Seconds for which a rank may be lost; then the others get what only it has.
    #[arg(long, value_name = "SECONDS", requires = "reason")]
    grace: Option<u64>,
    /// Waits for lost ranks, however long they take.
    #[arg(long, requires = "reason", conflicts_with = "automatic")]
    wait: bool,
    /// Does not: that is the default.
    #[arg(long, requires = "reason")]
    automatic: bool,
    /// Kept in the audit log.
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Args)]
struct Migration {
    #[command(flatten)]
    group: Group,
    /// Copies nothing more, and has nothing come to be in force for which no rank is ready yet.
    #[arg(long, requires = "reason", conflicts_with = "resume")]
    pause: bool,
    /// Goes on.
    #[arg(long, requires = "reason")]
    resume: bool,
    /// Layers that are under way at once.
    #[arg(long, requires = "reason")]
    layers_at_once: Option<u32>,
    /// Bytes that a rank copies in a second at most.
    #[arg(long, requires = "reason")]
    bytes_per_second: Option<u64>,
    /// Kept in the audit log.
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Args)]
struct Rollback {
    #[command(flatten)]
    group: Group,
    /// The layer.
    #[arg(long, requires = "epoch")]
    layer: Option<u32>,
    /// The epoch of the placement.
    #[arg(long, requires = "layer")]
    epoch: Option<u64>,
    /// Kept in the audit log.
    #[arg(long)]
    reason: String,
}

#[derive(Args)]
struct Decide {
    /// The proposal.
    id: String,
    /// Kept in the audit log.
    #[arg(long)]
    reason: String,
}

#[derive(Args)]
struct Group {
    /// The group; not needed where there is one.
    #[arg(long, short)]
    group: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    VllmAscend,
    TensorrtLlm,
    Sglang,
    Deepseek,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::VllmAscend => "vllm-ascend",
            Self::TensorrtLlm => "tensorrt-llm",
            Self::Sglang => "sglang",
            Self::Deepseek => "deepseek",
        }
    }
}

#[derive(Subcommand)]
enum Policy {
    /// Every version of every policy.
    List,
    /// One policy: its versions, its settings, and what went wrong with it lately.
    Show {
        /// Its name, or the digest of a version or its first digits.
        policy: String,
    },
    /// Uploads a version, and says what it would do with each group. Nothing is asked of it by its name before it is activated.
    Upload {
        /// The component, as `moeplane-policy build` makes it.
        file: PathBuf,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
    /// Writes the component of a version that was uploaded to a file.
    Download {
        /// The digest of the version, or its first digits.
        digest: String,
        /// The file.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Has a policy's name stand for a version.
    Activate {
        /// The digest of the version, or its first digits.
        digest: String,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
    /// Asks a policy in the shadow of the one that a group is balanced by, whenever a window has settled. Nothing of it is
    /// carried out.
    Shadow {
        #[command(flatten)]
        group: Group,
        /// Its name, or the digest of a version or its first digits.
        policy: String,
        /// Its settings, a JSON object.
        #[arg(long, default_value = "{}")]
        settings: String,
        /// Most experts that may come to ranks in one layer.
        #[arg(long)]
        moves_per_layer: Option<u32>,
        /// Asks it no more, whatever its settings.
        #[arg(long)]
        stop: bool,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
    /// How even a group would have been with the plans of its shadows, each in the window that came next.
    League {
        #[command(flatten)]
        group: Group,
        /// Only windows of so many last hours.
        #[arg(long)]
        hours: Option<u32>,
    },
    /// Has a policy's name stand for what it stood for before.
    Rollback {
        /// Its name.
        policy: String,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
}

#[derive(Subcommand)]
enum Token {
    /// All of them, also those that have ended.
    List,
    /// Who asks.
    Whoami,
    /// Makes one; its secret is printed once.
    Make {
        /// Who it is for.
        name: String,
        /// viewer, operator, admin or worker.
        #[arg(long)]
        role: String,
        /// Seconds after which it ends; never without.
        #[arg(long)]
        expires_after_s: Option<u64>,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
    /// Makes one in place of another.
    Rotate {
        /// Number of the other.
        id: u64,
        /// Seconds for which the other still works.
        #[arg(long, default_value_t = 0)]
        keep_s: u64,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
    /// Ends one now.
    Revoke {
        /// Its number.
        id: u64,
        /// Kept in the audit log.
        #[arg(long)]
        reason: String,
    },
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let asked = !error.use_stderr();
            // Nobody is left to tell when even this cannot be printed.
            return match error.print() {
                Ok(()) if asked => ExitCode::SUCCESS,
                _ => ExitCode::from(settings::BAD_CONFIG),
            };
        }
    };
    let mut out = io::stdout().lock();
    match run(arguments, &mut out).and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads has seen enough, as `head` has.
        Err(Failed::Print(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let causes = std::iter::successors(error.source(), |&cause| cause.source());
            let causes: String = causes.map(|cause| format!(": {cause}")).collect();
            eprintln!("error: {error}{causes}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(arguments: Arguments, out: &mut impl Write) -> Result<(), Failed> {
    let Arguments { access, json, command } = arguments;
    if let Command::Completions { shell } = command {
        clap_complete::generate(shell, &mut Arguments::command(), "moeplane", out);
        return Ok(());
    }
    let Access { url, token, token_file, ca } = access;
    let token = match (token, token_file) {
        (Some(token), _) => token,
        (None, Some(path)) => match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(Failed::Read { path, source }),
        },
        (None, None) => return Err(Failed::NoToken),
    };
    let client = Client::new(&url, token.trim().to_owned(), ca.as_deref())?;
    commands::run(&client, command, json, out)
}
