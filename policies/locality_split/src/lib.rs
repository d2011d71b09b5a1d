//! The routing policy `locality-split`: tokens go to a replica on their own rank, else on their node, as far as the ranks
//! stay even. The arithmetic is [`planning::split`].

use planning::layer::replica_counts;
use planning::split::{Shares, SplitProblem, split};
use policy_guest::group::Group;
use policy_guest::load::{DECAY, OVERLAP_MIN, Of, check_windows, expected, memory};
use policy_guest::routing::{meta, splitter};
use policy_guest::settings::{Field, Kind, Settings, schema};
use policy_guest::types::{Error, Layer};

/// The policy.
#[derive(Debug)]
pub struct LocalitySplit;

#[cfg(target_family = "wasm")]
policy_guest::routing::export!(LocalitySplit with_types_in policy_guest::routing);

const FIELDS: &[Field] = &[
    Field {
        name: "max-over-mean",
        kind: Kind::Number { min: 1.0, max: 10.0, default: 1.05 },
        about: "Fullest rank beside an even one, up to which tokens are kept near.",
    },
    Field {
        name: "locality",
        kind: Kind::Choice(&["near", "even"]),
        about: "near: as local as max-over-mean allows. even: one split for tokens of all ranks, as \
                even as it gets.",
    },
    DECAY,
    OVERLAP_MIN,
];

impl meta::Guest for LocalitySplit {
    fn describe() -> meta::Info {
        meta::Info {
            name: "locality-split".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            summary: "Tokens go to a replica on their own rank, else on their node, as far as the \
                      ranks stay even."
                .to_owned(),
            settings_schema: schema(FIELDS),
        }
    }

    fn validate(settings: String) -> Result<(), Vec<meta::Issue>> {
        policy_guest::routing::validate(FIELDS, &settings)
    }
}

impl splitter::Guest for LocalitySplit {
    fn decide(request: splitter::Request) -> Result<splitter::Splits, Error> {
        let settings = Settings::accepted(FIELDS, &request.context.settings)?;
        let group = Group::read(&request.topology, &request.model, &request.layers, &[])?;
        check_windows(&request.windows, &request.layers, group.shape.experts)?;
        check_sources(&request, &group)?;
        let mut layers = Vec::new();
        let (mut fullest, mut local) = (0.0_f64, 0.0);
        for (index, layer) in request.layers.iter().enumerate() {
            let counts = replica_counts(&layer.placement, group.shape.experts);
            // An expert in one place leaves nothing to split.
            if counts.iter().any(|count| *count > 1) {
                let sources = sources(&request, &group, index, &settings);
                let (split, shares) = layer_split(layer, &group, &sources, &settings);
                fullest = fullest.max(shares.max_over_mean);
                local += shares.local;
                layers.push(split);
            }
        }
        let local = 100.0 * local / layers.len().max(1) as f64;
        let explanation = format!(
            "{} of {} layers have an expert with several replicas; their fullest rank is {fullest:.3} \
             of even, and {local:.0} % of rows stay on their rank",
            layers.len(),
            request.layers.len()
        );
        Ok(splitter::Splits { layers, explanation })
    }
}

fn check_sources(request: &splitter::Request, group: &Group) -> Result<(), Error> {
    let (found, shape) = (request.source_load.len(), group.shape);
    let expected = shape.ranks * request.layers.len() * shape.experts;
    if found != 0 && found != expected {
        let message = format!("{found} loads by source, expected none or {expected}");
        return Err(Error::InvalidInput(message));
    }
    let bad = request.source_load.iter().find(|load| !(load.is_finite() && **load >= 0.0));
    bad.map_or(Ok(()), |load| {
        let message = format!("a load of {load} by source, expected a finite number of at least 0");
        Err(Error::InvalidInput(message))
    })
}

/// Load by source rank, [ranks][experts]: what is expected of each expert, from where its newest rows came. Where that is
/// not known, every rank brings the same.
fn sources(
    request: &splitter::Request,
    group: &Group,
    index: usize,
    settings: &Settings,
) -> Vec<Vec<f64>> {
    let (experts, ranks) = (group.shape.experts, group.shape.ranks);
    let memory = memory(settings);
    let mut rows = vec![0.0; experts];
    for load in expected(&request.windows, Of { index, experts }, &memory) {
        rows.iter_mut().zip(&load.pairs).for_each(|(sum, pairs)| *sum += pairs * load.calls);
    }
    let of_source = |rank: usize| {
        let first = (rank * request.layers.len() + index) * experts;
        request.source_load.get(first..first + experts).unwrap_or_default()
    };
    let mut totals = vec![0.0; experts];
    for rank in 0..ranks {
        totals.iter_mut().zip(of_source(rank)).for_each(|(sum, n)| *sum += f64::from(*n));
    }
    let share = |rank: usize, expert: usize| match of_source(rank).get(expert) {
        Some(own) if totals[expert] > 0.0 => f64::from(*own) / totals[expert],
        _ => 1.0 / ranks as f64,
    };
    let row = |rank| (0..experts).map(|expert| rows[expert] * share(rank, expert)).collect();
    (0..ranks).map(row).collect()
}

fn layer_split(
    layer: &Layer,
    group: &Group,
    sources: &[Vec<f64>],
    settings: &Settings,
) -> (splitter::Split, Shares) {
    let even = settings.choice("locality") == "even";
    // For one split for all, every rank stands for the mean source.
    let mixed = if even { mean_sources(sources) } else { Vec::new() };
    let problem = SplitProblem {
        slots: &layer.placement,
        slots_per_rank: group.shape.slots_per_rank,
        sources: if even { &mixed } else { sources },
        speeds: &group.speeds,
        nodes: &group.nodes,
    };
    let shares = split(&problem, if even { 1.0 } else { settings.number("max-over-mean") });
    let rows = if even { vec![mean_shares(&shares)] } else { shares.share.clone() };
    let weights = rows.iter().flatten().flat_map(|row| row_weights(row)).collect();
    let sources = u32::try_from(rows.len()).unwrap_or(u32::MAX);
    (splitter::Split { layer: layer.id, sources, weights }, shares)
}

fn mean_sources(sources: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut mean = vec![0.0; sources.first().map_or(0, Vec::len)];
    for row in sources {
        mean.iter_mut().zip(row).for_each(|(sum, rows)| *sum += rows / sources.len() as f64);
    }
    vec![mean; sources.len()]
}

/// What one row for all has to say, up to a factor: the sum over the sources, which bring the same.
fn mean_shares(shares: &Shares) -> Vec<Vec<f64>> {
    let mut sum = shares.share.first().cloned().unwrap_or_default();
    for rows in shares.share.iter().skip(1) {
        for (sum, row) in sum.iter_mut().zip(rows) {
            sum.iter_mut().zip(row).for_each(|(sum, share)| *sum += share);
        }
    }
    sum
}

/// Shares as u16, the largest as large as it gets, so that little is lost to rounding.
fn row_weights(shares: &[f64]) -> Vec<u16> {
    let most = shares.iter().copied().fold(0.0, f64::max);
    let weight = |share: &f64| if most > 0.0 { to_u16(share / most) } else { 1 };
    shares.iter().map(weight).collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share from 0 to 1 of u16's largest value"
)]
fn to_u16(share: f64) -> u16 {
    (share.clamp(0.0, 1.0) * f64::from(u16::MAX) + 0.5) as u16
}
