//! The control plane. It knows every worker, keeps what it knows in SQLite, and answers operators over
//! HTTP. No CUDA, no `unsafe`: it builds and runs on any laptop.
//!
//! ```text
//! worker::uplink == WebSocket ==> session -> fleet (who is there, pure) -> api -> operators
//!                                    |                                      ^
//!                                    +------------> store (SQLite) ---------+
//! ```
#![forbid(unsafe_code)]

mod api;
pub mod config;
mod fleet;
pub mod limits;
mod serve;
mod session;
mod state;
mod store;

pub use self::api::document;
pub use self::serve::{ServeError, Server};
pub use self::store::StoreError;
