//! What windows say that experts have to do. Decides nothing.

use planning::cost::{PhaseLoad, Point, RankCost, Roofline};
use planning::estimate::{Memory, weights};

use crate::settings::{Field, Kind, Settings};
use crate::types::{CostPoint, Error, Layer, Phase, Window};

/// Setting: how much a window counts.
pub const DECAY: Field = Field {
    name: "decay",
    kind: Kind::Number { min: 0.01, max: 1.0, default: 0.8 },
    about: "Weight of a window beside the one after it.",
};

/// Setting: what counts as a drift.
pub const OVERLAP_MIN: Field = Field {
    name: "overlap-min",
    kind: Kind::Number { min: 0.0, max: 1.0, default: 0.85 },
    about: "A window that overlaps with the newer ones by less, and by less than chance explains, is \
            before a drift: it and older ones are forgotten.",
};

/// What [`DECAY`] and [`OVERLAP_MIN`] say.
#[must_use]
pub fn memory(settings: &Settings) -> Memory {
    Memory { decay: settings.number(DECAY.name), overlap_min: settings.number(OVERLAP_MIN.name) }
}

/// The phases, in the order of everything that lists them.
pub const PHASES: [Phase; 2] = [Phase::Prefill, Phase::Decode];

/// Windows must have a count of every expert of every layer, or none has.
///
/// # Errors
/// [`Error::InvalidInput`] names the window.
pub fn check_windows(windows: &[Window], layers: &[Layer], experts: usize) -> Result<(), Error> {
    for window in windows {
        let refuse = |what: String| {
            let start = window.start_ms;
            Err(Error::InvalidInput(format!("the window that starts at {start}: {what}")))
        };
        let (found, expected) = (window.load.len(), layers.len() * experts);
        if found != expected {
            return refuse(format!("{found} loads, expected {expected}"));
        }
        let bad = |load: &f32| !(load.is_finite() && *load >= 0.0);
        if let Some(at) = window.load.iter().position(bad) {
            let (layer, expert, load) = (layers[at / experts].id, at % experts, window.load[at]);
            let what = format!("load {load} of expert {expert} of layer {layer}");
            return refuse(format!("{what}, expected a finite number of at least 0"));
        }
    }
    Ok(())
}

/// The sum over the newest `count` windows of live traffic of each phase, [layers, experts]; absent where no window
/// counted anything. Of one window it is that window, bit for bit.
#[must_use]
pub fn newest(windows: &[Window], phases: &[Phase], count: usize) -> Option<Vec<f32>> {
    let mut sum: Option<Vec<f32>> = None;
    for phase in phases {
        let live = windows.iter().filter(|w| w.phase == *phase && w.workload.is_empty());
        for window in live.rev().take(count) {
            match &mut sum {
                None => sum = Some(window.load.clone()),
                Some(sum) => sum.iter_mut().zip(&window.load).for_each(|(sum, load)| *sum += load),
            }
        }
    }
    sum.filter(|sum| sum.iter().any(|load| *load > 0.0))
}

/// Load that is expected of a layer in one phase, as calls of a typical size.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// The phase.
    pub phase: Phase,
    /// Name of the workload; empty for live traffic.
    pub workload: String,
    /// Rows of every expert in one call.
    pub pairs: Vec<f64>,
    /// Tokens of one call.
    pub tokens: u32,
    /// Calls in the windows that the estimate is made of, by their weights.
    pub calls: f64,
    /// Windows that the estimate is made of.
    pub windows: usize,
    /// Rows that were counted for it, fewer where windows weigh unequally: as many of one window would be as sure.
    pub evidence: f64,
}

/// One layer of windows: its place in the request, and how many experts it has.
#[derive(Debug, Clone, Copy)]
pub struct Of {
    /// Its place in the request.
    pub index: usize,
    /// Experts of each layer.
    pub experts: usize,
}

impl Of {
    fn load(self, window: &Window) -> &[f32] {
        let first = self.index * self.experts;
        window.load.get(first..first + self.experts).unwrap_or_default()
    }
}

