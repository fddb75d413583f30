//! Connections of a pod that no proxy carries, ended when they may no longer be: policy has changed, or an endpoint has gone.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_common::abi;
use tokio::time::sleep;
use tracing::debug;

use super::Shared;
use super::pod::Served;
use crate::identity::spiffe_of;
use crate::policy::NOT_ARRIVED;
use crate::proxy::drain::{Drain, Phase};
use crate::snapshot::Workload;
use crate::sockets::{Caller, DiagError, Judge};

/// The kernel is told of a change while the proxies are: what it lets in until then is found a moment later.
const LOOKS: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(900)];
/// How soon is looked again for what could not be looked through, or not be ended.
const RETRY: Duration = Duration::from_secs(5);

/// Looks through the pod's connections once, since there may be some from before it was guarded, and after each change, until the drain
/// begins.
pub(super) async fn watch(shared: Arc<Shared>, pod: Arc<Served>, mut drain: Drain) {
    let mut changed = shared.mesh.changed();
    changed.mark_changed();
    let looking = async {
        while changed.changed().await.is_ok() {
            let mut whole = true;
            for pause in LOOKS {
                sleep(pause).await;
                whole = look(&shared, &pod).await;
            }
            while !whole && !changed.has_changed().unwrap_or(true) {
                sleep(RETRY).await;
                whole = look(&shared, &pod).await;
            }
        }
    };
    tokio::select! {
        () = looking => {}
        () = drain.reached(Phase::Draining) => {}
    }
}

/// Whether nothing is left of what may no longer be, as far as this kernel can do that.
async fn look(shared: &Arc<Shared>, pod: &Arc<Served>) -> bool {
    let addresses = pod.workload().addresses.to_vec();
    let workload = pod.workload();
    let now = Now { shared: Arc::clone(shared), pod: Arc::clone(pod), workload: Arc::clone(&workload) };
    match shared.sweeper.sweep(&pod.namespace, addresses, now).await {
        Ok(swept) => {
            debug!(workload = workload.uid(), ?swept, "looked through its connections");
            swept.left == 0
        }
        Err(DiagError::Unsupported) => true,
        Err(error) => {
            debug!(workload = workload.uid(), %error, "its connections cannot be looked through");
            false
        }
    }
}

/// What policy and the mesh say now of connections of a workload.
struct Now {
    shared: Arc<Shared>,
    pod: Arc<Served>,
    workload: Arc<Workload>,
}

impl Judge for Now {
    fn is_carried(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.pod.carried().contains_key(&(remote, local))
    }

    fn caller(&self, local: SocketAddr, remote: SocketAddr) -> Option<Caller> {
        self.shared.kernel.caller(remote, local).map(|caller| match caller {
            0 => Caller::Node,
            abi::Caller::STRANGER => Caller::Stranger,
            workload => Caller::Workload(workload),
        })
    }

    fn permits(&self, caller: Caller, remote: IpAddr, local: SocketAddr) -> bool {
        let source = match caller {
            // As when it came in.
            Caller::Node => return true,
            Caller::Stranger => None,
            Caller::Workload(identity) => self.shared.mesh.neighbour(identity),
            // The kernel remembers callers for a while; a neighbour is also known by its address.
            Caller::Unknown => {
                self.shared.mesh.at(remote).filter(|workload| workload.node == self.workload.node)
            }
        };
        let source = source.and_then(|workload| spiffe_of(&workload).ok());
        let judge = &self.shared.judge;
        let judged = judge.judge(&self.workload, source.as_ref(), remote, local.ip(), local.port());
        // Before anything is known of policies nobody new is let in, but who was let in before is not sent away: that they come is a
        // change as well.
        judged.allowed || judged.policy.as_deref() == Some(NOT_ARRIVED)
    }

    fn gone(&self, remote: SocketAddr) -> bool {
        self.shared.mesh.has_gone(remote.ip())
    }
}
