//! A case folder of the form of `tests/data/moe-golden`: a checkpoint, inputs for its first MoE
//! layer, and expected outputs. Finds cases under a folder and refuses malformed ones by name.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use reference::layer::{Inputs, Variant};
use reference::tensors::TensorFile;

/// Deepest nesting of case folders that is searched.
const DEPTH_MAX: usize = 4;

/// The file that makes a folder a case.
const IO: &str = "io.safetensors";

/// One case.
#[derive(Debug)]
pub struct Case {
    /// Its folder, which is the checkpoint's.
    pub dir: PathBuf,
    /// What the engine brings.
    pub inputs: Inputs,
    io: TensorFile,
}

impl Case {
    /// Reads the case in `dir`; the checkpoint is not looked at.
    pub fn open(dir: &Path) -> Result<Self> {
        let io = TensorFile::open(&dir.join(IO))?;
        let extents = |name: &str| -> Result<(usize, usize)> {
            let shape = io.shape(name)?;
            ensure!(shape.len() == 2, "{name} has shape {shape:?}, expected two extents");
            Ok((shape[0], shape[1]))
        };
        let (tokens, hidden) = extents("hidden_states")?;
        let (rows, top_k) = extents("topk_ids")?;
        ensure!(rows == tokens, "topk_ids has {rows} rows, hidden_states {tokens}");
        ensure!(extents("topk_weights")? == (rows, top_k), "topk_weights differs from topk_ids");
        let inputs = Inputs {
            hidden,
            top_k,
            x: io.bf16("hidden_states")?,
            ids: io.i32("topk_ids")?,
            weights: io.f32("topk_weights")?,
        };
        Ok(Self { dir: dir.to_owned(), inputs, io })
    }

    /// The expected output for `variant`, as bf16 bits.
    pub fn expected(&self, variant: Variant) -> Result<Vec<u16>> {
        let name = format!("out.act_{}.weights_in_{}", variant.act(), variant.weights_in());
        let bits = self.io.bf16(&name)?;
        let (got, want) = (bits.len(), self.inputs.x.len());
        ensure!(got == want, "{name} has {got} elements, expected {want}");
        Ok(bits)
    }

    /// The recorded bytes of the quantised tokens, codes and block scales, if the case has them.
    pub fn quantised(&self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        if !self.io.entries().contains_key("x_packed") {
            return Ok(None);
        }
        let scales = self.io.bytes("x_scale", &["U8", "F8_E4M3"])?;
        Ok(Some((self.io.bytes("x_packed", &["U8"])?, scales)))
    }
}

/// The name of a case's folder.
#[must_use]
pub fn name(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Every case folder under `dir`, or `dir` itself, in order of path. A folder without folders counts
/// as a case even if it lacks the files of one, so that a case with a missing file is refused by
/// [`Case::open`] and never passed over.
pub fn find(dir: &Path) -> Result<Vec<PathBuf>> {
    ensure!(dir.is_dir(), "{} is not a folder", dir.display());
    let mut found = Vec::new();
    search(dir, DEPTH_MAX, &mut found)?;
    let none = found == [dir] && !dir.join(IO).exists();
    ensure!(!none, "{} has no cases: no folder with {IO}", dir.display());
    Ok(found)
}

fn search(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let mut folders = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() && !name(&path).starts_with('.') {
            folders.push(path);
        }
    }
    folders.sort();
    if folders.is_empty() || depth == 0 || dir.join(IO).exists() {
        found.push(dir.to_owned());
        return Ok(());
    }
    folders.iter().try_for_each(|folder| search(folder, depth - 1, found))
}
