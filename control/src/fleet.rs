//! Who is there: groups, their ranks, what they hold, and the sessions that speak for them, in memory.
//! Pure: no input or output, and the time is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use protocol::session::{
    FromControl, Heartbeat, LayerPlacement, LayerStaging, ModelInfo, Register, SESSION_VERSION,
    SESSION_VERSION_OLDEST,
};
use protocol::tactics::Tactics;
use tokio::sync::mpsc;

use crate::limits::{COMMANDS_MAX, COUNT_MAX, NAME_BYTES_MAX, RANKS_MAX, TACTICS_MAX};
use crate::migrating::RankLayer;
use crate::placing::{fits, rooms};

/// What a session is to do.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// Have the worker's window closed, and give the rank to `closed` once that window is stored.
    CloseWindow { mark_ms: u64, closed: mpsc::Sender<u32> },
    /// Tell the worker something about placements.
    Order(Box<FromControl>),
}

/// Why a registration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("session version is {got}, expected {SESSION_VERSION_OLDEST} to {SESSION_VERSION}")]
    Version { got: u32 },
    #[error("{what} is {got}, expected {expected}")]
    Value { what: &'static str, got: String, expected: String },
    #[error("{what} is {got}, the group {group} has {expected}")]
    Differs { group: String, what: &'static str, got: String, expected: String },
    #[error("rank {rank} of the group {group} is connected with a later start")]
    Older { group: String, rank: u32 },
}

/// Why nothing moves in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Still {
    #[error("rank {rank} is missing or loading")]
    Missing { rank: u32 },
    #[error("rank {rank} takes another placement up at its next start only")]
    UntilStart { rank: u32 },
}

/// One rank.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) register: Register,
    pub(crate) first_seen_ms: u64,
    pub(crate) last_seen_ms: u64,
    pub(crate) heartbeat: Option<Heartbeat>,
    /// What it says that it holds or, while it loads, was told to.
    placements: Option<Arc<[LayerPlacement]>>,
    /// Whether it has said that it holds them.
    holds: bool,
    /// What it says is on its way.
    staging: Vec<LayerStaging>,
    /// How fast it copies at most, if it has said so.
    throttle: Option<u64>,
    /// What it knows of its tactics, if it has said so.
    tactics: Option<Tactics>,
    /// The newest epoch of each layer that it was told to be ready for.
    told_ready: BTreeMap<u32, u64>,
    /// The session that speaks for it, by number, and how to have it do something.
    session: Option<(u64, mpsc::Sender<Command>)>,
    /// Whether its registration is in the store: nothing is shown that a restart would forget.
    kept: bool,
}

/// Version since which workers say what they hold; earlier ones register when they are ready.
const HOLDS_SINCE: u32 = 2;

/// Version since which workers split tokens as placements say.
const SPLITS_SINCE: u32 = 6;

/// Whether a worker is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// Connected, heard of lately, and ready.
    Ready,
    /// The same, but it has not said what it holds.
    Loading,
    Lost,
}

impl Presence {
    /// Its name in the API.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ready => "connected",
            Self::Loading => "loading",
            Self::Lost => "lost",
        }
    }
}

impl Worker {
    /// Whether it is there.
    pub(crate) fn presence(&self, now_ms: u64, patience_ms: u64) -> Presence {
        match self.kept && self.speaks(now_ms, patience_ms) {
            false => Presence::Lost,
            true if self.holds || self.register.version < HOLDS_SINCE => Presence::Ready,
            true => Presence::Loading,
        }
    }

    /// What it says that it holds, if it is there.
    pub(crate) fn held(&self, now_ms: u64, patience_ms: u64) -> Option<&[LayerPlacement]> {
        let ready = self.presence(now_ms, patience_ms) == Presence::Ready;
        self.placements.as_deref().filter(|_| ready && self.holds)
    }

    /// What it says is on its way to other placements.
    pub(crate) fn staging(&self) -> &[LayerStaging] {
        &self.staging
    }

    fn speaks(&self, now_ms: u64, patience_ms: u64) -> bool {
        self.session.is_some() && now_ms.saturating_sub(self.last_seen_ms) <= patience_ms
    }
}

/// A rank by number, and what it holds.
type Member<'a> = (u32, &'a Worker, &'a [LayerPlacement]);

/// Every worker, by group and rank.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    pub(crate) groups: BTreeMap<String, BTreeMap<u32, Worker>>,
    /// Why a group was not told what to hold.
    pub(crate) problems: BTreeMap<String, String>,
    /// By group.
    given_up: BTreeMap<String, GivenUp>,
    sessions: u64,
}

