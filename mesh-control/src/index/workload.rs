//! The workload resources.

use std::net::IpAddr;

use mesh_common::api::{
    istio::workload::{self as api, NetworkMode, TunnelProtocol, WorkloadStatus, WorkloadType},
    mesh::v1::WorkloadExtension,
};

use super::{
    Delta, Index, Mesh, Origin,
    encode::{self, Placement, Resource},
    member::{Members, State, own_state},
    service::{address, octets},
};
use crate::manifest::{Labels, Meta, NsName, Pod, WorkloadSpec, locality};

/// A workload before its services are written into it.
struct Draft {
    workload: api::Workload,
    extension: WorkloadExtension,
    members: Members,
    /// What it is where no service says otherwise.
    state: State,
}

impl Index {
    /// Computes a workload again.
    pub(super) fn refresh_workload(&mut self, origin: &Origin, delta: &mut Delta) {
        let draft = match origin {
            Origin::Pod(name) => self.draft_pod(name),
            Origin::WorkloadEntry(name) => self.draft_workload_entry(name),
            Origin::Inline(name, address) => self.draft_inline(name, *address),
            Origin::Slice(name, address) => self.draft_endpoint(name, *address),
        };
        let draft = draft.map(|mut draft| {
            let addresses = draft.workload.addresses.iter().filter_map(|octets| address(octets));
            draft.extension.outdone =
                draft.workload.network_mode() == NetworkMode::Standard && self.is_outdone(origin, addresses);
            draft
        });
        let node = draft.as_ref().map_or("", |draft| draft.workload.node.as_str());
        self.inputs.place(origin, node);
        let uid = self.uid(origin);
        // Whoever writes an endpoint into a slice or an entry does not thereby give a node somebody's identity.
        let identified = matches!(origin, Origin::Pod(_) | Origin::WorkloadEntry(_));
        let resource = draft.map(|draft| {
            let placement = identified.then(|| placement(&draft.workload)).flatten();
            Resource { placement, ..finish(draft, uid.clone(), &self.mesh) }
        });
        self.publish(uid.into(), resource, delta);
    }

    fn uid(&self, origin: &Origin) -> String {
        let cluster = &self.mesh.cluster_id;
        match origin {
            Origin::Pod(name) => format!("{cluster}//Pod/{name}"),
            Origin::WorkloadEntry(name) => format!("{cluster}/networking.istio.io/WorkloadEntry/{name}"),
            Origin::Inline(name, address) => {
                format!("{cluster}/networking.istio.io/ServiceEntry/{name}/{address}")
            }
            Origin::Slice(name, address) => {
                format!("{cluster}/discovery.k8s.io/EndpointSlice/{name}/{address}")
            }
        }
    }

    fn draft_pod(&self, name: &NsName) -> Option<Draft> {
        let pod = self.inputs.pods.get(name).filter(|pod| !pod.is_finished())?;
        let addresses: Vec<_> = pod.addresses().map(octets).collect();
        let node = pod.spec.node_name.clone().unwrap_or_default();
        if addresses.is_empty() && node.is_empty() {
            return None;
        }
        // A pod is announced as soon as its node is known, so that its cgroup is expected; it serves once it has an address.
        let members = if addresses.is_empty() { Members::new() } else { self.members_of_pod(name, pod) };
        let (controller, kind) = controller(pod);
        let mut workload = named(name, &pod.metadata, controller);
        workload.workload_type = kind.into();
        workload.addresses = addresses;
        workload.service_account = pod.spec.service_account_name.clone().unwrap_or_default();
        workload.locality = self.locality_of(&node, "");
        workload.node = node;
        if pod.spec.host_network {
            workload.network_mode = NetworkMode::HostNetwork.into();
        }
        let own = !pod.spec.host_network && !workload.addresses.is_empty();
        let outbound_meshed =
            self.write_policy(&Origin::Pod(name.clone()), &pod.metadata.labels, own, &mut workload);
        // The kubelet names the cgroup of a static pod after the hash of its manifest, not after the uid of its mirror.
        let static_pod = pod.metadata.annotations.get("kubernetes.io/config.hash");
        let pod_uid = static_pod.unwrap_or(&pod.metadata.uid).clone();
        let extension = WorkloadExtension { pod_uid, outbound_meshed, ..WorkloadExtension::default() };
        Some(Draft { workload, extension, members, state: own_state(pod) })
    }

