//! What a group is to hold when it starts: an operator's file, or experts in order. Pure, but for the
//! reading of the file.

use std::path::{Path, PathBuf};

use protocol::message::ServedLayer;
use protocol::placement::{FileError, Placement, PlacementError, read_phy2log};
use protocol::session::Register;
use sha2::{Digest, Sha256};

/// A placement that a group cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Misfit {
    #[error("{file} has {got} layers, the model has {expected}")]
    Layers { file: String, got: usize, expected: usize },
    #[error("{file}, layer {layer}: {source}")]
    Layer { file: String, layer: u32, source: PlacementError },
    #[error("{file}, layer {layer}: the model has no such layer")]
    Unknown { file: String, layer: u32 },
    #[error("{file}, layer {layer}: it has {got} slots a rank, the workers have room for {room}")]
    Room { file: String, layer: u32, got: u32, room: u32 },
    #[error("layer {layer} cannot be placed: {source}")]
    Default { layer: u32, source: PlacementError },
}

/// An operator's file: the expert of every slot, `[layer][slot]`, -1 an empty one.
#[derive(Debug, Clone)]
pub(crate) struct PlacementFile {
    path: PathBuf,
    /// SHA-256 of its text.
    pub(crate) digest: String,
    phy2log: Vec<Vec<i64>>,
}

impl PlacementFile {
    pub(crate) fn read(path: &Path) -> Result<Self, FileError> {
        let (text, phy2log) = read_phy2log(path)?;
        let digest = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { path: path.to_owned(), digest, phy2log })
    }

    /// The placement of every layer that the worker serves.
    pub(crate) fn placements(&self, of: &Register) -> Result<Vec<Placement>, Misfit> {
        let file = self.path.display().to_string();
        let (got, expected) = (self.phy2log.len(), of.model.layers.len());
        if got != expected {
            return Err(Misfit::Layers { file, got, expected });
        }
        let layers = of.model.layers.iter().zip(rooms(of)).zip(&self.phy2log);
        layers.map(|(layer, phy2log)| fitting(&file, of.ranks, layer, phy2log)).collect()
    }
}

/// The placement of one layer out of `file`, if workers of this kind can hold it.
pub(crate) fn layer_placement(
    file: &str,
    of: &Register,
    number: u32,
    phy2log: &[i64],
) -> Result<Placement, Misfit> {
    let mut layers = of.model.layers.iter().zip(rooms(of));
    let layer = layers.find(|(layer, _)| layer.number == number);
    let unknown = || Misfit::Unknown { file: file.to_owned(), layer: number };
    fitting(file, of.ranks, layer.ok_or_else(unknown)?, phy2log)
}

fn fitting(
    file: &str,
    ranks: u32,
    (layer, room): (&ServedLayer, u32),
    phy2log: &[i64],
) -> Result<Placement, Misfit> {
    let (file, number) = (file.to_owned(), layer.number);
    let placement = match Placement::from_phy2log(layer.experts, ranks, phy2log) {
        Ok(placement) => placement,
        Err(source) => return Err(Misfit::Layer { file, layer: number, source }),
    };
    match placement.slots_per_rank() {
        got if got > room => Err(Misfit::Room { file, layer: number, got, room }),
        _ => Ok(placement),
    }
}

/// Experts in order, in as many slots as there is room for.
pub(crate) fn in_order(of: &Register) -> Result<Vec<Placement>, Misfit> {
    let placement = |(layer, room): (&ServedLayer, u32)| {
        Placement::contiguous(layer.experts, of.ranks, room)
            .map_err(|source| Misfit::Default { layer: layer.number, source })
    };
    of.model.layers.iter().zip(rooms(of)).map(placement).collect()
}

/// Whether a placement of `layer` can be held by workers of this kind.
pub(crate) fn fits(of: &Register, layer: &ServedLayer, room: u32, placement: &Placement) -> bool {
    placement.ranks() == of.ranks
        && placement.experts() == layer.experts
        && placement.slots_per_rank() <= room
}

/// Room in each layer, in slots of a rank.
pub(crate) fn rooms(of: &Register) -> impl Iterator<Item = u32> {
    let position = 0..of.model.layers.len();
    position.map(|at| of.layer_slots.get(at).copied().unwrap_or(of.slots_per_rank))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::register;

    fn file(phy2log: Vec<Vec<i64>>) -> PlacementFile {
        PlacementFile { path: "p.json".into(), digest: String::new(), phy2log }
    }

    #[test]
    fn files_that_do_not_fit_are_refused_by_layer_and_value() {
        // 32 experts on two ranks with room for 17 slots each.
        let of = Register { layer_slots: vec![17], ..register(0, 1) };
        let row: Vec<i64> = (0..32).collect();
        assert_eq!(file(vec![row.clone()]).placements(&of).unwrap()[0].to_phy2log(), row);
        let with = |change: fn(&mut Vec<i64>)| {
            let mut row = row.clone();
            change(&mut row);
            file(vec![row]).placements(&of).unwrap_err().to_string()
        };
        for (error, expected) in [
            (
                file(vec![]).placements(&of).unwrap_err().to_string(),
                "p.json has 0 layers, the model has 1",
            ),
            (
                with(|row| row[3] = 2),
                "p.json, layer 0: rank 0 holds expert 2 twice, in slots 2 and 3",
            ),
            (
                with(|row| row.push(0)),
                "p.json, layer 0: 33 slots cannot be divided evenly among 2 ranks",
            ),
            (
                with(|row| row.extend([-1; 4])),
                "p.json, layer 0: it has 18 slots a rank, the workers have room for 17",
            ),
        ] {
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn experts_in_order_fill_the_room() {
        let of = Register { layer_slots: vec![18], ..register(0, 1) };
        let placement = &in_order(&of).unwrap()[0];
        assert_eq!((placement.slots_per_rank(), placement.experts()), (18, 32));
        // A worker of the version before says the room of its largest layer.
        assert_eq!(in_order(&register(0, 1)).unwrap()[0].slots_per_rank(), 16);
        let none = Register { layer_slots: vec![15], ..register(0, 1) };
        assert!(in_order(&none).unwrap_err().to_string().starts_with("layer 0 cannot be placed"));
    }
}
