//! How configuration files are read, and what is wrong with one: the same for every program.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Exit code of a configuration that cannot be used (sysexits' EX_USAGE).
pub const BAD_CONFIG: u8 = 64;

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
    /// A value that cannot be, or not together with another.
    #[error("{key} is {value}, expected {expected}")]
    Value {
        /// Key in the file.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is possible.
        expected: String,
    },
    /// The same, of the file.
    #[error("{}, line {line}: {source}", path.display())]
    At {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong there.
        source: Box<ConfigError>,
    },
}

impl ConfigError {
    /// A value that cannot be.
    pub fn value(key: &'static str, value: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Value { key, value: value.into(), expected: expected.into() }
    }
}

/// Reads a file, if there is one, and has `complete` make a configuration of what it says. A value that
/// is refused and comes from the file is named with its line.
///
/// # Errors
/// [`ConfigError`]; a key that `T` does not know is one if `T` denies unknown fields.
pub fn load<T: DeserializeOwned + Default, C>(
    path: Option<&Path>,
    complete: impl FnOnce(T) -> Result<C, ConfigError>,
) -> Result<C, ConfigError> {
    let Some(path) = path else { return complete(T::default()) };
    let path = path.to_owned();
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) => return Err(ConfigError::Read { path, source }),
    };
    let file = match toml::from_str(&text) {
        Ok(file) => file,
        Err(source) => return Err(ConfigError::Parse { path, source: Box::new(source) }),
    };
    complete(file).map_err(|error| match &error {
        ConfigError::Value { key, value, .. } => match line_of(&text, key, value) {
            Some(line) => ConfigError::At { path, line, source: Box::new(error) },
            None => error,
        },
        _ => error,
    })
}

/// The line where a file gives `key`, such as `group.rank`, the value.
fn line_of(text: &str, key: &str, value: &str) -> Option<usize> {
    let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
    let mut inside = table.is_empty();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            inside = header.trim_end_matches(']').trim() == table;
        } else if let Some((left, right)) = line.split_once('=')
            && inside
            && left.trim() == name
            && right.contains(value)
        {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_table_key_and_value() {
        let text = "rank = 1\n# rank = 9\n[group]\nname = 'g'\n rank = 7 # seven\n[log]\nrank = 7";
        assert_eq!(line_of(text, "group.rank", "7"), Some(5));
        assert_eq!(line_of(text, "rank", "1"), Some(1));
        // An option of the command line took its place.
        assert_eq!(line_of(text, "group.rank", "3"), None);
        assert_eq!(line_of(text, "group.ranks", "7"), None);
    }
}
