//! What a policy may use. There are two profiles: for components compiled from Rust, C and the like, and for those
//! that carry an interpreter. Where a limit applies, the verdict names it.

use std::time::Duration;

/// Bytes of a component. Those of componentize-py have 18 MB.
pub const COMPONENT_BYTES_MAX: u64 = 32 << 20;

/// Bytes of a compiled component. Python's have 34 MB.
pub const COMPILED_BYTES_MAX: u64 = 128 << 20;

/// Calls that may run at a time; one more is answered [`Busy`](crate::Verdict::Busy).
pub const CALLS_MAX: u32 = 8;

/// Bytes of stack of a component's own functions.
pub const STACK_BYTES: usize = 512 << 10;

/// How often deadlines are looked at. Running code meets its deadline at most two ticks late.
pub const TICK: Duration = Duration::from_millis(5);

/// Bytes of an explanation, a name or a message.
pub const TEXT_BYTES_MAX: usize = 4096;

/// Bytes of the JSON Schema of settings.
pub const SCHEMA_BYTES_MAX: usize = 64 << 10;

/// What one call may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// Core instances that a component links together.
    pub instances: u32,
    /// Memories of all of them.
    pub memories: u32,
    /// Tables of all of them.
    pub tables: u32,
    /// Bytes of all memories.
    pub memory_bytes: usize,
    /// Entries of a table.
    pub table_elements: usize,
    /// Units of fuel, about one an instruction.
    pub fuel: u64,
    /// Bytes that an answer may make the host allocate.
    pub output_bytes: usize,
    /// Deadline of a decision about placement or routing, of `describe` and of `validate`.
    pub decide: Duration,
    /// Deadline of a decision about tactics.
    pub choose: Duration,
}

/// Compiled languages.
pub const NATIVE: Profile = Profile {
    instances: 8,
    memories: 1,
    tables: 4,
    memory_bytes: 64 << 20,
    table_elements: 10_000,
    // 61 layers of 256 experts take about 10^8; a core uses about 10^9 in a second.
    fuel: 2_000_000_000,
    output_bytes: 8 << 20,
    decide: Duration::from_millis(500),
    choose: Duration::from_millis(50),
};

/// Components with an interpreter inside: about 70 times slower, and made of many instances.
pub const SCRIPT: Profile = Profile {
    instances: 64,
    memories: 4,
    tables: 64,
    memory_bytes: 128 << 20,
    table_elements: 40_000,
    fuel: 40_000_000_000,
    output_bytes: 8 << 20,
    decide: Duration::from_secs(10),
    choose: Duration::from_millis(500),
};

// The pool is made for the larger one.
const _: () = assert!(NATIVE.instances <= SCRIPT.instances && NATIVE.memories <= SCRIPT.memories);
const _: () = assert!(NATIVE.tables <= SCRIPT.tables && NATIVE.memory_bytes <= SCRIPT.memory_bytes);

/// What the compiler's process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompileLimits {
    /// Seconds of processor time.
    pub seconds: u64,
    /// Bytes of address space.
    pub memory_bytes: u64,
}

impl CompileLimits {
    /// By the clock. On a busy machine the compiler gets a small share of a processor, so this ends only one that
    /// waits for something.
    #[must_use]
    pub const fn clock_seconds(self) -> u64 {
        8 * self.seconds
    }

    /// For a component of `bytes`: 10 seconds, and 4 for each MiB. An unoptimised compiler takes 3 s for a policy in
    /// Rust, an optimised one 5 s for Python's 18 MB; a bomb of 100 KB would take 20 s of an optimised one.
    #[must_use]
    pub fn for_size(bytes: u64) -> Self {
        Self { seconds: 10 + 4 * (bytes >> 20), memory_bytes: 4 << 30 }
    }
}
