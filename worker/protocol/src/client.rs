//! What an engine links: a connection to a worker, and calls of its layers.
//!
//! ```no_run
//! # fn main() -> Result<(), protocol::client::ClientError> {
//! use protocol::client::{Client, Options};
//! use protocol::message::{ActFormat, Attach, Call, Phase, WeightsIn};
//!
//! let client = Client::connect("/run/moeplane/worker.sock".as_ref(), Options::default())?;
//! let (act, weights_in) = (ActFormat::Bf16, WeightsIn::Fc1);
//! let mut engine = client.attach(&Attach { act, weights_in, max_tokens: 64 })?;
//! let (hidden, ids, weights) = (vec![0_u16; 256], [3, 17], [0.75_f32, 0.25]);
//! engine.write_inputs(&hidden, &ids, &weights)?;
//! engine.call(Call { layer: 0, tokens: 1, top_k: 2, phase: Phase::Decode })?;
//! let mut output = vec![0_u16; 256];
//! engine.read_output(&mut output)?;
//! # Ok(())
//! # }
//! ```

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::buffer::{Buffer, BufferLayout};
use crate::frame::{Decoder, Frame, Kind, Malformed, REPLY_BYTES_MAX, encode};
use crate::message::{Attach, Attached, Call, Hello, ServedLayer, UnservedLayer, Welcome};
use crate::refusal::Refusal;
use crate::stream::{receive, send};

/// How a client waits.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who the engine is, for the worker's log.
    pub client: String,
    /// Longest wait for any answer.
    pub deadline: Duration,
}

impl Default for Options {
    /// A minute: a call of thousands of tokens on a CPU takes seconds.
    fn default() -> Self {
        Self { client: "engine".to_owned(), deadline: Duration::from_secs(60) }
    }
}

/// What can go wrong for an engine.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no worker answers at {}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The worker refused a frame; the connection lives.
    #[error("the worker refused: {0}")]
    Refused(#[source] Refusal),
    /// The worker is gone. Connect again.
    #[error("the worker closed the connection while {waiting_for} was awaited")]
    Closed {
        /// What was awaited.
        waiting_for: &'static str,
    },
    /// No answer in time. The connection cannot be used any more: the answer may come late.
    #[error("no answer within {} ms while {waiting_for} was awaited", deadline.as_millis())]
    Deadline {
        /// What was awaited.
        waiting_for: &'static str,
        /// How long.
        deadline: Duration,
    },
    /// The socket failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The worker answered something that does not belong there.
    #[error("the worker answered {got}, expected {expected}")]
    Unexpected {
        /// What came.
        got: String,
        /// What should have come.
        expected: &'static str,
    },
    /// Tensors that do not belong together or do not fit the buffer.
    #[error("{tensor} has {got} elements, expected {expected}")]
    Tensor {
        /// Which.
        tensor: &'static str,
        /// Its elements.
        got: usize,
        /// What it should have.
        expected: String,
    },
}

/// A greeted connection.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    welcome: Welcome,
}

/// An attached engine: one call at a time.
#[derive(Debug)]
pub struct Engine {
    connection: Connection,
    welcome: Welcome,
    layers: Vec<ServedLayer>,
    unserved: Vec<UnservedLayer>,
    layout: BufferLayout,
    buffer: Buffer,
    next_seq: u64,
}

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    decoder: Decoder,
    fd: Option<OwnedFd>,
    out: Vec<u8>,
    deadline: Duration,
}

impl Client {
    /// Connects and greets.
    ///
    /// # Errors
    /// [`ClientError::Connect`]; others when whoever listens is no worker of this version.
    pub fn connect(path: &Path, options: Options) -> Result<Self, ClientError> {
        let socket = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut connection = Connection {
            socket,
            decoder: Decoder::new(REPLY_BYTES_MAX),
            fd: None,
            out: Vec::new(),
            deadline: options.deadline,
        };
        let hello = Hello { client: options.client, features: Vec::new() };
        connection.send(Kind::Hello, 0, &json(&hello))?;
        let welcome = connection.json(Kind::Welcome, "the welcome")?;
        Ok(Self { connection, welcome })
    }

