//! The standard library for wasm: rustup's, or, for a toolchain that rustup has none for, one made once of the sources of
//! the very same compiler, in the folder of caches. No toolchain is changed and nothing is installed by it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::build::caches;

const TARGET: &str = "wasm32-unknown-unknown";

/// Debian's suites that may have the sources of the compiler in use, the most settled first.
const SUITES: [&str; 3] = ["trixie-backports", "forky", "sid"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where its package has the library, and how deep.
const PACKAGED: &str = "./usr/src/*/library/*";
const PACKAGED_DEPTH: &str = "--strip-components=5";

/// The crate whose build makes the library.
const EMPTY_CRATE: &str = "[package]\nname = \"empty\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\
                           [profile.release]\ncodegen-units = 1\npanic = \"abort\"\n[workspace]\n";

/// Sets `command`, which runs cargo, up to find the library.
pub(crate) fn with_target(command: &mut Command) -> Result<()> {
    let installed = PathBuf::from(rustc(&["--print", "target-libdir", "--target", TARGET])?);
    if has_core(&installed) {
        return Ok(());
    }
    let own = Own::of_this_compiler()?;
    if !has_core(&libraries(&own.sysroot)) {
        if added_by_rustup() && has_core(&installed) {
            return Ok(());
        }
        own.make().with_context(|| format!("run: rustup target add {TARGET}"))?;
    }
    let flags = format!("--sysroot={}", own.sysroot.display());
    command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS", flags);
    Ok(())
}

fn has_core(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.any(|name| name.starts_with("libcore-") && name.ends_with(".rlib"))
}

fn added_by_rustup() -> bool {
    let mut rustup = Command::new("rustup");
    let status = rustup.args(["target", "add", TARGET]).stdout(std::io::stderr()).status();
    status.is_ok_and(|status| status.success())
}

/// The library that is made here, of the compiler's own release.
struct Own {
    release: String,
    sysroot: PathBuf,
}

impl Own {
    fn of_this_compiler() -> Result<Self> {
        let version = rustc(&["-vV"])?;
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name));
        let release = field("release: ").context("rustc names no release")?.to_owned();
        let commit: String = field("commit-hash: ").unwrap_or("unknown").chars().take(9).collect();
        let sysroot = caches("wasm")?.join(format!("{release}-{commit}"));
        Ok(Self { release, sysroot })
    }

    fn make(&self) -> Result<()> {
        // Made beside and renamed, so that what is there is whole.
        let draft = self.sysroot.with_extension(format!("{}.new", std::process::id()));
        let made = make(&draft, &self.release);
        let made = made.and_then(|made| match fs::rename(made, &self.sysroot) {
            // Another process may have been as quick.
            Err(error) if !has_core(&libraries(&self.sysroot)) => Err(error.into()),
            _ => Ok(()),
        });
        fs::remove_dir_all(&draft)?;
        made
    }
}

fn libraries(sysroot: &Path) -> PathBuf {
    sysroot.join("lib/rustlib").join(TARGET).join("lib")
}

fn make(draft: &Path, release: &str) -> Result<PathBuf> {
    let (empty, sysroot) = (draft.join("empty"), draft.join("sysroot"));
    fs::create_dir_all(empty.join("src"))?;
    let component = PathBuf::from(rustc(&["--print", "sysroot"])?);
    let component = component.join("lib/rustlib/src/rust/library");
    let source = if component.join("core").is_dir() { component } else { debian(draft, release)? };
    fs::write(empty.join("Cargo.toml"), EMPTY_CRATE)?;
    fs::write(empty.join("src/lib.rs"), "")?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&empty);
    cargo.args(["build", "--quiet", "--release", "--target", TARGET, "--target-dir", "target"]);
    cargo.arg("-Zbuild-std=std,panic_abort");
    // Only the library is built with unstable features. Its bitcode lets policies be optimised together with it.
    cargo.env("RUSTC_BOOTSTRAP", "1").env("__CARGO_TESTS_ONLY_SRC_ROOT", &source);
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    // Policies name where the library panics, and not where it was made.
    let flags = format!(
        "-Cembed-bitcode=yes -Zforce-unstable-if-unmarked --remap-path-prefix={}=/library",
        source.display()
    );
    cargo.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS", flags);
    run(&mut cargo)?;
    let into = libraries(&sysroot);
    fs::create_dir_all(&into)?;
    for entry in fs::read_dir(empty.join("target").join(TARGET).join("release/deps"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".rlib") && !name.starts_with("libempty-") {
            fs::copy(&path, into.join(name))?;
        }
    }
    Ok(sysroot)
}

