//! One who watches control's events.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::control_process::Control;

/// How long an event may be awaited: far beyond what it needs.
const DEADLINE: Duration = Duration::from_secs(60);

/// A stream that is open.
#[derive(Debug)]
pub struct Watcher {
    lines: BufReader<TcpStream>,
}

/// What comes on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// An event.
    Event {
        /// Its number.
        id: i64,
        /// What it is of.
        kind: String,
        /// What it says.
        data: Value,
    },
    /// Nothing, for a while.
    Comment,
}

impl Watcher {
    /// Watches on after the event `last`, or from now on.
    pub fn open(control: &Control, last: Option<i64>) -> Result<Self> {
        let mut stream = TcpStream::connect(control.address())?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let last = last.map_or_else(String::new, |last| format!("last-event-id: {last}\r\n"));
        // 1.0: a body without chunks, up to the end of the connection.
        let token = control.token();
        write!(
            stream,
            "GET /api/v1/events HTTP/1.0\r\nauthorization: Bearer {token}\r\n{last}\r\n"
        )?;
        let mut watcher = Self { lines: BufReader::new(stream) };
        let status = watcher.line()?;
        ensure!(status.contains(" 200 "), "{status}");
        while !watcher.line()?.is_empty() {}
        Ok(watcher)
    }

    /// What comes next.
    pub fn hear(&mut self) -> Result<Told> {
        let (mut id, mut kind, mut data) = (None, String::new(), None);
        loop {
            let line = self.line()?;
            if line.is_empty() {
                let id = id.with_context(|| format!("an event {kind:?} without a number"))?;
                let data = data.with_context(|| format!("event {id} says nothing"))?;
                return Ok(Told::Event { id, kind, data });
            }
            match line.split_once(':').map(|(name, value)| (name, value.trim_start())) {
                Some(("", _)) => {
                    ensure!(self.line()?.is_empty(), "a comment without an end");
                    return Ok(Told::Comment);
                }
                Some(("id", value)) => id = Some(value.parse()?),
                Some(("event", value)) => value.clone_into(&mut kind),
                Some(("data", value)) => data = Some(serde_json::from_str(value)?),
                _ => bail!("the line {line:?} is no part of an event"),
            }
        }
    }

    /// The next event.
    pub fn event(&mut self) -> Result<(i64, String, Value)> {
        loop {
            if let Told::Event { id, kind, data } = self.hear()? {
                return Ok((id, kind, data));
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line)? > 0, "the stream has ended");
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }
}
