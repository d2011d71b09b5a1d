//! The heap of ranks that are processes of one host: a file in shared memory, found by the group's
//! name.
//!
//! A rank holds a lock on its own byte of the file for as long as it lives, so that a death shows at
//! once, a second rank of that number is refused, and a file that nobody holds is known to be stale.
//! Founding, joining and leaving hold a lock on a byte of its own. The last rank out removes the
//! file. Who joins must agree with the founder on every field of [`Terms`].

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{FallocateFlags, fallocate};

use super::{HeapLayout, HeapShape, RANKS_MAX, SymmetricHeap};
use crate::memory::SharedMemory;

/// First word of every heap: "moeplane" in ASCII.
const MAGIC: u64 = u64::from_le_bytes(*b"moeplane");

/// The group's word.
const GROUP_WORD: u64 = 8;
/// Length of the terms' text, then the text.
const TERMS: u64 = 64;
/// Regions begin here; terms have the room before.
const REGIONS: u64 = 16 << 10;

/// The byte that is locked while the group's membership changes; ranks have those below.
const MEMBERSHIP: i64 = 255;

/// How long others may take to found, join or leave.
const MEMBERSHIP_WAIT: Duration = Duration::from_secs(30);
/// Pause between two tries of a lock.
const PAUSE: Duration = Duration::from_millis(1);

const _: () = assert!((RANKS_MAX as i64) < MEMBERSHIP, "ranks and membership have their own bytes");

/// What all ranks of a group must agree on: names and values, compared by name.
pub type Terms = Vec<(String, String)>;

/// Why a rank cannot join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A group that cannot be.
    #[error("rank {rank} of {ranks} ranks, expected 1 to {RANKS_MAX} ranks and a rank below")]
    Rank {
        /// The rank.
        rank: u32,
        /// Ranks of the group.
        ranks: u32,
    },
    /// The system refused the file.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The heap's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is not as much memory.
    #[error(
        "{} needs {bytes} bytes for the heap of the group: lower max_tokens, or make room there",
        path.display()
    )]
    Room {
        /// The heap's file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Such a rank runs.
    #[error("rank {rank} of the group at {} runs already", path.display())]
    Taken {
        /// The rank.
        rank: u32,
        /// The heap's file.
        path: PathBuf,
    },
    /// The group was founded with another value.
    #[error("this rank has {name} {ours}, the group at {} was founded with {theirs}", path.display())]
    Terms {
        /// The field's name.
        name: String,
        /// This rank's value.
        ours: String,
        /// The group's.
        theirs: String,
        /// The heap's file.
        path: PathBuf,
    },
    /// Somebody holds the membership lock and does not let go.
    #[error("another rank has been joining the group at {} for {} s", path.display(), MEMBERSHIP_WAIT.as_secs())]
    Membership {
        /// The heap's file.
        path: PathBuf,
    },
    /// The file is no heap.
    #[error("{} is not the heap of a group", path.display())]
    NoHeap {
        /// The file.
        path: PathBuf,
    },
    /// The heap cannot be mapped.
    #[error(transparent)]
    Memory(#[from] crate::device::DeviceError),
}

/// See the head of this module.
#[derive(Debug)]
pub struct ShmHeap {
    memory: SharedMemory,
    layout: HeapLayout,
    rank: u32,
    began: Instant,
    /// The group's file; none for a rank that is alone.
    file: Option<HeapFile>,
}

#[derive(Debug)]
struct HeapFile {
    file: File,
    path: PathBuf,
}

/// Which group, and which part of it.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Folder of the heap's file: in shared memory, the same for all ranks.
    pub folder: PathBuf,
    /// The group's name.
    pub name: String,
    /// This rank.
    pub rank: u32,
}

impl ShmHeap {
    /// The heap of a rank that is alone.
    ///
    /// # Errors
    /// [`crate::device::DeviceError::Memory`].
    pub fn alone(shape: HeapShape) -> Result<Self, crate::device::DeviceError> {
        let layout = HeapLayout::new(HeapShape { ranks: 1, ..shape });
        let memory = SharedMemory::create("heap", REGIONS + layout.bytes())?;
        Ok(Self { memory, layout, rank: 0, began: Instant::now(), file: None })
    }

