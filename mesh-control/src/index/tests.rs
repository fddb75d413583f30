//! The index must not depend on the way that led to a state: after any series of changes it serves exactly what a fresh
//! one serves that is given the last state at once.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use mesh_common::api::istio::{
    security::Authorization,
    workload::{Address, Workload, address::Type},
};
use prost::Message as _;

use super::*;
use crate::{source::Reading, store::Store};

mod addresses;
mod policies;

/// Before the names of policies, which may be those of services.
const POLICY: &str = "policy ";

/// A file store and an index, and what a subscriber holds.
struct World {
    store: Store,
    index: Index,
    held: BTreeMap<Name, Resource>,
}

impl World {
    fn new() -> Self {
        let mesh = Mesh {
            cluster_id: "C".to_owned(),
            cluster_domain: "d".to_owned(),
            trust_domain: "t".to_owned(),
            root_namespace: "root".to_owned(),
        };
        Self { store: Store::default(), index: Index::new(mesh), held: BTreeMap::new() }
    }

    /// Applies files (`None`: gone) and returns the names that changed.
    fn apply(&mut self, files: &[(String, Option<String>)]) -> Vec<String> {
        let batch = files.iter().map(|(path, text)| {
            (Arc::from(Path::new(path)), text.clone().map_or(Reading::Gone, Reading::Text))
        });
        let changes = self.store.apply(batch.collect()).changes;
        let noted = ["skipped", "counts as PERMISSIVE", "HTTP is not inspected"];
        let is_note = |reason: &str| noted.iter().any(|note| reason.contains(note));
        let faults: Vec<_> = self.store.errors().into_iter().filter(|e| !is_note(&e.reason)).collect();
        assert_eq!(faults, [], "the generator writes valid manifests");
        let update = self.index.apply(changes);
        self.hold(update)
    }

    /// What is told is held; returns the names.
    fn hold(&mut self, update: Update) -> Vec<String> {
        let of_policies = |(name, resource): (Name, _)| (Name::from(format!("{POLICY}{name}")), resource);
        let told: Vec<_> = update.policies.into_iter().map(of_policies).chain(update.addresses).collect();
        let names = told.iter().map(|(name, _)| name.to_string()).collect();
        for (name, resource) in told {
            match resource {
                Some(resource) => drop(self.held.insert(name, resource)),
                None => drop(self.held.remove(&name)),
            }
        }
        names
    }

    fn put(&mut self, path: &str, text: &str) -> Vec<String> {
        self.apply(&[(path.to_owned(), Some(text.to_owned()))])
    }

    fn remove(&mut self, path: &str) -> Vec<String> {
        self.apply(&[(path.to_owned(), None)])
    }

    fn workload(&self, name: &str) -> Workload {
        let resource = self.held.get(name).unwrap_or_else(|| panic!("{name} in {:?}", self.held.keys()));
        match Address::decode(resource.bytes.clone()).unwrap().r#type {
            Some(Type::Workload(workload)) => workload,
            other => panic!("{other:?}"),
        }
    }

    fn authorization(&self, name: &str) -> Authorization {
        let name = format!("{POLICY}{name}");
        let resource =
            self.held.get(name.as_str()).unwrap_or_else(|| panic!("{name} in {:?}", self.held.keys()));
        let policy = Authorization::decode(resource.bytes.clone()).unwrap();
        mesh_common::policy::Policy::try_from(&policy).unwrap();
        policy
    }
}

/// A small generator of pseudo-random numbers: no dependency, and every failure can be repeated.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[usize::try_from(self.roll(of.len() as u64)).unwrap_or(0)]
    }
}

