//! What must be true of every group at every moment, each said once: for tests of real processes and for the simulator.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use protocol::ids::RankId;
use protocol::placement::Placement;
use protocol::session::LayerPlacement;

/// No token is computed with another expert's bytes: an answer has the bits that one rank alone gives.
pub fn has_its_bits(what: &str, answer: &[u16], expected: &[u16]) -> Result<()> {
    ensure!(answer == expected, "{what} has other bits");
    Ok(())
}

/// An expert is refused only if every rank that has it is lost.
pub fn is_lost(
    placement: &Placement,
    (layer, expert): (u32, u32),
    lost: &BTreeSet<u32>,
) -> Result<()> {
    let has = |rank: &u32| {
        placement.slots_of_rank(RankId(*rank)).iter().flatten().any(|held| held.0 == expert)
    };
    let live = (0..placement.ranks()).filter(|rank| !lost.contains(rank)).find(has);
    ensure!(
        live.is_none(),
        "expert {expert} of layer {layer} was refused, and rank {live:?} has it"
    );
    Ok(())
}

/// Epochs of what a process holds only grow.
pub fn epochs_grow(before: &[LayerPlacement], now: &[LayerPlacement]) -> Result<()> {
    for (before, now) in before.iter().zip(now) {
        let (layer, [before, now]) = (now.layer, [before.epoch, now.epoch]);
        ensure!(before <= now, "layer {layer} went back from epoch {before} to {now}");
    }
    Ok(())
}

/// What is held is what was committed under its number.
pub fn is_committed<'a>(
    held: &LayerPlacement,
    committed: impl FnOnce(u32, u64) -> Option<&'a LayerPlacement>,
) -> Result<()> {
    let LayerPlacement { layer, epoch, .. } = held;
    let committed = committed(*layer, *epoch);
    ensure!(committed == Some(held), "epoch {epoch} of layer {layer} is not what was committed");
    Ok(())
}

/// What was committed last comes to be in force, once nothing goes wrong any more: no committed placement is lost.
pub fn is_in_force(
    newest: &BTreeMap<u32, u64>,
    held: &BTreeMap<u32, u64>,
    who: &str,
) -> Result<()> {
    ensure!(newest == held, "{newest:?} was committed last, {who} holds {held:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_found() {
        let placement = Placement::from_phy2log(3, 2, &[0, 1, 1, 2]).unwrap();
        let held = |epoch| LayerPlacement { layer: 5, epoch, placement: placement.clone() };
        assert!(has_its_bits("it", &[1, 2], &[1, 2]).is_ok());
        assert!(has_its_bits("it", &[1, 2], &[1, 3]).is_err());
        // Expert 1 is on both ranks.
        assert!(is_lost(&placement, (5, 0), &[0].into()).is_ok());
        assert!(is_lost(&placement, (5, 1), &[0].into()).is_err());
        assert!(is_lost(&placement, (5, 1), &[0, 1].into()).is_ok());
        assert!(epochs_grow(&[held(3)], &[held(3)]).is_ok());
        assert!(epochs_grow(&[held(3)], &[held(2)]).is_err());
        let other =
            LayerPlacement { placement: Placement::contiguous(3, 2, 2).unwrap(), ..held(3) };
        let same = held(3);
        assert!(is_committed(&held(3), |_, _| Some(&same)).is_ok());
        assert!(is_committed(&held(3), |_, _| Some(&other)).is_err());
        assert!(is_committed(&held(3), |_, _| None).is_err());
        assert!(is_in_force(&[(5, 3)].into(), &[(5, 3)].into(), "it").is_ok());
        assert!(is_in_force(&[(5, 4)].into(), &[(5, 3)].into(), "it").is_err());
    }
}