    /// Joins a group, or founds it.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn join(
        membership: &Membership,
        shape: HeapShape,
        terms: &Terms,
    ) -> Result<Self, JoinError> {
        let (rank, ranks) = (membership.rank, shape.ranks);
        if ranks == 0 || ranks > RANKS_MAX || rank >= ranks {
            return Err(JoinError::Rank { rank, ranks });
        }
        let layout = HeapLayout::new(shape);
        let path = membership.folder.join(format!("moeplane-{}", membership.name));
        let file = HeapFile::open_locked(path)?;
        let path = || file.path.clone();
        if !(0..RANKS_MAX).any(|rank| file.is_held(rank)) {
            file.found(REGIONS + u64::from(ranks) * layout.bytes(), terms)?;
        }
        file.agree(terms)?;
        if !file.lock(i64::from(rank)).map_err(file.failed("lock"))? {
            return Err(JoinError::Taken { rank, path: path() });
        }
        let bytes = REGIONS + u64::from(ranks) * layout.bytes();
        let fd: OwnedFd = file.file.try_clone().map_err(file.failed("duplicate"))?.into();
        let memory = SharedMemory::of_heap(fd, bytes)?;
        let mut heap = Self { memory, layout, rank, began: Instant::now(), file: None };
        // What a predecessor that was killed left in words that count sleepers.
        for bell in [layout.bell(), layout.parked_bell()] {
            heap.word32(rank, bell + 4).store(0, Ordering::SeqCst);
        }
        file.unlock(MEMBERSHIP).map_err(file.failed("unlock"))?;
        heap.file = Some(file);
        Ok(heap)
    }

    fn at(&self, rank: u32, offset: u64) -> u64 {
        REGIONS + u64::from(rank) * self.layout.bytes() + offset
    }

    fn word32(&self, rank: u32, offset: u64) -> &std::sync::atomic::AtomicU32 {
        self.memory.word32(self.at(rank, offset))
    }

    /// Counts a bell up and wakes whoever sleeps on it.
    fn strike(&self, rank: u32, bell: u64) {
        self.word32(rank, bell).fetch_add(1, Ordering::SeqCst);
        if self.word32(rank, bell + 4).load(Ordering::SeqCst) > 0 {
            self.memory.wake(self.at(rank, bell));
        }
    }
}

