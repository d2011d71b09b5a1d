//! What becomes of a group that has lost ranks: after a grace they are given up until they are back, and experts that only they
//! have get a place on the others, as far as there is room. Pure.
//!
//! The slots of ranks that were given up stay what they are: whoever comes back loads them again, and nothing else moves.

use std::collections::BTreeSet;

use planning::greedy::{Ranks, Use};
use planning::layer::{EMPTY, Shape};
use planning::settle::settle;
use protocol::ids::RankId;
use protocol::placement::Placement;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::constraints::{Constraints, Kind};
use crate::limits::{GRACE_SECONDS_DEFAULT, GRACE_SECONDS_MAX};
use crate::losing::without;
use crate::propose::OutOfRange;

/// What is done when ranks of a group are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Recovery {
    /// Whether ranks are given up when their grace is over; true if nobody has said otherwise. While one is lost and not given
    /// up, nothing moves.
    pub(crate) automatic: bool,
    /// How long a rank may be lost before it is given up, 1 to 86400 seconds; 30 if nobody has said otherwise. A restart should
    /// take less.
    pub(crate) grace_s: u64,
}

impl Default for Recovery {
    fn default() -> Self {
        Self { automatic: true, grace_s: GRACE_SECONDS_DEFAULT }
    }
}

impl Recovery {
    /// Refuses a grace that makes no sense.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        if (1..=GRACE_SECONDS_MAX).contains(&self.grace_s) {
            return Ok(());
        }
        let (name, value) = ("grace_s", self.grace_s.to_string());
        Err(OutOfRange { name, value, expected: format!("1 to {GRACE_SECONDS_MAX}") })
    }

    /// When a rank is given up that was heard of last at `last_seen_ms`. Nobody is heard of before control has started.
    pub(crate) fn gives_up_ms(&self, last_seen_ms: u64, control_started_ms: u64) -> u64 {
        last_seen_ms.max(control_started_ms).saturating_add(self.grace_s * 1_000)
    }

    /// Which of the `lost` ranks, each with when it was heard of last, are given up by now; nobody if all `ranks` of the group
    /// are lost.
    pub(crate) fn given_up(
        &self,
        lost: &[(u32, u64)],
        ranks: u32,
        (control_started_ms, now_ms): (u64, u64),
    ) -> BTreeSet<u32> {
        if !self.automatic || lost.len() >= ranks as usize {
            return BTreeSet::new();
        }
        let over =
            |(_, seen_ms): &&(u32, u64)| self.gives_up_ms(*seen_ms, control_started_ms) <= now_ms;
        lost.iter().filter(over).map(|(rank, _)| *rank).collect()
    }
}

/// A layer whose experts have a place on ranks that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Repaired {
    pub(crate) placement: Placement,
    /// Experts that come to a rank.
    pub(crate) moved: u64,
    /// Experts for which there is no room.
    pub(crate) left: Vec<u32>,
}

