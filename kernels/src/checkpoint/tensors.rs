//! The tensors of a checkpoint's files by name: headers checked, index honoured, types and shapes
//! compared with what the caller expects. Knows nothing of experts.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::{Bound, Range};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::CheckpointError;
use super::mapped::MappedFile;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes of the length that begins a safetensors file.
const LENGTH_BYTES: usize = 8;

/// Part of a mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Extent {
    pub(super) file: u32,
    pub(super) start: usize,
    pub(super) len: usize,
}

impl Extent {
    /// The part `len` bytes long that begins `start` bytes into this one.
    pub(super) fn part(self, start: usize, len: usize) -> Self {
        debug_assert!(start + len <= self.len, "{start} + {len} exceeds {self:?}");
        Self { file: self.file, start: self.start + start, len }
    }
}

/// The mapped files, which outlive the table of names.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
    files: Vec<MappedFile>,
}

impl Files {
    pub(super) fn bytes(&self, extent: Extent) -> &[u8] {
        &self.files[extent.file as usize].bytes()[extent.start..extent.start + extent.len]
    }

    pub(super) fn name(&self, extent: Extent) -> &str {
        &self.files[extent.file as usize].name
    }

    /// Gives the pages of one file's `range` back.
    pub(super) fn release(&self, file: u32, range: Range<usize>) -> Result<(), CheckpointError> {
        let file = &self.files[file as usize];
        file.release(range).map_err(|source| self.io("release pages of", file, source))
    }

    /// Gives every resident page back.
    pub(super) fn release_all(&self) -> Result<(), CheckpointError> {
        for (number, file) in (0..).zip(&self.files) {
            self.release(number, 0..file.bytes().len())?;
        }
        Ok(())
    }

    /// Has the system read ahead of what is looked at, or not.
    pub(super) fn read_ahead(&self, ahead: bool) -> Result<(), CheckpointError> {
        self.files.iter().try_for_each(|file| {
            file.read_ahead(ahead).map_err(|source| self.io("advise on", file, source))
        })
    }

    fn io(&self, action: &'static str, file: &MappedFile, source: io::Error) -> CheckpointError {
        CheckpointError::Io { action, path: self.folder.join(&file.name), source }
    }
}

/// What the header says of one tensor.
#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    extent: Extent,
}

/// Every tensor by name.
#[derive(Debug)]
pub(super) struct Tensors {
    pub(super) files: Files,
    entries: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Tensors {
    /// Maps the single file or the files of the index, and checks their headers.
    pub(super) fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let index: Option<Index> = read_json(&folder.join(INDEX))?;
        let names = match &index {
            Some(index) => shard_names(index)?,
            None if folder.join(SINGLE).exists() => vec![SINGLE.to_owned()],
            None => return Err(CheckpointError::NoWeights { path: folder.to_owned() }),
        };
        let absent: Vec<String> =
            names.iter().filter(|name| !folder.join(name).exists()).cloned().collect();
        if !absent.is_empty() {
            return Err(CheckpointError::MissingShards {
                files: absent,
                folder: folder.to_owned(),
            });
        }
        let mut entries = BTreeMap::new();
        let mut files = Vec::with_capacity(names.len());
        for (number, name) in (0..).zip(&names) {
            let file = MappedFile::open(folder, name).map_err(|source| CheckpointError::Io {
                action: "map",
                path: folder.join(name),
                source,
            })?;
            for (tensor, entry) in read_header(&file, number)? {
                // Shards may hold stale copies: the index decides, tensor by tensor.
                let elsewhere = |index: &Index| index.weight_map.get(&tensor) != Some(name);
                if !index.as_ref().is_some_and(elsewhere) {
                    entries.insert(tensor, entry);
                }
            }
            files.push(file);
        }
        if let Some(Index { weight_map }) = index {
            let lost = weight_map.into_iter().find(|(tensor, _)| !entries.contains_key(tensor));
            if let Some((tensor, file)) = lost {
                return Err(CheckpointError::IndexMismatch { tensor, file });
            }
        }
        Ok(Self { files: Files { folder: folder.to_owned(), files }, entries })
    }

