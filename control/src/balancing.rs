//! How a group is balanced: by hand, with proposals that come by themselves, or with those approved within limits. Pure.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::deciding::{Kept, Present, Standing};
use crate::propose::{OutOfRange, Wish};
use crate::proposing::Proposal;

/// Who asks policies, and who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Operators ask and decide.
    #[default]
    Manual,
    /// Control asks when there is new load; operators decide.
    Advise,
    /// Control asks, and approves within limits.
    Auto,
}

/// How a group is balanced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Balancing {
    /// `manual` if nobody has said otherwise.
    pub(crate) mode: Mode,
    /// What control asks.
    pub(crate) ask: Wish,
    /// Seconds between two questions at least, 1 to 86400; 60 if not given.
    pub(crate) every_s: u64,
    /// Up to what control approves; needed for `auto`.
    pub(crate) approve: Option<Within>,
}

impl Default for Balancing {
    fn default() -> Self {
        Self { mode: Mode::Manual, ask: Wish::default(), every_s: 60, approve: None }
    }
}

/// Up to what control approves by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Within {
    /// Experts that come to ranks, over all layers.
    pub(crate) moved: u64,
    /// Bytes of them.
    pub(crate) bytes: u64,
}

impl Balancing {
    /// Refuses what makes no sense.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        self.ask.check()?;
        if !(1..=86_400).contains(&self.every_s) {
            let (name, value) = ("every_s", self.every_s.to_string());
            return Err(OutOfRange { name, value, expected: "1 to 86400".to_owned() });
        }
        if self.mode == Mode::Auto && self.approve.is_none() {
            let (name, value) = ("approve", "null".to_owned());
            let expected = "the most experts and bytes that are approved in mode auto".to_owned();
            return Err(OutOfRange { name, value, expected });
        }
        Ok(())
    }

    /// Whether it is time to ask: there is a window that the last question did not have, and that was long enough ago.
    pub(crate) fn is_due(&self, last: &Last, window_end_ms: u64, now_ms: u64) -> bool {
        let new = last.window_end_ms.is_none_or(|end_ms| end_ms < window_end_ms);
        let rested = last.asked_ms.is_none_or(|at_ms| now_ms >= at_ms + self.every_s * 1_000);
        self.mode != Mode::Manual && new && rested
    }

    /// Why control approves a proposal; none if it does not.
    pub(crate) fn approves(&self, proposal: &Proposal) -> Option<String> {
        let Within { moved, bytes } = self.approve.filter(|_| self.mode == Mode::Auto)?;
        let within = proposal.moved <= moved && proposal.bytes <= bytes;
        within.then(|| format!("mode auto: at most {moved} experts and {bytes} bytes"))
    }
}

/// What became of the last question that control asked by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Last {
    /// When it was asked, in milliseconds since 1970.
    pub(crate) asked_ms: Option<u64>,
    /// End of the newest window that it had.
    pub(crate) window_end_ms: Option<u64>,
    /// The proposal that it led to; null if nothing would change.
    pub(crate) proposal: Option<String>,
    /// Why there was no answer.
    pub(crate) problem: Option<String>,
}

/// A proposal with the same changes that is open or, while its time lasts, rejected: another would say nothing new.
pub(crate) fn same_as<'a>(
    proposal: &Proposal,
    known: &'a [Kept],
    present: &Present,
) -> Option<&'a Kept> {
    known.iter().find(|kept| {
        let placements = |proposal: &Proposal| -> Vec<_> {
            let changes = proposal.changes.iter();
            changes.map(|c| (c.layer, c.epoch, c.phy2log.clone(), c.split.clone())).collect()
        };
        let stands = match kept.standing(present) {
            Standing::Open => true,
            Standing::Rejected => present.now_ms < kept.expires_ms,
            _ => false,
        };
        stands && placements(&kept.proposal) == placements(proposal)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deciding::Decision;
    use crate::proposing::tests::proposal;

    #[test]
    fn control_asks_when_there_is_new_load_and_not_too_often() {
        let advise = Balancing { mode: Mode::Advise, every_s: 10, ..Balancing::default() };
        let last = Last { asked_ms: Some(1_000), window_end_ms: Some(900), ..Last::default() };
        for (balancing, last, window_end_ms, now_ms, due) in [
            (&advise, &Last::default(), 0, 0, true),
            (&advise, &last, 901, 11_000, true),
            (&advise, &last, 901, 10_999, false),
            (&advise, &last, 900, 11_000, false),
            (&Balancing::default(), &Last::default(), 1, 1, false),
        ] {
            let is = balancing.is_due(last, window_end_ms, now_ms);
            assert_eq!(is, due, "{last:?} {window_end_ms} {now_ms}");
        }
    }

    #[test]
    fn control_approves_within_limits_and_in_mode_auto_only() {
        let proposal = proposal(1, 1);
        let within = |moved, bytes| Some(Within { moved, bytes });
        let auto = |approve| Balancing { mode: Mode::Auto, approve, ..Balancing::default() };
        let Proposal { moved, bytes, .. } = proposal;
        assert!(auto(within(moved, bytes)).approves(&proposal).is_some());
        assert_eq!(auto(within(moved - 1, bytes)).approves(&proposal), None);
        assert_eq!(auto(within(moved, bytes - 1)).approves(&proposal), None);
        let advise = Balancing { mode: Mode::Advise, ..auto(within(moved, bytes)) };
        assert_eq!(advise.approves(&proposal), None);
        assert_eq!(auto(None).check().unwrap_err().name, "approve");
        let never = Balancing { every_s: 0, ..Balancing::default() };
        assert_eq!(never.check().unwrap_err().name, "every_s");
    }

    #[test]
    fn a_proposal_of_the_same_placements_is_enough_also_a_rejected_one() {
        let open = Kept { proposal: proposal(1, 7), expires_ms: 100, decision: None };
        let model = open.proposal.model.clone();
        let present = Present { model, epochs: [(1, 7)].into(), now_ms: 99 };
        let known = [open.clone()];
        let again = Proposal { id: "another input".to_owned(), ..proposal(1, 7) };
        assert_eq!(same_as(&again, &known, &present), Some(&open));
        assert_eq!(same_as(&proposal(2, 7), &known, &present), None);
        let decided = |approved| {
            let (actor, reason) = ("ann".to_owned(), "no".to_owned());
            [Kept {
                decision: Some(Decision { approved, at_ms: 5, actor, reason }),
                ..open.clone()
            }]
        };
        assert!(same_as(&again, &decided(false), &present).is_some());
        assert_eq!(same_as(&again, &decided(true), &present), None);
        let later = Present { now_ms: 100, ..present };
        assert_eq!(same_as(&again, &known, &later), None);
        assert_eq!(same_as(&again, &decided(false), &later), None);
    }
}
