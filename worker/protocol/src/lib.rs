//! What engines and workers say to each other over a Unix socket, and the client that an engine
//! links. A leaf: of the workspace it depends on `routing` alone, which it hands on, and does no
//! arithmetic on tensors, which cross in shared memory. `unsafe` lives in `buffer.rs` alone.
//!
//! ```text
//! engine                                   worker
//!   Hello {client, features}       ->
//!                                  <-      Welcome {worker, model, features}
//!   Attach {act, weights_in, ...}  ->
//!                                  <-      Attached {layers, layout} + descriptor of the buffer
//!   (writes hidden states, ids, weights into the buffer)
//!   Call {layer, tokens, ...} seq  ->
//!                                  <-      Done seq        (the output is in the buffer)
//!                                  or      Refused seq {code, values}
//!   Idle {idle} seq                ->
//!                                  <-      Done seq
//! ```
//!
//! A refusal costs the frame that it answers and nothing else; see [`refusal::Refusal`].
#![warn(missing_docs)]

pub mod buffer;
pub mod client;
pub mod frame;
pub mod ids;
pub mod message;
pub mod placement;
pub mod refusal;
pub mod session;
pub mod stream;
pub mod tactics;

/// Experts and weights of tokens from the logits of a model's router, for engines that have logits.
pub use routing;
