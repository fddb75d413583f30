//! Connections to a pod: whether they may be, and how the application sees them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::watch;
use tracing::debug;

use super::Shared;
use super::host::{Denial, Side};
use super::pod::Served;
use crate::identity::spiffe_of;
use crate::proxy::host::{Application, Caller, Denied, Guard, Inward, Later, Outcome, Wanted};

/// The inbound side of a pod.
pub(super) struct Inside {
    pub(super) shared: Arc<Shared>,
    pub(super) pod: Arc<Served>,
}

/// An application sees the real client for as long as this lives.
struct Shown {
    shared: Arc<Shared>,
    netns: u64,
    end: SocketAddr,
}

impl Guard for Shown {}

impl Drop for Shown {
    fn drop(&mut self) {
        self.shared.kernel.forget_client(self.netns, self.end);
    }
}

/// The sweeper leaves a connection that the proxy carries to it for as long as this lives.
struct Carried {
    pod: Arc<Served>,
    ends: (SocketAddr, SocketAddr),
}

impl Guard for Carried {}

impl Drop for Carried {
    fn drop(&mut self) {
        let mut carried = self.pod.carried();
        // There may be another with the same ends by now.
        if let Some(count) = carried.get_mut(&self.ends) {
            *count -= 1;
            if *count == 0 {
                carried.remove(&self.ends);
            }
        }
    }
}

/// Whom an application is to see. What a proxy tells of its client is believed as far as it can be seen to be true: a connection
/// comes from the client's own address, since its proxy is in its own network namespace.
fn client(wanted: &Wanted) -> SocketAddr {
    wanted
        .client
        .filter(|told| told.ip().to_canonical() == wanted.peer.ip().to_canonical())
        .unwrap_or(wanted.peer)
}

impl Inside {
    async fn connect(&self, wanted: &Wanted) -> io::Result<Application> {
        let (namespace, to) = (&self.pod.namespace, wanted.destination);
        let socket = namespace.bound(SocketAddr::new(to.ip(), 0), to).await?;
        let (end, client, netns) = (socket.local_addr()?, client(wanted), namespace.cookie());
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        let shown = self.shared.kernel.show_client(netns, end, client);
        let guard: Option<Box<dyn Guard>> = match shown {
            Ok(()) => Some(Box::new(Shown { shared: Arc::clone(&self.shared), netns, end })),
            Err(error) => {
                // Policy has been asked with the true address; only the application sees another.
                self.shared.figures.unshown_clients.fetch_add(1, Relaxed);
                debug!(%client, %error, "an application will see the proxy's address instead of its client's");
                None
            }
        };
        Ok(Application { guard, tcp: socket.connect(to).await? })
    }
}

impl Inside {
    /// What policy says; denials are told, and when it comes what policies in dry run would have said.
    fn judge(&self, wanted: &Wanted, comes: bool) -> Result<(), Denied> {
        let workload = self.pod.workload();
        let source_ip = wanted.peer.ip().to_canonical();
        let (ip, port) = (wanted.destination.ip(), wanted.destination.port());
        let judged = self.shared.judge.judge(&workload, wanted.source.as_ref(), source_ip, ip, port);
        if judged.allowed && !(comes && judged.would_deny.is_some()) {
            return Ok(());
        }
        let answer = match judged.allowed {
            true => Ok(()),
            false => Err(Denied { policy: judged.policy.as_deref().unwrap_or_default().to_owned() }),
        };
        (self.shared.denied)(Denial {
            side: Side::Inbound,
            source: wanted.source.clone(),
            source_ip,
            destination: workload,
            address: wanted.destination,
            judged,
        });
        answer
    }
}

impl Inward for Inside {
    fn caller(&self, peer: SocketAddr, destination: SocketAddr) -> Option<Caller> {
        let identity = self.shared.kernel.take_steered(peer, destination)?;
        // Not whoever is at its address: that one may have gone, and this be a stranger.
        let source = match identity {
            0 => None,
            // A workload that has gone meanwhile is nobody: as such it might be let in where its name would not be.
            identity => Some(spiffe_of(&*self.shared.mesh.neighbour(identity)?).ok()?),
        };
        let ends = (peer, destination);
        *self.pod.carried().entry(ends).or_default() += 1;
        let guard = Box::new(Carried { pod: Arc::clone(&self.pod), ends });
        Some(Caller { source, guard })
    }

    fn permits(&self, wanted: &Wanted) -> Result<(), Denied> {
        self.judge(wanted, true)
    }

    fn still(&self, wanted: &Wanted) -> bool {
        self.judge(wanted, false).is_ok()
    }

    fn dial<'a>(&'a self, wanted: &'a Wanted) -> Later<'a, io::Result<Application>> {
        Box::pin(self.connect(wanted))
    }

    fn changed(&self) -> watch::Receiver<u64> {
        // Not of the policies alone: a workload names other ones later than they come, and certificates are revoked.
        self.shared.mesh.changed()
    }

    fn finished(&self, wanted: &Wanted, outcome: &Outcome) {
        debug!(peer = %wanted.peer, to = %wanted.destination, ?outcome, "an inbound connection has ended");
        self.shared.figures.inbound.finished(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_proxy_tells_of_its_client_must_fit_where_it_comes_from() {
        let wanted = |client: Option<&str>| Wanted {
            source: None,
            peer: "10.0.0.7:50000".parse().unwrap(),
            client: client.map(|client| client.parse().unwrap()),
            destination: "10.0.0.8:80".parse().unwrap(),
        };
        assert_eq!(client(&wanted(Some("10.0.0.7:1234"))), "10.0.0.7:1234".parse().unwrap());
        assert_eq!(client(&wanted(Some("[::ffff:10.0.0.7]:1234"))).port(), 1234);
        for told in [None, Some("10.0.0.9:1234"), Some("[fd00::7]:1234"), Some("127.0.0.1:1234")] {
            assert_eq!(client(&wanted(told)), "10.0.0.7:50000".parse().unwrap());
        }
    }
}
