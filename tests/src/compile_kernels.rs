//! `compile-kernels`: compiles the device code for Hopper, which needs NVRTC and no GPU.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use kernels::cuda::{CudaOptions, compile_report};

/// Compiles both variants; false if a kernel spills registers into memory.
pub(crate) fn run() -> Result<bool> {
    let mut out = io::stdout();
    let mut holds = true;
    writeln!(out, "{:<28} {:>9} {:>11}", "kernel", "registers", "spill bytes")?;
    for every_lane_arrives in [false, true] {
        let options = CudaOptions { gpu: 0, cache: PathBuf::new(), every_lane_arrives };
        let kernels = compile_report(&options)?;
        ensure!(!kernels.is_empty(), "the compiler reports no kernel");
        for kernel in kernels {
            let name = match every_lane_arrives {
                true => format!("{} (for tools)", kernel.kernel),
                false => kernel.kernel,
            };
            writeln!(out, "{name:<28} {:>9} {:>11}", kernel.registers, kernel.spill_bytes)?;
            // What tools look at may be slow.
            holds &= every_lane_arrives || kernel.spill_bytes == 0;
        }
    }
    Ok(holds)
}