/// Ranks that nobody waits for any more, until they are back.
#[derive(Debug, Default)]
struct GivenUp {
    ranks: BTreeSet<u32>,
    /// The epoch of each layer up to which what only those ranks had was given a place elsewhere; none before the first time.
    recovered: Option<BTreeMap<u32, u64>>,
}

/// A session that stands.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) session: u64,
    /// What it is to do; closed when a newer session speaks for the rank.
    pub(crate) commands: mpsc::Receiver<Command>,
}

impl Fleet {
    /// Brings a worker back from the store: known, and without a session.
    pub(crate) fn remember(
        &mut self,
        register: Register,
        (first_seen_ms, last_seen_ms): (u64, u64),
    ) {
        let group = self.groups.entry(register.group.clone()).or_default();
        let rank = register.rank;
        let worker = Worker {
            register,
            first_seen_ms,
            last_seen_ms,
            heartbeat: None,
            placements: None,
            holds: false,
            staging: Vec::new(),
            throttle: None,
            tactics: None,
            told_ready: BTreeMap::new(),
            session: None,
            kept: true,
        };
        group.insert(rank, worker);
    }

    /// Lets a worker in. A later process of a rank takes the place of an earlier one; a rank that does
    /// not fit those of its group that are there is refused.
    pub(crate) fn admit(
        &mut self,
        register: &Register,
        now_ms: u64,
        patience_ms: u64,
    ) -> Result<Admitted, Refusal> {
        check(register)?;
        let (name, rank) = (&register.group, register.rank);
        let group = self.groups.entry(name.clone()).or_default();
        for other in group.values().filter(|other| other.speaks(now_ms, patience_ms)) {
            if other.register.rank != rank {
                check_same(register, &other.register)?;
            } else if other.register.incarnation > register.incarnation {
                return Err(Refusal::Older { group: name.clone(), rank });
            }
        }
        // Ranks of another model or number that went would only be missed for ever.
        group.retain(|_, other| {
            other.speaks(now_ms, patience_ms) || check_same(register, &other.register).is_ok()
        });
        if let Some(given_up) = self.given_up.get_mut(name)
            && given_up.ranks.remove(&rank)
        {
            given_up.recovered = None;
        }
        self.sessions += 1;
        let (session, (command, commands)) = (self.sessions, mpsc::channel(COMMANDS_MAX));
        // A session that speaks for it ends with its sender.
        let before = group.remove(&rank);
        let first_seen_ms = before.map_or(now_ms, |before| before.first_seen_ms);
        let worker = Worker {
            register: register.clone(),
            first_seen_ms,
            last_seen_ms: now_ms,
            heartbeat: None,
            placements: None,
            holds: false,
            staging: Vec::new(),
            throttle: None,
            tactics: None,
            told_ready: BTreeMap::new(),
            session: Some((session, command)),
            kept: false,
        };
        group.insert(rank, worker);
        Ok(Admitted { session, commands })
    }

    /// A registration is in the store.
    pub(crate) fn keep(&mut self, of: &Register, session: u64) {
        if let Some(worker) = self.of_session(of, session) {
            worker.kept = true;
        }
    }

    /// What the other ranks of a group hold or were told to, if any of them is there: a rank that comes
    /// back must hold the same.
    pub(crate) fn placements_of_others(
        &self,
        of: &Register,
        now_ms: u64,
        patience_ms: u64,
    ) -> Option<Arc<[LayerPlacement]>> {
        let group = self.groups.get(&of.group)?.values();
        let others = group
            .filter(|other| other.register.rank != of.rank && other.speaks(now_ms, patience_ms));
        let placed = others.filter(|other| other.placements.is_some());
        placed.max_by_key(|other| other.holds)?.placements.clone()
    }

    /// The epochs that the other ranks of a group hold, are ready for or were told to be: there is no way back from them.
    pub(crate) fn bound_of_others(&self, of: &Register) -> BTreeMap<u32, u64> {
        let group = self.groups.get(&of.group).into_iter().flatten();
        let mut bound = BTreeMap::new();
        for (_, other) in group.filter(|(rank, other)| **rank != of.rank && other.session.is_some())
        {
            let held = other.placements.iter().flat_map(|held| held.iter());
            let held = held.map(|placed| (placed.layer, placed.epoch));
            let ready = other.staging.iter().filter(|staging| staging.ready);
            let ready = ready.map(|staging| (staging.layer, staging.epoch));
            let told = other.told_ready.iter().map(|(layer, epoch)| (*layer, *epoch));
            for (layer, epoch) in held.chain(ready).chain(told) {
                let newest: &mut u64 = bound.entry(layer).or_default();
                *newest = epoch.max(*newest);
            }
        }
        bound
    }

