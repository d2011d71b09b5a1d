//! What policies are asked: one record for each kind of policy, with the rules that its answer must keep.

use serde::{Deserialize, Serialize};
use wasmtime::component::{Lift, Lower};

use crate::check::{self, Fault};
use crate::contract::{chooser, placer, splitter};
use crate::limits::Profile;

/// What a policy decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Where experts live.
    Placement,
    /// How tokens are split over replicas.
    Routing,
    /// Which tactic runs.
    Tactics,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Placement, Self::Routing, Self::Tactics];

    /// The name of its world.
    #[must_use]
    pub fn world(self) -> &'static str {
        match self {
            Self::Placement => "placement",
            Self::Routing => "routing",
            Self::Tactics => "tactics",
        }
    }

    /// The interface that decides.
    #[must_use]
    pub fn interface(self) -> &'static str {
        match self {
            Self::Placement => "placer",
            Self::Routing => "splitter",
            Self::Tactics => "chooser",
        }
    }

    /// Time that a decision may take.
    #[must_use]
    pub fn deadline(self, profile: &Profile) -> std::time::Duration {
        match self {
            Self::Placement | Self::Routing => profile.decide,
            Self::Tactics => profile.choose,
        }
    }
}

/// The request of a kind of policy: a record of the contract, with `context` and all else that a decision may
/// depend on.
pub trait Question: Lower + Send + Sync {
    /// What is decided.
    type Decision: Lift + Clone + PartialEq + Send + Sync + 'static;
    /// Who is asked.
    const KIND: Kind;

    /// Holds a decision against every rule of the contract.
    ///
    /// # Errors
    /// The first rule that it breaks.
    fn check(&self, decision: &Self::Decision) -> Result<(), Fault>;
}

impl Question for placer::Request {
    type Decision = placer::Plan;
    const KIND: Kind = Kind::Placement;

    fn check(&self, decision: &placer::Plan) -> Result<(), Fault> {
        check::placement(self, decision)
    }
}

impl Question for splitter::Request {
    type Decision = splitter::Splits;
    const KIND: Kind = Kind::Routing;

    fn check(&self, decision: &splitter::Splits) -> Result<(), Fault> {
        check::routing(self, decision)
    }
}

impl Question for chooser::Request {
    type Decision = chooser::Table;
    const KIND: Kind = Kind::Tactics;

    fn check(&self, decision: &chooser::Table) -> Result<(), Fault> {
        check::tactics(self, decision)
    }
}
