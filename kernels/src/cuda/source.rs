//! The device code, and what it is compiled with.

use super::CudaOptions;

/// The files in the order in which they are compiled, as one program without headers.
const FILES: [(&str, &str); 9] = [
    ("numeric.cuh", include_str!("../../cuda/numeric.cuh")),
    ("layout/params.cuh", include_str!("../../cuda/layout/params.cuh")),
    ("layout/unit.cuh", include_str!("../../cuda/layout/unit.cuh")),
    ("ptx/async.cuh", include_str!("../../cuda/ptx/async.cuh")),
    ("stage/quantise.cuh", include_str!("../../cuda/stage/quantise.cuh")),
    ("stage/route.cuh", include_str!("../../cuda/stage/route.cuh")),
    ("stage/combine.cuh", include_str!("../../cuda/stage/combine.cuh")),
    ("fused_moe.cu", include_str!("../../cuda/fused_moe.cu")),
    ("bench.cuh", include_str!("../../cuda/bench.cuh")),
];

/// Options of the compiler. Products and sums are not contracted: the numerics round each step.
pub(super) fn options(options: &CudaOptions) -> Vec<&'static str> {
    let mut all = vec!["--gpu-architecture=sm_90a", "--std=c++17", "--fmad=false"];
    if options.every_lane_arrives {
        all.push("--define-macro=EVERY_LANE_ARRIVES");
    }
    all
}

/// The whole program.
pub(super) fn program() -> String {
    let file = |(name, text): &(&str, &str)| format!("#line 1 \"{name}\"\n{text}");
    FILES.iter().map(file).collect()
}
