//! The owner's part in the proxies of this node's pods: who is to have one, and what they have done.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::identity::{SpiffeId, spiffe_of};
use crate::metrics::{Proxy, ProxySide};
use crate::pods::figures::{Figures, SideFigures};
use crate::pods::host::{Denial, Enrolled, Judge, Judged, Side};
use crate::policy::{self, Shared};
use crate::snapshot::{Snapshot, Workload};
use crate::workloads::Enrollment;

/// Who is to have a proxy, for [`crate::pods::Pods::sync`]: the workloads of this node that have a cgroup and an address of their own.
pub(super) fn enrolled(enrollment: &Enrollment, snapshot: &Snapshot) -> Vec<Enrolled> {
    let one = |of: crate::workloads::Enrolled| {
        let workload = snapshot.workload(&of.uid)?;
        // Whether peers send tunnels to it or not: policy guards it in any case, and what it sends is for its peers to say.
        let wanted = !of.cgroups.is_empty() && !workload.host_network && !workload.addresses.is_empty();
        wanted.then(|| Enrolled {
            uid: of.uid,
            workload: Arc::clone(workload),
            cgroups: of.cgroups.into_iter().map(|(_id, path)| path).collect(),
        })
    };
    enrollment.list().into_iter().filter_map(one).collect()
}

impl Judge for Shared {
    fn judge(
        &self,
        destination: &Workload,
        source: Option<&SpiffeId>,
        source_ip: IpAddr,
        destination_ip: IpAddr,
        port: u16,
    ) -> Judged {
        let judgement = self.judge(destination, source, source_ip, destination_ip, port);
        Judged { allowed: judgement.allowed, policy: judgement.policy, rule: judgement.rule }
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed()
    }
}

/// A denial of a proxy, as the owner keeps them.
pub(super) fn refusal(denial: Denial) -> policy::Refusal {
    let identity = spiffe_of(&denial.destination).ok();
    policy::Refusal {
        at: SystemTime::now(),
        side: match denial.side {
            Side::Outbound => policy::Side::Client,
            Side::Inbound => policy::Side::Proxy,
        },
        source: policy::Caller {
            workload: None,
            identity: denial.source.map(|source| source.to_string()),
            address: Some(SocketAddr::new(denial.source_ip, 0)),
        },
        destination: policy::Caller {
            workload: Some(denial.destination.uid()),
            identity: identity.map(|identity| identity.to_string()),
            address: Some(denial.address),
        },
        policy: denial.judged.policy.unwrap_or_else(|| policy::NO_MATCH.into()),
        rule: denial.judged.rule,
        cause: None,
    }
}

/// The part of a scrape.
pub(super) fn figures(figures: &Figures) -> Proxy {
    let pods = figures.pods();
    let mut states = std::collections::BTreeMap::<&'static str, u64>::new();
    for pod in &pods {
        *states.entry(pod.state.name()).or_default() += 1;
    }
    let connections =
        |of: fn(&crate::pods::figures::PodReport) -> usize| pods.iter().map(of).sum::<usize>() as u64;
    Proxy {
        sides: vec![
            side(Side::Outbound, &figures.outbound, connections(|pod| pod.outbound)),
            side(Side::Inbound, &figures.inbound, connections(|pod| pod.inbound)),
        ],
        pods: states.into_iter().collect(),
        no_routes: figures.no_routes().map(|(why, count)| (why.name(), count)).collect(),
        idle_tunnels: connections(|pod| pod.idle_tunnels),
        buffer_bytes: connections(|pod| pod.buffers),
        listen_failures: figures.listen_failures.load(Relaxed),
        namespace_failures: figures.namespace_failures.load(Relaxed),
        unshown_clients: figures.unshown_clients.load(Relaxed),
    }
}

