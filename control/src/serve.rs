//! From a configuration to a control plane that answers, and to its orderly end.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use policy_host::{Verdict, shipped};
use protocol::placement::FileError;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::access::{Role, new_secret, sha256};
use crate::advise;
use crate::api;
use crate::choose;
use crate::config::Config;
use crate::fleet::Fleet;
use crate::limits::{
    ANSWER_HOURS, FAREWELL_SECONDS, FORGET_SECONDS, SESSIONS_MAX, SETTLED_TICK_MS,
};
use crate::migrate;
use crate::placing::PlacementFile;
use crate::policies::Policies;
use crate::recover;
use crate::shadow;
use crate::state::{State, now_ms};
use crate::store::audit::Entry;
use crate::store::tokens::NewToken;
use crate::store::windows::{HOUR_MS, Of, Span};
use crate::store::{Store, StoreError};
use crate::tls::{TlsConfig, TlsError, TlsListener};

/// Names in the data folder.
const DATABASE: &str = "control.sqlite";
const CREDENTIAL: &str = "worker-credential";
const ADDRESS: &str = "address";

/// Why control does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file or folder.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of placements.
    #[error("the placement of the group {group} cannot be used")]
    Placement {
        /// The group.
        group: String,
        /// Why.
        #[source]
        source: FileError,
    },
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The sandbox of policies.
    #[error("policies cannot be run")]
    Policies(#[from] Verdict),
    /// The address.
    #[error("cannot listen at {address}")]
    Listen {
        /// It.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server.
    #[error("the server failed")]
    Serve(#[source] io::Error),
    /// The API's document.
    #[error("the API's document cannot be made")]
    Document(#[source] serde_json::Error),
    /// A secret.
    #[error("there are no random numbers")]
    Random(#[from] getrandom::Error),
}

/// Why there is no first token.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is one.
    #[error("{} has an admin token already, expected none; --another makes one more", data.display())]
    Done {
        /// The data folder.
        data: PathBuf,
    },
    /// The folder.
    #[error(transparent)]
    Folder(#[from] ServeError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A control plane that listens.
#[derive(Debug)]
pub struct Server {
    state: Arc<State>,
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    stop: watch::Sender<bool>,
    address: PathBuf,
}

impl Server {
    /// Opens the database, remembers the workers, and listens. The address is written to the data
    /// folder once it can be connected to.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn start(config: Config) -> Result<Self, ServeError> {
        let data = config.data.clone();
        let read = |(group, path): (&String, &PathBuf)| match PlacementFile::read(path) {
            Ok(file) => Ok((group.clone(), file)),
            Err(source) => Err(ServeError::Placement { group: group.clone(), source }),
        };
        let files = config.placements.iter().map(read).collect::<Result<_, _>>()?;
        let store = open(&data).await?;
        if !store.has_admin(now_ms()).await? {
            tracing::warn!("nobody has a token yet: moeplane-control init makes the first");
        }
        let absent = shipped::absent(&config.policies);
        if !absent.is_empty() {
            let folder = config.policies.display();
            tracing::warn!(%folder, ?absent, "policies are absent: cargo xtask policies makes them");
        }
        let policies = Policies::open(&data, config.policies.clone())?;
        let mut fleet = Fleet::default();
        for worker in store.workers().await? {
            fleet.remember(worker.register, (worker.first_seen_ms, worker.last_seen_ms));
        }
        let tls = config.tls.as_ref().map(TlsConfig::load).transpose()?;
        let listen = config.listen;
        let refused = |source| ServeError::Listen { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(refused)?;
        let bound = listener.local_addr().map_err(refused)?;
        let (stop, stopped) = watch::channel(false);
        let state = Arc::new(State::new((config, files), (store, policies), stopped, fleet));
        let address = data.join(ADDRESS);
        // Whole or not at all: somebody may be waiting for it.
        let beside = data.join(format!("{ADDRESS}.new"));
        fs::write(&beside, format!("{bound}\n")).map_err(failed("write", &beside))?;
        fs::rename(&beside, &address).map_err(failed("write", &address))?;
        tracing::info!(address = %bound, data = %data.display(), "ready");
        Ok(Self { state, listener, tls, stop, address })
    }

    /// Answers until `end` completes; requests that have begun are answered first.
    ///
    /// # Errors
    /// [`ServeError::Serve`].
    pub async fn serve(
        self,
        end: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ServeError> {
        let Self { state, listener, tls, stop, address } = self;
        let forgetting = tokio::spawn(forget(Arc::clone(&state)));
        let settling = tokio::spawn(tell_settled(Arc::clone(&state)));
        let advising = tokio::spawn(advise::run(Arc::clone(&state)));
        let shadowing = tokio::spawn(shadow::run(Arc::clone(&state)));
        let choosing = tokio::spawn(choose::run(Arc::clone(&state)));
        let migrating = tokio::spawn(migrate::run(Arc::clone(&state)));
        let recovering = tokio::spawn(recover::run(Arc::clone(&state)));
        let ended = async move {
            end.await;
            // Sessions and streams end by themselves then.
            stop.send_replace(true);
        };
        let router = api::router(Arc::clone(&state)).map_err(ServeError::Document)?;
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        let served = match tls {
            None => axum::serve(listener, service).with_graceful_shutdown(ended).await,
            Some(tls) => {
                // Tapped, because only then does axum tell the address of who connects.
                let listener = TlsListener::new(listener, tls).tap_io(|_| {});
                axum::serve(listener, service).with_graceful_shutdown(ended).await
            }
        };
        // The server does not wait for connections that have become sessions.
        let farewell = Duration::from_secs(FAREWELL_SECONDS);
        if tokio::time::timeout(farewell, state.sessions.acquire_many(SESSIONS_MAX)).await.is_err()
        {
            tracing::warn!("sessions are still open");
        }
        forgetting.abort();
        settling.abort();
        advising.abort();
        migrating.abort();
        recovering.abort();
        shadowing.abort();
        choosing.abort();
        state.store.close().await;
        fs::remove_file(&address).map_err(failed("remove", &address))?;
        tracing::info!("stopped");
        served.map_err(ServeError::Serve)
    }
}

/// Makes old windows hours, and forgets hours that are too old, again and again.
async fn forget(state: Arc<State>) {
    let Config { windows_hours, hours_days, .. } = state.config;
    let before = |hours: u64| now_ms().saturating_sub(hours * HOUR_MS);
    let mut time = tokio::time::interval(Duration::from_secs(FORGET_SECONDS));
    loop {
        time.tick().await;
        let rolled_up = state.store.roll_up(before(windows_hours)).await;
        let forgotten = state.store.forget_hours(before(hours_days * 24)).await;
        let answers = state.store.forget_answers(before(ANSWER_HOURS)).await;
        match (rolled_up, forgotten, answers) {
            (Ok(made), Ok(forgotten), Ok(())) => tracing::debug!(made, forgotten, "hours of load"),
            (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => {
                tracing::error!(error = &error as &dyn std::error::Error, "what is old stays");
            }
        }
    }
}

/// Tells those who watch of each window once all ranks have had the time to tell theirs.
async fn tell_settled(state: Arc<State>) {
    // What has settled before control starts is no news.
    let mut told = state.settled_ms();
    let mut time = tokio::time::interval(Duration::from_millis(SETTLED_TICK_MS));
    loop {
        time.tick().await;
        let settled = state.settled_ms();
        match tell_windows(&state, (told, settled)).await {
            Ok(()) => told = told.max(settled),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "windows are not told of yet");
            }
        }
    }
}

/// Tells of each group's newest window that ended in (`after_ms`, `until_ms`].
async fn tell_windows(state: &State, (after_ms, until_ms): (u64, u64)) -> Result<(), StoreError> {
    let groups = state.fleet().models();
    for (group, model) in &groups {
        let of = Of { group, model, span: Span::Window };
        let newest = state.store.newest_end(of, until_ms).await?;
        if let Some(end_ms) = newest.filter(|end_ms| *end_ms > after_ms) {
            let window = json!({ "group": group, "end_ms": end_ms });
            state.store.tell("window", &window, now_ms()).await?;
        }
    }
    Ok(())
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ServeError {
    let path = path.to_owned();
    move |source| ServeError::File { action, path, source }
}

/// The hash of the workers' credential, which is made at the first start.
fn credential(path: &Path) -> Result<String, ServeError> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match made {
        Ok(mut file) => {
            writeln!(file, "{}", new_secret()?).map_err(failed("write", path))?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("make", path)(error)),
    }
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    Ok(sha256(text.trim().as_bytes()))
}

/// Makes the data folder if need be, and an admin's token; its secret.
///
/// # Errors
/// See [`InitError`].
pub async fn init(config: &Config, another: bool) -> Result<String, InitError> {
    let store = open(&config.data).await?;
    if !another && store.has_admin(now_ms()).await? {
        return Err(InitError::Done { data: config.data.clone() });
    }
    let secret = new_secret().map_err(ServeError::from)?;
    let hash = sha256(secret.as_bytes());
    let new = NewToken { name: "admin", role: Role::Admin, sha256: &hash, expires_ms: None };
    let who = ("moeplane-control init", Role::Admin);
    store.make_token(new, Entry::new(who, "token.make", now_ms(), ("init", ""))).await?;
    store.close().await;
    Ok(secret)
}

/// Opens the database of a data folder, which knows the folder's credential of workers.
async fn open(data: &Path) -> Result<Store, ServeError> {
    fs::create_dir_all(data).map_err(failed("make", data))?;
    let sha256 = &credential(&data.join(CREDENTIAL))?;
    let store = Store::open(&data.join(DATABASE)).await?;
    let new = NewToken { name: CREDENTIAL, role: Role::Worker, sha256, expires_ms: None };
    let who = ("moeplane-control", Role::Admin);
    let entry = Entry::new(who, "token.make", now_ms(), ("the data folder's credential", ""));
    store.know_credential(new, entry).await?;
    Ok(store)
}
