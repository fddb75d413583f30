//! A stream of our own protocol.
//!
//! Application to tunnel: one `readv` into the slots of the records, sealed where they lie, one `write`. Tunnel to application:
//! one `read` of many records, opened where they lie, one `writev`.
//!
//! Most connections are idle most of the time, so what an idle one holds counts: its futures are blocks in functions, since an `async fn`
//! keeps its arguments twice.
#![expect(clippy::manual_async_fn, reason = "an async fn is larger")]

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::buffer::{Budget, Buffer, Pieces, SLOT, Size};
use super::socket::Room;
use super::{Cut, Moved, Rounds, socket};
use crate::proxy::stream::{DATA, MAX_DATA, Malformed, Message, OutOfOrder};
use crate::proxy::tls::{Event, HEADER, Reader, Tls, Writer};

/// How long ACCEPTED waits for something to go along with.
const SOON: Duration = Duration::from_millis(1);
/// Full reads in a row after which a connection gets a large buffer.
const BUSY: u32 = 2;

/// One task sets and reads it; atomic, because its future must be fit to be sent to the thread that carries it.
#[derive(Default)]
struct Flag(AtomicBool);

impl Flag {
    fn get(&self) -> bool {
        self.0.load(Relaxed)
    }

    fn set(&self, value: bool) {
        self.0.store(value, Relaxed);
    }
}

/// What both directions know.
struct Common<'a> {
    application: &'a TcpStream,
    tunnel: &'a TcpStream,
    budget: &'a Arc<Budget>,
    /// A record is only partly in the socket, so nothing else may be sent.
    within_record: Flag,
    /// END has been sent, received.
    sent_end: Flag,
    received_end: Flag,
    sent: AtomicU64,
    received: AtomicU64,
}

/// Moves a stream that has been accepted, which the client has still to be told if `owed`, until both directions have ended: then `tls` may carry the next one. After any other
/// end both connections are to be dropped, and are reset by that.
pub fn relay<'a>(
    application: &'a TcpStream,
    tls: &'a mut Tls,
    budget: &'a Arc<Budget>,
    owed: bool,
) -> impl Future<Output = (Result<(), Cut>, Moved)> + Send {
    let Tls { tcp, reader, writer, received, .. } = tls;
    // What has been said to begin may be all for long.
    writer.rest();
    if received.is_empty() {
        reader.rest();
    }
    let common = Common {
        application,
        tunnel: tcp,
        budget,
        within_record: Flag::default(),
        sent_end: Flag::default(),
        received_end: Flag::default(),
        sent: AtomicU64::new(0),
        received: AtomicU64::new(0),
    };
    async move {
        let outcome = both(&common, reader, received, (writer, owed)).await;
        match &outcome {
            // It may lie idle for long, and this task is to be gone then.
            Ok(()) => socket::wake_nobody(common.tunnel),
            Err(cut) => {
                socket::reset_on_drop(common.application);
                tear_down(&common, writer, cut);
            }
        }
        let moved = Moved { sent: common.sent.load(Relaxed), received: common.received.load(Relaxed) };
        (outcome, moved)
    }
}

/// Tells the peer, if it can be told at once; or else a reset of the connection does.
fn tear_down(common: &Common<'_>, writer: &mut Writer, cut: &Cut) {
    let told = match cut {
        Cut::Application(_) if !common.within_record.get() => {
            writer.data(&Message::Reset.encode()).is_ok_and(|record| {
                let whole = record.len();
                matches!(socket::write(common.tunnel, &[IoSlice::new(&record)]), Ok(Some(n)) if n == whole)
            })
        }
        Cut::Reset => true,
        Cut::Application(_) | Cut::Tunnel(_) | Cut::Tls(_) | Cut::Malformed(_) | Cut::OutOfOrder(_) => false,
    };
    if !told {
        socket::reset_on_drop(common.tunnel);
    }
}

fn both<'a>(
    common: &'a Common<'_>,
    reader: &'a mut Reader,
    received: &'a mut Vec<u8>,
    (writer, owed): (&'a mut Writer, bool),
) -> impl Future<Output = Result<(), Cut>> + Send {
    async move {
        let mut up = pin!(up(common, writer, owed));
        let mut down = pin!(down(common, reader, received));
        loop {
            if common.sent_end.get() && common.received_end.get() {
                // Before the next poll of `down`: what follows belongs to the next stream.
                return Ok(());
            }
            tokio::select! {
                biased;
                done = &mut up, if !common.sent_end.get() => done?,
                done = &mut down => return done,
                // Nobody reads the application's connection any more, so nobody else would notice.
                error = half_closed(common.application), if common.sent_end.get() => {
                    return Err(Cut::Application(error));
                }
            }
        }
    }
}

/// Waits for the failure of a connection that is not read any more; in a box, as few are.
async fn half_closed(tcp: &TcpStream) -> io::Error {
    Box::pin(socket::failed(tcp)).await
}

