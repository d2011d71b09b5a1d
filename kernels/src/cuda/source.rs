//! The device code, and what it is compiled with.

use super::{
    BLOCK_TILES, COUNTERS, CudaOptions, EXPERTS_MAX, FUSED_SHARED, FUSED_THREADS, NARROW_SHARED,
    NARROW_TILE, SMALL_PLACES, SORT_THREADS, SORTED_PLACES, TILED_THREADS, WIDE_SHARED, WIDE_TILE,
};

/// The files in the order in which they are compiled, as one program without headers.
const FILES: [(&str, &str); 13] = [
    ("numeric.cuh", include_str!("../../cuda/numeric.cuh")),
    ("layout/params.cuh", include_str!("../../cuda/layout/params.cuh")),
    ("layout/unit.cuh", include_str!("../../cuda/layout/unit.cuh")),
    ("ptx/async.cuh", include_str!("../../cuda/ptx/async.cuh")),
    ("ptx/wgmma.cuh", include_str!("../../cuda/ptx/wgmma.cuh")),
    ("stage/wait.cuh", include_str!("../../cuda/stage/wait.cuh")),
    ("stage/quantise.cuh", include_str!("../../cuda/stage/quantise.cuh")),
    ("stage/route.cuh", include_str!("../../cuda/stage/route.cuh")),
    ("stage/combine.cuh", include_str!("../../cuda/stage/combine.cuh")),
    ("stage/pool.cuh", include_str!("../../cuda/stage/pool.cuh")),
    ("fused_moe.cu", include_str!("../../cuda/fused_moe.cu")),
    ("tiled_moe.cu", include_str!("../../cuda/tiled_moe.cu")),
    ("bench.cuh", include_str!("../../cuda/bench.cuh")),
];

/// Options of the compiler. Products and sums are not contracted: the numerics round each step.
///
/// What the host takes for granted about the program goes along, and the program asserts it.
pub(super) fn options(options: &CudaOptions) -> Vec<String> {
    let mut all =
        ["--gpu-architecture=sm_90a", "--std=c++17", "--fmad=false"].map(str::to_owned).to_vec();
    if options.every_lane_arrives {
        all.push("--define-macro=EVERY_LANE_ARRIVES".to_owned());
    }
    if let Some(withheld) = options.withheld {
        all.push(format!("--define-macro=WITHHELD={}", withheld as u32));
    }
    let host = [
        ("HOST_THREADS", FUSED_THREADS as usize),
        ("HOST_SHARED", FUSED_SHARED as usize),
        ("HOST_BLOCK_TILES", BLOCK_TILES as usize),
        ("HOST_EXPERTS_MAX", EXPERTS_MAX as usize),
        ("HOST_SMALL_PLACES", SMALL_PLACES),
        ("HOST_COUNTERS", COUNTERS),
        ("HOST_TILED_THREADS", TILED_THREADS as usize),
        ("HOST_WIDE_TILE", WIDE_TILE),
        ("HOST_NARROW_TILE", NARROW_TILE),
        ("HOST_WIDE_SHARED", WIDE_SHARED as usize),
        ("HOST_NARROW_SHARED", NARROW_SHARED as usize),
        ("HOST_SORT_THREADS", SORT_THREADS),
        ("HOST_SORTED_PLACES", SORTED_PLACES),
    ];
    all.extend(host.map(|(name, value)| format!("--define-macro={name}={value}")));
    all
}

/// The whole program.
pub(super) fn program() -> String {
    let file = |(name, text): &(&str, &str)| format!("#line 1 \"{name}\"\n{text}");
    FILES.iter().map(file).collect()
}
