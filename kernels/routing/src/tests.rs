//! Methods worked by hand, corners, and refusals. The reference writes all methods a second time;
//! the two are compared in the crate `tests`.

use proptest::prelude::*;

use super::*;

const LOGITS: [f32; 4] = [0.0, 2.0, -1.0, 1.0];

fn deepseek(bias: [f32; 4], n_group: u32, topk_group: u32, scale: f32) -> Method {
    Method::DeepSeekV3 { bias: bias.to_vec(), n_group, topk_group, scale }
}

/// All methods with biases of zero and one group.
fn methods(experts: u32) -> [Method; 7] {
    let bias = vec![0.0; experts as usize];
    [
        Method::Default,
        Method::Renormalize,
        Method::RenormalizeNaive,
        Method::Llama4Renormalize,
        Method::DeepSeekV3 { bias: bias.clone(), n_group: 1, topk_group: 1, scale: 1.0 },
        Method::MiniMaxM2 { bias },
        Method::SigmoidRenorm,
    ]
}

fn routed(method: Method, logits: &[f32], top_k: u32) -> (Vec<i32>, Vec<f32>) {
    let router = Router::new(method, u32::try_from(logits.len()).unwrap(), top_k).unwrap();
    let (mut ids, mut weights) = (vec![-7; top_k as usize], vec![f32::NAN; top_k as usize]);
    router.route(logits, &mut ids, &mut weights).unwrap();
    (ids, weights)
}

#[track_caller]
fn check(method: Method, logits: &[f32; 4], expected_ids: [i32; 2], expected: [f64; 2]) {
    let (ids, weights) = routed(method, logits, 2);
    assert_eq!(ids, expected_ids);
    for (weight, expected) in weights.iter().zip(expected) {
        assert!((f64::from(*weight) - expected).abs() < 1e-6, "{weight} is not {expected}");
    }
}

