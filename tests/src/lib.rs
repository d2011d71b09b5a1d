//! What the commands over the reference share: case folders, recordings, worker processes, and ways
//! to run a call.

pub mod call;
pub mod case;
pub mod control_kills;
pub mod control_process;
pub mod fake_worker;
pub mod group;
pub mod invariants;
pub mod kill;
pub mod moving;
pub mod plan;
pub mod random;
pub mod recorded;
pub mod replay;
pub mod resident;
pub mod rewrite;
pub mod routing;
pub mod shape_cases;
pub mod synthetic;
pub mod times;
pub mod traffic;
pub mod watcher;
pub mod worker_process;