impl SymmetricHeap for ShmHeap {
    fn layout(&self) -> &HeapLayout {
        &self.layout
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn read(&self, rank: u32, offset: u64, to: &mut [u8]) {
        self.memory.read(self.at(rank, offset), to);
    }

    fn write(&self, rank: u32, offset: u64, from: &[u8]) {
        self.memory.write(self.at(rank, offset), from);
    }

    fn load(&self, rank: u32, offset: u64) -> u64 {
        self.memory.word64(self.at(rank, offset)).load(Ordering::Acquire)
    }

    fn store(&self, rank: u32, offset: u64, value: u64) {
        self.memory.word64(self.at(rank, offset)).store(value, Ordering::Release);
    }

    fn group_word(&self) -> u64 {
        self.memory.word64(GROUP_WORD).load(Ordering::Acquire)
    }

    fn exchange_group_word(&self, seen: u64, new: u64) -> Result<(), u64> {
        let word = self.memory.word64(GROUP_WORD);
        word.compare_exchange(seen, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
    }

    fn is_alive(&self, rank: u32) -> bool {
        rank == self.rank || self.file.as_ref().is_none_or(|file| file.is_held(rank))
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn advance(&self) {
        let progress = self.memory.word64(self.at(self.rank, self.layout.progress()));
        progress.fetch_add(1, Ordering::Relaxed);
    }

    fn ring(&self, rank: u32) {
        self.strike(rank, self.layout.bell());
    }

    fn rung(&self) -> u32 {
        self.word32(self.rank, self.layout.bell()).load(Ordering::SeqCst)
    }

    fn sleep(&self, rung: u32, timeout: Duration) {
        let bell = self.layout.bell();
        let sleepers = self.word32(self.rank, bell + 4);
        sleepers.store(1, Ordering::SeqCst);
        self.memory.sleep(self.at(self.rank, bell), rung, timeout);
        sleepers.store(0, Ordering::SeqCst);
    }

    fn ring_parked(&self, rank: u32) {
        // Against set_parked: either this sees the rank parked, or the rank sees what was stored
        // before this was called.
        fence(Ordering::SeqCst);
        if self.word32(rank, self.layout.parked_bell() + 4).load(Ordering::SeqCst) > 0 {
            self.strike(rank, self.layout.parked_bell());
        }
    }

    fn set_parked(&self, parked: bool) {
        let word = self.word32(self.rank, self.layout.parked_bell() + 4);
        word.store(u32::from(parked), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    fn rung_parked(&self) -> u32 {
        self.word32(self.rank, self.layout.parked_bell()).load(Ordering::SeqCst)
    }

    fn sleep_parked(&self, rung: u32, timeout: Duration) {
        self.memory.sleep(self.at(self.rank, self.layout.parked_bell()), rung, timeout);
    }
}

impl Drop for ShmHeap {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        // Whoever joins meanwhile must find the file whole, or not at all.
        if !file.wait_for_membership() {
            return;
        }
        let others = (0..RANKS_MAX).any(|rank| rank != self.rank && file.is_held(rank));
        if !others && file.is_at_path() {
            // If it stays, the next rank to start finds it stale.
            drop(fs::remove_file(&file.path));
        }
        // Closing the file gives up both locks.
    }
}

impl HeapFile {
    /// Opens the file at `path`, or makes it, and holds the membership lock.
    fn open_locked(path: PathBuf) -> Result<Self, JoinError> {
        loop {
            let opened = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path);
            let file = opened.map_err(|source| JoinError::File {
                action: "open",
                path: path.clone(),
                source,
            })?;
            let file = Self { file, path: path.clone() };
            if !file.wait_for_membership() {
                return Err(JoinError::Membership { path });
            }
            // The last rank of the group may have removed the file before we had the lock.
            if file.is_at_path() {
                return Ok(file);
            }
        }
    }

    fn is_at_path(&self) -> bool {
        let ours = self.file.metadata().map(|m| (m.dev(), m.ino()));
        let found = fs::metadata(&self.path).map(|m| (m.dev(), m.ino()));
        matches!((ours, found), (Ok(ours), Ok(found)) if ours == found)
    }

    fn wait_for_membership(&self) -> bool {
        let began = Instant::now();
        loop {
            match self.lock(MEMBERSHIP) {
                Ok(true) => return true,
                Ok(false) if began.elapsed() < MEMBERSHIP_WAIT => thread::sleep(PAUSE),
                _ => return false,
            }
        }
    }

    /// Makes a heap of zeros of a new or stale file.
    fn found(&self, bytes: u64, terms: &Terms) -> Result<(), JoinError> {
        let text = serde_json::to_vec(terms).unwrap_or_default();
        assert!(TERMS + 8 + (text.len() as u64) < REGIONS, "terms of {} bytes", text.len());
        self.file.set_len(0).map_err(self.failed("clear"))?;
        let room = |source: rustix::io::Errno| JoinError::Room {
            path: self.path.clone(),
            bytes,
            source: source.into(),
        };
        fallocate(self.file.as_fd(), FallocateFlags::empty(), 0, bytes).map_err(room)?;
        let write =
            |at: u64, bytes: &[u8]| self.file.write_all_at(bytes, at).map_err(self.failed("write"));
        write(TERMS, &(text.len() as u64).to_le_bytes())?;
        write(TERMS + 8, &text)?;
        write(0, &MAGIC.to_le_bytes())
    }

    /// Compares terms with those that the group was founded with.
    fn agree(&self, terms: &Terms) -> Result<(), JoinError> {
        let no_heap = || JoinError::NoHeap { path: self.path.clone() };
        let word = |at: u64| {
            let mut word = [0; 8];
            self.file.read_exact_at(&mut word, at).map_err(|_short| no_heap())?;
            Ok::<_, JoinError>(u64::from_le_bytes(word))
        };
        let length = word(TERMS)?;
        if word(0)? != MAGIC || length >= REGIONS {
            return Err(no_heap());
        }
        let mut text = vec![0; length as usize];
        self.file.read_exact_at(&mut text, TERMS + 8).map_err(|_short| no_heap())?;
        let theirs: Terms = serde_json::from_slice(&text).map_err(|_other| no_heap())?;
        for (name, ours) in terms {
            let found = theirs.iter().find(|(other, _)| other == name);
            let theirs = found.map_or("none", |(_, value)| value);
            if theirs != ours {
                let (name, ours, theirs) = (name.clone(), ours.clone(), theirs.to_owned());
                return Err(JoinError::Terms { name, ours, theirs, path: self.path.clone() });
            }
        }
        Ok(())
    }

    /// Whether some process holds the byte of `rank`.
    fn is_held(&self, rank: u32) -> bool {
        let mut range = byte(i64::from(rank), libc::F_WRLCK);
        let asked = fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut range));
        // A rank whose life cannot be asked for is not given up for dead.
        asked.is_err() || libc::c_int::from(range.l_type) != libc::F_UNLCK
    }

    /// Locks a byte; false when another holds it.
    fn lock(&self, at: i64) -> io::Result<bool> {
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&byte(at, libc::F_WRLCK))) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn unlock(&self, at: i64) -> io::Result<()> {
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&byte(at, libc::F_UNLCK)))?;
        Ok(())
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> JoinError {
        let path = self.path.clone();
        move |source| JoinError::File { action, path: path.clone(), source }
    }
}

