//! From the tunnel to the application.

use std::io::{ErrorKind, IoSliceMut};
use std::sync::atomic::Ordering::Relaxed;

use tokio::task::yield_now;

use super::super::buffer::{Buffer, Pieces};
use super::super::socket::{self, Room};
use super::super::{Cut, Rounds};
use super::{Common, Pace, blocked};
use crate::proxy::stream::{DATA, Malformed, Message, OutOfOrder};
use crate::proxy::tls::{Event, Reader};

/// Goes on after END until the own direction has ended: a reset may still come.
///
/// Whenever it waits for the tunnel, what it has read and not opened is in `received`, so it may be dropped then.
pub(super) fn down<'a>(
    common: &'a Common<'_>,
    reader: &'a mut Reader,
    received: &'a mut Vec<u8>,
) -> impl Future<Output = Result<(), Cut>> + Send {
    async move {
        let (mut pace, mut rounds) = (Pace::new(), Rounds::default());
        let mut next_wait = if received.is_empty() { Wait::Tunnel } else { Wait::Nothing };
        loop {
            match std::mem::replace(&mut next_wait, Wait::Tunnel) {
                Wait::Tunnel => socket::readable(common.tunnel).await.map_err(Cut::Tunnel)?,
                Wait::Others => yield_now().await,
                Wait::Nothing => {}
            }
            let mut have = received.len();
            let mut buffer = common.budget.take_for(have, pace.size());
            buffer.bytes[..have].copy_from_slice(received);
            *received = Vec::new();
            let mut next = 0;
            loop {
                let opened = loop {
                    let opened = open(common, reader, &mut buffer, next, have)?;
                    match opened {
                        Opened::All(used) => break used,
                        Opened::Blocked(rest) => {
                            next = rest.next;
                            let then = rest.then;
                            blocked(deliver(common, &buffer.bytes, rest.pieces)).await?;
                            if settle(common, then)? {
                                break next;
                            }
                        }
                    }
                };
                next = 0;
                buffer.bytes.copy_within(opened..have, 0);
                have -= opened;
                let over = common.received_end.get() && common.sent_end.get();
                if !over && rounds.over() {
                    *received = buffer.bytes[..have].to_vec();
                    next_wait = Wait::Others;
                    break;
                }
                match if over { None } else { fill(common, &mut buffer, have)? } {
                    Some(read) => {
                        have += read;
                        pace.moved(read, buffer.size);
                    }
                    None => {
                        reader.rest();
                        *received = buffer.bytes[..have].to_vec();
                        if over {
                            return Ok(());
                        }
                        break;
                    }
                }
            }
        }
    }
}

/// What a direction waits for before it goes on.
enum Wait {
    /// More from the tunnel.
    Tunnel,
    /// Others have their turn.
    Others,
    /// There is something already.
    Nothing,
}

fn fill(common: &Common<'_>, buffer: &mut Buffer, have: usize) -> Result<Option<usize>, Cut> {
    let mut into = [IoSliceMut::new(&mut buffer.bytes[have..])];
    match socket::read(common.tunnel, &mut into).map_err(Cut::Tunnel)? {
        Some(0) => Err(Cut::Tunnel(ErrorKind::UnexpectedEof.into())),
        read => Ok(read),
    }
}

/// Why gathering has paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// No whole record is left.
    All,
    /// There are as many pieces as one write takes.
    Full,
    /// END.
    End,
}

/// How far the records in a buffer have been opened.
enum Opened {
    /// Up to here; their data is with the application.
    All(usize),
    /// The application takes no more at the moment.
    Blocked(Box<Rest>),
}

struct Rest {
    /// Where the next record begins.
    next: usize,
    pieces: Pieces,
    then: Pause,
}

/// Opens the records in `next..have`, and hands their data to the application.
fn open(
    common: &Common<'_>,
    reader: &mut Reader,
    buffer: &mut Buffer,
    mut next: usize,
    have: usize,
) -> Result<Opened, Cut> {
    let mut pieces = Pieces::new();
    loop {
        let then = gather(common, reader, buffer, &mut next, have, &mut pieces)?;
        if !deliver_now(common, &buffer.bytes, &mut pieces)? {
            return Ok(Opened::Blocked(Box::new(Rest { next, pieces, then })));
        }
        if settle(common, then)? {
            return Ok(Opened::All(next));
        }
    }
}

fn gather(
    common: &Common<'_>,
    reader: &mut Reader,
    buffer: &mut Buffer,
    next: &mut usize,
    have: usize,
    pieces: &mut Pieces,
) -> Result<Pause, Cut> {
    while let Some((total, event)) = reader.open(&mut buffer.bytes[*next..have])? {
        let at = *next;
        *next += total;
        let content = match event {
            Event::Data(range) => at + range.start..at + range.end,
            Event::Nothing => continue,
            Event::Closed => return Err(Cut::Tunnel(ErrorKind::UnexpectedEof.into())),
        };
        if buffer.bytes[content.start] == DATA && content.len() > 1 {
            if common.received_end.get() {
                return Err(OutOfOrder.into());
            }
            pieces.push(content.start + 1..content.end);
            if pieces.is_full() {
                return Ok(Pause::Full);
            }
            continue;
        }
        match Message::decode(&buffer.bytes[content])? {
            Message::End if !common.received_end.get() => return Ok(Pause::End),
            // It overtakes nothing: what the application has not read yet is lost, as on any connection.
            Message::Reset => return Err(Cut::Reset),
            Message::Drain => {}
            Message::Data(_) => return Err(Malformed::Length.into()),
            Message::End | Message::Request(_) | Message::Accepted | Message::Refused(..) => {
                return Err(OutOfOrder.into());
            }
        }
    }
    Ok(Pause::All)
}

/// What follows when the data before a pause is with the application. True: nothing more is to be opened.
fn settle(common: &Common<'_>, then: Pause) -> Result<bool, Cut> {
    match then {
        Pause::All => Ok(true),
        Pause::Full => Ok(false),
        Pause::End => {
            socket::end(common.application).map_err(Cut::Application)?;
            common.received_end.set(true);
            Ok(common.sent_end.get())
        }
    }
}

/// Hands over what the application takes; whether that was all.
fn deliver_now(common: &Common<'_>, bytes: &[u8], pieces: &mut Pieces) -> Result<bool, Cut> {
    while !pieces.is_empty() {
        let (slices, count) = pieces.slices(bytes);
        match socket::write(common.application, &slices[..count]).map_err(Cut::Application)? {
            Some(written) => {
                pieces.advance(written);
                common.received.fetch_add(written as u64, Relaxed);
            }
            None => return Ok(false),
        }
    }
    Ok(true)
}

async fn deliver(common: &Common<'_>, bytes: &[u8], mut pieces: Pieces) -> Result<(), Cut> {
    while !deliver_now(common, bytes, &mut pieces)? {
        // A reset of the tunnel must not wait until the application reads.
        match socket::room(common.application, common.tunnel).await {
            Room::Some => {}
            Room::Failed(error) => return Err(Cut::Tunnel(error)),
        }
    }
    Ok(())
}