/// Sources of the library from Debian's package of the same release. The mirror is that of this machine's apt; lists and
/// package stay below `draft`.
fn debian(draft: &Path, release: &str) -> Result<PathBuf> {
    let mirror = mirror().context("no mirror of Debian is configured")?;
    let library = draft.join("library");
    for folder in ["lists/partial", "cache/archives/partial", "library"] {
        fs::create_dir_all(draft.join(folder))?;
    }
    let apt = |program: &str| {
        let mut command = Command::new(program);
        for (option, path) in [
            ("Dir::Etc::sourcelist", draft.join("sources.list")),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::State::lists", draft.join("lists")),
            ("Dir::Cache", draft.join("cache")),
        ] {
            command.arg("-o").arg(format!("{option}={}", path.display()));
        }
        command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-qq"]);
        command.args(["-o", "Acquire::Retries=5"]);
        command.args(["-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"]);
        command.current_dir(draft);
        command
    };
    for suite in SUITES {
        let source = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        fs::write(draft.join("sources.list"), source)?;
        if run(apt("apt-get").arg("update")).is_err() {
            continue;
        }
        let offered = apt("apt-cache").args(["madison", "rust-src"]).output()?;
        let offered = String::from_utf8_lossy(&offered.stdout).into_owned();
        let mut versions = offered.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
        let wanted = format!("{release}+");
        if let Some(found) = versions.find(|version| version.starts_with(&wanted)) {
            run(apt("apt-get").arg("download").arg(format!("rust-src={found}")))?;
            unpack(draft, &library)?;
            return Ok(library);
        }
    }
    bail!("Debian has no sources of Rust {release}")
}

/// Takes the library out of the package in `draft`.
fn unpack(draft: &Path, library: &Path) -> Result<()> {
    let mut packages = fs::read_dir(draft)?.flatten().map(|entry| entry.path());
    let package = packages.find(|path| path.extension().is_some_and(|end| end == "deb"));
    let package = package.context("apt-get downloaded no package")?;
    let mut files = Command::new("dpkg-deb");
    let mut files = files.arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
    let mut tar = Command::new("tar");
    tar.args(["-x", PACKAGED_DEPTH, "--wildcards", PACKAGED]).current_dir(library);
    tar.stdin(files.stdout.take().context("dpkg-deb has no output")?);
    let unpacked = run(&mut tar);
    ensure!(files.wait()?.success(), "dpkg-deb could not read the package");
    unpacked
}

/// The mirror that apt is configured with.
fn mirror() -> Option<String> {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    files.sort();
    files.push(PathBuf::from("/etc/apt/sources.list"));
    let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    texts.into_iter().find_map(|text| text.lines().find_map(address))
}

/// The address in a line of either form: `URIs: ADDRESS`, `deb [options] ADDRESS suite part`.
fn address(line: &str) -> Option<String> {
    let words = line.strip_prefix("URIs:").or_else(|| line.strip_prefix("deb "))?;
    words.split_whitespace().find(|word| word.contains("://")).map(str::to_owned)
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let output = Command::new("rustc").args(arguments).output().context("rustc did not start")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs a command whose words all belong to a person.
fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.stdout(std::io::stderr()).status().with_context(|| program.clone())?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn mirrors_are_read_in_both_forms() {
        assert_eq!(address("URIs: http://a.test/debian"), Some("http://a.test/debian".into()));
        let line = "deb [signed-by=/x.gpg] https://b.test/debian sid main";
        assert_eq!(address(line), Some("https://b.test/debian".into()));
        assert_eq!(address("Suites: sid"), None);
        assert_eq!(address("# deb http://a.test sid main"), None);
    }
}
