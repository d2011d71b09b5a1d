//! The symmetric heap: one region for each rank of a group, laid out alike, which every rank can
//! read and write. What is said through its words is the business of `group`; where the memory comes
//! from, of a backend.
//!
//! ```text
//! region   words      bell of calls, bell of the parked, progress
//!          blocks     two announcements of this rank, for calls of even and of odd number
//!          done       a tag for each peer: it has written all its terms here
//!          list       (token, slot and place, weight) of all pairs, by destination
//!          rows       tokens on the wire: bf16, or codes and block scales
//!          terms      bf16 [max_pairs, hidden]: what experts answered for this rank's tokens
//! ```

pub mod shm;

use std::fmt::Debug;
use std::time::Duration;

use crate::checkpoint::MoeLayer;
use crate::numeric::BLOCK;
use crate::problem::{ActFormat, LayerShape, TOP_K_MAX};

/// Words that different processes write lie in different lines.
const LINE: u64 = 64;
/// Bytes of an announcement besides its counts: the tag, and seven words.
const BLOCK_WORDS: u64 = 8;
/// Data begins at whole pages.
const PAGE: u64 = 4096;

/// Bytes of one list entry: `[token, slot | place << 16, weight, 0]`.
pub(crate) const ENTRY_BYTES: u64 = 16;

/// Most ranks of a group on one host.
pub const RANKS_MAX: u32 = 64;

/// What a heap is sized for; the same on all ranks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeapShape {
    /// Ranks of the group.
    pub ranks: u32,
    /// Most tokens that a rank brings to a call.
    pub max_tokens: u32,
    /// Most (token, expert) pairs that a rank brings to a call.
    pub max_pairs: u32,
    /// Width of the widest layer.
    pub hidden: u32,
}

impl HeapShape {
    /// For a rank that is alone: room for any k that a device takes. Its pages are resident once they
    /// are written.
    #[must_use]
    pub fn alone(max_tokens: u32, layers: &[MoeLayer]) -> Self {
        let max_pairs = max_tokens.saturating_mul(TOP_K_MAX);
        Self { ranks: 1, max_tokens, max_pairs, hidden: widest(layers, |shape| shape.hidden) }
    }

    /// For a group, whose heap is allocated whole: room for the model's own k.
    #[must_use]
    pub fn of_group(ranks: u32, max_tokens: u32, layers: &[MoeLayer]) -> Self {
        let max_pairs = max_tokens.saturating_mul(widest(layers, |shape| shape.top_k));
        Self { ranks, max_tokens, max_pairs, hidden: widest(layers, |shape| shape.hidden) }
    }
}

fn widest(layers: &[MoeLayer], of: fn(&LayerShape) -> u32) -> u32 {
    layers.iter().map(|layer| of(&layer.shape)).max().unwrap_or(0)
}

/// Where everything lies in a rank's region, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeapLayout {
    /// What it was made for.
    pub shape: HeapShape,
    blocks: u64,
    block_bytes: u64,
    done: u64,
    list: u64,
    rows: u64,
    terms: u64,
    bytes: u64,
}

/// Bytes of one row on the wire.
pub(crate) fn row_bytes(hidden: u32, act: ActFormat) -> u64 {
    let hidden = u64::from(hidden);
    match act {
        ActFormat::Bf16 => hidden * 2,
        ActFormat::Nvfp4 => hidden / 2 + hidden / BLOCK as u64,
    }
}

impl HeapLayout {
    /// Lays a region out.
    #[must_use]
    pub fn new(shape: HeapShape) -> Self {
        let HeapShape { ranks, max_tokens, max_pairs, hidden } = shape;
        let ranks = u64::from(ranks);
        let blocks = 3 * LINE;
        let block_bytes = (BLOCK_WORDS * 8 + ranks * 4).next_multiple_of(LINE);
        let done = blocks + 2 * block_bytes;
        let list = (done + ranks * LINE).next_multiple_of(PAGE);
        let rows = (list + u64::from(max_pairs) * ENTRY_BYTES).next_multiple_of(PAGE);
        let row = row_bytes(hidden, ActFormat::Bf16);
        let terms = (rows + u64::from(max_tokens) * row).next_multiple_of(PAGE);
        let bytes = (terms + u64::from(max_pairs) * u64::from(hidden) * 2).next_multiple_of(PAGE);
        Self { shape, blocks, block_bytes, done, list, rows, terms, bytes }
    }

