//! Migrations as operators see them: how fast they may go, whose turn it is, which step each layer is at, and who is waited
//! for. Pure. What ranks are told is said by `migrating`.

use std::collections::BTreeMap;

use protocol::session::LayerStaging;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::{
    BYTES_PER_SECOND_DEFAULT, COUNT_MAX, LAYERS_AT_ONCE_DEFAULT, LAYERS_AT_ONCE_MAX, STUCK_MS,
};
use crate::migrating::{RankLayer, bound, disagreement};
use crate::propose::OutOfRange;

/// How fast experts of a group move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Pace {
    /// Nothing new is copied, and nothing that was copied comes to be in force; false if nobody has said otherwise.
    pub(crate) paused: bool,
    /// Layers that are under way at once, 1 to 1024; 2 if nobody has said otherwise. Ranks have room for one more
    /// placement of each.
    pub(crate) layers_at_once: u32,
    /// Bytes that a rank copies in a second at most; 500 MB if nobody has said otherwise.
    pub(crate) bytes_per_second: u64,
}

impl Default for Pace {
    fn default() -> Self {
        let (layers_at_once, bytes_per_second) = (LAYERS_AT_ONCE_DEFAULT, BYTES_PER_SECOND_DEFAULT);
        Self { paused: false, layers_at_once, bytes_per_second }
    }
}

impl Pace {
    /// Refuses what makes no sense.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        let within = |name, value: u64, most: u64| {
            let (value, inside) = (value.to_string(), (1..=most).contains(&value));
            let refused = OutOfRange { name, value, expected: format!("1 to {most}") };
            if inside { Ok(()) } else { Err(refused) }
        };
        within("layers_at_once", self.layers_at_once.into(), LAYERS_AT_ONCE_MAX)?;
        within("bytes_per_second", self.bytes_per_second, COUNT_MAX)
    }

    /// How long a rank may take for so many bytes of each of the layers that are under way.
    fn copy_ms(&self, bytes: u64) -> u64 {
        let all = bytes.saturating_mul(self.layers_at_once.into()).saturating_mul(1_000);
        all / self.bytes_per_second.max(1)
    }

    /// What ranks are told.
    pub(crate) fn throttle(&self) -> u64 {
        if self.paused { 0 } else { self.bytes_per_second }
    }
}

/// How far a layer is on its way to what is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Step {
    /// Its turn comes later.
    Queued,
    /// Ranks copy experts. It can still be given up.
    Staging,
    /// A rank says why it cannot, or ranks have not the same of an expert. It is tried again.
    Blocked,
    /// A rank is ready: it is in force after the next call of the layer that all ranks take part in.
    Flipping,
}

impl Step {
    /// Of a layer whose ranks do not all hold `newest`.
    pub(crate) fn of(ranks: &[RankLayer], newest: u64) -> Self {
        if bound(ranks).is_some() {
            return Self::Flipping;
        }
        let mut on_its_way = ranks.iter().filter_map(|rank| rank.to(newest)).peekable();
        if on_its_way.peek().is_none() {
            Self::Queued
        } else if disagreement(ranks, newest).is_some() || on_its_way.any(|s| s.problem.is_some()) {
            Self::Blocked
        } else {
            Self::Staging
        }
    }
}

/// A layer whose ranks do not all hold its newest committed epoch: its number, that epoch, and what ranks say.
pub(crate) type OnItsWay = (u32, u64, Vec<RankLayer>);

/// Those of `layers`, each with what ranks say, `newest` being the newest committed epochs.
pub(crate) fn on_their_way(
    layers: Vec<(u32, Vec<RankLayer>)>,
    newest: &BTreeMap<u32, u64>,
) -> Vec<OnItsWay> {
    let on_its_way = |(layer, ranks): (u32, Vec<RankLayer>)| {
        let newest = *newest.get(&layer)?;
        let behind = ranks.iter().any(|rank| rank.held < newest);
        behind.then_some((layer, newest, ranks))
    };
    layers.into_iter().filter_map(on_its_way).collect()
}