/// One of a few objects in one of its many forms, or its absence.
fn roll_file(dice: &mut Dice) -> (String, Option<String>) {
    let n = dice.roll(4);
    let kind = dice.pick(&[
        "service", "pod", "slice", "node", "we", "se", "policy", "pod", "slice", "authz", "peers", "peers",
        "ns",
    ]);
    let path = if kind == "ns" { "ns.yaml".to_owned() } else { format!("{kind}{n}.yaml") };
    if dice.roll(4) == 0 {
        return (path, None);
    }
    let label = dice.pick(&["a", "b", "c"]);
    let text = match kind {
        "service" => {
            let target = dice.pick(&["8080", "http", "9090"]);
            let extra = dice.pick(&[
                "",
                ", publishNotReadyAddresses: true",
                ", type: ExternalName",
                ", sessionAffinity: ClientIP",
            ]);
            let selector = dice.pick(&["selector: {app: a}", "selector: {app: b, tier: x}", "selector: {}"]);
            let ports = format!(
                "[{{name: p, port: 80, targetPort: {target}}}, {{name: u, port: 53, protocol: UDP}}]"
            );
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}}}\nspec: {{clusterIP: 10.96.0.{n}, {selector}, ports: {ports}{extra}}}\n"
            )
        }
        "pod" => {
            let ready = dice.pick(&["True", "False"]);
            let phase = dice.pick(&["Running", "Running", "Succeeded"]);
            let tier = dice.pick(&["x", "y"]);
            let ports = dice.pick(&["[]", "[{name: http, containerPort: 7070}]"]);
            let node = dice.pick(&["n0", "n1", "n2", "n3"]);
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, labels: {{app: {label}, tier: {tier}}}}}\n\
                 spec: {{nodeName: {node}, containers: [{{ports: {ports}}}]}}\n\
                 status: {{phase: {phase}, podIP: 10.0.0.{n}, conditions: [{{type: Ready, status: '{ready}'}}]}}\n"
            )
        }
        "slice" => {
            let service = dice.roll(4);
            let ready = dice.pick(&["true", "false"]);
            let node = dice.pick(&["n0", "n9"]);
            let ports = dice.pick(&[
                "[{name: p, port: 8080}]",
                "[{name: p, port: 8181}, {name: u, port: 53, protocol: UDP}]",
                "[]",
            ]);
            let pods = (0..4).filter(|_| dice.roll(2) == 0).map(|pod| {
                format!("{{addresses: [10.0.0.{pod}], conditions: {{ready: {ready}}}, targetRef: {{kind: Pod, name: p{pod}}}}}")
            });
            let mut endpoints: Vec<String> = pods.collect();
            endpoints.push(format!("{{addresses: [10.9.0.{n}], nodeName: {node}}}"));
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: e{n}, labels: {{kubernetes.io/service-name: s{service}}}}}\n\
                 addressType: IPv4\nports: {ports}\nendpoints: [{}]\n",
                endpoints.join(", ")
            )
        }
        "node" => format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: n{n}, labels: {{topology.kubernetes.io/zone: z{}}}}}\n",
            dice.roll(3)
        ),
        "we" => format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: w{n}, annotations: {{mesh.dev/node: n{n}, mesh.dev/cgroup: w{n}}}}}\n\
             spec: {{address: 10.5.0.{n}, labels: {{app: {label}, tier: x}}, weight: {}}}\n",
            dice.roll(5)
        ),
        "se" => {
            let members = dice.pick(&[
                "workloadSelector: {labels: {app: a}}",
                "endpoints: [{address: 10.6.0.1}]",
                "endpoints: []",
            ]);
            let hosts = dice.pick(&["one.example", "two.example"]);
            format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: x{n}}}\n\
                 spec: {{hosts: [{n}.{hosts}], resolution: STATIC, ports: [{{number: 80, name: p}}], {members}}}\n"
            )
        }
        "authz" => {
            let namespace = dice.pick(&["default", "root"]);
            let selector = dice.pick(&[
                "",
                "selector: {matchLabels: {app: a}}, ",
                "selector: {matchLabels: {app: b, tier: x}}, ",
            ]);
            let rule = dice.pick(&[
                "{to: [{operation: {ports: ['80']}}]}",
                "{to: [{operation: {paths: [/x]}}]}",
                "{}",
            ]);
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                 metadata: {{name: a{n}, namespace: {namespace}}}\nspec: {{{selector}rules: [{rule}]}}\n"
            )
        }
        "peers" => {
            let namespace = dice.pick(&["default", "root"]);
            let mode = dice.pick(&["STRICT", "PERMISSIVE", "DISABLE", "UNSET"]);
            let other = dice.pick(&["STRICT", "PERMISSIVE"]);
            let selected = format!(", selector: {{matchLabels: {{app: {label}}}}}");
            let ports = format!("{selected}, portLevelMtls: {{80: {{mode: {other}}}}}");
            let more = dice.pick(&["", &selected, &ports]);
            format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                 metadata: {{name: q{n}, namespace: {namespace}}}\nspec: {{mtls: {{mode: {mode}}}{more}}}\n"
            )
        }
        "ns" => {
            let mode = dice.pick(&["none", "ambient"]);
            format!(
                "apiVersion: v1\nkind: Namespace\nmetadata: {{name: default, labels: {{istio.io/dataplane-mode: {mode}}}}}\n"
            )
        }
        _ => format!(
            "apiVersion: mesh.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: t{n}}}\n\
             spec: {{targetRefs: [{{group: '', kind: Service, name: s{n}}}], balancer: {{algorithm: {}}}}}\n",
            dice.pick(&["Maglev", "RoundRobin"])
        ),
    };
    (path, Some(text))
}

