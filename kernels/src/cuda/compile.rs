//! From source to machine code: NVRTC, and a folder of what it compiled before.
//!
//! An entry is found by a hash of source, options and compiler version, and begins with a hash of its
//! contents: a cut or damaged one is compiled again. It is written beside its name and renamed.
#![expect(unsafe_code, reason = "calls a C library")]

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use super::CudaError;

/// Bytes of a hash.
const HASH: usize = 32;

/// The machine code of a program, from `folder` or from NVRTC.
pub(super) fn cubin(source: &str, options: &[String], folder: &Path) -> Result<Vec<u8>, CudaError> {
    let key = key(source, options, version()?);
    let path = folder.join(format!("{key}.cubin"));
    if let Some(cubin) = fs::read(&path).ok().and_then(checked) {
        return Ok(cubin);
    }
    let (cubin, _) = compile(source, options)?;
    let cache = |source: io::Error| CudaError::Cache { path: path.clone(), source };
    fs::create_dir_all(folder).map_err(cache)?;
    let beside = folder.join(format!("{key}.{}", std::process::id()));
    fs::write(&beside, [&Sha256::digest(&cubin)[..], &cubin].concat()).map_err(cache)?;
    fs::rename(&beside, &path).map_err(cache)?;
    Ok(cubin)
}

/// A kernel as the compiler made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers that are written to memory for want of room.
    pub spill_bytes: u32,
    /// Whether its products wait for one another, because the assembler does not see that they need not.
    pub serialised: bool,
}

/// Compiles a program, whatever is cached, and reports its kernels.
pub(super) fn report(source: &str, options: &[String]) -> Result<Vec<Compiled>, CudaError> {
    let verbose = [options, &["--ptxas-options=-v".to_owned()]].concat();
    Ok(kernels_of(&compile(source, &verbose)?.1))
}

/// Reads what the assembler says of each kernel: its name, spills, registers, in this order.
fn kernels_of(log: &str) -> Vec<Compiled> {
    let number = |text: &str| {
        let digits = |c: &char| c.is_ascii_digit();
        text.trim().chars().take_while(digits).collect::<String>().parse::<u32>().ok()
    };
    let mut all: Vec<Compiled> = Vec::new();
    let mut serialised = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("instructions are serialized") {
            serialised.extend(rest.split('\'').nth(1));
        }
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            all.push(Compiled { kernel, registers: 0, spill_bytes: 0, serialised: false });
        }
        let Some(last) = all.last_mut() else { continue };
        if let Some((_, rest)) = line.split_once("bytes stack frame,") {
            let spilled = rest.split(',').filter(|part| part.contains("spill")).filter_map(number);
            last.spill_bytes = spilled.sum();
        }
        if let Some((_, rest)) = line.split_once("Used ") {
            last.registers = number(rest).unwrap_or(0);
        }
    }
    for compiled in &mut all {
        compiled.serialised = serialised.contains(&&*compiled.kernel);
    }
    all
}

/// The usual folder of compiled programs.
#[must_use]
pub fn default_cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    cache.unwrap_or_else(std::env::temp_dir).join("moeplane/cubin")
}

pub(super) fn key(source: &str, options: &[String], version: (i32, i32)) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{version:?} {options:?}\n"));
    hash.update(source);
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The contents of an entry, if they are whole.
fn checked(entry: Vec<u8>) -> Option<Vec<u8>> {
    let (hash, cubin) = entry.split_at_checked(HASH)?;
    (Sha256::digest(cubin)[..] == *hash).then(|| cubin.to_vec())
}

pub(super) fn version() -> Result<(i32, i32), CudaError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two valid places for an int each; the library was found to be there.
    let code = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    code.result().map_err(|error| CudaError::Nvrtc { call: "nvrtcVersion", error })?;
    Ok((major, minor))
}

/// Machine code, and what the compiler said.
fn compile(source: &str, options: &[String]) -> Result<(Vec<u8>, String), CudaError> {
    let failed = |call: &'static str| move |error| CudaError::Nvrtc { call, error };
    // Our own text has no zero byte.
    let source = CString::new(source).unwrap_or_default();
    let program = result::create_program(&source, Some(c"moe.cu"));
    let program = Program(program.map_err(failed("nvrtcCreateProgram"))?);
    // SAFETY: the program is alive.
    let compiled = unsafe { result::compile_program(program.0, options) };
    if let Err(error) = compiled {
        let log = program.log().unwrap_or_default();
        return Err(CudaError::Compile { error, log });
    }
    let mut bytes = 0;
    // SAFETY: the program is alive and compiled, and `bytes` a valid place.
    let code = unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut bytes) };
    code.result().map_err(failed("nvrtcGetCUBINSize"))?;
    let mut cubin = vec![0_u8; bytes];
    // SAFETY: `cubin` holds as many bytes as the library asked for.
    let code = unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast::<c_char>()) };
    code.result().map_err(failed("nvrtcGetCUBIN"))?;
    Ok((cubin, program.log().unwrap_or_default()))
}

/// A program inside NVRTC.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> Option<String> {
        // SAFETY: the program is alive.
        let log = unsafe { result::get_program_log(self.0) }.ok()?;
        let bytes: Vec<u8> = log.into_iter().map(|byte| byte as u8).collect();
        let text = CStr::from_bytes_until_nul(&bytes).ok()?;
        Some(text.to_string_lossy().trim_end().to_owned())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `create_program` and destroyed once.
        let destroyed = unsafe { result::destroy_program(self.0) };
        debug_assert!(destroyed.is_ok(), "{destroyed:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_or_changed_entry_is_no_entry() {
        let cubin = b"machine code".to_vec();
        let entry = [&Sha256::digest(&cubin)[..], &cubin].concat();
        assert_eq!(checked(entry.clone()), Some(cubin));
        let mut changed = entry.clone();
        changed[40] ^= 1;
        for bad in [changed, entry[..entry.len() - 1].to_vec(), entry[..7].to_vec(), vec![]] {
            assert_eq!(checked(bad), None);
        }
    }

    #[test]
    fn registers_and_spills_are_read() {
        let log = "\
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'quantise'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fused_moe' for 'sm_90a'
ptxas info    : Function properties for fused_moe
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function 'quantise' for 'sm_90a'
ptxas info    : Function properties for quantise
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
";
        let compiled = |kernel: &str, registers, spill_bytes| Compiled {
            kernel: kernel.to_owned(),
            registers,
            spill_bytes,
            serialised: kernel == "quantise",
        };
        assert_eq!(kernels_of(log), [compiled("fused_moe", 96, 16), compiled("quantise", 24, 0)]);
    }

    #[test]
    fn whatever_changes_the_code_changes_the_key() {
        let key_of =
            |source: &str, option: &str, version| key(source, &[option.to_owned()], version);
        let one = key_of("a", "-x", (13, 0));
        assert_eq!(one, key_of("a", "-x", (13, 0)));
        for other in [key_of("b", "-x", (13, 0)), key_of("a", "-y", (13, 0))] {
            assert_ne!(one, other);
        }
        assert_ne!(one, key_of("a", "-x", (13, 1)));
    }
}
