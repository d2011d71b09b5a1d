//! One worker's WebSocket: it registers, then says how it is, until one side leaves. Whom to let in is
//! decided in `fleet`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use protocol::session::{
    FromControl, FromWorker, LayerPlacement, Register, SESSION_VERSION, Window,
};
use serde_json::json;
use tokio::sync::mpsc;

use crate::config::Config;
use crate::fleet::{Admitted, Command, Refusal};
use crate::limits::{COUNT_MAX, REGISTER_SECONDS_MAX};
use crate::state::{Shared, now_ms, stopped};
use crate::store::StoreError;
use crate::store::placements::PlaceError;

/// Why a session ended other than by the worker's leave.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the connection failed")]
    Socket(#[from] axum::Error),
    #[error("a message is not understood: {0}")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("what was said could not be stored")]
    Store(#[from] StoreError),
    #[error("window {number}: {what} is {got}, expected {expected}")]
    Window { number: u64, what: &'static str, got: String, expected: String },
    #[error("{got} came, expected {expected}")]
    Order { got: &'static str, expected: &'static str },
    #[error("nothing was heard for {patience_ms} ms")]
    Silent { patience_ms: u64 },
    #[error("a later process of this rank has registered")]
    Replaced,
    #[error("the credential has ended")]
    Credential,
}

/// Runs the session to its end. `credential` is the hash of what the worker was let in by.
pub(crate) async fn run(state: Shared, mut socket: WebSocket, credential: String) {
    let Err(ended) = greet(&state, &mut socket, &credential).await else { return };
    tracing::warn!(error = &ended as &dyn std::error::Error, "a session ended");
    let reason = ended.to_string();
    if let Err(error) = say(&mut socket, &FromControl::Refused { reason }).await {
        tracing::debug!(%error, "the reason could not be told");
    }
}

async fn greet(state: &Shared, socket: &mut WebSocket, credential: &str) -> Result<(), Ended> {
    let expected = "a registration";
    let patience = Duration::from_secs(REGISTER_SECONDS_MAX);
    let register = match tokio::time::timeout(patience, hear(socket)).await {
        Ok(message) => match message? {
            Some(FromWorker::Register(register)) => register,
            Some(other) => return Err(Ended::Order { got: name(&other), expected }),
            None => return Ok(()),
        },
        Err(_elapsed) => return Err(Ended::Order { got: "nothing", expected }),
    };
    let now = now_ms();
    let mut admitted = state.fleet().admit(&register, now, state.patience_ms())?;
    let kept = state.store.keep_worker(&register, now).await;
    let (group, rank) = (&register.group, register.rank);
    tracing::info!(group, rank, pid = register.pid, host = register.host, "a worker registered");
    let ended = match kept {
        Ok(()) => {
            state.fleet().keep(&register, admitted.session);
            tell_of(state, &register).await?;
            serve(state, socket, (&register, credential), &mut admitted).await
        }
        Err(error) => Err(error.into()),
    };
    let left = state.fleet().leave(&register, admitted.session);
    if let Some(last_seen_ms) = left {
        tracing::info!(group, rank, "a worker left");
        state.store.saw_worker(&register, last_seen_ms).await?;
        tell_of(state, &register).await?;
    }
    ended
}

/// Tells those who watch how a worker is now.
async fn tell_of(state: &Shared, of: &Register) -> Result<(), StoreError> {
    let (now_ms, Register { group, rank, .. }) = (now_ms(), of);
    let presence = {
        let fleet = state.fleet();
        let worker = fleet.groups.get(group).and_then(|ranks| ranks.get(rank));
        worker.map(|worker| worker.presence(now_ms, state.patience_ms()).name())
    };
    let worker = json!({ "group": group, "rank": rank, "state": presence });
    state.store.tell("worker", &worker, now_ms).await
}

async fn serve(
    state: &Shared,
    socket: &mut WebSocket,
    (register, credential): (&Register, &str),
    admitted: &mut Admitted,
) -> Result<(), Ended> {
    let Config { heartbeat_ms, window_ms, .. } = state.config;
    let version = register.version.min(SESSION_VERSION);
    say(socket, &FromControl::Welcome { version, heartbeat_ms, window_ms }).await?;
    if register.asks {
        let layers = place(state, register, admitted.session).await?;
        say(socket, &FromControl::Place { layers }).await?;
    }
    let patience_ms = state.patience_ms();
    let mut stop = state.stop.clone();
    // Who waits for the end of which window.
    let mut closing: Vec<(u64, mpsc::Sender<u32>)> = Vec::new();
    loop {
        let silent = tokio::time::sleep(Duration::from_millis(patience_ms));
        tokio::select! {
            message = hear(socket) => match message? {
                Some(FromWorker::Heartbeat(beat)) => {
                    if state.store.actor(credential, now_ms()).await?.is_none() {
                        return Err(Ended::Credential);
                    }
                    if !state.fleet().hear(register, admitted.session, now_ms(), beat) {
                        return Err(Ended::Replaced);
                    }
                }
                Some(FromWorker::Window(window)) => {
                    check_window(register, &window)?;
                    let end_ms = end_of(&window, window_ms);
                    state.store.keep_window(register, &window, end_ms).await?;
                    say(socket, &FromControl::Kept { number: window.number }).await?;
                    for (_, closed) in closing.extract_if(.., |(mark_ms, _)| {
                        window.closed_by == Some(*mark_ms)
                    }) {
                        if closed.try_send(register.rank).is_err() {
                            tracing::debug!("whoever asked for the window has gone");
                        }
                    }
                }
                Some(FromWorker::Holds { layers }) => {
                    state.fleet().hold(register, admitted.session, layers)?;
                    tell_of(state, register).await?;
                    tell_in_force(state, &register.group).await?;
                }
                Some(FromWorker::Staging { layers, bytes_per_second }) => {
                    let staging = (layers, bytes_per_second);
                    state.fleet().stage(register, admitted.session, staging);
                    state.staged.notify_one();
                }
                Some(FromWorker::Tactics(tactics)) => {
                    state.fleet().tell_tactics(register, admitted.session, *tactics.clone())?;
                    state.store.keep_measurements(&tactics).await?;
                    state.tactics_told.notify_one();
                }
                Some(again @ FromWorker::Register(_)) => {
                    return Err(Ended::Order { got: name(&again), expected: "a heartbeat" });
                }
                None => return Ok(()),
            },
            command = admitted.commands.recv() => match command {
                Some(Command::CloseWindow { mark_ms, closed }) => {
                    say(socket, &FromControl::Close { mark_ms }).await?;
                    closing.push((mark_ms, closed));
                }
                Some(Command::Order(order)) => say(socket, &order).await?,
                None => return Err(Ended::Replaced),
            },
            () = silent => return Err(Ended::Silent { patience_ms }),
            () = stopped(&mut stop) => return Ok(()),
        }
    }
}

/// What the worker is to hold: what the others of its group do, or what is committed. Nothing if a file
/// does not fit, which is then shown.
async fn place(
    state: &Shared,
    register: &Register,
    session: u64,
) -> Result<Vec<LayerPlacement>, StoreError> {
    let group = &register.group;
    let others = state.fleet().placements_of_others(register, now_ms(), state.patience_ms());
    let placements = match others {
        Some(placements) => what_others_come_to(state, register, placements).await?,
        None => match state.store.place(register, state.files.get(group), now_ms()).await {
            Ok(placements) => {
                state.fleet().problems.remove(group);
                placements.into()
            }
            Err(PlaceError::Store(error)) => return Err(error),
            Err(PlaceError::Misfit(misfit)) => {
                tracing::error!(group, error = %misfit, "no placement");
                state.fleet().problems.insert(group.clone(), misfit.to_string());
                return Ok(Vec::new());
            }
        },
    };
    state.fleet().place(register, session, Arc::clone(&placements));
    Ok(placements.to_vec())
}

/// What the other ranks hold, but for layers in which they come to hold something else and there is no way back: they may not
/// wait for this one.
async fn what_others_come_to(
    state: &Shared,
    register: &Register,
    held: Arc<[LayerPlacement]>,
) -> Result<Arc<[LayerPlacement]>, StoreError> {
    let bound = state.fleet().bound_of_others(register);
    let of = (&register.group[..], &register.model.digest[..]);
    let mut coming = held.to_vec();
    for placed in &mut coming {
        let Some(&epoch) = bound.get(&placed.layer).filter(|epoch| **epoch > placed.epoch) else {
            continue;
        };
        let found = state.store.epochs(of, placed.layer, epoch + 1, 1).await?;
        if let Some(found) = found.into_iter().find(|found| found.epoch == epoch) {
            *placed = found.into();
        }
    }
    Ok(if coming[..] == held[..] { held } else { coming.into() })
}

/// Tells those who watch that a placement is in force, if one is.
async fn tell_in_force(state: &Shared, group: &str) -> Result<(), StoreError> {
    let now_ms = now_ms();
    let epochs: Option<Vec<u64>> = {
        let fleet = state.fleet();
        let in_force = fleet.in_force(group, now_ms, state.patience_ms());
        in_force.map(|layers| layers.iter().map(|layer| layer.epoch).collect())
    };
    match epochs {
        Some(epochs) => {
            let placement = json!({ "group": group, "epochs": epochs });
            state.store.tell("placement", &placement, now_ms).await
        }
        None => Ok(()),
    }
}

fn name(message: &FromWorker) -> &'static str {
    match message {
        FromWorker::Register(_) => "a registration",
        FromWorker::Holds { .. } => "what it holds",
        FromWorker::Staging { .. } => "what is on its way",
        FromWorker::Tactics(_) => "what it knows of tactics",
        FromWorker::Heartbeat(_) => "a heartbeat",
        FromWorker::Window(_) => "a window",
    }
}

/// The end by which windows of ranks are one: when control asked for it, otherwise the last multiple of
/// their length that the clock has shown in them. A worker that ends closes its last one without either.
fn end_of(window: &Window, window_ms: u64) -> u64 {
    let Window { start_ms, end_ms, closed_by, .. } = *window;
    // A timer may go off a little early.
    let by_clock = (end_ms + window_ms / 20) / window_ms * window_ms;
    closed_by.unwrap_or(if by_clock > start_ms { by_clock } else { end_ms })
}

/// Refuses a window that the registered model cannot have.
fn check_window(register: &Register, window: &Window) -> Result<(), Ended> {
    let number = window.number;
    let wrong =
        |what, got: String, expected: String| Err(Ended::Window { number, what, got, expected });
    let latest = window.end_ms.max(window.closed_by.unwrap_or(0));
    if latest > COUNT_MAX {
        return wrong("the end", latest.to_string(), format!("at most {COUNT_MAX}"));
    }
    if window.start_ms > window.end_ms {
        let expected = format!("at least its begin {}", window.start_ms);
        return wrong("the end", window.end_ms.to_string(), expected);
    }
    for layer in &window.layers {
        let known = register.model.layers.iter().find(|known| known.number == layer.layer);
        let Some(known) = known else {
            return wrong("a layer", layer.layer.to_string(), "a served one".to_owned());
        };
        let experts = layer.expert_tokens.len();
        if experts != known.experts as usize {
            return wrong("the number of experts", experts.to_string(), known.experts.to_string());
        }
        let counts = [layer.calls, layer.tokens, layer.distinct_experts];
        let largest = layer.expert_tokens.iter().chain(&counts).max().copied().unwrap_or(0);
        if largest > COUNT_MAX {
            return wrong("a count", largest.to_string(), format!("at most {COUNT_MAX}"));
        }
    }
    Ok(())
}

async fn say(socket: &mut WebSocket, message: &FromControl) -> Result<(), Ended> {
    Ok(socket.send(Message::Text(serde_json::to_string(message)?.into())).await?)
}

/// The next message; none when the worker has left.
async fn hear(socket: &mut WebSocket) -> Result<Option<FromWorker>, Ended> {
    loop {
        match socket.recv().await.transpose()? {
            Some(Message::Text(text)) => return Ok(Some(serde_json::from_str(&text)?)),
            Some(Message::Ping(_) | Message::Pong(_)) => {}
            Some(Message::Binary(_)) => {
                return Err(Ended::Order { got: "a binary frame", expected: "JSON text" });
            }
            Some(Message::Close(_)) | None => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_ranks_are_one_by_the_clock_or_by_command() {
        let cases = [
            // Late or a little early, whatever it began with.
            ((0, 10_090, None), 10_000),
            ((9_000, 9_990, None), 10_000),
            ((0, 31_000, None), 30_000),
            // The last of a worker that ends between two multiples.
            ((10_500, 14_000, None), 14_000),
            ((10_500, 10_510, Some(10_499)), 10_499),
        ];
        for ((start_ms, end_ms, closed_by), expected) in cases {
            let window = Window { number: 1, start_ms, end_ms, closed_by, layers: Vec::new() };
            assert_eq!(end_of(&window, 10_000), expected, "{window:?}");
        }
    }
}