    /// Size of a region.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Rung by peers; a count and, 4 bytes on, how many sleep.
    pub(crate) fn bell(&self) -> u64 {
        0
    }

    /// As the bell, for a rank that waits for its engine and joins calls by itself.
    pub(crate) fn parked_bell(&self) -> u64 {
        LINE
    }

    /// Counted up by the owner while it works.
    pub(crate) fn progress(&self) -> u64 {
        2 * LINE
    }

    /// The announcement of a call: the tag first.
    pub(crate) fn block(&self, number: u32) -> u64 {
        self.blocks + u64::from(number % 2) * self.block_bytes
    }

    /// Tag of the last call for which `rank` has written all its terms here.
    pub(crate) fn done(&self, rank: u32) -> u64 {
        self.done + u64::from(rank) * LINE
    }

    /// Entry `index` of the list.
    pub(crate) fn list(&self, index: u32) -> u64 {
        self.list + u64::from(index) * ENTRY_BYTES
    }

    /// The row of `token`, rows being `row` bytes.
    pub(crate) fn row(&self, token: u32, row: u64) -> u64 {
        self.rows + u64::from(token) * row
    }

    /// The term of (`token`, `place`) from column `column` on.
    pub(crate) fn term(&self, at: TermAt, column: u32) -> u64 {
        let row = u64::from(at.token) * u64::from(at.top_k) + u64::from(at.place);
        self.terms + (row * u64::from(at.hidden) + u64::from(column)) * 2
    }
}

/// Which term.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TermAt {
    pub(crate) token: u32,
    pub(crate) place: u32,
    /// Experts of a token in this call.
    pub(crate) top_k: u32,
    /// Width of the call's layer.
    pub(crate) hidden: u32,
}

/// One rank's view of the heaps of its group. Backends differ in how memory is shared; layout and
/// protocol are the same on all.
pub trait SymmetricHeap: Send + Sync + Debug {
    /// Where everything lies.
    fn layout(&self) -> &HeapLayout;

    /// This rank.
    fn rank(&self) -> u32;

    /// Copies bytes out of the region of `rank`.
    fn read(&self, rank: u32, offset: u64, to: &mut [u8]);

    /// Copies bytes into the region of `rank`.
    fn write(&self, rank: u32, offset: u64, from: &[u8]);

    /// Loads a word of the region of `rank`, and with it what was written before it was stored.
    fn load(&self, rank: u32, offset: u64) -> u64;

    /// Stores a word in the region of `rank`; whoever loads it sees all that was written before.
    fn store(&self, rank: u32, offset: u64, value: u64);

    /// The group's word: generation (upper half) and why the one before it ended.
    fn group_word(&self) -> u64;

    /// Replaces the group's word if it is still `seen`; otherwise says what it is.
    ///
    /// # Errors
    /// The word that is there.
    fn exchange_group_word(&self, seen: u64, new: u64) -> Result<(), u64>;

    /// Whether the process of `rank` lives.
    fn is_alive(&self, rank: u32) -> bool;

    /// Time that has passed since some moment: what deadlines are counted in.
    fn now(&self) -> Duration;

    /// Counts this rank's progress word up.
    fn advance(&self);

    /// Wakes `rank` from [`Self::sleep`].
    fn ring(&self, rank: u32);

    /// How often this rank was rung.
    fn rung(&self) -> u32;

    /// Sleeps until rung more often than `rung`, at most for `timeout`.
    fn sleep(&self, rung: u32, timeout: Duration);

    /// Wakes `rank` from [`Self::sleep_parked`], if it is parked.
    fn ring_parked(&self, rank: u32);

    /// Says whether this rank waits for its engine and would join a call by itself.
    fn set_parked(&self, parked: bool);

    /// How often this rank was rung while parked.
    fn rung_parked(&self) -> u32;

    /// Sleeps until rung while parked more often than `rung`, at most for `timeout`.
    fn sleep_parked(&self, rung: u32, timeout: Duration);
}
