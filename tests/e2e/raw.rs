//! Frames that no client of ours would send.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use protocol::frame::{Decoder, Frame, Kind, REPLY_BYTES_MAX, encode};
use protocol::message::{Attach, Call, Hello, Phase};
use protocol::refusal::Refusal;
use serde_json::json;
use tests::call::attach;
use tests::worker_process::Worker;

use crate::{BF16, skewed};

/// A connection that speaks in bytes.
pub(crate) struct Raw {
    pub(crate) socket: UnixStream,
    decoder: Decoder,
}

impl Raw {
    pub(crate) fn connect(worker: &Worker) -> Self {
        let socket = UnixStream::connect(worker.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { socket, decoder: Decoder::new(REPLY_BYTES_MAX) }
    }

    /// A connection that is attached for 300 tokens.
    pub(crate) fn attached(worker: &Worker) -> Self {
        let mut raw = Self::connect(worker);
        raw.send(&hello());
        assert_eq!(raw.frame().unwrap().kind, Kind::Welcome);
        raw.send(&frame(Kind::Attach, 0, &attach_body(300)));
        assert_eq!(raw.frame().unwrap().kind, Kind::Attached);
        raw
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// The next frame; none when the worker has closed the connection.
    pub(crate) fn frame(&mut self) -> Option<Frame> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => return None,
                Ok(read) => self.decoder.feed(&bytes[..read]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub(crate) fn refusal(&mut self) -> (u64, Refusal) {
        let frame = self.frame().unwrap();
        assert_eq!(frame.kind, Kind::Refused, "{frame:?}");
        (frame.seq, serde_json::from_slice(&frame.body).unwrap())
    }
}

pub(crate) fn frame(kind: Kind, seq: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(kind, seq, body, &mut bytes);
    bytes
}

fn hello() -> Vec<u8> {
    let hello = Hello { client: "raw".to_owned(), features: vec!["of tomorrow".to_owned()] };
    frame(Kind::Hello, 0, &serde_json::to_vec(&hello).unwrap())
}

fn attach_body(max_tokens: u32) -> Vec<u8> {
    serde_json::to_vec(&Attach { max_tokens, ..attach(BF16, 0) }).unwrap()
}

/// A call without tokens.
pub(crate) fn call(seq: u64) -> Vec<u8> {
    let call = Call { layer: 0, tokens: 0, top_k: 4, phase: Phase::Decode };
    frame(Kind::Call, seq, &call.encode())
}

#[test]
fn frames_of_the_wrong_form_are_refused_and_the_connection_lives() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let mut raw = Raw::attached(&worker);
    let changed = |at: usize, value: u8| {
        let mut bytes = call(1);
        bytes[at] = value;
        bytes
    };
    raw.send(&changed(4, 7));
    assert_eq!(raw.refusal(), (1, Refusal::Version { got: 7, expected: 1 }));
    raw.send(&changed(6, 99));
    assert_eq!(raw.refusal(), (1, Refusal::FrameKind { got: 99 }));
    raw.send(&frame(Kind::Done, 4, b""));
    assert_eq!(raw.refusal(), (4, Refusal::FrameKind { got: 6 }));
    raw.send(&frame(Kind::Call, 1, &vec![0; 100_000]));
    assert_eq!(raw.refusal(), (1, Refusal::FrameLength { got: 100_000, max: 65_536 }));
    raw.send(&frame(Kind::Call, 1, &[0; 12]));
    let reason = "12 bytes, expected 16".to_owned();
    assert_eq!(raw.refusal(), (1, Refusal::Body { kind: "call".to_owned(), reason }));
    // The frame before had a sequence number and has used it.
    raw.send(&call(9));
    assert_eq!(raw.refusal(), (9, Refusal::Sequence { got: 9, expected: 2 }));
    raw.send(&call(2));
    assert_eq!(raw.frame().unwrap(), Frame { kind: Kind::Done, seq: 2, body: Vec::new() });
}

#[test]
fn frames_out_of_order_are_refused_and_the_connection_lives() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let mut raw = Raw::connect(&worker);
    let order = |got: &str, expected: &str| Refusal::Order {
        got: got.to_owned(),
        expected: expected.to_owned(),
    };
    raw.send(&call(1));
    assert_eq!(raw.refusal(), (1, order("call", "hello")));
    raw.send(&frame(Kind::Attach, 0, &attach_body(300)));
    assert_eq!(raw.refusal(), (0, order("attach", "hello")));
    raw.send(&frame(Kind::Hello, 0, b"{\"client\": 3}"));
    assert!(matches!(raw.refusal().1, Refusal::Body { .. }));
    raw.send(&hello());
    assert_eq!(raw.frame().unwrap().kind, Kind::Welcome);
    raw.send(&hello());
    assert_eq!(raw.refusal(), (0, order("hello", "attach")));
    let fp8 = json!({"act": "fp8", "max_tokens": 1}).to_string();
    raw.send(&frame(Kind::Attach, 0, fp8.as_bytes()));
    let (_, refusal) = raw.refusal();
    assert!(refusal.to_string().contains("unknown variant `fp8`"), "{refusal}");
    raw.send(&frame(Kind::Attach, 0, &attach_body(0)));
    assert_eq!(raw.refusal().1, Refusal::Tokens { tokens: 0, min: 1, max: 8192 });
    raw.send(&frame(Kind::Attach, 0, &attach_body(8193)));
    assert_eq!(raw.refusal().1, Refusal::Tokens { tokens: 8193, min: 1, max: 8192 });
    raw.send(&frame(Kind::Attach, 0, &attach_body(300)));
    assert_eq!(raw.frame().unwrap().kind, Kind::Attached);
    raw.send(&call(1));
    assert_eq!(raw.frame().unwrap().kind, Kind::Done);
}

#[test]
fn a_call_that_does_not_wait_for_the_answer_is_busy() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let mut raw = Raw::attached(&worker);
    raw.send(&[call(1), call(2), call(3)].concat());
    assert_eq!(raw.frame().unwrap(), Frame { kind: Kind::Done, seq: 1, body: Vec::new() });
    for early in [2, 3] {
        let (seq, refusal) = raw.refusal();
        let said = "busy with a call of this engine, whose answer is to be awaited";
        assert_eq!((seq, refusal.to_string()), (early, said.to_owned()));
    }
    raw.send(&call(4));
    assert_eq!(raw.frame().unwrap().seq, 4);
}

#[test]
fn another_protocol_is_told_so_and_let_go() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let mut raw = Raw::connect(&worker);
    raw.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(raw.refusal().1, Refusal::Magic { got: "GET ".to_owned() });
    assert_eq!(raw.frame(), None);
    Raw::attached(&worker);
}

#[test]
fn too_many_engines_are_told_so_and_let_go() {
    let worker = Worker::start(&skewed(), &[]).unwrap();
    let mut connected: Vec<Raw> = (0..64).map(|_| Raw::attached(&worker)).collect();
    let mut one_more = Raw::connect(&worker);
    assert_eq!(one_more.refusal().1, Refusal::Busy { with: "64 engines".to_owned() });
    assert_eq!(one_more.frame(), None);
    for raw in &mut connected {
        raw.send(&call(1));
        assert_eq!(raw.frame().unwrap().kind, Kind::Done);
    }
    drop(connected);
    Raw::attached(&worker);
}
