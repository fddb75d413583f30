//! For the fuzz target `tls_records`: a secured connection whose peer says what it likes.

use tokio::runtime::{Builder, Runtime};

use super::fixtures::Pair;
use super::record::{Content, HEADER};
use super::session::Event;
use super::{MAX_PLAINTEXT, Tls};

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
            socket2::SockRef::from(&end.tcp).set_linger(Some(std::time::Duration::ZERO)).unwrap();
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
}
