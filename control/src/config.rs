//! The configuration: one typed struct from an optional file and command line options, which take the
//! place of the file's values. No other module reads files, arguments or the environment for settings.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

use policy_host::shipped;
use serde::{Deserialize, Serialize};
pub use settings::ConfigError;

use crate::limits::{
    HEARTBEAT_MS_DEFAULT, HOURS_DAYS_DEFAULT, KEEPALIVE_MS_DEFAULT, LISTEN_DEFAULT,
    REQUESTS_PER_SECOND_DEFAULT, WINDOW_MS_DEFAULT, WINDOWS_HOURS_DEFAULT,
};
use crate::tls::TlsConfig;

/// A complete configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Folder of what control keeps: the database, the workers' credential, the address.
    pub data: PathBuf,
    /// Where control listens; port 0 takes a free one. Beyond loopback only with TLS.
    pub listen: SocketAddr,
    /// Milliseconds between a worker's heartbeats.
    pub heartbeat_ms: u64,
    /// Milliseconds of a window of load.
    pub window_ms: u64,
    /// Hours that windows are kept before they are added up by the hour.
    pub windows_hours: u64,
    /// Days that those sums are kept.
    pub hours_days: u64,
    /// Requests of one caller in a second.
    pub requests_per_second: u32,
    /// Milliseconds between two comments of a quiet stream of events.
    pub keepalive_ms: u64,
    /// What is logged, such as `info` or `control=debug`.
    pub log: String,
    /// Folder of the policies that come with moeplane.
    pub policies: PathBuf,
    /// Files with the placements that groups start with, JSON `[layer][slot]`; experts in order for
    /// others.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub placements: BTreeMap<String, PathBuf>,
    /// Certificate and key; none for control that is on loopback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

/// Settings as the file or the command line gives them.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Folder of what control keeps.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Where control listens, HOST:PORT; port 0 takes a free one, written to DATA/address.
    #[arg(long)]
    pub listen: Option<String>,
    /// Milliseconds between a worker's heartbeats.
    #[arg(long)]
    pub heartbeat_ms: Option<u64>,
    /// Milliseconds of a window of load.
    #[arg(long)]
    pub window_ms: Option<u64>,
    /// Hours that windows are kept before they are added up by the hour.
    #[arg(long)]
    pub windows_hours: Option<u64>,
    /// Days that those sums are kept.
    #[arg(long)]
    pub hours_days: Option<u64>,
    /// Requests of one caller in a second.
    #[arg(long)]
    pub requests_per_second: Option<u32>,
    /// Milliseconds between two comments of a quiet stream of events.
    #[arg(long)]
    pub keepalive_ms: Option<u64>,
    /// What is logged, such as info or control=debug.
    #[arg(long)]
    pub log: Option<String>,
    /// Folder of the policies that come with moeplane; beside the program if not given.
    #[arg(long)]
    pub policies: Option<PathBuf>,
    /// See [`Config::placements`]: those of the command line are added to those of the file.
    #[arg(skip)]
    #[serde(default)]
    pub placements: BTreeMap<String, PathBuf>,
    /// See [`Config::tls`].
    #[arg(skip)]
    pub tls: Option<TlsConfig>,
}

