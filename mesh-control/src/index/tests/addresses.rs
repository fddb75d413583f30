//! Whose an address is that several workloads have.

use mesh_common::api::{WORKLOAD_EXTENSION, mesh::v1::WorkloadExtension};

use super::*;

fn meta(name: &str, more: &str) -> String {
    format!("metadata: {{name: {name}, namespace: ns{more}}}")
}

fn pod(name: &str, more: &str, status: &str) -> String {
    let meta = meta(name, more);
    format!(
        "apiVersion: v1\nkind: Pod\n{meta}\nspec: {{nodeName: n1}}\nstatus: {{podIP: 10.0.0.1{status}}}\n"
    )
}

fn entry(name: &str, more: &str) -> String {
    let meta = meta(name, more);
    format!("apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n{meta}\nspec: {{address: 10.0.0.1}}\n")
}

fn inline(name: &str) -> String {
    let meta = meta(name, "");
    let ports = "ports: [{name: http, number: 80, protocol: HTTP}]";
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n{meta}\n\
         spec: {{hosts: [{name}.example], resolution: STATIC, {ports}, endpoints: [{{address: 10.0.0.1}}]}}\n"
    )
}

const OLD: &str = ", creationTimestamp: '2020-01-01T00:00:00Z'";
const NEW: &str = ", creationTimestamp: '2024-01-01T00:00:00Z'";
const GOING: &str = ", creationTimestamp: '2020-01-01T00:00:00Z', deletionTimestamp: '2024-01-01T00:00:00Z'";

impl World {
    /// The workloads at 10.0.0.1 that are told to be outdone.
    fn outdone(&self) -> Vec<String> {
        let told = |name: &&Name| {
            let workload = self.workload(name);
            let own = workload.extensions.iter().find(|extension| extension.name == WORKLOAD_EXTENSION);
            let own = own.and_then(|extension| extension.config.as_ref());
            own.is_some_and(|config| WorkloadExtension::decode(config.value.as_slice()).unwrap().outdone)
        };
        let of_workloads = |name: &&Name| name.starts_with("C/");
        let last = |name: &Name| name.rsplit("ns/").next().unwrap().to_owned();
        self.held.keys().filter(of_workloads).filter(told).map(last).collect()
    }

    fn losers(&self) -> Vec<String> {
        let text = |problem: Problem| format!("{} {}: {}", problem.key, problem.field, problem.reason);
        self.index.problems().map(text).collect()
    }
}

/// The first of them has it, in whatever order they come and come again.
fn check(files: &[String]) {
    for order in 0..files.len() {
        let mut world = World::new();
        let mut turned: Vec<_> = files.iter().enumerate().collect();
        turned.rotate_left(order);
        for (i, text) in turned.iter().chain(&turned[..1]) {
            world.put(&format!("{i}.yaml"), text);
        }
        let outdone = world.outdone();
        assert_eq!(outdone.len(), files.len() - 1, "{outdone:?}");
        let heir = |i: usize| !outdone.iter().any(|name| files[i].contains(&format!("name: {name},")));
        assert!(heir(0), "{order}: {outdone:?}");
        // It passes on in the same order.
        for gone in 0..files.len() {
            world.remove(&format!("{gone}.yaml"));
            let left = files.len() - gone - 1;
            assert_eq!(world.outdone().len(), left.saturating_sub(1), "{:?}", world.outdone());
        }
        assert!(world.losers().is_empty() && world.held.is_empty());
    }
}

#[test]
fn an_address_is_the_elder_ones_whichever_was_read_first() {
    check(&[entry("b", OLD), entry("a", NEW)]);
    check(&[entry("b", NEW), entry("a", "")]);
    check(&[entry("a", ""), entry("b", ""), entry("c", "")]);
    check(&[pod("b", OLD, ""), pod("a", NEW, "")]);
    // An address is given to another before the pod that had it is gone.
    check(&[pod("b", NEW, ""), pod("a", GOING, "")]);
}

#[test]
fn no_entry_takes_a_pods_address() {
    check(&[pod("c", "", ""), entry("b", OLD)]);
    check(&[pod("c", GOING, ""), entry("b", OLD)]);
}

#[test]
fn the_loser_is_named_with_the_field_and_who_has_the_address() {
    let mut world = World::new();
    world.put("a.yaml", &entry("a", NEW));
    assert!(world.losers().is_empty());
    world.put("b.yaml", &entry("b", OLD));
    let loser = "WorkloadEntry ns/a spec.address: 10.0.0.1 belongs to WorkloadEntry ns/b";
    assert!(world.losers()[0].starts_with(loser), "{:?}", world.losers());
    world.put("c.yaml", &pod("c", "", ""));
    let losers = world.losers();
    assert!(
        losers.len() == 2 && losers.iter().all(|told| told.contains("belongs to Pod ns/c")),
        "{losers:?}"
    );
    // A finished pod has none, and one of the host network is not known by it.
    world.put("c.yaml", &pod("c", "", ", phase: Succeeded"));
    assert_eq!(world.losers().len(), 1);
    world.put("c.yaml", &pod("c", "", "").replace("nodeName: n1", "nodeName: n1, hostNetwork: true"));
    assert_eq!((world.losers().len(), world.outdone()), (1, vec!["a".to_owned()]));
}

#[test]
fn endpoints_of_service_entries_are_meant_to_be_somebody_elses() {
    let mut world = World::new();
    world.put("se.yaml", &inline("se"));
    world.put("other.yaml", &inline("other"));
    assert_eq!((world.losers().len(), world.outdone().len()), (0, 1));
    world.put("a.yaml", &entry("a", ""));
    assert_eq!((world.losers().len(), world.outdone().len()), (0, 2));
    world.remove("a.yaml");
    world.remove("se.yaml");
    assert!(world.outdone().is_empty());
}

#[test]
fn who_moves_leaves_the_address_to_the_other() {
    let mut world = World::new();
    world.put("a.yaml", &entry("a", OLD));
    world.put("b.yaml", &entry("b", NEW));
    assert_eq!(world.outdone(), ["b"]);
    assert_eq!(world.put("a.yaml", &entry("a", OLD).replace("10.0.0.1", "10.0.0.2")).len(), 2);
    assert!(world.outdone().is_empty() && world.losers().is_empty());
}
