//! The rank: one thread and one loop that waits for engines and runs their calls on the device. A
//! call runs to its end before anything else is looked at; what comes meanwhile waits in sockets.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use kernels::checkpoint::{Checkpoint, CheckpointError};
use kernels::cpu::CpuDevice;
use kernels::device::{CallOffsets, Device, LayerCall, LoadError};
use kernels::memory::SharedMemory;
use kernels::problem::{self, Form};
use protocol::buffer::BufferLayout;
use protocol::frame::{Frame, Kind, Malformed};
use protocol::message::{ActFormat, Attach, Attached, Call, Hello, WeightsIn, Welcome};
use protocol::refusal::Refusal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{Config, ConfigError};
use crate::connection::{Attachment, Connection, State};
use crate::failure::refusal;
use crate::limits::CONNECTIONS_MAX;
use crate::model::Model;
use crate::socket::Listener;

/// Why a worker does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A checkpoint that cannot be served.
    #[error("the model at {} cannot be served", path.display())]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: CheckpointError,
    },
    /// A device that cannot hold it.
    #[error("the device cannot hold the model")]
    Load(#[from] LoadError),
    /// A socket that cannot be listened on.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A worker that is ready: engines can connect.
pub struct Rank {
    device: Box<dyn Device>,
    model: Model,
    max_tokens: u32,
    listener: Listener,
    connections: Vec<Connection>,
}

impl Rank {
    /// Loads the model and listens. Whoever can connect is served.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let options = config.device.cpu()?;
        let started = Instant::now();
        let path = &config.model;
        let checkpoint = Checkpoint::open(path)
            .map_err(|source| StartError::Checkpoint { path: path.clone(), source })?;
        let device = CpuDevice::with_checkpoint(options, &checkpoint)?;
        let model = Model::new(&checkpoint);
        if let Some(reason) = &model.no_nvfp4 {
            tracing::warn!(reason, "act=nvfp4 is not served");
        }
        let path = &config.engine.socket;
        let listener = Listener::bind(path)
            .map_err(|source| StartError::Listen { path: path.clone(), source })?;
        tracing::info!(
            model = model.name,
            layers = model.layers.len(),
            device = device.describe(),
            socket = %path.display(),
            loaded_ms = started.elapsed().as_millis(),
            "ready"
        );
        let max_tokens = config.engine.max_tokens;
        let device = Box::new(device);
        Ok(Self { device, model, max_tokens, listener, connections: Vec::new() })
    }

    /// Serves until a byte comes from `stop`; calls whose frames have arrived are answered first.
    ///
    /// # Errors
    /// When the system's poll fails.
    pub fn serve(mut self, stop: &UnixStream) -> io::Result<()> {
        loop {
            let [stopping, knocking] = self.wait(stop)?;
            if stopping {
                self.drain();
                tracing::info!("stopped");
                return Ok(());
            }
            if knocking {
                self.accept();
            }
            for index in 0..self.connections.len() {
                // One read each, so that no engine holds up the others for longer than that.
                self.connections[index].read();
                self.handle_frames(index);
            }
            self.connections.retain(|connection| !connection.is_over());
        }
    }

    /// Waits for something to do; says whether to stop, and whether somebody knocks.
    fn wait(&self, stop: &UnixStream) -> io::Result<[bool; 2]> {
        let listener = self.listener.listener.as_fd();
        let mut fds = vec![
            PollFd::new(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(listener, PollFlags::IN),
        ];
        fds.extend(self.connections.iter().map(|connection| {
            let out = if connection.has_unsent() { PollFlags::OUT } else { PollFlags::empty() };
            PollFd::new(&connection.socket, PollFlags::IN | out)
        }));
        match poll(&mut fds, None) {
            Ok(_) => Ok([!fds[0].revents().is_empty(), !fds[1].revents().is_empty()]),
            Err(Errno::INTR) => Ok([false; 2]),
            Err(error) => Err(error.into()),
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.listener.accept().and_then(|(socket, _)| Connection::new(socket)) {
                Ok(mut connection) if self.is_full() => {
                    let connections = CONNECTIONS_MAX;
                    connection.refuse(&Refusal::Connections { connections }, 0);
                    connection.close();
                }
                Ok(connection) => self.connections.push(connection),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, perhaps: those that are connected are served on.
                    tracing::warn!(%error, "an engine could not connect");
                    return;
                }
            }
        }
    }

    /// Whether as many engines are connected as can be; one that left before another came does not
    /// count, even if its end has not been noticed yet.
    fn is_full(&mut self) -> bool {
        if self.connections.len() >= CONNECTIONS_MAX as usize {
            self.connections.retain_mut(|connection| {
                connection.read();
                !connection.is_over()
            });
        }
        self.connections.len() >= CONNECTIONS_MAX as usize
    }

    /// Answers everything that has arrived.
    fn drain(&mut self) {
        for index in 0..self.connections.len() {
            while self.connections[index].read() {
                self.handle_frames(index);
            }
            self.handle_frames(index);
        }
    }

    fn handle_frames(&mut self, index: usize) {
        self.connections[index].flush();
        while let Some(frame) = self.connections[index].next_frame() {
            match frame {
                Ok(frame) => {
                    let seq = frame.seq;
                    if let Err(refusal) = self.handle(index, frame) {
                        self.connections[index].refuse(&refusal, seq);
                    }
                }
                Err(Malformed::Frame(refusal, seq)) => {
                    self.connections[index].refuse(&refusal, seq);
                }
                Err(Malformed::Stream(refusal)) => {
                    self.connections[index].refuse(&refusal, 0);
                    self.connections[index].close();
                    return;
                }
            }
        }
    }

    fn handle(&mut self, index: usize, frame: Frame) -> Result<(), Refusal> {
        let connection = &mut self.connections[index];
        match (frame.kind, &connection.state) {
            (Kind::Hello, State::New) => {
                let Hello { client, .. } = parse(&frame)?;
                tracing::debug!(client, "connected");
                connection.client = client;
                connection.state = State::Greeted;
                let welcome = Welcome {
                    worker: concat!("moeplane-worker ", env!("CARGO_PKG_VERSION")).to_owned(),
                    model: self.model.name.clone(),
                    device: self.device.describe(),
                    max_tokens: self.max_tokens,
                    features: Vec::new(),
                };
                connection.answer(Kind::Welcome, 0, &json(&welcome), None);
                Ok(())
            }
            (Kind::Attach, State::Greeted) => {
                let attach = parse(&frame)?;
                self.attach(index, &attach)
            }
            (Kind::Call, State::Attached(_)) => self.call(index, &frame),
            (Kind::Hello | Kind::Attach | Kind::Call, state) => {
                let expected = match state {
                    State::New => "hello",
                    State::Greeted => "attach",
                    State::Attached(_) => "call",
                };
                Err(Refusal::Order { got: name(frame.kind), expected: expected.to_owned() })
            }
            (kind, _) => Err(Refusal::FrameKind { got: kind as u16 }),
        }
    }

    fn attach(&mut self, index: usize, attach: &Attach) -> Result<(), Refusal> {
        let Attach { act, weights_in, max_tokens } = *attach;
        if max_tokens == 0 || max_tokens > self.max_tokens {
            let max = self.max_tokens;
            return Err(Refusal::Tokens { tokens: max_tokens, min: 1, max });
        }
        if let (ActFormat::Nvfp4, Some(reason)) = (act, &self.model.no_nvfp4) {
            return Err(Refusal::NoInputScale { reason: reason.clone() });
        }
        let form = Form {
            act: match act {
                ActFormat::Bf16 => problem::ActFormat::Bf16,
                ActFormat::Nvfp4 => problem::ActFormat::Nvfp4,
            },
            weights_in: match weights_in {
                WeightsIn::Fc1 => problem::WeightsIn::Fc1,
                WeightsIn::Combine => problem::WeightsIn::Combine,
            },
        };
        let layout = BufferLayout::new(max_tokens, self.model.hidden_max());
        let memory = SharedMemory::create("engine buffer", layout.bytes)
            .map_err(|error| Refusal::Memory { reason: error.to_string() })?;
        let connection = &mut self.connections[index];
        let attached = Attached { layout, layers: self.model.layers.clone() };
        connection.answer(Kind::Attached, 0, &json(&attached), Some(memory.fd()));
        tracing::info!(client = connection.client, %act, %weights_in, max_tokens, "attached");
        connection.state = State::Attached(Attachment { form, memory, layout, next_seq: 1 });
        Ok(())
    }

    fn call(&mut self, index: usize, frame: &Frame) -> Result<(), Refusal> {
        let connection = &mut self.connections[index];
        let State::Attached(attachment) = &mut connection.state else { return Ok(()) };
        let expected = attachment.next_seq;
        if frame.seq != expected {
            return Err(Refusal::Sequence { got: frame.seq, expected });
        }
        attachment.next_seq += 1;
        let Call { layer, tokens, top_k, phase: _ } = Call::decode(&frame.body)?;
        let BufferLayout { max_tokens, hidden, topk_ids, topk_weights, output, .. } =
            attachment.layout;
        if tokens > max_tokens {
            return Err(Refusal::Tokens { tokens, min: 0, max: max_tokens });
        }
        let ran = self.device.run(&LayerCall {
            layer,
            tokens,
            top_k,
            form: attachment.form,
            buffer: &attachment.memory,
            offsets: CallOffsets { hidden, topk_ids, topk_weights, output },
        });
        // Calls that came before this one's answer were sent without waiting for it: the engine has
        // changed the buffer under a running call, or is about to.
        connection.read();
        let early = connection.take_calls();
        match ran {
            Ok(()) => connection.answer(Kind::Done, frame.seq, &[], None),
            Err(error) => connection.refuse(&refusal(error), frame.seq),
        }
        for seq in early {
            if let State::Attached(attachment) = &mut connection.state
                && attachment.next_seq == seq
            {
                attachment.next_seq += 1;
            }
            connection.refuse(&Refusal::Busy { in_flight: 1 }, seq);
        }
        Ok(())
    }
}

fn name(kind: Kind) -> String {
    format!("{kind:?}").to_lowercase()
}

fn json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).unwrap_or_default()
}

fn parse<T: DeserializeOwned>(frame: &Frame) -> Result<T, Refusal> {
    serde_json::from_slice(&frame.body)
        .map_err(|error| Refusal::Body { kind: name(frame.kind), reason: error.to_string() })
}
