//! The group and its layers as planners take them, checked: a policy that reads a request through this cannot panic on
//! sizes. Decides nothing.

use core::fmt::Display;

use planning::layer::{EMPTY, Shape};

use crate::types::{Error, Layer, Model, RankState, Topology};

/// Ranks, slots and experts of every layer.
#[derive(Debug, Clone)]
pub struct Group {
    /// Sizes of each layer.
    pub shape: Shape,
    /// Node of each rank.
    pub nodes: Vec<u32>,
    /// What may be placed on each rank.
    pub states: Vec<RankState>,
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
    pub fn read(topology: &Topology, model: &Model, layers: &[Layer]) -> Result<Self, Error> {
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
        Ok(Self {
            shape,
            nodes: topology.ranks.iter().map(|rank| rank.node).collect(),
            states: topology.ranks.iter().map(|rank| rank.state).collect(),
            expert_bytes: model.expert_bytes,
        })
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
        let even = |nodes: &[u32]| Group::read(&topology(nodes), &MODEL, &[]).unwrap().even_nodes();
        assert_eq!(even(&[0, 0, 1, 1]), 2);
        assert_eq!(even(&[4, 4, 2, 2, 7, 7]), 3);
        assert_eq!(even(&[0, 1, 0, 1]), 1);
        assert_eq!(even(&[0, 0, 0, 1]), 1);
    }

    #[test]
    fn what_no_planner_could_take_is_named() {
        let read = |topology: &Topology, placement: &[u32]| {
            let layer = Layer { id: 7, epoch: 1, placement: placement.to_vec() };
            let error = Group::read(topology, &MODEL, &[layer]).unwrap_err();
            let Error::InvalidInput(message) = error else { panic!("{error:?}") };
            message
        };
        let good = topology(&[0, 0]);
        assert!(Group::read(&good, &MODEL, &[]).is_ok());
        assert_eq!(read(&good, &[0, 1]), "layer 7: 2 slots, expected 4");
        let found = read(&good, &[0, 1, 3, EMPTY]);
        assert_eq!(found, "layer 7: expert 3 in slot 2, expected less than 3");
        assert!(read(&topology(&[]), &[]).contains("0 ranks"));
        let mut slow = good;
        slow.ranks[1].speed = f32::NAN;
        assert_eq!(read(&slow, &[]), "rank 1 has speed NaN, expected more than 0");
    }
}
