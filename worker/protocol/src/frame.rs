//! Frames: a header of 24 bytes and a body. Encodes and decodes bytes; what a body means is the
//! business of `message`.
//!
//! | bytes | what, little endian |
//! |---|---|
//! | 0..4 | magic `moep` |
//! | 4..6 | version |
//! | 6..8 | [`Kind`] |
//! | 8..12 | length of the body in bytes |
//! | 12..16 | zero |
//! | 16..24 | sequence number of the call, zero in other frames |

use crate::refusal::Refusal;

/// Version of frames and bodies.
pub const VERSION: u16 = 1;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 24;

/// Longest body that a worker takes: requests are short.
pub const REQUEST_BYTES_MAX: u32 = 64 << 10;

/// Longest body that an engine takes: a refusal may name every tensor that a checkpoint lacks.
pub const REPLY_BYTES_MAX: u32 = 16 << 20;

const MAGIC: [u8; 4] = *b"moep";

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Engine to worker, first: who it is; JSON [`crate::message::Hello`].
    Hello = 1,
    /// Worker to engine: what it is; JSON [`crate::message::Welcome`].
    Welcome = 2,
    /// Engine to worker: asks for a buffer; JSON [`crate::message::Attach`].
    Attach = 3,
    /// Worker to engine: JSON [`crate::message::Attached`], and the descriptor of the buffer.
    Attached = 4,
    /// Engine to worker: run a layer; [`crate::message::Call`].
    Call = 5,
    /// Worker to engine: the output is in the buffer; no body.
    Done = 6,
    /// Worker to engine: a frame was refused; JSON [`Refusal`].
    Refused = 7,
    /// Engine to worker: whether calls of other ranks are to wait for this engine; 4 bytes, 1 is
    /// idle. Answered as a call is.
    Idle = 8,
}

impl Kind {
    /// Every kind, by code.
    pub const ALL: [Self; 8] = [
        Self::Hello,
        Self::Welcome,
        Self::Attach,
        Self::Attached,
        Self::Call,
        Self::Done,
        Self::Refused,
        Self::Idle,
    ];
}

/// One decoded frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// Sequence number of the call that it is about.
    pub seq: u64,
    /// Its body.
    pub body: Vec<u8>,
}

/// Bytes that are no frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Malformed {
    /// A frame that can be passed over: what to answer, and to which sequence number.
    Frame(Refusal, u64),
    /// Bytes after which nothing can be read: the other side does not speak this protocol.
    Stream(Refusal),
}

/// Appends a frame to `out`.
///
/// # Panics
/// When the body is longer than [`REPLY_BYTES_MAX`]: what is sent is bounded by its sender.
pub fn encode(kind: Kind, seq: u64, body: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    assert!(length <= REPLY_BYTES_MAX, "a frame of {length} bytes");
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((kind as u16).to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend([0; 4]);
    out.extend(seq.to_le_bytes());
    out.extend(body);
}

/// Cuts a stream into frames, whatever pieces it comes in.
#[derive(Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Bytes of a frame that is passed over, yet to come.
    skip: u64,
    body_bytes_max: u32,
}

impl Decoder {
    /// A decoder that refuses bodies longer than `body_bytes_max`.
    #[must_use]
    pub fn new(body_bytes_max: u32) -> Self {
        Self { bytes: Vec::new(), skip: 0, body_bytes_max }
    }

