//! What became of a policy that gave no usable answer, as data: to be stored, shown and counted.

use serde::{Deserialize, Serialize};

use crate::check::Fault;
use crate::contract::meta::Issue;
use crate::contract::types::Error;
use crate::limits::TEXT_BYTES_MAX;

/// Why a component is refused, or a call gave nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// More bytes than a component may have.
    #[error("the component has {bytes} bytes, expected at most {limit}")]
    TooLarge {
        /// Its bytes.
        bytes: u64,
        /// Bytes accepted.
        limit: u64,
    },
    /// Not a component at all, or a broken one.
    #[error("this is no component: {reason}")]
    Malformed {
        /// What was found and what was expected.
        reason: String,
    },
    /// It imports something; a policy imports nothing.
    #[error("the component imports {name:?}, expected no import")]
    Imports {
        /// The first import.
        name: String,
    },
    /// It exports another version of the contract.
    #[error("the component exports {found:?}, expected version {expected} of the contract")]
    Version {
        /// The export.
        found: String,
        /// The version that this host runs.
        expected: String,
    },
    /// It exports no decision, several, or does not describe itself.
    #[error("the component exports {found:?}, expected meta and one of placer, splitter, chooser")]
    Exports {
        /// Its exports.
        found: Vec<String>,
    },
    /// The compiler refuses it.
    #[error("the compiler refuses the component: {reason}")]
    Compile {
        /// Its message.
        reason: String,
    },
    /// The compiler used more time than a component of this size may take.
    #[error("the compiler used {limit_s} s, which is its limit for {bytes} bytes")]
    CompileTime {
        /// The limit, in seconds.
        limit_s: u64,
        /// Bytes of the component.
        bytes: u64,
    },
    /// The compiler died.
    #[error("the compiler ended with {status}, its limit is {limit_bytes} bytes of memory")]
    CompilerDied {
        /// How, and what it said last.
        status: String,
        /// Bytes of address space that it may use.
        limit_bytes: u64,
    },
    /// It cannot be instantiated: a function has another type than the contract's, or it needs too many instances.
    #[error("the component cannot be instantiated: {reason}")]
    Instantiate {
        /// What is wrong.
        reason: String,
    },
    /// It ran past its deadline.
    #[error("no answer after {used_ms} ms, the deadline is {limit_ms} ms")]
    Deadline {
        /// The deadline.
        limit_ms: u64,
        /// When the call was stopped.
        used_ms: u64,
    },
    /// It used up its fuel.
    #[error("no answer within {limit} units of fuel")]
    Fuel {
        /// The limit, all of which was used.
        limit: u64,
    },
    /// It asked for more memory than it may have, and then gave up.
    #[error("{asked} bytes of memory were asked for, the limit is {limit}")]
    Memory {
        /// The limit.
        limit: u64,
        /// Bytes that it would have had.
        asked: u64,
    },
    /// It ran out of stack.
    #[error("the {limit} bytes of stack are used up")]
    Stack {
        /// The limit, all of which was used.
        limit: u64,
    },
    /// It trapped.
    #[error("trapped: {reason}")]
    Trap {
        /// The trap, and the functions that were running where their names are known.
        reason: String,
    },
    /// Its answer is larger than an answer may be.
    #[error("the answer has more than {limit} bytes")]
    OutputTooLarge {
        /// The limit.
        limit: u64,
    },
    /// Its answer cannot be read.
    #[error("the answer cannot be read: {reason}")]
    BadOutput {
        /// What is wrong with it.
        reason: String,
    },
    /// Its answer breaks a rule of the contract.
    #[error("the answer is refused: {0}")]
    Refused(Fault),
    /// Two calls with the same request gave different answers or used different fuel.
    #[error("the same request gave different {what}")]
    NotDeterministic {
        /// What differs.
        what: String,
    },
    /// The policy finds the request impossible.
    #[error("the policy calls the request invalid: {message}")]
    InvalidInput {
        /// Its message.
        message: String,
    },
    /// The policy chooses not to decide: what is in force stays.
    #[error("the policy declines: {message}")]
    Declined {
        /// Its message.
        message: String,
    },
    /// The policy refuses settings.
    #[error("the settings are refused: {}", listed(issues))]
    Settings {
        /// Everything wrong with them.
        issues: Vec<Issue>,
    },
    /// The policy decides something else than it was asked for.
    #[error("this is a {found} policy, expected a {expected} policy")]
    Kind {
        /// What it decides.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// As many calls run as may run at a time.
    #[error("{limit} calls of policies are running, try again")]
    Busy {
        /// Calls that may run at a time.
        limit: u32,
    },
    /// The host itself failed: a file, a process.
    #[error("{what}: {reason}")]
    Host {
        /// What the host was doing.
        what: String,
        /// What went wrong.
        reason: String,
    },
}

/// Issues of settings that are kept.
const ISSUES_MAX: usize = 64;

/// A policy's own words, as many as are kept: they are data of somebody else.
fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

/// What is wrong with settings, in one line.
fn listed(issues: &[Issue]) -> String {
    let shown = |Issue { path, message }: &Issue| match path.as_str() {
        "" => message.clone(),
        path => format!("{path}: {message}"),
    };
    issues.iter().map(shown).collect::<Vec<_>>().join("; ")
}

impl Verdict {
    pub(crate) fn host(what: &str, reason: impl std::fmt::Display) -> Self {
        Self::Host { what: what.to_owned(), reason: reason.to_string() }
    }

    /// What a policy says of settings that it refuses, as much as anybody reads.
    pub(crate) fn settings(issues: Vec<Issue>) -> Self {
        let short = |Issue { path, message }| Issue { path: cut(path), message: cut(message) };
        Self::Settings { issues: issues.into_iter().take(ISSUES_MAX).map(short).collect() }
    }

    /// Whether the policy is to blame, rather than the machine or the moment.
    #[must_use]
    pub fn is_fault(&self) -> bool {
        !matches!(self, Self::Declined { .. } | Self::Busy { .. } | Self::Host { .. })
    }
}

impl From<Error> for Verdict {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidInput(message) => Self::InvalidInput { message: cut(message) },
            Error::Decline(message) => Self::Declined { message: cut(message) },
        }
    }
}
