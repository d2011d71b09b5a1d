//! The same source, linked in and as a component, gives the same plan, bit for bit.

use deepseek_eplb::DeepseekEplb;
use greedy_swap::GreedySwap;
use policy_guest::placement::placer::Guest;
use policy_host::contract::placer::{Plan, Request};

use crate::load_patiently;
use crate::question::large;
use crate::shipped::built;

/// Records of host and guest are generated from the same folder, each for its side.
pub(crate) fn natively<P: Guest>(request: &Request) -> Plan {
    let request = serde_json::from_value(serde_json::to_value(request).unwrap()).unwrap();
    let plan = P::decide(request).unwrap();
    serde_json::from_value(serde_json::to_value(plan).unwrap()).unwrap()
}

#[test]
fn components_plan_as_the_same_source_does_natively() {
    let cases = [
        ("deepseek_eplb", "{}", natively::<DeepseekEplb> as fn(&Request) -> Plan),
        ("greedy_swap", "{}", natively::<GreedySwap>),
    ];
    for (name, settings, native) in cases {
        let Some(bytes) = built(name) else { return };
        let request = large(settings);
        let plan = load_patiently(&bytes).unwrap().decide(&request).unwrap().value;
        assert_eq!(plan.changes.len(), 61, "{name}: {}", plan.explanation);
        assert!(plan == native(&request), "{name} plans differently as a component");
    }
}
