//! Routing against the reference, and against what a user of another engine reported.

use protocol::routing::Router;
use tests::random::Random;
use tests::routing::{Parameters, method, route_checked};

use crate::data;

const METHODS: [&str; 7] = [
    "Default",
    "Renormalize",
    "RenormalizeNaive",
    "Llama4Renormalize",
    "DeepSeekV3",
    "MiniMaxM2",
    "SigmoidRenorm",
];

#[test]
fn every_method_routes_as_the_reference() {
    let mut random = Random::new(3);
    for (experts, top_k, groups) in
        [(60, 4, (1, 1)), (256, 6, (8, 4)), (8, 1, (1, 1)), (13, 13, (1, 1))]
    {
        let logits: Vec<f32> = (0..200 * experts).map(|_| 2.0 * random.normal()).collect();
        let bias: Vec<f32> = (0..experts).map(|_| random.unit()).collect();
        for name in METHODS {
            let parameters = Parameters { bias: &bias, groups, scale: 2.5 };
            route_checked(name, parameters, top_k, &logits).unwrap();
        }
    }
}

/// Biases so negative that a masked group would win by a score of zero, and weights that must not
/// have the bias in them: the same experts, their weights within 1e-5, with the factor once.
#[test]
fn negative_biases_do_not_let_masked_groups_in() {
    let path = data("field/routing/negative_bias/routing.json");
    let case: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let floats =
        |value: &serde_json::Value| -> Vec<f32> { serde_json::from_value(value.clone()).unwrap() };
    let rows = |key: &str| case[key].as_array().unwrap().iter();
    let number = |key: &str| u32::try_from(case[key].as_u64().unwrap()).unwrap();
    let bias = floats(&case["bias"]);
    let scale: f32 = serde_json::from_value(case["routed_scaling_factor"].clone()).unwrap();
    let parameters =
        Parameters { bias: &bias, groups: (number("n_group"), number("topk_group")), scale };
    let (experts, top_k) = (number("num_experts"), number("top_k"));
    let router = Router::new(method("DeepSeekV3", parameters).unwrap(), experts, top_k).unwrap();
    let mut compared = 0;
    for ((logits, expected_ids), expected) in rows("logits").zip(rows("ids")).zip(rows("weights")) {
        let (mut ids, mut weights) = (vec![-1; top_k as usize], vec![0.0; top_k as usize]);
        router.route(&floats(logits), &mut ids, &mut weights).unwrap();
        let sum: f32 = weights.iter().sum();
        assert!((sum - scale).abs() < 1e-5, "{sum}");
        for (id, expected) in expected_ids.as_array().unwrap().iter().zip(floats(expected)) {
            let place = ids.iter().position(|&got| i64::from(got) == id.as_i64().unwrap());
            let weight = weights[place.unwrap_or_else(|| panic!("expert {id} is not in {ids:?}"))];
            assert!((weight - expected).abs() <= 1e-5 * expected, "{weight}, expected {expected}");
            compared += 1;
        }
    }
    assert_eq!(compared, 16 * 8);
}
