//! The rank: one thread and one loop that waits for engines and peers and runs calls on the device. A
//! call runs to its end before anything else is looked at; what comes meanwhile waits in sockets.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use kernels::device::{CallError, CallOffsets, Device, LayerCall};
use kernels::memory::SharedMemory;
use kernels::problem::{self, Form};
use protocol::buffer::BufferLayout;
use protocol::frame::{Frame, Kind, Malformed};
use protocol::message::{ActFormat, Attach, Attached, Call, Hello, Phase, WeightsIn, Welcome};
use protocol::refusal::Refusal;
use protocol::session::{EngineState, FromControl};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::connection::{Attachment, Connection, State};
use crate::failure::refusal;
use crate::limits::{CONNECTIONS_MAX, LINGER};
use crate::migrate::Migrate;
use crate::model::Model;
use crate::orders::Inbox;
use crate::socket::Listener;
use crate::tactics::Tuned;
use crate::uplink::Uplink;
use crate::watch::Watch;

/// A worker that is ready: engines can connect.
pub struct Rank {
    device: Box<dyn Device>,
    model: Model,
    max_tokens: u32,
    listener: Listener,
    connections: Vec<Connection>,
    /// Wakes the loop when peers announce a call; none for a rank that is alone.
    watch: Option<Watch>,
    /// The session with control; none for a worker that nobody is to see.
    uplink: Option<Uplink>,
    /// Orders of control; none for a worker that nobody is to see.
    inbox: Option<Inbox>,
    /// Other placements while calls go on; none for a rank that nobody orders any.
    migrate: Option<Migrate>,
    /// Which tactics calls get; none for a rank that was given one for all.
    tuned: Option<Tuned>,
}

/// What control has to do with a rank.
#[derive(Default)]
pub(crate) struct Ordered {
    pub(crate) uplink: Option<Uplink>,
    pub(crate) inbox: Option<Inbox>,
    pub(crate) migrate: Option<Migrate>,
    pub(crate) tuned: Option<Tuned>,
}

impl Rank {
    pub(crate) fn new(
        device: Box<dyn Device>,
        (model, max_tokens): (Model, u32),
        listener: Listener,
        watch: Option<Watch>,
        Ordered { uplink, inbox, migrate, tuned }: Ordered,
    ) -> Self {
        let connections = Vec::new();
        Self {
            device,
            model,
            max_tokens,
            listener,
            connections,
            watch,
            uplink,
            inbox,
            migrate,
            tuned,
        }
    }

    /// Serves until a byte comes from `stop`; calls whose frames have arrived are answered first.
    ///
    /// # Errors
    /// When the system's poll fails.
    pub fn serve(mut self, stop: &UnixStream) -> io::Result<()> {
        // Until when the next announcement of peers is looked for without sleep.
        let mut linger = Instant::now();
        loop {
            let mut lingers = false;
            if self.joins_by_itself() {
                lingers = Instant::now() < linger;
                self.device.group().set_parked(!lingers);
                if self.device.group().is_pending() {
                    self.join();
                    linger = Instant::now() + LINGER;
                    lingers = true;
                }
            }
            let [stopping, knocking, rung, ordered] = self.wait(stop, lingers)?;
            self.device.group().set_parked(false);
            if ordered {
                self.follow_orders();
            }
            if let Some(watch) = self.watch.as_ref().filter(|_| rung) {
                watch.hear();
            }
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
            if let Some(uplink) = &self.uplink {
                uplink.pulse.set_engine(self.engine());
            }
        }
    }

    /// Does what control says.
    fn follow_orders(&mut self) {
        let orders = self.inbox.as_mut().map(Inbox::take).unwrap_or_default();
        let mut others = Vec::new();
        for order in orders {
            match (order, &mut self.tuned) {
                (FromControl::Choose { choices }, Some(tuned)) => {
                    tuned.choose(&mut *self.device, choices);
                }
                (FromControl::Choose { .. }, None) => {}
                (other, _) => others.push(other),
            }
        }
        if let (Some(tuned), Some(uplink)) = (&self.tuned, &self.uplink) {
            uplink.pulse.set_tactics(tuned.tactics.clone());
        }
        if let Some(migrate) = &mut self.migrate {
            migrate.take(&mut *self.device, others);
        }
    }

