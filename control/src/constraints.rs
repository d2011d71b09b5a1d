//! What operators say of a group's ranks and experts that every plan has to keep: ranks that are to leave, ranks that are
//! slower than others, and experts that must or must not be somewhere. Pure.

use policy_host::contract::types::{Pin, PinKind, Rank, RankState};
use protocol::session::Register;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::PINS_MAX;
use crate::propose::OutOfRange;

/// What plans for a group have to keep.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Constraints {
    /// Ranks that get nothing new, and whose experts come to have a place elsewhere as well, so that they can be taken away; not all
    /// of them.
    pub(crate) draining: Vec<u32>,
    /// Ranks that are faster or slower than others; 1 for those that are not here.
    pub(crate) speeds: Vec<Speed>,
    /// Experts that must or must not be on ranks; at most 4096.
    pub(crate) pins: Vec<Pinned>,
}

/// How fast a rank is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Speed {
    /// The rank.
    pub(crate) rank: u32,
    /// Beside the others, 0.01 to 100.
    pub(crate) speed: f32,
}

/// An expert that must or must not be on a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pinned {
    /// The layer; every layer if absent.
    #[serde(default)]
    pub(crate) layer: Option<u32>,
    /// The expert.
    pub(crate) expert: u32,
    /// The rank.
    pub(crate) rank: u32,
    /// Whether the rank has a replica, or has none.
    pub(crate) kind: Kind,
}

/// What holds of an expert on a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// The rank has a replica.
    Must,
    /// The rank has none.
    Never,
}

impl Constraints {
    /// Refuses what a group cannot keep.
    pub(crate) fn check(&self, of: &Register) -> Result<(), OutOfRange> {
        let refused =
            |name, value: String, expected: String| Err(OutOfRange { name, value, expected });
        let all = self.draining.iter().chain(self.speeds.iter().map(|of| &of.rank));
        let mut all = all.chain(self.pins.iter().map(|pin| &pin.rank));
        if let Some(rank) = all.find(|rank| **rank >= of.ranks) {
            return refused("rank", rank.to_string(), format!("0 to {}", of.ranks - 1));
        }
        if (0..of.ranks).all(|rank| self.draining.contains(&rank)) {
            return refused("draining", "every rank".to_owned(), "a rank that is left".to_owned());
        }
        if let Some(of) = self.speeds.iter().find(|of| !(0.01..=100.0).contains(&of.speed)) {
            return refused("speed", of.speed.to_string(), "0.01 to 100".to_owned());
        }
        if self.pins.len() > PINS_MAX {
            return refused("pins", self.pins.len().to_string(), format!("at most {PINS_MAX}"));
        }
        for pin in &self.pins {
            let layers =
                || of.model.layers.iter().filter(|l| pin.layer.is_none_or(|own| own == l.number));
            if layers().next().is_none() {
                let value = pin.layer.unwrap_or_default().to_string();
                return refused("layer", value, "one that is served".to_owned());
            }
            let experts = layers().map(|layer| layer.experts).min().unwrap_or(0);
            if pin.expert >= experts {
                return refused("expert", pin.expert.to_string(), format!("0 to {}", experts - 1));
            }
            let meets = |other: &&Pinned| {
                let layers =
                    pin.layer.is_none() || other.layer.is_none() || pin.layer == other.layer;
                layers && (pin.expert, pin.rank) == (other.expert, other.rank)
            };
            if self.pins.iter().filter(meets).any(|other| other.kind != pin.kind) {
                let value = format!("expert {} on rank {}, must and never", pin.expert, pin.rank);
                return refused("pins", value, "one of them".to_owned());
            }
            if pin.kind == Kind::Must && self.draining.contains(&pin.rank) {
                let value = format!("expert {} must be on rank {}", pin.expert, pin.rank);
                return refused("pins", value, "none on a rank that is to leave".to_owned());
            }
        }
        Ok(())
    }

    /// A rank that is not lost as policies are told of it.
    pub(crate) fn rank(&self, number: u32, node: u32) -> Rank {
        let speed = self.speeds.iter().find(|of| of.rank == number).map_or(1.0, |of| of.speed);
        let drains = self.draining.contains(&number);
        let state = if drains { RankState::Draining } else { RankState::Active };
        Rank { node, speed, free_bytes: 0, state }
    }

    /// Pins as policies are told of them.
    pub(crate) fn pins(&self) -> Vec<Pin> {
        let pin = |&Pinned { layer, expert, rank, kind }: &Pinned| {
            let kind = match kind {
                Kind::Must => PinKind::Must,
                Kind::Never => PinKind::Never,
            };
            Pin { layer, expert, rank, kind }
        };
        self.pins.iter().map(pin).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::register;

    fn pin(layer: Option<u32>, expert: u32, rank: u32, kind: Kind) -> Pinned {
        Pinned { layer, expert, rank, kind }
    }

    #[test]
    fn what_a_group_cannot_keep_is_refused() {
        let of = register(0, 1);
        let pins = |pins: &[Pinned]| Constraints { pins: pins.to_vec(), ..Constraints::default() };
        let drain = |draining: &[u32]| Constraints {
            draining: draining.to_vec(),
            ..Constraints::default()
        };
        let speed = |rank, speed| Constraints {
            speeds: vec![Speed { rank, speed }],
            ..Constraints::default()
        };
        use Kind::{Must, Never};
        for good in [
            drain(&[1]),
            speed(0, 0.5),
            pins(&[pin(None, 31, 1, Must), pin(Some(0), 31, 0, Never), pin(None, 3, 1, Never)]),
        ] {
            assert_eq!(good.check(&of), Ok(()), "{good:?}");
        }
        for (wrong, name, value) in [
            (drain(&[2]), "rank", "2"),
            (drain(&[0, 1]), "draining", "every rank"),
            (speed(0, 0.0), "speed", "0"),
            (speed(0, f32::NAN), "speed", "NaN"),
            (pins(&[pin(None, 32, 0, Must)]), "expert", "32"),
            (pins(&[pin(Some(9), 0, 0, Must)]), "layer", "9"),
            (
                pins(&[pin(None, 1, 0, Must), pin(Some(0), 1, 0, Never)]),
                "pins",
                "expert 1 on rank 0, must and never",
            ),
            (
                Constraints { pins: vec![pin(None, 1, 1, Must)], ..drain(&[1]) },
                "pins",
                "expert 1 must be on rank 1",
            ),
            (pins(&[pin(None, 1, 0, Must); 4_097]), "pins", "4097"),
        ] {
            let refused = wrong.check(&of).unwrap_err();
            assert_eq!((refused.name, &refused.value[..]), (name, value));
        }
    }

    #[test]
    fn policies_are_told() {
        let constraints = Constraints {
            draining: vec![1],
            speeds: vec![Speed { rank: 0, speed: 0.5 }],
            pins: vec![pin(Some(3), 5, 0, Kind::Never)],
        };
        let told: Vec<_> = (0..3).map(|rank| constraints.rank(rank, 7)).collect();
        let facts: Vec<_> = told.iter().map(|rank| (rank.speed, rank.state, rank.node)).collect();
        let (active, draining) = (RankState::Active, RankState::Draining);
        assert_eq!(facts, [(0.5, active, 7), (1.0, draining, 7), (1.0, active, 7)]);
        let kind = PinKind::Never;
        assert_eq!(constraints.pins(), [Pin { layer: Some(3), expert: 5, rank: 0, kind }]);
    }
}
