//! `compile-kernels`: compiles the device code for Hopper, which needs NVRTC and no GPU.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use kernels::cuda::{CudaOptions, compile_report};

/// Compiles both variants; false if a kernel spills registers into memory, or its products wait for one
/// another.
pub(crate) fn run() -> Result<bool> {
    let mut out = io::stdout();
    let mut holds = true;
    let heads = ["kernel", "registers", "spill bytes", "products"];
    writeln!(out, "{:<28} {:>9} {:>11} {:>10}", heads[0], heads[1], heads[2], heads[3])?;
    for every_lane_arrives in [false, true] {
        let options = CudaOptions { every_lane_arrives, ..CudaOptions::new(0, PathBuf::new()) };
        let kernels = compile_report(&options)?;
        ensure!(!kernels.is_empty(), "the compiler reports no kernel");
        for kernel in kernels {
            let name = match every_lane_arrives {
                true => format!("{} (for tools)", kernel.kernel),
                false => kernel.kernel,
            };
            let (registers, spills) = (kernel.registers, kernel.spill_bytes);
            let products = if kernel.serialised { "serialised" } else { "" };
            writeln!(out, "{name:<28} {registers:>9} {spills:>11} {products:>10}")?;
            // What tools look at may be slow.
            holds &= every_lane_arrives || (spills == 0 && !kernel.serialised);
        }
    }
    Ok(holds)
}
