//! Which message may come when, at either end.

use super::message::Message;

/// A direction of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// DATA may come.
    Open,
    /// END has come.
    Ended,
}

/// A message where it is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message out of order")]
pub struct OutOfOrder;

/// Where a connection stands for one end of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// No stream: the client may ask.
    Idle,
    /// Asked, and not answered.
    Asked,
    /// A stream: what this end sends, what it receives.
    Stream {
        /// Own direction.
        sending: Direction,
        /// The peer's.
        receiving: Direction,
    },
    /// Not to be used again.
    Over,
}

impl Order {
    /// After `message` was received by the client.
    pub fn client_received(self, message: &Message<'_>) -> Result<Self, OutOfOrder> {
        match (self, message) {
            (Self::Asked, Message::Accepted) => Ok(open()),
            (Self::Asked, Message::Refused(..)) => Ok(Self::Over),
            // A server that has taken the request would have answered first.
            (Self::Idle | Self::Asked, Message::Drain) => Ok(Self::Over),
            (Self::Stream { .. }, Message::Drain) => Ok(self),
            (_, Message::Request(_)) => Err(OutOfOrder),
            _ => self.received(message),
        }
    }

    /// After `message` was received by the server.
    pub fn server_received(self, message: &Message<'_>) -> Result<Self, OutOfOrder> {
        match (self, message) {
            (Self::Idle, Message::Request(_)) => Ok(Self::Asked),
            (_, Message::Accepted | Message::Refused(..) | Message::Drain) => Err(OutOfOrder),
            _ => self.received(message),
        }
    }

    fn received(self, message: &Message<'_>) -> Result<Self, OutOfOrder> {
        match (self, message) {
            (Self::Stream { receiving: Direction::Open, .. }, Message::Data(_)) => Ok(self),
            (Self::Stream { receiving: Direction::Open, sending }, Message::End) => {
                Ok(Self::Stream { receiving: Direction::Ended, sending }.ended())
            }
            (Self::Asked | Self::Stream { .. }, Message::Reset) => Ok(Self::Over),
            _ => Err(OutOfOrder),
        }
    }

    /// After the own direction's END was sent.
    pub fn sent_end(self) -> Self {
        match self {
            Self::Stream { receiving, .. } => Self::Stream { sending: Direction::Ended, receiving }.ended(),
            Self::Idle | Self::Asked | Self::Over => self,
        }
    }

    /// After the server has sent ACCEPTED.
    pub fn accepted(self) -> Self {
        open()
    }

    fn ended(self) -> Self {
        match self {
            Self::Stream { sending: Direction::Ended, receiving: Direction::Ended } => Self::Idle,
            Self::Stream { .. } | Self::Idle | Self::Asked | Self::Over => self,
        }
    }
}

fn open() -> Order {
    Order::Stream { sending: Direction::Open, receiving: Direction::Open }
}
