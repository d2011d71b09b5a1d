//! The fastest of several candidates for each size, from measurements that may be old, few or missing.
//! Knows no kernel.

use alloc::vec::Vec;

/// One candidate timed at one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// The candidate.
    pub candidate: usize,
    /// Tokens of the calls.
    pub tokens: u32,
    /// Microseconds; smaller is better.
    pub us: f64,
}

/// What is chosen for one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The candidate.
    pub candidate: usize,
    /// Its microseconds at that size; absent when nothing was measured.
    pub us: Option<f64>,
    /// Microseconds of the candidate that was in force, when it was measured and is not kept.
    pub previous_us: Option<f64>,
    /// How many candidates were measured.
    pub measured: usize,
}

/// The fastest candidate for calls of `tokens`. The one in force stays unless another is faster by
/// more than `margin` of its time; without measurements it stays, or else the first is taken.
#[must_use]
pub fn fastest(
    timings: &[Timing],
    candidates: usize,
    tokens: u32,
    previous: Option<usize>,
    margin: f64,
) -> Choice {
    let times: Vec<Option<f64>> = (0..candidates).map(|c| at(timings, c, tokens)).collect();
    let mut best: Option<(f64, usize)> = None;
    for (candidate, us) in times.iter().enumerate() {
        if let Some(us) = *us
            && best.is_none_or(|(least, _)| us < least)
        {
            best = Some((us, candidate));
        }
    }
    let measured = times.iter().flatten().count();
    let previous = previous.filter(|p| *p < candidates);
    let old = previous.and_then(|p| times[p]);
    let keep = |us: f64| old.is_some_and(|old| us >= old * (1.0 - margin));
    match (best, previous) {
        (Some((us, candidate)), Some(p)) if candidate == p || keep(us) => {
            let us = old.or(Some(us));
            Choice { candidate: p, us, previous_us: None, measured }
        }
        (Some((us, candidate)), _) => {
            Choice { candidate, us: Some(us), previous_us: old, measured }
        }
        (None, kept) => {
            Choice { candidate: kept.unwrap_or(0), us: None, previous_us: None, measured }
        }
    }
}

/// A candidate's time at a size: linear between the sizes measured, the time of the nearest outside.
/// Several timings of one size count with their smallest: what disturbs a measurement adds time.
fn at(timings: &[Timing], candidate: usize, tokens: u32) -> Option<f64> {
    let mut points: Vec<(u32, f64)> = Vec::new();
    for timing in timings.iter().filter(|t| t.candidate == candidate) {
        match points.iter_mut().find(|point| point.0 == timing.tokens) {
            Some(point) => point.1 = point.1.min(timing.us),
            None => points.push((timing.tokens, timing.us)),
        }
    }
    points.sort_by_key(|point| point.0);
    let above = points.iter().position(|point| point.0 >= tokens);
    match above {
        Some(0) => points.first().map(|point| point.1),
        Some(index) => {
            let ((x0, y0), (x1, y1)) = (points[index - 1], points[index]);
            let part = f64::from(tokens - x0) / f64::from(x1 - x0);
            Some(y0 + (y1 - y0) * part)
        }
        None => points.last().map(|point| point.1),
    }
}
