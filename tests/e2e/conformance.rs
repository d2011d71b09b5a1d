//! A share of `cargo xtask conformance`: the cases of small layers, all seven routing methods and the
//! placement that changes among them, and functional shapes whose hidden sizes are no multiples of 64.

use tests::plan::Plan;
use tests::shape_cases::{by_shape, run};
use tests::synthetic::Pool;

use crate::data;

#[test]
fn cases_of_small_layers_and_odd_shapes_pass() {
    let plan = Plan::read(&data("cases.json")).unwrap();
    assert_eq!((plan.seed.len(), plan.functional.len()), (59, 24));
    let mut cases = plan.seed;
    cases.retain(|case| case.shape.hidden <= 512);
    let odd = |hidden| [1568, 1632, 2080].contains(&hidden);
    cases.extend(plan.functional.into_iter().filter(|case| odd(case.shape.hidden)));
    let (pool, mut passes) = (Pool::new(1), 0);
    for list in by_shape(&cases) {
        run(&pool, &list, "cpu", |verdict| {
            assert!(verdict.passed, "{}", verdict.line);
            passes += 1;
            Ok(())
        })
        .unwrap();
    }
    assert_eq!(passes, 25 + 3);
}
