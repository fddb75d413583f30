//! Answers what the agent is asked, from what its owner holds and the kernel counts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Display;
use std::sync::Arc;

use mesh_common::abi::{CounterKey, Counters, Outcome, Protocol, ServiceKey, identity_of};
use tracing::warn;

use super::denials::Untold;
use super::owner::Owner;
use super::record::Record;
use super::{certificates, figures};
use crate::admin::{AdminRequest, view};
use crate::config::Config;
use crate::datapath::adopt::adopt;
use crate::datapath::ledger::Known;
use crate::datapath::show::{show_endpoint, unmap};
use crate::identity::access::Access;
use crate::identity::spiffe_of;
use crate::metrics::{Connections, MapUse, Peer, View};
use crate::pods::figures::{Figures, State};
use crate::snapshot::Workload;
use crate::sockets::Sweeper;
use crate::workloads::watch::WatchStats;

/// What does not change while the agent runs.
pub(super) struct Context {
    /// The configuration.
    pub(super) config: Config,
    /// How the cgroup watch fares.
    pub(super) watch: Arc<WatchStats>,
    /// The servers of the control plane.
    pub(super) servers: Vec<Arc<Access>>,
    /// What the proxies of this node's pods have done.
    pub(super) proxies: Arc<Figures>,
    /// What has become of connections that may no longer be.
    pub(super) swept: Sweeper,
    /// Denials that nobody has been told of.
    pub(super) untold: Untold,
}

/// Answers a question. Whoever asked may have gone meanwhile.
pub(super) fn answer(owner: &mut Owner, record: &Record, context: &Context, question: AdminRequest) {
    match question {
        AdminRequest::Status(reply) => drop(reply.send(status(owner, context))),
        AdminRequest::Services(reply) => drop(reply.send(services(owner))),
        AdminRequest::Workloads(reply) => drop(reply.send(workloads(owner, &context.proxies))),
        AdminRequest::Denials(reply) => drop(reply.send(owner.denials.view())),
        AdminRequest::Stats(reply) => drop(reply.send(stats(owner))),
        AdminRequest::Certificates(reply) => drop(reply.send(certificates::list(&owner.identities.report()))),
        AdminRequest::Metrics(reply) => drop(reply.send(metrics(owner, record, context))),
        AdminRequest::Ready(reply) => drop(reply.send(owner.ready())),
    }
}

fn status(owner: &Owner, context: &Context) -> view::Status {
    let (write_failures, write_retries) = owner.datapath.failures();
    let refused = |(service, reason): (&Arc<str>, &String)| view::Refused {
        service: service.to_string(),
        reason: reason.clone(),
    };
    let rejected = |(name, reason): (&String, &String)| view::RejectedView {
        name: name.clone(),
        reason: reason.clone(),
    };
    let program = |program: &crate::datapath::load::Attached| view::Program {
        name: program.name.to_owned(),
        attach: context.config.datapath.cgroup_root.display().to_string(),
        id: program.id,
    };
    view::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: context.config.node.name.clone(),
        ready: owner.ready().is_ok(),
        control_plane: view::ControlPlane {
            address: context
                .config
                .xds
                .as_ref()
                .map(|xds| xds.server.address.to_string())
                .unwrap_or_default(),
            connected: owner.connection.is_ok(),
            last_error: owner.connection.as_ref().err().cloned(),
        },
        certificate_authority: certificates::authority(
            context.config.xds.as_ref(),
            &owner.identities.report(),
        ),
        snapshot: view::SnapshotView {
            source: owner.source,
            services: owner.snapshot.service_count() as u64,
            workloads: owner.snapshot.workload_count() as u64,
        },
        rejected: owner.rejected.iter().map(rejected).collect(),
        refused: owner.datapath.refused().iter().map(refused).collect(),
        programs: owner.datapath.programs().iter().map(program).collect(),
        maps: maps(owner),
        write_failures,
        write_retries,
    }
}

fn maps(owner: &Owner) -> Vec<view::Map> {
    let map = |map: crate::datapath::Fullness| view::Map {
        name: map.name.to_owned(),
        entries: map.entries as u64,
        capacity: u64::from(map.capacity),
    };
    owner.datapath.fullness().into_iter().map(map).collect()
}

