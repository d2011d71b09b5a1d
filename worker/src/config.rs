//! The worker's configuration: one typed struct from an optional file and command line options,
//! which take the place of the file's values. No other module reads files, arguments or the
//! environment for settings.

use std::fmt;
use std::num::NonZero;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread::available_parallelism;

use kernels::cpu::{CpuOptions, CpuTactic, Isa};
use kernels::cuda::{CudaOptions, CudaTactic, default_cache};
use kernels::heap::RANKS_MAX;
use kernels::heap::shm::default_folder;
use serde::{Deserialize, Serialize};
pub use settings::ConfigError;

use crate::limits::{DEADLINE_MS_DEFAULT, GROUP_TOKENS_DEFAULT, TOKENS_DEFAULT, TOKENS_MAX};

/// A complete configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// The engine's side.
    pub engine: EngineConfig,
    /// The ranks that serve the model together; none for a worker that is alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupConfig>,
    /// The control plane; none for a worker that nobody is to see.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<ControlConfig>,
    /// The device.
    pub device: DeviceConfig,
    /// What is logged.
    pub log: LogConfig,
}

/// The group, and this rank's part in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupConfig {
    /// The group's name: ranks of one name on one host belong together.
    pub name: String,
    /// This rank.
    pub rank: u32,
    /// Ranks of the group.
    pub ranks: u32,
    /// Folder in shared memory where the group's heap is.
    pub dir: PathBuf,
    /// How long a peer that makes no progress is waited for.
    pub deadline_ms: u64,
    /// Slots of each rank and layer; 0 takes as few as hold every expert once.
    pub slots_per_rank: u32,
    /// The expert of every slot of every layer, JSON `[layer][slot]`; experts in order otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<PathBuf>,
}

/// Where control is, and what it knows this worker by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ControlConfig {
    /// Its address, `ws://HOST:PORT`, or `wss://HOST:PORT` with TLS.
    pub url: String,
    /// File with the certificates of those who vouch for control, PEM; with `wss` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// File with the credential of workers; read for each session.
    pub credential: PathBuf,
}

/// How engines reach the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineConfig {
    /// The socket's path.
    pub socket: PathBuf,
    /// Most tokens of a call.
    pub max_tokens: u32,
}

/// Which device, and how it is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DeviceConfig {
    /// The device.
    pub kind: DeviceKind,
    /// Number of the GPU.
    pub gpu: usize,
    /// Folder of compiled device code; the user's cache by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cubin_cache: Option<PathBuf>,
    /// Threads; 0 takes this rank's share of the cores.
    pub threads: usize,
    /// Instructions; by default the fastest there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isa: Option<Isa>,
    /// One tactic for every call, by name; by default each expert gets one by its tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tactic: Option<String>,
    /// File with tactics as `tune` measured them; those of another device, driver or kernel are not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tactics: Option<PathBuf>,
}

/// What computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// This processor.
    #[default]
    Cpu,
    /// A Hopper GPU.
    Cuda,
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err(format!("{name:?} is no device, expected cpu or cuda")),
        }
    }
}

/// What is logged, to standard error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogConfig {
    /// A filter such as `info` or `worker=debug`.
    pub filter: String,
    /// For people or for machines.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Settings as the file or the command line gives them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// See [`Config::model`].
    pub model: Option<PathBuf>,
    /// See [`EngineConfig`].
    #[serde(default)]
    pub engine: EngineSettings,
    /// See [`GroupConfig`].
    #[serde(default)]
    pub group: GroupSettings,
    /// See [`ControlConfig`].
    #[serde(default)]
    pub control: ControlSettings,
    /// See [`DeviceConfig`].
    #[serde(default)]
    pub device: DeviceSettings,
    /// See [`LogConfig`].
    #[serde(default)]
    pub log: LogSettings,
}

/// See [`EngineConfig`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSettings {
    /// See [`EngineConfig::socket`].
    pub socket: Option<PathBuf>,
    /// See [`EngineConfig::max_tokens`].
    pub max_tokens: Option<u32>,
}

