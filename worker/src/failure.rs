//! What a device's refusal of a call means to an engine.

use kernels::device::CallError;
use kernels::group::Phase;
use kernels::problem::TOP_K_MAX;
use protocol::refusal::Refusal;

use crate::model::Model;

/// The words of the protocol for a device's error.
pub(crate) fn refusal(error: CallError, model: &Model) -> Refusal {
    match error {
        CallError::Layer { layer, served } => {
            Refusal::Layer { layer, reason: model.why_unserved(layer), served }
        }
        CallError::TopK { top_k } => Refusal::TopK { top_k, max: TOP_K_MAX },
        CallError::ExpertId { token, place, id, last } => {
            Refusal::ExpertId { token, place, id, last }
        }
        CallError::DuplicateExpert { token, id, first, second } => {
            Refusal::DuplicateExpert { token, id, first, second }
        }
        CallError::Weight { token, place, weight } => {
            Refusal::Weight { token, place, weight: weight.to_string() }
        }
        CallError::Pairs { tokens, top_k, max } => Refusal::Pairs { tokens, top_k, max },
        CallError::Unavailable { layer, expert, lost } => {
            Refusal::Unavailable { layer, expert, lost }
        }
        CallError::Device { reason } => Refusal::Device { reason },
        CallError::Mismatch(mismatch) => Refusal::Mismatch { reason: mismatch.to_string() },
        CallError::Group(error) => Refusal::Group {
            generation: error.generation,
            rank: error.rank,
            phase: match error.phase {
                Phase::Announce => "announce",
                Phase::Compute => "compute",
            }
            .to_owned(),
            layer: error.layer,
            reason: error.to_string(),
        },
        CallError::NoInputScale { .. } => Refusal::NoInputScale { reason: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use kernels::group::{GroupError, Mismatch, Reason};

    use super::*;

    #[test]
    fn sentences_are_those_of_the_device() {
        let errors = [
            CallError::Layer { layer: 9, served: vec![0, 1] },
            CallError::TopK { top_k: 17 },
            CallError::ExpertId { token: 1, place: 2, id: -7, last: 31 },
            CallError::DuplicateExpert { token: 1, id: 4, first: 0, second: 3 },
            CallError::Weight { token: 5, place: 1, weight: f32::NAN },
            CallError::NoInputScale { layer: 3 },
            CallError::Unavailable { layer: 3, expert: 7, lost: vec![1, 2] },
            CallError::Device { reason: "gate_up failed".to_owned() },
            CallError::Pairs { tokens: 9, top_k: 16, max: 64 },
            CallError::Mismatch(Mismatch {
                first: 0,
                ours: "layer 3".to_owned(),
                second: 2,
                theirs: "layer 4".to_owned(),
            }),
            CallError::Group(GroupError {
                generation: 8,
                rank: 2,
                phase: Phase::Compute,
                layer: 1,
                reason: Reason::Lost,
            }),
        ];
        let model = Model {
            name: "m".to_owned(),
            layers: Vec::new(),
            unserved: Vec::new(),
            no_nvfp4: None,
        };
        for error in errors {
            assert_eq!(refusal(error.clone(), &model).to_string(), error.to_string(), "{error:?}");
        }
    }
}
