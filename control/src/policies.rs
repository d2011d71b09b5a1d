//! Policies that control runs: those that come with moeplane, loaded when they are first asked. Calls take their thread
//! until they end, so they run where waiting is no harm.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use policy_host::{Answer, Component, Host, HostOptions, Question, Verdict, shipped};

/// Why a policy gave nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("there is no policy {name}, expected one of {known}")]
    Unknown { name: String, known: String },
    #[error("the policy {name} is absent: {path} cannot be read")]
    Absent { name: String, path: String },
    #[error("the policy {name}: {verdict}")]
    Verdict { name: String, verdict: Verdict },
}

/// Folder of compiled policies, in that of the data.
const COMPILED: &str = "policies-compiled";

/// The program that compiles, beside control's own.
const COMPILER: &str = "moeplane-policy";

/// The host, and what it has loaded.
pub(crate) struct Policies {
    host: Host,
    folder: PathBuf,
    loaded: Mutex<BTreeMap<String, Arc<Component>>>,
}

impl std::fmt::Debug for Policies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Policies").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Policies {
    /// Starts the host.
    pub(crate) fn open(data: &Path, folder: PathBuf) -> Result<Self, Verdict> {
        let beside = std::env::current_exe().map(|program| program.with_file_name(COMPILER));
        let host = Host::new(&HostOptions {
            store: data.join(COMPILED),
            compiler: beside.unwrap_or_else(|_unknown| COMPILER.into()),
            deadline: None,
        })?;
        Ok(Self { host, folder, loaded: Mutex::default() })
    }

    /// Asks a policy by its name, with settings that it accepts: who answered, and the answer.
    pub(crate) async fn ask<Q: Question + 'static>(
        self: &Arc<Self>,
        name: &str,
        settings: String,
        question: Arc<Q>,
    ) -> Result<(Arc<Component>, Answer<Q::Decision>), AskError> {
        let (policies, of) = (Arc::clone(self), name.to_owned());
        let asked = tokio::task::spawn_blocking(move || {
            let policy = policies.load(&of)?;
            let failed = |verdict| AskError::Verdict { name: of.clone(), verdict };
            policy.validate(&settings).map_err(failed)?;
            let answer = policy.decide(&*question).map_err(failed)?;
            Ok((policy, answer))
        });
        asked.await.unwrap_or_else(|ended| {
            let what = "the thread that asked".to_owned();
            let verdict = Verdict::Host { what, reason: ended.to_string() };
            Err(AskError::Verdict { name: name.to_owned(), verdict })
        })
    }

    fn load(&self, name: &str) -> Result<Arc<Component>, AskError> {
        let name = name.replace('-', "_");
        if !shipped::POLICIES.iter().any(|(known, _)| *known == name) {
            let known = shipped::POLICIES.map(|(known, _)| known).join(", ");
            return Err(AskError::Unknown { name, known });
        }
        let lock = || self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(policy) = lock().get(&name) {
            return Ok(Arc::clone(policy));
        }
        let path = shipped::file(&self.folder, &name);
        let Ok(bytes) = std::fs::read(&path) else {
            return Err(AskError::Absent { name, path: path.display().to_string() });
        };
        // Compiled outside of the lock: it takes seconds at first, and others need not wait.
        let policy = self.host.load(&bytes);
        let policy = policy.map_err(|verdict| AskError::Verdict { name: name.clone(), verdict })?;
        Ok(Arc::clone(lock().entry(name).or_insert_with(|| Arc::new(policy))))
    }
}
