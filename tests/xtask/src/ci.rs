//! `cargo xtask ci`: the steps, in order, until one fails.

use std::env;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::build::{
    WITH_COMPILER, build_programs, cargo, delete_programs, has_nextest, root, target,
};
use crate::nvrtc::with_nvrtc;
use crate::wasm::with_target;

/// Checks and tests that passed and failed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Whether all steps passed.
pub(crate) fn run() -> Result<bool> {
    if env::var_os("CI").is_some_and(|value| value == "true") {
        delete_programs()?;
    }
    let mut total = Tally::default();
    let mut report = Vec::new();
    let mut all_passed = true;
    for (name, command) in steps()? {
        println!("== {name}");
        let started = Instant::now();
        let (success, tests) = watch(command).with_context(|| name.to_owned())?;
        // A step without tests of its own counts as one check; one that failed counts as failed,
        // whatever its tests say.
        let counted = tests.passed + tests.failed > 0;
        total += tests;
        total += match (success, counted) {
            (true, true) => Tally::default(),
            (true, false) => Tally { passed: 1, failed: 0 },
            (false, _) => Tally { passed: 0, failed: usize::from(tests.failed == 0) },
        };
        let word = if success { "passed" } else { "FAILED" };
        report.push(format!("{name:<8} {word} after {:.1} s", started.elapsed().as_secs_f64()));
        if !success {
            all_passed = false;
            break;
        }
    }
    println!("== summary");
    report.iter().for_each(|line| println!("{line}"));
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(all_passed)
}

fn steps() -> Result<Vec<(&'static str, Command)>> {
    let mut clippy = cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--locked"]);
    clippy.args(["--", "--deny", "warnings"]);
    let mut lint_compiler = cargo(&["clippy", "--quiet", "--all-targets", "--locked"]);
    lint_compiler.args(WITH_COMPILER).args(["--", "--deny", "warnings"]);
    let test = || if has_nextest() { cargo(&["nextest", "run"]) } else { cargo(&["test"]) };
    let mut tests = test();
    tests.args(["--workspace", "--locked", "--exclude", "policy-host"]);
    let mut guests = Command::new(env::current_exe()?);
    guests.arg("policies");
    let mut policies = test();
    policies.arg("--locked").args(WITH_COMPILER);
    // Its tests build policies as authors do.
    with_target(&mut policies)?;
    let mut demo = Command::new(target()?.join("debug/moeplane-cases"));
    demo.args(["demo", "--once", "--seconds", "4"]).arg(root().join("tests/data/tiny-kjv-moe"));
    let mut kernels = Command::new(target()?.join("debug/moeplane-cases"));
    kernels.arg("compile-kernels");
    let mut steps = vec![
        ("format", cargo(&["fmt", "--all", "--check"])),
        ("clippy", clippy),
        ("clippy", lint_compiler),
        ("build", build_programs()),
        ("guests", guests),
        ("tests", tests),
        ("policies", policies),
        ("demo", demo),
    ];
    match with_nvrtc(&mut kernels)? {
        true => steps.push(("kernels", kernels)),
        false => println!(
            "device code is not compiled: the system has no NVRTC, and python3 no pip to get it"
        ),
    }
    Ok(steps)
}

/// Runs a command, passes its output on and counts the tests that it reports.
fn watch(mut command: Command) -> Result<(bool, Tally)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let errors = thread::spawn(move || pass_on(stderr));
    let mut tests = pass_on(stdout);
    tests += errors.join().unwrap_or_default();
    Ok((child.wait()?.success(), tests))
}

fn pass_on(stream: Option<impl Read>) -> Tally {
    let mut tally = Tally::default();
    for line in stream.into_iter().flat_map(|stream| BufReader::new(stream).lines()) {
        let Ok(line) = line else { break };
        println!("{line}");
        tally += counts(&line);
    }
    tally
}

/// What a closing line of `cargo test` or of nextest says.
fn counts(line: &str) -> Tally {
    let line = line.trim_start();
    let Some(rest) = ["test result:", "Summary ["].iter().find_map(|p| line.strip_prefix(p)) else {
        return Tally::default();
    };
    let words: Vec<&str> = rest.split_whitespace().collect();
    let before = |what: &str| {
        let at = words.iter().position(|w| w.trim_end_matches([',', ';']) == what)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    Tally { passed: before("passed").unwrap_or(0), failed: before("failed").unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted_and_others_are_not() {
        let cases = [
            ("test result: ok. 74 passed; 0 failed; 0 ignored; 0 measured", (74, 0)),
            ("test result: FAILED. 7 passed; 2 failed; 0 ignored", (7, 2)),
            ("     Summary [   1.3s] 81 tests run: 81 passed, 0 skipped", (81, 0)),
            (
                "     Summary [   1.3s] 81 tests run: 79 passed (1 slow), 2 failed, 0 skipped",
                (79, 2),
            ),
            ("a line that says 3 passed, 4 failed", (0, 0)),
        ];
        for (line, (passed, failed)) in cases {
            assert_eq!(counts(line), Tally { passed, failed }, "{line}");
        }
    }
}
