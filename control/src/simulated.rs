//! What control decides about one group's placements, without store, sockets and clock: the simulator decides what happens when.
//! What is committed is kept as the store keeps it.

use std::collections::BTreeMap;

use protocol::placement::Placement;
use protocol::session::{FromControl, FromWorker, Heartbeat, LayerPlacement, Register};
use tokio::sync::mpsc;

use crate::constraints::Constraints;
use crate::fleet::{Command, Fleet};
use crate::migrating::orders;
use crate::motion::{Pace, on_their_way, told};
use crate::recovering::{Recovery, repaired};

/// A control plane that has one group.
#[derive(Debug)]
pub struct Control {
    fleet: Fleet,
    /// Of each layer, oldest first.
    committed: BTreeMap<u32, Vec<LayerPlacement>>,
    /// What ranks are told, by session.
    commands: BTreeMap<u64, mpsc::Receiver<Command>>,
    /// What the store keeps of workers.
    known: BTreeMap<u32, (Register, u64)>,
    group: String,
    patience_ms: u64,
    recovery: Recovery,
    started_ms: u64,
}

impl Control {
    /// Has committed `placements` of all layers; ranks are lost after `patience_ms` of silence, and given up a second later.
    #[must_use]
    pub fn new(group: &str, placements: Vec<LayerPlacement>, patience_ms: u64) -> Self {
        let committed = placements.into_iter().map(|placed| (placed.layer, vec![placed]));
        Self {
            fleet: Fleet::default(),
            committed: committed.collect(),
            commands: BTreeMap::new(),
            known: BTreeMap::new(),
            group: group.to_owned(),
            patience_ms,
            recovery: Recovery { automatic: true, grace_s: 1 },
            started_ms: 0,
        }
    }

    /// The process ends and starts again: what is in memory is lost.
    pub fn restart(&mut self, now_ms: u64) {
        self.fleet = Fleet::default();
        self.commands.clear();
        self.started_ms = now_ms;
        for (register, seen_ms) in self.known.values() {
            self.fleet.remember(register.clone(), (0, *seen_ms));
        }
    }

