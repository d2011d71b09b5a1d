//! The buffer that engine and worker share: where tensors lie in it, and the engine's mapping.
//!
//! The worker may write the buffer at any time, so that no Rust reference to its bytes ever exists:
//! [`Buffer`] copies in and out through raw pointers, and any bytes are good bytes. Its size is
//! sealed by the worker, and checked here, so that a mapping cannot be cut short under it.
#![expect(unsafe_code, reason = "copies from and to memory that another process writes")]

use std::io;
use std::os::fd::OwnedFd;
use std::ptr;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use serde::{Deserialize, Serialize};

/// Most experts of a token: buffers have room for as many.
pub const TOP_K_MAX: u32 = 16;

/// Tensors begin at multiples of this: cache lines, and any vector's alignment.
const ALIGN: u64 = 64;

/// Where tensors lie in a buffer for calls of up to `max_tokens`, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BufferLayout {
    /// Most tokens of a call.
    pub max_tokens: u32,
    /// Width of the widest layer.
    pub hidden_max: u32,
    /// Hidden states, bf16 `[tokens, hidden]`.
    pub hidden: u64,
    /// Expert ids, i32 `[tokens, top_k]`.
    pub topk_ids: u64,
    /// Their weights, f32 `[tokens, top_k]`.
    pub topk_weights: u64,
    /// Output, bf16 `[tokens, hidden]`.
    pub output: u64,
    /// Size of the buffer.
    pub bytes: u64,
}

impl BufferLayout {
    /// Lays out a buffer for layers up to `hidden_max` wide.
    #[must_use]
    pub fn new(max_tokens: u32, hidden_max: u32) -> Self {
        let rows = u64::from(max_tokens) * u64::from(hidden_max) * 2;
        let places = u64::from(max_tokens) * u64::from(TOP_K_MAX) * 4;
        let mut end = 0;
        let mut tensor = |bytes: u64| {
            let offset = end;
            end = (offset + bytes).next_multiple_of(ALIGN);
            offset
        };
        let hidden = tensor(rows);
        let topk_ids = tensor(places);
        let topk_weights = tensor(places);
        let output = tensor(rows);
        let bytes = end.max(ALIGN);
        Self { max_tokens, hidden_max, hidden, topk_ids, topk_weights, output, bytes }
    }
}

/// An engine's mapping.
#[derive(Debug)]
pub struct Buffer {
    map: MmapRaw,
}

impl Buffer {
    /// Maps the descriptor that a worker handed over.
    ///
    /// # Errors
    /// When it is of another size, its size may change, or the system refuses.
    pub fn map(fd: &OwnedFd, bytes: u64) -> io::Result<Self> {
        let seals = SealFlags::SHRINK | SealFlags::GROW;
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        if !fcntl_get_seals(fd)?.contains(seals) {
            return Err(invalid("the buffer is not sealed against a change of size".to_owned()));
        }
        let size = fstat(fd)?.st_size;
        if u64::try_from(size) != Ok(bytes) {
            return Err(invalid(format!("the buffer has {size} bytes, expected {bytes}")));
        }
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok(Self { map: MmapOptions::new().len(length).map_raw(fd)? })
    }

    /// Copies `from` to `offset`.
    ///
    /// # Panics
    /// When the range leaves the buffer.
    pub fn write(&self, offset: u64, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: `at` checked the target; no reference to the buffer exists, so `from` is elsewhere.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Copies the bytes at `offset` into `to`.
    ///
    /// # Panics
    /// When the range leaves the buffer.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: `at` checked the source; `to` is exclusive memory of this process.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// The address of the range, for callers that write tensors in place. The worker reads and
    /// writes it during a call.
    ///
    /// # Panics
    /// When the range leaves the buffer.
    #[must_use]
    pub fn at(&self, offset: u64, bytes: usize) -> *mut u8 {
        let size = self.map.len();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let fits = start.checked_add(bytes).is_some_and(|end| end <= size);
        assert!(fits, "{bytes} bytes at {offset} leave a buffer of {size}");
        self.map.as_mut_ptr().wrapping_add(start)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn tensors_do_not_overlap() {
        for (tokens, hidden) in [(0, 64), (1, 32), (7, 1568), (1024, 2048)] {
            let layout = BufferLayout::new(tokens, hidden);
            let (rows, places) = (u64::from(tokens * hidden) * 2, u64::from(tokens) * 64);
            assert!(layout.hidden + rows <= layout.topk_ids);
            assert!(layout.topk_ids + places <= layout.topk_weights);
            assert!(layout.topk_weights + places <= layout.output);
            assert!(layout.output + rows <= layout.bytes && layout.bytes > 0);
        }
    }

    #[test]
    fn bytes_come_back_and_ranges_are_checked() {
        let fd = memfd(256, SealFlags::SHRINK | SealFlags::GROW);
        let (one, two) = (Buffer::map(&fd, 256).unwrap(), Buffer::map(&fd, 256).unwrap());
        one.write(250, b"abcdef");
        let mut back = [0; 6];
        two.read(250, &mut back);
        assert_eq!(&back, b"abcdef");
        for offset in [251, 256, u64::MAX] {
            assert!(std::panic::catch_unwind(|| one.write(offset, b"abcdef")).is_err());
        }
    }

    #[test]
    fn a_buffer_that_could_shrink_or_has_another_size_is_refused() {
        let open = memfd(256, SealFlags::GROW);
        assert!(Buffer::map(&open, 256).unwrap_err().to_string().contains("not sealed"));
        let sealed = memfd(256, SealFlags::SHRINK | SealFlags::GROW);
        let error = Buffer::map(&sealed, 512).unwrap_err().to_string();
        assert_eq!(error, "the buffer has 256 bytes, expected 512");
    }
}
