//! The session with control: a thread of its own, so that nothing of it is on the way of a call. It
//! dials, registers, hands on what control wants the rank to load, and says how the rank is; when control
//! is away it tries again.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use protocol::session::{FromControl, FromWorker, LayerPlacement, Register, SESSION_PATH, Window};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::header::{AUTHORIZATION, HeaderValue, InvalidHeaderValue};
use tungstenite::{HandshakeError, Message, WebSocket};

use crate::config::ControlConfig;
use crate::limits::{CONTROL_PATIENCE, CONTROL_TICK, FAREWELL, RECONNECT, WINDOW, WINDOWS_MAX};
use crate::orders::Orders;
use crate::pulse::{Pulse, now_ms};
use crate::wire::{TlsError, Wire};

/// Ends the session when dropped.
#[derive(Debug)]
pub(crate) struct Uplink {
    /// What control is told of the rank.
    pub(crate) pulse: Arc<Pulse>,
    /// What control wants the rank to load: nothing if it leaves that to the rank.
    pub(crate) placed: Receiver<Vec<LayerPlacement>>,
    /// Where orders go; set once the rank takes them.
    pub(crate) orders: Arc<OnceLock<Orders>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the credential in {} cannot be read", path.display())]
    Credential { path: PathBuf, source: io::Error },
    #[error("the credential is no header")]
    Header(#[from] InvalidHeaderValue),
    #[error("{url} has no address")]
    Address { url: String },
    #[error("no connection")]
    Connect(#[from] io::Error),
    #[error("no TLS")]
    Tls(#[from] TlsError),
    #[error("the connection failed")]
    Socket(#[from] tungstenite::Error),
    #[error("control answered nothing in {} s", CONTROL_PATIENCE.as_secs())]
    Silent,
    #[error("control closed the session")]
    Closed,
    #[error("control refuses this worker: {reason}")]
    Refused { reason: String },
    #[error("control said what is not understood")]
    Json(#[from] serde_json::Error),
}

impl Uplink {
    /// Starts the thread.
    pub(crate) fn start(config: ControlConfig, register: Register) -> io::Result<Self> {
        let told = Arc::new(Pulse::new());
        let pulse = Arc::clone(&told);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let windows = Windows::new(pulse);
        let (place, placed) = sync_channel(1);
        let orders = Arc::new(OnceLock::new());
        let put = Arc::clone(&orders);
        let dialler = Dialler { config, register, windows, place, orders: put, stop: stopped };
        let thread = thread::Builder::new().name("uplink".to_owned()).spawn(|| dialler.run())?;
        Ok(Self { pulse: told, placed, orders, stop, thread: Some(thread) })
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        thread.thread().unpark();
        if thread.join().is_err() {
            tracing::error!("the thread that speaks with control panicked");
        }
    }
}

struct Dialler {
    config: ControlConfig,
    register: Register,
    windows: Windows,
    place: SyncSender<Vec<LayerPlacement>>,
    orders: Arc<OnceLock<Orders>>,
    stop: Arc<AtomicBool>,
}

/// Version of control's since which it is told of tactics.
const TACTICS_SINCE: u32 = 5;

/// What was said in a session.
#[derive(Default)]
struct Said {
    /// Control's version: it is told nothing that it does not know.
    version: u32,
    /// Numbers of what the rank holds, and of what is on its way.
    holds: u64,
    staging: u64,
    /// Number of what it knows of tactics.
    tactics: u64,
    /// Number of a window.
    window: Option<u64>,
}

/// Windows as they end, until control has kept them.
struct Windows {
    pulse: Arc<Pulse>,
    every: Duration,
    /// When the open window ends.
    next: Instant,
    unkept: VecDeque<Window>,
}

impl Windows {
    fn new(pulse: Arc<Pulse>) -> Self {
        let unkept = VecDeque::new();
        Self { pulse, every: WINDOW, next: next_end(WINDOW, now_ms()), unkept }
    }

    fn set_length(&mut self, every: Duration) {
        (self.every, self.next) = (every, next_end(every, now_ms()));
    }

    /// Ends the window if it is time.
    fn close_due(&mut self) {
        if Instant::now() >= self.next {
            self.close(None);
        }
    }

    fn close(&mut self, closed_by: Option<u64>) {
        self.next = next_end(self.every, now_ms());
        if self.unkept.len() == WINDOWS_MAX {
            tracing::warn!("control has been away for long: the oldest window is dropped");
            self.unkept.pop_front();
        }
        self.unkept.extend(self.pulse.close_window(closed_by));
    }

    fn kept(&mut self, number: u64) {
        self.unkept.retain(|window| window.number != number);
    }
}

/// When the clock, which shows `now_ms`, will show the next multiple of `every`.
fn next_end(every: Duration, now_ms: u64) -> Instant {
    let every = u64::try_from(every.as_millis()).unwrap_or(u64::MAX).max(1);
    Instant::now() + Duration::from_millis(every - now_ms % every)
}

impl Dialler {
    fn run(mut self) {
        let mut wait = RECONNECT.0;
        let mut told = false;
        while !self.stop.load(Ordering::Acquire) {
            let mut stood = false;
            match self.session(&mut stood) {
                Ok(()) => return,
                // Once for each time that control is away.
                Err(lost) if stood || !told => {
                    let error = &lost as &dyn std::error::Error;
                    tracing::warn!(url = self.config.url, error, "no session with control");
                    told = true;
                }
                Err(lost) => tracing::debug!(%lost, "no session with control"),
            }
            wait = if stood { RECONNECT.0 } else { (wait * 2).min(RECONNECT.1) };
            self.windows.close_due();
            // Ended early when the worker stops.
            thread::park_timeout(wait);
        }
    }

    /// One session, to its end; sets `stood` once control has welcomed this worker.
    fn session(&mut self, stood: &mut bool) -> Result<(), Lost> {
        let mut socket = self.dial()?;
        // Who has loaded has nothing to ask.
        self.register.asks &= self.windows.pulse.holds(0).is_none();
        say(&mut socket, &FromWorker::Register(Box::new(self.register.clone())))?;
        let (version, beat) = self.welcome(&mut socket)?;
        *stood = true;
        tracing::info!(url = self.config.url, "session with control stands");
        let (mut next, mut said) = (Instant::now(), Said { version, ..Said::default() });
        while !self.stop.load(Ordering::Acquire) {
            if Instant::now() >= next {
                say(&mut socket, &FromWorker::Heartbeat(self.windows.pulse.heartbeat()))?;
                next = Instant::now() + beat;
            }
            self.windows.close_due();
            self.exchange(&mut socket, &mut said)?;
        }
        // What was served last is not lost, if control is quick.
        self.windows.close(None);
        let began = Instant::now();
        while !self.windows.unkept.is_empty() && began.elapsed() < FAREWELL {
            self.exchange(&mut socket, &mut said)?;
        }
        socket.close(None)?;
        Ok(())
    }

    /// Says what the rank holds and its oldest window, unless that was said, and hears what control says.
    fn exchange(&mut self, socket: &mut WebSocket<Wire>, said: &mut Said) -> Result<(), Lost> {
        // In this order: what is in force is never neither on its way nor held.
        if let Some((number, layers)) = self.windows.pulse.holds(said.holds) {
            say(socket, &FromWorker::Holds { layers })?;
            said.holds = number;
        }
        if let Some((number, (layers, bytes_per_second))) = self.windows.pulse.staging(said.staging)
        {
            say(socket, &FromWorker::Staging { layers, bytes_per_second })?;
            said.staging = number;
        }
        if said.version >= TACTICS_SINCE
            && let Some((number, tactics)) = self.windows.pulse.tactics(said.tactics)
        {
            say(socket, &FromWorker::Tactics(Box::new(tactics)))?;
            said.tactics = number;
        }
        if let Some(oldest) = self.windows.unkept.front()
            && said.window != Some(oldest.number)
        {
            say(socket, &FromWorker::Window(oldest.clone()))?;
            said.window = Some(oldest.number);
        }
        match hear(socket)? {
            Some(FromControl::Refused { reason }) => Err(Lost::Refused { reason }),
            Some(FromControl::Kept { number }) => {
                self.windows.kept(number);
                Ok(())
            }
            Some(FromControl::Close { mark_ms }) => {
                self.windows.close(Some(mark_ms));
                Ok(())
            }
            Some(FromControl::Place { layers }) => {
                // A rank that has waited long enough for it has loaded something else.
                if self.place.try_send(layers).is_err() {
                    tracing::info!("control's placement comes too late to be loaded");
                }
                Ok(())
            }
            Some(
                order @ (FromControl::Throttle { .. }
                | FromControl::Stage { .. }
                | FromControl::Ready { .. }
                | FromControl::Choose { .. }),
            ) => {
                if !self.orders.get().is_some_and(|orders| orders.put(order)) {
                    tracing::debug!("an order was not taken: it comes again");
                }
                Ok(())
            }
            Some(FromControl::Welcome { .. }) | None => Ok(()),
        }
    }

    fn dial(&self) -> Result<WebSocket<Wire>, Lost> {
        let ControlConfig { url, ca, credential } = &self.config;
        let address = || Lost::Address { url: url.clone() };
        let (scheme, authority) = url.split_once("://").ok_or_else(address)?;
        let authority = authority.trim_end_matches('/');
        let path = credential.clone();
        let token = fs::read_to_string(credential);
        let token = token.map_err(|source| Lost::Credential { path, source })?;
        let to = authority.to_socket_addrs()?.next().ok_or_else(address)?;
        let stream = TcpStream::connect_timeout(&to, CONTROL_PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CONTROL_PATIENCE))?;
        stream.set_write_timeout(Some(CONTROL_PATIENCE))?;
        let stream = match ca {
            Some(ca) => Wire::tls(stream, ca, authority)?,
            None => Wire::Plain(stream),
        };
        let mut request = format!("{scheme}://{authority}{SESSION_PATH}").into_client_request()?;
        let bearer = HeaderValue::from_str(&format!("Bearer {}", token.trim()))?;
        request.headers_mut().insert(AUTHORIZATION, bearer);
        let (socket, _) = tungstenite::client(request, stream).map_err(|error| match error {
            HandshakeError::Failure(error) => Lost::Socket(error),
            HandshakeError::Interrupted(_) => Lost::Silent,
        })?;
        socket.get_ref().tcp().set_read_timeout(Some(CONTROL_TICK))?;
        Ok(socket)
    }

    /// Control's version, and the time between heartbeats.
    fn welcome(&mut self, socket: &mut WebSocket<Wire>) -> Result<(u32, Duration), Lost> {
        let began = Instant::now();
        while began.elapsed() < CONTROL_PATIENCE && !self.stop.load(Ordering::Acquire) {
            match hear(socket)? {
                Some(FromControl::Welcome { version, heartbeat_ms, window_ms }) => {
                    self.windows.set_length(Duration::from_millis(window_ms));
                    return Ok((version, Duration::from_millis(heartbeat_ms)));
                }
                Some(FromControl::Refused { reason }) => return Err(Lost::Refused { reason }),
                Some(_) | None => {}
            }
        }
        Err(Lost::Silent)
    }
}

fn say(socket: &mut WebSocket<Wire>, message: &FromWorker) -> Result<(), Lost> {
    Ok(socket.send(Message::text(serde_json::to_string(message)?))?)
}

/// What control has said, if anything within a tick.
fn hear(socket: &mut WebSocket<Wire>) -> Result<Option<FromControl>, Lost> {
    match socket.read() {
        Ok(Message::Text(text)) => Ok(Some(serde_json::from_str(&text)?)),
        Ok(Message::Close(_)) => Err(Lost::Closed),
        Ok(_) => Ok(None),
        Err(tungstenite::Error::Io(error))
            if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
