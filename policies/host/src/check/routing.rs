//! The rules of split weights: shape, and no expert without a weight.

use super::{Fault, Layers, length, text};
use crate::contract::splitter::{Request, Split, Splits};
use crate::contract::types::Layer;

/// Checks splits against the request that they answer.
///
/// # Errors
/// The first rule that they break.
pub fn routing(request: &Request, splits: &Splits) -> Result<(), Fault> {
    text("the explanation", &splits.explanation)?;
    let mut layers = Layers::of(&request.layers);
    for split in &splits.layers {
        check_split(request, layers.take(split.layer)?, split)?;
    }
    Ok(())
}

fn check_split(request: &Request, layer: &Layer, split: &Split) -> Result<(), Fault> {
    let id = layer.id;
    let mut replicas = vec![0_usize; request.model.experts as usize];
    for &expert in &layer.placement {
        if let Some(count) = replicas.get_mut(expert as usize) {
            *count += 1;
        }
    }
    if split.sources != 1 {
        let ranks = request.topology.ranks.len();
        length(&format!("the sources of layer {id}"), split.sources as usize, ranks)?;
    }
    let columns: usize = replicas.iter().sum();
    let expected = columns * split.sources as usize;
    length(&format!("the weights of layer {id}"), split.weights.len(), expected)?;
    for (row, weights) in (0_u32..).zip(split.weights.chunks(columns.max(1))) {
        let mut rest = weights;
        for (expert, &count) in (0_u32..).zip(&replicas) {
            let (own, others) = rest.split_at(count.min(rest.len()));
            if count > 0 && own.iter().all(|&weight| weight == 0) {
                return Err(Fault::Weights { layer: id, expert, row });
            }
            rest = others;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example;

    fn check(sources: u32, weights: Vec<u16>) -> Result<(), String> {
        let split = Split { layer: 1, sources, weights };
        let splits = Splits { layers: vec![split], explanation: "one layer".to_owned() };
        routing(&example::routing("{}"), &splits).map_err(|fault| fault.to_string())
    }

    #[test]
    fn one_row_or_one_for_each_rank() {
        assert_eq!(check(1, vec![1; 9]), Ok(()));
        assert_eq!(check(4, vec![1; 36]), Ok(()));
        let refused = check(2, vec![1; 18]).unwrap_err();
        assert_eq!(refused, "the sources of layer 1 has 2 entries, expected 4");
        let refused = check(1, vec![1; 8]).unwrap_err();
        assert_eq!(refused, "the weights of layer 1 has 8 entries, expected 9");
    }

    #[test]
    fn an_expert_needs_a_weight_in_every_row() {
        let mut weights = vec![1; 36];
        // Expert 0 has two replicas: one may be 0.
        weights[9] = 0;
        assert_eq!(check(4, weights.clone()), Ok(()));
        weights[10] = 0;
        let refused = check(4, weights).unwrap_err();
        assert_eq!(refused, "layer 1: row 1 gives none of expert 0's replicas a weight");
    }
}
