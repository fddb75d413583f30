//! What a client asks for.

use std::net::{IpAddr, SocketAddr};

use super::message::Malformed;

const TRACEPARENT: u8 = 1;
const HOST: u8 = 2;
/// Set in fields that the server must understand.
const CRITICAL: u8 = 0x80;
const TRACEPARENT_LENGTH: usize = 55;
const HOST_LENGTH: usize = 253;

/// A connection that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Where the application meant to connect.
    pub destination: SocketAddr,
    /// Address of the application that connects. Only the client's node says so: nothing is decided by it.
    pub client: Option<SocketAddr>,
    /// Trace context.
    pub traceparent: Option<Box<str>>,
    /// Name that the application connected to.
    pub host: Option<Box<str>>,
}

impl Request {
    /// A request with nothing but its destination.
    pub fn to(destination: SocketAddr) -> Self {
        Self { destination, client: None, traceparent: None, host: None }
    }

    pub(super) fn encode(&self, kind: u8) -> Vec<u8> {
        let mut bytes = vec![kind];
        address(&mut bytes, self.destination);
        match self.client {
            Some(client) => address(&mut bytes, client),
            None => bytes.push(0),
        }
        for (id, text) in [(TRACEPARENT, &self.traceparent), (HOST, &self.host)] {
            if let Some(text) = text.as_deref().filter(|text| valid(id, text.as_bytes())) {
                bytes.push(id);
                bytes.extend_from_slice(&(text.len() as u16).to_be_bytes());
                bytes.extend_from_slice(text.as_bytes());
            }
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut rest = bytes;
        let destination = take_address(&mut rest)?.ok_or(Malformed::Address)?;
        let client = take_address(&mut rest)?;
        let mut request = Self { client, ..Self::to(destination) };
        while let Some((id, field)) = take_field(&mut rest)? {
            let place = match id {
                TRACEPARENT => &mut request.traceparent,
                HOST => &mut request.host,
                unknown if unknown & CRITICAL != 0 => return Err(Malformed::UnknownField(unknown)),
                _ignored => continue,
            };
            let text = str::from_utf8(field).map_err(|_bytes| Malformed::Field(id))?;
            if place.is_some() || !valid(id, field) {
                return Err(Malformed::Field(id));
            }
            *place = Some(text.into());
        }
        Ok(request)
    }
}

fn valid(id: u8, text: &[u8]) -> bool {
    let length = match id {
        TRACEPARENT => text.len() == TRACEPARENT_LENGTH,
        _ => (1..=HOST_LENGTH).contains(&text.len()),
    };
    length && text.iter().all(u8::is_ascii_graphic)
}

fn address(bytes: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes.push(4);
            bytes.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes.push(6);
            bytes.extend_from_slice(&ip.octets());
        }
    }
    bytes.extend_from_slice(&address.port().to_be_bytes());
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8], Malformed> {
    let (taken, after) = rest.split_at_checked(length).ok_or(Malformed::Length)?;
    *rest = after;
    Ok(taken)
}

fn array<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Malformed> {
    take(rest, N)?.try_into().map_err(|_length| Malformed::Length)
}

fn take_address(rest: &mut &[u8]) -> Result<Option<SocketAddr>, Malformed> {
    let ip: IpAddr = match array(rest)? {
        [0] => return Ok(None),
        [4] => array::<4>(rest)?.into(),
        [6] => array::<16>(rest)?.into(),
        [_] => return Err(Malformed::Address),
    };
    Ok(Some((ip, u16::from_be_bytes(array(rest)?)).into()))
}

fn take_field<'a>(rest: &mut &'a [u8]) -> Result<Option<(u8, &'a [u8])>, Malformed> {
    if rest.is_empty() {
        return Ok(None);
    }
    let [id] = array(rest)?;
    let length = u16::from_be_bytes(array(rest)?);
    Ok(Some((id, take(rest, usize::from(length))?)))
}
