//! How the ranks of a group run a call together: announce, compare, compute, be done. Says nothing of
//! what is computed.
//!
//! - A **tag** is (generation, number). Each rank writes an announcement of the call into its own
//!   block, the tag last; nobody reads rows or writes terms before it has seen all N. That is counts,
//!   comparison and barrier in one: who announces number n has finished n - 1 in every respect, so
//!   areas need no second copy, and blocks (read by slow ranks while fast ones announce the next
//!   call) need two.
//! - All compare the same announcements, so a **mismatch** is the same error on every rank, and costs
//!   only the number.
//! - **Generation** is one word. Whoever gives up (a dead peer, a deadline) writes the reason and
//!   moves g to g + 1 by compare-and-swap; losers take the winner's reason. A rank that starts
//!   advances it, too. Survivors answer their engines, then wait for announcements of the new one.
//! - **Flip**: a rank that has staged another placement of a layer announces the epoch that it is ready for. After the first
//!   call in which all are ready, all have it in force: everybody saw the same announcements.
//! - **Absent** are the ranks that were dead when a rank entered its generation: nobody waits for them, and calls go on
//!   without their slots. Every rank announces whom it takes to be absent, and a call goes ahead only if all that take part
//!   say the same; otherwise somebody died or started meanwhile, and the next generation sees it alike.
//! - Words hold tags: nothing is reset, and nothing late is taken for something new.
//!
//! Late writers are harmless: a rank still at work on a call of generation g reads rows that may
//! change under it, and what it computes from them goes to ranks that have given that call up; it
//! announces in g + 1 after it has stopped, and nobody begins g + 1 before that.

use std::fmt;
use std::hint;
use std::sync::Arc;
use std::time::Duration;

use crate::heap::{HeapLayout, RANKS_MAX, SymmetricHeap};
use crate::memory::{bytes_of, bytes_of_mut};
use crate::problem::{ActFormat, Form, WeightsIn};

/// Version of what ranks write into the heap: those of another do not join.
pub const VERSION: u32 = 3;

/// Looks before sleeping: some microseconds. A rank that spins longer starves the one it waits for
/// where they share cores.
const SPINS: u32 = 200;

/// Longest sleep between two looks at whether peers live.
const LIFE_CHECK: Duration = Duration::from_millis(2);

/// Where in a call a rank was waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// For its announcement: its engine had not called, or it was not there.
    Announce,
    /// For its terms.
    Compute,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The rank's process is gone.
    Lost,
    /// The rank made no progress for as long as the deadline.
    Deadline,
    /// The rank has started.
    Joined,
    /// The rank sent what no rank of this version sends.
    Garbled,
    /// The rank had not taken up a placement that others had: it has now.
    Behind,
}

/// A call that the group gave up. Other ranks may have its answer already: engines repeat the step
/// together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupError {
    /// The generation that began.
    pub generation: u32,
    /// Whom it is about.
    pub rank: u32,
    /// Where in the call.
    pub phase: Phase,
    /// The layer that was called; 65535 where nobody knows.
    pub layer: u32,
    /// Why.
    pub reason: Reason,
}

impl fmt::Display for GroupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generation, rank, phase, layer, reason } = self;
        if *reason == Reason::Behind {
            return write!(
                f,
                "rank {rank} was a placement behind at layer {layer}, and is not any more: repeat the step"
            );
        }
        match reason {
            Reason::Lost => write!(f, "rank {rank} was lost")?,
            Reason::Deadline => write!(f, "rank {rank} made no progress before the deadline")?,
            Reason::Joined => write!(f, "rank {rank} started")?,
            Reason::Garbled => write!(f, "rank {rank} sent a list that cannot be")?,
            Reason::Behind => {}
        }
        match phase {
            Phase::Announce => write!(f, " while its announcement")?,
            Phase::Compute => write!(f, " while its terms")?,
        }
        if *layer != NO_LAYER {
            write!(f, " of layer {layer}")?;
        }
        write!(f, " were awaited: generation {generation} begins, repeat the step")
    }
}

