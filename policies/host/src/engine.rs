//! The configuration of wasmtime that compiler and host share, and the thread that makes deadlines come. Both sides must
//! use the same one: wasmtime does not notice all differences, and compiled code is accepted by its fingerprint.

use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, WasmFeatures,
};

use crate::limits::{CALLS_MAX, SCRIPT, STACK_BYTES, TICK};
use crate::verdict::Verdict;

/// Names all that decides what code the compiler makes, and what fuel means. Change it with [`config`].
pub const FINGERPRINT: &str = "wasmtime-48.0.8-1";

/// Bytes of a memory that stay in place between calls, so that the next one has no page faults there.
const RESIDENT_BYTES: usize = 2 << 20;

/// Frames of a trap's backtrace.
const FRAMES: Option<NonZeroUsize> = NonZeroUsize::new(16);

/// What compiler and host share.
#[must_use]
pub fn config() -> Config {
    let mut config = Config::new();
    // Multiple memories stay allowed: wasmtime 48 panics on components that link two modules without.
    config
        .wasm_component_model(true)
        .concurrency_support(false)
        .consume_fuel(true)
        .epoch_interruption(true)
        .relaxed_simd_deterministic(true)
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        .wasm_features(WasmFeatures::THREADS, false)
        .max_wasm_stack(STACK_BYTES)
        .wasm_backtrace_max_frames(FRAMES);
    config
}

fn pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(CALLS_MAX)
        .total_core_instances(CALLS_MAX * SCRIPT.instances)
        .total_memories(CALLS_MAX * SCRIPT.memories)
        .total_tables(CALLS_MAX * SCRIPT.tables)
        .max_core_instances_per_component(SCRIPT.instances)
        .max_memories_per_component(SCRIPT.memories)
        .max_tables_per_component(SCRIPT.tables)
        .max_memory_size(SCRIPT.memory_bytes)
        .table_elements(SCRIPT.table_elements)
        .linear_memory_keep_resident(RESIDENT_BYTES)
        .table_keep_resident(RESIDENT_BYTES)
        // Where Linux can say which pages a call wrote, only those are set back after it.
        .pagemap_scan(Enabled::Auto);
    pool
}

/// An engine with a pool of instances, or, where the address space is too small for one (a limit on
/// virtual memory), without: then a call takes some microseconds longer.
pub(crate) fn engine() -> Result<Engine, Verdict> {
    let mut pooling = config();
    pooling.allocation_strategy(InstanceAllocationStrategy::Pooling(pool()));
    Engine::new(&pooling)
        .or_else(|_no_space| Engine::new(&config()))
        .map_err(|error| Verdict::host("starting wasmtime", error))
}

/// Ticks without a call before the thread rests. Calls in a row then need not wake it, which costs a caller as much as
/// a short call does.
const LINGER_TICKS: u32 = 20;

/// Advances the engine's epoch while calls run, and rests while none does.
pub(crate) struct Ticker {
    state: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    calls: Mutex<Calls>,
    changed: Condvar,
}

struct Calls {
    running: u32,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Calls> {
        // Nobody panics while holding it: counters are always consistent.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticker {
    pub(crate) fn start(engine: &Engine) -> Result<Self, Verdict> {
        let state = Arc::new(Shared {
            calls: Mutex::new(Calls { running: 0, ended: false }),
            changed: Condvar::new(),
        });
        let (shared, engine) = (Arc::clone(&state), engine.weak());
        let thread = std::thread::Builder::new()
            .name("policy-ticks".to_owned())
            .spawn(move || {
                let mut calls = shared.lock();
                let mut idle_ticks = 0;
                while !calls.ended {
                    idle_ticks = if calls.running == 0 { idle_ticks + 1 } else { 0 };
                    if idle_ticks > LINGER_TICKS {
                        calls = shared.changed.wait(calls).unwrap_or_else(PoisonError::into_inner);
                        idle_ticks = 0;
                        continue;
                    }
                    drop(calls);
                    std::thread::sleep(TICK);
                    let Some(engine) = engine.upgrade() else { return };
                    engine.increment_epoch();
                    calls = shared.lock();
                }
            })
            .map_err(|error| Verdict::host("starting the thread of deadlines", error))?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Ticks come until the guard is dropped; none when as many calls run as may.
    pub(crate) fn run(&self) -> Option<Running<'_>> {
        let mut calls = self.state.lock();
        if calls.running == CALLS_MAX {
            return None;
        }
        calls.running += 1;
        if calls.running == 1 {
            self.state.changed.notify_one();
        }
        Some(Running { ticker: self })
    }
}

pub(crate) struct Running<'a> {
    ticker: &'a Ticker,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.ticker.state.lock().running -= 1;
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.state.lock().ended = true;
        self.state.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It ends by itself; a panic in it has been reported by the panic hook.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::FINGERPRINT;

    #[test]
    fn the_fingerprint_names_the_wasmtime_that_is_linked() {
        let lock = include_str!("../../../Cargo.lock");
        let (_, entry) = lock.split_once("name = \"wasmtime\"\nversion = \"").unwrap();
        let (version, _) = entry.split_once('"').unwrap();
        assert!(FINGERPRINT.starts_with(&format!("wasmtime-{version}-")), "{version} is linked");
    }
}
