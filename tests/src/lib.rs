//! What the commands over the reference share: case folders, and ways to run a call.

pub mod case;
pub mod in_process;
pub mod recorded;
