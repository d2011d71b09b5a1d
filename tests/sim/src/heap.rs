//! The symmetric heap of a simulated group: memory that outlives ranks, and a chance that another rank goes on before
//! everything that is read or written. What is longer than a word is written in two parts.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use kernels::device::DeviceError;
use kernels::heap::{HeapLayout, HeapShape, SymmetricHeap};
use kernels::memory::SharedMemory;

use crate::schedule::Schedule;

/// What ranks share.
pub(crate) struct Memory {
    schedule: Arc<Schedule>,
    layout: HeapLayout,
    bytes: SharedMemory,
    group_word: AtomicU64,
    ranks: Vec<Bells>,
}

/// What others see of a rank.
#[derive(Default)]
struct Bells {
    alive: AtomicBool,
    parked: AtomicBool,
    rung: AtomicU32,
    rung_parked: AtomicU32,
}

impl Memory {
    pub(crate) fn new(schedule: Arc<Schedule>, shape: HeapShape) -> Result<Self, DeviceError> {
        let layout = HeapLayout::new(shape);
        let ranks: Vec<Bells> = (0..shape.ranks).map(|_| Bells::default()).collect();
        let bytes = SharedMemory::create("heap", layout.bytes() * u64::from(shape.ranks))?;
        Ok(Self { schedule, layout, bytes, group_word: AtomicU64::new(0), ranks })
    }

    /// A rank's process has taken its lock, or has lost it.
    pub(crate) fn set_alive(&self, rank: u32, alive: bool) {
        self.of(rank).alive.store(alive, Ordering::SeqCst);
    }

    fn of(&self, rank: u32) -> &Bells {
        &self.ranks[rank as usize]
    }
}

/// The place of a rank's thread.
pub(crate) fn place(rank: u32) -> usize {
    rank as usize + 1
}

/// A rank's view of it.
pub(crate) struct Heap {
    pub(crate) memory: Arc<Memory>,
    pub(crate) rank: u32,
}

impl fmt::Debug for Heap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl Heap {
    fn at(&self, rank: u32, offset: u64) -> u64 {
        u64::from(rank) * self.memory.layout.bytes() + offset
    }

    fn pass(&self) {
        self.memory.schedule.pass(place(self.rank));
    }
}

impl SymmetricHeap for Heap {
    fn layout(&self) -> &HeapLayout {
        &self.memory.layout
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn read(&self, rank: u32, offset: u64, to: &mut [u8]) {
        self.pass();
        self.memory.bytes.read(self.at(rank, offset), to);
    }

    fn write(&self, rank: u32, offset: u64, from: &[u8]) {
        self.pass();
        let (first, second) = from.split_at(from.len() / 2 / 8 * 8);
        self.memory.bytes.write(self.at(rank, offset), first);
        self.pass();
        self.memory.bytes.write(self.at(rank, offset) + first.len() as u64, second);
    }

    fn load(&self, rank: u32, offset: u64) -> u64 {
        self.pass();
        self.memory.bytes.word64(self.at(rank, offset)).load(Ordering::SeqCst)
    }

    fn store(&self, rank: u32, offset: u64, value: u64) {
        self.pass();
        self.memory.bytes.word64(self.at(rank, offset)).store(value, Ordering::SeqCst);
    }

    fn group_word(&self) -> u64 {
        self.pass();
        self.memory.group_word.load(Ordering::SeqCst)
    }

    fn exchange_group_word(&self, seen: u64, new: u64) -> Result<(), u64> {
        self.pass();
        let word = &self.memory.group_word;
        word.compare_exchange(seen, new, Ordering::SeqCst, Ordering::SeqCst).map(drop)
    }

    fn is_alive(&self, rank: u32) -> bool {
        self.pass();
        self.memory.of(rank).alive.load(Ordering::SeqCst)
    }

    fn now(&self) -> Duration {
        self.memory.schedule.now()
    }

    fn advance(&self) {}

    fn ring(&self, rank: u32) {
        self.pass();
        self.memory.of(rank).rung.fetch_add(1, Ordering::SeqCst);
        self.memory.schedule.wake(place(rank));
    }

    fn rung(&self) -> u32 {
        self.memory.of(self.rank).rung.load(Ordering::SeqCst)
    }

    fn sleep(&self, rung: u32, timeout: Duration) {
        if self.rung() == rung {
            self.memory.schedule.sleep(place(self.rank), timeout);
        }
    }

    fn ring_parked(&self, rank: u32) {
        if self.memory.of(rank).parked.load(Ordering::SeqCst) {
            self.memory.of(rank).rung_parked.fetch_add(1, Ordering::SeqCst);
            self.memory.schedule.wake(place(rank));
        }
    }

    fn set_parked(&self, parked: bool) {
        self.memory.of(self.rank).parked.store(parked, Ordering::SeqCst);
    }

    fn rung_parked(&self) -> u32 {
        self.memory.of(self.rank).rung_parked.load(Ordering::SeqCst)
    }

    fn sleep_parked(&self, rung: u32, timeout: Duration) {
        if self.rung_parked() == rung {
            self.memory.schedule.sleep(place(self.rank), timeout);
        }
    }
}
