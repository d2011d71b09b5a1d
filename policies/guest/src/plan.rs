//! What a plan may cost. Plans nothing.

use crate::placement::placer::Budget;

/// What is left of a budget.
#[derive(Debug, Clone)]
pub struct Purse {
    layers: u64,
    moves_per_layer: u64,
    bytes: u64,
    expert_bytes: u64,
}

impl Purse {
    /// All of a budget, for replicas of `expert_bytes`.
    #[must_use]
    pub fn of(budget: &Budget, expert_bytes: u64) -> Self {
        let bound = |limit: Option<u32>| limit.map_or(u64::MAX, u64::from);
        Self {
            layers: bound(budget.layers),
            moves_per_layer: bound(budget.moves_per_layer),
            bytes: budget.bytes.unwrap_or(u64::MAX),
            expert_bytes,
        }
    }

    /// Moves that one more layer may make; none where no more layer may change.
    #[must_use]
    pub fn moves(&self) -> Option<usize> {
        let affordable = self.bytes / self.expert_bytes.max(1);
        let moves = usize::try_from(affordable.min(self.moves_per_layer)).unwrap_or(usize::MAX);
        (self.layers > 0).then_some(moves)
    }

    /// Takes a layer with its moves out, if they are affordable.
    pub fn pay(&mut self, moves: usize) -> bool {
        if self.moves().is_none_or(|affordable| moves > affordable) {
            return false;
        }
        self.layers -= 1;
        self.bytes -= (moves as u64).saturating_mul(self.expert_bytes).min(self.bytes);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_moves_and_bytes_run_out() {
        let budget = Budget { layers: Some(2), moves_per_layer: Some(4), bytes: Some(60) };
        let mut purse = Purse::of(&budget, 10);
        assert_eq!(purse.moves(), Some(4));
        assert!(!purse.pay(5));
        assert!(purse.pay(4));
        assert_eq!(purse.moves(), Some(2));
        assert!(!purse.pay(3));
        assert!(purse.pay(2));
        assert_eq!(purse.moves(), None);
        assert!(!purse.pay(0), "no third layer, even if it costs nothing");
        let none = Budget { layers: None, moves_per_layer: None, bytes: None };
        assert!(Purse::of(&none, 10).pay(1_000_000));
    }
}
