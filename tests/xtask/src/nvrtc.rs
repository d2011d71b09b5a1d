//! NVIDIA's run-time compiler, which compiles device code on a machine without a GPU: the system's, or a
//! package of PyPI in the folder of caches.

use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::build::caches;

/// The package, in the version that kernels were measured with.
const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.88";
/// Where it has the library.
const INSIDE: &str = "nvidia/cu13/lib";

/// Sets `command` up to find the compiler; false where the system has none and pip is not there to get it.
pub(crate) fn with_nvrtc(command: &mut Command) -> Result<bool> {
    let folder = caches("nvrtc")?.join(PACKAGE);
    let library = folder.join(INSIDE);
    if !library.is_dir() && has_pip() {
        // Whole or not at all.
        let beside = folder.with_extension(format!("{}.new", std::process::id()));
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]);
        pip.args(["--root-user-action=ignore", "--target"]);
        ensure!(pip.arg(&beside).arg(PACKAGE).status()?.success(), "pip could not get {PACKAGE}");
        fs::rename(&beside, &folder).with_context(|| folder.display().to_string())?;
    }
    let found = library.is_dir() || system_has_it();
    let known = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = env::split_paths(&known).filter(|path| !path.as_os_str().is_empty());
    command.env("LD_LIBRARY_PATH", env::join_paths(paths.chain([library]))?);
    Ok(found)
}

fn system_has_it() -> bool {
    let known = Command::new("ldconfig").arg("-p").output();
    known.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("libnvrtc.so"))
}

fn has_pip() -> bool {
    let version = Command::new("python3").args(["-m", "pip", "--version"]).output();
    version.is_ok_and(|output| output.status.success())
}
