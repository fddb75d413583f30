//! What goes on beside the data: alerts, key updates, session tickets. Pure.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;

use super::record::{Content, HEADER, MAX_PLAINTEXT, OVERHEAD, Opener, RecordError, Sealer};
use super::secret::Secret;

/// Records that one AES-GCM key may seal (RFC 8446, section 5.5: 2^24.5 of full size).
const KEY_LIMIT: u64 = 1 << 24;
/// A handshake message may span records; ours are much shorter.
const MESSAGE_LIMIT: usize = 1 << 16;
/// Records in a row without data. A peer that sends nothing else only burns a processor.
const IDLE_RECORDS: u32 = 64;

const CLOSE_NOTIFY: u8 = 0;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// A TLS connection has failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// What was received cannot be opened.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The peer says so.
    #[error("the peer sent TLS alert {0}")]
    Alert(u8),
    /// A message that the peer may not send, or a malformed one.
    #[error("an unexpected TLS message")]
    Unexpected,
    /// Tickets, key updates and empty records without end.
    #[error("too many TLS records without data")]
    Idle,
    /// rustls refuses.
    #[error("TLS: {0}")]
    Tls(String),
}

/// What rustls does with tickets for sessions to come.
pub(super) type Tickets = Box<KernelConnection<ClientConnectionData>>;

/// One direction of a connection: its secret, and how many records have gone by under the first key.
pub(super) struct Traffic {
    pub(super) secret: Secret,
    pub(super) sequence: u64,
}

/// The two directions of a connection, what is received and what is sent; a client takes tickets.
pub(super) fn split(
    receive: Traffic,
    send: Traffic,
    tickets: Option<Tickets>,
) -> Result<(Reader, Writer), TlsError> {
    let update = Arc::new(AtomicBool::new(false));
    let opener = Opener::new(receive.sequence, receive.secret.material()?);
    let sealer = Sealer::new(send.sequence, send.secret.material()?);
    let reader = Reader {
        opener,
        secret: receive.secret,
        client: tickets.is_some(),
        tickets,
        update: Arc::clone(&update),
        message: Vec::new(),
        idle: 0,
    };
    Ok((reader, Writer { sealer, secret: send.secret, update }))
}

/// What a record said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Data, at this place in the buffer.
    Data(Range<usize>),
    /// Something between the two TLS ends.
    Nothing,
    /// The peer sends no more.
    Closed,
}

/// Opens what is received.
pub struct Reader {
    opener: Opener,
    secret: Secret,
    client: bool,
    /// Until the first data: a server of ours gives its ticket before that, and what takes it is large.
    tickets: Option<Tickets>,
    /// The peer wants us to change our key before we send more.
    update: Arc<AtomicBool>,
    /// The part of a handshake message whose rest comes in the next record.
    message: Vec<u8>,
    idle: u32,
}

impl Reader {
    /// Nothing is to be opened for now: keeps no more than it needs to go on.
    pub fn rest(&mut self) {
        self.opener.rest();
    }

    /// Opens the record at the beginning of `bytes`: its length, and what it said; none when it is not whole yet.
    pub fn open(&mut self, bytes: &mut [u8]) -> Result<Option<(usize, Event)>, TlsError> {
        let Some(opened) = self.opener.open(bytes)? else { return Ok(None) };
        let content = HEADER..HEADER + opened.length;
        if opened.content != Content::Handshake && !self.message.is_empty() {
            return Err(TlsError::Unexpected);
        }
        let event = match opened.content {
            Content::Data if opened.length > 0 => {
                self.idle = 0;
                self.tickets = None;
                return Ok(Some((opened.total, Event::Data(content))));
            }
            Content::Data => Event::Nothing,
            Content::Alert => match bytes[content] {
                [_level, CLOSE_NOTIFY] => Event::Closed,
                [_level, alert] => return Err(TlsError::Alert(alert)),
                _ => return Err(TlsError::Unexpected),
            },
            Content::Handshake => {
                if opened.length == 0 {
                    return Err(TlsError::Unexpected);
                }
                self.handshake(&bytes[content])?;
                Event::Nothing
            }
        };
        self.idle += 1;
        if self.idle > IDLE_RECORDS {
            return Err(TlsError::Idle);
        }
        Ok(Some((opened.total, event)))
    }