impl std::error::Error for GroupError {}

/// Ranks that call different things.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {first} calls {ours}, rank {second} calls {theirs}: all ranks call the same")]
pub struct Mismatch {
    /// The lowest rank that calls.
    pub first: u32,
    /// What it calls.
    pub ours: String,
    /// The lowest rank that calls something else.
    pub second: u32,
    /// What that calls.
    pub theirs: String,
}

/// How a rank comes to take part in a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Its engine calls.
    Calls,
    /// It joins by itself: layer and form are what it saw others announce.
    Joins,
    /// Nobody has told it a layer: its engine's call was refused, or those of all others were.
    Refused,
    /// It does not take part: it was dead when the generation began. Nobody announces that.
    Absent,
}

/// The layer of an announcement that has none.
pub(crate) const NO_LAYER: u32 = 0xffff;

/// Some ranks of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RankSet(u64);

const _: () = assert!(RANKS_MAX <= u64::BITS, "a set has a bit for every rank");

impl RankSet {
    /// Whether it has no rank.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether it has `rank`.
    #[must_use]
    pub fn has(self, rank: u32) -> bool {
        rank < RANKS_MAX && self.0 >> rank & 1 == 1
    }

    /// Its ranks, ascending.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..RANKS_MAX).filter(move |&rank| self.has(rank))
    }

    /// The lowest rank that one of the two has and the other has not.
    fn first_difference(self, other: Self) -> Option<u32> {
        Self(self.0 ^ other.0).iter().next()
    }
}

impl FromIterator<u32> for RankSet {
    fn from_iter<T: IntoIterator<Item = u32>>(ranks: T) -> Self {
        Self(ranks.into_iter().fold(0, |set, rank| set | 1 << rank))
    }
}

/// What a rank says of a call before anybody computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Announcement {
    pub(crate) role: Role,
    pub(crate) layer: u32,
    pub(crate) form: Form,
    /// Number of the committed placement of the layer.
    pub(crate) epoch: u64,
    /// The epoch that this rank has staged and is ready for; 0 if none.
    pub(crate) ready: u64,
    /// Whom it takes to be absent.
    pub(crate) absent: RankSet,
    pub(crate) tokens: u32,
    pub(crate) top_k: u32,
    /// Pairs for each rank.
    pub(crate) pairs: Vec<u32>,
}

impl Announcement {
    /// What stands for a rank that takes no part.
    fn of_absent(absent: RankSet, ranks: u32) -> Self {
        let (role, layer, form) = (Role::Absent, NO_LAYER, Form::default());
        let pairs = vec![0; ranks as usize];
        Self { role, layer, form, epoch: 0, ready: 0, absent, tokens: 0, top_k: 1, pairs }
    }

    fn words(&self) -> [u64; 5] {
        let act = u64::from(self.form.act == ActFormat::Nvfp4);
        let place = u64::from(self.form.weights_in == WeightsIn::Combine);
        let flags = act | place << 1 | (self.role as u64) << 2 | u64::from(self.top_k) << 8;
        let call = u64::from(self.layer) | u64::from(self.tokens) << 32;
        [call, flags, self.epoch, self.ready, self.absent.0]
    }

    fn from_words([call, flags, epoch, ready, absent]: [u64; 5], pairs: Vec<u32>) -> Self {
        let act = if flags & 1 == 0 { ActFormat::Bf16 } else { ActFormat::Nvfp4 };
        let weights_in = if flags & 2 == 0 { WeightsIn::Fc1 } else { WeightsIn::Combine };
        let role = match flags >> 2 & 3 {
            0 => Role::Calls,
            1 => Role::Joins,
            _ => Role::Refused,
        };
        Self {
            role,
            layer: call as u32,
            form: Form { act, weights_in },
            epoch,
            ready,
            absent: RankSet(absent),
            tokens: (call >> 32) as u32,
            top_k: (flags >> 8) as u32,
            pairs,
        }
    }

