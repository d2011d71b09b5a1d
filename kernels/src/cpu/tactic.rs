//! Tactics of the CPU device: how its products are run, as a plain value with a name. Every tactic
//! sums in the same order, so all give the same bits; they differ in speed alone.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::product::TOKEN_TILE_MAX;
use crate::numeric::BLOCK;
use crate::problem::LayerShape;

/// Instructions that the products use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    /// None beyond Rust's own: for processors without the others, and to test them against.
    Scalar,
    /// AVX2 and FMA: 8 lanes.
    Avx2,
    /// AVX-512F: 16 lanes.
    Avx512,
}

impl Isa {
    /// All, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Whether this processor has it.
    #[must_use]
    pub fn available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The fastest that this processor has.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Self::Scalar)
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that names no instruction set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no instruction set of the cpu device, expected scalar, avx2 or avx512")]
pub struct UnknownIsa(String);

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        let found = Self::ALL.into_iter().find(|known| known.name() == name);
        found.ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}

/// A configuration of the products, written `avx512-t12-p256`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CpuTactic {
    /// Instructions.
    pub isa: Isa,
    /// Most tokens whose sums are kept in registers at a time.
    pub token_tile: u32,
    /// Columns of weights that are decoded to scratch before they meet all tokens of an expert; 0
    /// decodes in registers, anew for each tile of tokens.
    pub panel: u32,
}

/// Why a tactic cannot run a problem here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// The processor lacks the instructions.
    #[error("this processor lacks {isa}")]
    Isa {
        /// What it lacks.
        isa: &'static str,
    },
    /// No kernel of this size was built.
    #[error("the token tile is {token_tile}, expected 1 to {TOKEN_TILE_MAX}")]
    TokenTile {
        /// The size.
        token_tile: u32,
    },
    /// A panel that does not end where a block of weights does.
    #[error("the panel is {panel} columns, expected a multiple of {BLOCK}")]
    Panel {
        /// Its columns.
        panel: u32,
    },
    /// A panel that no matrix of the layer fills.
    #[error("the panel is {panel} columns, the layer's widest matrix has {cols}")]
    PanelTooWide {
        /// Its columns.
        panel: u32,
        /// Columns there are.
        cols: u32,
    },
}

/// Columns of a panel: 32 rows of them in fp32 are 32 KiB, which leaves a third of a 48 KiB first
/// level cache to the activations.
const PANEL: u32 = 256;

impl CpuTactic {
    /// Whether it can run `layer` on this processor.
    ///
    /// # Errors
    /// [`Why`] not.
    pub fn legal(&self, layer: &LayerShape) -> Result<(), Why> {
        let Self { isa, token_tile, panel } = *self;
        if !isa.available() {
            return Err(Why::Isa { isa: isa.name() });
        }
        if token_tile == 0 || token_tile > TOKEN_TILE_MAX as u32 {
            return Err(Why::TokenTile { token_tile });
        }
        if !panel.is_multiple_of(BLOCK as u32) {
            return Err(Why::Panel { panel });
        }
        let cols = layer.hidden.max(layer.intermediate);
        if panel > cols {
            return Err(Why::PanelTooWide { panel, cols });
        }
        Ok(())
    }

    /// Those that are worth a measurement with these instructions, whatever the layer.
    #[must_use]
    pub fn candidates(isa: Isa) -> Vec<Self> {
        let tiles: &[u32] = match isa {
            Isa::Avx512 => &[4, 8, TOKEN_TILE_MAX as u32],
            Isa::Avx2 => &[2, 4],
            Isa::Scalar => &[2, 4],
        };
        let of_tile = |&token_tile: &u32| [0, PANEL].map(|panel| Self { isa, token_tile, panel });
        tiles.iter().flat_map(of_tile).collect()
    }

    /// A good tactic for an expert that has `rows` tokens.
    #[must_use]
    pub fn heuristic(isa: Isa, rows: usize) -> Self {
        // As many sums as registers hold: 12 tokens x 2 blocks of 16 lanes of 32 AVX-512 registers,
        // 2 x 2 x 16 lanes of the 16 that AVX2 has.
        let token_tile = match isa {
            Isa::Avx512 => TOKEN_TILE_MAX as u32,
            Isa::Avx2 => 2,
            Isa::Scalar => 4,
        };
        let panel = if rows > token_tile as usize { PANEL } else { 0 };
        Self { isa, token_tile, panel }
    }
}

impl fmt::Display for CpuTactic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-t{}-p{}", self.isa.name(), self.token_tile, self.panel)
    }
}

/// A word that names no tactic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no tactic of the cpu device, expected a name like avx512-t12-p256")]
pub struct UnknownTactic(String);

impl FromStr for CpuTactic {
    type Err = UnknownTactic;

    fn from_str(name: &str) -> Result<Self, UnknownTactic> {
        let parse = || {
            let (isa, sizes) = name.split_once("-t")?;
            let (token_tile, panel) = sizes.split_once("-p")?;
            let (token_tile, panel) = (token_tile.parse().ok()?, panel.parse().ok()?);
            let tactic = Self { isa: isa.parse().ok()?, token_tile, panel };
            // Numbers have other spellings (+1, 01); a tactic has one name.
            (tactic.to_string() == name).then_some(tactic)
        };
        parse().ok_or_else(|| UnknownTactic(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Swiglu;

    const LAYER: LayerShape = LayerShape {
        experts: 4,
        top_k: 2,
        hidden: 64,
        intermediate: 128,
        swiglu: Swiglu { limit: None, alpha: 1.0, beta: 0.0 },
    };

    #[test]
    fn a_name_survives_a_round_trip() {
        for isa in Isa::ALL {
            for (token_tile, panel) in [(1, 0), (12, 256)] {
                let tactic = CpuTactic { isa, token_tile, panel };
                assert_eq!(tactic.to_string().parse(), Ok(tactic));
            }
        }
        for name in ["", "avx512", "avx512-t12", "avx512-t+1-p0", "sse-t1-p0", "avx2-t1-p0 "] {
            assert_eq!(name.parse::<CpuTactic>(), Err(UnknownTactic(name.to_owned())));
        }
    }

    #[test]
    fn an_illegal_tactic_says_why() {
        let legal =
            |token_tile, panel| CpuTactic { isa: Isa::Scalar, token_tile, panel }.legal(&LAYER);
        assert_eq!(legal(12, 128), Ok(()));
        assert_eq!(legal(0, 0), Err(Why::TokenTile { token_tile: 0 }));
        assert_eq!(legal(13, 0), Err(Why::TokenTile { token_tile: 13 }));
        assert_eq!(legal(1, 24), Err(Why::Panel { panel: 24 }));
        assert_eq!(legal(1, 144), Err(Why::PanelTooWide { panel: 144, cols: 128 }));
    }

    #[test]
    fn the_heuristic_is_legal() {
        let wide = LayerShape { hidden: 2048, ..LAYER };
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for rows in [1, 5, 500] {
                assert_eq!(CpuTactic::heuristic(isa, rows).legal(&wide), Ok(()));
            }
            let candidates = CpuTactic::candidates(isa);
            assert!(candidates.iter().all(|tactic| tactic.legal(&wide).is_ok()), "{candidates:?}");
            let heuristics = [1, 500].map(|rows| CpuTactic::heuristic(isa, rows));
            assert!(heuristics.iter().all(|tactic| candidates.contains(tactic)), "{candidates:?}");
        }
    }
}
