//! The device code, and what it is compiled with.

/// The files in the order in which they are compiled, as one program without headers.
const FILES: [(&str, &str); 8] = [
    ("numeric.cuh", include_str!("../../cuda/numeric.cuh")),
    ("layout/params.cuh", include_str!("../../cuda/layout/params.cuh")),
    ("layout/unit.cuh", include_str!("../../cuda/layout/unit.cuh")),
    ("mma/tile.cuh", include_str!("../../cuda/mma/tile.cuh")),
    ("stage/quantise.cuh", include_str!("../../cuda/stage/quantise.cuh")),
    ("stage/gate_up.cuh", include_str!("../../cuda/stage/gate_up.cuh")),
    ("stage/down.cuh", include_str!("../../cuda/stage/down.cuh")),
    ("stage/combine.cuh", include_str!("../../cuda/stage/combine.cuh")),
];

/// Options of the compiler. Products and sums are not contracted: the numerics round each step.
pub(super) const OPTIONS: [&str; 3] = ["--gpu-architecture=sm_90a", "--std=c++17", "--fmad=false"];

/// The whole program.
pub(super) fn program() -> String {
    let file = |(name, text): &(&str, &str)| format!("#line 1 \"{name}\"\n{text}");
    FILES.iter().map(file).collect()
}
