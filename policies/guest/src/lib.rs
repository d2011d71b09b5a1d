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

/// One world. Macros that export live at the root of the crate, where those of several worlds would collide; only a
/// component needs them, and it has one world.
macro_rules! world {
    ($world:literal, $decision:ident) => {
        #[cfg(target_family = "wasm")]
        wit_bindgen::generate!({
            path: "../wit/v0.1",
            world: $world,
            with: { "moeplane:policy/types@0.1.0": crate::types },
            additional_derives: [PartialEq, serde::Serialize, serde::Deserialize],
            pub_export_macro: true,
        });
        #[cfg(not(target_family = "wasm"))]
        wit_bindgen::generate!({
            path: "../wit/v0.1",
            world: $world,
            with: { "moeplane:policy/types@0.1.0": crate::types },
            additional_derives: [PartialEq, serde::Serialize, serde::Deserialize],
        });

        pub use exports::moeplane::policy::{$decision, meta};

        /// What a table of settings says of some.
        pub fn validate(
            table: &[crate::settings::Field],
            settings: &str,
        ) -> Result<(), Vec<meta::Issue>> {
            let issue = |crate::settings::Issue { path, message }| meta::Issue { path, message };
            let read = crate::settings::Settings::read(table, settings).map(|_| ());
            read.map_err(|issues| issues.into_iter().map(issue).collect())
        }
    };
}

/// The world `placement`.
#[cfg(feature = "placement")]
#[expect(missing_docs, reason = "generated, and documented in the folder")]
pub mod placement {
    world!("placement", placer);
}

/// The world `routing`.
#[cfg(feature = "routing")]
#[expect(missing_docs, reason = "generated, and documented in the folder")]
pub mod routing {
    world!("routing", splitter);
}

/// The world `tactics`.
#[cfg(feature = "tactics")]
#[expect(missing_docs, reason = "generated, and documented in the folder")]
pub mod tactics {
    world!("tactics", chooser);
}