fn side(of: Side, figures: &SideFigures, connections: u64) -> ProxySide {
    let counts = &figures.counts;
    let read = |counter: &AtomicU64| counter.load(Relaxed);
    let (sent, received) = figures.moved();
    let mut outcomes = figures.outcomes();
    outcomes.insert("stopped", read(&counts.stopped));
    ProxySide {
        name: of.name(),
        connections,
        accepted: read(&counts.accepted),
        outcomes: outcomes.into_iter().collect(),
        sent,
        received,
        handshakes: vec![
            ("made", read(&counts.handshakes)),
            ("failed", read(&counts.failed_handshakes)),
            ("slow", read(&counts.slow_handshakes)),
        ],
        reused: read(&counts.reused),
        retried: read(&counts.retried),
        limits: vec![
            ("connections", read(&counts.over_connections)),
            ("handshakes", read(&counts.over_handshakes)),
            ("buffers", read(&counts.over_buffers)),
            ("idle-tunnels", read(&counts.over_idle)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use mesh_common::api::istio::workload::{NetworkMode, TunnelProtocol};

    use super::*;
    use crate::snapshot::fixtures::{extend_workload, of_workload, update, workload};
    use crate::workloads::CgroupEvent;

    #[test]
    fn who_has_a_cgroup_and_an_address_of_its_own_gets_a_proxy() {
        let mut snapshot = Snapshot::new();
        let mut enrollment = Enrollment::new("node-a");
        for (number, (name, node)) in [
            ("pod", "node-a"),
            ("early", "node-a"),
            ("plain", "node-a"),
            ("host", "node-a"),
            ("far", "node-b"),
        ]
        .into_iter()
        .enumerate()
        {
            let uid = format!("c//Pod/shop/{name}");
            let hbone = if name == "plain" { TunnelProtocol::None } else { TunnelProtocol::Hbone };
            let mut one = workload(&uid, &format!("10.0.0.{number}"), node, &[]);
            one.tunnel_protocol = hbone as i32;
            if name == "host" {
                one.network_mode = NetworkMode::HostNetwork as i32;
            }
            let extension = mesh_common::api::mesh::v1::WorkloadExtension {
                cgroup: format!("/{name}.service"),
                ..Default::default()
            };
            snapshot.apply(update(&[of_workload(extend_workload(one, &extension), "1")]));
            enrollment.workload(&uid, snapshot.workload(&uid).map(|workload| &**workload));
            if name != "early" {
                let path = PathBuf::from(format!("{name}.service"));
                enrollment.cgroup(CgroupEvent::Appeared { id: number as u64 + 1, path });
            }
        }
        let found = enrolled(&enrollment, &snapshot);
        let [plain, pod] = found.try_into().unwrap();
        assert_eq!((&*pod.uid, pod.cgroups), ("c//Pod/shop/pod", vec![PathBuf::from("pod.service")]));
        // Whether other nodes take it for meshed says nothing of its own connections.
        assert_eq!(&*plain.uid, "c//Pod/shop/plain");
    }

    #[test]
    fn a_denial_names_both_ends_policy_and_rule() {
        let destination =
            crate::snapshot::fixtures::parsed_workload(workload("c//Pod/shop/db", "10.0.0.1", "n", &[]));
        let denial = Denial {
            side: Side::Inbound,
            source: Some("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()),
            source_ip: "10.0.0.2".parse().unwrap(),
            destination,
            address: "10.0.0.1:80".parse().unwrap(),
            judged: Judged { allowed: false, policy: Some("shop/one".into()), rule: Some(2) },
        };
        let told = refusal(denial);
        assert_eq!((told.side, &*told.policy, told.rule), (policy::Side::Proxy, "shop/one", Some(2)));
        assert_eq!(told.source.identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/web"));
        assert_eq!(told.destination.workload.as_deref(), Some("c//Pod/shop/db"));
        assert_eq!(told.destination.address, Some("10.0.0.1:80".parse().unwrap()));
    }

    #[test]
    fn what_the_proxies_count_is_told() {
        let figures = Figures::default();
        figures.inbound.counts.over_connections.store(3, Relaxed);
        let proxy = super::figures(&figures);
        assert_eq!(proxy.sides[1].name, "inbound");
        assert!(proxy.sides[1].limits.contains(&("connections", 3)));
    }
}