/// From the application into the tunnel.
fn up<'a>(
    common: &'a Common<'_>,
    writer: &'a mut Writer,
    owed: bool,
) -> impl Future<Output = Result<(), Cut>> + Send {
    async move {
        if owed {
            blocked(answer(common, writer)).await?;
        }
        let (mut pace, mut rounds) = (Pace::new(), Rounds::default());
        loop {
            if rounds.over() {
                yield_now().await;
            }
            socket::readable(common.application).await.map_err(Cut::Application)?;
            let mut buffer = common.budget.take(pace.size());
            let read = {
                let (mut slices, slots) = buffer.data();
                socket::read(common.application, &mut slices[..slots])
            };
            let Some(read) = read.map_err(Cut::Application)? else { continue };
            if read == 0 {
                drop(buffer);
                blocked(end(common, writer)).await?;
                common.sent_end.set(true);
                return Ok(());
            }
            pace.moved(read, buffer.size);
            let sealed = seal(writer, &mut buffer, read)?;
            let written = write_now(common, &buffer.bytes[..sealed])?;
            if written < sealed {
                blocked(write(common, &buffer.bytes[written..sealed])).await?;
            }
            let emptied = read < buffer.room();
            drop(buffer);
            common.sent.fetch_add(read as u64, Relaxed);
            // After the data: a key may seal a few records more than its limit says.
            if writer.is_due() {
                blocked(due(common, writer)).await?;
            }
            if emptied {
                writer.rest();
            }
        }
    }
}

/// Sends ACCEPTED: along with what the application says first, if it does so soon. That wakes the client's node once instead of twice.
async fn answer(common: &Common<'_>, writer: &mut Writer) -> Result<(), Cut> {
    let soon = timeout(SOON, socket::readable(common.application)).await;
    let mut buffer = common.budget.take(Size::Small);
    let read = match soon {
        Ok(ready) => {
            ready.map_err(Cut::Application)?;
            let (mut slices, slots) = buffer.data();
            socket::read(common.application, &mut slices[..slots]).map_err(Cut::Application)?
        }
        Err(_elapsed) => None,
    };
    let mut records = writer.due()?.unwrap_or_default();
    records.extend(writer.data(&Message::Accepted.encode())?);
    // Its end is for those to see who go on.
    if let Some(read @ 1..) = read {
        let sealed = seal(writer, &mut buffer, read)?;
        records.extend_from_slice(&buffer.bytes[..sealed]);
        common.sent.fetch_add(read as u64, Relaxed);
    }
    drop(buffer);
    write(common, &records).await?;
    // It may be all for long.
    writer.rest();
    Ok(())
}

/// Makes records of the first bytes in a buffer's slots, one after the other, and says how long they are together.
fn seal(writer: &mut Writer, buffer: &mut Buffer, read: usize) -> Result<usize, Cut> {
    let (mut end, mut left) = (0, read);
    for slot in buffer.bytes.chunks_mut(SLOT) {
        let length = left.min(MAX_DATA);
        slot[HEADER] = DATA;
        end += writer.seal(slot, length + 1)?;
        left -= length;
        if left == 0 {
            break;
        }
    }
    Ok(end)
}

async fn end(common: &Common<'_>, writer: &mut Writer) -> Result<(), Cut> {
    let record = writer.data(&Message::End.encode())?;
    write(common, &record).await?;
    due(common, writer).await
}

async fn due(common: &Common<'_>, writer: &mut Writer) -> Result<(), Cut> {
    match writer.due()? {
        Some(record) => write(common, &record).await,
        None => Ok(()),
    }
}

/// Waits in a box of its own: who copies is blocked rarely, and a future is as large as the largest thing that it may wait for.
fn blocked<'a, T>(
    waits: impl Future<Output = Result<T, Cut>> + Send + 'a,
) -> Pin<Box<dyn Future<Output = Result<T, Cut>> + Send + 'a>> {
    Box::pin(waits)
}

/// Writes what fits, and says how much that was.
fn write_now(common: &Common<'_>, bytes: &[u8]) -> Result<usize, Cut> {
    let mut done = 0;
    while done < bytes.len() {
        match socket::write(common.tunnel, &[IoSlice::new(&bytes[done..])]).map_err(Cut::Tunnel)? {
            Some(written) => done += written,
            None => break,
        }
    }
    common.within_record.set(done < bytes.len());
    Ok(done)
}

async fn write(common: &Common<'_>, mut bytes: &[u8]) -> Result<(), Cut> {
    loop {
        bytes = &bytes[write_now(common, bytes)?..];
        if bytes.is_empty() {
            return Ok(());
        }
        match socket::room(common.tunnel, common.application).await {
            Room::Some => {}
            Room::Failed(error) => return Err(Cut::Application(error)),
        }
    }
}

/// From the tunnel to the application. Goes on after END until the own direction has ended: a reset may still come.
///
/// Whenever it waits for the tunnel, what it has read and not opened is in `received`, so it may be dropped then.
fn down<'a>(
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

/// Decides by what was moved how much to move at a time.
struct Pace {
    full: u32,
}

impl Pace {
    fn new() -> Self {
        Self { full: 0 }
    }

    fn size(&self) -> Size {
        if self.full >= BUSY { Size::Large } else { Size::Small }
    }

    fn moved(&mut self, bytes: usize, size: Size) {
        self.full = match size {
            Size::Small if bytes >= MAX_DATA => (self.full + 1).min(BUSY * 2),
            Size::Large if bytes > MAX_DATA => BUSY * 2,
            Size::Small | Size::Large => self.full.saturating_sub(1),
        };
    }
}