#[test]
fn any_way_to_a_state_leads_to_the_same_resources() {
    for seed in 0..20 {
        let mut dice = Dice(seed);
        let mut world = World::new();
        let mut state: BTreeMap<String, Option<String>> = BTreeMap::new();
        for step in 0..40 {
            let mut changed = BTreeMap::new();
            for _ in 0..=dice.roll(3) {
                let (path, text) = roll_file(&mut dice);
                changed.insert(path, text);
            }
            state.extend(changed.clone());
            let node = format!("n{}", dice.roll(4));
            let moved = if dice.roll(2) == 0 { world.index.join(&node) } else { world.index.forget(&node) };
            if moved {
                let before = world.held.clone();
                let update = world.index.apply(Vec::new());
                for name in world.hold(update) {
                    assert_ne!(
                        before.get(name.as_str()),
                        world.held.get(name.as_str()),
                        "seed {seed}: {name}"
                    );
                }
            }
            let before = world.held.clone();
            let named = world.apply(&changed.into_iter().collect::<Vec<_>>());
            let mut fresh = World::new();
            fresh.index.remember(world.index.joined().clone());
            fresh.apply(&state.clone().into_iter().collect::<Vec<_>>());
            let differing: Vec<_> = fresh
                .held
                .keys()
                .chain(world.held.keys())
                .filter(|name| fresh.held.get(*name) != world.held.get(*name))
                .collect();
            assert!(differing.is_empty(), "seed {seed}, step {step}: {differing:?}");
            // And nothing was sent that had not changed.
            for name in named {
                assert_ne!(
                    before.get(name.as_str()),
                    world.held.get(name.as_str()),
                    "seed {seed}, step {step}: {name}"
                );
            }
        }
        // When all is gone, nothing is left over.
        let gone: Vec<_> = state.into_keys().map(|path| (path, None)).collect();
        world.apply(&gone);
        assert!(world.held.is_empty(), "{:?}", world.held.keys());
        let Index { inputs, claimed, addresses, problems, versions, policy_versions, .. } = world.index;
        assert!(inputs.authorizations.is_empty() && inputs.peers.is_empty() && inputs.peers_in.is_empty());
        assert!(inputs.outside.is_empty() && policy_versions.is_empty());
        assert!(claimed.is_empty() && problems.is_empty() && versions.is_empty());
        assert!(addresses.is_empty());
        assert!(inputs.placed.is_empty() && inputs.node_of.is_empty() && inputs.endpoints_of.is_empty());
        assert!(inputs.slices_of.is_empty() && inputs.policies_of.is_empty() && inputs.slices.is_empty());
    }
}

