//! The worker's configuration: one typed struct from an optional file and command line options,
//! which take the place of the file's values. No other module reads files, arguments or the
//! environment for settings.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kernels::cpu::{CpuOptions, CpuTactic, Isa};
use serde::{Deserialize, Serialize};

use crate::limits::{TOKENS_DEFAULT, TOKENS_MAX};

/// A complete configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// The engine's side.
    pub engine: EngineConfig,
    /// The device.
    pub device: DeviceConfig,
    /// What is logged.
    pub log: LogConfig,
}

/// How engines reach the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineConfig {
    /// The socket's path.
    pub socket: PathBuf,
    /// Most tokens of a call.
    pub max_tokens: u32,
}

/// How the processor is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DeviceConfig {
    /// Threads; 0 takes one for each core.
    pub threads: usize,
    /// Instructions; by default the fastest there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isa: Option<Isa>,
    /// One tactic for every call, by name; by default each expert gets one by its tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tactic: Option<String>,
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

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is malformed or has an unknown key.
    #[error("{} is not a configuration", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that nobody gave.
    #[error("{key} is not set, expected it in the file or as --{option}")]
    Missing {
        /// Key in the file.
        key: &'static str,
        /// The command line option.
        option: &'static str,
    },
    /// A value out of range.
    #[error("{key} is {value}, expected {expected}")]
    Value {
        /// Key in the file.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is possible.
        expected: String,
    },
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

/// See [`DeviceConfig`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSettings {
    /// See [`DeviceConfig::threads`].
    pub threads: Option<usize>,
    /// See [`DeviceConfig::isa`].
    pub isa: Option<Isa>,
    /// See [`DeviceConfig::tactic`].
    pub tactic: Option<String>,
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
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::Parse`] with the line.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

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
        let max_tokens = max_tokens.unwrap_or(TOKENS_DEFAULT);
        if max_tokens == 0 || max_tokens > TOKENS_MAX {
            let (key, value) = ("engine.max_tokens", max_tokens.to_string());
            return Err(ConfigError::Value { key, value, expected: format!("1 to {TOKENS_MAX}") });
        }
        let device = DeviceConfig {
            threads: self.device.threads.or(file.device.threads).unwrap_or(0),
            isa: self.device.isa.or(file.device.isa),
            tactic: self.device.tactic.or(file.device.tactic),
        };
        let filter = self.log.filter.or(file.log.filter).unwrap_or_else(|| "info".to_owned());
        let format = self.log.format.or(file.log.format).unwrap_or_default();
        let log = LogConfig { filter, format };
        Ok(Config { model, engine: EngineConfig { socket, max_tokens }, device, log })
    }
}

impl DeviceConfig {
    /// The options of the CPU device.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for a tactic that does not exist.
    pub fn cpu(&self) -> Result<CpuOptions, ConfigError> {
        let parse = |name: &String| {
            name.parse::<CpuTactic>().map_err(|_unknown| ConfigError::Value {
                key: "device.tactic",
                value: name.clone(),
                expected: "a name like avx512-t12-p256".to_owned(),
            })
        };
        let tactic = self.tactic.as_ref().map(parse).transpose()?;
        Ok(CpuOptions { threads: self.threads, isa: self.isa, tactic })
    }
}

#[cfg(test)]
mod tests {
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
        ];
        for (text, expected) in cases {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        let device = DeviceConfig { tactic: Some("fast".to_owned()), ..DeviceConfig::default() };
        let error = device.cpu().unwrap_err().to_string();
        assert_eq!(error, "device.tactic is fast, expected a name like avx512-t12-p256");
    }
}
