//! A loaded policy: a fresh instance for every call, and nothing survives one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::component::{
    Component as Code, ComponentExportIndex, ComponentNamedList, InstancePre, Lift, Linker, Lower,
};
use wasmtime::{Engine, ResourceLimiter, Store, Trap, WasmBacktrace};

use crate::check;
use crate::contract::meta::{Info, Issue};
use crate::contract::types::Error;
use crate::engine::Ticker;
use crate::gate::Passed;
use crate::limits::{CALLS_MAX, Profile, STACK_BYTES, TICK};
use crate::question::{Kind, Question};
use crate::verdict::Verdict;

/// What a call gave, and what it cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer<T> {
    /// What the policy said.
    pub value: T,
    /// Units of fuel. Equal requests use equal fuel, on every machine.
    pub fuel: u64,
    /// Time of the call, reading the answer included.
    pub elapsed: Duration,
}

/// Engine and ticks, shared by the components of a host.
pub(crate) struct Runtime {
    pub(crate) engine: Engine,
    pub(crate) ticker: Ticker,
    /// Deadline of every call in place of the profile's.
    pub(crate) deadline: Option<Duration>,
}

/// A loaded policy. May be asked by several threads at once; a call occupies its thread until it ends.
pub struct Component {
    runtime: Arc<Runtime>,
    instance: InstancePre<Limiter>,
    exports: Exports,
    kind: Kind,
    profile: Profile,
    digest: String,
    info: Info,
}

impl std::fmt::Debug for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, digest, info, .. } = self;
        let mut shown = f.debug_struct("Component");
        shown.field("kind", kind).field("digest", digest).field("info", info).finish()
    }
}

struct Exports {
    describe: ComponentExportIndex,
    validate: ComponentExportIndex,
    decide: ComponentExportIndex,
}

impl Component {
    pub(crate) fn new(
        runtime: &Arc<Runtime>,
        code: &Code,
        passed: Passed,
        digest: String,
    ) -> Result<Self, Verdict> {
        let Passed { kind, profile } = passed;
        let instance = Linker::new(&runtime.engine).instantiate_pre(code).map_err(broken)?;
        let exports = Exports {
            describe: export(runtime, code, "meta", "describe")?,
            validate: export(runtime, code, "meta", "validate")?,
            decide: export(runtime, code, kind.interface(), "decide")?,
        };
        let none = String::new;
        let info = Info { name: none(), version: none(), summary: none(), settings_schema: none() };
        let runtime = Arc::clone(runtime);
        let mut made = Self { runtime, instance, exports, kind, profile, digest, info };
        let deadline = made.profile.decide;
        made.info = made.call::<(), (Info,)>(&made.exports.describe, (), deadline)?.value.0;
        check::info(&made.info).map_err(Verdict::Refused)?;
        Ok(made)
    }

    /// What it decides.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// SHA-256 of the component, hexadecimal.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What it says of itself.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// What a call of it may use.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Lets it check settings, a JSON object.
    ///
    /// # Errors
    /// [`Verdict::Settings`] with everything that is wrong; the verdicts of a call.
    pub fn validate(&self, settings: &str) -> Result<(), Verdict> {
        type Returned = (Result<(), Vec<Issue>>,);
        let deadline = self.profile.decide;
        let answer =
            self.call::<(&str,), Returned>(&self.exports.validate, (settings,), deadline)?;
        answer.value.0.map_err(Verdict::settings)
    }

    /// A decision that keeps every rule of the contract.
    ///
    /// # Errors
    /// [`Verdict::Refused`] for one that does not; [`Verdict::Declined`] and [`Verdict::InvalidInput`] are the
    /// policy's own words; the other verdicts of a call.
    pub fn decide<Q: Question>(&self, question: &Q) -> Result<Answer<Q::Decision>, Verdict> {
        let answer = self.decide_unchecked(question)?;
        question.check(&answer.value).map_err(Verdict::Refused)?;
        Ok(answer)
    }

    /// A decision as the policy gives it, for comparisons with plans that are no placements. Nothing may be carried out
    /// by it.
    ///
    /// # Errors
    /// As [`Self::decide`], but never [`Verdict::Refused`].
    pub fn decide_unchecked<Q: Question>(
        &self,
        question: &Q,
    ) -> Result<Answer<Q::Decision>, Verdict> {
        if self.kind != Q::KIND {
            let (found, expected) = (self.kind.world().to_owned(), Q::KIND.world().to_owned());
            return Err(Verdict::Kind { found, expected });
        }
        let deadline = self.kind.deadline(&self.profile);
        let Answer { value: (returned,), fuel, elapsed } = self
            .call::<(&Q,), (Result<Q::Decision, Error>,)>(
                &self.exports.decide,
                (question,),
                deadline,
            )?;
        Ok(Answer { value: returned?, fuel, elapsed })
    }

