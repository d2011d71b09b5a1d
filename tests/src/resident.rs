//! The memory of a process, as the system counts it.

use std::fs;

use anyhow::{Context, Result};

/// Bytes that are resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// Of the process's own.
    pub anonymous: u64,
    /// Shared with others.
    pub shared: u64,
    /// The most that was ever resident at one time, pages of files counted.
    pub peak: u64,
}

impl Resident {
    /// That of the process `pid`.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        let bytes = |field: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            let line = line.with_context(|| format!("{path} lacks {field}"))?;
            let kib = line.trim().strip_suffix(" kB").context("kB")?;
            Ok(kib.parse::<u64>()? << 10)
        };
        Ok(Self { anonymous: bytes("RssAnon")?, shared: bytes("RssShmem")?, peak: bytes("VmHWM")? })
    }

    /// What is the process's own or shared with others; pages of files can be given back at any time.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.anonymous + self.shared
    }
}
