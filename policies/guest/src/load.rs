//! What windows say that experts have to do. Decides nothing.

use crate::types::{Error, Layer, Phase, Window};

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
