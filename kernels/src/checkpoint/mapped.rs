//! One weight file in memory: mapped, never read. The only place of the checkpoint that is
//! `unsafe`; what the bytes mean is `tensors`' business.
#![expect(unsafe_code, reason = "mapping a file, and giving its pages back, have no safe form")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub(super) struct MappedFile {
    /// Name within the checkpoint's folder.
    pub(super) name: String,
    map: Mmap,
}

impl MappedFile {
    /// Maps `folder/name`.
    pub(super) fn open(folder: &Path, name: &str) -> io::Result<Self> {
        let file = File::open(folder.join(name))?;
        // SAFETY: the mapping is private and read-only, and is handed out as `&[u8]` tied to
        // `self`. As for every mapped checkpoint, the operator must not truncate or rewrite the
        // file while it is served (a new version is a new file): nothing here can prevent that.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { name: name.to_owned(), map })
    }

    /// The file's bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Tells the system whether to read ahead: of use for weights, a waste for scattered scalars.
    pub(super) fn read_ahead(&self, ahead: bool) -> io::Result<()> {
        self.map.advise(if ahead { Advice::Normal } else { Advice::Random })
    }

    /// Drops the resident pages that hold `range` (and their neighbours on the same pages); they
    /// are read from the file again when next looked at.
    pub(super) fn release(&self, range: Range<usize>) -> io::Result<()> {
        // SAFETY: MADV_DONTNEED loses data on writable private mappings only. This one is never
        // written, so every page comes back from the file with the same bytes.
        unsafe {
            self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        }
    }
}
