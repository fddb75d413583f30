//! Connections without TLS to a workload whose policies ask for more than the kernel sees: it has let them in so far, and led them here.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::{Inbound, answer, canonical, finish};
use crate::proxy::accept::{self, Room};
use crate::proxy::drain::Drain;
use crate::proxy::host::{Caller, Outcome, Wanted};
use crate::proxy::limits::count;
use crate::proxy::relay::{self, end_on_drop, reset_on_drop};
use crate::proxy::threads::Accepted;

/// Takes connections from `listener` (the pod's address, port 15006) until the drain is over. They are to the address and port that were
/// dialled, as their own end says.
pub async fn serve_plain(inbound: Arc<Inbound>, listener: TcpListener, drain: Drain) {
    let each = Arc::clone(&inbound);
    accept::serve(listener, &inbound.allowance, &inbound.threads, drain, move |tcp, peer, room| {
        connection(Arc::clone(&each), tcp, peer, room)
    })
    .await;
}

async fn connection(inbound: Arc<Inbound>, tcp: Accepted, peer: SocketAddr, room: Room) {
    let tcp = match tcp.here() {
        Ok(tcp) => tcp,
        Err(error) => return accept::stranded(&inbound.allowance, &error),
    };
    // Unless it ends in order, whichever way it ends.
    reset_on_drop(&tcp);
    // An error: it has failed already.
    let Ok(dialled) = tcp.local_addr() else { return };
    let (peer, destination) = (canonical(peer), canonical(dialled));
    // From before the verdict.
    let mut changed = inbound.host.changed();
    let Some(Caller { source, guard }) = inbound.host.caller(peer, destination) else {
        // A process of the pod itself has dialled the proxy; or who this one is has gone, or was forgotten, so many came at a time.
        count(&inbound.allowance.counts.malformed);
        return;
    };
    let wanted = Wanted { source, peer, client: None, destination };
    carry(&inbound, &tcp, &wanted, &mut changed).await;
    drop((tcp, guard, room));
}

async fn carry(inbound: &Inbound, tcp: &TcpStream, wanted: &Wanted, changed: &mut watch::Receiver<u64>) {
    let application = match answer(inbound, wanted, Ok(wanted.destination)).await {
        Ok(application) => application,
        Err(reason) => return inbound.host.finished(wanted, &Outcome::Refused(reason)),
    };
    let relayed = tokio::select! {
        relayed = relay::plain(&application.tcp, tcp, &inbound.allowance.budget) => Some(relayed),
        () = forbidden(inbound, wanted, changed) => None,
    };
    if finish(inbound, wanted, &application.tcp, relayed) {
        end_on_drop(tcp);
    }
}

/// Waits until policy no longer lets a connection be.
async fn forbidden(inbound: &Inbound, wanted: &Wanted, changed: &mut watch::Receiver<u64>) {
    while changed.changed().await.is_ok() {
        if !inbound.host.still(wanted) {
            return;
        }
    }
    // Policy has nobody left to change it.
    std::future::pending().await
}