    /// A worker was told what to hold.
    pub(crate) fn place(&mut self, of: &Register, session: u64, placements: Arc<[LayerPlacement]>) {
        let placements = self.shared(of, placements);
        if let Some(worker) = self.of_session(of, session) {
            worker.placements = Some(placements);
        }
    }

    /// The copy of these that workers of the group have, if any has: equal ones are one.
    fn shared(&self, of: &Register, placements: Arc<[LayerPlacement]>) -> Arc<[LayerPlacement]> {
        let group = self.groups.get(&of.group).into_iter().flat_map(BTreeMap::values);
        let mut known = group.filter_map(|worker| worker.placements.as_ref());
        known.find(|known| ***known == *placements).cloned().unwrap_or(placements)
    }

    /// A worker says what it holds.
    pub(crate) fn hold(
        &mut self,
        of: &Register,
        session: u64,
        placements: Vec<LayerPlacement>,
    ) -> Result<(), Refusal> {
        check_held(of, &placements)?;
        let placements = self.shared(of, placements.into());
        if let Some(worker) = self.of_session(of, session) {
            worker.placements = Some(placements);
            worker.holds = true;
        }
        Ok(())
    }

    /// A worker says what is on its way to other placements.
    pub(crate) fn stage(
        &mut self,
        of: &Register,
        session: u64,
        (staging, throttle): (Vec<LayerStaging>, Option<u64>),
    ) {
        if let Some(worker) = self.of_session(of, session) {
            (worker.staging, worker.throttle) = (staging, throttle);
        }
    }

    /// A worker says what it knows of its tactics.
    pub(crate) fn tell_tactics(
        &mut self,
        of: &Register,
        session: u64,
        tactics: Tactics,
    ) -> Result<(), Refusal> {
        check_tactics(&tactics)?;
        if let Some(worker) = self.of_session(of, session) {
            worker.tactics = Some(tactics);
        }
        Ok(())
    }

    /// What the ranks of a group that have a session say of their tactics.
    pub(crate) fn tactics(&self, group: &str) -> Vec<(u32, Tactics)> {
        let workers = self.groups.get(group).into_iter().flatten();
        let there = workers.filter(|(_, worker)| worker.session.is_some());
        there.filter_map(|(rank, worker)| Some((*rank, worker.tactics.clone()?))).collect()
    }

    /// Ranks of a group that keep to another throttle than this.
    pub(crate) fn throttled_otherwise(&self, group: &str, bytes_per_second: u64) -> Vec<u32> {
        let workers = self.groups.get(group).into_iter().flatten();
        let otherwise =
            workers.filter(|(_, worker)| worker.throttle.is_some_and(|is| is != bytes_per_second));
        otherwise.map(|(rank, _)| *rank).collect()
    }

    /// Ranks of a group that were there and are lost, and when each was heard of last.
    pub(crate) fn lost(&self, group: &str, now_ms: u64, patience_ms: u64) -> Vec<(u32, u64)> {
        let workers = self.groups.get(group).into_iter().flatten();
        let lost = workers.filter(|(_, worker)| !worker.speaks(now_ms, patience_ms));
        lost.map(|(rank, worker)| (*rank, worker.last_seen_ms)).collect()
    }

    /// From now on nobody waits for these ranks of a group, but for those that are back; true if it was for others until now.
    pub(crate) fn give_up(
        &mut self,
        group: &str,
        ranks: &BTreeSet<u32>,
        (now_ms, patience_ms): (u64, u64),
    ) -> bool {
        let lost = self.lost(group, now_ms, patience_ms);
        let lost = lost.into_iter().map(|(rank, _)| rank).filter(|rank| ranks.contains(rank));
        let ranks: BTreeSet<u32> = lost.collect();
        let known = self.given_up.entry(group.to_owned()).or_default();
        let changed = known.ranks != ranks;
        if changed {
            *known = GivenUp { ranks, recovered: None };
        }
        changed
    }

    /// Ranks of a group that were given up.
    pub(crate) fn given_up(&self, group: &str) -> impl Iterator<Item = u32> {
        self.given_up.get(group).into_iter().flat_map(|known| known.ranks.iter().copied())
    }