    fn draft_workload_entry(&self, name: &NsName) -> Option<Draft> {
        let entry = self.inputs.workload_entries.get(name)?;
        let members = self.members_of_workload_entry(name, entry);
        let meta = Meta { labels: entry.labels(), ..Meta::default() };
        let mut workload = with_spec(named(name, &meta, name.name.to_string()), &entry.spec)?;
        entry.annotation("mesh.dev/node").clone_into(&mut workload.node);
        workload.locality = workload.locality.or_else(|| self.locality_of(&workload.node, ""));
        let cgroup = entry.annotation("mesh.dev/cgroup").to_owned();
        // Without a cgroup no agent can know its processes.
        let own = !cgroup.is_empty();
        let outbound_meshed =
            self.write_policy(&Origin::WorkloadEntry(name.clone()), &meta.labels, own, &mut workload);
        let extension = WorkloadExtension { cgroup, outbound_meshed, ..WorkloadExtension::default() };
        Some(Draft { workload, extension, members, state: State::Ready })
    }

    fn draft_inline(&self, name: &NsName, address: IpAddr) -> Option<Draft> {
        let entry = self.inputs.service_entries.get(name)?;
        let endpoint = entry.spec.endpoints.iter().find(|endpoint| endpoint.ip() == Some(address))?;
        let members = self.members_of_inline(name, entry, endpoint);
        let meta = Meta { labels: endpoint.labels.clone(), ..Meta::default() };
        let workload = with_spec(named(name, &meta, name.name.to_string()), endpoint)?;
        Some(Draft { workload, extension: WorkloadExtension::default(), members, state: State::Ready })
    }

    fn draft_endpoint(&self, name: &NsName, address: IpAddr) -> Option<Draft> {
        let (endpoint, members) = self.members_of_endpoint(name, address)?;
        let mut workload = named(name, &Meta::default(), name.name.to_string());
        workload.addresses = vec![octets(address)];
        // Its network namespace is unknown, so it must not be taken for a pod's own.
        workload.network_mode = NetworkMode::HostNetwork.into();
        workload.node = endpoint.node_name.clone().unwrap_or_default();
        workload.locality = self.locality_of(&workload.node, endpoint.zone.as_deref().unwrap_or(""));
        Some(Draft { workload, extension: WorkloadExtension::default(), members, state: State::Ready })
    }

    /// Writes which policies the workload names, and whether peers reach it through the node proxies; `own`: it may have a
    /// network namespace of its own. Whether what it sends goes by mutual TLS though they do not.
    fn write_policy(
        &self,
        origin: &Origin,
        labels: &Labels,
        own: bool,
        workload: &mut api::Workload,
    ) -> bool {
        let applied = self.policies_of(origin, &workload.namespace);
        workload.authorization_policies = applied.names;
        let meshed = own && self.is_meshed(&workload.node, &workload.namespace, labels);
        if meshed && !applied.disabled {
            workload.tunnel_protocol = TunnelProtocol::Hbone.into();
        }
        meshed && applied.disabled
    }

    /// The node's region and zone; `zone` wins where it is known.
    fn locality_of(&self, node: &str, zone: &str) -> Option<api::Locality> {
        let (region, own) = self.inputs.nodes.get(node).map_or(("", ""), |node| node.locality());
        as_locality((region, if zone.is_empty() { own } else { zone }, ""))
    }
}