    fn call<P, R>(
        &self,
        export: &ComponentExportIndex,
        parameters: P,
        deadline: Duration,
    ) -> Result<Answer<R>, Verdict>
    where
        P: ComponentNamedList + Lower + Send + Sync,
        R: ComponentNamedList + Lift + Send + Sync + 'static,
    {
        let began = Instant::now();
        let profile = &self.profile;
        let deadline = self.runtime.deadline.unwrap_or(deadline);
        // Held until the instance is back in the pool: dropped after the store.
        let _running = self.runtime.ticker.run().ok_or(Verdict::Busy { limit: CALLS_MAX })?;
        let mut store = Store::new(&self.runtime.engine, Limiter::new(profile));
        store.limiter(|limiter| limiter);
        store.set_hostcall_fuel(profile.output_bytes);
        let preparing = |error| Verdict::host("preparing a call", error);
        store.set_fuel(profile.fuel).map_err(preparing)?;
        // Before instantiation: a start function is the component's code too. The tick under way may be nearly over,
        // so one more is granted.
        let ticks = deadline.as_nanos() / TICK.as_nanos() + 1;
        store.set_epoch_deadline(u64::try_from(ticks).unwrap_or(u64::MAX));
        let limits = Limits { deadline, began };
        let verdict = |error, store: &Store<Limiter>| self.verdict(&error, store.data(), &limits);
        let instance = match self.instance.instantiate(&mut store) {
            Ok(instance) => instance,
            Err(error) => {
                return Err(match verdict(error, &store) {
                    Verdict::BadOutput { reason } => Verdict::Instantiate { reason },
                    other => other,
                });
            }
        };
        let function = instance.get_typed_func::<P, R>(&mut store, export).map_err(broken)?;
        let value =
            function.call(&mut store, parameters).map_err(|error| verdict(error, &store))?;
        let left = store.get_fuel().map_err(preparing)?;
        Ok(Answer { value, fuel: profile.fuel - left, elapsed: began.elapsed() })
    }

    fn verdict(&self, error: &wasmtime::Error, limiter: &Limiter, limits: &Limits) -> Verdict {
        let profile = &self.profile;
        if let Some(asked) = limiter.refused {
            return Verdict::Memory { limit: profile.memory_bytes as u64, asked: asked as u64 };
        }
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => Verdict::Deadline {
                limit_ms: ms(limits.deadline),
                used_ms: ms(limits.began.elapsed()),
            },
            Some(Trap::OutOfFuel) => Verdict::Fuel { limit: profile.fuel },
            Some(Trap::StackOverflow) => Verdict::Stack { limit: STACK_BYTES as u64 },
            Some(trap) => Verdict::Trap { reason: trapped(*trap, error) },
            None => {
                let reason = format!("{error:#}");
                // wasmtime has no type for this one.
                if reason.contains("fuel allocated for hostcalls") {
                    return Verdict::OutputTooLarge { limit: profile.output_bytes as u64 };
                }
                Verdict::BadOutput { reason }
            }
        }
    }
}

/// What bounds one call in time.
struct Limits {
    deadline: Duration,
    began: Instant,
}

fn broken(error: wasmtime::Error) -> Verdict {
    Verdict::Instantiate { reason: format!("{error:#}") }
}

/// The trap, and the functions that led to it, innermost first, where the component kept their names; without those by which
/// Rust panics, which say nothing of the policy.
fn trapped(trap: Trap, error: &wasmtime::Error) -> String {
    let frames = error.downcast_ref::<WasmBacktrace>().map_or(&[][..], WasmBacktrace::frames);
    let names = frames.iter().filter_map(|frame| frame.func_name());
    let names = names.map(|name| format!("{:#}", rustc_demangle::demangle(name)));
    let of_policy = |name: &String| {
        let machinery = ["__rust", "rust_", "std::panicking", "core::panicking", "std::sys"];
        !machinery.iter().any(|part| name.starts_with(part))
    };
    let names: Vec<String> = names.filter(of_policy).collect();
    if names.is_empty() { trap.to_string() } else { format!("{trap} in {}", names.join(" < ")) }
}

fn export(
    runtime: &Runtime,
    code: &Code,
    interface: &str,
    function: &str,
) -> Result<ComponentExportIndex, Verdict> {
    let prefix = format!("moeplane:policy/{interface}@");
    let kind = code.component_type();
    let mut names = kind.exports(&runtime.engine).map(|(name, _)| name);
    let index = names
        .find(|name| name.starts_with(&prefix))
        .and_then(|name| code.get_export_index(None, name))
        .and_then(|instance| code.get_export_index(Some(&instance), function));
    let missing = || Verdict::Instantiate { reason: format!("{prefix}… lacks {function}") };
    index.ok_or_else(missing)
}

/// Bounds what an instance may grow to, and remembers that it wanted more.
struct Limiter {
    profile: Profile,
    memory_bytes: usize,
    refused: Option<usize>,
}

impl Limiter {
    fn new(profile: &Profile) -> Self {
        Self { profile: *profile, memory_bytes: 0, refused: None }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self.memory_bytes.saturating_add(desired.saturating_sub(current));
        let fits = total <= self.profile.memory_bytes;
        if fits {
            self.memory_bytes = total;
        } else {
            self.refused = Some(total);
        }
        Ok(fits)
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(desired <= self.profile.table_elements)
    }

    fn instances(&self) -> usize {
        // The component's own instance counts as well.
        self.profile.instances as usize + 1
    }

    fn tables(&self) -> usize {
        self.profile.tables as usize
    }

    fn memories(&self) -> usize {
        self.profile.memories as usize
    }
}
