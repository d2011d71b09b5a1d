//! What holds for every input: plans are placements that the protocol accepts, planning twice gives the same, and a step
//! of the greedy planner makes nothing worse.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use planning::cost::{PhaseLoad, RankCost, Roofline};
use planning::deepseek::{Request, rebalance};
use planning::greedy::{self, Objective, Options, Ranks, Use};
use planning::layer::{EMPTY, Shape, keep_slots, moved};
use planning::repair::repair;
use planning::settle::{Unsettled, Why, settle};
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

fn costs() -> impl Strategy<Value = RankCost> {
    let limits = Roofline { fixed_ms: 0.02, ms_per_active: 0.01, ms_per_pair: 0.0005 };
    prop_oneof![Just(RankCost::Pairs { ms_per_pair: 1.0 }), Just(RankCost::Roofline(limits))]
}

type Pins = Vec<(u32, usize)>;
type Troubles = (Shape, Vec<u32>, Vec<Use>, Pins, Pins);

/// What is asked of ranks, and slots that somebody may have left: experts missing, twice on a rank, empty slots.
fn troubles() -> impl Strategy<Value = Troubles> {
    shapes().prop_flat_map(|shape| {
        let experts = u32::try_from(shape.experts).unwrap();
        let slot = prop_oneof![4 => 0..experts, 1 => Just(EMPTY)];
        let used =
            prop_oneof![6 => Just(Use::Active), 1 => Just(Use::Draining), 1 => Just(Use::Lost)];
        let pins = || proptest::collection::vec((0..experts, 0..shape.ranks), 0..3);
        (
            Just(shape),
            proptest::collection::vec(slot, shape.slots()),
            proptest::collection::vec(used, shape.ranks),
            pins(),
            pins(),
        )
    })
}

/// All that a placement must keep.
fn kept(slots: &[u32], shape: Shape, ranks: &Ranks<'_>) -> Result<(), String> {
    accepted(slots, shape)?;
    for (rank, row) in slots.chunks(shape.slots_per_rank).enumerate() {
        if ranks.of(rank) == Use::Lost && row.iter().any(|expert| *expert != EMPTY) {
            return Err(format!("lost rank {rank} has {row:?}"));
        }
    }
    let has = |&(expert, rank): &(u32, usize)| {
        slots[rank * shape.slots_per_rank..][..shape.slots_per_rank].contains(&expert)
    };
    let pin = ranks.must.iter().find(|pin| !has(pin)).or(ranks.never.iter().find(|pin| has(pin)));
    pin.map_or(Ok(()), |pin| Err(format!("pin {pin:?} of {slots:?}")))
}

proptest! {
    #[test]
    fn what_is_settled_keeps_everything_and_stays_so(
        (shape, slots, uses, must, never) in troubles(),
        seed in loads(40),
    ) {
        let load = &seed[..shape.experts];
        let ranks = Ranks { speeds: &[], uses: &uses, must: &must, never: &never };
        let mut settled = slots.clone();
        match settle(&mut settled, shape, load, &ranks, usize::MAX) {
            // Pins may contradict one another, and slots may be too few.
            Err(Unsettled::NoSlot { expert }) => prop_assert!((expert as usize) < shape.experts),
            Err(other) => prop_assert!(false, "{other}"),
            Ok((arrivals, left)) => {
                prop_assert_eq!(kept(&settled, shape, &ranks), Ok(()));
                for arrival in &arrivals {
                    prop_assert_eq!(settled[arrival.slot], arrival.expert);
                }
                prop_assert_eq!(moved(&slots, &settled, shape.slots_per_rank) <= arrivals.len(), true);
                let cost = RankCost::Pairs { ms_per_pair: 1.0 };
                let phase = PhaseLoad { pairs: load, tokens: 64, weight: 1.0, cost: &cost };
                let options = Options { steps_max: 16, dead_zone: 1.0, ..Options::default() };
                let plan = greedy::plan_layer(shape, &settled, &[phase], &ranks, &options).unwrap();
                prop_assert_eq!(kept(&plan.slots, shape, &ranks), Ok(()));
                // Nothing is left to settle, and what can leave a draining rank still can.
                let mut again = plan.slots.clone();
                let (arrivals, still) = settle(&mut again, shape, load, &ranks, usize::MAX).unwrap();
                prop_assert!(arrivals.iter().all(|arrival| arrival.why == Why::Drain));
                prop_assert!(arrivals.len() + still <= left, "{plan:?}");
            }
        }
    }

    #[test]
    fn greedy_plans_are_placements_and_no_worse(
        (shape, prefill, decode) in inputs(),
        cost in costs(),
        tokens in 1_u32..512,
        worst in any::<bool>(),
    ) {
        let mut current = vec![EMPTY; shape.slots()];
        settle(&mut current, shape, &prefill, &Ranks::default(), usize::MAX).unwrap();
        let phases = [
            PhaseLoad { pairs: &prefill, tokens, weight: 1.0, cost: &cost },
            PhaseLoad { pairs: &decode, tokens: 8, weight: 20.0, cost: &cost },
        ];
        let objective = if worst { Objective::Worst } else { Objective::Sum };
        let options = Options { steps_max: 16, dead_zone: 1.0, objective, ..Options::default() };
        let plan = || greedy::plan_layer(shape, &current, &phases, &Ranks::default(), &options);
        let (plan, again) = (plan().unwrap(), plan().unwrap());
        prop_assert_eq!(&plan, &again);
        prop_assert_eq!(accepted(&plan.slots, shape).err(), None);
        for step in &plan.steps {
            prop_assert!(step.after_ms <= step.before_ms * (1.0 + 1e-9), "{:?}", step);
        }
        let copies: usize = plan.steps.iter().map(|step| step.change.copies()).sum();
        prop_assert!(moved(&current, &plan.slots, shape.slots_per_rank) <= copies);
    }

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