/// Where a workload is, and as whom; a pod that says nothing runs as `default`.
fn placement(workload: &api::Workload) -> Option<Box<Placement>> {
    let account = workload.service_account.as_str();
    let account = if account.is_empty() { "default" } else { account };
    let node = workload.node.as_str();
    let placement = Placement {
        node: node.into(),
        namespace: workload.namespace.as_str().into(),
        service_account: account.into(),
    };
    (!node.is_empty()).then(|| Box::new(placement))
}

fn as_locality((region, zone, subzone): (&str, &str, &str)) -> Option<api::Locality> {
    let locality = api::Locality { region: region.into(), zone: zone.into(), subzone: subzone.into() };
    (locality != api::Locality::default()).then_some(locality)
}

/// The names under which a workload is known.
fn named(name: &NsName, meta: &Meta, workload_name: String) -> api::Workload {
    let label = |names: &[&str]| names.iter().find_map(|name| meta.labels.get(*name)).cloned();
    let canonical = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    api::Workload {
        name: name.name.to_string(),
        namespace: name.namespace.to_string(),
        canonical_name: canonical.unwrap_or_else(|| workload_name.clone()),
        canonical_revision: revision.unwrap_or_else(|| "latest".to_owned()),
        workload_type: WorkloadType::Pod.into(),
        workload_name,
        ..api::Workload::default()
    }
}

/// What a pod was made for, as Istio tells it by the pod alone: a Deployment (whose ReplicaSet has its name and a hash), a Job, a CronJob (whose
/// Jobs have its name and the minute); else it is one of its own.
fn controller(pod: &Pod) -> (String, WorkloadType) {
    let meta = &pod.metadata;
    let owner = meta.owner_references.iter().find(|owner| owner.controller);
    let found = owner.and_then(|owner| match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = meta.labels.get("pod-template-hash")?;
            Some((owner.name.strip_suffix(hash.as_str())?.strip_suffix('-')?, WorkloadType::Deployment))
        }
        "Job" => {
            let is_time =
                |text: &str| matches!(text.len(), 8..=10) && text.bytes().all(|b| b.is_ascii_digit());
            let scheduled = owner.name.rsplit_once('-').filter(|(_, time)| is_time(time));
            let job = (owner.name.as_str(), WorkloadType::Job);
            Some(scheduled.map_or(job, |(name, _)| (name, WorkloadType::Cronjob)))
        }
        _ => None,
    });
    found.map_or_else(|| (meta.name.clone(), WorkloadType::Pod), |(name, kind)| (name.to_owned(), kind))
}

fn with_spec(mut workload: api::Workload, spec: &WorkloadSpec) -> Option<api::Workload> {
    workload.addresses = vec![octets(spec.ip()?)];
    workload.service_account.clone_from(&spec.service_account);
    workload.locality = as_locality(locality(&spec.locality));
    workload.capacity = spec.weight;
    Some(workload)
}

/// Writes identity and readiness: a workload that is ready nowhere is unhealthy, else the exceptions are listed.
fn finish(draft: Draft, uid: String, mesh: &Mesh) -> Resource {
    let Draft { mut workload, mut extension, members, state } = draft;
    let ready = if members.is_empty() {
        state == State::Ready
    } else {
        members.values().any(|m| m.state == State::Ready)
    };
    let status = if ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy };
    workload.uid = uid;
    workload.cluster_id.clone_from(&mesh.cluster_id);
    // On the wire nothing stands for this one.
    if mesh.trust_domain != "cluster.local" {
        workload.trust_domain.clone_from(&mesh.trust_domain);
    }
    workload.status = status.into();
    let names_in =
        |state| members.iter().filter(move |(_, m)| m.state == state).map(|(name, _)| name.to_string());
    extension.terminating_in = names_in(State::Terminating).collect();
    if ready {
        extension.unready_in = names_in(State::Unready).collect();
    }
    encode::workload(workload, &extension, &members)
}
