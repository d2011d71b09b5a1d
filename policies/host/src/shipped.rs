//! The policies that come with moeplane: files `NAME.wasm` in a folder that the programs find by where they are
//! themselves. `cargo xtask policies` makes them; programs build and run without.

use std::path::{Path, PathBuf};

use crate::question::Kind;

/// Their names, and what they decide. The first of a kind is the one to begin with.
pub const POLICIES: [(&str, Kind); 5] = [
    ("greedy_swap", Kind::Placement),
    ("deepseek_eplb", Kind::Placement),
    ("min_max_mix", Kind::Placement),
    ("locality_split", Kind::Routing),
    ("measured_table", Kind::Tactics),
];

/// The folder for a program that is in a folder `bin` or in cargo's `debug` or `release`: `share/moeplane/policies` or
/// `policies` beside that. The first where neither exists.
#[must_use]
pub fn folder(program: &Path) -> PathBuf {
    let above = program.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    let built = above.join("policies");
    if built.is_dir() { built } else { above.join("share/moeplane/policies") }
}

/// The file of the policy called `name`, with dashes or underscores.
#[must_use]
pub fn file(folder: &Path, name: &str) -> PathBuf {
    folder.join(name.replace('-', "_")).with_extension("wasm")
}

/// Names of those that `folder` lacks.
#[must_use]
pub fn absent(folder: &Path) -> Vec<&'static str> {
    let names = POLICIES.into_iter().map(|(name, _)| name);
    names.filter(|name| !file(folder, name).is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_beside_that_of_the_program() {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("bin/moeplane-control");
        let installed = folder(&program);
        assert_eq!(installed, root.path().join("share/moeplane/policies"));
        assert_eq!(absent(&installed), POLICIES.map(|(name, _)| name));
        let built = root.path().join("policies");
        std::fs::create_dir(&built).unwrap();
        assert_eq!(folder(&program), built);
        std::fs::write(built.join("deepseek_eplb.wasm"), "").unwrap();
        assert!(!absent(&built).contains(&"deepseek_eplb"));
        assert_eq!(file(&built, "deepseek-eplb"), built.join("deepseek_eplb.wasm"));
    }
}
