//! What an application says before its stream has been accepted.

use std::future::pending;
use std::io::{self, IoSliceMut};

use tokio::net::TcpStream;

use super::relay;

/// As much goes along with a request; the rest waits for the answer.
const MOST: usize = 8 << 10;

/// It goes along with the request, which saves the time of an answer, and is kept until that comes: another endpoint may have to
/// hear it.
pub(crate) struct Early<'a> {
    application: Option<&'a TcpStream>,
    said: Vec<u8>,
    /// It has ended its direction, which is for the relay to see again.
    ended: bool,
    /// A server has it, and has not said that its application does not.
    out: bool,
}

impl<'a> Early<'a> {
    /// Of `application`.
    pub(super) fn of(application: &'a TcpStream) -> Self {
        Self { application: Some(application), said: Vec::new(), ended: false, out: false }
    }

    /// Nothing.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { application: None, said: Vec::new(), ended: true, out: false }
    }

    /// What was said so far; once there is something, it stays the same.
    pub(super) fn said(&self) -> &[u8] {
        &self.said
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
        let Some(application) = self.application.filter(|_| self.said.is_empty() && !self.ended) else {
            return Ok(());
        };
        let mut bytes = [0; MOST];
        match relay::read_now(application, &mut [IoSliceMut::new(&mut bytes)])? {
            Some(0) => self.ended = true,
            Some(read) => self.said = bytes[..read].to_vec(),
            None => {}
        }
        Ok(())
    }

    /// Waits until something has been said for the first time. May be dropped and called again.
    pub(super) async fn begun(&mut self) -> io::Result<()> {
        loop {
            match self.application {
                Some(application) if self.said.is_empty() && !self.ended => application.readable().await?,
                Some(_) | None => pending().await,
            }
            self.look()?;
            if !self.said.is_empty() {
                return Ok(());
            }
        }
    }
}
