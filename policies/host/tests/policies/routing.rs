//! `locality_split`: where tokens of an expert with several replicas go.

use policy_host::contract::splitter::{Request, Splits};
use policy_host::{Component, example};

use crate::load_patiently;
use crate::shipped::built;

/// Two ranks that both have expert 0, each with another one beside; rank 0 brings all rows of expert 0 in this share.
fn request(settings: &str, share: f32) -> Request {
    let mut request = example::routing(settings);
    request.topology.ranks.truncate(2);
    request.topology.slots_per_rank = 2;
    request.model.experts = 3;
    request.layers.truncate(1);
    request.layers[0].placement = vec![0, 1, 2, 0];
    request.windows.truncate(1);
    let window = &mut request.windows[0];
    window.load = vec![1000.0, 100.0, 100.0];
    window.distinct_experts.clear();
    let from = |part: f32| [1000.0 * part, 100.0 * part, 100.0 * part];
    request.source_load = [from(share), from(1.0 - share)].concat();
    request
}

fn ask(policy: &Component, request: &Request) -> Splits {
    policy.decide(request).unwrap().value
}

#[test]
fn tokens_stay_near_as_far_as_ranks_stay_even() {
    let Some(bytes) = built("locality_split") else { return };
    let policy = load_patiently(&bytes).unwrap();
    // Both bring the same: all stay where they are. Replicas come by experts: 0 on rank 0 and on rank 1, then 1, 2.
    let near = ask(&policy, &request("{}", 0.5));
    assert_eq!(near.layers[0].sources, 2);
    assert_eq!(near.layers[0].weights, [65535, 0, 65535, 65535, 0, 65535, 65535, 65535]);
    assert!(near.explanation.contains("fullest rank is 1.000 of even"), "{near:?}");
    // One brings all: only as much leaves as evenness asks for, 1.05 of 600 rows.
    let even = ask(&policy, &request("{}", 1.0));
    let [stays, leaves] = [even.layers[0].weights[0], even.layers[0].weights[1]].map(f64::from);
    assert!((stays / (stays + leaves) - 0.53).abs() < 1e-3, "{even:?}");
    let one = ask(&policy, &request(r#"{"locality":"even"}"#, 1.0));
    assert_eq!((one.layers[0].sources, &one.layers[0].weights[..2]), (1, &[65535, 65535][..]));
    // Nothing known of sources: all bring the same.
    let unknown = Request { source_load: Vec::new(), ..request("{}", 1.0) };
    assert_eq!(ask(&policy, &unknown).layers, near.layers);
    let mut odd = request("{}", 1.0);
    odd.source_load.pop();
    let refused = policy.decide(&odd).unwrap_err().to_string();
    assert!(refused.ends_with("5 loads by source, expected none or 6"), "{refused}");
}