/// One byte of a file, to be locked.
fn byte(at: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// The usual folder of heaps.
#[must_use]
pub fn default_folder() -> &'static Path {
    Path::new("/dev/shm")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: HeapShape = HeapShape { ranks: 2, max_tokens: 4, max_pairs: 8, hidden: 64 };

    fn join(folder: &Path, rank: u32, digest: &str) -> Result<ShmHeap, JoinError> {
        let membership = Membership { folder: folder.to_owned(), name: "g".to_owned(), rank };
        let terms = vec![("model digest".to_owned(), digest.to_owned())];
        ShmHeap::join(&membership, SHAPE, &terms)
    }

    #[test]
    fn ranks_share_a_heap_and_the_last_one_removes_it() {
        let folder = tempfile::tempdir().unwrap();
        let zero = join(folder.path(), 0, "a").unwrap();
        assert!(!zero.is_alive(1));
        let one = join(folder.path(), 1, "a").unwrap();
        assert!(zero.is_alive(1) && one.is_alive(0));
        zero.write(1, 5000, b"hello");
        let mut seen = [0; 5];
        one.read(1, 5000, &mut seen);
        assert_eq!(&seen, b"hello");
        assert_eq!(one.exchange_group_word(0, 7), Ok(()));
        assert_eq!(zero.exchange_group_word(0, 8), Err(7));
        drop(zero);
        assert!(!one.is_alive(0));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        drop(one);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_second_rank_and_other_terms_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let _zero = join(folder.path(), 0, "a").unwrap();
        let taken = join(folder.path(), 0, "a").unwrap_err().to_string();
        assert!(
            taken.contains("rank 0 of the group") && taken.ends_with("runs already"),
            "{taken}"
        );
        let other = join(folder.path(), 1, "b").unwrap_err().to_string();
        assert!(other.contains("this rank has model digest b"), "{other}");
        assert!(other.ends_with("was founded with a"), "{other}");
        // Neither refusal leaves a lock behind.
        join(folder.path(), 1, "a").unwrap();
        let beyond = join(folder.path(), 2, "a").unwrap_err().to_string();
        assert!(beyond.contains("rank 2 of 2 ranks"), "{beyond}");
    }

    #[test]
    fn a_stale_file_is_founded_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("moeplane-g");
        fs::write(&path, vec![7; 100_000]).unwrap();
        let zero = join(folder.path(), 0, "a").unwrap();
        assert_eq!(zero.group_word(), 0);
        // A group whose ranks were all killed leaves its file: nobody holds a byte of it.
        let leaked = path.with_extension("copy");
        fs::hard_link(&path, &leaked).unwrap();
        drop(zero);
        fs::rename(&leaked, &path).unwrap();
        let other = join(folder.path(), 1, "b").unwrap();
        assert_eq!(other.rank(), 1);
    }

    #[test]
    fn a_folder_without_room_is_an_error_at_founding() {
        let folder = tempfile::tempdir().unwrap();
        let membership =
            Membership { folder: folder.path().to_owned(), name: "g".to_owned(), rank: 0 };
        let shape =
            HeapShape { max_tokens: 1 << 31, max_pairs: u32::MAX, hidden: 1 << 20, ..SHAPE };
        let refused = ShmHeap::join(&membership, shape, &Vec::new()).unwrap_err();
        assert!(matches!(refused, JoinError::Room { .. }), "{refused}");
    }

    #[test]
    fn regions_hold_everything_without_overlap() {
        let layout = HeapLayout::new(SHAPE);
        let ends = [
            (layout.progress() + 8, layout.block(0)),
            (layout.block(0) + 72, layout.block(1)),
            (layout.block(1) + 72, layout.done(0)),
            (layout.done(1) + 8, layout.list(0)),
            (layout.list(8), layout.row(0, 128)),
            (layout.row(4, 128), layout.terms),
            (layout.terms + 8 * 128, layout.bytes()),
        ];
        for (end, next) in ends {
            assert!(end <= next, "{end} {next}");
        }
    }
}
