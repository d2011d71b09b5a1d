//! The group and its layers as planners take them, checked: a policy that reads a request through this cannot panic on
//! sizes. Decides nothing.

use core::fmt::Display;

use planning::greedy::{Ranks, Use};
use planning::layer::{EMPTY, Shape};

use crate::types::{Error, Layer, Model, Pin, PinKind, RankState, Topology};

/// Ranks, slots and experts of every layer.
#[derive(Debug, Clone)]
pub struct Group {
    /// Sizes of each layer.
    pub shape: Shape,
    /// Node of each rank.
    pub nodes: Vec<u32>,
    /// Relative speed of each rank.
    pub speeds: Vec<f64>,
    /// What may be placed on each rank.
    pub uses: Vec<Use>,
    /// Bytes of a replica.
    pub expert_bytes: u64,
}

/// An error about one layer of a request.
#[must_use]
pub fn invalid(layer: &Layer, what: &dyn Display) -> Error {
    Error::InvalidInput(format!("layer {}: {what}", layer.id))
}

impl Group {
    /// Takes the group of a request, and checks the placements of its layers: one expert of the model, or none, in every
    /// slot. They may lack experts, as those of a group that lost a rank do.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] names what is wrong.
    pub fn read(
        topology: &Topology,
        model: &Model,
        layers: &[Layer],
        pins: &[Pin],
    ) -> Result<Self, Error> {
        let shape = Shape {
            experts: model.experts as usize,
            ranks: topology.ranks.len(),
            slots_per_rank: topology.slots_per_rank as usize,
        };
        shape.check().map_err(|error| Error::InvalidInput(error.to_string()))?;
        let bad = topology.ranks.iter().enumerate();
        let mut bad = bad.filter(|(_, rank)| !(rank.speed.is_finite() && rank.speed > 0.0));
        if let Some((number, rank)) = bad.next() {
            let message = format!("rank {number} has speed {}, expected more than 0", rank.speed);
            return Err(Error::InvalidInput(message));
        }
        for layer in layers {
            let (found, expected) = (layer.placement.len(), shape.slots());
            if found != expected {
                return Err(invalid(layer, &format!("{found} slots, expected {expected}")));
            }
            let known = |expert: u32| expert == EMPTY || (expert as usize) < shape.experts;
            if let Some(slot) = layer.placement.iter().position(|&expert| !known(expert)) {
                let (expert, experts) = (layer.placement[slot], shape.experts);
                let what = format!("expert {expert} in slot {slot}, expected less than {experts}");
                return Err(invalid(layer, &what));
            }
        }
        let beyond =
            |pin: &&Pin| pin.expert as usize >= shape.experts || pin.rank as usize >= shape.ranks;
        if let Some(Pin { expert, rank, .. }) = pins.iter().find(beyond) {
            let Shape { experts, ranks, .. } = shape;
            return Err(Error::InvalidInput(format!(
                "a pin of expert {expert} and rank {rank}, expected less than {experts} and {ranks}"
            )));
        }
        Ok(Self {
            shape,
            nodes: topology.ranks.iter().map(|rank| rank.node).collect(),
            speeds: topology.ranks.iter().map(|rank| f64::from(rank.speed)).collect(),
            uses: topology.ranks.iter().map(|rank| used(rank.state)).collect(),
            expert_bytes: model.expert_bytes,
        })
    }

    /// Fullest over mean of loads, one for each rank; the mean is over ranks that are not lost.
    #[must_use]
    pub fn max_over_mean(&self, rank_loads: &[f64]) -> f64 {
        let working = self.uses.iter().filter(|used| **used != Use::Lost).count();
        let most = rank_loads.iter().copied().fold(0.0, f64::max);
        let total: f64 = rank_loads.iter().sum();
        if total > 0.0 { most * working as f64 / total } else { 1.0 }
    }

    /// Nodes, when they are equal runs of ranks; otherwise 1. Planners that think in nodes need that.
    #[must_use]
    pub fn even_nodes(&self) -> usize {
        let runs: Vec<&[u32]> = self.nodes.chunk_by(|a, b| a == b).collect();
        let mut names: Vec<u32> = runs.iter().map(|run| run[0]).collect();
        names.sort_unstable();
        names.dedup();
        let even = runs.iter().all(|run| run.len() == runs[0].len());
        if even && names.len() == runs.len() { runs.len() } else { 1 }
    }
}

