//! The owner's part in the proxies of this node's pods: who is to have one, and what policy says to them.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;

use crate::identity::SpiffeId;
use crate::pods::host::{Enrolled, Judge, Judged};
use crate::policy::{self, Shared};
use crate::snapshot::{Snapshot, Workload};
use crate::workloads::Enrollment;

/// Who is to have a proxy, for [`crate::pods::Pods::sync`]: the workloads of this node that have a cgroup and an address of their own.
pub(super) fn enrolled(enrollment: &Enrollment, snapshot: &Snapshot) -> Vec<Enrolled> {
    let one = |of: crate::workloads::Enrolled| {
        let workload = snapshot.workload(&of.uid)?;
        let wanted = !of.cgroups.is_empty() && is_proxied(workload);
        wanted.then(|| Enrolled {
            uid: of.uid,
            workload: Arc::clone(workload),
            cgroups: of.cgroups.into_iter().map(|(_id, path)| path).collect(),
        })
    };
    enrollment.list().into_iter().filter_map(one).collect()
}

/// Whether each of them has a cgroup.
pub(super) fn is_whole(enrollment: &Enrollment, snapshot: &Snapshot) -> bool {
    let lacks = |of: &crate::workloads::Enrolled| {
        of.cgroups.is_empty() && snapshot.workload(&of.uid).is_some_and(|workload| is_proxied(workload))
    };
    !enrollment.list().iter().any(lacks)
}

/// Whether peers send tunnels to it or not: policy guards it in any case, and what it sends is for its peers to say.
fn is_proxied(workload: &Workload) -> bool {
    !workload.host_network && !workload.addresses.is_empty()
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
        let policy::Judgement { allowed, policy, rule, would_deny, cause } = judgement;
        Judged { allowed, policy, rule, cause: Some(cause), would_deny }
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed()
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
}