/// Decoded from the maps themselves; only the names come from elsewhere.
fn services(owner: &Owner) -> Vec<view::Service> {
    let maps = owner.datapath.maps();
    let contents = match maps.contents() {
        Ok(contents) => contents,
        Err(error) => {
            failed(&error);
            return Vec::new();
        }
    };
    let (ports, broken) = adopt(&contents);
    let known = owner.datapath.ledger().ports();
    let mut services: Vec<view::Service> = ports
        .into_iter()
        .map(|(key, port)| {
            let named = known.get(&key);
            let names: HashMap<u32, &Arc<Workload>> = named
                .map(|port| {
                    port.backends.iter().filter_map(|b| Some((b.number, b.workload.as_ref()?))).collect()
                })
                .unwrap_or_default();
            let weights: HashMap<u32, u32> = named
                .map(|port| port.backends.iter().map(|b| (b.number, b.weight)).collect())
                .unwrap_or_default();
            let backend = |backend: &Known| view::Backend {
                id: backend.number,
                address: unmap(&backend.endpoint).to_string(),
                port: backend.endpoint.port(),
                weight: weights.get(&backend.number).copied().unwrap_or(backend.weight),
                workload: names.get(&backend.number).map(|workload| workload.uid()).unwrap_or_default(),
                open_connections: maps.open_connections(backend.number).unwrap_or_default(),
            };
            view::Service {
                service: named.and_then(|port| port.owner.as_deref()).unwrap_or_default().to_owned(),
                algorithm: port.algorithm.name().to_owned(),
                affinity_seconds: u64::from(port.affinity_seconds),
                generation: u64::from(port.generation),
                id: port.number,
                backends: port.backends.iter().map(backend).collect(),
                ..unread(&key)
            }
        })
        .collect();
    services.extend(broken.iter().map(unread));
    services.sort_by(|a, b| {
        (&a.service, &a.address, a.port, &a.protocol).cmp(&(&b.service, &b.address, b.port, &b.protocol))
    });
    services
}

/// A service whose tree could not be read.
fn unread(key: &ServiceKey) -> view::Service {
    view::Service {
        service: String::new(),
        address: unmap(&key.endpoint()).to_string(),
        port: key.port(),
        protocol: match key.protocol() {
            Some(Protocol::Tcp) => "TCP".to_owned(),
            Some(Protocol::Udp) => "UDP".to_owned(),
            None => "?".to_owned(),
        },
        algorithm: "unreadable".to_owned(),
        affinity_seconds: 0,
        generation: 0,
        id: 0,
        backends: Vec::new(),
    }
}

fn workloads(owner: &Owner, proxies: &Figures) -> Vec<view::Workload> {
    let states: BTreeMap<_, _> = proxies.pods().into_iter().map(|pod| (pod.uid, pod.state)).collect();
    let cgroup =
        |(id, path): (u64, std::path::PathBuf)| view::Cgroup { id, path: path.display().to_string() };
    let mut views: Vec<view::Workload> = owner
        .enrollment
        .list()
        .into_iter()
        .map(|enrolled| {
            let known = owner.snapshot.workload(&enrolled.uid);
            view::Workload {
                identity: format!("{:016x}", identity_of(&enrolled.uid).0),
                namespace: known.map(|w| w.account().namespace.to_string()).unwrap_or_default(),
                name: known.map(|w| w.name.to_string()).unwrap_or_default(),
                service_account: known.map(|w| w.account().service_account.to_string()).unwrap_or_default(),
                uid: enrolled.uid.to_string(),
                cgroups: enrolled.cgroups.into_iter().map(cgroup).collect(),
                proxy: states.get(&enrolled.uid).map(State::to_string).unwrap_or_default(),
            }
        })
        .collect();
    views.sort_by(|a, b| a.uid.cmp(&b.uid));
    views
}

/// The counters with the names of what they count.
struct Named {
    outcome: Outcome,
    tcp: bool,
    source: Option<String>,
    service: Option<Arc<str>>,
    endpoint: Option<String>,
    workload: Option<String>,
    counters: Counters,
}

fn named(owner: &mut Owner) -> Vec<Named> {
    let counters = match owner.datapath.counters() {
        Ok(counters) => counters,
        Err(error) => {
            failed(&error);
            return Vec::new();
        }
    };
    owner.datapath.set_counters(counters.len());
    let counted: HashSet<u32> = counters.iter().map(|(key, _)| key.backend).collect();
    let ledger = owner.datapath.ledger();
    let mut services: HashMap<u32, (&Arc<str>, &ServiceKey)> = HashMap::new();
    let mut backends: HashMap<u32, &Known> = HashMap::new();
    for (key, port) in ledger.ports() {
        services.extend(port.owner.as_ref().map(|service| (port.number, (service, key))));
        let wanted = port.backends.iter().filter(|backend| counted.contains(&backend.number));
        backends.extend(wanted.map(|backend| (backend.number, backend)));
    }
    let name = |(key, counters): (CounterKey, Counters)| {
        let former = ledger.former(key.backend);
        let service = services.get(&key.service);
        let backend = backends.get(&key.backend).copied().or(former.map(|former| &former.backend));
        Some(Named {
            outcome: Outcome::from_number(key.outcome)?,
            source: owner.datapath.workload(key.source).map(|uid| uid.to_string()),
            tcp: service.is_none_or(|(_, key)| key.protocol() == Some(Protocol::Tcp)),
            service: service
                .map(|(service, _)| Arc::clone(service))
                .or(former.and_then(|f| f.service.clone())),
            endpoint: backend.map(|backend| show_endpoint(&backend.endpoint)),
            workload: backend.and_then(|backend| backend.workload.as_ref()).map(|workload| workload.uid()),
            counters,
        })
    };
    counters.into_iter().filter_map(name).collect()
}

