//! The seven routing methods a second time: scores in float64, rounded once to fp32 where experts are
//! selected by them, so that ties fall as the methods define them.

use anyhow::{Result, bail};

/// A method by its name, with every parameter that any of them has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule<'a> {
    /// The method's name.
    pub method: &'a str,
    /// Experts of a token.
    pub top_k: usize,
    /// Added to sigmoids for the selection, one for each expert; empty where the method has none.
    pub bias: &'a [f32],
    /// Groups, and how many of them are kept.
    pub groups: (usize, usize),
    /// Factor of the weights.
    pub scale: f64,
}

impl Rule<'_> {
    /// Experts and weights of one token, best first.
    pub fn route(&self, logits: &[f32]) -> Result<Vec<(usize, f64)>> {
        let sigmoids: Vec<f64> =
            logits.iter().map(|&x| 1.0 / (1.0 + (-f64::from(x)).exp())).collect();
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f64> = logits.iter().map(|&x| f64::from(x - max).exp()).collect();
        let all: f64 = powers.iter().sum();
        let softmax: Vec<f64> = powers.iter().map(|power| power / all).collect();
        let rounded = |scores: &[f64]| scores.iter().map(|&s| s as f32).collect::<Vec<_>>();
        let biased = || {
            let scores = rounded(&sigmoids);
            scores.iter().zip(self.bias).map(|(score, bias)| score + bias).collect::<Vec<_>>()
        };
        // What selects, what weighs, and what is added to the sum that weights are divided by.
        let (keys, scores, divided) = match self.method {
            "Default" => (rounded(&softmax), softmax, None),
            "Renormalize" => (logits.to_vec(), powers, Some(0.0)),
            "RenormalizeNaive" => (rounded(&softmax), softmax, Some(0.0)),
            "Llama4Renormalize" => (logits.to_vec(), sigmoids, None),
            "DeepSeekV3" => (self.within_best_groups(biased()), sigmoids, Some(1e-20)),
            "MiniMaxM2" => (biased(), sigmoids, Some(1e-20)),
            "SigmoidRenorm" => (rounded(&sigmoids), sigmoids, Some(0.0)),
            other => bail!("{other} is no routing method"),
        };
        let chosen = best(&keys, self.top_k);
        let sum: f64 = chosen.iter().map(|&expert| scores[expert]).sum();
        let divisor = divided.map_or(1.0, |floor| sum + floor);
        Ok(chosen.into_iter().map(|e| (e, self.scale * scores[e] / divisor)).collect())
    }

    fn within_best_groups(&self, keys: Vec<f32>) -> Vec<f32> {
        let (groups, kept) = self.groups;
        let size = keys.len() / groups;
        let worth = |group: &[f32]| best(group, 2).iter().map(|&at| group[at]).sum();
        let worths: Vec<f32> = keys.chunks(size).map(worth).collect();
        let kept = best(&worths, kept);
        let key = |(expert, key)| {
            if kept.contains(&(expert / size)) { key } else { f32::NEG_INFINITY }
        };
        keys.into_iter().enumerate().map(key).collect()
    }
}

/// Positions of the `count` largest, largest first, the lower position first among equals.
fn best(keys: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    // A zero of either sign is the same score.
    order.sort_by(|&a, &b| (keys[b] + 0.0).total_cmp(&(keys[a] + 0.0)));
    order.truncate(count);
    order
}
