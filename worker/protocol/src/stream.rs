//! Sends and receives bytes, and the file descriptors that travel with them, over a Unix stream.
//! Knows nothing of what they mean.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes asked of the socket at once: several calls or replies.
const READ_BYTES: usize = 4096;

/// Sends what the socket takes of `bytes`; a descriptor goes with the first byte.
///
/// # Errors
/// The socket's; [`io::ErrorKind::WouldBlock`] when it is full and non-blocking.
pub fn send(socket: impl AsFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(fds));
        assert!(fits, "there is room for one descriptor");
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent?),
        }
    }
}

/// Reads once from the socket and gives what came to `feed`; returns a descriptor that came along,
/// and whether the other side is still there.
///
/// # Errors
/// The socket's; [`io::ErrorKind::WouldBlock`] when a non-blocking one, or one with a time-out, has
/// nothing.
pub fn receive(socket: impl AsFd, feed: impl FnOnce(&[u8])) -> io::Result<(bool, Option<OwnedFd>)> {
    let mut bytes = [0; READ_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let read = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            // One that was killed with bytes of ours unread resets the connection.
            Err(Errno::CONNRESET) => break 0,
            message => break message?.bytes,
        }
    };
    let mut received = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            received = fds.last().or(received);
        }
    }
    feed(&bytes[..read]);
    Ok((read > 0, received))
}
