//! For the fuzz targets `tls_records` (a secured connection whose peer says what it likes), `tls_handshake` (one that is to be secured) and
//! `revocation_list`.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use super::fixtures::{Pair, client, server, sockets};
use super::record::{Content, HEADER};
use super::revocation::Lists;
use super::session::Event;
use super::{HandshakeError, MAX_PLAINTEXT, Tls, accept, connect};

/// The content of a file of revocation lists: used whole, or not at all.
pub fn revocations(bytes: &[u8]) {
    let lists = Lists::of(Ok(bytes.to_vec()));
    assert_eq!(lists.broken.is_none(), !lists.lists.is_empty());
}

/// Nobody on the way says anything for so long: both ends wait for what was cut out.
const SILENCE: Duration = Duration::from_millis(5);

/// Makes connections; a handshake for each input, since a peer's words change what both ends remember.
pub struct Ends {
    runtime: Runtime,
    pair: Pair,
}

impl Default for Ends {
    fn default() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, pair: Pair::new() }
    }
}

impl Ends {
    /// The first byte says which end listens, and whether what follows is sealed by its peer: then as records of
    /// `KIND LENGTH LENGTH CONTENT`.
    pub fn listen(&self, input: &[u8]) {
        let Some((how, rest)) = input.split_first() else { return };
        let (client, server) = self.runtime.block_on(self.pair.tunnel());
        for end in [&client, &server] {
            // Thousands of closed connections would otherwise hold all ports.
            socket2::SockRef::from(&end.tcp).set_linger(Some(Duration::ZERO)).unwrap();
        }
        let (mut talks, mut listens) = if how & 1 == 0 { (client, server) } else { (server, client) };
        if how & 2 == 0 {
            sealed(rest, &mut talks, &mut listens);
        } else {
            let opened = listens.reader.open(&mut rest.to_vec());
            assert!(!matches!(opened, Ok(Some(_))), "what nobody has sealed was opened");
        }
    }
}

impl Ends {
    /// What is said before the handshake is done. The first byte says who listens, and how the rest is meant: as what a stranger says,
    /// `SIZE BYTES` in pieces of that size, the last of which may come again without end; or as what somebody on the way between two good
    /// ends changes, `HOW AT AT VALUE` each.
    pub fn shake(&self, input: &[u8]) {
        let Some((how, rest)) = input.split_first() else { return };
        let to_server = how & 1 == 0;
        match how & 4 {
            0 => drop(self.runtime.block_on(self.stranger(to_server, how & 2 != 0, rest))),
            _ => self.runtime.block_on(self.changed(to_server, rest)),
        }
    }

    /// Why it is refused.
    async fn stranger(&self, to_server: bool, without_end: bool, input: &[u8]) -> Option<HandshakeError> {
        let (size, said) = input.split_first()?;
        let (talks, listens) = ready().await;
        let size = usize::from(*size).max(1);
        let (mut hears, mut says) = talks.into_split();
        let talking = async {
            for piece in said.chunks(size) {
                // It has heard enough.
                says.write_all(piece).await.ok()?;
                tokio::task::yield_now().await;
            }
            while without_end && !said.is_empty() {
                says.write_all(&said[(said.len() - 1) / size * size..]).await.ok()?;
                tokio::task::yield_now().await;
            }
            says.shutdown().await.ok()
        };
        // What it answers is taken, so that it never waits for that.
        let hearing = async { while hears.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {} };
        let listening = async {
            let (own, peer) = (client(), server());
            let secured = match to_server {
                true => accept(&self.pair.server, &peer, listens).await,
                false => connect(&self.pair.client, &own, &peer, listens).await,
            };
            secured.err().expect("a stranger is taken for somebody")
        };
        tokio::select! {
            biased;
            refused = listening => Some(refused),
            _never = async { tokio::join!(hearing, talking, std::future::pending::<()>()) } => None,
        }
    }

    async fn changed(&self, to_server: bool, changes: &[u8]) {
        let ((near, one), (other, far)) = (ready().await, ready().await);
        let ((from_near, to_near), (from_far, to_far)) = (one.into_split(), other.into_split());
        let (up, down) = if to_server { (changes, &[][..]) } else { (&[][..], changes) };
        let (own, peer) = (client(), server());
        // An end that has not done with it goes when the others have nothing to say any more.
        let way = async { tokio::join!(meddle(from_near, to_far, up), meddle(from_far, to_near, down)) };
        let ends = async {
            let near = connect(&self.pair.client, &own, &peer, near);
            let far = accept(&self.pair.server, &peer, far);
            // None is closed before both are done, which the other would take for an answer.
            tokio::join!(near, far)
        };
        let ((near, far), _way) = tokio::join!(ends, way);
        assert!(near.is_err() || is(&near, &peer), "a client takes somebody for its server");
        assert!(far.is_err() || is(&far, &own), "a server takes somebody for its client");
    }
}

fn is(end: &Result<Tls, HandshakeError>, peer: &crate::identity::SpiffeId) -> bool {
    end.as_ref().is_ok_and(|end| end.peer == *peer)
}

