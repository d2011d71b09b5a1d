//! Tests of checkpoints: real ones, written ones, and broken ones.

mod forms;
mod golden;
mod refusals;
mod written;