fn stats(owner: &mut Owner) -> view::Stats {
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    // A backend that came back has another number: what both counted is one row.
    let mut rows: BTreeMap<[String; 4], Counters> = BTreeMap::new();
    for named in self::named(owner) {
        let row = [
            dash(named.source),
            dash(named.service.map(|service| service.to_string())),
            dash(named.endpoint),
            named.outcome.name().to_owned(),
        ];
        rows.entry(row).or_default().add(&named.counters);
    }
    let connection =
        |([source, service, backend, outcome], counters): ([String; 4], Counters)| view::Connection {
            source,
            service,
            backend,
            outcome,
            connections: counters.attempts,
            closed: counters.closed,
            bytes_sent: counters.bytes_sent,
            bytes_received: counters.bytes_received,
            retransmits: counters.retransmits,
            connect_seconds_sum: seconds(&counters),
            connect_seconds_count: if counters.connect_nanoseconds == 0 { 0 } else { counters.attempts },
        };
    let connections = rows.into_iter().map(connection).collect();
    let reason = |(reason, count)| view::Reason { reason, count };
    view::Stats { connections, reasons: reasons(owner).into_iter().map(reason).collect(), maps: maps(owner) }
}

fn reasons(owner: &Owner) -> Vec<(String, u64)> {
    match owner.datapath.reasons() {
        Ok(reasons) => reasons.into_iter().map(|(reason, count)| (reason.name().to_owned(), count)).collect(),
        Err(error) => {
            failed(&error);
            Vec::new()
        }
    }
}

fn metrics(owner: &mut Owner, record: &Record, context: &Context) -> View {
    let counted = self::named(owner);
    let owner = &*owner;
    let peer = |uid: Option<&str>| match uid.and_then(|uid| owner.snapshot.workload(uid)) {
        Some(workload) => Peer {
            workload: workload.name.to_string(),
            namespace: workload.account().namespace.to_string(),
            principal: principal(workload),
        },
        // It has gone; its uid still says who it was.
        None => {
            let mut parts =
                uid.map(|uid| uid.splitn(5, '/').skip(3)).into_iter().flatten().map(str::to_owned);
            Peer {
                namespace: parts.next().unwrap_or_default(),
                workload: parts.next().unwrap_or_default(),
                ..Peer::default()
            }
        }
    };
    let connection = |named: Named| {
        let (namespace, hostname) =
            named.service.as_deref().and_then(|service| service.split_once('/')).unwrap_or_default();
        let established = named.outcome == Outcome::Connected;
        Connections {
            source: peer(named.source.as_deref()),
            service: hostname.to_owned(),
            service_name: hostname.split('.').next().unwrap_or_default().to_owned(),
            service_namespace: namespace.to_owned(),
            destination: peer(named.workload.as_deref()),
            // As Envoy says: upstream connection failure, no healthy upstream.
            response_flags: match named.outcome {
                Outcome::Connected => String::new(),
                Outcome::Failed => "UF".to_owned(),
                Outcome::Refused => "UH".to_owned(),
            },
            opened: if established { named.counters.attempts } else { 0 },
            closed: named.counters.closed,
            failed: if established { 0 } else { named.counters.attempts },
            bytes_sent: named.counters.bytes_sent,
            bytes_received: named.counters.bytes_received,
            retransmits: named.counters.retransmits,
            connect_seconds: seconds(&named.counters),
            connect_count: if named.counters.connect_nanoseconds == 0 { 0 } else { named.counters.attempts },
        }
    };
    let (map_write_failures, map_write_retries) = owner.datapath.failures();
    let map = |map: view::Map| MapUse { name: map.name, entries: map.entries, capacity: map.capacity };
    View {
        // These names are Istio's for TCP; UDP flows are in the admin interface.
        connections: counted.into_iter().filter(|named| named.tcp).map(connection).collect(),
        reasons: reasons(owner),
        maps: maps(owner).into_iter().map(map).collect(),
        map_write_failures,
        map_write_retries,
        xds_connected: owner.connection.is_ok(),
        xds_rejected: owner.rejections,
        xds_disconnects: owner.disconnects,
        ready: owner.ready().is_ok(),
        services: owner.snapshot.service_count() as u64,
        refused_services: owner.datapath.refused().len() as u64,
        workloads: owner.snapshot.workload_count() as u64,
        enrolled_cgroups: owner.enrollment.desired().count() as u64,
        cgroup_overflows: context.watch.overflows(),
        cgroup_polls: context.watch.polls(),
        cgroup_watch_limited: context.watch.limited(),
        snapshot_save_failures: owner.save_failures,
        unsaved_changes: record.unsafely(),
        refused_credentials: context.servers.iter().map(|server| server.refusals()).sum(),
        certificates: certificates::figures(&owner.identities.report()),
        policy: figures::of_policy(owner, &context.swept, &context.untold),
        proxy: figures::of_proxies(&context.proxies),
    }
}

fn principal(workload: &Workload) -> String {
    spiffe_of(workload).map(|identity| identity.to_string()).unwrap_or_default()
}

fn seconds(counters: &Counters) -> f64 {
    counters.connect_nanoseconds as f64 / 1e9
}

fn failed(error: &dyn Display) {
    warn!(%error, "the maps could not be read for an answer");
}