    /// Lets a rank in: the session's number, and what it is to load if it asks.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn admit(
        &mut self,
        register: &Register,
        now_ms: u64,
    ) -> Result<(u64, Option<Vec<LayerPlacement>>), String> {
        let admitted = self.fleet.admit(register, now_ms, self.patience_ms);
        let admitted = admitted.map_err(|refusal| refusal.to_string())?;
        self.known.insert(register.rank, (register.clone(), now_ms));
        self.fleet.keep(register, admitted.session);
        self.commands.insert(admitted.session, admitted.commands);
        if !register.asks {
            return Ok((admitted.session, None));
        }
        let others = self.fleet.placements_of_others(register, now_ms, self.patience_ms);
        let placed: Vec<LayerPlacement> = match others {
            Some(held) => {
                let bound = self.fleet.bound_of_others(register);
                let coming = |placed: &LayerPlacement| {
                    let epoch = bound.get(&placed.layer).copied().unwrap_or(0).max(placed.epoch);
                    self.committed(placed.layer, epoch).unwrap_or(placed).clone()
                };
                held.iter().map(coming).collect()
            }
            None => self.committed.values().filter_map(|all| all.last().cloned()).collect(),
        };
        self.fleet.place(register, admitted.session, placed.clone().into());
        Ok((admitted.session, Some(placed)))
    }

    /// A rank says something.
    ///
    /// # Errors
    /// Why its session ends.
    pub fn hear(
        &mut self,
        (of, session): (&Register, u64),
        message: FromWorker,
        now_ms: u64,
    ) -> Result<(), String> {
        let heard = match message {
            FromWorker::Holds { layers } => self.fleet.hold(of, session, layers),
            FromWorker::Staging { layers, bytes_per_second } => {
                self.fleet.stage(of, session, (layers, bytes_per_second));
                Ok(())
            }
            FromWorker::Heartbeat(beat) => {
                self.beat((of, session), beat, now_ms);
                Ok(())
            }
            FromWorker::Register(_) | FromWorker::Tactics(_) | FromWorker::Window(_) => Ok(()),
        };
        heard.map_err(|refusal| refusal.to_string())
    }

    fn beat(&mut self, (of, session): (&Register, u64), beat: Heartbeat, now_ms: u64) {
        if self.fleet.hear(of, session, now_ms, beat) {
            self.known.insert(of.rank, (of.clone(), now_ms));
        }
    }

    /// A session ends.
    pub fn leave(&mut self, of: &Register, session: u64) {
        self.commands.remove(&session);
        self.fleet.leave(of, session);
    }

    /// What the rank of a session is told, in order.
    pub fn orders(&mut self, session: u64) -> Vec<FromControl> {
        let mut told = Vec::new();
        while let Some(Ok(command)) = self.commands.get_mut(&session).map(mpsc::Receiver::try_recv)
        {
            if let Command::Order(order) = command {
                told.push(*order);
            }
        }
        told
    }

    /// Looks after the group: gives ranks up, repairs what that costs, and tells ranks what to do.
    pub fn look_after(&mut self, now_ms: u64) {
        self.recover(now_ms);
        let newest = self.newest();
        let Ok(layers) = self.fleet.staging(&self.group, None, now_ms, self.patience_ms) else {
            return;
        };
        let on_their_way = on_their_way(layers, &newest);
        let recovered = |layer: u32, epoch: u64| self.fleet.is_recovered(&self.group, layer, epoch);
        let mut all = Vec::new();
        for (layer, ranks) in told(&on_their_way, &Pace::default(), recovered) {
            let lowest = ranks.iter().map(|rank| rank.held).min().unwrap_or(0);
            let later = self.committed.get(&layer).into_iter().flatten().rev();
            let later: Vec<LayerPlacement> =
                later.take_while(|placed| placed.epoch > lowest).cloned().collect();
            all.extend(orders(ranks, &later));
        }
        for (rank, order) in all {
            self.fleet.order(&self.group, rank, Command::Order(Box::new(order)));
        }
    }

    fn recover(&mut self, now_ms: u64) {
        let lost = self.fleet.lost(&self.group, now_ms, self.patience_ms);
        let ranks = self.fleet.register_of(&self.group).map_or(0, |register| register.ranks);
        let gone = self.recovery.given_up(&lost, ranks, (self.started_ms, now_ms));
        self.fleet.give_up(&self.group, &gone, (now_ms, self.patience_ms));
        let newest = self.newest();
        let known = self.fleet.recovered(&self.group) == Some(&newest);
        let still = self.fleet.still(&self.group, now_ms, self.patience_ms);
        if gone.is_empty() || known || still.is_some() {
            return;
        }
        for layer in newest.into_keys() {
            let Some(last) = self.committed.get(&layer).and_then(|all| all.last()) else {
                continue;
            };
            let free = (&[][..], &Constraints::default());
            if let Some(repaired) = repaired(layer, &last.placement, &gone, free) {
                self.commit(layer, repaired.placement);
            }
        }
        let newest = self.newest();
        self.fleet.recover(&self.group, &gone, newest);
    }

    /// Commits a placement of a layer; its epoch.
    pub fn commit(&mut self, layer: u32, placement: Placement) -> u64 {
        let all = self.committed.entry(layer).or_default();
        let epoch = all.last().map_or(0, |placed| placed.epoch) + 1;
        all.push(LayerPlacement { layer, epoch, placement });
        epoch
    }

    /// A committed placement.
    #[must_use]
    pub fn committed(&self, layer: u32, epoch: u64) -> Option<&LayerPlacement> {
        self.committed.get(&layer)?.iter().find(|placed| placed.epoch == epoch)
    }

    /// The newest committed epoch of each layer.
    #[must_use]
    pub fn newest(&self) -> BTreeMap<u32, u64> {
        let newest = |all: &Vec<LayerPlacement>| all.last().map_or(0, |placed| placed.epoch);
        self.committed.iter().map(|(layer, all)| (*layer, newest(all))).collect()
    }
}