/// Layers whose ranks are told something now: whose turn it is, and whose newest epoch `is_recovered` from the loss of ranks, or
/// where there is no way back.
pub(crate) fn told<'a>(
    on_their_way: &'a [OnItsWay],
    pace: &Pace,
    is_recovered: impl Fn(u32, u64) -> bool,
) -> Vec<(u32, &'a [RankLayer])> {
    let step = |(layer, newest, ranks): &OnItsWay| (*layer, Step::of(ranks, *newest));
    let steps: Vec<(u32, Step)> = on_their_way.iter().map(step).collect();
    let turns = in_turn(&steps, pace);
    let goes = |(layer, newest, ranks): &&OnItsWay| {
        turns.contains(layer) && (bound(ranks).is_some() || is_recovered(*layer, *newest))
    };
    on_their_way.iter().filter(goes).map(|(layer, _, ranks)| (*layer, &ranks[..])).collect()
}

/// Which layers' ranks are told something, of `steps` that are ascending: those where there is no way back, and of the others
/// as many as there is room for, those that have begun first. Who is blocked has given its room back.
pub(crate) fn in_turn(steps: &[(u32, Step)], pace: &Pace) -> Vec<u32> {
    let of = |step| steps.iter().filter(move |(_, is)| *is == step).map(|(layer, _)| *layer);
    let mut turns: Vec<u32> = of(Step::Flipping).collect();
    if !pace.paused {
        let room = (pace.layers_at_once as usize).saturating_sub(turns.len());
        let begun: Vec<u32> = of(Step::Staging).collect();
        let more = of(Step::Queued).take(room.saturating_sub(begun.len()));
        turns.extend(begun.into_iter().chain(more).chain(of(Step::Blocked)));
    }
    turns
}

/// What of a rank's word changes when it gets on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Word {
    held: u64,
    epoch: u64,
    left: u64,
    staged: bool,
    ready: bool,
}

impl Word {
    fn of(rank: &RankLayer) -> Self {
        let held = rank.held;
        rank.staging.as_ref().map_or(Self { held, ..Self::default() }, |staging| {
            let LayerStaging { epoch, left, staged, ready, .. } = *staging;
            Self { held, epoch, left, staged, ready }
        })
    }
}

/// A layer on its way, as it was seen over time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Motion {
    pub(crate) epoch: u64,
    pub(crate) step: Step,
    /// Since when it is at this step, in milliseconds since 1970.
    pub(crate) since_ms: u64,
    /// Whether somebody was told of a rank that does not get on.
    pub(crate) told_stuck: bool,
    /// What each rank said last, and since when.
    ranks: BTreeMap<u32, (Word, u64)>,
}

/// A rank that does not get on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Stuck {
    /// The rank.
    pub(crate) rank: u32,
    /// Bytes that it lacks still.
    pub(crate) bytes_left: u64,
    /// For how long it has said nothing new.
    pub(crate) seconds: u64,
}

impl Motion {
    /// A layer is seen, `before` being what it was when it was seen last.
    pub(crate) fn seen(
        before: Option<&Self>,
        ranks: &[RankLayer],
        (epoch, step): (u64, Step),
        now_ms: u64,
    ) -> Self {
        let before = before.filter(|before| before.epoch == epoch);
        let since_ms = before.filter(|before| before.step == step).map(|before| before.since_ms);
        let word = |of: &RankLayer| {
            let word = Word::of(of);
            let known = before.and_then(|before| before.ranks.get(&of.rank));
            let since_ms = known.filter(|(said, _)| *said == word).map(|(_, since_ms)| *since_ms);
            (of.rank, (word, since_ms.unwrap_or(now_ms)))
        };
        let ranks = ranks.iter().map(word).collect();
        let told_stuck = before.is_some_and(|before| before.told_stuck);
        Self { epoch, step, since_ms: since_ms.unwrap_or(now_ms), told_stuck, ranks }
    }

    /// In a pause nobody is waited for, however long it lasts.
    pub(crate) fn rest(&mut self, now_ms: u64) {
        self.ranks.values_mut().for_each(|(_, since_ms)| *since_ms = now_ms);
    }