/// See [`GroupConfig`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSettings {
    /// See [`GroupConfig::name`].
    pub name: Option<String>,
    /// See [`GroupConfig::rank`].
    pub rank: Option<u32>,
    /// See [`GroupConfig::ranks`].
    pub ranks: Option<u32>,
    /// See [`GroupConfig::dir`].
    pub dir: Option<PathBuf>,
    /// See [`GroupConfig::deadline_ms`].
    pub deadline_ms: Option<u64>,
    /// See [`GroupConfig::slots_per_rank`].
    pub slots_per_rank: Option<u32>,
    /// See [`GroupConfig::placement`].
    pub placement: Option<PathBuf>,
}

/// See [`ControlConfig`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlSettings {
    /// See [`ControlConfig::url`].
    pub url: Option<String>,
    /// See [`ControlConfig::ca`].
    pub ca: Option<PathBuf>,
    /// See [`ControlConfig::credential`].
    pub credential: Option<PathBuf>,
}

/// See [`DeviceConfig`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSettings {
    /// See [`DeviceConfig::kind`].
    pub kind: Option<DeviceKind>,
    /// See [`DeviceConfig::gpu`].
    pub gpu: Option<usize>,
    /// See [`DeviceConfig::cubin_cache`].
    pub cubin_cache: Option<PathBuf>,
    /// See [`DeviceConfig::threads`].
    pub threads: Option<usize>,
    /// See [`DeviceConfig::isa`].
    pub isa: Option<Isa>,
    /// See [`DeviceConfig::tactic`].
    pub tactic: Option<String>,
    /// See [`DeviceConfig::tactics`].
    pub tactics: Option<PathBuf>,
}

/// See [`LogConfig`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    /// See [`LogConfig::filter`].
    pub filter: Option<String>,
    /// See [`LogConfig::format`].
    pub format: Option<LogFormat>,
}

impl Settings {
    /// These settings, and those of `file` where these say nothing; checked.
    ///
    /// # Errors
    /// [`ConfigError::Missing`], [`ConfigError::Value`].
    pub fn over(self, file: Self) -> Result<Config, ConfigError> {
        let missing = |key, option| move || ConfigError::Missing { key, option };
        let model = self.model.or(file.model).ok_or_else(missing("model", "model"))?;
        let socket = self.engine.socket.or(file.engine.socket);
        let socket = socket.ok_or_else(missing("engine.socket", "socket"))?;
        let max_tokens = self.engine.max_tokens.or(file.engine.max_tokens);
        let group = self.group.over(file.group)?;
        let default = if group.is_some() { GROUP_TOKENS_DEFAULT } else { TOKENS_DEFAULT };
        let max_tokens = max_tokens.unwrap_or(default);
        if max_tokens == 0 || max_tokens > TOKENS_MAX {
            let (key, value) = ("engine.max_tokens", max_tokens.to_string());
            return Err(ConfigError::Value { key, value, expected: format!("1 to {TOKENS_MAX}") });
        }
        let device = DeviceConfig {
            kind: self.device.kind.or(file.device.kind).unwrap_or_default(),
            gpu: self.device.gpu.or(file.device.gpu).unwrap_or(0),
            cubin_cache: self.device.cubin_cache.or(file.device.cubin_cache),
            threads: self.device.threads.or(file.device.threads).unwrap_or(0),
            isa: self.device.isa.or(file.device.isa),
            tactic: self.device.tactic.or(file.device.tactic),
            tactics: self.device.tactics.or(file.device.tactics),
        };
        if let (Some(_), Some(path)) = (&device.tactic, &device.tactics) {
            let (key, value) = ("device.tactics", path.display().to_string());
            let expected = "none where device.tactic is one for every call".to_owned();
            return Err(ConfigError::Value { key, value, expected });
        }
        if device.kind == DeviceKind::Cuda && group.is_some() {
            let (key, value) = ("device.kind", "cuda".to_owned());
            let expected = "cpu in a group: GPUs serve alone for now".to_owned();
            return Err(ConfigError::Value { key, value, expected });
        }
        let filter = self.log.filter.or(file.log.filter).unwrap_or_else(|| "info".to_owned());
        let format = self.log.format.or(file.log.format).unwrap_or_default();
        let log = LogConfig { filter, format };
        let control = self.control.over(file.control)?;
        let engine = EngineConfig { socket, max_tokens };
        Ok(Config { model, engine, group, control, device, log })
    }
}

