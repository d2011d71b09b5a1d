//! Regions of memory that other processes map too, behind safe calls. What lies where in them is the
//! business of whoever makes them.
//!
//! # What is sound here, and why
//!
//! Another process may write a shared region at any time. Rust must therefore never hold a
//! reference to its plain data: [`SharedMemory`] copies in and out through raw pointers, and hands
//! out references to atomics alone, which tolerate concurrent writes. A copy that races with a
//! peer's write may deliver a mix of old and new bytes; every type that is copied ([`Plain`]) takes
//! any bytes, and the protocol around it decides when bytes are final.
//!
//! A mapping stays valid because its memory cannot shrink: memfds are sealed against any change of
//! size, and the file of a group's heap, which only its ranks open, is allocated whole and never
//! cut. Offsets are checked against the mapping on each use.
#![expect(unsafe_code, reason = "raw access to memory that other processes write")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use half::bf16;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate};
use rustix::io::Errno;
use rustix::thread::futex;

use crate::device::DeviceError;

/// Seals without which the size of a region could change under a mapping.
const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

const _: () = assert!(usize::BITS == 64, "offsets of a heap are 64 bits wide");

mod sealed {
    pub trait Sealed {}
}

/// Numbers that may be copied from memory which holds any bytes: no padding, no invalid values.
pub trait Plain: Copy + sealed::Sealed {}

macro_rules! plain {
    ($($type:ty),*) => { $(impl sealed::Sealed for $type {} impl Plain for $type {})* };
}
plain!(u8, u32, u64, i32, f32, bf16, [u32; 4]);

