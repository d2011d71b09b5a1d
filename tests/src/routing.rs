//! Routing for cases: a method by its name with the parameters that cases use, and logits routed by
//! the product and checked against the reference.

use anyhow::{Result, bail, ensure};
use protocol::routing::{Method, Router};
use reference::routing::Rule;

/// Largest relative difference of a weight from the reference's: fp32 sums of some hundred terms.
const WEIGHT_ERROR_MAX: f64 = 1e-5;

/// What a method takes besides logits; those without a bias or groups ignore them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parameters<'a> {
    /// Added to scores for the selection, one for each expert.
    pub bias: &'a [f32],
    /// Groups, and how many of them are kept.
    pub groups: (u32, u32),
    /// Factor of the weights.
    pub scale: f32,
}

/// The method that is called `name`.
pub fn method(name: &str, parameters: Parameters<'_>) -> Result<Method> {
    let Parameters { bias, groups: (n_group, topk_group), scale } = parameters;
    Ok(match name {
        "Default" => Method::Default,
        "Renormalize" => Method::Renormalize,
        "RenormalizeNaive" => Method::RenormalizeNaive,
        "Llama4Renormalize" => Method::Llama4Renormalize,
        "DeepSeekV3" => Method::DeepSeekV3 { bias: bias.to_vec(), n_group, topk_group, scale },
        "MiniMaxM2" => Method::MiniMaxM2 { bias: bias.to_vec() },
        "SigmoidRenorm" => Method::SigmoidRenorm,
        other => bail!("{other} is no routing method"),
    })
}

/// Routes `logits` `[tokens, experts]` and checks every id and weight against the reference.
pub fn route_checked(
    name: &str,
    parameters: Parameters<'_>,
    top_k: u32,
    logits: &[f32],
) -> Result<(Vec<i32>, Vec<f32>)> {
    let experts = parameters.bias.len();
    let router = Router::new(method(name, parameters)?, u32::try_from(experts)?, top_k)?;
    let top_k = top_k as usize;
    let places = logits.len() / experts * top_k;
    let (mut ids, mut weights) = (vec![-1; places], vec![f32::NAN; places]);
    router.route(logits, &mut ids, &mut weights)?;
    let (n_group, topk_group) = parameters.groups;
    let scaled = name == "DeepSeekV3";
    let rule = Rule {
        method: name,
        top_k,
        bias: parameters.bias,
        groups: (n_group as usize, topk_group as usize),
        scale: if scaled { f64::from(parameters.scale) } else { 1.0 },
    };
    for (token, logits) in logits.chunks(experts).enumerate() {
        let row = token * top_k..(token + 1) * top_k;
        let got = ids[row.clone()].iter().zip(&weights[row]);
        for ((expert, expected), (&id, &weight)) in rule.route(logits)?.into_iter().zip(got) {
            let what = || format!("{name}, token {token}: expert {id} with weight {weight}");
            ensure!(usize::try_from(id) == Ok(expert), "{}, expected expert {expert}", what());
            let error = (f64::from(weight) - expected).abs();
            ensure!(error <= WEIGHT_ERROR_MAX * expected, "{}, expected {expected}", what());
        }
    }
    Ok((ids, weights))
}