impl Settings {
    /// These settings, and those of `file` where these say nothing; checked.
    ///
    /// # Errors
    /// [`ConfigError::Missing`], [`ConfigError::Value`].
    pub fn over(self, file: Self) -> Result<Config, ConfigError> {
        let data =
            self.data.or(file.data).ok_or(ConfigError::Missing { key: "data", option: "data" })?;
        let listen = self.listen.or(file.listen).unwrap_or_else(|| LISTEN_DEFAULT.to_owned());
        let wrong = |value: &str, expected| ConfigError::value("listen", value, expected);
        let address = listen.to_socket_addrs().ok().and_then(|mut all| all.next());
        let address = address.ok_or_else(|| wrong(&listen, "HOST:PORT"))?;
        let tls = self.tls.or(file.tls);
        // Credentials would cross in the clear.
        if !address.ip().is_loopback() && tls.is_none() {
            return Err(wrong(&listen, "an address of loopback, as tls is not set"));
        }
        let heartbeat_ms = self.heartbeat_ms.or(file.heartbeat_ms).unwrap_or(HEARTBEAT_MS_DEFAULT);
        let window_ms = self.window_ms.or(file.window_ms).unwrap_or(WINDOW_MS_DEFAULT);
        let windows_hours = self.windows_hours.or(file.windows_hours);
        let windows_hours = windows_hours.unwrap_or(WINDOWS_HOURS_DEFAULT);
        let keepalive_ms = self.keepalive_ms.or(file.keepalive_ms).unwrap_or(KEEPALIVE_MS_DEFAULT);
        let requests_per_second = self.requests_per_second.or(file.requests_per_second);
        let requests_per_second = requests_per_second.unwrap_or(REQUESTS_PER_SECOND_DEFAULT);
        let hours_days = self.hours_days.or(file.hours_days).unwrap_or(HOURS_DAYS_DEFAULT);
        for (key, value, range, expected) in [
            ("heartbeat_ms", heartbeat_ms, 10..=60_000, "10 to 60000"),
            ("window_ms", window_ms, 100..=3_600_000, "100 to 3600000"),
            ("windows_hours", windows_hours, 1..=8_760, "1 to 8760"),
            ("hours_days", hours_days, 1..=3_650, "1 to 3650"),
            ("keepalive_ms", keepalive_ms, 100..=15_000, "100 to 15000"),
            ("requests_per_second", requests_per_second.into(), 1..=1_000_000, "1 to 1000000"),
        ] {
            if !range.contains(&value) {
                return Err(ConfigError::value(key, value.to_string(), expected));
            }
        }
        let log = self.log.or(file.log).unwrap_or_else(|| "info".to_owned());
        let beside = || std::env::current_exe().map(|program| shipped::folder(&program));
        let policies = match self.policies.or(file.policies) {
            Some(folder) => folder,
            None => beside().unwrap_or_else(|_unknown| shipped::folder(Path::new("."))),
        };
        let mut placements = file.placements;
        placements.extend(self.placements);
        let listen = address;
        Ok(Config {
            data,
            listen,
            heartbeat_ms,
            window_ms,
            windows_hours,
            hours_days,
            requests_per_second,
            keepalive_ms,
            log,
            policies,
            placements,
            tls,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_named() {
        let cases = [
            ("", "data is not set, expected it in the file or as --data"),
            ("data = 'd'\nlisten = 'nowhere'", "listen is nowhere, expected HOST:PORT"),
            (
                "data = 'd'\nlisten = '0.0.0.0:1'",
                "listen is 0.0.0.0:1, expected an address of loopback, as tls is",
            ),
            ("data = 'd'\nheartbeat_ms = 9", "heartbeat_ms is 9, expected 10 to 60000"),
            ("data = 'd'\nwindow_ms = 5", "window_ms is 5, expected 100 to 3600000"),
            ("data = 'd'\nlog_level = 'x'", "unknown field `log_level`"),
            ("data = 'd'\n[tls]\nkey = 'k'", "missing field `certificate`"),
        ];
        for (text, expected) in cases {
            let file = toml::from_str::<Settings>(text).map_err(|error| error.to_string());
            let config = file
                .and_then(|file| Settings::default().over(file).map_err(|error| error.to_string()));
            let error = config.unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn options_win_over_the_file() {
        let file = toml::from_str("data = 'd'\nlisten = '127.0.0.1:1'").unwrap();
        let options = Settings { listen: Some("127.0.0.1:2".to_owned()), ..Settings::default() };
        let config = options.over(file).unwrap();
        assert_eq!((config.data, config.listen.port()), (PathBuf::from("d"), 2));
        assert_eq!(config.heartbeat_ms, HEARTBEAT_MS_DEFAULT);
        let tls = "data = 'd'\nlisten = '0.0.0.0:1'\n[tls]\ncertificate = 'c'\nkey = 'k'";
        let config = Settings::default().over(toml::from_str(tls).unwrap()).unwrap();
        assert!(!config.listen.ip().is_loopback());
    }
}
