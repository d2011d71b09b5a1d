//! Every limit of the worker, and why it is what it is.

use std::time::Duration;

/// How long a rank that joins calls by itself looks for the next one before it sleeps: what it takes
/// to be woken, and the time in which a small call is answered and the next one comes.
pub const LINGER: Duration = Duration::from_micros(100);

/// Longest wait for control to take a connection, to answer, or to take what is said.
pub const CONTROL_PATIENCE: Duration = Duration::from_secs(5);

/// How often the thread that speaks with control looks whether the worker stops.
pub const CONTROL_TICK: Duration = Duration::from_millis(100);

/// Shortest and longest pause before control is dialled again: soon after a restart, and without
/// pressing one that is away for long.
pub const RECONNECT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(8));

/// A window until control says how long its are.
pub const WINDOW: Duration = Duration::from_secs(10);

/// Windows that are kept while control is away: an hour of them.
pub const WINDOWS_MAX: usize = 360;

/// How long a worker that ends waits for control to keep its last windows.
pub const FAREWELL: Duration = Duration::from_secs(1);

/// Engines that may be connected at once. One rank serves one engine and those that look at it; the
/// rest are lost clients.
pub const CONNECTIONS_MAX: u32 = 64;

/// Most tokens that a call may be configured to have. With the widest layers there are (16,384), the
/// two tensors of a buffer take 4 GiB.
pub const TOKENS_MAX: u32 = 65_536;

/// Tokens of a call unless configured: a prefill chunk of today's engines.
pub const TOKENS_DEFAULT: u32 = 8_192;

/// Bytes of answers that an engine may leave unread before it is dropped: some thousand refusals,
/// or one that names every tensor of a checkpoint.
pub const UNREAD_BYTES_MAX: usize = 32 << 20;

/// The same in a group, whose heap is allocated whole: with the widest models of today (hidden 7,168,
/// top-8) a rank takes 130 MB.
pub const GROUP_TOKENS_DEFAULT: u32 = 1_024;

/// How long a peer that makes no progress is waited for, unless configured: far beyond the tile that
/// a busy processor takes, and short enough to be waited for.
pub const DEADLINE_MS_DEFAULT: u64 = 2_000;

/// Calls of a tactic that are timed for one size.
pub const TUNE_RUNS: u32 = 50;

/// After so long no more are than a few.
pub const TUNE_SECONDS: Duration = Duration::from_secs(5);

/// Orders of control that may wait for the rank's thread: two for each layer of the deepest models.
pub const ORDERS_MAX: usize = 512;

/// How fast experts are derived for another placement unless control says otherwise: some per cent of what calls read.
pub const STAGE_BYTES_PER_SECOND: u64 = 500_000_000;

/// How often what is derived is told while it goes on.
pub const STAGE_REPORT: Duration = Duration::from_millis(500);

/// Longest sleep of the thread that derives: so soon it sees that it may go on, or that nobody waits any more.
pub const STAGE_LOOK: Duration = Duration::from_millis(50);

/// How long after a failure a placement is staged again: what is in the way may be gone.
pub const STAGE_AGAIN: Duration = Duration::from_secs(5);
