//! `measured_table`: which tactic runs for how many tokens.

use policy_host::contract::chooser::Request;
use policy_host::{Component, example};

use crate::load_patiently;
use crate::shipped::built;

fn choices(policy: &Component, request: &Request) -> Vec<(u32, Option<f32>)> {
    let table = policy.decide(request).unwrap().value;
    table.choices.iter().map(|choice| (choice.candidate, choice.expected_us)).collect()
}

#[test]
fn the_fastest_runs_and_what_is_in_force_stays_unless_clearly_slower() {
    let Some(bytes) = built("measured_table") else { return };
    let policy = load_patiently(&bytes).unwrap();
    let mut request = example::tactics("{}");
    let fastest = [(1, Some(60.0)), (0, Some(400.0)), (0, Some(400.0))];
    assert_eq!(choices(&policy, &request), fastest);
    request.previous = vec![0, 0, 2];
    assert_eq!(choices(&policy, &request), fastest, "60 us are clearly less than 90");
    request.context.settings = r#"{"margin":0.5}"#.to_owned();
    assert_eq!(choices(&policy, &request)[0], (0, Some(90.0)), "but not half of them");
    request.context.settings = r#"{"runs-min":100}"#.to_owned();
    assert_eq!(choices(&policy, &request), [(0, None), (0, None), (2, None)]);
    request.previous.clear();
    assert_eq!(choices(&policy, &request), [(0, None); 3]);
    request.context.settings = r#"{"workspace-mb-max":1}"#.to_owned();
    request.candidates[1].workspace_bytes = 2_000_000;
    assert_eq!(choices(&policy, &request)[0], (0, Some(90.0)));
    request.previous = vec![0];
    let refused = policy.decide(&request).unwrap_err().to_string();
    assert!(refused.ends_with("1 choices in force, expected none or 3"), "{refused}");
}
