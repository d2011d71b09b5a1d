//! `min_max_mix`: a placement for several workloads of which any may come.

use policy_host::contract::placer::Request;
use policy_host::contract::types::Window;
use policy_host::example;

use crate::load_patiently;
use crate::shipped::built;

/// Two ranks of two slots, four experts; by day the first and the last are busy, by night the second and the last.
fn request(settings: &str) -> Request {
    let mut request = example::placement(settings);
    request.topology.ranks.truncate(2);
    request.topology.slots_per_rank = 2;
    request.model.experts = 4;
    request.costs.clear();
    request.layers.truncate(1);
    request.layers[0].placement = vec![0, 1, 2, 3];
    let recorded = request.windows.remove(0);
    let window = |workload: &str, load: [f32; 4]| Window {
        workload: workload.to_owned(),
        load: load.to_vec(),
        distinct_experts: Vec::new(),
        ..recorded.clone()
    };
    request.windows = vec![
        window("day", [4000.0, 4000.0, 1000.0, 1000.0]),
        window("night", [1000.0, 4000.0, 4000.0, 1000.0]),
    ];
    request
}

#[test]
fn the_worst_workload_is_what_counts() {
    let Some(bytes) = built("min_max_mix") else { return };
    let policy = load_patiently(&bytes).unwrap();
    let plan = policy.decide(&request("{}")).unwrap().value;
    let [change] = &plan.changes[..] else { panic!("{plan:?}") };
    // Expert 1 apart from 0 and from 2: no workload has two busy experts on a rank.
    let with_1 = change.placement.chunks(2).find(|row| row.contains(&1)).unwrap();
    assert!(with_1.contains(&3), "{change:?}");
    assert!((change.max_over_mean.before - 1.6).abs() < 1e-6, "{change:?}");
    assert!((change.max_over_mean.after - 1.0).abs() < 1e-6, "{change:?}");
    // Without the day, what is in force is even enough for the night's 5000 rows a rank.
    let night = policy.decide(&request(r#"{"workloads":{"day":0}}"#)).unwrap().value;
    assert!(night.changes.is_empty(), "{night:?}");
    let none = policy.decide(&request(r#"{"workloads":{"day":0,"night":0}}"#)).unwrap_err();
    assert_eq!(none.to_string(), "the policy declines: no workload that counts has a row");
}
