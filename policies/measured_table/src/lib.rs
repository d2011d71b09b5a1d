//! The tactics policy `measured-table`: the fastest measured tactic of each bucket, the one in force unless another is
//! clearly faster. The arithmetic is [`planning::choose`].

use planning::choose::{Timing, fastest};
use policy_guest::settings::{Field, Kind, Settings, schema};
use policy_guest::tactics::chooser::{Choice, Measurement, Request, Table};
use policy_guest::tactics::{chooser, meta};
use policy_guest::types::Error;

/// The policy.
#[derive(Debug)]
pub struct MeasuredTable;

#[cfg(target_family = "wasm")]
policy_guest::tactics::export!(MeasuredTable with_types_in policy_guest::tactics);

const FIELDS: &[Field] = &[
    Field {
        name: "margin",
        kind: Kind::Number { min: 0.0, max: 0.9, default: 0.03 },
        about: "Share of its time by which another tactic must be faster than the one in force.",
    },
    Field {
        name: "runs-min",
        kind: Kind::Integer { min: 1, max: 1_000_000, default: 5 },
        about: "Measurements of fewer timed calls are ignored.",
    },
    Field {
        name: "time",
        kind: Kind::Choice(&["median", "p99"]),
        about: "Which of the measured times counts.",
    },
    Field {
        name: "workspace-mb-max",
        kind: Kind::Integer { min: 0, max: 1_000_000, default: 1_000_000 },
        about: "Tactics that need more device memory beyond the experts are left out, in MB.",
    },
];

impl meta::Guest for MeasuredTable {
    fn describe() -> meta::Info {
        meta::Info {
            name: "measured-table".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            summary: "The fastest measured tactic of each bucket; the one in force unless another \
                      is clearly faster."
                .to_owned(),
            settings_schema: schema(FIELDS),
        }
    }

    fn validate(settings: String) -> Result<(), Vec<meta::Issue>> {
        policy_guest::tactics::validate(FIELDS, &settings)
    }
}

impl chooser::Guest for MeasuredTable {
    fn decide(request: Request) -> Result<Table, Error> {
        let settings = Settings::accepted(FIELDS, &request.context.settings)?;
        let (candidates, previous) = (request.candidates.len(), &request.previous);
        if candidates == 0 {
            return Err(Error::InvalidInput("no candidate, expected at least one".to_owned()));
        }
        if !previous.is_empty() && previous.len() != request.buckets.len() {
            let (found, expected) = (previous.len(), request.buckets.len());
            let message = format!("{found} choices in force, expected none or {expected}");
            return Err(Error::InvalidInput(message));
        }
        let timings = timings(&request, &settings)?;
        let choices = request.buckets.iter().enumerate().map(|(bucket, tokens)| {
            let in_force = previous.get(bucket).map(|candidate| *candidate as usize);
            let in_force = in_force.filter(|candidate| allowed(&request, *candidate, &settings));
            let margin = settings.number("margin");
            let found = fastest(&timings, candidates, *tokens, in_force, margin);
            Choice {
                candidate: u32::try_from(found.candidate).unwrap_or_default(),
                expected_us: found.us.map(single),
            }
        });
        let choices: Vec<Choice> = choices.collect();
        let measured = choices.iter().filter(|choice| choice.expected_us.is_some()).count();
        let explanation = format!(
            "{measured} of {} buckets by {} measurements; the others keep what they have",
            choices.len(),
            timings.len()
        );
        Ok(Table { choices, explanation })
    }
}

/// Whether a candidate's memory is within bounds. The first one always is: something must run.
fn allowed(request: &Request, candidate: usize, settings: &Settings) -> bool {
    let bytes_max = (settings.integer("workspace-mb-max") as u64).saturating_mul(1_000_000);
    let found = request.candidates.get(candidate);
    candidate == 0 || found.is_some_and(|c| c.workspace_bytes <= bytes_max)
}

fn timings(request: &Request, settings: &Settings) -> Result<Vec<Timing>, Error> {
    let mut timings = Vec::with_capacity(request.measurements.len());
    for measurement in &request.measurements {
        let Measurement { candidate, tokens, runs, median_us, p99_us, .. } = *measurement;
        let us = if settings.choice("time") == "p99" { p99_us } else { median_us };
        if candidate as usize >= request.candidates.len() || !(us.is_finite() && us > 0.0) {
            let message = format!(
                "a measurement of candidate {candidate} with {us} us, expected one of {} candidates \
                 and more than 0",
                request.candidates.len()
            );
            return Err(Error::InvalidInput(message));
        }
        let candidate = candidate as usize;
        if runs as usize >= settings.integer("runs-min") && allowed(request, candidate, settings) {
            timings.push(Timing { candidate, tokens, us: us.into() });
        }
    }
    Ok(timings)
}

#[expect(clippy::cast_possible_truncation, reason = "a time to be shown")]
fn single(us: f64) -> f32 {
    us as f32
}