/// A layer's placement in which experts that only the ranks `gone` have come to others, busiest first, in empty slots or in
/// place of replicas that others have, too; none if nothing comes to any rank. `rows` are what experts had to do lately.
pub(crate) fn repaired(
    layer: u32,
    placement: &Placement,
    gone: &BTreeSet<u32>,
    (rows, constraints): (&[u64], &Constraints),
) -> Option<Repaired> {
    let lost = without(placement, gone, rows).gone;
    let holds = |expert: u32, rank: u32| {
        placement.slots_of_rank(RankId(rank)).iter().flatten().any(|held| held.0 == expert)
    };
    let pins = |kind| {
        let of = constraints
            .pins
            .iter()
            .filter(move |pin| pin.kind == kind && pin.layer.is_none_or(|own| own == layer));
        of.map(|pin| (pin.expert, pin.rank))
    };
    // A repair keeps to pins, and enforces none that is not kept: that is for plans.
    let as_planned = |(expert, rank): (u32, u32)| (expert, rank as usize);
    let must: Vec<_> =
        pins(Kind::Must).filter(|&(expert, rank)| holds(expert, rank)).map(as_planned).collect();
    let draining = constraints.draining.iter();
    let nothing_new = draining.flat_map(|&rank| lost.iter().map(move |&expert| (expert, rank)));
    let never = pins(Kind::Never).chain(nothing_new);
    let never: Vec<_> =
        never.filter(|&(expert, rank)| !holds(expert, rank)).map(as_planned).collect();
    // Whoever is given up keeps its slots, gets nothing new, and what only it has needs a second home: it is planned for
    // like one that drains.
    let use_of = |rank| if gone.contains(&rank) { Use::Draining } else { Use::Active };
    let uses: Vec<Use> = (0..placement.ranks()).map(use_of).collect();
    let ranks = Ranks { speeds: &[], uses: &uses, must: &must, never: &never };
    let shape = Shape {
        experts: placement.experts() as usize,
        ranks: placement.ranks() as usize,
        slots_per_rank: placement.slots_per_rank() as usize,
    };
    let phy2log = placement.to_phy2log();
    let mut slots: Vec<u32> =
        phy2log.iter().map(|&expert| u32::try_from(expert).unwrap_or(EMPTY)).collect();
    let mut loads: Vec<f64> = rows.iter().map(|&rows| rows as f64).collect();
    loads.resize(shape.experts, 0.0);
    let (arrivals, _) = settle(&mut slots, shape, &loads, &ranks, usize::MAX).ok()?;
    if arrivals.is_empty() {
        return None;
    }
    let expert = |&slot: &u32| if slot == EMPTY { -1 } else { i64::from(slot) };
    let phy2log: Vec<i64> = slots.iter().map(expert).collect();
    let repaired =
        Placement::from_phy2log(placement.experts(), placement.ranks(), &phy2log).ok()?;
    let left = without(&repaired, gone, rows).gone;
    Some(Repaired { placement: repaired, moved: arrivals.len() as u64, left })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constraints::Pinned;

    fn gone(ranks: &[u32]) -> BTreeSet<u32> {
        ranks.iter().copied().collect()
    }

    #[test]
    fn ranks_are_given_up_after_their_grace_and_never_all_of_them() {
        let recovery = Recovery { automatic: true, grace_s: 30 };
        let of = |recovery: Recovery, lost: &[(u32, u64)], now_ms| {
            recovery.given_up(lost, 3, (50_000, now_ms)).into_iter().collect::<Vec<_>>()
        };
        // One was silent before control started: it may just have had nobody to talk to.
        let lost = [(0, 1_000), (2, 60_000)];
        let none: [u32; 0] = [];
        assert_eq!(of(recovery, &lost, 79_999), none);
        assert_eq!(of(recovery, &lost, 80_000), [0]);
        assert_eq!(of(recovery, &lost, 90_000), [0, 2]);
        assert_eq!(of(recovery, &[(0, 0), (1, 0), (2, 0)], 900_000), none);
        assert_eq!(of(Recovery { automatic: false, ..recovery }, &lost, 900_000), none);
        for grace_s in [0, 86_401, u64::MAX] {
            assert_eq!(Recovery { grace_s, ..recovery }.check().unwrap_err().name, "grace_s");
        }
    }

    #[test]
    fn what_only_lost_ranks_have_comes_to_others_and_nothing_else_moves() {
        // Experts 0 and 1 are on rank 0 alone; 4 is on ranks 1 and 2; rank 2 has an empty slot.
        let placement = Placement::from_phy2log(6, 3, &[0, 1, 2, 2, 3, 4, 5, 4, -1]).unwrap();
        let repair = |lost: &[u32], rows: &[u64], constraints: &Constraints| {
            repaired(7, &placement, &gone(lost), (rows, constraints))
        };
        let free = Constraints::default();
        let whole = repair(&[0], &[1, 9, 1, 1, 1, 1], &free).unwrap();
        // The busier one takes the empty slot, the other the place of a replica that is elsewhere; rank 0 keeps its slots.
        let slots = whole.placement.to_phy2log();
        assert_eq!((&slots[..3], slots[8]), (&[0, 1, 2][..], 1));
        assert_eq!((whole.moved, &whole.left[..]), (2, &[][..]));
        assert!(slots[3..].contains(&0) && slots[3..].contains(&4), "{slots:?}");
        // It is done once.
        assert_eq!(repaired(7, &whole.placement, &gone(&[0]), (&[], &free)), None);
        // Nothing that only rank 1 has: experts 2 and 4 are elsewhere, 3 is not.
        assert_eq!(repair(&[1], &[], &free).unwrap().moved, 1);
        assert_eq!(repair(&[], &[], &free), None);
        // Two of three ranks hold more than one can: the busiest come, and who is left is said.
        let some = repair(&[0, 1], &[1, 9, 5, 7, 1, 1], &free).unwrap();
        assert_eq!(some.moved, 1);
        assert_eq!(&some.placement.to_phy2log()[6..], [5, 4, 1]);
        assert_eq!(some.left, [0, 2, 3]);
    }

    #[test]
    fn pins_and_ranks_that_are_to_leave_are_kept_to() {
        let placement = Placement::from_phy2log(4, 3, &[0, 1, 2, 3, 2, -1]).unwrap();
        let repair = |constraints: &Constraints| {
            let repaired = repaired(7, &placement, &gone(&[0]), (&[5, 4], constraints));
            repaired.map(|r| (r.placement.to_phy2log()[2..].to_vec(), r.left))
        };
        let pin = |expert, rank, kind| Pinned { layer: Some(7), expert, rank, kind };
        let free = Constraints::default();
        assert_eq!(repair(&free), Some((vec![1, 3, 2, 0], vec![])));
        let pinned = Constraints { pins: vec![pin(2, 1, Kind::Must)], ..free.clone() };
        assert_eq!(repair(&pinned), Some((vec![2, 3, 1, 0], vec![])));
        let barred = Constraints { pins: vec![pin(0, 2, Kind::Never)], ..free.clone() };
        assert_eq!(repair(&barred), Some((vec![0, 3, 2, 1], vec![])));
        let elsewhere = Pinned { layer: Some(8), ..pin(0, 2, Kind::Never) };
        let other = Constraints { pins: vec![elsewhere], ..free.clone() };
        assert_eq!(repair(&other), repair(&free));
        // Nothing new on a rank that is to leave, which still has what it has.
        let drains = Constraints { draining: vec![1], ..free };
        assert_eq!(repair(&drains), Some((vec![2, 3, 1, 0], vec![])));
    }
}
