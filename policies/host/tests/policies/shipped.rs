//! The policies that come with moeplane, as `cargo xtask policies` made them, through the host and the command.

use std::path::Path;
use std::process::{Command, Output};

use policy_host::shipped::{POLICIES, file, folder};
use policy_host::{Kind, example};

use crate::load_patiently;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_moeplane-policy");
pub(crate) const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data");

/// Says what is skipped where policies were not built.
#[expect(clippy::print_stderr, reason = "what is skipped is said")]
pub(crate) fn built(name: &str) -> Option<Vec<u8>> {
    let path = file(&folder(Path::new(PROGRAM)), name);
    let bytes = std::fs::read(&path);
    if bytes.is_err() {
        eprintln!("SKIPPED: {} does not exist, run cargo xtask policies", path.display());
    }
    bytes.ok()
}

#[test]
fn each_decides_what_it_says_and_answers_the_example_twice_the_same() {
    for (name, kind) in POLICIES {
        let Some(bytes) = built(name) else { return };
        // Loading asks the example twice.
        let policy = load_patiently(&bytes).unwrap();
        assert_eq!(policy.kind(), kind, "{name}");
        assert_eq!(policy.info().name, name.replace('_', "-"));
        let schema: serde_json::Value =
            serde_json::from_str(&policy.info().settings_schema).unwrap();
        assert_eq!(schema["additionalProperties"], false, "{name}");
        let refused = policy.validate(r#"{"no-such-setting":1}"#).unwrap_err();
        assert!(refused.to_string().contains("/no-such-setting: unknown setting"), "{refused}");
    }
}

fn golden(arguments: &[&str]) -> Output {
    let mut golden = Command::new(PROGRAM);
    let cases = format!("{DATA}/eplb-golden/eplb_golden.json");
    golden.arg("golden").arg(cases).args(arguments).output().unwrap()
}

#[test]
fn deepseek_eplb_reproduces_the_worked_examples() {
    if built("deepseek_eplb").is_none() {
        return;
    }
    let first = golden(&["--policy", "deepseek_eplb"]);
    let text = String::from_utf8(first.stdout.clone()).unwrap();
    assert!(first.status.success(), "{text}");
    assert!(text.ends_with("2 of 2 cases equal\n"), "{text}");
    // Fuel is part of what is printed; times are not.
    assert_eq!(first.stdout, golden(&["--policy", "deepseek-eplb"]).stdout);
    // With its duplicates mended, the second one differs: the comparison looks.
    let mended = golden(&["--policy", "deepseek_eplb", "--settings", "{}"]);
    assert!(!mended.status.success());
    assert!(String::from_utf8(mended.stdout).unwrap().contains("1 of 2 cases equal"));
}

#[test]
fn deepseek_eplb_keeps_slots_and_a_budget_and_declines_what_it_cannot() {
    let Some(bytes) = built("deepseek_eplb") else { return };
    let policy = load_patiently(&bytes).unwrap();
    let mut request = example::placement("{}");
    let plan = policy.decide(&request).unwrap().value;
    let [change, other] = &plan.changes[..] else { panic!("{plan:?}") };
    assert!(change.max_over_mean.after < change.max_over_mean.before, "{plan:?}");
    assert!(plan.explanation.starts_with("2 of 2 layers"), "{plan:?}");
    // The layer that is busier comes first, and the budget reaches only it.
    request.budget.layers = Some(1);
    let one = policy.decide(&request).unwrap().value;
    assert_eq!((one.changes.len(), one.changes[0].layer), (1, change.layer));
    assert_ne!(change.layer, other.layer);
    request.budget.moves_per_layer = Some(0);
    let none = policy.decide(&request).unwrap().value;
    assert!(none.changes.is_empty(), "{none:?}");
    assert!(none.explanation.contains("2 more do not fit"), "{none:?}");
    // What is in force is what it would plan: nothing changes.
    let mut settled = example::placement("{}");
    for layer in &mut settled.layers {
        let found = plan.changes.iter().find(|change| change.layer == layer.id).unwrap();
        layer.placement.clone_from(&found.placement);
    }
    assert!(policy.decide(&settled).unwrap().value.changes.is_empty());
    let mut quiet = example::placement("{}");
    quiet.windows.clear();
    let declined = policy.decide(&quiet).unwrap_err();
    assert_eq!(declined.to_string(), "the policy declines: no window has counted anything");
    assert!(!declined.is_fault());
}

/// Components made when the contract was frozen: a host that does not run them has broken it.
#[test]
fn components_of_0_1_run_for_ever() {
    for kind in Kind::ALL {
        let path = format!("{DATA}/policy-v0.1/{}.wasm", kind.world());
        let policy = load_patiently(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(policy.kind(), kind);
    }
    let path = format!("{DATA}/policy-v0.1/placement.wasm");
    let policy = load_patiently(&std::fs::read(path).unwrap()).unwrap();
    let plan = policy.decide(&example::placement("{}")).unwrap().value;
    let expected = std::fs::read(format!("{DATA}/policy-v0.1/plan.json")).unwrap();
    assert_eq!(plan, serde_json::from_slice(&expected).unwrap());
}
