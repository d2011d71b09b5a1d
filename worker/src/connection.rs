//! One engine's connection: bytes in and out, and how far the two have got with each other. What a
//! frame asks for is done by `rank`.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use kernels::memory::SharedMemory;
use kernels::problem::Form;
use protocol::buffer::BufferLayout;
use protocol::frame::{Decoder, Frame, Kind, Malformed, REQUEST_BYTES_MAX, encode};
use protocol::refusal::Refusal;
use protocol::stream::{receive, send};

use crate::limits::UNREAD_BYTES_MAX;

/// How far engine and worker have got.
#[derive(Debug)]
pub(crate) enum State {
    /// Nothing was said.
    New,
    /// The engine has said who it is.
    Greeted,
    /// It has a buffer.
    Attached(Attachment),
}

/// An engine's buffer, and how its calls are computed.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) form: Form,
    pub(crate) memory: SharedMemory,
    pub(crate) layout: BufferLayout,
    /// Sequence number of the next call.
    pub(crate) next_seq: u64,
    /// Calls of other ranks do not wait for this engine.
    pub(crate) idle: bool,
}

impl Attachment {
    /// Uses a sequence number up.
    pub(crate) fn take_number(&mut self, seq: u64) -> Result<(), Refusal> {
        let expected = self.next_seq;
        if seq != expected {
            return Err(Refusal::Sequence { got: seq, expected });
        }
        self.next_seq += 1;
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) socket: UnixStream,
    pub(crate) client: String,
    pub(crate) state: State,
    /// Frames that have come whole, in order.
    inbox: VecDeque<Result<Frame, Malformed>>,
    decoder: Decoder,
    /// Answers that the socket did not take yet.
    unsent: Vec<u8>,
    /// The other side is gone, or is let go of.
    over: bool,
}

impl Connection {
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            client: String::new(),
            state: State::New,
            inbox: VecDeque::new(),
            decoder: Decoder::new(REQUEST_BYTES_MAX),
            unsent: Vec::new(),
            over: false,
        })
    }

    /// Reads once; returns whether anything came.
    pub(crate) fn read(&mut self) -> bool {
        match receive(&self.socket, |bytes| self.decoder.feed(bytes)) {
            Ok((true, _)) => {}
            Ok((false, _)) => {
                self.over = true;
                return false;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => {
                tracing::debug!(client = self.client, %error, "a connection failed");
                self.over = true;
                return false;
            }
        }
        loop {
            match self.decoder.next_frame().transpose() {
                None => return true,
                Some(frame) => {
                    let lost = matches!(frame, Err(Malformed::Stream(_)));
                    self.inbox.push_back(frame);
                    if lost {
                        return false;
                    }
                }
            }
        }
    }

    /// The oldest frame that was not taken.
    pub(crate) fn next_frame(&mut self) -> Option<Result<Frame, Malformed>> {
        self.inbox.pop_front()
    }

    /// Takes every call out of the inbox: sequence numbers in order.
    pub(crate) fn take_calls(&mut self) -> Vec<u64> {
        let is_call = |frame: &Result<Frame, Malformed>| {
            frame.as_ref().is_ok_and(|frame| frame.kind == Kind::Call)
        };
        let (calls, rest): (VecDeque<_>, _) =
            std::mem::take(&mut self.inbox).into_iter().partition(is_call);
        self.inbox = rest;
        calls.into_iter().flatten().map(|frame| frame.seq).collect()
    }

    /// Whether there is nothing more to be done for the other side.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Lets the other side go once it has read what was answered.
    pub(crate) fn close(&mut self) {
        self.over = true;
        // Closing a socket with unread bytes would take the answer away from the other side.
        if let Err(error) = self.socket.shutdown(Shutdown::Write) {
            tracing::debug!(client = self.client, %error, "an engine is gone");
        }
        while receive(&self.socket, |_| {}).is_ok_and(|(more, _)| more) {}
    }

    /// Whether answers wait for the socket.
    pub(crate) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Answers; what the socket does not take now is sent later, but a descriptor must go now.
    pub(crate) fn answer(&mut self, kind: Kind, seq: u64, body: &[u8], fd: Option<BorrowedFd<'_>>) {
        encode(kind, seq, body, &mut self.unsent);
        self.send(fd);
        if self.unsent.len() > UNREAD_BYTES_MAX {
            tracing::warn!(client = self.client, "dropped: it leaves its answers unread");
            self.over = true;
        }
    }

    /// Refuses a frame.
    pub(crate) fn refuse(&mut self, refusal: &Refusal, seq: u64) {
        tracing::debug!(client = self.client, seq, %refusal, "refused");
        self.answer(Kind::Refused, seq, &serde_json::to_vec(refusal).unwrap_or_default(), None);
    }

    /// Sends what the socket takes of the answers that wait.
    pub(crate) fn flush(&mut self) {
        self.send(None);
    }

    fn send(&mut self, mut fd: Option<BorrowedFd<'_>>) {
        let mut sent = 0;
        while sent < self.unsent.len() {
            match send(&self.socket, &self.unsent[sent..], fd) {
                Ok(bytes) => (sent, fd) = (sent + bytes, None),
                Err(error) if error.kind() == ErrorKind::WouldBlock && fd.is_none() => break,
                Err(error) => {
                    tracing::debug!(client = self.client, %error, "an engine is gone");
                    self.over = true;
                    break;
                }
            }
        }
        self.unsent.drain(..sent);
    }
}
