//! The forms in which other engines keep placements, read and written. Pure.
//!
//! | form | what it is |
//! |---|---|
//! | `vllm-ascend` | `expert_map.json`: layers, their devices, `device_expert` of each |
//! | `tensorrt-llm` | YAML with `initial_global_assignments`: layer to the expert of each slot |
//! | `sglang` | JSON with `physical_to_logical_map`: a row for each layer |
//! | `deepseek` | JSON, a row for each layer, as `rebalance_experts` returns `phy2log`; -1 is an empty slot |
//!
//! The first two number layers: by the model, or by their place among those that are served. A text is
//! read whole or not at all: every layer of the group once, and each a placement that can be.

use std::collections::BTreeMap;

use protocol::message::ServedLayer;
use protocol::placement::{Placement, PlacementError};
use protocol::session::Register;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::placing::{fits, rooms};

/// Whose form it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Form {
    /// vLLM-Ascend's `expert_map.json`.
    VllmAscend,
    /// TensorRT-LLM's load balancer configuration.
    TensorrtLlm,
    /// SGLang's `--init-expert-location`.
    Sglang,
    /// DeepSeek's EPLB.
    Deepseek,
}

/// Why a text is no placement of a group, or a placement no text of a form.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    #[error("the text is not of this form: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the text is not of this form: {0}")]
    Yaml(#[from] serde_norway::Error),
    #[error("{what} is {got}, expected {expected}")]
    Count { what: &'static str, got: u64, expected: u64 },
    #[error("layer {layer}: {what} is {got}, expected {expected}")]
    OfLayer { layer: u32, what: &'static str, got: u64, expected: u64 },
    #[error("layer {0} is there twice")]
    Twice(u32),
    #[error("layer {layer} is there, the group has {expected:?}")]
    Unknown { layer: u32, expected: Vec<u32> },
    #[error("layer {layer}, device {device}: it has {got} experts, the others have {expected}")]
    Uneven { layer: u32, device: u64, got: usize, expected: usize },
    #[error("layer {layer}, device {device}: it is there twice, or a device before it is missing")]
    Device { layer: u32, device: u64 },
    #[error("layer {layer}, device {device}: expert {expert} is there, expected 0 to {last}")]
    Expert { layer: u32, device: u32, expert: i64, last: u32 },
    #[error("layer {layer}, device {device}: expert {expert} is there twice")]
    Duplicate { layer: u32, device: u32, expert: u32 },
    #[error("layer {layer}: expert {expert} is on no device")]
    Lost { layer: u32, expert: u32 },
    #[error("layer {layer}: {source}")]
    Invalid { layer: u32, source: PlacementError },
    #[error("layer {layer}: it has {got} slots a rank, the workers have room for {room}")]
    Room { layer: u32, got: u32, room: u32 },
    #[error("layer {layer} has an empty slot, which this form does not know")]
    Empty { layer: u32 },
}

#[derive(Serialize, Deserialize)]
struct Ascend {
    moe_layer_count: u64,
    layer_list: Vec<AscendLayer>,
}

#[derive(Serialize, Deserialize)]
struct AscendLayer {
    layer_id: u32,
    device_count: u64,
    device_list: Vec<AscendDevice>,
}

#[derive(Serialize, Deserialize)]
struct AscendDevice {
    device_id: u64,
    device_expert: Vec<i64>,
}

#[derive(Serialize, Deserialize)]
struct Sglang {
    physical_to_logical_map: Vec<Vec<i64>>,
}

#[derive(Serialize, Deserialize)]
struct Tensorrt {
    num_slots: u64,
    #[serde(default)]
    layer_updates_per_iter: u64,
    initial_global_assignments: BTreeMap<u32, Vec<i64>>,
}

/// The expert of every slot, rank by rank, by layer.
type Rows = Vec<(u32, Vec<i64>)>;

/// Writes placements, by layer, of a group of `ranks` ranks.
pub(crate) fn write(
    form: Form,
    ranks: u32,
    layers: &[(u32, &Placement)],
) -> Result<String, ExchangeError> {
    let rows: Rows = layers.iter().map(|(layer, of)| (*layer, of.to_phy2log())).collect();
    let empty = rows.iter().find(|(_, row)| row.contains(&-1));
    if let Some(&(layer, _)) = empty.filter(|_| form != Form::Deepseek) {
        return Err(ExchangeError::Empty { layer });
    }
    let slots = rows.first().map_or(0, |(_, row)| row.len() as u64);
    let bare = |rows: Rows| rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>();
    Ok(match form {
        Form::VllmAscend => serde_json::to_string_pretty(&ascend(ranks, rows))? + "\n",
        Form::Sglang => {
            serde_json::to_string(&Sglang { physical_to_logical_map: bare(rows) })? + "\n"
        }
        Form::Deepseek => serde_json::to_string(&bare(rows))? + "\n",
        Form::TensorrtLlm => serde_norway::to_string(&Tensorrt {
            num_slots: slots,
            layer_updates_per_iter: 0,
            initial_global_assignments: rows.into_iter().collect(),
        })?,
    })
}

fn ascend(ranks: u32, rows: Rows) -> Ascend {
    let layer = |(layer_id, row): (u32, Vec<i64>)| {
        let width = (row.len() / ranks.max(1) as usize).max(1);
        let devices = (0..).zip(row.chunks(width));
        let device_list = devices
            .map(|(device_id, experts)| AscendDevice { device_id, device_expert: experts.to_vec() })
            .collect();
        AscendLayer { layer_id, device_count: u64::from(ranks), device_list }
    };
    let layer_list: Vec<AscendLayer> = rows.into_iter().map(layer).collect();
    Ascend { moe_layer_count: layer_list.len() as u64, layer_list }
}

/// Reads the placement of every layer of a worker's group, in the order of its model's layers.
pub(crate) fn read(form: Form, text: &str, of: &Register) -> Result<Vec<Placement>, ExchangeError> {
    let known: Vec<u32> = of.model.layers.iter().map(|layer| layer.number).collect();
    let rows = match form {
        Form::VllmAscend => numbered(of_ascend(serde_json::from_str(text)?, of.ranks)?, &known)?,
        Form::TensorrtLlm => {
            let map: Tensorrt = serde_norway::from_str(text)?;
            for (&layer, row) in &map.initial_global_assignments {
                let (got, expected) = (row.len() as u64, map.num_slots);
                if got != expected {
                    let what = "the number of slots";
                    return Err(ExchangeError::OfLayer { layer, what, got, expected });
                }
            }
            numbered(map.initial_global_assignments.into_iter().collect(), &known)?
        }
        Form::Sglang => {
            let map: Sglang = serde_json::from_str(text)?;
            in_order(map.physical_to_logical_map, &known)?
        }
        Form::Deepseek => in_order(serde_json::from_str(text)?, &known)?,
    };
    let layers = of.model.layers.iter().zip(rooms(of)).zip(rows);
    type Row<'a> = ((&'a ServedLayer, u32), (u32, Vec<i64>));
    let placement = |((layer, room), (number, row)): Row<'_>| {
        if form != Form::Deepseek
            && let Some(slot) = row.iter().position(|expert| *expert == -1)
        {
            return Err(bad_expert(number, slot, &row, (of.ranks, layer.experts)));
        }
        let placement = Placement::from_phy2log(layer.experts, of.ranks, &row)
            .map_err(|source| named(number, &row, (of.ranks, layer.experts), source))?;
        if !fits(of, layer, room, &placement) {
            let got = placement.slots_per_rank();
            return Err(ExchangeError::Room { layer: number, got, room });
        }
        Ok(placement)
    };
    layers.map(placement).collect()
}

