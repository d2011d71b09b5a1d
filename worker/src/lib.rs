//! The daemon that owns one rank's device and serves its engine. Contains no `unsafe`, no SQL, no
//! HTTP server and no wasm.
#![forbid(unsafe_code)]

pub mod check;
pub mod config;
mod connection;
mod failure;
pub mod limits;
mod load;
mod migrate;
mod model;
mod orders;
mod placement;
mod pulse;
mod rank;
pub mod simulated;
mod socket;
mod start;
pub mod tactics;
mod uplink;
mod watch;
mod wire;

pub use self::placement::PlaceError;
pub use self::rank::Rank;
pub use self::start::StartError;