fn sig(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[test]
fn softmax_methods_by_hand() {
    let all: f64 = LOGITS.iter().map(|&x| f64::from(x).exp()).sum();
    let (first, second) = (2_f64.exp(), 1_f64.exp());
    let shares = [first / (first + second), second / (first + second)];
    check(Method::Default, &LOGITS, [1, 3], [first / all, second / all]);
    check(Method::Renormalize, &LOGITS, [1, 3], shares);
    check(Method::RenormalizeNaive, &LOGITS, [1, 3], shares);
}

#[test]
fn sigmoid_methods_by_hand() {
    let sum = sig(2.0) + sig(1.0);
    let shares = [sig(2.0) / sum, sig(1.0) / sum];
    check(Method::Llama4Renormalize, &LOGITS, [1, 3], [sig(2.0), sig(1.0)]);
    check(Method::SigmoidRenorm, &LOGITS, [1, 3], shares);
    check(Method::MiniMaxM2 { bias: vec![0.0; 4] }, &LOGITS, [1, 3], shares);
}

#[test]
fn a_bias_selects_but_does_not_weigh() {
    let sum = sig(-1.0) + sig(2.0);
    let weights = [sig(-1.0) / sum, sig(2.0) / sum];
    check(Method::MiniMaxM2 { bias: vec![0.0, 0.0, 5.0, 0.0] }, &LOGITS, [2, 1], weights);
}

#[test]
fn deepseek_takes_experts_of_the_best_groups_only() {
    // Group 0 has the best expert, group 1 the better pair.
    let logits = [3.0, -9.0, 2.0, 2.5];
    let sum = sig(2.5) + sig(2.0);
    let weights = [2.5 * sig(2.5) / sum, 2.5 * sig(2.0) / sum];
    check(deepseek([0.0; 4], 2, 1, 2.5), &logits, [3, 2], weights);
    let sum = sig(3.0) + sig(2.5);
    let weights = [2.5 * sig(3.0) / sum, 2.5 * sig(2.5) / sum];
    check(deepseek([0.0; 4], 2, 2, 2.5), &logits, [0, 3], weights);
    // All biased scores are negative; a group that is out must not win with zeros.
    let sum = sig(3.0) + sig(-9.0);
    let weights = [sig(3.0) / sum, sig(-9.0) / sum];
    check(deepseek([-3.0, -3.0, -9.0, -9.0], 2, 1, 1.0), &logits, [0, 1], weights);
    // Groups of one expert have no second score.
    check(
        deepseek([0.0; 4], 4, 2, 1.0),
        &LOGITS,
        [1, 3],
        [sig(2.0) / (sig(2.0) + sig(1.0)), sig(1.0) / (sig(2.0) + sig(1.0))],
    );
}

#[test]
fn ties_go_to_the_lower_expert() {
    for method in methods(6) {
        let (ids, _) = routed(method.clone(), &[1.0, 2.0, 1.0, 2.0, 1.0, 2.0], 3);
        assert_eq!(ids, [1, 3, 5], "{method}");
        let (ids, _) = routed(method.clone(), &[0.0, -0.0, 0.0, -0.0, 0.0, 0.0], 4);
        assert_eq!(ids, [0, 1, 2, 3], "{method}");
    }
}

#[test]
fn no_tokens_are_an_ordinary_call() {
    for method in methods(13) {
        Router::new(method, 13, 3).unwrap().route(&[], &mut [], &mut []).unwrap();
    }
}

#[test]
fn extreme_and_masked_logits_give_numbers() {
    for method in methods(4) {
        for logits in [
            [-200.0; 4],
            [200.0; 4],
            [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 2.0],
            [-3e38, 3e38, 0.0, 1.0],
        ] {
            let (ids, weights) = routed(method.clone(), &logits, 2);
            assert!(weights.iter().all(|w| (0.0..=1.0).contains(w)), "{method} {weights:?}");
            assert!(logits[0] > f32::NEG_INFINITY || ids == [3, 1], "{method} {ids:?}");
        }
    }
    // Far below the floor of the others, whose weights all but vanish; here they are halves.
    assert_eq!(routed(Method::SigmoidRenorm, &[-60.0; 4], 2).1, [0.5; 2]);
}

#[test]
fn parameters_that_do_not_fit_are_refused_with_their_values() {
    let refusal = |method, experts, top_k| Router::new(method, experts, top_k).unwrap_err();
    let text = |method, experts, top_k| refusal(method, experts, top_k).to_string();
    let deepseek4 = |n_group, topk_group| deepseek([0.0; 4], n_group, topk_group, 1.0);
    assert_eq!(text(Method::Default, 0, 1), "0 experts, expected 1 to 2147483647");
    let too_many = "top_k is 5, expected 1 to 4, the number of experts";
    assert_eq!(text(Method::Renormalize, 4, 5), too_many);
    assert_eq!(
        text(Method::Renormalize, 4, 0),
        "top_k is 0, expected 1 to 4, the number of experts"
    );
    let groups = "n_group is 3, expected a divisor of 4, the number of experts";
    assert_eq!(text(deepseek4(3, 1), 4, 1), groups);
    assert!(matches!(refusal(deepseek4(0, 1), 4, 1), RoutingError::Groups { n_group: 0, .. }));
    let kept = "topk_group is 3, expected 1 to 2, the number of groups";
    assert_eq!(text(deepseek4(2, 3), 4, 1), kept);
    assert_eq!(
        text(deepseek4(2, 1), 4, 3),
        "topk_group 1 of 2 groups keeps 2 experts, expected at least top_k 3"
    );
    let nan = text(deepseek([0.0; 4], 1, 1, f32::NAN), 4, 1);
    assert_eq!(nan, "scale is NaN, expected a finite number");
    let short = text(Method::MiniMaxM2 { bias: vec![0.0; 3] }, 4, 1);
    assert_eq!(short, "bias has 3 elements, expected 4");
    let infinite = text(Method::MiniMaxM2 { bias: vec![0.0, f32::INFINITY] }, 2, 1);
    assert_eq!(infinite, "bias of expert 1 is inf, expected a finite number");
}

#[test]
fn logits_without_an_answer_are_refused_and_nothing_is_written() {
    let router = Router::new(Method::Renormalize, 4, 2).unwrap();
    let mut nan = [1.0; 8];
    nan[6] = f32::NAN;
    let mut masked = [1.0; 8];
    masked[4..].fill(f32::NEG_INFINITY);
    let nan_text = "logit of token 1 for expert 2 is NaN, expected a number below inf";
    for (logits, expected) in [
        (&nan[..], nan_text),
        (&masked, "all logits of token 1 are -inf, expected a finite one"),
        (&[0.0; 7], "logits has 7 elements, expected 8"),
    ] {
        let (mut ids, mut weights) = ([-7; 4], [7.0; 4]);
        let error = router.route(logits, &mut ids, &mut weights).unwrap_err();
        assert_eq!((error.to_string().as_str(), ids, weights), (expected, [-7; 4], [7.0; 4]));
    }
    let error = router.route(&[0.0; 8], &mut [0; 3], &mut [0.0; 4]).unwrap_err();
    assert_eq!(error.to_string(), "ids has 3 elements, expected 4");
    let error = router.route(&[0.0; 8], &mut [0; 4], &mut [0.0; 2]).unwrap_err();
    assert_eq!(error.to_string(), "weights has 2 elements, expected 4");
}

proptest! {
    #[test]
    fn selection_is_a_stable_sort_cut_short(
        keys in prop::collection::vec((-4_i8..4).prop_map(f32::from), 1..40),
        k in 1_usize..16,
    ) {
        let k = k.min(keys.len());
        let mut sorted: Vec<i32> = (0..).take(keys.len()).collect();
        sorted.sort_by(|&a, &b| keys[b as usize].total_cmp(&keys[a as usize]));
        let mut ids = vec![0; k];
        select(&keys, &mut ids);
        prop_assert_eq!(&ids, &sorted[..k]);
    }
}