/// The bytes of `values`.
#[must_use]
pub fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: a `Plain` type has no padding, so all its bytes are initialised; the length is exact.
    unsafe { slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `values`, to be overwritten.
#[must_use]
pub fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as for `bytes_of`; any bytes written are a value of a `Plain` type.
    unsafe { slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// A region of fixed size that several processes map.
#[derive(Debug)]
pub struct SharedMemory {
    map: MmapRaw,
    fd: OwnedFd,
}

impl SharedMemory {
    /// Makes a region of zeros. Pages take memory once they are touched.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] when the system refuses it.
    pub fn create(name: &'static str, bytes: u64) -> Result<Self, DeviceError> {
        let refused = refused(name, bytes);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags).map_err(|e| refused(e.into()))?;
        ftruncate(&fd, bytes).map_err(|e| refused(e.into()))?;
        // The last seal keeps whoever gets the descriptor from sealing writes as well.
        fcntl_add_seals(&fd, SIZE_SEALS | SealFlags::SEAL).map_err(|e| refused(e.into()))?;
        Self::map(fd, bytes).map_err(refused)
    }

    /// Maps a region that another process made, which must be of exactly `bytes`.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] for another size, or a descriptor whose size may still change.
    pub fn open(name: &'static str, fd: OwnedFd, bytes: u64) -> Result<Self, DeviceError> {
        let refused = refused(name, bytes);
        let seals = fcntl_get_seals(&fd).map_err(|e| refused(e.into()))?;
        if !seals.contains(SIZE_SEALS) {
            let why = "the descriptor is not sealed against a change of size";
            return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        let size = fstat(&fd).map_err(|e| refused(e.into()))?.st_size;
        if u64::try_from(size) != Ok(bytes) {
            let why = format!("the descriptor holds {size} bytes");
            return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        Self::map(fd, bytes).map_err(refused)
    }

    /// Maps the file of a group's heap, which has `bytes` and is never cut while a rank lives.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] when the system refuses.
    pub(crate) fn of_heap(fd: OwnedFd, bytes: u64) -> Result<Self, DeviceError> {
        Self::map(fd, bytes).map_err(refused("the heap of a group", bytes))
    }

    fn map(fd: OwnedFd, bytes: u64) -> io::Result<Self> {
        // An empty region still needs an address.
        let map = MmapOptions::new().len((bytes as usize).max(1)).map_raw(&fd)?;
        Ok(Self { map, fd })
    }

    /// The descriptor, to be handed to other processes.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// Copies the values that lie at `offset` (in bytes) into `to`.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn read<T: Plain>(&self, offset: u64, to: &mut [T]) {
        let from = self.at(offset, size_of_val(to));
        let to = bytes_of_mut(to);
        // SAFETY: `at` checked the source; `to` is exclusive memory of this process, so the two do
        // not overlap.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies `from` to `offset` (in bytes).
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn write<T: Plain>(&self, offset: u64, from: &[T]) {
        let from = bytes_of(from);
        let to = self.at(offset, from.len());
        // SAFETY: `at` checked the target; no reference to plain data of the region exists, so
        // `from` cannot overlap it.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// The word at `offset` (in bytes).
    ///
    /// # Panics
    /// When the offset leaves the region or is not a multiple of 4.
    #[must_use]
    pub fn word32(&self, offset: u64) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "word at {offset}, expected a multiple of 4");
        let word = self.at(offset, 4).cast();
        // SAFETY: `at` checked the range, the mapping is page-aligned and lives as long as `self`;
        // all accesses of these words, in every process, are atomic.
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// The word at `offset` (in bytes).
    ///
    /// # Panics
    /// When the offset leaves the region or is not a multiple of 8.
    #[must_use]
    pub fn word64(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "word at {offset}, expected a multiple of 8");
        let word = self.at(offset, 8).cast();
        // SAFETY: as for `word32`.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Sleeps until [`Self::wake`] on the 32-bit word at `offset`, but no longer than `timeout`, and
    /// not at all when the word is no longer `seen`. May return early.
    pub fn sleep(&self, offset: u64, seen: u32, timeout: Duration) {
        let timeout = futex::Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let woken = futex::wait(self.word32(offset), futex::Flags::empty(), seen, Some(&timeout));
        // A changed word, a signal and the timeout all mean: look again.
        let again = [Errno::AGAIN, Errno::INTR, Errno::TIMEDOUT];
        debug_assert!(woken.is_ok() || woken.is_err_and(|e| again.contains(&e)), "{woken:?}");
    }

    /// Wakes every process that sleeps on the word at `offset`.
    pub fn wake(&self, offset: u64) {
        let woken = futex::wake(self.word32(offset), futex::Flags::empty(), i32::MAX as u32);
        debug_assert!(woken.is_ok(), "{woken:?}");
    }

    fn at(&self, offset: u64, bytes: usize) -> *mut u8 {
        let size = self.map.len();
        let fits = (offset as usize).checked_add(bytes).is_some_and(|end| end <= size);
        assert!(fits, "{bytes} bytes at {offset} leave a region of {size}");
        self.map.as_mut_ptr().wrapping_add(offset as usize)
    }
}

fn refused(what: &'static str, bytes: u64) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Memory { what, bytes, source }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Instant;

    use super::*;

    fn duplicate(region: &SharedMemory) -> OwnedFd {
        region.fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn two_mappings_see_the_same_bytes() {
        let one = SharedMemory::create("test", 4096).unwrap();
        let two = SharedMemory::open("test", duplicate(&one), 4096).unwrap();
        one.write(8, &[1.5_f32, -2.0]);
        let mut back = [0.0_f32; 2];
        two.read(8, &mut back);
        assert_eq!(back, [1.5, -2.0]);
    }

    #[test]
    fn a_descriptor_of_another_size_or_without_seals_is_refused() {
        let region = SharedMemory::create("test", 4096).unwrap();
        let error = SharedMemory::open("test", duplicate(&region), 8192).unwrap_err();
        assert_eq!(error.to_string(), "8192 bytes for test were refused");
        let fd = rustix::fs::memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 4096).unwrap();
        assert!(SharedMemory::open("test", fd, 4096).is_err());
        assert!(ftruncate(region.fd(), 0).is_err(), "the size must be sealed");
    }

    #[test]
    fn a_range_outside_the_region_is_caught() {
        let region = SharedMemory::create("test", 4096).unwrap();
        for offset in [4089, 4096, u64::MAX] {
            let read = std::panic::catch_unwind(|| region.read(offset, &mut [0_u32; 2]));
            assert!(read.is_err(), "{offset}");
        }
    }

    #[test]
    fn a_sleeper_is_woken_and_a_timeout_ends_its_sleep() {
        let region = Arc::new(SharedMemory::create("test", 4096).unwrap());
        let begun = Instant::now();
        region.sleep(0, 0, Duration::from_millis(5));
        assert!(begun.elapsed() >= Duration::from_millis(4));
        let bell = Arc::clone(&region);
        let ringer = std::thread::spawn(move || {
            bell.word32(0).store(1, Ordering::Release);
            bell.wake(0);
        });
        while region.word32(0).load(Ordering::Acquire) == 0 {
            region.sleep(0, 0, Duration::from_secs(60));
        }
        ringer.join().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}
