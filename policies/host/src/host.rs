//! Turns the bytes of a component into a policy that may be asked: gate, compiler, store, preflight.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::compiler::Compiler;
use crate::component::{Component, Runtime};
use crate::engine::{self, Ticker};
use crate::limits::CompileLimits;
use crate::store::{self, Found, Store};
use crate::verdict::Verdict;
use crate::{gate, native_code, preflight};

/// Where a host has what it needs.
#[derive(Debug, Clone)]
pub struct HostOptions {
    /// Folder of compiled components and their key; made where it does not exist.
    pub store: PathBuf,
    /// The program `moeplane-policy`, which compiles.
    pub compiler: PathBuf,
    /// Deadline of every call in place of those of [`limits`](crate::limits): for replays and comparisons, which fuel
    /// bounds whatever else the machine does.
    pub deadline: Option<Duration>,
}

/// Loads components. One for a process: it holds the pool of instances.
pub struct Host {
    runtime: Arc<Runtime>,
    store: Store,
    compiler: Compiler,
}

impl Host {
    /// Starts the engine and opens the store.
    ///
    /// # Errors
    /// [`Verdict::Host`].
    pub fn new(options: &HostOptions) -> Result<Self, Verdict> {
        let engine = engine::engine()?;
        let ticker = Ticker::start(&engine)?;
        let runtime = Arc::new(Runtime { engine, ticker, deadline: options.deadline });
        let compiler = Compiler::new(options.compiler.clone());
        Ok(Self { runtime, store: Store::open(&options.store)?, compiler })
    }

    /// Checks `component`, compiles it unless that was done before, and tries it on example requests. Takes
    /// milliseconds to seconds: not for a thread that serves others.
    ///
    /// # Errors
    /// Those of [`gate::check`] and of [`Compiler::compile`]; what describing itself, validating the settings `{}` and
    /// deciding an example lead to.
    pub fn load(&self, component: &[u8]) -> Result<Component, Verdict> {
        self.load_within(component, CompileLimits::for_size(component.len() as u64))
    }

    /// [`Self::load`] with other limits for the compiler.
    ///
    /// # Errors
    /// As there.
    pub fn load_within(
        &self,
        component: &[u8],
        limits: CompileLimits,
    ) -> Result<Component, Verdict> {
        let passed = gate::check(component)?;
        let digest = store::digest(component);
        let code = match self.kept(&digest)? {
            Some(code) => code,
            None => {
                let code = self.compiler.compile(component, limits)?;
                let sealed = self.store.seal(&digest, &code)?;
                native_code::load(&self.runtime.engine, &sealed)
                    .map_err(|error| Verdict::host("loading what was just compiled", error))?
            }
        };
        let loaded = Component::new(&self.runtime, &code, passed, digest)?;
        preflight::run(&loaded)?;
        Ok(loaded)
    }

    /// What was compiled before. A file that must not be run, or that this machine cannot run, is as good as none.
    fn kept(&self, digest: &str) -> Result<Option<wasmtime::component::Component>, Verdict> {
        let reason = match self.store.find(digest)? {
            Found::Nothing => return Ok(None),
            Found::Unusable(reason) => reason,
            Found::Code(sealed) => match native_code::load(&self.runtime.engine, &sealed) {
                Ok(code) => return Ok(Some(code)),
                Err(error) => format!("{error:#}"),
            },
        };
        warn!(policy = digest, reason, "a compiled policy cannot be used and is compiled again");
        Ok(None)
    }

    /// The store of compiled components.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }
}