/// Two ends of a connection that leaves nothing behind: thousands of closed ones would otherwise hold all ports.
async fn ready() -> (TcpStream, TcpStream) {
    let (near, far) = sockets().await;
    for end in [&near, &far] {
        socket2::SockRef::from(end).set_linger(Some(Duration::ZERO)).unwrap();
    }
    (near, far)
}

/// Passes bytes on, and changes those at some places: one bit or all of it, one more, one less, or a pause before it.
async fn meddle(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, changes: &[u8]) {
    let changes = changes.as_chunks::<4>().0;
    let (mut seen, mut buffer) = (0_usize, [0; 4096]);
    while let Ok(Ok(read @ 1..)) = timeout(SILENCE, from.read(&mut buffer)).await {
        let mut on = Vec::new();
        for byte in &buffer[..read] {
            let here = |[_, high, low, _]: &&[u8; 4]| usize::from(u16::from_be_bytes([*high, *low])) == seen;
            let mut said = vec![*byte];
            for [how, _, _, value] in changes.iter().filter(here) {
                match how % 4 {
                    0 => said.iter_mut().for_each(|byte| *byte ^= value),
                    1 => said.push(*value),
                    2 => said.clear(),
                    _ => {
                        drop(to.write_all(&std::mem::take(&mut on)).await);
                        tokio::task::yield_now().await;
                    }
                }
            }
            on.extend(said);
            seen += 1;
        }
        if to.write_all(&on).await.is_err() {
            return;
        }
    }
    // What waits for more has waited long enough.
    drop(to.shutdown().await);
}

fn sealed(mut rest: &[u8], talks: &mut Tls, listens: &mut Tls) {
    while let [kind, high, low, after @ ..] = rest {
        let wanted = usize::from(u16::from_be_bytes([*high, *low]));
        let (content, next) = after.split_at(wanted.min(after.len()).min(MAX_PLAINTEXT));
        rest = next;
        let kind = [Content::Data, Content::Handshake, Content::Alert][usize::from(kind % 3)];
        let mut record = talks.writer.record(kind, content).unwrap();
        // Cut, it is not a record yet; and looking changes nothing.
        let mut cut = record[..record.len() - 1].to_vec();
        assert_eq!(listens.reader.open(&mut cut), Ok(None));
        match listens.reader.open(&mut record) {
            Ok(Some((total, event))) => {
                assert_eq!(total, record.len());
                match event {
                    Event::Data(range) => {
                        assert_eq!((&record[range.clone()], range.start), (content, HEADER))
                    }
                    Event::Nothing => assert!(kind == Content::Handshake || content.is_empty()),
                    Event::Closed => assert_eq!((kind, content[1]), (Content::Alert, 0)),
                }
            }
            Ok(None) => panic!("a whole record was not opened"),
            // The connection is over.
            Err(_) => return,
        }
        // What the listener owes, it can say.
        drop(listens.writer.due().unwrap());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_target_does_holds_for_good_and_bad_peers() {
        let ends = Ends::default();
        // Data, a key update that wants an answer, an alert that closes; a cut-off message; nothing of TLS.
        ends.listen(&[&[0, 0, 0, 2][..], b"hi", &[1, 0, 5, 24, 0, 0, 1, 1], &[2, 0, 2, 1, 0]].concat());
        ends.listen(&[0, 1, 0, 3, 24, 0, 0]);
        ends.listen(&[1, 1, 0, 4, 99, 0, 0, 0]);
        ends.listen(b"\x02\x17\x03\x03\x00\x11aaaaaaaaaaaaaaaaa");
    }

    #[test]
    fn strangers_and_those_on_the_way_get_nowhere() {
        let ends = Ends::default();
        // Nothing; nothing of TLS; a record that never ends; records without end, of every kind.
        ends.shake(&[0]);
        ends.shake(b"\x01\x05GET / HTTP/1.1\r\n\r\n");
        ends.shake(&[0, 1, 22, 3, 1, 0x40, 0, 1]);
        for kind in 20..24 {
            for how in [2, 3] {
                ends.shake(&[how, 6, kind, 3, 3, 0, 1, 1]);
            }
        }
        // A message of the most bytes, one by one: it is given up long before its end.
        let most = [&[6, 22, 3, 3, 0, 4, 1, 0, 0xff, 0xff, 22, 3, 3][..], &[0, 1, 0, 22, 3, 3]].concat();
        for to_server in [true, false] {
            let refused = ends.runtime.block_on(ends.stranger(to_server, true, &most));
            assert!(matches!(refused, Some(HandshakeError::TooLong)), "{refused:?}");
        }
        for how in [4, 5] {
            ends.shake(&[how]);
            for change in 0..4 {
                ends.shake(&[how, change, 0, 40, 0xff]);
            }
        }
    }

    #[test]
    fn lists_are_used_whole_or_not_at_all() {
        let authority = super::super::fixtures::Authority::new();
        let good = authority.revoke(&[]);
        revocations(good.as_bytes());
        assert!(Lists::of(Ok(good.clone().into_bytes())).broken.is_none());
        let half = &good[..good.len() / 2];
        revocations(&[good.as_bytes(), half.as_bytes()].concat());
        revocations(b"");
    }
}
