//! What an application says before its stream has been accepted.

use std::future::pending;
use std::io::{self, IoSliceMut};
use std::sync::Arc;

use bytes::Bytes;
use tokio::net::TcpStream;

use super::relay::{self, Budget, EarlyRoom};

/// As much is said before the answer; the rest waits for it.
const MOST: usize = 8 << 10;

/// It goes along with the request, which saves the time of an answer, and is kept until that comes: another endpoint may have to
/// hear it.
pub(crate) struct Early<'a> {
    /// None: nothing more is to be heard before the answer.
    from: Option<(&'a TcpStream, &'a Arc<Budget>)>,
    said: Vec<u8>,
    room: Option<EarlyRoom>,
    /// A server has it, and has not said that its application does not.
    out: bool,
}

impl<'a> Early<'a> {
    /// Of `application`, in as much memory as `budget` has for that.
    pub(super) fn of(application: &'a TcpStream, budget: &'a Arc<Budget>) -> Self {
        Self { from: Some((application, budget)), said: Vec::new(), room: None, out: false }
    }

    /// Nothing.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { from: None, said: Vec::new(), room: None, out: false }
    }

    /// What was said so far.
    pub(super) fn said(&self) -> &[u8] {
        &self.said
    }

    /// All of it, with the room that it takes until it has been sent.
    pub(super) fn take(&mut self) -> (Bytes, Option<EarlyRoom>) {
        (std::mem::take(&mut self.said).into(), self.room.take())
    }

    /// It is on its way to a server.
    pub(super) fn is_sent(&mut self) {
        self.out |= !self.said.is_empty();
    }

    /// That server says that no application has heard it.
    pub(super) fn is_unheard(&mut self) {
        self.out = false;
    }

    /// Whether an application may have heard it, so that no other may be asked.
    pub(super) fn may_be_heard(&self) -> bool {
        self.out
    }

    /// Takes what is there, without waiting. An error: the application has gone.
    pub(super) fn look(&mut self) -> io::Result<()> {
        let Some((application, budget)) = self.from else { return Ok(()) };
        let left = MOST - self.said.len();
        let Some(mut room) = budget.early(left) else {
            self.from = None;
            return Ok(());
        };
        let mut bytes = [0; MOST];
        let Some(read) = relay::read_now(application, &mut [IoSliceMut::new(&mut bytes[..left])])? else {
            return Ok(());
        };
        if read == 0 || read == left {
            // That it has ended its direction is for the relay to see again.
            self.from = None;
        }
        self.said.extend_from_slice(&bytes[..read]);
        room.shrink(read);
        match &mut self.room {
            Some(held) => held.join(room),
            None => self.room = Some(room),
        }
        Ok(())
    }

    /// Waits until more has been said. May be dropped and called again.
    pub(super) async fn more(&mut self) -> io::Result<()> {
        let before = self.said.len();
        loop {
            match self.from {
                Some((application, _)) => application.readable().await?,
                None => pending().await,
            }
            self.look()?;
            if self.said.len() > before {
                return Ok(());
            }
        }
    }
}