/// Live load of each phase that has any, by the newest windows up to the last drift.
#[must_use]
pub fn expected(windows: &[Window], layer: Of, memory: &Memory) -> Vec<Expected> {
    let estimate = |phase: Phase| {
        let live = |w: &&Window| w.phase == phase && w.workload.is_empty();
        let windows: Vec<&Window> = windows.iter().filter(live).collect();
        let loads: Vec<&[f32]> = windows.iter().map(|window| layer.load(window)).collect();
        let weights = weights(&loads, memory);
        average(phase, "", windows.iter().rev().copied().zip(weights), layer)
    };
    PHASES.into_iter().filter_map(estimate).collect()
}

/// The weighted sum of windows of a layer as calls of their mean size; none where no row was counted.
#[must_use]
pub fn average<'a>(
    phase: Phase,
    workload: &str,
    windows: impl Iterator<Item = (&'a Window, f64)>,
    layer: Of,
) -> Option<Expected> {
    let mut pairs = vec![0.0; layer.experts];
    let (mut calls, mut tokens, mut count) = (0.0, 0.0, 0);
    let (mut once, mut twice) = (0.0, 0.0);
    for (window, weight) in windows {
        let mut counted = 0.0;
        for (sum, rows) in pairs.iter_mut().zip(layer.load(window)) {
            *sum += weight * f64::from(*rows);
            counted += f64::from(*rows);
        }
        calls += weight * f64::from(window.calls);
        tokens += weight * f64::from(window.tokens);
        count += 1;
        once += weight * counted;
        twice += weight * weight * counted;
    }
    if once <= 0.0 {
        return None;
    }
    // Fewer than one call: an interval that cut a call in two.
    let calls = f64::max(calls, 1.0);
    pairs.iter_mut().for_each(|rows| *rows /= calls);
    Some(Expected {
        phase,
        workload: workload.to_owned(),
        pairs,
        tokens: whole(tokens / calls),
        calls,
        windows: count,
        evidence: once * once / twice,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, which is what a number of tokens beyond u32 should do"
)]
fn whole(tokens: f64) -> u32 {
    (tokens + 0.5).max(1.0) as u32
}

/// What calls cost, by phase.
#[derive(Debug, Clone)]
pub struct Costs {
    measured: Vec<(Phase, RankCost)>,
    pairs: RankCost,
}

impl Costs {
    /// Fits what was measured.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for a measurement that is none.
    pub fn read(points: &[CostPoint]) -> Result<Self, Error> {
        let good = |number: f32| number.is_finite() && number >= 0.0;
        let bad = |p: &&CostPoint| !(good(p.pairs) && good(p.experts) && good(p.milliseconds));
        if let Some(point) = points.iter().find(bad) {
            let CostPoint { pairs, experts, milliseconds, .. } = point;
            return Err(Error::InvalidInput(format!(
                "a cost of {milliseconds} ms for {pairs} pairs and {experts} experts, expected \
                 finite numbers of at least 0"
            )));
        }
        let measured = PHASES.into_iter().filter_map(|phase| {
            let of_phase = points.iter().filter(|point| point.phase == phase);
            let points: Vec<Point> = of_phase
                .map(|point| Point {
                    pairs: point.pairs.into(),
                    active: point.experts.into(),
                    ms: point.milliseconds.into(),
                })
                .collect();
            Some((phase, RankCost::Roofline(Roofline::fit(&points)?)))
        });
        let measured = measured.collect();
        Ok(Self { measured, pairs: RankCost::Pairs { ms_per_pair: 1.0 } })
    }

    /// Whether all of the loads have a cost. If not, milliseconds of one phase cannot be weighed against rows of another,
    /// and rows are all that counts.
    #[must_use]
    pub fn cover(&self, loads: &[Expected]) -> bool {
        let known = |load: &Expected| self.measured.iter().any(|(phase, _)| *phase == load.phase);
        !loads.is_empty() && loads.iter().all(known)
    }

    /// The loads with what they cost, milliseconds where all are measured and rows otherwise, each weighed by its calls.
    #[must_use]
    pub fn phases<'a>(&'a self, loads: &'a [Expected]) -> Vec<PhaseLoad<'a>> {
        let covered = self.cover(loads);
        let of = |load: &'a Expected| {
            let found = self.measured.iter().find(|(phase, _)| covered && *phase == load.phase);
            PhaseLoad {
                pairs: &load.pairs,
                tokens: load.tokens,
                weight: load.calls,
                cost: found.map_or(&self.pairs, |(_, cost)| cost),
            }
        };
        loads.iter().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(phase: Phase, workload: &str, load: &[f32]) -> Window {
        Window {
            start_ms: 5,
            end_ms: 6,
            phase,
            workload: workload.to_owned(),
            calls: 1.0,
            tokens: 1.0,
            distinct_experts: Vec::new(),
            load: load.to_vec(),
        }
    }

    #[test]
    fn the_newest_live_windows_of_each_phase_are_summed() {
        let windows = [
            window(Phase::Decode, "", &[100.0, 0.0]),
            window(Phase::Prefill, "", &[10.0, 1.0]),
            window(Phase::Decode, "", &[1.0, 2.0]),
            window(Phase::Decode, "books", &[1000.0, 0.0]),
        ];
        let both = [Phase::Prefill, Phase::Decode];
        assert_eq!(newest(&windows, &both, 1), Some(vec![11.0, 3.0]));
        assert_eq!(newest(&windows, &both, 8), Some(vec![111.0, 3.0]));
        assert_eq!(newest(&windows, &[Phase::Prefill], 8), Some(vec![10.0, 1.0]));
        assert_eq!(newest(&windows[1..2], &[Phase::Decode], 8), None);
        assert_eq!(newest(&[window(Phase::Decode, "", &[0.0, 0.0])], &both, 8), None);
    }

    #[test]
    fn a_load_is_expected_by_layer_and_phase_up_to_a_drift() {
        let of = |index| Of { index, experts: 2 };
        let memory = Memory { decay: 0.5, overlap_min: 0.8 };
        let windows = [
            window(Phase::Decode, "", &[0.0, 900.0, 10.0, 10.0]),
            window(Phase::Decode, "", &[600.0, 200.0, 10.0, 10.0]),
            window(Phase::Decode, "", &[400.0, 100.0, 0.0, 0.0]),
        ];
        let [first] = &expected(&windows, of(0), &memory)[..] else { panic!("one phase") };
        assert_eq!((first.phase, first.windows, first.calls), (Phase::Decode, 2, 1.5));
        assert_eq!(first.pairs, [700.0 / 1.5, 200.0 / 1.5]);
        assert_eq!(first.evidence, 900.0 * 900.0 / 700.0);
        let [second] = &expected(&windows, of(1), &memory)[..] else { panic!("one phase") };
        assert_eq!(second.windows, 3, "the drift is the other layer's");
        assert!(expected(&windows[2..], of(1), &memory).is_empty());
    }

    #[test]
    fn costs_count_where_every_phase_has_some() {
        let point =
            |phase, milliseconds| CostPoint { phase, pairs: 2.0, experts: 1.0, milliseconds };
        let costs = Costs::read(&[point(Phase::Decode, 4.0)]).unwrap();
        let load = |phase| {
            average(
                phase,
                "",
                [(&window(phase, "", &[2.0, 0.0]), 1.0)].into_iter(),
                Of { index: 0, experts: 2 },
            )
            .unwrap()
        };
        let (decode, both) = ([load(Phase::Decode)], [load(Phase::Decode), load(Phase::Prefill)]);
        assert!(costs.cover(&decode) && !costs.cover(&both) && !costs.cover(&[]));
        assert_eq!(costs.phases(&decode)[0].cost.ms(2.0, 1.0), 4.0);
        assert_eq!(costs.phases(&both)[0].cost.ms(2.0, 1.0), 2.0);
        let refused = Costs::read(&[point(Phase::Decode, f32::NAN)]).unwrap_err();
        let Error::InvalidInput(message) = refused else { panic!("{refused:?}") };
        assert!(message.starts_with("a cost of NaN ms for 2 pairs and 1 experts"), "{message}");
    }

    #[test]
    fn windows_that_count_nothing_known_are_named() {
        let layers = [Layer { id: 3, epoch: 1, placement: Vec::new() }];
        let check = |load: &[f32]| check_windows(&[window(Phase::Decode, "", load)], &layers, 2);
        assert_eq!(check(&[1.0, 2.0]), Ok(()));
        let refused =
            |what: &str| Err(Error::InvalidInput(format!("the window that starts at 5: {what}")));
        assert_eq!(check(&[1.0]), refused("1 loads, expected 2"));
        let expected = "load -1 of expert 1 of layer 3, expected a finite number of at least 0";
        assert_eq!(check(&[1.0, -1.0]), refused(expected));
    }
}