/// Rows under numbers: those of the model, or places among its layers.
fn numbered(rows: Rows, known: &[u32]) -> Result<Rows, ExchangeError> {
    let by_number = rows.iter().all(|(layer, _)| known.contains(layer));
    let mut found: BTreeMap<u32, Vec<i64>> = BTreeMap::new();
    for (layer, row) in rows {
        let number = match usize::try_from(layer).ok().and_then(|place| known.get(place)) {
            _ if by_number => layer,
            Some(&number) => number,
            None => return Err(ExchangeError::Unknown { layer, expected: known.to_vec() }),
        };
        if found.insert(number, row).is_some() {
            return Err(ExchangeError::Twice(layer));
        }
    }
    count("the number of layers", found.len(), known.len())?;
    Ok(found.into_iter().collect())
}

/// Rows without numbers.
fn in_order(rows: Vec<Vec<i64>>, known: &[u32]) -> Result<Rows, ExchangeError> {
    count("the number of layers", rows.len(), known.len())?;
    Ok(known.iter().copied().zip(rows).collect())
}

fn count(what: &'static str, got: usize, expected: usize) -> Result<(), ExchangeError> {
    let (got, expected) = (got as u64, expected as u64);
    if got == expected { Ok(()) } else { Err(ExchangeError::Count { what, got, expected }) }
}

