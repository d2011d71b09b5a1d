//! A worker that only speaks with control: the real session, and whatever load a test makes up.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use protocol::message::{ActFormat, Phase, ServedLayer};
use protocol::placement::Placement;
use protocol::session::{
    FromControl, FromWorker, LayerPlacement, LayerWindow, ModelInfo, Register, SESSION_PATH,
    SESSION_VERSION, Window,
};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::header::AUTHORIZATION;
use tungstenite::{Message, WebSocket};

use crate::control_process::Control;

/// How long control may take to say something: far beyond what it needs.
const DEADLINE: Duration = Duration::from_secs(60);

/// A session that stands.
#[derive(Debug)]
pub struct FakeWorker {
    socket: WebSocket<TcpStream>,
    windows: u64,
}

/// What a worker of a made-up model says of itself.
#[must_use]
pub fn register((group, rank, ranks): (&str, u32, u32), layers: u32, experts: u32) -> Register {
    let layer = |number| ServedLayer { number, experts, top_k: 4, hidden: 64, intermediate: 64 };
    Register {
        version: SESSION_VERSION,
        group: group.to_owned(),
        rank,
        ranks,
        incarnation: 1,
        pid: 1,
        host: "made-up".to_owned(),
        socket: "/nowhere".to_owned(),
        device: "none".to_owned(),
        model: ModelInfo {
            name: "made-up".to_owned(),
            digest: format!("{layers} x {experts}"),
            act: vec![ActFormat::Bf16],
            layers: (0..layers).map(layer).collect(),
            unserved: Vec::new(),
        },
        slots_per_rank: experts.div_ceil(ranks),
        layer_slots: Vec::new(),
        max_tokens: 64,
        asks: false,
        stages: false,
    }
}

/// A call of which each expert got so many rows.
#[must_use]
pub fn layer_window(layer: u32, phase: Phase, expert_tokens: Vec<u64>) -> LayerWindow {
    let (tokens, distinct_experts) = (expert_tokens.iter().sum::<u64>() / 4, 1);
    LayerWindow {
        layer,
        phase,
        calls: 1,
        tokens,
        distinct_experts,
        expert_tokens,
        latency_us_p50: 50,
        latency_us_p99: 99,
    }
}

impl FakeWorker {
    /// Dials and registers; returns the version that control answers with, too.
    pub fn dial(control: &Control, register: Register) -> Result<(Self, u32)> {
        let stream = TcpStream::connect(control.address())?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let url = format!("ws://{}{SESSION_PATH}", control.address());
        let mut request = url.into_client_request()?;
        let credential = fs::read_to_string(control.data().join("worker-credential"))?;
        let bearer = format!("Bearer {}", credential.trim()).parse()?;
        request.headers_mut().insert(AUTHORIZATION, bearer);
        let (socket, _) = tungstenite::client(request, stream).ok().context("no session")?;
        let mut worker = Self { socket, windows: 0 };
        worker.say(&FromWorker::Register(Box::new(register)))?;
        match worker.hear()? {
            FromControl::Welcome { version, .. } => Ok((worker, version)),
            other => bail!("control said {other:?}, expected a welcome"),
        }
    }

    /// Says that it holds experts in order.
    pub fn hold_in_order(&mut self, register: &Register) -> Result<()> {
        let Register { ranks, slots_per_rank, .. } = *register;
        let placed = |layer: &ServedLayer| {
            let placement = Placement::contiguous(layer.experts, ranks, slots_per_rank)?;
            Ok(LayerPlacement { layer: layer.number, epoch: 0, placement })
        };
        let layers = register.model.layers.iter().map(placed).collect::<Result<_>>()?;
        self.say(&FromWorker::Holds { layers })
    }

    /// Holds what control tells it to, which it has asked for; the epochs.
    pub fn hold_what_is_told(&mut self) -> Result<Vec<u64>> {
        match self.hear()? {
            FromControl::Place { layers } => {
                let epochs = layers.iter().map(|layer| layer.epoch).collect();
                self.say(&FromWorker::Holds { layers })?;
                Ok(epochs)
            }
            other => bail!("control said {other:?}, expected what to hold"),
        }
    }

    /// Tells a window, the next by number, and waits until it is kept.
    pub fn tell(&mut self, window: Window) -> Result<()> {
        self.windows += 1;
        let number = self.windows;
        self.say(&FromWorker::Window(Window { number, ..window }))?;
        match self.hear()? {
            FromControl::Kept { number: kept } if kept == number => Ok(()),
            other => bail!("control said {other:?}, expected window {number} to be kept"),
        }
    }

    /// Says something.
    pub fn say(&mut self, message: &FromWorker) -> Result<()> {
        Ok(self.socket.send(Message::text(serde_json::to_string(message)?))?)
    }

    /// What control says next, if it does within so long.
    pub fn hear_within(&mut self, time: Duration) -> Result<Option<FromControl>> {
        // Zero would be for ever.
        self.socket.get_ref().set_read_timeout(Some(time.max(Duration::from_micros(100))))?;
        let heard = self.socket.read();
        self.socket.get_ref().set_read_timeout(Some(DEADLINE))?;
        match heard {
            Ok(Message::Text(text)) => Ok(Some(serde_json::from_str(&text)?)),
            Ok(_) => Ok(None),
            Err(tungstenite::Error::Io(error))
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What control says next.
    pub fn hear(&mut self) -> Result<FromControl> {
        loop {
            if let Message::Text(text) = self.socket.read()? {
                return Ok(serde_json::from_str(&text)?);
            }
        }
    }
}
