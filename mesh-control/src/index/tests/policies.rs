//! Which workloads name which policies, and which are announced as meshed.

use mesh_common::api::{
    WORKLOAD_EXTENSION,
    istio::{security::Scope, workload::TunnelProtocol},
    mesh::v1::WorkloadExtension,
};
use prost::Message as _;

use super::*;

const STRICT: &str = "root/istio_converted_static_strict";

fn pod(name: &str, labels: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}\n\
         spec: {{nodeName: n1{spec}}}\nstatus: {{podIP: 10.0.0.1}}\n"
    )
}

fn peers(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

fn authorization(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

impl World {
    fn named(&self, pod: &str) -> Vec<String> {
        self.workload(&format!("C//Pod/shop/{pod}")).authorization_policies
    }

    fn is_meshed(&self, name: &str) -> bool {
        self.workload(name).tunnel_protocol() == TunnelProtocol::Hbone
    }

    fn extension(&self, name: &str) -> WorkloadExtension {
        let extensions = self.workload(name).extensions;
        let config =
            extensions.iter().find(|one| one.name == WORKLOAD_EXTENSION).and_then(|one| one.config.as_ref());
        config.map(|config| WorkloadExtension::decode(config.value.as_slice()).unwrap()).unwrap_or_default()
    }

    fn join(&mut self, node: &str) -> Vec<String> {
        self.index.join(node);
        let update = self.index.apply(Vec::new());
        self.hold(update)
    }
}

/// A world with a pod `web` labelled `app: web`, and these objects.
fn with(objects: &[String]) -> World {
    let mut world = World::new();
    world.put("web", &pod("web", "app: web", ""));
    for (i, object) in objects.iter().enumerate() {
        world.put(&format!("o{i}"), object);
    }
    // Whatever a workload names is there.
    for name in world.named("web") {
        world.authorization(&name);
    }
    world
}

#[test]
fn the_place_of_a_policy_and_its_selector_say_whom_it_is_for() {
    for (namespace, selector, scope, named) in [
        ("shop", "", Scope::Namespace, false),
        ("shop", "selector: {}", Scope::Namespace, false),
        ("root", "", Scope::Global, false),
        ("shop", "selector: {matchLabels: {app: web}}", Scope::WorkloadSelector, true),
        ("shop", "selector: {matchLabels: {app: web, tier: x}}", Scope::WorkloadSelector, false),
        ("root", "selector: {matchLabels: {app: web}}", Scope::WorkloadSelector, true),
        ("other", "selector: {matchLabels: {app: web}}", Scope::WorkloadSelector, false),
    ] {
        let world = with(&[authorization("p", namespace, selector)]);
        let name = format!("{namespace}/p");
        assert_eq!(world.authorization(&name).scope(), scope, "{namespace} {selector}");
        let wanted = if named { vec![name] } else { Vec::new() };
        assert_eq!(world.named("web"), wanted, "{namespace} {selector}");
    }
}

#[test]
fn a_policy_that_selects_others_is_named_by_those() {
    let mut world = World::new();
    world.put("web", &pod("web", "app: web", ""));
    world.put("api", &pod("api", "app: api", ""));
    let policy =
        |app: &str| authorization("p", "shop", &format!("selector: {{matchLabels: {{app: {app}}}}}"));
    assert_eq!(world.put("p", &policy("web")), ["policy shop/p", "C//Pod/shop/web"]);
    // Its content is the same; who names it is not.
    assert_eq!(world.put("p", &policy("api")), ["C//Pod/shop/api", "C//Pod/shop/web"]);
    assert_eq!((world.named("web").len(), world.named("api")), (0, vec!["shop/p".to_owned()]));
    world.put("api", &pod("api", "app: none", ""));
    assert!(world.named("api").is_empty());
    world.put("api", &pod("api", "app: api", ""));
    assert_eq!(world.remove("p"), ["policy shop/p", "C//Pod/shop/api"]);
}

#[test]
fn a_workload_entry_names_policies_by_all_its_labels() {
    let mut world = with(&[authorization("p", "shop", "selector: {matchLabels: {app: vm, tier: x}}")]);
    let entry = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
        metadata: {name: vm, namespace: shop, labels: {tier: x}}\nspec: {address: 10.1.0.1, labels: {app: vm}}\n";
    world.put("vm", entry);
    let vm = world.workload("C/networking.istio.io/WorkloadEntry/shop/vm");
    assert_eq!(vm.authorization_policies, ["shop/p"]);
}

#[test]
fn the_narrowest_mode_that_says_something_counts() {
    const WEB: &str = "selector: {matchLabels: {app: web}}, ";
    // (mesh, namespace, workload) → no plaintext?
    for (mesh, namespace, workload, strict) in [
        ("", "", "", false),
        ("STRICT", "", "", true),
        ("STRICT", "UNSET", "UNSET", true),
        ("STRICT", "PERMISSIVE", "", false),
        ("STRICT", "PERMISSIVE", "STRICT", true),
        ("STRICT", "DISABLE", "UNSET", false),
        ("STRICT", "", "PERMISSIVE", false),
        ("PERMISSIVE", "STRICT", "", true),
        ("PERMISSIVE", "STRICT", "UNSET", true),
        ("", "STRICT", "DISABLE", false),
        ("UNSET", "", "", false),
    ] {
        let mode = |mode: &str| format!("mtls: {{mode: {mode}}}");
        let mut objects = Vec::new();
        for (name, place, selector, said) in
            [("m", "root", "", mesh), ("n", "shop", "", namespace), ("w", "shop", WEB, workload)]
        {
            if !said.is_empty() {
                objects.push(peers(name, place, &format!("{selector}{}", mode(said))));
            }
        }
        let wanted: &[&str] = if strict { &[STRICT] } else { &[] };
        assert_eq!(with(&objects).named("web"), wanted, "{mesh} {namespace} {workload}");
        objects.reverse();
        assert_eq!(with(&objects).named("web"), wanted, "{mesh} {namespace} {workload}, the other way round");
    }
}

#[test]
fn ports_that_differ_have_a_policy_of_their_own() {
    let own = "shop/converted_peer_authentication_w";
    // (mesh, workload, ports) → what is named
    for (mesh, workload, ports, named) in [
        ("PERMISSIVE", "STRICT", "9000: {mode: PERMISSIVE}", own),
        ("PERMISSIVE", "STRICT", "9000: {mode: DISABLE}", own),
        ("PERMISSIVE", "STRICT", "9000: {mode: STRICT}", STRICT),
        ("PERMISSIVE", "STRICT", "9000: {mode: UNSET}", STRICT),
        ("PERMISSIVE", "UNSET", "9000: {mode: STRICT}", own),
        ("PERMISSIVE", "UNSET", "9000: {mode: PERMISSIVE}", ""),
        ("STRICT", "UNSET", "9000: {mode: PERMISSIVE}", own),
        ("STRICT", "UNSET", "9000: {mode: DISABLE}", own),
        ("STRICT", "UNSET", "9000: {mode: STRICT}", STRICT),
        ("STRICT", "PERMISSIVE", "9000: {mode: STRICT}", own),
        ("STRICT", "DISABLE", "9000: {mode: PERMISSIVE}", ""),
    ] {
        // A namespace policy that says nothing lets the mesh's through, as does none.
        for between in [&[][..], &[peers("n", "shop", "mtls: {}")]] {
            let mine = format!(
                "selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {workload}}}, portLevelMtls: {{{ports}}}"
            );
            let mesh_wide = peers("m", "root", &format!("mtls: {{mode: {mesh}}}"));
            let world = with(&[between, &[mesh_wide, peers("w", "shop", &mine)]].concat());
            assert_eq!(world.named("web").join(" "), named, "{mesh} {workload} {ports}");
        }
    }
}

#[test]
fn the_policy_of_ports_says_which() {
    let world = with(&[peers(
        "w",
        "shop",
        "selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {9000: {mode: PERMISSIVE}, 9001: {mode: DISABLE}, 9002: {mode: STRICT}}",
    )]);
    let open = world.authorization("shop/converted_peer_authentication_w");
    let clauses = &open.rules[0].clauses;
    assert_eq!(clauses[0].matches[0].not_destination_ports, [9000, 9001]);
    assert_eq!((clauses[1].matches[0].not_principals.len(), clauses.len(), open.rules.len()), (1, 2, 1));
    let world = with(&[peers(
        "w",
        "shop",
        "selector: {matchLabels: {app: web}}, mtls: {mode: DISABLE}, portLevelMtls: {9000: {mode: STRICT}}",
    )]);
    let closed = world.authorization("shop/converted_peer_authentication_w");
    let only = &closed.rules[0].clauses[0].matches[0];
    assert_eq!((only.destination_ports.as_slice(), only.not_principals.len()), (&[9000][..], 1));
    assert_eq!(
        (closed.scope(), closed.dry_run, closed.rules[0].clauses.len()),
        (Scope::WorkloadSelector, false, 1)
    );
}

#[test]
fn of_several_at_one_level_the_oldest_counts() {
    let aged = |name: &str, time: &str, mode: &str, selector: &str| {
        peers(name, "shop", &format!("{selector}mtls: {{mode: {mode}}}"))
            .replace("namespace:", &format!("creationTimestamp: '{time}', namespace:"))
    };
    for selector in ["", "selector: {matchLabels: {app: web}}, "] {
        let old = aged("z", "2024-01-01T00:00:00Z", "STRICT", selector);
        let new = aged("a", "2025-01-01T00:00:00Z", "PERMISSIVE", selector);
        let undated = peers("b", "shop", &format!("{selector}mtls: {{mode: DISABLE}}"));
        let mut world = with(&[undated, new, old]);
        assert_eq!(world.named("web"), [STRICT]);
        // Those that are void are told of where nothing else tells them apart.
        let mut void: Vec<_> = world.index.problems().map(|problem| problem.key.name.to_string()).collect();
        void.sort();
        let wanted: &[&str] = if selector.is_empty() { &["shop/a", "shop/b"] } else { &[] };
        assert_eq!(void, wanted);
        world.remove("o2");
        assert!(world.named("web").is_empty());
    }
}

#[test]
fn a_selector_in_the_root_namespace_is_for_that_namespace() {
    let world = with(&[peers("w", "root", "selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}")]);
    assert!(world.named("web").is_empty());
    let mut world = with(&[peers("w", "shop", "selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}")]);
    assert_eq!(world.named("web"), [STRICT]);
    // The policy itself goes with the last object that could have it named.
    assert_eq!(world.remove("o0"), [&format!("policy {STRICT}"), "C//Pod/shop/web"]);
}

#[test]
fn workloads_are_meshed_when_their_agent_has_joined() {
    let mut world = World::new();
    let entry = |name: &str, annotations: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
             metadata: {{name: {name}, namespace: shop, annotations: {{mesh.dev/node: n1{annotations}}}}}\nspec: {{address: 10.1.0.1}}\n"
        )
    };
    world.put("web", &pod("web", "app: web", ""));
    world.put("host", &pod("host", "app: web", ", hostNetwork: true"));
    world.put("out", &pod("out", "istio.io/dataplane-mode: none", ""));
    world.put("early", &pod("early", "app: web", "").replace("podIP: 10.0.0.1", ""));
    world.put("away", &pod("away", "app: web", "").replace("n1", "n2"));
    world.put("vm", &entry("vm", ", mesh.dev/cgroup: x"));
    world.put("bare", &entry("bare", ""));
    let (web, vm) = ("C//Pod/shop/web", "C/networking.istio.io/WorkloadEntry/shop/vm");
    assert!(!world.is_meshed(web));
    assert_eq!(world.join("n1"), [web, vm]);
    assert!(world.is_meshed(web) && world.is_meshed(vm));
    assert_eq!(world.join("n1"), <[&str; 0]>::default());

    let namespace = |mode: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{istio.io/dataplane-mode: {mode}}}}}\n"
        )
    };
    assert_eq!(world.put("ns", &namespace("none")), [web, vm]);
    assert!(!world.is_meshed(web));
    // Its own label goes before that of the namespace.
    world.put("web", &pod("web", "istio.io/dataplane-mode: ambient", ""));
    assert!(world.is_meshed(web));
    world.put("ns", &namespace("ambient"));
    world.put("web", &pod("web", "app: web", ""));
    assert!(world.is_meshed(web) && world.is_meshed(vm));

    let disable = "selector: {matchLabels: {app: web}}, mtls: {mode: DISABLE}";
    assert_eq!(world.put("peers", &peers("w", "shop", disable)), [&format!("policy {STRICT}"), web]);
    assert!(!world.is_meshed(web) && world.extension(web).outbound_meshed);
    // But a port that takes no plaintext must be reachable.
    world.put("peers", &peers("w", "shop", &format!("{disable}, portLevelMtls: {{80: {{mode: STRICT}}}}")));
    assert!(world.is_meshed(web));
}

#[test]
fn a_node_is_forgotten_with_its_resource() {
    let mut world = World::new();
    world.put("web", &pod("web", "app: web", ""));
    world.join("n1");
    let web = "C//Pod/shop/web";
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n";
    assert!(world.put("node", node).is_empty() && world.is_meshed(web));
    assert_eq!(world.index.joined().get("n1"), Some(&true));
    assert_eq!(world.remove("node"), [web]);
    assert!(!world.is_meshed(web) && world.index.joined().is_empty());

    // Deleted while nobody looked; a node that never had a resource is not forgotten so.
    let mut world = World::new();
    world.index.remember(Joined::from([("n1".into(), true), ("n2".into(), false), ("n3".into(), true)]));
    world.put("n3", &node.replace("n1", "n3"));
    world.index.forget_deleted();
    assert_eq!(world.index.joined().keys().map(|name| &**name).collect::<Vec<_>>(), ["n2", "n3"]);
}
