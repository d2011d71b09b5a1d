//! Configuration files of control: what is in force, and what is refused.

use std::process::{Command, Output};

use tests::control_process::Control;
use tests::worker_process::program;

use crate::assert_says;

fn check(text: &str, options: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.toml");
    std::fs::write(&path, text).unwrap();
    let mut check = Command::new(program("moeplane-control").unwrap());
    check.arg("check").arg("--config").arg(path).args(options).output().unwrap()
}

#[test]
fn what_is_in_force_can_be_read_back() {
    let printed = check("data = 'd'\n[placements]\ng = 'p.json'\n", &["--window-ms", "500"]);
    let text = String::from_utf8(printed.stdout).unwrap();
    assert_says(&text, &["window_ms = 500", "listen = \"127.0.0.1:7410\"", "g = \"p.json\""]);
    let again = check(&text, &[]);
    assert_eq!(String::from_utf8(again.stdout).unwrap(), text);
}

#[test]
fn what_cannot_be_is_named_with_its_line() {
    for (text, options, expected) in [
        (
            "data = 'd'\nwindow = 5\n",
            &[][..],
            &["control.toml", "line 2", "unknown field `window`"][..],
        ),
        (
            "data = 'd'\n\nwindow_ms = 5 # quick\n",
            &[],
            &["line 3: window_ms is 5, expected 100 to"],
        ),
        (
            "data = 'd'\nlisten = '0.0.0.0:1'\n",
            &[],
            &["line 2: listen is 0.0.0.0:1", "tls is not set"],
        ),
        (
            "data = 'd'\nwindow_ms = 500\n",
            &["--window-ms", "6"],
            &["error: window_ms is 6, expected"],
        ),
    ] {
        let refused = check(text, options);
        assert_eq!(refused.status.code(), Some(64), "{text}");
        assert_says(&String::from_utf8(refused.stderr).unwrap(), expected);
    }
}

#[test]
fn policies_that_are_absent_are_named_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let policies = folder.path().display().to_string();
    let control = Control::start_with(&["--policies", &policies]).unwrap();
    assert_says(&control.log(), &["policies are absent", "deepseek_eplb", &policies]);
}