    /// What only the ranks `gone` had has a place elsewhere by these epochs.
    pub(crate) fn recover(
        &mut self,
        group: &str,
        gone: &BTreeSet<u32>,
        epochs: BTreeMap<u32, u64>,
    ) {
        if let Some(known) = self.given_up.get_mut(group).filter(|known| known.ranks == *gone) {
            known.recovered = Some(epochs);
        }
    }

    /// The epochs by which that is so; none if it is not, or if nobody was given up.
    pub(crate) fn recovered(&self, group: &str) -> Option<&BTreeMap<u32, u64>> {
        self.given_up.get(group)?.recovered.as_ref()
    }

    /// Whether the placement of a layer may come to be in force as far as ranks that were given up are concerned: nothing that
    /// they alone would have is taken from the others.
    pub(crate) fn is_recovered(&self, group: &str, layer: u32, epoch: u64) -> bool {
        let nobody = self.given_up(group).next().is_none();
        nobody || self.recovered(group).is_some_and(|epochs| epochs.get(&layer) == Some(&epoch))
    }

    /// Why nothing moves in a group, if nothing does.
    pub(crate) fn still(&self, group: &str, now_ms: u64, patience_ms: u64) -> Option<Still> {
        self.there(group, now_ms, patience_ms).err()
    }

