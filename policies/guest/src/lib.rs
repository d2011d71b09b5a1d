//! What policies written in Rust share: the contract as Rust types, generated from `policies/wit/v0.1`, settings from a
//! table, and requests as the planners of `planning` take them. Takes no decision.
//!
//! A policy chooses its world by a feature, implements the two traits `Guest` of `exports`, and exports them:
//!
//! ```ignore
//! #[cfg(target_family = "wasm")]
//! policy_guest::placement::export!(MyPolicy with_types_in policy_guest::placement);
//! ```
#![deny(missing_docs)]

pub mod group;
pub mod load;
pub mod settings;

#[cfg(feature = "placement")]
pub mod plan;
#[cfg(feature = "placement")]
pub mod steps;

mod shared {
    wit_bindgen::generate!({
        path: "../wit/v0.1",
        inline: "
            package moeplane:guest;
            world shared {
                import moeplane:policy/types@0.1.0;
            }
        ",
        world: "moeplane:guest/shared",
        generate_all,
        additional_derives: [PartialEq, serde::Serialize, serde::Deserialize],
    });
}

/// The records that worlds share.
pub use shared::moeplane::policy::types;

/// The world `placement`.
#[cfg(feature = "placement")]
#[expect(missing_docs, reason = "generated, and documented in the folder")]
pub mod placement {
    wit_bindgen::generate!({
        path: "../wit/v0.1",
        world: "placement",
        with: { "moeplane:policy/types@0.1.0": crate::types },
        additional_derives: [PartialEq, serde::Serialize, serde::Deserialize],
        pub_export_macro: true,
    });

    pub use exports::moeplane::policy::{meta, placer};

    impl From<crate::settings::Issue> for meta::Issue {
        fn from(issue: crate::settings::Issue) -> Self {
            Self { path: issue.path, message: issue.message }
        }
    }
}