#[test]
fn a_name_goes_to_the_next_when_its_holder_goes() {
    let mut world = World::new();
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e}\n\
        spec: {hosts: [s.default.svc.d], addresses: [10.96.0.2], resolution: STATIC, ports: [{number: 81, name: p}],\n  endpoints: [{address: 10.0.0.1}]}\n";
    let put = |path: &str, text: &str| (path.to_owned(), Some(text.to_owned()));
    world.apply(&[put("a", service)]);
    world.apply(&[put("b", entry)]);
    assert_eq!(world.held.len(), 2);
    let problem = world.index.problems().next().unwrap();
    assert_eq!((problem.field.as_str(), problem.key.kind), ("spec.hosts", Kind::ServiceEntry));
    let first = world.held["default/s.default.svc.d"].clone();

    // The loser goes and comes back: the holder is not touched.
    assert_eq!(
        world.apply(&[("b".to_owned(), None)]),
        ["C/networking.istio.io/ServiceEntry/default/e/10.0.0.1"]
    );
    world.apply(&[put("b", entry)]);
    assert_eq!(world.held["default/s.default.svc.d"], first);

    world.apply(&[("a".to_owned(), None)]);
    assert_ne!(world.held["default/s.default.svc.d"], first);
    assert_eq!(world.index.problems().count(), 0);
}

/// As Istio's own discovery tells it, so that telemetry of both names the same workloads.
#[test]
fn a_pod_is_told_with_what_made_it() {
    use mesh_common::api::istio::workload::WorkloadType::{Cronjob, Deployment, Job, Pod};

    let mut world = World::new();
    let hash = "pod-template-hash: 5d4f8c7b6";
    for (kind, owner, labels, wanted) in [
        ("ReplicaSet", "web-front-5d4f8c7b6", hash, (Deployment, "web-front")),
        // Of nobody's making, or of another's.
        ("ReplicaSet", "web-5d4f8c7b6", "a: b", (Pod, "p")),
        ("ReplicaSet", "web-other", hash, (Pod, "p")),
        ("Job", "once", "a: b", (Job, "once")),
        ("Job", "once-2024", "a: b", (Job, "once-2024")),
        ("Job", "sweep-12345678", "a: b", (Cronjob, "sweep")),
        ("Job", "nightly-sweep-2884567890", "a: b", (Cronjob, "nightly-sweep")),
        ("Job", "sweep-12345678901", "a: b", (Job, "sweep-12345678901")),
        ("StatefulSet", "db", "a: b", (Pod, "p")),
        ("DaemonSet", "log", "a: b", (Pod, "p")),
    ] {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p, namespace: a, labels: {{{labels}}}, ownerReferences: [{{kind: {kind}, name: {owner}, controller: true}}]}}, spec: {{nodeName: n}}}}"
        );
        world.put("p", &text);
        let told = world.workload("C//Pod/a/p");
        assert_eq!((told.workload_type(), told.workload_name.as_str()), wanted, "{kind} {owner}");
        assert_eq!((told.canonical_name.as_str(), told.canonical_revision.as_str()), (wanted.1, "latest"));
    }
    let mut labels = String::new();
    for (label, is_name) in [
        ("app", true),
        ("version", false),
        ("app.kubernetes.io/name", true),
        ("app.kubernetes.io/version", false),
        ("service.istio.io/canonical-name", true),
        ("service.istio.io/canonical-revision", false),
    ] {
        labels = format!("{labels}{label}: of-{}, ", label.len());
        world.put(
            "p",
            &format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: p, namespace: a, labels: {{{labels}}}}}, spec: {{nodeName: n}}}}"
            ),
        );
        let told = world.workload("C//Pod/a/p");
        let of = if is_name { &told.canonical_name } else { &told.canonical_revision };
        assert_eq!(
            (of, told.workload_type(), told.workload_name.as_str()),
            (&format!("of-{}", label.len()), Pod, "p")
        );
    }
}