    /// The first rank that the others wait for, and that has said nothing new for long. A layer that is to be in force waits for
    /// a call and not for ranks once all are ready.
    pub(crate) fn stuck(&self, ranks: &[RankLayer], pace: &Pace, now_ms: u64) -> Option<Stuck> {
        let waited_for = |word: &Word| match self.step {
            Step::Queued => false,
            Step::Staging | Step::Blocked => !pace.paused && !word.staged,
            Step::Flipping => !word.ready && word.held < self.epoch,
        };
        let mut stuck = ranks.iter().filter_map(|of| {
            let (rank, (word, said_ms)) = (of.rank, self.ranks.get(&of.rank)?);
            let quiet_ms = now_ms.saturating_sub(*(said_ms).max(&self.since_ms));
            let [bytes, bytes_left] =
                of.to(self.epoch).map_or([0; 2], |staging| [staging.bytes, staging.bytes_left]);
            let stuck = waited_for(word) && quiet_ms >= STUCK_MS + pace.copy_ms(bytes);
            stuck.then_some(Stuck { rank, bytes_left, seconds: quiet_ms / 1_000 })
        });
        stuck.next()
    }
}

/// Layers of a group that are on their way, by number.
pub(crate) type Motions = BTreeMap<u32, Motion>;

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(layers_at_once: u32, paused: bool) -> Pace {
        Pace { paused, layers_at_once, ..Pace::default() }
    }

    fn rank(held: u64, epoch: u64, (left, staged, ready): (u64, bool, bool)) -> RankLayer {
        let (bytes, bytes_left) = (40, left * 10);
        let none = LayerStaging::default();
        let staging = LayerStaging { epoch, left, bytes_left, bytes, staged, ready, ..none };
        RankLayer { rank: 0, held, staging: Some(staging) }
    }

    /// As rank 1.
    fn second(of: &RankLayer) -> RankLayer {
        RankLayer { rank: 1, ..of.clone() }
    }

    const IDLE: RankLayer = RankLayer { rank: 0, held: 1, staging: None };

    #[test]
    fn a_pace_that_makes_no_sense_is_refused() {
        assert!(Pace::default().check().is_ok());
        for (wrong, says) in [
            (pace(0, false), "layers_at_once"),
            (pace(1_025, true), "layers_at_once"),
            (Pace { bytes_per_second: 0, ..Pace::default() }, "bytes_per_second"),
        ] {
            assert_eq!(wrong.check().unwrap_err().name, says);
        }
        assert_eq!(pace(1, true).throttle(), 0, "the throttle of a pause");
        assert_eq!(pace(1, false).throttle(), 500_000_000);
    }

    #[test]
    fn steps_are_told_apart() {
        let copies = rank(1, 2, (3, false, false));
        let has = rank(1, 2, (0, true, false));
        let ready = rank(1, 2, (0, true, true));
        let mut fails = copies.clone();
        fails.staging.as_mut().unwrap().problem = Some("no memory".to_owned());
        let mut other = has.clone();
        other.staging.as_mut().unwrap().digests = vec![(5, 1)];
        let mut differs = has.clone();
        differs.staging.as_mut().unwrap().digests = vec![(5, 2)];
        for (ranks, expected) in [
            ([IDLE, IDLE], Step::Queued),
            // What was on its way is another by now.
            ([rank(1, 1, (0, true, false)), IDLE], Step::Queued),
            ([copies.clone(), IDLE], Step::Staging),
            ([has.clone(), has.clone()], Step::Staging),
            ([fails, has.clone()], Step::Blocked),
            ([other, differs], Step::Blocked),
            ([has.clone(), ready.clone()], Step::Flipping),
            ([RankLayer { held: 2, ..IDLE }, has], Step::Flipping),
        ] {
            assert_eq!(Step::of(&ranks, 2), expected, "{ranks:?}");
        }
    }

    #[test]
    fn as_many_layers_move_at_once_as_there_is_room_for() {
        use Step::{Blocked, Flipping, Queued, Staging};
        let steps = |steps: &[Step]| (0..).zip(steps.iter().copied()).collect::<Vec<(u32, Step)>>();
        for (is, at_once, expected) in [
            (&[Queued, Queued, Queued][..], 2, &[0, 1][..]),
            (&[Queued, Staging, Queued], 1, &[1]),
            (&[Queued, Staging, Queued], 2, &[1, 0]),
            (&[Flipping, Queued, Queued], 1, &[0]),
            (&[Flipping, Queued, Queued], 2, &[0, 1]),
            // Who cannot go on does not hold up the others.
            (&[Blocked, Queued, Queued], 1, &[1, 0]),
            // The limit was lowered meanwhile: what has begun goes on.
            (&[Staging, Staging, Queued], 1, &[0, 1]),
        ] {
            assert_eq!(in_turn(&steps(is), &pace(at_once, false)), expected, "{is:?} {at_once}");
        }
        // There is no way back from a flip, also in a pause.
        assert_eq!(in_turn(&steps(&[Staging, Flipping, Queued, Blocked]), &pace(4, true)), [1]);
    }

    /// The watchdog names the rank that the others wait for, and nobody who waits.
    #[test]
    fn whoever_says_nothing_new_for_long_is_stuck() {
        let has = rank(1, 2, (0, true, false));
        let slow = |left| second(&rank(1, 2, (left, false, false)));
        let staging = (2, Step::Staging);
        let first = Motion::seen(None, &[has.clone(), slow(3)], staging, 1_000);
        let now = [has.clone(), slow(2)];
        let later = Motion::seen(Some(&first), &now, staging, 20_000);
        assert_eq!(later.since_ms, 1_000);
        let stuck = |motion: &Motion, ranks: &[RankLayer], paused, now_ms| {
            let found = motion.stuck(ranks, &pace(1, paused), now_ms);
            found.map(|found| (found.rank, found.bytes_left, found.seconds))
        };
        assert_eq!(stuck(&later, &now, false, 19_999 + STUCK_MS), None);
        assert_eq!(stuck(&later, &now, false, 21_500 + STUCK_MS), Some((1, 20, 31)));
        assert_eq!(stuck(&later, &now, true, 21_500 + STUCK_MS), None, "in a pause");
        // 40 bytes of one layer take 40 s.
        let slow_pace = Pace { bytes_per_second: 1, ..pace(1, false) };
        let stuck_when_slow = |now_ms| later.stuck(&now, &slow_pace, now_ms).is_some();
        assert!(!stuck_when_slow(59_999 + STUCK_MS) && stuck_when_slow(60_000 + STUCK_MS));
        // The time of a pause does not count.
        let mut rested = later.clone();
        rested.rest(100_000);
        assert_eq!(stuck(&rested, &now, false, 99_999 + STUCK_MS), None);
        // It never answered.
        let silent = [has.clone(), second(&IDLE)];
        let unheard = Motion::seen(None, &silent, staging, 0);
        assert_eq!(stuck(&unheard, &silent, false, STUCK_MS), Some((1, 0, STUCK_MS / 1_000)));
        // All are ready: a call is waited for.
        let ready = rank(1, 2, (0, true, true));
        let ready = [ready.clone(), second(&ready)];
        let flips = Motion::seen(Some(&later), &ready, (2, Step::Flipping), 50_000);
        assert_eq!(flips.since_ms, 50_000);
        assert_eq!(stuck(&flips, &ready, false, u64::MAX), None);
        let one = [ready[0].clone(), second(&has)];
        let flips = Motion::seen(None, &one, (2, Step::Flipping), 0);
        assert_eq!(stuck(&flips, &one, true, STUCK_MS).unwrap().0, 1);
        // Another epoch begins anew.
        let next = Motion::seen(Some(&later), &now, (3, Step::Staging), 90_000);
        assert_eq!((next.since_ms, stuck(&next, &now, false, 90_000)), (90_000, None));
    }
}
