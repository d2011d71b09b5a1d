//! `new` and `build`: a policy's first files, and its component. Rust needs nothing but cargo; Python and JavaScript need the
//! tool that puts an interpreter into the component. Whether a component is a policy, the gate says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use policy_host::gate;

use crate::build;

/// The contract, for policies that are built far from this repository.
const CONTRACT: [(&str, &str); 4] = [
    ("placement.wit", include_str!("../../../../wit/v0.1/placement.wit")),
    ("routing.wit", include_str!("../../../../wit/v0.1/routing.wit")),
    ("tactics.wit", include_str!("../../../../wit/v0.1/tactics.wit")),
    ("types.wit", include_str!("../../../../wit/v0.1/types.wit")),
];

const CARGO: &str = include_str!("../../../../templates/rust/Cargo.toml.txt");
const RUST: [&str; 3] = [
    include_str!("../../../../templates/rust/src/placement.rs"),
    include_str!("../../../../templates/rust/src/routing.rs"),
    include_str!("../../../../templates/rust/src/tactics.rs"),
];
const PYTHON: &str = include_str!("../../../../templates/python/policy.py");
const JAVASCRIPT: &str = include_str!("../../../../templates/javascript/policy.js");

/// The name that templates have.
const PLACEHOLDER: &str = "my-policy";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum World {
    Placement,
    Routing,
    Tactics,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Language {
    Rust,
    Python,
    Javascript,
}

impl Language {
    const ALL: [Self; 3] = [Self::Rust, Self::Python, Self::Javascript];

    /// The file by which a folder is known to be of this language.
    fn mark(self) -> &'static str {
        match self {
            Self::Rust => "Cargo.toml",
            Self::Python => "policy.py",
            Self::Javascript => "policy.js",
        }
    }

    fn files(self, world: World) -> Result<Vec<(&'static str, &'static str)>> {
        let text = match (self, world) {
            (Self::Rust, world) => {
                return Ok(vec![(self.mark(), CARGO), ("src/lib.rs", RUST[world as usize])]);
            }
            (Self::Python, World::Placement) => PYTHON,
            (Self::Javascript, World::Placement) => JAVASCRIPT,
            (language, world) => {
                bail!("there is no template of {world:?} in {language:?}, expected placement")
            }
        };
        Ok(vec![(self.mark(), text)])
    }
}

#[derive(clap::Args)]
pub(crate) struct NewArguments {
    /// Folder to make. Its last part names the policy: small letters, digits and dashes.
    folder: PathBuf,
    /// What it decides.
    #[arg(long, value_enum, default_value_t = World::Placement)]
    world: World,
    /// What to write it in.
    #[arg(long, value_enum, default_value_t = Language::Rust)]
    language: Language,
}

pub(crate) fn new(arguments: &NewArguments) -> Result<ExitCode> {
    let folder = &arguments.folder;
    let name = name(folder)?;
    ensure!(!folder.exists(), "{} exists, expected a folder to be made", folder.display());
    let files = arguments.language.files(arguments.world)?;
    let contract = CONTRACT.iter().map(|(file, text)| (format!("wit/{file}"), *text));
    for (file, text) in
        files.into_iter().map(|(file, text)| (file.to_owned(), text)).chain(contract)
    {
        let path = folder.join(file);
        fs::create_dir_all(path.parent().unwrap_or(folder))?;
        let text = text.replace(PLACEHOLDER, &name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    println!(
        "{} is a policy that works; make its component: moeplane-policy build {0}",
        folder.display()
    );
    Ok(ExitCode::SUCCESS)
}

fn name(folder: &Path) -> Result<String> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(known);
    ensure!(good, "{name:?} is no name, expected small letters, digits and dashes");
    Ok(name)
}

#[derive(clap::Args)]
pub(crate) struct BuildArguments {
    /// The policy's folder.
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// The component; in the policy's folder and of its name if not given.
    #[arg(long)]
    output: Option<PathBuf>,
    /// World of a policy in Python or JavaScript.
    #[arg(long, value_enum, default_value_t = World::Placement)]
    world: World,
}

pub(crate) fn build(arguments: &BuildArguments) -> Result<ExitCode> {
    let folder = &arguments.folder;
    let folder = folder.canonicalize().with_context(|| folder.display().to_string())?;
    let output = match &arguments.output {
        Some(output) => std::path::absolute(output)?,
        None => folder
            .join(folder.file_name().context("a folder without a name")?)
            .with_extension("wasm"),
    };
    let language =
        Language::ALL.into_iter().find(|language| folder.join(language.mark()).is_file());
    let language = language.with_context(|| {
        format!("{} has no policy, expected Cargo.toml, policy.py or policy.js", folder.display())
    })?;
    // Beside its place until it has passed, so that what is there is a policy.
    let draft = tempfile::Builder::new().suffix(".wasm").tempfile()?;
    let world = arguments.world.to_possible_value().context("a world without a name")?;
    let component = match language {
        Language::Rust => build::component(&folder.join("Cargo.toml"))?,
        Language::Python => {
            let mut tool = tool(&folder, "componentize-py", "pip install componentize-py==0.25.1");
            tool.command.args(["-d", "wit", "-w", world.get_name(), "componentize"]);
            tool.command.args(["--stub-wasi", "policy", "-o"]).arg(draft.path());
            tool.run()?;
            fs::read(draft.path())?
        }
        Language::Javascript => {
            let mut tool = tool(&folder, "componentize-qjs", "npm install componentize-qjs@0.4.5");
            tool.command.args(["-w", "wit", "-j", "policy.js", "-n", world.get_name()]);
            tool.command.args(["--stub-wasi", "--sync", "--opt-size", "-o"]).arg(draft.path());
            tool.run()?;
            fs::read(draft.path())?
        }
    };
    let passed = gate::check(&component)?;
    // An unchanged file keeps its time, so that nothing is done again because of it.
    if fs::read(&output).ok().as_ref() != Some(&component) {
        if let Some(folder) = output.parent() {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        fs::write(&output, &component).with_context(|| output.display().to_string())?;
    }
    let (world, bytes) = (passed.kind.world(), component.len());
    println!("{}: a {world} policy, {bytes} bytes", output.display());
    Ok(ExitCode::SUCCESS)
}

/// Somebody else's tool, and how one gets it.
struct Tool {
    command: Command,
    name: &'static str,
    advice: &'static str,
}

/// The tool as npm installs it beside a policy, or wherever programs are looked for.
fn tool(folder: &Path, name: &'static str, advice: &'static str) -> Tool {
    let beside = folder.join("node_modules/.bin").join(name);
    let mut command = Command::new(if beside.exists() { beside } else { name.into() });
    command.current_dir(folder);
    Tool { command, name, advice }
}

impl Tool {
    fn run(mut self) -> Result<()> {
        let Self { name, advice, .. } = self;
        // What it says belongs to a person.
        let status = self.command.stdout(std::io::stderr()).status();
        let status = status.with_context(|| format!("{name} did not start; {advice}"))?;
        ensure!(status.success(), "{name} ended with {status}");
        Ok(())
    }
}
