//! Runs policies: wasm components that import nothing, each call in a fresh sandbox, bounded in time, fuel,
//! memory and output, its answer checked. Links no compiler: the program `moeplane-policy`, which this crate
//! has behind the feature `compiler`, is one. What is asked, and what becomes of an answer, is the caller's.
//!
//! ```no_run
//! # use policy_host::{Host, HostOptions, Verdict, example};
//! # fn main() -> Result<(), Verdict> {
//! let host = Host::new(&HostOptions {
//!     store: "compiled".into(),
//!     compiler: "moeplane-policy".into(),
//!     deadline: None,
//! })?;
//! let policy = host.load(&[/* a component */])?; // compiled once, then found by its digest
//! println!("{} is {}", policy.digest(), policy.info().name);
//! let answer = policy.decide(&example::placement("{}"))?;
//! println!("{} for {} units of fuel", answer.value.explanation, answer.fuel);
//! # Ok(()) }
//! ```
#![deny(missing_docs)]

pub mod check;
pub mod compiler;
pub mod contract;
pub mod engine;
pub mod example;
pub mod gate;
pub mod limits;
pub mod replay;
pub mod shipped;
pub mod store;

mod component;
mod host;
mod native_code;
mod preflight;
mod question;
mod verdict;

pub use component::{Answer, Component};
pub use host::{Host, HostOptions};
pub use question::{Kind, Question};
pub use verdict::Verdict;