fn of_ascend(map: Ascend, ranks: u32) -> Result<Rows, ExchangeError> {
    let (got, expected) = (map.moe_layer_count, map.layer_list.len() as u64);
    if got != expected {
        return Err(ExchangeError::Count { what: "moe_layer_count", got, expected });
    }
    let mut rows = Rows::new();
    for mut layer in map.layer_list {
        let number = layer.layer_id;
        let of_layer = |what, got: u64, expected: u64| ExchangeError::OfLayer {
            layer: number,
            what,
            got,
            expected,
        };
        let devices = layer.device_list.len() as u64;
        if layer.device_count != devices {
            return Err(of_layer("the number of devices", devices, layer.device_count));
        }
        if devices != u64::from(ranks) {
            return Err(of_layer("the number of devices", devices, ranks.into()));
        }
        // Their numbers say which is which, not their order.
        layer.device_list.sort_by_key(|device| device.device_id);
        let width = layer.device_list.first().map_or(0, |device| device.device_expert.len());
        let mut row = Vec::new();
        for (expected, device) in (0..).zip(layer.device_list) {
            let (device, experts) = (device.device_id, device.device_expert);
            if device != expected {
                return Err(ExchangeError::Device { layer: number, device });
            }
            if experts.len() != width {
                let (got, expected) = (experts.len(), width);
                return Err(ExchangeError::Uneven { layer: number, device, got, expected });
            }
            row.extend(experts);
        }
        rows.push((number, row));
    }
    Ok(rows)
}

fn bad_expert(layer: u32, slot: usize, row: &[i64], (ranks, experts): (u32, u32)) -> ExchangeError {
    let width = (row.len() / ranks.max(1) as usize).max(1);
    let device = u32::try_from(slot / width).unwrap_or(u32::MAX);
    let expert = row.get(slot).copied().unwrap_or_default();
    ExchangeError::Expert { layer, device, expert, last: experts.saturating_sub(1) }
}