impl ControlSettings {
    fn over(self, file: Self) -> Result<Option<ControlConfig>, ConfigError> {
        let credential = self.credential.or(file.credential);
        let ca = self.ca.or(file.ca);
        let missing = |key, option| ConfigError::Missing { key, option };
        match (self.url.or(file.url), credential) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(missing("control.url", "control")),
            (Some(_), None) => Err(missing("control.credential", "credential")),
            (Some(url), Some(credential)) => {
                let is = |scheme| url.starts_with(scheme);
                match &ca {
                    None if is("wss://") => return Err(missing("control.ca", "control-ca")),
                    None if is("ws://") => {}
                    Some(_) if is("wss://") => {}
                    _ => {
                        let expected = "ws://HOST:PORT, or wss://HOST:PORT with control.ca";
                        let (key, expected) = ("control.url", expected.to_owned());
                        return Err(ConfigError::Value { key, value: url, expected });
                    }
                }
                Ok(Some(ControlConfig { url, ca, credential }))
            }
        }
    }
}

impl GroupSettings {
    fn over(self, file: Self) -> Result<Option<GroupConfig>, ConfigError> {
        let (rank, ranks) = (self.rank.or(file.rank), self.ranks.or(file.ranks));
        let slots_per_rank = self.slots_per_rank.or(file.slots_per_rank);
        let placement = self.placement.or(file.placement);
        let Some(name) = self.name.or(file.name) else {
            let of_group = rank.or(ranks).or(slots_per_rank).is_some() || placement.is_some();
            let missing = ConfigError::Missing { key: "group.name", option: "group" };
            return if of_group { Err(missing) } else { Ok(None) };
        };
        let value = |key, value: String, expected: &str| {
            Err(ConfigError::Value { key, value, expected: expected.to_owned() })
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
            return value("group.name", name, "up to 64 letters, digits, '-', '_' and '.'");
        }
        let missing = |key, option| move || ConfigError::Missing { key, option };
        let rank = rank.ok_or_else(missing("group.rank", "rank"))?;
        let ranks = ranks.ok_or_else(missing("group.ranks", "ranks"))?;
        if ranks == 0 || ranks > RANKS_MAX {
            let expected = format!("1 to {RANKS_MAX}");
            return value("group.ranks", ranks.to_string(), &expected);
        }
        if rank >= ranks {
            return value("group.rank", rank.to_string(), &format!("0 to {}", ranks - 1));
        }
        let deadline_ms = self.deadline_ms.or(file.deadline_ms).unwrap_or(DEADLINE_MS_DEFAULT);
        if deadline_ms == 0 {
            return value("group.deadline_ms", deadline_ms.to_string(), "at least 1");
        }
        let dir = self.dir.or(file.dir).unwrap_or_else(|| default_folder().to_owned());
        let slots_per_rank = slots_per_rank.unwrap_or(0);
        let group = GroupConfig { name, rank, ranks, dir, deadline_ms, slots_per_rank, placement };
        Ok(Some(group))
    }
}

impl DeviceConfig {
    /// The options of the CUDA device.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for a tactic that does not exist.
    pub fn cuda(&self) -> Result<CudaOptions, ConfigError> {
        let cache = self.cubin_cache.clone().unwrap_or_else(default_cache);
        let named = |name: &String| {
            CudaTactic::named(name).ok_or_else(|| ConfigError::Value {
                key: "device.tactic",
                value: name.clone(),
                expected: format!("one of {}", CudaTactic::ALL.map(CudaTactic::name).join(", ")),
            })
        };
        let tactic = self.tactic.as_ref().map(named).transpose()?;
        Ok(CudaOptions { tactic, ..CudaOptions::new(self.gpu, cache) })
    }

