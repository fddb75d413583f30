//! What an application says before its stream has been accepted.

use std::future::pending;
use std::io::{self, IoSliceMut};
use std::sync::Arc;

use bytes::Bytes;
use tokio::net::TcpStream;

use super::relay::{self, Budget, EarlyRoom};

/// As much goes along with a request; the rest waits for the answer.
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

    /// What was said so far; once there is something, it stays the same.
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
        let Some(mut room) = budget.early(MOST) else {
            self.from = None;
            return Ok(());
        };
        let mut bytes = [0; MOST];
        let Some(read) = relay::read_now(application, &mut [IoSliceMut::new(&mut bytes)])? else {
            return Ok(());
        };
        // That it has ended its direction is for the relay to see again.
        self.from = None;
        self.said = bytes[..read].to_vec();
        room.shrink(read);
        self.room = Some(room);
        Ok(())
    }

    /// Waits until something has been said for the first time. May be dropped and called again.
    pub(super) async fn begun(&mut self) -> io::Result<()> {
        loop {
            match self.from {
                Some((application, _)) => application.readable().await?,
                None => pending().await,
            }
            self.look()?;
            if !self.said.is_empty() {
                return Ok(());
            }
        }
    }
}