/// The words of these forms for what is wrong with a placement.
fn named(layer: u32, row: &[i64], of: (u32, u32), source: PlacementError) -> ExchangeError {
    match source {
        PlacementError::UnknownExpert { slot, .. } | PlacementError::NoExpert { slot, .. } => {
            bad_expert(layer, slot.0 as usize, row, of)
        }
        PlacementError::Duplicate { rank, expert, .. } => {
            ExchangeError::Duplicate { layer, device: rank.0, expert: expert.0 }
        }
        PlacementError::Lost { expert } => ExchangeError::Lost { layer, expert: expert.0 },
        source => ExchangeError::Invalid { layer, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::register;

    const FORMS: [Form; 4] = [Form::VllmAscend, Form::TensorrtLlm, Form::Sglang, Form::Deepseek];

    /// Two ranks with room for three of four experts, in the model's layers 3 and 4.
    fn group() -> Register {
        let mut of = Register { layer_slots: vec![3, 3], ..register(0, 1) };
        let layer = |number| ServedLayer { number, experts: 4, ..of.model.layers[0] };
        of.model.layers = vec![layer(3), layer(4)];
        of
    }

    #[test]
    fn what_is_written_reads_back() {
        let of = group();
        let placements = [[0, 1, 2, 3, 2, 1], [3, 0, 1, 2, 3, 0]]
            .map(|row| Placement::from_phy2log(4, 2, &row).unwrap());
        let layers: Vec<_> = [3, 4].into_iter().zip(&placements).collect();
        for form in FORMS {
            let text = write(form, 2, &layers).unwrap();
            assert_eq!(read(form, &text, &of).unwrap(), placements, "{form:?} {text}");
        }
        let empty = Placement::from_phy2log(4, 2, &[0, 1, -1, 2, 3, -1]).unwrap();
        let layers = [(3, &empty), (4, &empty)];
        for form in FORMS {
            match write(form, 2, &layers) {
                Ok(text) => assert_eq!(read(form, &text, &of).unwrap()[0], empty, "{form:?}"),
                Err(error) => {
                    assert_ne!(form, Form::Deepseek);
                    assert!(error.to_string().starts_with("layer 3 has an empty slot"));
                }
            }
        }
    }

    #[test]
    fn published_examples_are_read() {
        let of = group();
        let yaml = "num_slots: 4 # all ranks\ninitial_global_assignments:\n  3: [0, 1, 2, 3]\n  4:\n    - 3\n    - 2\n    - 1\n    - 0\nlayer_updates_per_iter: 0\n";
        let read_yaml = read(Form::TensorrtLlm, yaml, &of).unwrap();
        assert_eq!(read_yaml[1].to_phy2log(), [3, 2, 1, 0]);
        // By their place, and devices in any order.
        let device = |id, experts| format!("{{\"device_id\":{id},\"device_expert\":{experts}}}");
        let layer = |id| {
            let devices = [device(1, "[2,3]"), device(0, "[0,1]")].join(",");
            format!("{{\"layer_id\":{id},\"device_count\":2,\"device_list\":[{devices}]}}")
        };
        let text = format!("{{\"moe_layer_count\":2,\"layer_list\":[{},{}]}}", layer(1), layer(0));
        let placements = read(Form::VllmAscend, &text, &of).unwrap();
        assert_eq!(placements[0].to_phy2log(), [0, 1, 2, 3]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (form, text, expected) in [
            (Form::Deepseek, "[[0]]", "the number of layers is 1, expected 2"),
            (
                Form::Deepseek,
                "[[0,1,2,3],[0,1,2,4]]",
                "layer 4, device 1: expert 4 is there, expected 0 to 3",
            ),
            (Form::Deepseek, "[[0,1,2,3],[0,1,2]]", "layer 4: 3 slots cannot be divided evenly"),
            (
                Form::Deepseek,
                "[[0,1,2,3,0,1,2,3],[0,1,2,3]]",
                "layer 3: it has 4 slots a rank, the workers have room for 3",
            ),
            (Form::Sglang, "{}", "missing field `physical_to_logical_map`"),
            (Form::TensorrtLlm, "num_slots: 3", "missing field `initial_global_assignments`"),
            (
                Form::TensorrtLlm,
                "num_slots: 4\ninitial_global_assignments:\n  9: [0,1,2,3]",
                "layer 9 is there, the group has [3, 4]",
            ),
            (
                Form::TensorrtLlm,
                "num_slots: 4\ninitial_global_assignments:\n  3: [0,1]",
                "layer 3: the number of slots is 2, expected 4",
            ),
        ] {
            let error = read(form, text, &group()).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