    /// The options of the CPU device, on a host that `ranks` ranks share.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for a tactic that does not exist.
    pub fn cpu(&self, ranks: u32) -> Result<CpuOptions, ConfigError> {
        let parse = |name: &String| {
            name.parse::<CpuTactic>().map_err(|_unknown| ConfigError::Value {
                key: "device.tactic",
                value: name.clone(),
                expected: "a name like avx512-t12-p256".to_owned(),
            })
        };
        let own = self.tactic.as_ref().filter(|_| self.kind == DeviceKind::Cpu);
        let tactic = own.map(parse).transpose()?;
        let cores = available_parallelism().map_or(1, NonZero::get);
        let share = (cores / ranks.max(1) as usize).max(1);
        let threads = if self.threads == 0 { share } else { self.threads };
        Ok(CpuOptions { threads, isa: self.isa, tactic })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parsed(text: &str) -> Result<Config, String> {
        let file = toml::from_str::<Settings>(text).map_err(|error| error.to_string())?;
        Settings::default().over(file).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_and_options_are_one_configuration() {
        let file = "model = 'm'\n[engine]\nsocket = 's'\n[device]\nthreads = 3\nisa = 'avx2'\n";
        let config = parsed(file).unwrap();
        assert_eq!(config.engine.max_tokens, TOKENS_DEFAULT);
        assert_eq!((config.device.threads, config.device.isa), (3, Some(Isa::Avx2)));
        let options = Settings {
            engine: EngineSettings { socket: Some("other".into()), max_tokens: Some(7) },
            ..Settings::default()
        };
        let config = options.over(toml::from_str(file).unwrap()).unwrap();
        assert_eq!(config.engine, EngineConfig { socket: "other".into(), max_tokens: 7 });
        assert_eq!(config.model, Path::new("m"));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let with_group =
            |group: &str| format!("model = 'm'\n[engine]\nsocket = 's'\n[group]\n{group}");
        let cases = [
            ("", "model is not set, expected it in the file or as --model"),
            ("model = 'm'", "engine.socket is not set"),
            ("modle = 'm'", "unknown field `modle`"),
            ("[engine]\nsockets = 's'", "line 2"),
            (
                "model = 'm'\n[engine]\nsocket = 's'\nmax_tokens = 0",
                "engine.max_tokens is 0, expected 1 to 65536",
            ),
            ("[device]\nisa = 'sse'", "sse"),
            (
                "model = 'm'\n[engine]\nsocket = 's'\n[control]\nurl = 'ws://h:1'",
                "control.credential is not set, expected it in the file or as --credential",
            ),
            (
                "model = 'm'\n[engine]\nsocket = 's'\n[control]\nurl = 'h:1'\ncredential = 'c'",
                "control.url is h:1, expected ws://HOST:PORT, or wss://HOST:PORT with control.ca",
            ),
            ("model = 'm'\n[group]\nrank = 1", "engine.socket is not set"),
            (
                &with_group("rank = 1"),
                "group.name is not set, expected it in the file or as --group",
            ),
            (&with_group("name = 'a/b'"), "group.name is a/b, expected up to 64 letters"),
            (&with_group("name = 'a'"), "group.rank is not set"),
            (&with_group("name = 'a'\nrank = 4\nranks = 4"), "group.rank is 4, expected 0 to 3"),
            (
                &with_group("name = 'a'\nrank = 0\nranks = 65"),
                "group.ranks is 65, expected 1 to 64",
            ),
        ];
        for (text, expected) in cases {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        let device = DeviceConfig { tactic: Some("fast".to_owned()), ..DeviceConfig::default() };
        let error = device.cpu(1).unwrap_err().to_string();
        assert_eq!(error, "device.tactic is fast, expected a name like avx512-t12-p256");
        let cuda = |tactic: &str| DeviceConfig {
            tactic: Some(tactic.to_owned()),
            kind: DeviceKind::Cuda,
            ..DeviceConfig::default()
        };
        let error = cuda("fast").cuda().unwrap_err().to_string();
        assert_eq!(error, "device.tactic is fast, expected one of streamed, narrow, wide");
        assert_eq!(cuda("wide").cuda().unwrap().tactic, Some(CudaTactic::Wide));
        assert_eq!(cuda("wide").cpu(1).unwrap().tactic, None);
    }
}
