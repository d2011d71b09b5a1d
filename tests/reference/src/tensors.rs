//! Reading safetensors files, from the format's description alone. Does not validate what the daemons must refuse; that is `kernels::checkpoint`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Longest header that is read; real checkpoints with 100 000 tensors need about 15 MB.
const HEADER_BYTES_MAX: u64 = 100 << 20;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name of the element type as the file has it, for example `BF16`.
    pub dtype: String,
    /// Extents.
    pub shape: Vec<usize>,
    start: u64,
    bytes: usize,
}

/// An open safetensors file; tensors are read when asked for.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, Entry>,
}

impl TensorFile {
    /// Reads the header of `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read_header(path).with_context(|| format!("{} cannot be read", path.display()))
    }

    fn read_header(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).context("the file is shorter than 8 bytes")?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= HEADER_BYTES_MAX, "a header of {length} bytes");
        ensure!(length + 8 <= size, "a header of {length} bytes in a file of {size}");
        let mut header = vec![0; length as usize];
        file.read_exact_at(&mut header, 8)?;
        let header: BTreeMap<String, Value> =
            serde_json::from_slice(&header).context("the header is no JSON object")?;
        let mut entries = BTreeMap::new();
        for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let entry = parse_entry(&value, 8 + length, size)
                .with_context(|| format!("tensor {name} of the header"))?;
            entries.insert(name, entry);
        }
        Ok(Self { path: path.to_owned(), file, entries })
    }

    /// Every tensor by name.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The shape of `name`.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries
            .get(name)
            .with_context(|| format!("tensor {name} is missing in {}", self.path.display()))
    }

    /// The bytes of `name`, whose element type must be one of `dtypes`.
    pub fn bytes(&self, name: &str, dtypes: &[&str]) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        if !dtypes.contains(&entry.dtype.as_str()) {
            let (path, dtype) = (self.path.display(), &entry.dtype);
            bail!("tensor {name} of {path} is {dtype}, expected one of {dtypes:?}");
        }
        let mut bytes = vec![0; entry.bytes];
        self.file
            .read_exact_at(&mut bytes, entry.start)
            .with_context(|| format!("tensor {name} of {}", self.path.display()))?;
        Ok(bytes)
    }

    /// The bf16 bits of `name`.
    pub fn bf16(&self, name: &str) -> Result<Vec<u16>> {
        Ok(self.words(name, "BF16", u16::from_le_bytes)?.collect())
    }

    /// The fp32 values of `name`.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.words(name, "F32", f32::from_le_bytes)?.collect())
    }

    /// The i32 values of `name`.
    pub fn i32(&self, name: &str) -> Result<Vec<i32>> {
        Ok(self.words(name, "I32", i32::from_le_bytes)?.collect())
    }

    fn words<const N: usize, T>(
        &self,
        name: &str,
        dtype: &str,
        decode: fn([u8; N]) -> T,
    ) -> Result<impl Iterator<Item = T> + use<N, T>> {
        let bytes = self.bytes(name, &[dtype])?;
        Ok((0..bytes.len() / N).map(move |i| {
            let mut word = [0; N];
            word.copy_from_slice(&bytes[i * N..][..N]);
            decode(word)
        }))
    }
}

fn parse_entry(value: &Value, data: u64, size: u64) -> Result<Entry> {
    #[derive(serde::Deserialize)]
    struct Wire {
        dtype: String,
        shape: Vec<usize>,
        data_offsets: (u64, u64),
    }
    let Wire { dtype, shape, data_offsets: (begin, end) } = serde_json::from_value(value.clone())?;
    let fits = begin <= end && end.checked_add(data).is_some_and(|end| end <= size);
    ensure!(fits, "bytes {begin} to {end} of a file of {size}");
    let elements = shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
    let bytes = elements.and_then(|n| n.checked_mul(dtype_bytes(&dtype)?));
    let have = (end - begin) as usize;
    ensure!(bytes == Some(have), "{dtype} {shape:?} does not take {have} bytes");
    Ok(Entry { dtype, shape, start: data + begin, bytes: have })
}

fn dtype_bytes(dtype: &str) -> Option<usize> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => Some(1),
        "BF16" | "F16" | "I16" | "U16" => Some(2),
        "F32" | "I32" | "U32" => Some(4),
        "F64" | "I64" | "U64" => Some(8),
        _ => None,
    }
}