    /// Takes what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
        self.skip -= skipped as u64;
        self.bytes.extend(&bytes[skipped..]);
    }

    /// Whether there are bytes of a frame that is not whole.
    #[must_use]
    pub fn is_mid_frame(&self) -> bool {
        self.skip > 0 || !self.bytes.is_empty()
    }

    /// The next whole frame, or what was wrong with it.
    ///
    /// # Errors
    /// [`Malformed`]; after [`Malformed::Frame`] the next frame can be read.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Malformed> {
        let Some(header) = self.bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let magic = [header[0], header[1], header[2], header[3]];
        if magic != MAGIC {
            let got = String::from_utf8_lossy(&magic).into_owned();
            return Err(Malformed::Stream(Refusal::Magic { got }));
        }
        let (version, code) = (field(4), field(6));
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let mut seq = [0; 8];
        seq.copy_from_slice(&header[16..]);
        let seq = u64::from_le_bytes(seq);
        let kind = Kind::ALL.into_iter().find(|&kind| kind as u16 == code);
        let refusal = if version != VERSION {
            Refusal::Version { got: version, expected: VERSION }
        } else if length > self.body_bytes_max {
            Refusal::FrameLength { got: length, max: self.body_bytes_max }
        } else if let Some(kind) = kind {
            let end = HEADER_BYTES + length as usize;
            let Some(body) = self.bytes.get(HEADER_BYTES..end) else { return Ok(None) };
            let body = body.to_vec();
            self.bytes.drain(..end);
            return Ok(Some(Frame { kind, seq, body }));
        } else {
            Refusal::FrameKind { got: code }
        };
        let whole = HEADER_BYTES as u64 + u64::from(length);
        let here = self.bytes.len().min(usize::try_from(whole).unwrap_or(usize::MAX));
        self.bytes.drain(..here);
        self.skip = whole - here as u64;
        Err(Malformed::Frame(refusal, seq))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(kind: Kind, seq: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(kind, seq, body, &mut bytes);
        bytes
    }

    #[test]
    fn the_header_is_what_the_page_says() {
        let bytes = encoded(Kind::Call, 0x0102, b"ab");
        let header = [1, 0, 5, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes, [&b"moep"[..], &header, b"ab"].concat());
    }

    #[test]
    fn bad_frames_are_passed_over() {
        let good = encoded(Kind::Done, 7, b"");
        let changed = |at: usize, value: u8| {
            let mut bytes = encoded(Kind::Call, 5, &[9; 40]);
            bytes[at] = value;
            bytes
        };
        let long = encoded(Kind::Call, 5, &[9; 200]);
        let cases = [
            (changed(4, 9), Refusal::Version { got: 9, expected: 1 }),
            (changed(6, 99), Refusal::FrameKind { got: 99 }),
            (long, Refusal::FrameLength { got: 200, max: 100 }),
        ];
        for (bad, refusal) in cases {
            // Whole, and in the smallest pieces.
            for piece in [usize::MAX, 1] {
                let seen = decoded([&bad[..], &good].concat().chunks(piece));
                let done = Frame { kind: Kind::Done, seq: 7, body: Vec::new() };
                let refused = Malformed::Frame(refusal.clone(), 5);
                assert_eq!(seen, [Err(refused), Ok(done)]);
            }
        }
    }

    /// What comes out of pieces that end with a whole frame.
    fn decoded<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Result<Frame, Malformed>> {
        let mut decoder = Decoder::new(100);
        let mut seen = Vec::new();
        for piece in pieces {
            decoder.feed(piece);
            seen.extend(std::iter::from_fn(|| decoder.next_frame().transpose()));
        }
        assert!(!decoder.is_mid_frame());
        seen
    }

    #[test]
    fn another_protocol_ends_the_stream() {
        let mut decoder = Decoder::new(100);
        decoder.feed(b"GET / HTTP/1.1\r\nHost: localhost\r\n");
        let refusal = Refusal::Magic { got: "GET ".to_owned() };
        assert_eq!(decoder.next_frame(), Err(Malformed::Stream(refusal)));
    }

    proptest! {
        /// Frames come out as they went in, however the stream is cut.
        #[test]
        fn any_pieces_give_the_same_frames(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..90), 1..6),
            piece in 1_usize..64,
        ) {
            let mut stream = Vec::new();
            for (seq, body) in (0..).zip(&bodies) {
                encode(Kind::Attach, seq, body, &mut stream);
            }
            let mut decoder = Decoder::new(100);
            let mut seen = Vec::new();
            for piece in stream.chunks(piece) {
                decoder.feed(piece);
                while let Ok(Some(frame)) = decoder.next_frame() {
                    prop_assert_eq!(frame.seq, seen.len() as u64);
                    seen.push(frame.body);
                }
            }
            prop_assert_eq!(seen, bodies);
        }

        /// No bytes make the decoder panic or hold more than it was fed.
        #[test]
        fn any_bytes_are_taken(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new(100);
            decoder.feed(&bytes);
            while let Ok(Some(_)) | Err(Malformed::Frame(..)) = decoder.next_frame() {}
        }
    }
}