    /// Every rank of a group that was not given up, and what it holds.
    fn there(&self, group: &str, now_ms: u64, patience_ms: u64) -> Result<Vec<Member<'_>>, Still> {
        let ranks = self.groups.get(group);
        let count = ranks.and_then(|ranks| ranks.values().next()).map(|w| w.register.ranks);
        let given_up: BTreeSet<u32> = self.given_up(group).collect();
        let there = (0..count.unwrap_or(0)).filter(|rank| !given_up.contains(rank)).map(|rank| {
            let worker = ranks.and_then(|ranks| ranks.get(&rank));
            let held = worker.and_then(|worker| worker.held(now_ms, patience_ms));
            let (worker, held) = worker.zip(held).ok_or(Still::Missing { rank })?;
            let moves = worker.register.stages.then_some((rank, worker, held));
            moves.ok_or(Still::UntilStart { rank })
        });
        there.collect()
    }

    /// What every rank of a group that was not given up says of each layer, or of `only` one.
    pub(crate) fn staging(
        &self,
        group: &str,
        only: Option<u32>,
        now_ms: u64,
        patience_ms: u64,
    ) -> Result<Vec<(u32, Vec<RankLayer>)>, Still> {
        let workers = self.there(group, now_ms, patience_ms)?;
        let layers = workers.first().map_or(&[][..], |(_, _, held)| held).iter().enumerate();
        let layers = layers.filter(|(_, placed)| only.is_none_or(|only| placed.layer == only));
        let of_layer = |(at, placed): (usize, &LayerPlacement)| {
            let of_rank = |(rank, worker, held): &Member<'_>| {
                let staging = worker.staging.iter().find(|staging| staging.layer == placed.layer);
                let (rank, held) = (*rank, held.get(at)?.epoch);
                Some(RankLayer { rank, held, staging: staging.cloned() })
            };
            Some((placed.layer, workers.iter().map(of_rank).collect::<Option<_>>()?))
        };
        Ok(layers.filter_map(of_layer).collect())
    }

    /// Has the session of a rank do something.
    pub(crate) fn order(&mut self, group: &str, rank: u32, command: Command) {
        let worker = self.groups.get_mut(group).and_then(|group| group.get_mut(&rank));
        let Some(worker) = worker else { return };
        if let Command::Order(order) = &command
            && let FromControl::Ready { layer, epoch } = **order
        {
            worker.told_ready.insert(layer, epoch);
        }
        if let Some((_, commands)) = worker.session.as_ref()
            && let Err(error) = commands.try_send(command)
        {
            tracing::debug!(%error, group, rank, "a session does not take commands");
        }
    }

    /// What is in force in a group: what all of its ranks say that they hold, but for those that were given up. None while
    /// another rank is missing, or holds something else.
    pub(crate) fn in_force(
        &self,
        group: &str,
        now_ms: u64,
        patience_ms: u64,
    ) -> Option<&[LayerPlacement]> {
        let given_up: BTreeSet<u32> = self.given_up(group).collect();
        let group = self.groups.get(group)?;
        let ranks = group.values().next()?.register.ranks;
        let mut there = (0..ranks).filter(|rank| !given_up.contains(rank)).peekable();
        let first = group.get(there.peek()?)?.held(now_ms, patience_ms)?;
        let holds = |rank| {
            let held = group.get(&rank).and_then(|worker| worker.held(now_ms, patience_ms));
            // Ranks that hold the same share one copy of it.
            held.is_some_and(|held| std::ptr::eq(held, first))
        };
        there.all(holds).then_some(first)
    }

    /// A worker was heard of; false if another session speaks for it by now.
    pub(crate) fn hear(
        &mut self,
        of: &Register,
        session: u64,
        now_ms: u64,
        beat: Heartbeat,
    ) -> bool {
        let Some(worker) = self.of_session(of, session) else { return false };
        (worker.last_seen_ms, worker.heartbeat) = (now_ms, Some(beat));
        true
    }

    /// A session ended; when its worker was heard of last, unless another session speaks for it.
    pub(crate) fn leave(&mut self, of: &Register, session: u64) -> Option<u64> {
        let worker = self.of_session(of, session)?;
        worker.session = None;
        Some(worker.last_seen_ms)
    }

    fn of_session(&mut self, of: &Register, session: u64) -> Option<&mut Worker> {
        let worker = self.groups.get_mut(&of.group)?.get_mut(&of.rank)?;
        worker.session.as_ref().is_some_and(|(own, _)| *own == session).then_some(worker)
    }

    /// What one of a group's workers says of itself.
    pub(crate) fn register_of(&self, group: &str) -> Option<&Register> {
        self.groups.get(group)?.values().next().map(|worker| &worker.register)
    }

    /// Whether all workers of a group split tokens as placements say.
    pub(crate) fn splits(&self, group: &str) -> bool {
        let mut workers = self.groups.get(group).into_iter().flat_map(BTreeMap::values);
        workers.all(|worker| worker.register.version >= SPLITS_SINCE)
    }

    /// What a group serves.
    pub(crate) fn model_of(&self, group: &str) -> Option<&ModelInfo> {
        self.register_of(group).map(|register| &register.model)
    }

    /// Every group, and the digest of its model.
    pub(crate) fn models(&self) -> Vec<(String, String)> {
        let names = self.groups.keys();
        names.filter_map(|name| Some((name.clone(), self.model_of(name)?.digest.clone()))).collect()
    }

    /// Has the sessions of a group do something, those whose workers know it since `version`; none if
    /// there is no such group, otherwise its number of ranks.
    pub(crate) fn command(&self, group: &str, version: u32, command: &Command) -> Option<u32> {
        let group = self.groups.get(group)?;
        let able = group.values().filter(|worker| worker.register.version >= version);
        for (_, commands) in able.filter_map(|worker| worker.session.as_ref()) {
            // A session that is so far behind is as good as lost.
            if let Err(error) = commands.try_send(command.clone()) {
                tracing::warn!(%error, "a session does not take commands");
            }
        }
        group.values().map(|worker| worker.register.ranks).max()
    }

    /// The ranks of each group that are not ready, of groups that lack any.
    pub(crate) fn missing(&self, now_ms: u64, patience_ms: u64) -> Vec<(String, Vec<u32>)> {
        let missing = self.groups.iter().filter_map(|(name, group)| {
            let ranks = group.values().map(|worker| worker.register.ranks).max()?;
            let there = |rank: &u32| {
                group
                    .get(rank)
                    .is_some_and(|worker| worker.presence(now_ms, patience_ms) == Presence::Ready)
            };
            let missing: Vec<u32> = (0..ranks).filter(|rank| !there(rank)).collect();
            (!missing.is_empty()).then(|| (name.clone(), missing))
        });
        missing.collect()
    }
}

fn check(register: &Register) -> Result<(), Refusal> {
    let Register { version, group, rank, ranks, .. } = register;
    if !(SESSION_VERSION_OLDEST..=SESSION_VERSION).contains(version) {
        return Err(Refusal::Version { got: *version });
    }
    let value = |what, got: String, expected: String| Err(Refusal::Value { what, got, expected });
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if group.is_empty() || group.len() > NAME_BYTES_MAX || !group.chars().all(plain) {
        let got = group.chars().take(NAME_BYTES_MAX).collect();
        let expected = format!("1 to {NAME_BYTES_MAX} letters, digits, '-', '_' and '.'");
        return value("the group's name", got, expected);
    }
    if !(1..=RANKS_MAX).contains(ranks) {
        return value("ranks", ranks.to_string(), format!("1 to {RANKS_MAX}"));
    }
    if rank >= ranks {
        return value("rank", rank.to_string(), format!("0 to {}", ranks - 1));
    }
    if register.model.layers.is_empty() {
        return value("the number of layers", "0".to_owned(), "at least 1".to_owned());
    }
    Ok(())
}

