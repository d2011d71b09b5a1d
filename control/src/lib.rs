//! The control plane. It knows every worker, keeps what it knows in SQLite, and answers operators over
//! HTTP. No CUDA, no `unsafe`: it builds and runs on any laptop.
//!
//! ```text
//! worker::uplink == WebSocket ==> session -> fleet (who is there and holds what, pure) -> api -> operators
//!                                    |                                                    ^
//!                                    +-> placing (what to hold) -> store (SQLite) --------+
//! ```
#![forbid(unsafe_code)]

mod access;
mod advise;
mod api;
mod balance;
mod balancing;
mod choose;
mod choosing;
pub mod config;
mod constraints;
mod deciding;
mod exchange;
mod fleet;
pub mod limits;
mod losing;
mod migrate;
mod migrating;
mod motion;
mod placing;
mod policies;
mod propose;
mod proposing;
mod recover;
mod recovering;
mod registry;
mod serve;
mod session;
mod shadow;
mod shadowing;
pub mod simulated;
mod splitting;
mod state;
mod store;
pub mod tls;

pub use self::api::document;
pub use self::serve::{InitError, ServeError, Server, init};
pub use self::store::StoreError;
