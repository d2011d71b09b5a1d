//! Where this rank's experts are: a placement for every layer, read from a file or made, and turned
//! into what a device loads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kernels::checkpoint::MoeLayer;
use kernels::device::LayerSlots;
use kernels::route::RouteTable;
use protocol::ids::RankId;
use protocol::placement::{Placement, PlacementError, RoutingTable};
use sha2::{Digest, Sha256};

use crate::config::GroupConfig;

/// Epoch of the placement that a worker starts with.
const FIRST_EPOCH: u64 = 0;

/// A placement that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is no list of lists of experts.
    #[error("{} is no JSON of the form [layer][slot]", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A placement of another model.
    #[error("{} has {got} layers, the model has {expected}", path.display())]
    Layers {
        /// The file.
        path: PathBuf,
        /// Its layers.
        got: usize,
        /// The model's.
        expected: usize,
    },
    /// A layer's placement is refused.
    #[error("the placement of layer {layer} cannot be")]
    Layer {
        /// The layer.
        layer: u32,
        /// Why.
        #[source]
        source: PlacementError,
    },
}

/// The placement of every layer, in the order of the model's layers.
#[derive(Debug)]
pub(crate) struct Placements {
    layers: Vec<Placement>,
}

impl Placements {
    /// Reads or makes the placements that a group starts with.
    pub(crate) fn new(group: &GroupConfig, layers: &[MoeLayer]) -> Result<Self, PlaceError> {
        let placements = match &group.placement {
            Some(path) => read(path, group.ranks, layers)?,
            None => contiguous(group.ranks, group.slots_per_rank, layers)?,
        };
        Ok(Self { layers: placements })
    }

    /// What `rank` holds of the layer at `position`.
    pub(crate) fn slots(&self, position: usize, rank: u32) -> LayerSlots {
        let placement = &self.layers[position];
        let experts = placement.slots_of_rank(RankId(rank)).iter();
        let RoutingTable { replica_start, slots, cumulative } = RoutingTable::even(placement);
        LayerSlots {
            epoch: FIRST_EPOCH,
            experts: experts.map(|slot| slot.map(|expert| expert.0)).collect(),
            route: RouteTable { replica_start, slots, cumulative },
        }
    }

    /// Slots of a rank in the layer that has most.
    pub(crate) fn slots_per_rank(&self) -> u32 {
        self.layers.iter().map(Placement::slots_per_rank).max().unwrap_or(0)
    }

    /// Equal on all ranks whose placements are.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for layer in &self.layers {
            hash.update(format!("{:?};", layer.to_phy2log()));
        }
        hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

fn read(path: &Path, ranks: u32, layers: &[MoeLayer]) -> Result<Vec<Placement>, PlaceError> {
    let text =
        fs::read(path).map_err(|source| PlaceError::Read { path: path.to_owned(), source })?;
    let phy2log: Vec<Vec<i64>> = serde_json::from_slice(&text)
        .map_err(|source| PlaceError::Json { path: path.to_owned(), source })?;
    let (got, expected) = (phy2log.len(), layers.len());
    if got != expected {
        return Err(PlaceError::Layers { path: path.to_owned(), got, expected });
    }
    let placement = |(layer, phy2log): (&MoeLayer, &Vec<i64>)| {
        Placement::from_phy2log(layer.shape.experts, ranks, phy2log)
            .map_err(|source| PlaceError::Layer { layer: layer.number, source })
    };
    layers.iter().zip(&phy2log).map(placement).collect()
}

/// Experts in order; with `slots_per_rank` 0, in as few slots as hold every expert once.
pub(crate) fn contiguous(
    ranks: u32,
    slots_per_rank: u32,
    layers: &[MoeLayer],
) -> Result<Vec<Placement>, PlaceError> {
    let placement = |layer: &MoeLayer| {
        let experts = layer.shape.experts;
        let fewest = experts.div_ceil(ranks);
        let slots = if slots_per_rank == 0 { fewest } else { slots_per_rank };
        Placement::contiguous(experts, ranks, slots)
            .map_err(|source| PlaceError::Layer { layer: layer.number, source })
    };
    layers.iter().map(placement).collect()
}
