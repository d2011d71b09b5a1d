//! The numbers of the vocabulary, each with its own type, so that a slot is never taken for an
//! expert. No arithmetic lives here.

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// One worker process with one device, numbered from 0 within its group.
    RankId(u32)
}
id! {
    /// An expert of one layer, numbered from 0.
    ExpertId(u32)
}
id! {
    /// Room for one expert of one layer, numbered over the whole group: slot `s` is on rank
    /// `s / slots_per_rank`.
    SlotId(u32)
}