    fn handshake(&mut self, bytes: &[u8]) -> Result<(), TlsError> {
        let mut message = std::mem::take(&mut self.message);
        if message.len() + bytes.len() > MESSAGE_LIMIT {
            return Err(TlsError::Unexpected);
        }
        message.extend_from_slice(bytes);
        let mut rest = &message[..];
        while let [kind, a, b, c, after @ ..] = rest {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if length > MESSAGE_LIMIT {
                return Err(TlsError::Unexpected);
            }
            let Some((body, next)) = after.split_at_checked(length) else { break };
            match (*kind, body) {
                (NEW_SESSION_TICKET, ticket) if self.client => {
                    if let Some(tickets) = &mut self.tickets {
                        let taken = tickets.handle_new_session_ticket(ticket);
                        taken.map_err(|error| TlsError::Tls(error.to_string()))?;
                    }
                }
                // The key changes with the next record, so nothing may follow in this one.
                (KEY_UPDATE, [answer @ (0 | 1)]) if next.is_empty() => {
                    self.opener = Opener::new(0, self.secret.update()?);
                    if *answer == 1 {
                        self.update.store(true, Ordering::Relaxed);
                    }
                }
                _ => return Err(TlsError::Unexpected),
            }
            rest = next;
        }
        self.message = rest.to_vec();
        Ok(())
    }
}

/// Seals what is sent.
pub struct Writer {
    sealer: Sealer,
    secret: Secret,
    update: Arc<AtomicBool>,
}

impl Writer {
    /// Nothing is to be sealed for now: keeps no more than it needs to go on.
    pub fn rest(&mut self) {
        self.sealer.rest();
    }

    /// Whether there are records that must be sent before any other.
    pub fn is_due(&self) -> bool {
        // A write seals a few records; the limit has more room than that.
        self.update.load(Ordering::Relaxed) || self.sealer.used() >= KEY_LIMIT
    }

    /// Those records, if any. To be asked before each write.
    pub fn due(&mut self) -> Result<Option<Vec<u8>>, TlsError> {
        if !self.is_due() {
            return Ok(None);
        }
        self.update.store(false, Ordering::Relaxed);
        self.update_key(false).map(Some)
    }

    /// Changes the key: the record that says so to the peer, who is asked to do the same if `both`.
    pub fn update_key(&mut self, both: bool) -> Result<Vec<u8>, TlsError> {
        let record = self.record(Content::Handshake, &[KEY_UPDATE, 0, 0, 1, u8::from(both)])?;
        self.sealer = Sealer::new(0, self.secret.update()?);
        Ok(record)
    }

    /// Makes a record of the `length` bytes that lie at [`HEADER`] in `record`, and returns the record's length.
    pub fn seal(&mut self, record: &mut [u8], length: usize) -> Result<usize, TlsError> {
        Ok(self.sealer.seal(Content::Data, record, length)?)
    }

    /// A record of its own for a few bytes.
    pub fn data(&mut self, content: &[u8]) -> Result<Vec<u8>, TlsError> {
        self.record(Content::Data, content)
    }

    /// The record that ends what is sent.
    pub fn close(&mut self) -> Result<Vec<u8>, TlsError> {
        const WARNING: u8 = 1;
        self.record(Content::Alert, &[WARNING, CLOSE_NOTIFY])
    }

    pub(super) fn record(&mut self, content: Content, bytes: &[u8]) -> Result<Vec<u8>, TlsError> {
        let mut record = vec![0; bytes.len().min(MAX_PLAINTEXT) + OVERHEAD];
        if let Some(place) = record.get_mut(HEADER..HEADER + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        self.sealer.seal(content, &mut record, bytes.len())?;
        Ok(record)
    }
}