    fn call(&self) -> String {
        format!("layer {} with {} under epoch {}", self.layer, self.form, self.epoch)
    }
}

/// Compares what all ranks announced, the same way on each; what is called, if any engine's call was
/// not refused.
pub(crate) fn compare(announcements: &[Announcement]) -> Result<Option<&Announcement>, Mismatch> {
    let mut callers = (0..).zip(announcements).filter(|(_, a)| a.role == Role::Calls);
    let Some((first, ours)) = callers.next() else { return Ok(None) };
    let differs = |a: &Announcement| match a.role {
        Role::Calls => (a.layer, a.form, a.epoch) != (ours.layer, ours.form, ours.epoch),
        // It saw layer and form of one of the callers; the epoch is its own.
        Role::Joins => a.epoch != ours.epoch,
        Role::Refused | Role::Absent => false,
    };
    match (0..).zip(announcements).find(|(_, a)| differs(a)) {
        None => Ok(Some(ours)),
        Some((second, theirs)) => {
            Err(Mismatch { first, ours: ours.call(), second, theirs: theirs.call() })
        }
    }
}

/// Whether the rank that announced `ours` flips after this call: all that take part are ready for the epoch that it is ready for. All ranks
/// see the same, so all flip after the same call, also those that brought no tokens. It flips as well if another has that
/// epoch in force already: that one saw all ready in a call whose announcements this one did not see whole.
pub(crate) fn flips(announcements: &[Announcement], ours: &Announcement) -> bool {
    let ready =
        |a: &Announcement| a.role == Role::Absent || (a.layer, a.ready) == (ours.layer, ours.ready);
    ours.ready != 0 && (announcements.iter().all(ready) || behind(announcements).is_some())
}

/// A rank that is ready for an epoch of the layer that another has in force: what the two sent fits two placements.
pub(crate) fn behind(announcements: &[Announcement]) -> Option<u32> {
    let ahead = |late: &Announcement| {
        let mut others = announcements.iter();
        others.any(|other| (other.layer, other.epoch) == (late.layer, late.ready))
    };
    (0..).zip(announcements).find(|(_, a)| a.ready != 0 && ahead(a)).map(|(rank, _)| rank)
}

/// Whether the rank that announced `ours` is ready for an epoch that another is beyond: all come to hold the later one, and
/// nobody flips to the earlier any more.
pub(crate) fn is_superseded(announcements: &[Announcement], ours: &Announcement) -> bool {
    let beyond = |a: &Announcement| a.layer == ours.layer && a.epoch > ours.ready;
    ours.ready != 0 && announcements.iter().any(beyond)
}

/// A rank's part in its group.
#[derive(Debug)]
pub struct Group {
    heap: Arc<dyn SymmetricHeap>,
    deadline: Duration,
    generation: u32,
    /// Number of the next call.
    number: u32,
    /// Ranks that were dead when this one entered the generation.
    absent: RankSet,
    /// The generation that this rank's engine called in last, or was told of; none before its first call.
    told: Option<u32>,
}

impl Group {
    /// Takes part in the group of `heap`; waits for a peer that makes no progress for `deadline`.
    #[must_use]
    pub fn new(heap: Arc<dyn SymmetricHeap>, deadline: Duration) -> Self {
        let mut group = Self {
            heap,
            deadline,
            generation: 0,
            number: 0,
            absent: RankSet::default(),
            told: None,
        };
        // Whoever waits for a predecessor of this rank must not wait for this one.
        let rank = group.heap.rank();
        group.refresh();
        while !group.move_on(rank, Phase::Announce, 0, Reason::Joined) {
            group.refresh();
        }
        group.refresh();
        group
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.heap.rank()
    }