    /// What the worker says of itself.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Asks for a buffer and maps it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] for what the worker does not serve.
    pub fn attach(self, attach: &Attach) -> Result<Engine, ClientError> {
        let Self { mut connection, welcome } = self;
        connection.send(Kind::Attach, 0, &json(attach))?;
        let Attached { layout, layers, unserved } =
            connection.json(Kind::Attached, "the attachment")?;
        let Some(fd) = connection.fd.take() else {
            let (got, expected) = ("an attachment without a descriptor".to_owned(), "one");
            return Err(ClientError::Unexpected { got, expected });
        };
        if layout != BufferLayout::new(layout.max_tokens, layout.hidden_max) {
            let (got, expected) = (format!("{layout:?}"), "the layout of this version");
            return Err(ClientError::Unexpected { got, expected });
        }
        let buffer = Buffer::map(&fd, layout.bytes)?;
        Ok(Engine { connection, welcome, layers, unserved, layout, buffer, next_seq: 1 })
    }
}

impl Engine {
    /// What the worker says of itself.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// The layers that may be called, ascending.
    #[must_use]
    pub fn layers(&self) -> &[ServedLayer] {
        &self.layers
    }

    /// The model's other layers, which stay with the engine, ascending.
    #[must_use]
    pub fn unserved(&self) -> &[UnservedLayer] {
        &self.unserved
    }

    /// The buffer, for engines that write tensors in place.
    #[must_use]
    pub fn buffer(&self) -> (&Buffer, &BufferLayout) {
        (&self.buffer, &self.layout)
    }

    /// Copies a call's input into the buffer: bf16 bits `[tokens, hidden]`, ids and weights
    /// `[tokens, top_k]`.
    ///
    /// # Errors
    /// [`ClientError::Tensor`] for one that does not fit; nothing was copied then.
    pub fn write_inputs(
        &mut self,
        hidden: &[u16],
        ids: &[i32],
        weights: &[f32],
    ) -> Result<(), ClientError> {
        let BufferLayout { topk_ids, topk_weights, output, .. } = self.layout;
        let room = |from: u64, to: u64, width: u64| usize::try_from((to - from) / width);
        let fits = |tensor, got: usize, room: Result<usize, _>| match room {
            Ok(room) if got <= room => Ok(()),
            _ => {
                let expected = format!("at most the {room:?} of the buffer");
                Err(ClientError::Tensor { tensor, got, expected })
            }
        };
        fits("hidden", hidden.len(), room(self.layout.hidden, topk_ids, 2))?;
        fits("ids", ids.len(), room(topk_ids, topk_weights, 4))?;
        fits("weights", weights.len(), room(topk_weights, output, 4))?;
        if ids.len() != weights.len() {
            let expected = format!("the {} of ids", ids.len());
            return Err(ClientError::Tensor { tensor: "weights", got: weights.len(), expected });
        }
        self.write(self.layout.hidden, hidden, |value| value.to_le_bytes());
        self.write(topk_ids, ids, |value| value.to_le_bytes());
        self.write(topk_weights, weights, |value| value.to_le_bytes());
        Ok(())
    }

    fn write<T: Copy, const N: usize>(&self, offset: u64, from: &[T], bytes: fn(T) -> [u8; N]) {
        // Through a small array: the compiler turns it into a plain copy on this byte order.
        const AT_ONCE: usize = 512;
        let mut chunk = [[0; N]; AT_ONCE];
        let mut offset = offset;
        for values in from.chunks(AT_ONCE) {
            chunk.iter_mut().zip(values).for_each(|(bytes_of, value)| *bytes_of = bytes(*value));
            let filled = chunk[..values.len()].as_flattened();
            self.buffer.write(offset, filled);
            offset += filled.len() as u64;
        }
    }

    /// Runs a layer on what is in the buffer.
    ///
    /// # Errors
    /// [`ClientError::Refused`] leaves the engine usable, every other one does not.
    pub fn call(&mut self, call: Call) -> Result<(), ClientError> {
        self.ask(Kind::Call, &call.encode())
    }

