//! The arithmetic of placement policies on plain slices: planners, and what they know of a layer. Pure and
//! deterministic: no contract, no JSON, no clock, no input or output, so that a wasm guest and whoever
//! checks it run the very same code.
//!
//! Loads are (token, expert) pairs. The slots of a layer are a `&[u32]`, rank by rank, [`layer::EMPTY`] where
//! a slot holds nothing.
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;

pub mod choose;
pub mod cost;
pub mod deepseek;
pub mod estimate;
pub mod greedy;
pub mod layer;
pub mod repair;
pub mod settle;
pub mod split;
