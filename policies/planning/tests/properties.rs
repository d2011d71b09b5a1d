//! What holds for every input: plans are placements that the protocol accepts, and planning twice gives the
//! same.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use planning::deepseek::{Request, rebalance};
use planning::layer::{EMPTY, Shape, keep_slots, moved};
use planning::repair::repair;
use proptest::prelude::*;
use protocol::ids::ExpertId;
use protocol::placement::Placement;

#[expect(clippy::cast_possible_truncation, reason = "float32 is what the algorithm computes in")]
fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

/// The protocol's verdict, which is the one that counts.
fn accepted(slots: &[u32], shape: Shape) -> Result<Placement, String> {
    let experts = slots.iter().map(|&e| (e != EMPTY).then_some(ExpertId(e))).collect();
    let (ranks, of) = (u32::try_from(shape.ranks).unwrap(), u32::try_from(shape.experts).unwrap());
    Placement::new(of, ranks, experts).map_err(|error| error.to_string())
}

/// Few or many ranks, tight or with redundant slots, more slots than experts included.
fn shapes() -> impl Strategy<Value = Shape> {
    (1_usize..9, 1_usize..40, 0_usize..4).prop_map(|(ranks, experts, spare)| Shape {
        experts,
        ranks,
        slots_per_rank: experts.div_ceil(ranks) + spare,
    })
}

/// Ordinary loads, none at all, ties, and one expert that has nearly everything.
fn loads(experts: usize) -> impl Strategy<Value = Vec<f64>> {
    let ordinary = proptest::collection::vec(0.0..1e4, experts);
    let ties = proptest::collection::vec((0_u8..3).prop_map(f64::from), experts);
    let hot = (0..experts).prop_map(move |hot| {
        (0..experts).map(|e| if e == hot { 1e7 } else { 1.0 }).collect::<Vec<f64>>()
    });
    prop_oneof![ordinary, ties, hot, Just(vec![0.0; experts])]
}

fn inputs() -> impl Strategy<Value = (Shape, Vec<f64>, Vec<f64>)> {
    shapes().prop_flat_map(|shape| (Just(shape), loads(shape.experts), loads(shape.experts)))
}

proptest! {
    #[test]
    fn repaired_deepseek_plans_are_placements((shape, load, _) in inputs(), nodes in 1_usize..3) {
        let request = Request { layers: 1, shape, groups: nodes, nodes };
        let divides = shape.experts.is_multiple_of(nodes) && shape.ranks.is_multiple_of(nodes);
        prop_assume!(divides);
        let plan = rebalance(&request, &single(&load)).unwrap();
        prop_assert_eq!(&plan, &rebalance(&request, &single(&load)).unwrap());
        let mut slots = plan.phy2log;
        repair(&mut slots, shape, nodes, &load);
        prop_assert_eq!(accepted(&slots, shape).err(), None);
        prop_assert_eq!(shape.check_slots(&slots), Ok(()));
    }

    #[test]
    fn keeping_slots_changes_the_order_only((shape, old, new) in inputs()) {
        let plan = |load: &[f64]| {
            let request = Request { layers: 1, shape, groups: 1, nodes: 1 };
            let mut slots = rebalance(&request, &single(load)).unwrap().phy2log;
            repair(&mut slots, shape, 1, load);
            slots
        };
        let (before, planned) = (plan(&old), plan(&new));
        let mut kept = planned.clone();
        keep_slots(&before, &mut kept, shape.slots_per_rank);
        prop_assert_eq!(accepted(&kept, shape).err(), None);
        for (a, b) in planned.chunks(shape.slots_per_rank).zip(kept.chunks(shape.slots_per_rank)) {
            let (mut a, mut b) = (a.to_vec(), b.to_vec());
            a.sort_unstable();
            b.sort_unstable();
            prop_assert_eq!(a, b);
        }
        let arrivals = before.iter().zip(&kept).filter(|(old, new)| old != new && **new != EMPTY);
        prop_assert_eq!(arrivals.count(), moved(&before, &kept, shape.slots_per_rank));
    }
}