    /// Whether this rank has an engine.
    fn engine(&self) -> EngineState {
        let of = |connection: &Connection| match &connection.state {
            State::Attached(attachment) if attachment.idle => EngineState::Idle,
            State::Attached(_) => EngineState::Attached,
            State::New | State::Greeted => EngineState::Absent,
        };
        self.connections.iter().map(of).max_by_key(|&state| state as u8).unwrap_or_default()
    }

    /// Whether calls of other ranks do not wait for an engine of this one.
    fn joins_by_itself(&self) -> bool {
        let calls = |connection: &Connection| match &connection.state {
            State::Attached(attachment) => !attachment.idle,
            State::New | State::Greeted => false,
        };
        self.watch.is_some() && !self.connections.iter().any(calls)
    }

    /// Takes part in a call that peers have announced.
    fn join(&mut self) {
        self.device.group().set_parked(false);
        match self.device.join(None) {
            Ok(()) => {}
            Err(CallError::Group(error)) => tracing::warn!(%error, "a call was given up"),
            Err(error) => tracing::warn!(%error, "a call was not made"),
        }
        if let Some(migrate) = &mut self.migrate {
            migrate.after_call(&mut *self.device);
        }
    }

    /// Waits for something to do, or only looks; says whether to stop, whether somebody knocks,
    /// whether peers rang, and whether there are orders.
    fn wait(&self, stop: &UnixStream, only_looks: bool) -> io::Result<[bool; 4]> {
        let listener = self.listener.listener.as_fd();
        let bell = self.watch.as_ref().map_or(stop, |watch| &watch.bell);
        let mut fds = vec![
            PollFd::new(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(listener, PollFlags::IN),
            PollFd::new(bell, PollFlags::IN),
            PollFd::new(self.inbox.as_ref().map_or(stop, |inbox| &inbox.bell), PollFlags::IN),
        ];
        fds.extend(self.connections.iter().map(|connection| {
            let out = if connection.has_unsent() { PollFlags::OUT } else { PollFlags::empty() };
            PollFd::new(&connection.socket, PollFlags::IN | out)
        }));
        if only_looks {
            // Where ranks share a core, it may be this one's that somebody waits for.
            thread::yield_now();
        }
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, only_looks.then_some(&now)) {
            Ok(_) => Ok([0, 1, 2, 3].map(|n| !fds[n].revents().is_empty())),
            Err(Errno::INTR) => Ok([false; 4]),
            Err(error) => Err(error.into()),
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.listener.accept().and_then(|(socket, _)| Connection::new(socket)) {
                Ok(mut connection) if self.is_full() => {
                    let with = format!("{CONNECTIONS_MAX} engines");
                    connection.refuse(&Refusal::Busy { with }, 0);
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
                    rank: self.device.group().rank(),
                    ranks: self.device.group().ranks(),
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
            (Kind::Idle, State::Attached(_)) => self.set_idle(index, &frame),
            (Kind::Hello | Kind::Attach | Kind::Call | Kind::Idle, state) => {
                let expected = match state {
                    State::New => "hello",
                    State::Greeted => "attach",
                    State::Attached(_) => "call or idle",
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
        if let Some(other) = self.engine_of_group() {
            let with = format!("the engine {other:?}, which is attached to this rank");
            return Err(Refusal::Busy { with });
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
        self.device.group().forget();
        let layout = BufferLayout::new(max_tokens, self.model.hidden_max());
        let memory = SharedMemory::create("engine buffer", layout.bytes)
            .map_err(|error| Refusal::Memory { reason: error.to_string() })?;
        let connection = &mut self.connections[index];
        let Model { layers, unserved, .. } = &self.model;
        let attached = Attached { layout, layers: layers.clone(), unserved: unserved.clone() };
        connection.answer(Kind::Attached, 0, &json(&attached), Some(memory.fd()));
        tracing::info!(client = connection.client, %act, %weights_in, max_tokens, "attached");
        connection.state =
            State::Attached(Attachment { form, memory, layout, next_seq: 1, idle: false });
        Ok(())
    }

    /// The engine of this rank of a group, which has one at a time.
    fn engine_of_group(&mut self) -> Option<&str> {
        self.watch.as_ref()?;
        // One that left before another came does not count.
        self.connections.iter_mut().for_each(|connection| {
            connection.read();
        });
        let attached = |connection: &&Connection| {
            matches!(connection.state, State::Attached(_)) && !connection.is_over()
        };
        self.connections.iter().find(attached).map(|connection| connection.client.as_str())
    }

    fn set_idle(&mut self, index: usize, frame: &Frame) -> Result<(), Refusal> {
        let connection = &mut self.connections[index];
        let State::Attached(attachment) = &mut connection.state else { return Ok(()) };
        attachment.take_number(frame.seq)?;
        attachment.idle = match frame.body[..] {
            [0, 0, 0, 0] => false,
            [1, 0, 0, 0] => true,
            _ => {
                let reason = format!("{:?}, expected the word 0 or 1", frame.body);
                return Err(Refusal::Body { kind: name(frame.kind), reason });
            }
        };
        connection.answer(Kind::Done, frame.seq, &[], None);
        Ok(())
    }

    fn call(&mut self, index: usize, frame: &Frame) -> Result<(), Refusal> {
        let connection = &mut self.connections[index];
        let State::Attached(attachment) = &mut connection.state else { return Ok(()) };
        attachment.take_number(frame.seq)?;
        let mut ran = run(&mut *self.device, attachment, &self.model, frame);
        // Whatever is wrong with the call, the others wait for this rank's part in it; and if that
        // fails, this engine hears what the others do.
        if let (Err(Failed::Alone { asked, .. }), Some(_)) = (&ran, &self.watch)
            && let Err(error) = self.device.join(*asked)
        {
            ran = Err(Failed::Together(error));
        }
        if let Err(Failed::Together(CallError::Group(error))) = &ran {
            tracing::warn!(%error, "a call was given up");
        }
        // Calls that came before this one's answer were sent without waiting for it: the engine has
        // changed the buffer under a running call, or is about to.
        connection.read();
        let early = connection.take_calls();
        let ran = ran.map_err(|failed| match failed {
            Failed::Alone { refusal, .. } => refusal,
            Failed::Together(error) => refusal(error, &self.model),
        });
        if let Some(Uplink { pulse, .. }) = &self.uplink {
            match &ran {
                Ok(Served { layer, top_k, phase, took }) => pulse.count_answered(|load| {
                    let of = (*layer, self.model.experts(*layer), *phase);
                    load.count(of, (self.device.assigned(), *top_k), *took);
                }),
                Err(refusal) => pulse.count_refused(refusal),
            }
        }
        match ran {
            Ok(_) => connection.answer(Kind::Done, frame.seq, &[], None),
            Err(refusal) => connection.refuse(&refusal, frame.seq),
        }
        for seq in early {
            if let State::Attached(attachment) = &mut connection.state
                && attachment.next_seq == seq
            {
                attachment.next_seq += 1;
            }
            let with = "a call of this engine, whose answer is to be awaited".to_owned();
            connection.refuse(&Refusal::Busy { with }, seq);
        }
        // Once the engine has its answer: this may write a file.
        if let Some(migrate) = &mut self.migrate {
            migrate.after_call(&mut *self.device);
        }
        Ok(())
    }
}

/// A call that was answered.
struct Served {
    layer: u32,
    top_k: u32,
    phase: Phase,
    took: Duration,
}

/// Why a call has no answer.
enum Failed {
    /// For what its engine sent; this rank has not taken part in the group's call.
    Alone { asked: Option<u32>, refusal: Refusal },
    /// For all ranks.
    Together(CallError),
}

fn run(
    device: &mut dyn Device,
    attachment: &Attachment,
    model: &Model,
    frame: &Frame,
) -> Result<Served, Failed> {
    let began = Instant::now();
    let alone = |asked, refusal| Failed::Alone { asked, refusal };
    let call = Call::decode(&frame.body).map_err(|refusal| alone(None, refusal))?;
    let Call { layer, tokens, top_k, phase } = call;
    let BufferLayout { max_tokens, hidden, topk_ids, topk_weights, output, .. } = attachment.layout;
    if tokens > max_tokens {
        return Err(alone(Some(layer), Refusal::Tokens { tokens, min: 0, max: max_tokens }));
    }
    let call = LayerCall {
        layer,
        tokens,
        top_k,
        form: attachment.form,
        buffer: &attachment.memory,
        offsets: CallOffsets { hidden, topk_ids, topk_weights, output },
    };
    device.run(&call).map_err(|error| match error {
        CallError::Group(_) | CallError::Mismatch(_) => Failed::Together(error),
        error => alone(Some(layer), refusal(error, model)),
    })?;
    Ok(Served { layer, top_k, phase, took: began.elapsed() })
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
