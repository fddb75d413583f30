//! A message is the content of one TLS record.

use super::request::Request;
use crate::proxy::tls::MAX_PLAINTEXT;

/// First byte of a message with data of the stream.
pub const DATA: u8 = 0;
const REQUEST: u8 = 1;
const ACCEPTED: u8 = 2;
const REFUSED: u8 = 3;
const END: u8 = 4;
const RESET: u8 = 5;
const DRAIN: u8 = 6;

/// Most bytes of the stream in a message.
pub const MAX_DATA: usize = MAX_PLAINTEXT - 1;
/// Most bytes of the text in a refusal.
const MAX_TEXT: usize = 256;

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// This identity may not connect.
    Policy = 1,
    /// The application refused, or cannot be reached.
    Upstream = 2,
    /// The application did not answer.
    Timeout = 3,
    /// The request.
    BadRequest = 4,
    /// The server stops.
    Draining = 5,
    /// Too many connections.
    Limit = 6,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 6] =
        [Self::Policy, Self::Upstream, Self::Timeout, Self::BadRequest, Self::Draining, Self::Limit];

    /// Whether another endpoint may take the same request.
    pub fn is_about_the_endpoint(self) -> bool {
        match self {
            Self::Upstream | Self::Timeout | Self::Draining | Self::Limit => true,
            Self::Policy | Self::BadRequest => false,
        }
    }

    /// For metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Upstream => "upstream",
            Self::Timeout => "timeout",
            Self::BadRequest => "bad-request",
            Self::Draining => "draining",
            Self::Limit => "limit",
        }
    }
}

/// Not a message of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No such type.
    #[error("unknown message type {0}")]
    Type(u8),
    /// A rest of the wrong length, or no message at all.
    #[error("a message of the wrong length")]
    Length,
    /// A reason or a text that cannot be.
    #[error("a malformed refusal")]
    Refusal,
    /// A family that is neither 4 nor 6.
    #[error("a malformed address in a request")]
    Address,
    /// A field twice, or with a wrong value.
    #[error("field {0} of a request is malformed")]
    Field(u8),
    /// A field that must be understood, and is not.
    #[error("field {0} of a request is unknown")]
    UnknownField(u8),
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// Bytes of the stream.
    Data(&'a [u8]),
    /// The client wants a connection.
    Request(Box<Request>),
    /// It has it.
    Accepted,
    /// It does not get it.
    Refused(Reason, &'a str),
    /// The sender's direction has ended.
    End,
    /// The stream is torn down.
    Reset,
    /// No more requests on this connection.
    Drain,
}

impl<'a> Message<'a> {
    /// Reads the content of a record.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let (kind, rest) = bytes.split_first().ok_or(Malformed::Length)?;
        let empty = |message| if rest.is_empty() { Ok(message) } else { Err(Malformed::Length) };
        match *kind {
            DATA if rest.is_empty() || rest.len() > MAX_DATA => Err(Malformed::Length),
            DATA => Ok(Self::Data(rest)),
            REQUEST => Ok(Self::Request(Box::new(Request::decode(rest)?))),
            ACCEPTED => empty(Self::Accepted),
            REFUSED => refusal(rest),
            END => empty(Self::End),
            RESET => empty(Self::Reset),
            DRAIN => empty(Self::Drain),
            unknown => Err(Malformed::Type(unknown)),
        }
    }

    /// The content of a record; texts that are too long are cut.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Data(bytes) => [&[DATA], *bytes].concat(),
            Self::Request(request) => request.encode(REQUEST),
            Self::Accepted => vec![ACCEPTED],
            Self::Refused(reason, text) => {
                let end = text.floor_char_boundary(MAX_TEXT);
                [&[REFUSED, *reason as u8], &text.as_bytes()[..end]].concat()
            }
            Self::End => vec![END],
            Self::Reset => vec![RESET],
            Self::Drain => vec![DRAIN],
        }
    }
}

fn refusal(rest: &[u8]) -> Result<Message<'_>, Malformed> {
    let (reason, text) = rest.split_first().ok_or(Malformed::Refusal)?;
    let reason = Reason::ALL.into_iter().find(|known| *known as u8 == *reason).ok_or(Malformed::Refusal)?;
    let text = str::from_utf8(text).map_err(|_bytes| Malformed::Refusal)?;
    if text.len() > MAX_TEXT {
        return Err(Malformed::Refusal);
    }
    Ok(Message::Refused(reason, text))
}
