//! DeepSeek's algorithm against the worked examples of its repository, and the mending of duplicates.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use planning::deepseek::{Request, rebalance};
use planning::layer::{EMPTY, PlanError, Shape, max_over_mean, rank_loads};
use planning::repair::{Remedy, Repair, repair};
use serde_json::Value;

const GOLDEN: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../tests/data/eplb-golden/eplb_golden.json"
));

#[expect(clippy::cast_possible_truncation, reason = "float32 is what the algorithm computes in")]
fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

fn flat(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(flat).collect(),
        number => vec![number.as_f64().unwrap()],
    }
}

fn size(case: &Value, name: &str) -> usize {
    usize::try_from(case[name].as_u64().unwrap()).unwrap()
}

fn request(case: &Value) -> (Request, Vec<f32>) {
    let weight = single(&flat(&case["weight"]));
    let layers = case["weight"].as_array().unwrap().len();
    let ranks = size(case, "num_gpus");
    let shape = Shape {
        experts: weight.len() / layers,
        ranks,
        slots_per_rank: size(case, "num_replicas") / ranks,
    };
    let groups = size(case, "num_groups");
    (Request { layers, shape, groups, nodes: size(case, "num_nodes") }, weight)
}

#[test]
fn both_worked_examples_are_reproduced() {
    let cases: Value = serde_json::from_str(GOLDEN).unwrap();
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 2);
    for case in cases {
        let (request, weight) = request(case);
        let plan = rebalance(&request, &weight).unwrap();
        let same = |ours: Vec<f64>, name: &str| assert_eq!(ours, flat(&case[name]), "{name}");
        same(plan.phy2log.iter().map(|e| f64::from(*e)).collect(), "phy2log");
        same(plan.logcnt.iter().map(|e| f64::from(*e)).collect(), "logcnt");
        let (_, log2phy) = plan.log2phy(request.layers);
        same(log2phy.iter().map(|slot| *slot as f64).collect(), "log2phy");
        let slots = plan.phy2log.chunks(request.shape.slots());
        let weight: Vec<f64> = weight.iter().map(|w| f64::from(*w)).collect();
        let loads = slots.zip(weight.chunks(request.shape.experts));
        let loads: Vec<Vec<f64>> =
            loads.map(|(s, w)| rank_loads(s, request.shape.slots_per_rank, w)).collect();
        same(loads.concat(), "gpu_load");
        // The reader of the file may be a bit off in the last digit.
        for (ours, theirs) in loads.iter().zip(flat(&case["max_over_mean"])) {
            assert!((max_over_mean(ours) - theirs).abs() < 1e-12, "{theirs}");
        }
    }
}

#[test]
fn the_duplicate_of_the_global_example_is_mended() {
    let cases: Value = serde_json::from_str(GOLDEN).unwrap();
    let (request, weight) = request(&cases[1]);
    let load: Vec<f64> = weight[..12].iter().map(|w| f64::from(*w)).collect();
    let plan = rebalance(&request, &weight).unwrap();
    let shape = request.shape;
    let mut slots = plan.phy2log[..shape.slots()].to_vec();
    assert_eq!(shape.check_slots(&slots), Err(PlanError::Placement { expert: 1 }));
    let before = max_over_mean(&rank_loads(&slots, shape.slots_per_rank, &load));
    let repairs = repair(&mut slots, shape, 1, &load);
    assert_eq!(shape.check_slots(&slots), Ok(()));
    assert_eq!(repairs.len(), 1);
    assert!(matches!(repairs[0], Repair { slot: 15, expert: 1, remedy: Remedy::Swapped { .. } }));
    let after = max_over_mean(&rank_loads(&slots, shape.slots_per_rank, &load));
    assert!(after <= before + 0.05, "{before} {after}");
}

#[test]
fn repairs_without_a_swap_replace_or_empty() {
    let shape = Shape { experts: 2, ranks: 1, slots_per_rank: 3 };
    let mut slots = vec![0, 1, 0];
    let emptied = repair(&mut slots, shape, 1, &[5.0, 1.0]);
    assert_eq!(emptied, [Repair { slot: 2, expert: 0, remedy: Remedy::Emptied }]);
    assert_eq!(slots, [0, 1, EMPTY]);

    let shape = Shape { experts: 3, ranks: 2, slots_per_rank: 3 };
    let mut slots = vec![0, 0, 1, 0, 1, 2];
    let replaced = repair(&mut slots, shape, 1, &[9.0, 1.0, 1.0]);
    assert_eq!(replaced, [Repair { slot: 1, expert: 0, remedy: Remedy::Replaced { expert: 2 } }]);
    assert_eq!(slots, [0, 2, 1, 0, 1, 2]);
}

#[test]
fn ties_keep_their_order() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 2 };
    let request = Request { layers: 1, shape, groups: 1, nodes: 1 };
    let plan = rebalance(&request, &[7.0; 4]).unwrap();
    assert_eq!(plan.phy2log, [0, 2, 1, 3]);
    let shape = Shape { slots_per_rank: 3, ..shape };
    let plan = rebalance(&Request { shape, ..request }, &[7.0; 4]).unwrap();
    // Experts 0 and 1 get the two redundant slots.
    assert_eq!(plan.logcnt, [2, 2, 1, 1]);
}

#[test]
fn sums_are_rounded_to_float32() {
    // 2^24 + 1 is lost in float32, so the second pack still looks as light as the first.
    let big = 16_777_216.0;
    let shape = Shape { experts: 6, ranks: 2, slots_per_rank: 3 };
    let request = Request { layers: 1, shape, groups: 1, nodes: 1 };
    let plan = rebalance(&request, &[big, big, 1.0, 1.0, 1.0, 1.0]).unwrap();
    assert_eq!(plan.phy2log, [0, 2, 3, 1, 4, 5]);
}

#[test]
fn sizes_and_loads_are_refused_by_name() {
    let shape = Shape { experts: 4, ranks: 2, slots_per_rank: 2 };
    let request = Request { layers: 1, shape, groups: 1, nodes: 1 };
    let error = |request: Request, weight: &[f32]| rebalance(&request, weight).unwrap_err();
    assert_eq!(
        error(request, &[1.0; 3]),
        PlanError::Length { of: "loads", length: 3, expected: 4 }
    );
    assert_eq!(error(request, &[1.0, f32::NAN, 0.0, 0.0]), PlanError::Load { index: 1 });
    assert_eq!(error(request, &[1.0, 0.0, -1.0, 0.0]), PlanError::Load { index: 2 });
    assert_eq!(
        error(Request { groups: 3, nodes: 3, ..request }, &[1.0; 4]),
        PlanError::Indivisible { of: "experts", value: 4, by: 3 }
    );
    let few = Shape { slots_per_rank: 1, ..shape };
    assert_eq!(
        error(Request { shape: few, ..request }, &[1.0; 4]),
        PlanError::Shape { shape: few }
    );
}
