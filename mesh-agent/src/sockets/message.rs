//! Requests to and answers from `NETLINK_SOCK_DIAG` (`linux/netlink.h`, `linux/inet_diag.h`). Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::connection::{Connection, State};

const HEADER: usize = 16;
/// `struct inet_diag_req_v2`
const REQUEST: usize = 56;
/// `struct inet_diag_msg`
const ANSWER: usize = 72;
/// `struct inet_diag_sockid`: ports and addresses in network order, interface, cookie.
const ID: usize = 48;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

const F_REQUEST: u16 = 1;
const F_ACKNOWLEDGE: u16 = 4;
const F_DUMP: u16 = 0x300;

/// Families that have TCP sockets, as the kernel numbers them.
pub const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// Not what the kernel sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A message, or what it must hold, does not fit into what was received.
    #[error("a netlink message of {0} bytes does not fit")]
    Length(usize),
    /// Neither a socket, nor an error, nor the end.
    #[error("a netlink message of unknown type {0}")]
    Type(u16),
    /// A socket of a family that was not asked for.
    #[error("a socket of unknown address family {0}")]
    Family(u8),
    /// A socket in a state that was not asked for.
    #[error("a socket in unknown state {0}")]
    State(u8),
}

/// What has been received of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// More comes.
    More,
    /// All of it.
    Whole,
    /// The kernel refuses, with this error number.
    Refused(i32),
}

/// Asks for all TCP sockets of a family.
pub fn list(family: u8, sequence: u32) -> Vec<u8> {
    request(BY_FAMILY, F_REQUEST | F_DUMP, sequence, family, State::mask(), &[0; ID])
}

/// Asks to destroy a socket, and for an answer.
pub fn destroy(connection: &Connection, sequence: u32) -> Vec<u8> {
    let flags = F_REQUEST | F_ACKNOWLEDGE;
    request(DESTROY, flags, sequence, connection.family, u32::MAX, &connection.id)
}

fn request(kind: u16, flags: u16, sequence: u32, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    bytes.extend_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend_from_slice(&states.to_ne_bytes());
    bytes.extend_from_slice(id);
    bytes
}

/// Reads one datagram of the answer to request `sequence`, and adds its sockets. What belongs to an earlier request is passed over.
pub fn read(bytes: &[u8], sequence: u32, sockets: &mut Vec<Connection>) -> Result<Part, Malformed> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let (header, body, next) = message(rest)?;
        rest = next;
        if header.sequence != sequence {
            continue;
        }
        match header.kind {
            BY_FAMILY => sockets.push(socket(body)?),
            // At the end stands how it went; kernels before 3.x left that out.
            DONE => {
                return Ok(match body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)) {
                    0 => Part::Whole,
                    code => Part::Refused(code.saturating_neg()),
                });
            }
            ERROR => {
                let code = body.first_chunk().ok_or(Malformed::Length(body.len()))?;
                return Ok(match i32::from_ne_bytes(*code) {
                    0 => Part::Whole,
                    code => Part::Refused(code.saturating_neg()),
                });
            }
            unknown => return Err(Malformed::Type(unknown)),
        }
    }
    Ok(Part::More)
}

struct Header {
    kind: u16,
    sequence: u32,
}

/// The message at the beginning, its content, and what follows. Always shorter than what it was taken from.
fn message(bytes: &[u8]) -> Result<(Header, &[u8], &[u8]), Malformed> {
    let header: &[u8; HEADER] = bytes.first_chunk().ok_or(Malformed::Length(bytes.len()))?;
    let [a, b, c, d, kind_low, kind_high, _, _, e, f, g, h, ..] = *header;
    let length = u32::from_ne_bytes([a, b, c, d]) as usize;
    let body = bytes.get(HEADER..length).ok_or(Malformed::Length(length))?;
    // Messages begin at multiples of four; the last one need not be filled up.
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    let kind = u16::from_ne_bytes([kind_low, kind_high]);
    Ok((Header { kind, sequence: u32::from_ne_bytes([e, f, g, h]) }, body, next))
}

fn socket(body: &[u8]) -> Result<Connection, Malformed> {
    let fixed: &[u8; ANSWER] = body.first_chunk().ok_or(Malformed::Length(body.len()))?;
    let [family, state, _timer, _retransmits, after @ ..] = fixed;
    let (id, after) = after.split_first_chunk::<ID>().ok_or(Malformed::Length(body.len()))?;
    let state = State::of(*state).ok_or(Malformed::State(*state))?;
    // Behind the id: expiry, two queues, user, inode.
    let field = |number: usize| {
        let bytes = after.get(4 * number..).and_then(|field| field.first_chunk());
        bytes.map(|bytes| u32::from_ne_bytes(*bytes)).ok_or(Malformed::Length(body.len()))
    };
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let (local, remote) = (address(*family, &id[4..20])?, address(*family, &id[20..36])?);
    Ok(Connection {
        local: (local, port(0)).into(),
        remote: (remote, port(2)).into(),
        state,
        uid: field(3)?,
        inode: field(4)?,
        family: *family,
        id: *id,
    })
}

fn address(family: u8, bytes: &[u8]) -> Result<IpAddr, Malformed> {
    let octets: [u8; 16] = bytes.try_into().map_err(|_length| Malformed::Length(bytes.len()))?;
    let [a, b, c, d, ..] = octets;
    match family {
        family if family == FAMILIES[0] => Ok(Ipv4Addr::from([a, b, c, d]).into()),
        family if family == FAMILIES[1] => Ok(IpAddr::from(Ipv6Addr::from(octets)).to_canonical()),
        unknown => Err(Malformed::Family(unknown)),
    }
}
