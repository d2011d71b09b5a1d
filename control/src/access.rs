//! Who may do what: roles, tokens and their hashes. Pure but for making a token; knows no route.

pub(crate) mod rate;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

/// What a token allows. A worker's opens sessions and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Reads.
    Viewer,
    /// Changes what groups do, too.
    Operator,
    /// Decides who may do what, too.
    Admin,
    /// The session of a worker.
    Worker,
}

impl Role {
    const ALL: [Self; 4] = [Self::Viewer, Self::Operator, Self::Admin, Self::Worker];

    /// Its name in the API, in its document, and in the store.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
            Self::Worker => "worker",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// Whether a token of this role may do what `needed` may. An admin does what an operator does, an
    /// operator what a viewer does; workers are apart.
    pub(crate) fn allows(self, needed: Self) -> bool {
        match (self, needed) {
            (Self::Worker, needed) => needed == Self::Worker,
            (own, needed) => needed != Self::Worker && own as u8 >= needed as u8,
        }
    }
}

/// Who asks: the token's name and role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Actor {
    pub(crate) token: u64,
    pub(crate) name: String,
    pub(crate) role: Role,
}

/// A secret that nobody guesses: 256 random bits, with a beginning that scanners for leaked secrets find.
pub(crate) fn new_secret() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(format!("moep_{}", hex(&bytes)))
}

/// SHA-256 in hexadecimal. Secrets carry 256 random bits, so that a slow hash would add nothing.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_include_the_lesser_ones_and_workers_stand_apart() {
        for (role, allowed) in [
            (Role::Viewer, &[Role::Viewer][..]),
            (Role::Operator, &[Role::Viewer, Role::Operator]),
            (Role::Admin, &[Role::Viewer, Role::Operator, Role::Admin]),
            (Role::Worker, &[Role::Worker]),
        ] {
            let got: Vec<Role> = Role::ALL.into_iter().filter(|&r| role.allows(r)).collect();
            assert_eq!(got, allowed, "{}", role.name());
            assert_eq!(Role::named(role.name()), Some(role));
        }
        assert_eq!(Role::named("root"), None);
    }

    #[test]
    fn secrets_are_long_and_differ() {
        let (one, other) = (new_secret().unwrap(), new_secret().unwrap());
        assert!(one.starts_with("moep_") && one.len() == 69 && one != other, "{one} {other}");
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
    }
}
