//! The wire: what the kernel says, and what it would never say.

use super::message::{self, Malformed, Part};
use super::*;

const SEQUENCE: u32 = 7;

/// A message as the kernel sends it.
fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(2_u16.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn socket(state: u8, local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => [&ip.octets()[..], &[0; 12]].concat(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let family = message::FAMILIES[usize::from(local.is_ipv6())];
    let mut body = vec![family, state, 0, 0];
    body.extend(local.port().to_be_bytes());
    body.extend(remote.port().to_be_bytes());
    body.extend(octets(local.ip()));
    body.extend(octets(remote.ip()));
    body.extend([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    for field in [0_u32, 0, 0, 1000, 4711] {
        body.extend(field.to_ne_bytes());
    }
    message(20, SEQUENCE, &body)
}

/// Three sockets and the end, in one datagram.
fn dump() -> Vec<u8> {
    let (v4, v6) = (address("10.0.0.1:80"), address("[fd00::1]:443"));
    let mapped = address("[::ffff:10.0.0.1]:80");
    [
        socket(1, v4, address("10.0.0.2:40000")),
        socket(8, v6, address("[fd00::2]:1")),
        socket(4, mapped, address("[::ffff:1.2.3.4]:5")),
        message(3, SEQUENCE, &[0; 4]),
    ]
    .concat()
}

#[test]
fn a_dump_is_read() {
    let mut sockets = Vec::new();
    assert_eq!(message::read(&dump(), SEQUENCE, &mut sockets), Ok(Part::Whole));
    let ends: Vec<_> = sockets.iter().map(|socket| (socket.local, socket.remote, socket.state)).collect();
    let expected = [
        (address("10.0.0.1:80"), address("10.0.0.2:40000"), State::Established),
        (address("[fd00::1]:443"), address("[fd00::2]:1"), State::CloseWait),
        (address("10.0.0.1:80"), address("1.2.3.4:5"), State::FinWait1),
    ];
    assert_eq!(ends, expected);
    assert!(sockets.iter().all(|socket| (socket.uid, socket.inode) == (1000, 4711)));
    // What is asked to be destroyed is what was listed, cookie and family included.
    let request = message::destroy(&sockets[2], 9);
    assert_eq!(request.len(), 72);
    assert_eq!(request[16], libc::AF_INET6 as u8);
    assert!(dump().windows(48).any(|window| window == &request[24..]));
}

#[test]
fn an_answer_in_parts_and_from_before() {
    let mut sockets = Vec::new();
    let one = socket(1, address("10.0.0.1:80"), address("10.0.0.2:1"));
    assert_eq!(message::read(&one, SEQUENCE, &mut sockets), Ok(Part::More));
    assert_eq!(message::read(&one, SEQUENCE + 1, &mut sockets), Ok(Part::More));
    assert_eq!(sockets.len(), 1, "an answer to an earlier request counts for nothing");
    let refused = message(2, SEQUENCE, &(-libc::EPERM).to_ne_bytes());
    assert_eq!(message::read(&refused, SEQUENCE, &mut sockets), Ok(Part::Refused(libc::EPERM)));
    let done = message(3, SEQUENCE, &(-libc::ENOENT).to_ne_bytes());
    assert_eq!(message::read(&done, SEQUENCE, &mut sockets), Ok(Part::Refused(libc::ENOENT)));
    let acknowledged = message(2, SEQUENCE, &[0; 20]);
    assert_eq!(message::read(&acknowledged, SEQUENCE, &mut sockets), Ok(Part::Whole));
}

#[test]
fn what_the_kernel_never_sends_is_refused() {
    let read = |bytes: &[u8]| message::read(bytes, SEQUENCE, &mut Vec::new());
    assert_eq!(read(&[0; 15]), Err(Malformed::Length(15)));
    // Lengths that would stand still, or go beyond the end.
    for length in [0_u32, 1, 15, 200, u32::MAX - 2, u32::MAX] {
        let mut bytes = dump();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let refused = read(&bytes);
        assert!(refused.is_err(), "{length}: {refused:?}");
    }
    assert_eq!(read(&message(99, SEQUENCE, &[])), Err(Malformed::Type(99)));
    assert_eq!(read(&message(20, SEQUENCE, &[2; 71])), Err(Malformed::Length(71)));
    assert_eq!(read(&message(2, SEQUENCE, &[0; 3])), Err(Malformed::Length(3)));
    let mut bytes = dump();
    bytes[16] = 1;
    assert_eq!(read(&bytes), Err(Malformed::Family(1)));
    bytes[17] = 7;
    assert_eq!(read(&bytes), Err(Malformed::State(7)));
}

#[test]
fn every_changed_byte_and_every_cut_ends() {
    let whole = dump();
    for at in 0..whole.len() {
        for change in [1_u8, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            let mut sockets = Vec::new();
            let read = message::read(&bytes, SEQUENCE, &mut sockets);
            assert!(sockets.len() <= 3, "{} sockets out of three: {read:?}", sockets.len());
        }
        let mut sockets = Vec::new();
        let cut = message::read(&whole[..at], SEQUENCE, &mut sockets);
        assert_ne!(cut, Ok(Part::Whole), "cut at {at} of {}", whole.len());
    }
}