    /// Says whether calls of other ranks are to wait for this engine. While it is idle its rank
    /// takes part in them by itself, without tokens.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_idle(&mut self, idle: bool) -> Result<(), ClientError> {
        self.ask(Kind::Idle, &u32::from(idle).to_le_bytes())
    }

    fn ask(&mut self, kind: Kind, body: &[u8]) -> Result<(), ClientError> {
        let seq = self.next_seq;
        self.connection.send(kind, seq, body)?;
        self.next_seq += 1;
        let frame = self.connection.answer("the answer to a call")?;
        match frame.kind {
            Kind::Done if frame.seq == seq => Ok(()),
            kind => {
                let got = format!("{kind:?} of call {}", frame.seq);
                Err(ClientError::Unexpected { got, expected: "the answer to the call" })
            }
        }
    }

    /// Copies the first rows of the output out of the buffer, bf16 bits.
    ///
    /// # Errors
    /// [`ClientError::Tensor`] for more than the buffer holds.
    pub fn read_output(&self, output: &mut [u16]) -> Result<(), ClientError> {
        let room = usize::try_from((self.layout.bytes - self.layout.output) / 2);
        if room.is_ok_and(|room| output.len() > room) {
            let expected = format!("at most the {room:?} of the buffer");
            return Err(ClientError::Tensor { tensor: "output", got: output.len(), expected });
        }
        const AT_ONCE: usize = 512;
        let mut chunk = [[0; 2]; AT_ONCE];
        let mut offset = self.layout.output;
        for values in output.chunks_mut(AT_ONCE) {
            let filled = chunk[..values.len()].as_flattened_mut();
            self.buffer.read(offset, filled);
            offset += filled.len() as u64;
            values
                .iter_mut()
                .zip(chunk)
                .for_each(|(value, bytes)| *value = u16::from_le_bytes(bytes));
        }
        Ok(())
    }
}

impl Connection {
    fn send(&mut self, kind: Kind, seq: u64, body: &[u8]) -> Result<(), ClientError> {
        self.out.clear();
        encode(kind, seq, body, &mut self.out);
        let mut rest = self.out.as_slice();
        while !rest.is_empty() {
            match send(&self.socket, rest, None) {
                Ok(sent) => rest = &rest[sent..],
                // What the worker said before it went may still be there to be read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next frame that is no refusal.
    fn answer(&mut self, waiting_for: &'static str) -> Result<Frame, ClientError> {
        let frame = self.frame(waiting_for)?;
        if frame.kind == Kind::Refused {
            return Err(ClientError::Refused(parse(&frame, "a refusal")?));
        }
        Ok(frame)
    }

    fn json<T: DeserializeOwned>(
        &mut self,
        kind: Kind,
        waiting_for: &'static str,
    ) -> Result<T, ClientError> {
        let frame = self.answer(waiting_for)?;
        if frame.kind == kind {
            return parse(&frame, waiting_for);
        }
        let got = format!("{:?}", frame.kind);
        Err(ClientError::Unexpected { got, expected: waiting_for })
    }

    fn frame(&mut self, waiting_for: &'static str) -> Result<Frame, ClientError> {
        let deadline = self.deadline;
        let until = Instant::now() + deadline;
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => return Ok(frame),
                Ok(None) => {}
                Err(Malformed::Frame(refusal, _) | Malformed::Stream(refusal)) => {
                    let got = refusal.to_string();
                    return Err(ClientError::Unexpected { got, expected: waiting_for });
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Deadline { waiting_for, deadline });
            }
            self.socket.set_read_timeout(Some(left))?;
            match receive(&self.socket, |bytes| self.decoder.feed(bytes)) {
                Ok((true, fd)) => self.fd = fd.or(self.fd.take()),
                Ok((false, _)) => return Err(ClientError::Closed { waiting_for }),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn json(message: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(message).unwrap_or_default()
}

fn parse<T: DeserializeOwned>(frame: &Frame, expected: &'static str) -> Result<T, ClientError> {
    serde_json::from_slice(&frame.body).map_err(|error| {
        let got = format!("a {:?} frame that cannot be read ({error})", frame.kind);
        ClientError::Unexpected { got, expected }
    })
}