    /// Ranks of the group.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.layout().shape.ranks
    }

    /// The group's heap.
    #[must_use]
    pub fn heap(&self) -> &Arc<dyn SymmetricHeap> {
        &self.heap
    }

    pub(crate) fn layout(&self) -> &HeapLayout {
        self.heap.layout()
    }

    /// The generation that this rank is in.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// This rank has another engine, which has no step to repeat.
    pub fn forget(&mut self) {
        self.told = None;
    }

    /// Enters the group's generation for a call of this rank's engine; who is absent from it.
    ///
    /// # Errors
    /// A rank was lost since the engine's last call. Engines that were in a call meanwhile have heard that, and repeat the
    /// step: so must this one.
    pub(crate) fn enter_to_call(&mut self) -> Result<RankSet, GroupError> {
        self.refresh();
        let told = self.told.replace(self.generation);
        let last = self.last_error();
        match told {
            Some(told) if told != self.generation && last.reason == Reason::Lost => Err(last),
            _ => Ok(self.absent),
        }
    }

    /// Enters the group's generation, if another has begun; who is absent from it.
    pub(crate) fn enter(&mut self) -> RankSet {
        self.refresh();
        self.absent
    }

    /// Says whether this rank waits for its engine and joins calls by itself.
    pub fn set_parked(&self, parked: bool) {
        self.heap.set_parked(parked);
    }

    /// What another rank has announced of the next call, if one has and knows the layer.
    pub(crate) fn pending(&mut self) -> Option<Announcement> {
        self.refresh();
        let mut announced = self.announced().map(|rank| self.read_announcement(rank));
        announced.find(|announcement| announcement.role != Role::Refused)
    }

    /// Whether another rank has announced the next call.
    pub fn is_pending(&mut self) -> bool {
        self.refresh();
        self.announced().next().is_some()
    }

    /// The other ranks that have announced the next call.
    fn announced(&self) -> impl Iterator<Item = u32> {
        let peers = (0..self.ranks()).filter(|&rank| rank != self.rank());
        peers.filter(|&rank| self.has_announced(rank))
    }

    /// Announces a call in the generation that was entered last, and waits for the announcements of all ranks that take part.
    pub(crate) fn announce(
        &mut self,
        ours: &Announcement,
    ) -> Result<Vec<Announcement>, GroupError> {
        let (rank, block) = (self.rank(), self.layout().block(self.number));
        self.heap.write(rank, block + 8, bytes_of(&ours.words()));
        self.heap.write(rank, block + 64, bytes_of(&ours.pairs));
        self.heap.store(rank, block, self.tag());
        for peer in self.present().filter(|&peer| peer != rank) {
            self.heap.ring(peer);
            self.heap.ring_parked(peer);
        }
        self.wait(Phase::Announce, ours.layer, |group, peer| group.has_announced(peer))?;
        let announced: Vec<Announcement> =
            (0..self.ranks()).map(|rank| self.announcement_of(rank)).collect();
        let differs = |a: &Announcement| a.absent.first_difference(self.absent);
        match announced.iter().find_map(differs) {
            None => Ok(announced),
            Some(changed) => {
                let alive = self.heap.is_alive(changed);
                let reason = if alive { Reason::Joined } else { Reason::Lost };
                self.move_on(changed, Phase::Announce, ours.layer, reason);
                Err(self.given_up())
            }
        }
    }

    /// Says that this rank has written all its terms, and waits until all have.
    pub(crate) fn be_done(&mut self, layer: u32) -> Result<(), GroupError> {
        let (own, tag) = (self.rank(), self.tag());
        for rank in self.present() {
            self.heap.store(rank, self.layout().done(own), tag);
            if rank != own {
                self.heap.ring(rank);
            }
        }
        self.wait(Phase::Compute, layer, |group, peer| {
            group.heap.load(own, group.layout().done(peer)) == tag
        })
    }

    /// The next call is another.
    pub(crate) fn end_call(&mut self) {
        self.number = self.number.wrapping_add(1);
    }

    fn tag(&self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.number)
    }

    fn has_announced(&self, rank: u32) -> bool {
        self.heap.load(rank, self.layout().block(self.number)) == self.tag()
    }

    fn present(&self) -> impl Iterator<Item = u32> + use<> {
        let absent = self.absent;
        (0..self.ranks()).filter(move |&rank| !absent.has(rank))
    }

    fn announcement_of(&self, rank: u32) -> Announcement {
        match self.absent.has(rank) {
            true => Announcement::of_absent(self.absent, self.ranks()),
            false => self.read_announcement(rank),
        }
    }

    fn read_announcement(&self, rank: u32) -> Announcement {
        let block = self.layout().block(self.number);
        let (mut words, mut pairs) = ([0; 5], vec![0; self.ranks() as usize]);
        self.heap.read(rank, block + 8, bytes_of_mut(&mut words));
        self.heap.read(rank, block + 64, bytes_of_mut(&mut pairs));
        Announcement::from_words(words, pairs)
    }

    /// Enters the group's generation. That of a group that was just founded is 0, which no tag may
    /// have; the first rank ends it.
    fn refresh(&mut self) {
        let generation = (self.heap.group_word() >> 32) as u32;
        if generation != self.generation {
            (self.generation, self.number) = (generation, 0);
            self.absent = (0..self.ranks()).filter(|&rank| !self.heap.is_alive(rank)).collect();
        }
    }

    /// Waits until `has` holds for every rank that takes part.
    fn wait(
        &mut self,
        phase: Phase,
        layer: u32,
        has: impl Fn(&Self, u32) -> bool,
    ) -> Result<(), GroupError> {
        let (mut since, mut progress) = (self.heap.now(), None);
        let mut looks = 0;
        loop {
            let rung = self.heap.rung();
            let mut missing = self.present().filter(|&rank| !has(self, rank)).peekable();
            let Some(&first) = missing.peek() else { return Ok(()) };
            if (self.heap.group_word() >> 32) as u32 != self.generation {
                return Err(self.given_up());
            }
            looks += 1;
            if looks < SPINS {
                hint::spin_loop();
                continue;
            }
            let dead = missing.find(|&rank| !self.heap.is_alive(rank));
            let now = Some(self.progress());
            if now != progress {
                (progress, since) = (now, self.heap.now());
            }
            let why = match dead {
                Some(rank) => Some((rank, Reason::Lost)),
                None if self.heap.now().saturating_sub(since) >= self.deadline => {
                    Some((first, Reason::Deadline))
                }
                None => None,
            };
            if let Some((rank, reason)) = why {
                self.move_on(rank, phase, layer, reason);
                return Err(self.given_up());
            }
            self.heap.sleep(rung, LIFE_CHECK);
        }
    }

    /// Gives the call up because of what `rank` sent, unless it was given up before: a rank that is
    /// at another call already overwrites its list.
    pub(crate) fn give_up_garbled(&mut self, rank: u32, layer: u32) -> GroupError {
        self.move_on(rank, Phase::Compute, layer, Reason::Garbled);
        self.given_up()
    }

    /// The call came to nothing because `rank` was behind. All ranks see that in the announcements: no generation ends.
    pub(crate) fn flipped(&self, rank: u32, layer: u32) -> GroupError {
        let (generation, phase) = (self.generation, Phase::Announce);
        GroupError { generation, rank, phase, layer, reason: Reason::Behind }
    }

    /// Sum of what all ranks have done, to see whether any does something.
    fn progress(&self) -> u64 {
        let words = (0..self.ranks()).map(|rank| self.heap.load(rank, self.layout().progress()));
        words.fold(0, u64::wrapping_add)
    }

    /// Ends this rank's generation; false when another rank was first.
    fn move_on(&mut self, rank: u32, phase: Phase, layer: u32, reason: Reason) -> bool {
        let seen = self.heap.group_word();
        if (seen >> 32) as u32 != self.generation {
            return false;
        }
        let next = u64::from(self.generation.wrapping_add(1).max(1)) << 32;
        let why =
            rank & 0xff | (phase as u32) << 8 | (reason as u32) << 12 | layer.min(NO_LAYER) << 16;
        let moved = self.heap.exchange_group_word(seen, next | u64::from(why)).is_ok();
        if moved {
            for peer in 0..self.ranks() {
                self.heap.ring(peer);
            }
        }
        moved
    }

    /// Enters the next generation, and says why the last one ended.
    fn given_up(&mut self) -> GroupError {
        self.refresh();
        self.told = Some(self.generation);
        self.last_error()
    }

    /// Why the last generation ended.
    fn last_error(&self) -> GroupError {
        let why = self.heap.group_word() as u32;
        GroupError {
            generation: self.generation,
            rank: why & 0xff,
            phase: if why >> 8 & 0xf == 0 { Phase::Announce } else { Phase::Compute },
            layer: why >> 16,
            reason: match why >> 12 & 0xf {
                0 => Reason::Lost,
                1 => Reason::Deadline,
                2 => Reason::Joined,
                _ => Reason::Garbled,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::heap::HeapShape;
    use crate::heap::shm::{Membership, ShmHeap};

    fn announcement(layer: u32, ranks: u32) -> Announcement {
        let (form, pairs) = (Form::ALL[3], vec![3; ranks as usize]);
        let (tokens, top_k) = (7, 16);
        let absent = RankSet::default();
        let (role, epoch, ready) = (Role::Calls, 9, 11);
        Announcement { role, layer, form, epoch, ready, absent, tokens, top_k, pairs }
    }

    /// The ranks of a group, in one process.
    fn group(folder: &std::path::Path, ranks: u32, deadline_ms: u64) -> Vec<Group> {
        let join = |rank| {
            let name = "g".to_owned();
            let membership = Membership { folder: folder.to_owned(), name, rank };
            let shape = HeapShape { ranks, max_tokens: 1, max_pairs: 1, hidden: 32 };
            let heap = ShmHeap::join(&membership, shape, &Vec::new()).unwrap();
            Group::new(Arc::new(heap), Duration::from_millis(deadline_ms))
        };
        let mut all: Vec<Group> = (0..ranks).map(join).collect();
        all.iter_mut().for_each(|rank| assert!(rank.enter().is_empty()));
        all
    }

    #[test]
    fn an_announcement_survives_its_words() {
        for form in Form::ALL {
            for role in [Role::Calls, Role::Joins, Role::Refused] {
                let absent = [0, 63].into_iter().collect();
                let ours = Announcement { role, form, absent, ..announcement(5, 3) };
                assert_eq!(Announcement::from_words(ours.words(), ours.pairs.clone()), ours);
            }
        }
    }

    #[test]
    fn ranks_see_what_all_announced_call_after_call() {
        let folder = tempfile::tempdir().unwrap();
        let ranks = group(folder.path(), 3, 60_000);
        thread::scope(|scope| {
            for rank in ranks {
                scope.spawn(|| (0..200).fold(rank, call));
            }
        });
    }

    /// One call of three ranks that bring as many tokens as their number.
    fn call(mut rank: Group, layer: u32) -> Group {
        let ours = Announcement { tokens: rank.rank(), ..announcement(layer, 3) };
        let all = rank.announce(&ours).unwrap();
        assert_eq!(compare(&all), Ok(Some(&all[0])));
        let tokens: Vec<u32> = all.iter().map(|a| a.tokens).collect();
        assert_eq!(tokens, [0, 1, 2]);
        assert!(all.iter().all(|a| a.layer == layer));
        rank.be_done(layer).unwrap();
        rank.end_call();
        rank
    }

    #[test]
    fn a_mismatch_is_the_same_on_every_rank() {
        let same = announcement(3, 3);
        let other = Announcement { layer: 4, ..same.clone() };
        let joins = Announcement { role: Role::Joins, layer: 4, ..same.clone() };
        let refused = Announcement { role: Role::Refused, epoch: 7, ..other.clone() };
        let all = [refused.clone(), same.clone(), joins.clone()];
        assert_eq!(compare(&all), Ok(Some(&same)));
        assert_eq!(compare(&[refused.clone(), refused]), Ok(None));
        let mismatch = compare(&[joins, same, other]).unwrap_err();
        assert_eq!((mismatch.first, mismatch.second), (1, 2));
        let text = mismatch.to_string();
        assert!(text.starts_with("rank 1 calls layer 3 with act=nvfp4"), "{text}");
        let late = Announcement { role: Role::Joins, epoch: 8, ..announcement(3, 2) };
        assert!(compare(&[announcement(3, 2), late]).is_err(), "placements differ");
    }

    #[test]
    fn all_flip_or_none_and_what_is_behind_others_is_given_up() {
        let ready = announcement(3, 2);
        let held = |epoch, ready| Announcement { epoch, ready, ..announcement(3, 2) };
        let both = [ready.clone(), ready.clone()];
        assert!(flips(&both, &ready) && behind(&both).is_none());
        // One has not staged it.
        let one = [ready.clone(), held(9, 0)];
        assert!(!flips(&one, &one[0]) && !flips(&one, &one[1]) && !is_superseded(&one, &one[0]));
        // One has it in force.
        let late = [ready.clone(), held(11, 0)];
        assert!(
            flips(&late, &late[0]) && !flips(&late, &late[1]) && !is_superseded(&late, &late[0])
        );
        assert_eq!(behind(&late), Some(0));
        // One started with a later one.
        let beyond = [ready, held(12, 0)];
        assert!(!flips(&beyond, &beyond[0]) && is_superseded(&beyond, &beyond[0]));
        assert!(!is_superseded(&beyond, &beyond[1]));
        let other_layer = [beyond[0].clone(), Announcement { layer: 4, ..beyond[1].clone() }];
        assert!(!is_superseded(&other_layer, &other_layer[0]));
    }

    /// After a mismatch nobody waits for the others to be done: the fast announce the next call while
    /// slow ones still read the announcements of this one. It takes the second block.
    #[test]
    fn a_fast_rank_does_not_overwrite_what_slow_ones_read() {
        let folder = tempfile::tempdir().unwrap();
        let ranks = group(folder.path(), 4, 5_000);
        thread::scope(|scope| {
            for rank in ranks {
                scope.spawn(|| (0..3_000).fold(rank, mismatched_call));
            }
        });
    }

    fn mismatched_call(mut rank: Group, number: u32) -> Group {
        let all = rank.announce(&announcement(number + rank.rank(), 4)).unwrap();
        let layers: Vec<u32> = all.iter().map(|a| a.layer).collect();
        assert_eq!(layers, [number, number + 1, number + 2, number + 3]);
        assert!(compare(&all).is_err());
        rank.end_call();
        rank
    }

    #[test]
    fn a_late_rank_is_named_and_the_group_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let mut ranks = group(folder.path(), 2, 50);
        let [zero, one] = &mut ranks[..] else { panic!("two ranks") };
        let before = one.generation();
        let error = zero.announce(&announcement(3, 2)).unwrap_err();
        assert_eq!((error.rank, error.phase, error.layer), (1, Phase::Announce, 3));
        assert_eq!((error.reason, error.generation), (Reason::Deadline, before + 1));
        // The late one enters the next generation without a word, and both go on.
        assert!(!one.is_pending());
        thread::scope(|scope| {
            scope.spawn(|| zero.announce(&announcement(4, 2)).unwrap());
            scope.spawn(|| one.announce(&announcement(4, 2)).unwrap());
        });
    }

    /// A whole call, in the generation that is now; what all announced.
    fn whole_call(rank: &mut Group, layer: u32) -> Vec<Announcement> {
        let absent = rank.enter();
        let all = rank.announce(&Announcement { absent, ..announcement(layer, 3) }).unwrap();
        rank.be_done(layer).unwrap();
        rank.end_call();
        all
    }

    fn call_without_one(rank: &mut Group, layer: u32) {
        let all = whole_call(rank, layer);
        assert_eq!(rank.absent.iter().collect::<Vec<_>>(), [1]);
        assert_eq!(all[1].role, Role::Absent);
        assert_eq!((all[1].tokens, &all[1].pairs[..]), (0, &[0; 3][..]));
        assert_eq!(compare(&all).unwrap().unwrap().layer, layer);
        assert!(flips(&all, &all[0]), "all that take part are ready");
    }

    #[test]
    fn a_lost_rank_is_named_at_once_and_calls_go_on_without_it_until_it_is_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut ranks = group(folder.path(), 3, 60_000);
        drop(ranks.remove(1));
        let [zero, two] = &mut ranks[..] else { panic!("two are left") };
        assert!(zero.enter_to_call().is_ok() && two.enter_to_call().is_ok());
        let error = zero.announce(&announcement(3, 3)).unwrap_err();
        assert_eq!((error.rank, error.reason), (1, Reason::Lost));
        // The other was between two calls: it hears of it as well, once.
        assert_eq!(two.enter_to_call().unwrap_err(), error);
        assert!(zero.enter_to_call().is_ok() && two.enter_to_call().is_ok());
        thread::scope(|scope| {
            for rank in [&mut *zero, &mut *two] {
                scope.spawn(|| (0..50).for_each(|layer| call_without_one(rank, layer)));
            }
        });
        let generation = error.generation;
        let name = "g".to_owned();
        let membership = Membership { folder: folder.path().to_owned(), name, rank: 1 };
        let shape = HeapShape { ranks: 3, max_tokens: 1, max_pairs: 1, hidden: 32 };
        let heap = ShmHeap::join(&membership, shape, &Vec::new()).unwrap();
        let mut one = Group::new(Arc::new(heap), Duration::from_secs(60));
        assert_eq!(one.generation(), generation + 1);
        thread::scope(|scope| {
            for rank in [zero, &mut one, two] {
                scope.spawn(|| {
                    let all = whole_call(rank, 4);
                    assert!(all.iter().all(|a| a.role == Role::Calls));
                });
            }
        });
    }

    /// Two ranks entered a generation before and after a third died: no call goes ahead, and the next generation is the same
    /// to both.
    #[test]
    fn ranks_that_see_other_ranks_absent_call_nothing_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut ranks = group(folder.path(), 3, 60_000);
        // It announces before it dies: whoever does not know of its death has all that it waits for.
        let two = ranks.remove(2);
        let block = two.layout().block(0);
        two.heap.write(2, block + 8, bytes_of(&announcement(3, 3).words()));
        two.heap.store(2, block, two.tag());
        drop(two);
        let generation = ranks[0].generation();
        ranks[1].generation = 0;
        assert!(ranks[1].enter().has(2) && !ranks[0].enter().has(2));
        let [zero, one] = &mut ranks[..] else { panic!("two are left") };
        thread::scope(|scope| {
            for rank in [&mut *zero, &mut *one] {
                scope.spawn(|| {
                    let absent = rank.absent;
                    let ours = Announcement { absent, ..announcement(3, 3) };
                    let error = rank.announce(&ours).unwrap_err();
                    assert_eq!((error.rank, error.reason), (2, Reason::Lost));
                    assert_eq!(error.generation, generation + 1);
                    whole_call(rank, 5);
                });
            }
        });
    }
}
