//! Where this rank's experts are: a placement for every layer, from control, from a file, or made, and
//! turned into what a device loads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kernels::checkpoint::MoeLayer;
use kernels::device::LayerSlots;
use kernels::route::RouteTable;
use protocol::ids::RankId;
use protocol::placement::{FileError, Placement, PlacementError, RoutingTable, read_phy2log};
use protocol::session::LayerPlacement;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::GroupConfig;

/// Epoch of a placement that is a worker's own.
const OWN_EPOCH: u64 = 0;

/// A placement that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// A file that cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
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
    /// A placement from elsewhere, for other ranks, experts or slots.
    #[error("{what} of layer {layer} is {got}, expected {expected}")]
    Fit {
        /// The layer.
        layer: u32,
        /// What does not fit.
        what: &'static str,
        /// What it is.
        got: u32,
        /// What there is room for.
        expected: u32,
    },
    /// A placement from elsewhere, of other layers.
    #[error("the layers are {got:?}, the model has {expected:?}")]
    Other {
        /// Its layers.
        got: Vec<u32>,
        /// The model's.
        expected: Vec<u32>,
    },
}

/// The placement of every layer, in the order of the model's layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placements {
    layers: Vec<LayerPlacement>,
}

/// What a group holds, for a rank that comes back while control is away.
#[derive(Serialize, Deserialize)]
struct Remembered {
    /// Digest of the model.
    model: String,
    layers: Vec<LayerPlacement>,
}

impl Placements {
    /// Reads or makes the placements of this worker's own configuration.
    pub(crate) fn own(group: &GroupConfig, layers: &[MoeLayer]) -> Result<Self, PlaceError> {
        let placements = match &group.placement {
            Some(path) => read(path, group.ranks, layers)?,
            None => contiguous(group.ranks, group.slots_per_rank, layers)?,
        };
        Ok(Self::of(placements, layers))
    }

    /// Those that somebody else has made.
    pub(crate) fn made(layers: Vec<LayerPlacement>) -> Self {
        Self { layers }
    }

    /// Those of a worker that is alone.
    pub(crate) fn alone(layers: &[MoeLayer]) -> Result<Self, PlaceError> {
        Ok(Self::of(contiguous(1, 0, layers)?, layers))
    }

    fn of(placements: Vec<Placement>, layers: &[MoeLayer]) -> Self {
        let of = |(layer, placement): (&MoeLayer, Placement)| LayerPlacement {
            layer: layer.number,
            epoch: OWN_EPOCH,
            placement,
        };
        Self { layers: layers.iter().zip(placements).map(of).collect() }
    }

    /// Takes placements from elsewhere in place of these, if they fit: the same layers, ranks and experts,
    /// and no more slots.
    pub(crate) fn replaced_by(&self, layers: Vec<LayerPlacement>) -> Result<Self, PlaceError> {
        let numbers = |layers: &[LayerPlacement]| layers.iter().map(|layer| layer.layer).collect();
        let [got, expected]: [Vec<u32>; 2] = [numbers(&layers), numbers(&self.layers)];
        if got != expected {
            return Err(PlaceError::Other { got, expected });
        }
        for (own, LayerPlacement { layer, placement, .. }) in self.layers.iter().zip(&layers) {
            let own = &own.placement;
            let fit = |what, got: u32, expected: u32| {
                let layer = *layer;
                Err(PlaceError::Fit { layer, what, got, expected })
            };
            if placement.ranks() != own.ranks() {
                return fit("the number of ranks", placement.ranks(), own.ranks());
            }
            if placement.experts() != own.experts() {
                return fit("the number of experts", placement.experts(), own.experts());
            }
            if placement.slots_per_rank() > own.slots_per_rank() {
                let slots = placement.slots_per_rank();
                return fit("the number of slots a rank", slots, own.slots_per_rank());
            }
        }
        Ok(Self { layers })
    }

    /// What `rank` holds of the layer at `position`.
    pub(crate) fn slots(&self, position: usize, rank: u32) -> LayerSlots {
        slots_of(&self.layers[position], rank)
    }

    /// What `rank` would hold of another placement of a layer, if it fits in place of these.
    pub(crate) fn slots_with(
        &self,
        placement: &LayerPlacement,
        rank: u32,
    ) -> Result<LayerSlots, PlaceError> {
        let mut layers = self.layers.clone();
        for layer in layers.iter_mut().filter(|layer| layer.layer == placement.layer) {
            *layer = placement.clone();
        }
        self.replaced_by(layers)?;
        Ok(slots_of(placement, rank))
    }

    /// A layer has another placement.
    pub(crate) fn replace(&mut self, placement: LayerPlacement) {
        for layer in self.layers.iter_mut().filter(|layer| layer.layer == placement.layer) {
            layer.clone_from(&placement);
        }
    }

    /// Slots of a rank in each layer.
    pub(crate) fn slots_per_rank(&self) -> Vec<u32> {
        self.layers.iter().map(|layer| layer.placement.slots_per_rank()).collect()
    }

    /// What control is told.
    pub(crate) fn layers(&self) -> &[LayerPlacement] {
        &self.layers
    }

    /// Equal on all ranks whose own placements are. Those of control have epochs, which calls compare, and may change.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for LayerPlacement { epoch, placement, .. } in &self.layers {
            if *epoch == OWN_EPOCH {
                hash.update(format!("{:?};", placement.to_phy2log()));
            } else {
                hash.update("by control;");
            }
        }
        hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Writes what the group holds, for [`Self::remembered`].
    pub(crate) fn remember(&self, group: &GroupConfig, model: &str) -> io::Result<()> {
        let remembered = Remembered { model: model.to_owned(), layers: self.layers.clone() };
        // Whole or not at all: other ranks write the same.
        let path = memory(group);
        let beside = group.dir.join(format!("moeplane_placement-{}:{}", group.name, group.rank));
        fs::write(&beside, serde_json::to_vec(&remembered)?)?;
        fs::rename(&beside, &path)
    }

    /// What the group held last on this host, if it was of this model.
    pub(crate) fn remembered(group: &GroupConfig, model: &str) -> Option<Vec<LayerPlacement>> {
        let text = fs::read(memory(group)).ok()?;
        let remembered: Remembered = serde_json::from_slice(&text).ok()?;
        (remembered.model == model).then_some(remembered.layers)
    }
}

fn slots_of(placed: &LayerPlacement, rank: u32) -> LayerSlots {
    let LayerPlacement { epoch, placement, .. } = placed;
    let experts = placement.slots_of_rank(RankId(rank)).iter();
    let RoutingTable { replica_start, slots, cumulative } =
        RoutingTable::of(placement, RankId(rank));
    LayerSlots {
        epoch: *epoch,
        experts: experts.map(|slot| slot.map(|expert| expert.0)).collect(),
        route: RouteTable { replica_start, slots, cumulative },
    }
}

/// Beside the group's heap, under a name that no heap has.
fn memory(group: &GroupConfig) -> PathBuf {
    group.dir.join(format!("moeplane_placement-{}", group.name))
}

fn read(path: &Path, ranks: u32, layers: &[MoeLayer]) -> Result<Vec<Placement>, PlaceError> {
    let (_, phy2log) = read_phy2log(path)?;
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
