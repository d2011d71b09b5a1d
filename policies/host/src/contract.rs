//! The records of `policies/wit/v0.1` as Rust types, generated from that folder, which has their meaning.

#[expect(missing_docs, reason = "generated, and documented in the folder")]
mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit/v0.1",
        // Records that worlds share exist once if one world exports them all. No component has this one.
        inline: "
            package moeplane:host;
            world every {
                export moeplane:policy/meta@0.1.0;
                export moeplane:policy/placer@0.1.0;
                export moeplane:policy/splitter@0.1.0;
                export moeplane:policy/chooser@0.1.0;
            }
        ",
        world: "moeplane:host/every",
        additional_derives: [PartialEq, serde::Serialize, serde::Deserialize],
    });
}

pub use bindings::exports::moeplane::policy::{chooser, meta, placer, splitter};
pub use bindings::moeplane::policy::types;

/// A slot without an expert.
pub const EMPTY: u32 = u32::MAX;