fn used(state: RankState) -> Use {
    match state {
        RankState::Active => Use::Active,
        RankState::Draining => Use::Draining,
        RankState::Lost => Use::Lost,
    }
}

/// The pins of one layer as planners take them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pins {
    /// (expert, rank): replicas that must be there.
    pub must: Vec<(u32, usize)>,
    /// (expert, rank): replicas that must not be there.
    pub never: Vec<(u32, usize)>,
}

impl Pins {
    /// Takes those of a layer.
    #[must_use]
    pub fn of(layer: u32, pins: &[Pin]) -> Self {
        let mut of_layer = Self::default();
        for pin in pins.iter().filter(|pin| pin.layer.is_none_or(|own| own == layer)) {
            let list = match pin.kind {
                PinKind::Must => &mut of_layer.must,
                PinKind::Never => &mut of_layer.never,
            };
            list.push((pin.expert, pin.rank as usize));
        }
        of_layer
    }

    /// All that planners need to know of the ranks.
    #[must_use]
    pub fn ranks<'a>(&'a self, group: &'a Group) -> Ranks<'a> {
        Ranks { speeds: &group.speeds, uses: &group.uses, must: &self.must, never: &self.never }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Rank;

    fn topology(nodes: &[u32]) -> Topology {
        let rank = |&node| Rank { node, speed: 1.0, free_bytes: 0, state: RankState::Active };
        Topology { ranks: nodes.iter().map(rank).collect(), slots_per_rank: 2, staging_slots: 0 }
    }

    const MODEL: Model = Model { experts: 3, expert_groups: 1, top_k: 1, expert_bytes: 1 };

    #[test]
    fn nodes_are_counted_where_they_are_equal_runs() {
        let even =
            |nodes: &[u32]| Group::read(&topology(nodes), &MODEL, &[], &[]).unwrap().even_nodes();
        assert_eq!(even(&[0, 0, 1, 1]), 2);
        assert_eq!(even(&[4, 4, 2, 2, 7, 7]), 3);
        assert_eq!(even(&[0, 1, 0, 1]), 1);
        assert_eq!(even(&[0, 0, 0, 1]), 1);
    }

    #[test]
    fn the_mean_is_over_ranks_that_are_there() {
        let mut lost = topology(&[0, 0, 0]);
        lost.ranks[2].state = RankState::Lost;
        let group = Group::read(&lost, &MODEL, &[], &[]).unwrap();
        assert_eq!(group.max_over_mean(&[3.0, 1.0, 0.0]), 1.5);
        assert_eq!(group.max_over_mean(&[0.0; 3]), 1.0);
    }

    #[test]
    fn pins_are_of_a_layer_or_of_all() {
        let pin = |layer, rank, kind| Pin { layer, expert: 2, rank, kind };
        let pins = [
            pin(None, 0, PinKind::Must),
            pin(Some(5), 1, PinKind::Never),
            pin(Some(6), 1, PinKind::Must),
        ];
        assert_eq!(Pins::of(5, &pins), Pins { must: vec![(2, 0)], never: vec![(2, 1)] });
    }

    #[test]
    fn what_no_planner_could_take_is_named() {
        let read = |topology: &Topology, placement: &[u32]| {
            let layer = Layer { id: 7, epoch: 1, placement: placement.to_vec() };
            let error = Group::read(topology, &MODEL, &[layer], &[]).unwrap_err();
            let Error::InvalidInput(message) = error else { panic!("{error:?}") };
            message
        };
        let good = topology(&[0, 0]);
        assert!(Group::read(&good, &MODEL, &[], &[]).is_ok());
        assert_eq!(read(&good, &[0, 1]), "layer 7: 2 slots, expected 4");
        let found = read(&good, &[0, 1, 3, EMPTY]);
        assert_eq!(found, "layer 7: expert 3 in slot 2, expected less than 3");
        assert!(read(&topology(&[]), &[]).contains("0 ranks"));
        let mut slow = good;
        slow.ranks[1].speed = f32::NAN;
        assert_eq!(read(&slow, &[]), "rank 1 has speed NaN, expected more than 0");
        let pin = Pin { layer: None, expert: 0, rank: 2, kind: PinKind::Must };
        let Err(Error::InvalidInput(message)) =
            Group::read(&topology(&[0, 0]), &MODEL, &[], &[pin])
        else {
            panic!("a rank that does not exist")
        };
        assert_eq!(message, "a pin of expert 0 and rank 2, expected less than 3 and 2");
    }
}