    /// Every name, ascending.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(super) fn contains(&self, tensor: &str) -> bool {
        self.entries.contains_key(tensor)
    }

    /// The one type of all weight matrices whose names begin with `prefix`; none where they differ.
    pub(super) fn weights_dtype(&self, prefix: &str) -> Option<Dtype> {
        let is_weight = |name: &str| {
            // Stacked experts may be the projection's name alone.
            let last = name.rsplit('.').next().unwrap_or(name);
            last == "weight" || last == "weight_packed" || last.ends_with("_proj")
        };
        let from = (Bound::Included(prefix), Bound::Unbounded);
        let below = self.entries.range::<str, _>(from);
        let below = below.take_while(|(name, _)| name.starts_with(prefix));
        let mut dtypes = below.filter(|(name, _)| is_weight(name)).map(|(_, entry)| entry.dtype);
        let first = dtypes.next()?;
        dtypes.all(|dtype| dtype == first).then_some(first)
    }

    /// Refuses a tensor that is there.
    pub(super) fn unserved(&self, tensor: &str, reason: &'static str) -> CheckpointError {
        let (file, tensor) = (self.file_of(tensor), tensor.to_owned());
        CheckpointError::Unserved { file, tensor, reason }
    }

    /// The file of a tensor, for messages.
    pub(super) fn file_of(&self, tensor: &str) -> String {
        let extent = self.entries.get(tensor).map(|entry| entry.extent);
        extent.map_or_else(String::new, |extent| self.files.name(extent).to_owned())
    }

    /// The bytes of a tensor that must have this type and shape.
    pub(super) fn matrix(
        &self,
        tensor: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<Extent, CheckpointError> {
        let expected = || format!("{shape:?}");
        let entry = self.typed(tensor, dtype, &expected)?;
        if entry.shape != shape {
            return Err(self.wrong_shape(tensor, entry, expected()));
        }
        Ok(entry.extent)
    }

    /// The values of a small fp32 tensor that has one of `shapes`, but for dimensions of size 1.
    pub(super) fn scalars(
        &self,
        tensor: &str,
        shapes: &[Vec<usize>],
    ) -> Result<Vec<f32>, CheckpointError> {
        let squeezed = |shape: &[usize]| -> Vec<usize> {
            shape.iter().copied().filter(|&size| size != 1).collect()
        };
        let mut accepted: Vec<_> = shapes.iter().map(|shape| squeezed(shape)).collect();
        accepted.dedup();
        let expected =
            || accepted.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" or ");
        let entry = self.typed(tensor, Dtype::F32, &expected)?;
        if !accepted.contains(&squeezed(&entry.shape)) {
            return Err(self.wrong_shape(tensor, entry, expected()));
        }
        let bytes = self.files.bytes(entry.extent);
        Ok(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }

    fn typed(
        &self,
        tensor: &str,
        dtype: Dtype,
        expected: &dyn Fn() -> String,
    ) -> Result<&Entry, CheckpointError> {
        let Some(entry) = self.entries.get(tensor) else {
            return Err(CheckpointError::MissingTensor {
                tensor: tensor.to_owned(),
                expected: format!("{dtype:?} {}", expected()),
            });
        };
        if entry.dtype != dtype {
            return Err(CheckpointError::Dtype {
                file: self.file_of(tensor),
                tensor: tensor.to_owned(),
                dtype: entry.dtype,
                expected: dtype,
            });
        }
        Ok(entry)
    }

    fn wrong_shape(&self, tensor: &str, entry: &Entry, expected: String) -> CheckpointError {
        CheckpointError::TensorShape {
            file: self.file_of(tensor),
            tensor: tensor.to_owned(),
            shape: entry.shape.clone(),
            expected,
        }
    }
}

/// Reads a JSON file; `None` where there is no such file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, CheckpointError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(CheckpointError::Io { action: "read", path: path.to_owned(), source });
        }
    };
    let json = |source| CheckpointError::Json { path: path.to_owned(), source };
    serde_json::from_slice(&text).map(Some).map_err(json)
}

/// The files of an index, each once, ascending.
fn shard_names(index: &Index) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for (tensor, file) in &index.weight_map {
        if Path::new(file).file_name() != Some(file.as_ref()) {
            let (tensor, file) = (tensor.clone(), file.clone());
            return Err(CheckpointError::ShardName { tensor, file });
        }
        names.push(file.clone());
    }
    names.sort();
    names.dedup();
    Ok(names)
}

fn read_header(file: &MappedFile, number: u32) -> Result<Vec<(String, Entry)>, CheckpointError> {
    let bytes = file.bytes();
    let header = SafeTensors::read_metadata(bytes);
    let (length, metadata) = header.map_err(|source| CheckpointError::Header {
        file: file.name.clone(),
        bytes: bytes.len(),
        source,
    })?;
    let data = LENGTH_BYTES + length;
    let named = metadata.offset_keys().into_iter().filter_map(|name| {
        let info = metadata.info(&name)?;
        let (start, end) = info.data_offsets;
        let extent = Extent { file: number, start: data + start, len: end - start };
        Some((name, Entry { dtype: info.dtype, shape: info.shape.clone(), extent }))
    });
    Ok(named.collect())
}