/// Refuses what a worker of this kind cannot hold.
fn check_held(of: &Register, held: &[LayerPlacement]) -> Result<(), Refusal> {
    let value = |what, got: String, expected: String| Err(Refusal::Value { what, got, expected });
    let (got, expected) = (held.len(), of.model.layers.len());
    if got != expected {
        return value("the number of layers held", got.to_string(), expected.to_string());
    }
    for ((layer, room), held) in of.model.layers.iter().zip(rooms(of)).zip(held) {
        if held.layer != layer.number {
            return value("a layer held", held.layer.to_string(), layer.number.to_string());
        }
        if !fits(of, layer, room, &held.placement) {
            let placement = &held.placement;
            let [ranks, experts] = [placement.ranks(), placement.experts()];
            let got =
                format!("{ranks} ranks, {experts} experts, {} slots", placement.slots_per_rank());
            let expected =
                format!("{} ranks, {} experts, at most {room} slots", of.ranks, layer.experts);
            return value("a placement held", got, expected);
        }
    }
    Ok(())
}

/// Refuses what no device says of its tactics.
fn check_tactics(tactics: &Tactics) -> Result<(), Refusal> {
    let value = |what, got: String, expected: String| Err(Refusal::Value { what, got, expected });
    for (what, count) in [
        ("the number of problems", tactics.problems.len()),
        ("the number of tactics", tactics.candidates.len()),
        ("the number of measurements", tactics.measurements.len()),
        ("the number of choices", tactics.chosen.len()),
    ] {
        if count > TACTICS_MAX {
            return value(what, count.to_string(), format!("at most {TACTICS_MAX}"));
        }
    }
    for measured in &tactics.measurements {
        for us in [measured.median_us, measured.p99_us] {
            if !(us.is_finite() && us > 0.0) {
                let expected = "a finite time of more than 0 us".to_owned();
                return value("a measured time", us.to_string(), expected);
            }
        }
        if measured.measured_ms > COUNT_MAX {
            let got = measured.measured_ms.to_string();
            return value("the time of a measurement", got, format!("at most {COUNT_MAX}"));
        }
    }
    Ok(())
}

