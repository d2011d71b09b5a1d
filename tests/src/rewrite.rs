//! Checkpoints made from others: a golden case under other names, in shards, or broken.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::case;

/// One tensor.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
    /// Bytes.
    pub bytes: Vec<u8>,
}

/// A checkpoint in memory, to be changed and written.
#[derive(Debug, Clone)]
pub struct Rewrite {
    source: PathBuf,
    /// `config.json`.
    pub config: Value,
    /// The tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Rewrite {
    /// Reads the case in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let bytes = fs::read(dir.join("model.safetensors"))?;
        let file = SafeTensors::deserialize(&bytes)?;
        let tensors = file.iter().map(|(name, view)| {
            let (dtype, shape) = (view.dtype(), view.shape().to_vec());
            (name.to_owned(), Tensor { dtype, shape, bytes: view.data().to_vec() })
        });
        let config = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
        Ok(Self { source: dir.to_owned(), config, tensors: tensors.collect() })
    }

    /// Gives every tensor another name.
    #[must_use]
    pub fn renamed(mut self, rename: impl Fn(&str) -> String) -> Self {
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors = tensors.into_iter().map(|(name, t)| (rename(&name), t)).collect();
        self
    }

    /// The file that holds the tensors for which `keep` holds.
    pub fn file(&self, keep: impl Fn(&str) -> bool) -> Result<Vec<u8>> {
        let views = self.tensors.iter().filter(|(name, _)| keep(name)).map(|(name, tensor)| {
            let Tensor { dtype, shape, bytes } = tensor;
            Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        Ok(safetensors::serialize(views, None)?)
    }

    /// Writes a case folder of one weight file.
    pub fn write(&self) -> Result<TempDir> {
        let folder = self.write_rest()?;
        fs::write(folder.path().join("model.safetensors"), self.file(|_| true)?)?;
        Ok(folder)
    }

    /// Writes a case folder of shards, with an index; `shard` says where each tensor belongs, and
    /// `also` in which other files a copy of changed bytes lies.
    pub fn write_shards(
        &self,
        shard: impl Fn(&str) -> &'static str,
        also: impl Fn(&str) -> bool,
    ) -> Result<TempDir> {
        let folder = self.write_rest()?;
        let map: BTreeMap<&str, &str> =
            self.tensors.keys().map(|name| (name.as_str(), shard(name))).collect();
        let mut files: Vec<&str> = map.values().copied().collect();
        files.sort_unstable();
        files.dedup();
        for file in files {
            let mut here = self.clone();
            for (name, tensor) in &mut here.tensors {
                if shard(name) != file {
                    tensor.bytes.iter_mut().for_each(|byte| *byte ^= 0x11);
                }
            }
            let bytes = here.file(|name| shard(name) == file || also(name))?;
            fs::write(folder.path().join(file), bytes)?;
        }
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(folder.path().join("model.safetensors.index.json"), index)?;
        Ok(folder)
    }

    /// Everything but the weights.
    fn write_rest(&self) -> Result<TempDir> {
        let folder = TempDir::new()?;
        for file in ["hf_quant_config.json", "io.safetensors"] {
            let from = self.source.join(file);
            fs::copy(&from, folder.path().join(file)).with_context(|| case::name(&from))?;
        }
        fs::write(folder.path().join("config.json"), self.config.to_string())?;
        Ok(folder)
    }
}
