//! Connections of a pod: where they go, and whether they may.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tracing::debug;

use super::Shared;
use super::figures::NoRoute;
use super::host::{Denial, Side};
use super::mesh::Reach;
use super::pod::Served;
use crate::proxy::host::{Dialled, Endpoint, Later, Original, Outcome, Outward, Route};
use crate::proxy::stream::Reason;
use crate::snapshot::Workload;

/// The outbound side of a pod.
pub(super) struct Outside {
    pub(super) shared: Arc<Shared>,
    pub(super) pod: Arc<Served>,
}

impl Outside {
    fn permits(&self, from: IpAddr, to: &Arc<Workload>, address: SocketAddr, tell: bool) -> bool {
        let own = &self.pod.own;
        let judged = self.shared.judge.judge(to, Some(own), from, address.ip(), address.port());
        if judged.allowed {
            return true;
        }
        if tell {
            (self.shared.denied)(Denial {
                side: Side::Outbound,
                source: Some(own.clone()),
                source_ip: from,
                destination: Arc::clone(to),
                address,
                judged,
            });
        }
        false
    }

    fn refuse(&self, why: NoRoute) -> Route {
        self.shared.figures.no_route(why);
        Route::Refuse(match why {
            NoRoute::Denied => Reason::Policy,
            NoRoute::NoOriginal => Reason::BadRequest,
            NoRoute::Unknown | NoRoute::NoEndpoint => Reason::Upstream,
        })
    }

    fn host(&self, original: &Original) -> Option<Box<str>> {
        original.is_service.then(|| self.shared.mesh.host(original.dialled.ip())).flatten()
    }
}

impl Outward for Outside {
    fn original(&self, application: SocketAddr, _listener: SocketAddr) -> Option<Original> {
        let original = self.shared.kernel.take_original(self.pod.namespace.cookie(), application);
        if original.is_none() {
            self.shared.figures.no_route(NoRoute::NoOriginal);
        }
        original
    }

    fn route(&self, application: SocketAddr, original: &Original) -> Route {
        let Some(chosen) = original.chosen else {
            let endpoints = self.others(application, original, &[]);
            if endpoints.is_empty() {
                return self.refuse(NoRoute::NoEndpoint);
            }
            return Route::Tunnel { endpoints, host: self.host(original) };
        };
        let (workload, endpoint) = match self.shared.mesh.reach(chosen) {
            Reach::Unknown => return self.refuse(NoRoute::Unknown),
            Reach::Plain(workload) => (workload, None),
            Reach::Meshed(workload, endpoint) => (workload, Some(endpoint)),
        };
        if !self.permits(application.ip(), &workload, chosen, true) {
            return self.refuse(NoRoute::Denied);
        }
        match endpoint {
            Some(endpoint) => Route::Tunnel { endpoints: vec![endpoint], host: self.host(original) },
            None => Route::Direct(chosen),
        }
    }

    fn others(&self, application: SocketAddr, original: &Original, failed: &[Endpoint]) -> Vec<Endpoint> {
        if !original.is_service {
            return Vec::new();
        }
        let all = self.shared.mesh.others(original.dialled, failed).into_iter();
        // Whom policy does not let it reach is passed over: it has not asked for that one.
        all.filter(|(workload, endpoint)| self.permits(application.ip(), workload, endpoint.target, false))
            .map(|(_, endpoint)| endpoint)
            .collect()
    }

    fn still(&self, dialled: &Dialled) -> bool {
        let (target, identity) = match (&dialled.endpoint, dialled.direct) {
            (Some(endpoint), _) => (endpoint.target, Some(&endpoint.identity)),
            (None, Some(direct)) => (direct, None),
            // It has no destination yet.
            (None, None) => return true,
        };
        let Some(workload) = self.shared.mesh.still(target.ip(), identity) else { return false };
        self.permits(dialled.application.ip(), &workload, target, true)
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.shared.mesh.changed()
    }

    fn finished(&self, dialled: &Dialled, outcome: &Outcome) {
        debug!(application = %dialled.application, ?outcome, "an outbound connection has ended");
        self.shared.figures.outbound.finished(outcome);
    }

    fn dial(&self, to: SocketAddr) -> Later<'_, io::Result<TcpStream>> {
        Box::pin(self.pod.namespace.connect(to))
    }

    fn dial_tunnel(&self, to: SocketAddr) -> Later<'_, io::Result<TcpStream>> {
        Box::pin(self.pod.namespace.connect_with(&self.shared.congestion, to))
    }
}