fn check_same(new: &Register, known: &Register) -> Result<(), Refusal> {
    let facts = |register: &Register| {
        let Register { ranks, model, slots_per_rank, .. } = register;
        [
            ("ranks", ranks.to_string()),
            ("the model's digest", model.digest.clone()),
            ("slots a rank", slots_per_rank.to_string()),
        ]
    };
    for ((what, got), (_, expected)) in facts(new).into_iter().zip(facts(known)) {
        if got != expected {
            let group = known.group.clone();
            return Err(Refusal::Differs { group, what, got, expected });
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use protocol::message::{ActFormat, ServedLayer};
    use protocol::placement::Placement;

    use super::*;

    const PATIENCE: u64 = 3_000;

    type Change = fn(&mut Register);

    pub(crate) fn register(rank: u32, incarnation: u64) -> Register {
        let (experts, top_k, hidden, intermediate) = (32, 4, 256, 192);
        let layer = ServedLayer { number: 0, experts, top_k, hidden, intermediate };
        Register {
            version: SESSION_VERSION,
            group: "g".to_owned(),
            rank,
            ranks: 2,
            incarnation,
            pid: 7,
            host: "h".to_owned(),
            socket: "/s".to_owned(),
            device: "cpu".to_owned(),
            model: ModelInfo {
                name: "m".to_owned(),
                digest: "d".to_owned(),
                act: vec![ActFormat::Bf16],
                layers: vec![layer],
                unserved: Vec::new(),
            },
            slots_per_rank: 16,
            layer_slots: Vec::new(),
            max_tokens: 64,
            asks: true,
            stages: false,
        }
    }

    fn held(epoch: u64) -> Vec<LayerPlacement> {
        let placement = Placement::contiguous(32, 2, 16).unwrap();
        vec![LayerPlacement { layer: 0, epoch, placement }]
    }

    #[test]
    fn a_later_process_takes_the_place_of_an_earlier_one_and_not_the_reverse() {
        let mut fleet = Fleet::default();
        let mut old = fleet.admit(&register(0, 10), 0, PATIENCE).unwrap();
        let new = fleet.admit(&register(0, 20), 1, PATIENCE).unwrap();
        let beat = || Heartbeat {
            engine: Default::default(),
            calls: 3,
            refused: 0,
            refusals: BTreeMap::new(),
        };
        assert!(!fleet.hear(&register(0, 10), old.session, 2, beat()), "the old one is not heard");
        assert!(old.commands.try_recv().is_err() && old.commands.is_closed());
        assert!(!new.commands.is_closed());
        assert!(fleet.hear(&register(0, 20), new.session, 2, beat()));
        assert_eq!(fleet.leave(&register(0, 10), old.session), None);
        let refused = fleet.admit(&register(0, 15), 3, PATIENCE).unwrap_err();
        assert_eq!(refused.to_string(), "rank 0 of the group g is connected with a later start");
        // Unless that one has gone silent, or left.
        fleet.admit(&register(0, 15), 2 + PATIENCE + 1, PATIENCE).unwrap();
    }

    #[test]
    fn ranks_that_do_not_fit_are_refused_with_both_values() {
        let mut fleet = Fleet::default();
        fleet.admit(&register(0, 1), 0, PATIENCE).unwrap();
        let refusal = |change: Change, fleet: &mut Fleet| {
            let mut other = register(1, 1);
            change(&mut other);
            fleet.admit(&other, 0, PATIENCE).unwrap_err().to_string()
        };
        let cases: [(Change, &str); 7] = [
            (|r| r.version = 9, "session version is 9, expected 1 to 6"),
            (|r| r.group = "a/b".to_owned(), "the group's name is a/b, expected 1 to 64 letters"),
            (|r| r.ranks = 0, "ranks is 0, expected 1 to 1024"),
            (|r| r.rank = 2, "rank is 2, expected 0 to 1"),
            (|r| r.model.digest = "e".to_owned(), "the model's digest is e, the group g has d"),
            (|r| r.slots_per_rank = 17, "slots a rank is 17, the group g has 16"),
            (|r| r.model.layers.clear(), "the number of layers is 0, expected at least 1"),
        ];
        for (change, expected) in cases {
            let said = refusal(change, &mut fleet);
            assert!(said.starts_with(expected), "{said:?} is not {expected:?}");
        }
        // A group that has gone may come back as another.
        let mut other = register(1, 1);
        other.model.digest = "e".to_owned();
        fleet.admit(&other, PATIENCE + 1, PATIENCE).unwrap();
        assert_eq!(fleet.groups["g"].keys().copied().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn missing_ranks_are_those_that_left_went_silent_or_never_came() {
        let mut fleet = Fleet::default();
        assert_eq!(fleet.missing(0, PATIENCE), []);
        let zero = fleet.admit(&register(0, 1), 0, PATIENCE).unwrap();
        assert_eq!(fleet.missing(0, PATIENCE), [("g".to_owned(), vec![0, 1])], "not kept yet");
        fleet.keep(&register(0, 1), zero.session);
        assert_eq!(fleet.missing(0, PATIENCE), [("g".to_owned(), vec![0, 1])], "not ready yet");
        fleet.hold(&register(0, 1), zero.session, held(1)).unwrap();
        assert_eq!(fleet.missing(0, PATIENCE), [("g".to_owned(), vec![1])]);
        // One of the version before is ready when it registers.
        let before = Register { version: 1, ..register(1, 1) };
        let one = fleet.admit(&before, 0, PATIENCE).unwrap();
        fleet.keep(&before, one.session);
        assert_eq!(fleet.missing(PATIENCE, PATIENCE), []);
        assert_eq!(fleet.missing(PATIENCE + 1, PATIENCE), [("g".to_owned(), vec![0, 1])]);
        assert_eq!(fleet.leave(&register(0, 1), zero.session), Some(0));
        assert_eq!(fleet.missing(0, PATIENCE), [("g".to_owned(), vec![0])]);
    }

    #[test]
    fn in_force_is_what_all_ranks_hold_and_nothing_else() {
        let mut fleet = Fleet::default();
        let come = |fleet: &mut Fleet, rank, incarnation| {
            let register = register(rank, incarnation);
            let admitted = fleet.admit(&register, 0, PATIENCE).unwrap();
            fleet.keep(&register, admitted.session);
            (register, admitted.session)
        };
        let epoch = |fleet: &Fleet| Some(fleet.in_force("g", 0, PATIENCE)?[0].epoch);
        let (zero, s0) = come(&mut fleet, 0, 1);
        let (one, s1) = come(&mut fleet, 1, 1);
        assert_eq!(fleet.placements_of_others(&one, 0, PATIENCE), None);
        fleet.place(&zero, s0, held(3).into());
        // Told is not held, but binds whoever comes next.
        assert_eq!(fleet.placements_of_others(&one, 0, PATIENCE).unwrap()[..], held(3));
        // Both were told at once, each its own copy, and the later one holds first.
        fleet.place(&one, s1, held(3).into());
        fleet.hold(&one, s1, held(3)).unwrap();
        assert_eq!(epoch(&fleet), None, "rank 0 is loading");
        fleet.hold(&zero, s0, held(3)).unwrap();
        assert_eq!(epoch(&fleet), Some(3));
        fleet.hold(&one, s1, held(2)).unwrap();
        assert_eq!(epoch(&fleet), None, "rank 1 holds another epoch");
        fleet.hold(&one, s1, held(3)).unwrap();
        assert_eq!(epoch(&fleet), Some(3));
        assert_eq!(fleet.in_force("g", PATIENCE + 1, PATIENCE), None, "all are silent");
        let (one, s1) = come(&mut fleet, 1, 2);
        assert_eq!(epoch(&fleet), None, "rank 1 is back and loading");
        fleet.hold(&one, s1, held(3)).unwrap();
        assert_eq!(epoch(&fleet), Some(3));
        for (held, expected) in [
            (vec![], "the number of layers held is 0, expected 1"),
            (
                vec![LayerPlacement { layer: 7, ..held(1).remove(0) }],
                "a layer held is 7, expected 0",
            ),
            (
                vec![LayerPlacement {
                    placement: Placement::contiguous(32, 2, 17).unwrap(),
                    ..held(1).remove(0)
                }],
                "a placement held is 2 ranks, 32 experts, 17 slots, expected 2 ranks, 32 experts, at most 16 slots",
            ),
        ] {
            assert_eq!(fleet.hold(&one, s1, held).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn nobody_waits_for_ranks_that_were_given_up_until_they_are_back() {
        let mut fleet = Fleet::default();
        let come = |fleet: &mut Fleet, rank, incarnation| {
            let register = Register { stages: true, ..register(rank, incarnation) };
            let admitted = fleet.admit(&register, 0, PATIENCE).unwrap();
            fleet.keep(&register, admitted.session);
            fleet.hold(&register, admitted.session, held(3)).unwrap();
            (register, admitted)
        };
        let (zero, _zero_there) = come(&mut fleet, 0, 1);
        let (one, one_there) = come(&mut fleet, 1, 1);
        assert_eq!(fleet.lost("g", 0, PATIENCE), []);
        fleet.leave(&one, one_there.session);
        assert_eq!(fleet.lost("g", 0, PATIENCE), [(1, 0)]);
        assert_eq!(fleet.still("g", 0, PATIENCE), Some(Still::Missing { rank: 1 }));
        assert!(fleet.is_recovered("g", 0, 3), "nobody was given up");
        // Also of rank 0, but that is there.
        assert!(fleet.give_up("g", &[0, 1].into(), (0, PATIENCE)));
        assert!(!fleet.give_up("g", &[1].into(), (0, PATIENCE)), "that is no change");
        assert_eq!(fleet.given_up("g").collect::<Vec<_>>(), [1]);
        assert_eq!(fleet.still("g", 0, PATIENCE), None);
        assert_eq!(fleet.in_force("g", 0, PATIENCE).unwrap()[..], held(3));
        let staging = fleet.staging("g", None, 0, PATIENCE).unwrap();
        assert_eq!(staging[0].1.iter().map(|of| of.rank).collect::<Vec<_>>(), [0]);
        assert!(!fleet.is_recovered("g", 0, 3), "nobody has looked at that");
        fleet.recover("g", &[0].into(), [(0, 3)].into());
        assert!(!fleet.is_recovered("g", 0, 3), "for the loss of others");
        fleet.recover("g", &[1].into(), [(0, 3)].into());
        assert!(fleet.is_recovered("g", 0, 3) && !fleet.is_recovered("g", 0, 4));
        // What the others may come to hold while it loads it is told at once.
        let ready = Box::new(FromControl::Ready { layer: 0, epoch: 4 });
        fleet.order("g", 0, Command::Order(ready));
        assert_eq!(fleet.bound_of_others(&one), [(0, 4)].into());
        assert_eq!(fleet.bound_of_others(&zero), [].into());
        let (_, _one_there) = come(&mut fleet, 1, 2);
        assert_eq!(fleet.given_up("g").count(), 0);
        assert_eq!(fleet.still("g", 0, PATIENCE), None);
        assert_eq!(fleet.staging("g", None, 0, PATIENCE).unwrap()[0].1.len(), 2);
    }
}
