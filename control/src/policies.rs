//! The sandbox of policies, and what it has loaded. Calls take their thread until they end, so they run where waiting is no
//! harm. Which component a name stands for is `registry`'s to say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use policy_host::store::digest;
use policy_host::{Answer, Component, Host, HostOptions, Question, Verdict, shipped};

use crate::store::StoreError;

/// Why a policy gave nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("there is no policy {name}, expected one of {known}, or the digest of a version")]
    Unknown { name: String, known: String },
    #[error("the policy {name} is absent: {path} cannot be read")]
    Absent { name: String, path: String },
    #[error("the policy {name}: {verdict}")]
    Verdict { name: String, verdict: Verdict },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Folder of compiled policies, in that of the data.
const COMPILED: &str = "policies-compiled";

/// The program that compiles, beside control's own.
const COMPILER: &str = "moeplane-policy";

/// The host, and what it has loaded.
pub(crate) struct Policies {
    host: Host,
    folder: PathBuf,
    /// By digest.
    loaded: Mutex<BTreeMap<String, Arc<Component>>>,
    /// Digests of those that come with moeplane, by name.
    shipped: Mutex<BTreeMap<String, String>>,
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
        Ok(Self { host, folder, loaded: Mutex::default(), shipped: Mutex::default() })
    }

    /// One that is loaded already, by its digest.
    pub(crate) fn loaded(&self, digest: &str) -> Option<Arc<Component>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).get(digest).cloned()
    }

    /// Loads a component, which takes seconds at first.
    pub(crate) async fn load(
        self: &Arc<Self>,
        component: Vec<u8>,
    ) -> Result<Arc<Component>, Verdict> {
        if let Some(loaded) = self.loaded(&digest(&component)) {
            return Ok(loaded);
        }
        let policies = Arc::clone(self);
        in_thread(move || {
            // Outside of the lock: others need not wait.
            let policy = Arc::new(policies.host.load(&component)?);
            let mut loaded = policies.loaded.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(Arc::clone(loaded.entry(policy.digest().to_owned()).or_insert(policy)))
        })
        .await
    }

    /// The policy of this name that comes with moeplane.
    pub(crate) async fn shipped(self: &Arc<Self>, name: &str) -> Result<Arc<Component>, AskError> {
        let known = || self.shipped.lock().unwrap_or_else(PoisonError::into_inner);
        let digest = known().get(name).cloned();
        if let Some(loaded) = digest.and_then(|digest| self.loaded(&digest)) {
            return Ok(loaded);
        }
        let path = shipped::file(&self.folder, name);
        let Ok(component) = tokio::fs::read(&path).await else {
            let (name, path) = (name.to_owned(), path.display().to_string());
            return Err(AskError::Absent { name, path });
        };
        let failed = |verdict| AskError::Verdict { name: name.to_owned(), verdict };
        let policy = self.load(component).await.map_err(failed)?;
        known().insert(name.to_owned(), policy.digest().to_owned());
        Ok(policy)
    }
}

/// Has a policy check settings, a JSON object.
pub(crate) async fn validate(policy: &Arc<Component>, settings: String) -> Result<(), Verdict> {
    let policy = Arc::clone(policy);
    in_thread(move || policy.validate(&settings)).await
}

/// What a policy decides.
pub(crate) async fn decide<Q: Question + 'static>(
    policy: &Arc<Component>,
    question: &Arc<Q>,
) -> Result<Answer<Q::Decision>, Verdict> {
    let (policy, question) = (Arc::clone(policy), Arc::clone(question));
    in_thread(move || policy.decide(&*question)).await
}

async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Verdict> + Send + 'static,
) -> Result<T, Verdict> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|ended| {
        let what = "the thread that asked".to_owned();
        Err(Verdict::Host { what, reason: ended.to_string() })
    })
}
