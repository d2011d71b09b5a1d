//! What becomes of a proposal: it is open until somebody approves or rejects it, its time is over, or its group is not any
//! more what it was made for. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::proposing::Proposal;

/// A proposal, and what has become of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Kept {
    pub(crate) proposal: Proposal,
    /// Until when it may be approved, in milliseconds since 1970.
    pub(crate) expires_ms: u64,
    pub(crate) decision: Option<Decision>,
}

/// What somebody decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Decision {
    /// Whether it was approved; otherwise it was rejected.
    pub(crate) approved: bool,
    /// When, in milliseconds since 1970.
    pub(crate) at_ms: u64,
    /// The name of the token of whoever decided.
    pub(crate) actor: String,
    /// Why.
    pub(crate) reason: String,
}

impl Decision {
    /// What it is called.
    fn verb(&self) -> &'static str {
        if self.approved { "approved" } else { "rejected" }
    }
}

/// What a group is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Present {
    /// Digest of its model.
    pub(crate) model: String,
    /// The newest committed epoch of each layer.
    pub(crate) epochs: BTreeMap<u32, u64>,
    /// Milliseconds since 1970.
    pub(crate) now_ms: u64,
}

/// Where a proposal stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Standing {
    /// It can be approved or rejected.
    Open,
    /// Its placements are committed.
    Approved,
    /// Somebody does not want it.
    Rejected,
    /// Its layers have other placements by now than those that it would replace.
    Superseded,
    /// Its time is over.
    Expired,
}

/// What is in the way of a decision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Obstacle {
    #[error("{actor} has {verb} it already, at {at_ms}: {reason}")]
    Decided { actor: String, verb: &'static str, at_ms: u64, reason: String },
    #[error("the group serves the model {found} now, it was proposed for {expected}")]
    Model { found: String, expected: String },
    #[error("layer {layer} has epoch {found} now, it was proposed for epoch {expected}")]
    Superseded { layer: u32, found: u64, expected: u64 },
    #[error("it expired at {expires_ms}, and it is {now_ms}: ask for it again")]
    Expired { expires_ms: u64, now_ms: u64 },
    #[error("it changes nothing, expected at least one layer")]
    Empty,
}

impl Kept {
    /// What is in the way of deciding now; nothing while it is open.
    pub(crate) fn obstacle(&self, present: &Present) -> Option<Obstacle> {
        if let Some(decision) = &self.decision {
            let (verb, Decision { at_ms, actor, reason, .. }) = (decision.verb(), decision.clone());
            return Some(Obstacle::Decided { actor, verb, at_ms, reason });
        }
        let (found, expected) = (&present.model, &self.proposal.model);
        if found != expected {
            return Some(Obstacle::Model { found: found.clone(), expected: expected.clone() });
        }
        let changes = self.proposal.changes.iter();
        // Nothing is committed for workers that hold placements of their own, of epoch 0.
        let epochs = changes.map(|change| {
            (change.layer, present.epochs.get(&change.layer).copied().unwrap_or(0), change.epoch)
        });
        let mut other = epochs.filter(|(_, found, expected)| found != expected);
        if let Some((layer, found, expected)) = other.next() {
            return Some(Obstacle::Superseded { layer, found, expected });
        }
        let (expires_ms, now_ms) = (self.expires_ms, present.now_ms);
        (now_ms >= expires_ms).then_some(Obstacle::Expired { expires_ms, now_ms })
    }

    /// Where it stands now.
    pub(crate) fn standing(&self, present: &Present) -> Standing {
        match (&self.decision, self.obstacle(present)) {
            (Some(Decision { approved: true, .. }), _) => Standing::Approved,
            (Some(_), _) => Standing::Rejected,
            (None, Some(Obstacle::Expired { .. })) => Standing::Expired,
            (None, Some(_)) => Standing::Superseded,
            (None, None) => Standing::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proposing::tests::proposal;

    #[test]
    fn a_proposal_is_open_until_something_is_in_the_way() {
        let open = Kept { proposal: proposal(1, 7), expires_ms: 100, decision: None };
        let model = open.proposal.model.clone();
        let present = Present { model, epochs: [(1, 7), (2, 9)].into(), now_ms: 99 };
        assert_eq!((open.obstacle(&present), open.standing(&present)), (None, Standing::Open));
        let decided = |approved| {
            let (actor, reason) = ("ann".to_owned(), "busy".to_owned());
            Kept { decision: Some(Decision { approved, at_ms: 5, actor, reason }), ..open.clone() }
        };
        let later = Present { now_ms: 100, ..present.clone() };
        let moved = Present { epochs: [(1, 8)].into(), ..later.clone() };
        let other = Present { model: "other".to_owned(), ..moved.clone() };
        for (kept, present, standing, said) in [
            (&open, &later, Standing::Expired, "it expired at 100, and it is 100"),
            (&open, &moved, Standing::Superseded, "layer 1 has epoch 8 now, it was proposed for"),
            (&open, &other, Standing::Superseded, "the group serves the model other now"),
            (&decided(true), &other, Standing::Approved, "ann has approved it already, at 5: busy"),
            (&decided(false), &present, Standing::Rejected, "ann has rejected it already, at 5"),
        ] {
            assert_eq!(kept.standing(present), standing);
            let obstacle = kept.obstacle(present).unwrap().to_string();
            assert!(obstacle.starts_with(said), "{obstacle}");
        }
        // Workers that nobody has committed anything for hold epoch 0.
        let own = Kept { proposal: proposal(1, 0), ..open };
        let nothing = Present { epochs: BTreeMap::new(), ..present };
        assert_eq!(own.standing(&nothing), Standing::Open);
    }
}
