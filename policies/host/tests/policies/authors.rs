//! What authors of policies meet: `new`, `build`, `check`, `test`, `explain`, `bench`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use policy_host::example;

use crate::shipped::{DATA, PROGRAM, built};

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(PROGRAM).current_dir(folder).args(arguments).output().unwrap()
}

/// What a command prints that succeeds.
fn printed(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    assert!(!output.status.success(), "{arguments:?} was not refused");
    String::from_utf8(output.stderr).unwrap()
}

/// Builds as an author does, but with the crates that this repository has locked and fetched.
fn build(folder: &Path, name: &str) {
    let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.lock");
    fs::copy(lock, folder.join(name).join("Cargo.lock")).unwrap();
    let mut build = Command::new(PROGRAM);
    build.current_dir(folder).args(["build", name]).env("CARGO_NET_OFFLINE", "true");
    build.env("CARGO_TARGET_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("authors"));
    let output = build.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_new_policy_has_its_name_and_the_contract_and_works() {
    // Where policies cannot be built, it has been said.
    if built("greedy_swap").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for world in ["placement", "routing", "tactics"] {
        let name = format!("a-{world}-one");
        printed(folder, &["new", &name, "--world", world]);
        for file in ["placement", "routing", "tactics", "types"] {
            let (copy, of) = (format!("{name}/wit/{file}.wit"), format!("wit/v0.1/{file}.wit"));
            let of = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(of);
            assert_eq!(fs::read(folder.join(copy)).unwrap(), fs::read(of).unwrap());
        }
        build(folder, &name);
        let component = format!("{name}/{name}.wasm");
        let checked = printed(folder, &["check", &component]);
        assert!(checked.starts_with(&format!("{name} 0.1.0: ")), "{checked}");
        assert!(checked.contains(&format!("kind      {world}, contract 0.1.0")), "{checked}");
        assert!(!printed(folder, &["explain", &component]).is_empty());
    }
    let windows = format!("{DATA}/esft-deepseek-v2-lite/windows_1024.json");
    let component = "a-placement-one/a-placement-one.wasm";
    let tested = printed(folder, &["test", component, "--windows", &windows]);
    assert!(tested.contains("31 plans, twice the same, max/mean 1.3"), "{tested}");
}

#[test]
fn templates_of_other_languages_work() {
    let tools = [("python", "componentize-py"), ("javascript", "componentize-qjs")];
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (language, tool) in tools {
        let name = format!("in-{language}");
        printed(folder, &["new", &name, "--language", language]);
        let output = run(folder, &["build", &name]);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        if errors.contains(&format!("{tool} did not start")) {
            let advice = "cargo xtask policy-templates gets it";
            eprintln!("SKIPPED: a policy in {language}, {tool} is not installed: {advice}");
            continue;
        }
        assert!(output.status.success(), "{errors}");
        let explained = printed(folder, &["explain", &format!("{name}/{name}.wasm")]);
        assert!(explained.starts_with("2 of 2 layers change\n"), "{explained}");
    }
}

#[test]
fn what_cannot_be_a_policy_is_said_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::create_dir(folder.join("mine")).unwrap();
    let found = refused(folder, &["new", "mine"]);
    assert!(found.contains("mine exists, expected a folder to be made"), "{found}");
    let found = refused(folder, &["new", "My_Policy"]);
    assert!(found.contains("\"My_Policy\" is no name, expected small letters"), "{found}");
    let found = refused(folder, &["new", "x", "--language", "python", "--world", "routing"]);
    assert!(found.contains("there is no template of Routing in Python"), "{found}");
    assert!(!folder.join("x").exists());
    let found = refused(folder, &["build", "mine"]);
    assert!(
        found.contains("has no policy, expected Cargo.toml, policy.py or policy.js"),
        "{found}"
    );
    fs::write(folder.join("text.wasm"), "(module)").unwrap();
    let found = refused(folder, &["check", "text.wasm"]);
    assert!(found.contains("text.wasm: this is no component: "), "{found}");
    fs::write(folder.join("module.wasm"), b"\0asm\x01\0\0\0").unwrap();
    let found = refused(folder, &["check", "module.wasm"]);
    assert!(found.contains("it is a core module, expected a component"), "{found}");
    let giant = fs::File::create(folder.join("giant.wasm")).unwrap();
    giant.set_len(200 << 20).unwrap();
    let found = refused(folder, &["check", "giant.wasm"]);
    assert!(found.contains("has 209715200 bytes, expected at most 33554432"), "{found}");
    assert!(refused(folder, &["check", "nowhere.wasm"]).contains("No such file"));
}

#[test]
fn answers_on_record_are_compared() {
    let Some(bytes) = built("greedy_swap") else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("policy.wasm"), bytes).unwrap();
    // A request to begin with is the example; one that is declined has an answer too.
    let request = printed(folder, &["explain", "policy.wasm", "--print-request"]);
    let mut quiet = example::placement("{}");
    assert_eq!(quiet, serde_json::from_str(&request).unwrap());
    quiet.windows.clear();
    let requests = folder.join("requests");
    fs::create_dir(&requests).unwrap();
    fs::write(requests.join("usual.request.json"), &request).unwrap();
    let quiet = serde_json::to_string(&quiet).unwrap();
    fs::write(requests.join("quiet.request.json"), quiet).unwrap();
    let test = ["test", "policy.wasm", "--requests", "requests"];
    let first = printed(folder, &test);
    assert!(
        first.contains("ok  quiet: twice the same") && first.contains("ok  usual: "),
        "{first}"
    );
    printed(folder, &[&test[..], &["--write-answers"]].concat());
    assert!(printed(folder, &test).contains("ok  usual: as on record"));
    let answer = requests.join("usual.answer.json");
    let other = fs::read_to_string(&answer).unwrap().replacen("\"layer\": 1", "\"layer\": 2", 1);
    fs::write(&answer, other).unwrap();
    let changed = run(folder, &test);
    assert!(!changed.status.success());
    let changed = String::from_utf8(changed.stdout).unwrap();
    assert!(changed.contains("BAD usual: ") && changed.contains("expects another answer"));
    assert!(changed.contains("ok  quiet: as on record"), "{changed}");
    fs::write(requests.join("usual.request.json"), "{}").unwrap();
    let broken = String::from_utf8(run(folder, &test).stdout).unwrap();
    assert!(broken.contains("BAD usual: ") && broken.contains("missing field"), "{broken}");
}

#[test]
fn reasons_and_costs_are_shown() {
    let Some(bytes) = built("greedy_swap") else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("policy.wasm"), bytes).unwrap();
    let explain = |settings: &str| run(folder, &["explain", "policy.wasm", "--settings", settings]);
    let told = String::from_utf8(explain(r#"{"dead-zone":1,"noise":0}"#).stdout).unwrap();
    assert!(told.contains("times the mean rows, afterwards"), "{told}");
    assert!(told.contains("ms a call, afterwards") && told.contains("to spread load"), "{told}");
    let wrong = String::from_utf8(explain(r#"{"dead-zone":0}"#).stderr).unwrap();
    assert!(wrong.contains("/dead-zone: got 0, expected a number from 1 to 10"), "{wrong}");
    let json = printed(folder, &["explain", "policy.wasm", "--json"]);
    let plan: policy_host::contract::placer::Plan = serde_json::from_str(&json).unwrap();
    assert!(!plan.explanation.is_empty());
    let bench = printed(folder, &["bench", "policy.wasm", "--calls", "20"]);
    assert!(bench.contains("median of 20") && bench.contains("the limit is 2000000000"), "{bench}");
}
