//! Who may connect to whom: Istio's policies, in the kernel and in the node proxy.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use mesh_harness::agent::log_of;
use mesh_harness::manifest::authorization_policy;
use mesh_harness::process::Process;
use mesh_harness::{Pod, Service, needs, peer, until};
use mesh_tests::{Mesh, Server};
use serde_json::{Value, json};

/// Pods of service accounts of their own names: two clients on node 1, one beside the server on node 2, and a stranger that
/// is no workload of the mesh.
struct Scene {
    good: Pod,
    bad: Pod,
    beside: Pod,
    stranger: Pod,
    server: Server,
    /// The same server at another port.
    _also: Process,
    mesh: Mesh,
}

impl Scene {
    fn start() -> anyhow::Result<Self> {
        let mesh = Mesh::start(&["z1", "z2"])?;
        let (good, bad, beside) =
            (mesh.account(0, "good")?, mesh.account(0, "bad")?, mesh.account(1, "beside")?);
        let target = mesh.account(1, "server")?;
        let process = peer::tcp_echo(&target, "server", 8080)?;
        let also = peer::tcp_echo(&target, "server", 9090)?;
        let server = Server { process, pod: target };
        let stranger = mesh.nodes[0].pod("stranger")?;
        mesh.agents[1].wait_for_proxies(&["server", "beside"])?;
        let scene = Self { good, bad, beside, stranger, server, _also: also, mesh };
        scene.mesh.wait_until_carried(0, &scene.good, &scene.at(8080))?;
        scene.mesh.wait_until_carried(0, &scene.bad, &scene.at(8080))?;
        Ok(scene)
    }

    fn at(&self, port: u16) -> SocketAddr {
        self.server.pod.address(port)
    }

    fn put(&self, policies: &[Value]) -> anyhow::Result<()> {
        self.mesh.cluster.manifests().put("policies", policies)
    }

    /// Waits until exactly these reach the server's port, and the others are refused at once.
    fn only(&self, what: &str, port: u16, let_in: &[&str]) -> anyhow::Result<()> {
        until(&format!("{what}: only {let_in:?} reach port {port}"), Duration::from_secs(10), || {
            for pod in [&self.good, &self.bad, &self.beside, &self.stranger] {
                let seen = peer::connect(pod, &self.at(port)).count(2).run()?;
                let came_in = seen.of("server") == 2;
                let name = pod.name.as_str();
                ensure!(came_in == let_in.contains(&name), "{name}: {seen:?}");
                if !came_in {
                    let refused = seen.failed.get("ECONNREFUSED") == Some(&2);
                    ensure!(refused, "{name} was not refused at once: {seen:?}");
                }
            }
            Ok(())
        })
    }
}

fn principal(account: &str) -> String {
    format!("cluster.local/ns/default/sa/{account}")
}

#[test]
fn policies_decide_who_comes_in_on_every_path() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let all = ["good", "bad", "beside", "stranger"];
    scene.only("no policy", 8080, &all)?;
    let policy = |action: &str, rules: &[Value]| {
        authorization_policy("default", "the-policy", Some("server"), action, rules)
    };
    let from = |source: Value| json!({"from": [{"source": source}]});

    let allow = policy("ALLOW", &[from(json!({"principals": [principal("good"), principal("beside")]}))]);
    scene.put(std::slice::from_ref(&allow))?;
    scene.only("ALLOW by principal", 8080, &["good", "beside"])?;

    // A DENY goes before any ALLOW.
    let mut deny = policy("DENY", &[from(json!({"principals": [principal("beside")]}))]);
    deny["metadata"]["name"] = json!("deny");
    scene.put(&[allow, deny])?;
    scene.only("ALLOW and DENY", 8080, &["good"])?;

    scene.put(&[policy("DENY", &[from(json!({"notPrincipals": ["*"]}))])])?;
    scene.only("DENY without identity", 8080, &["good", "bad", "beside"])?;

    scene.put(&[policy("ALLOW", &[from(json!({"namespaces": ["default"]}))])])?;
    scene.only("ALLOW by namespace", 8080, &["good", "bad", "beside"])?;

    let block = format!("{}/32", scene.stranger.addresses()[0]);
    scene.put(&[policy("ALLOW", &[from(json!({"ipBlocks": [block]}))])])?;
    scene.only("ALLOW by address", 8080, &["stranger"])?;

    let operation = json!({"to": [{"operation": {"ports": ["9090"]}}]});
    scene.put(&[policy("DENY", &[operation])])?;
    scene.only("DENY by port", 9090, &[])?;
    scene.only("DENY by port", 8080, &all)?;

    // No rule at all: nobody. One that is empty: everybody.
    scene.put(&[policy("ALLOW", &[])])?;
    scene.only("ALLOW nothing", 8080, &[])?;
    scene.put(&[policy("ALLOW", &[json!({})])])?;
    scene.only("ALLOW everything", 8080, &all)?;

    // HTTP cannot be seen yet: such an ALLOW does not match, such a DENY denies.
    let http = json!({"to": [{"operation": {"methods": ["GET"]}}]});
    scene.put(&[policy("ALLOW", std::slice::from_ref(&http))])?;
    scene.only("ALLOW by HTTP method", 8080, &[])?;
    scene.put(&[policy("DENY", &[http])])?;
    scene.only("DENY by HTTP method", 8080, &[])?;

    let mut dry = policy("DENY", &[json!({})]);
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    scene.put(&[dry])?;
    scene.only("a dry run", 8080, &all)?;

    // For everybody in the mesh: from the root namespace, without a selector.
    scene.put(&[authorization_policy("mesh-system", "nothing", None, "ALLOW", &[])])?;
    scene.only("mesh-wide", 8080, &[])?;
    scene.mesh.cluster.manifests().remove("policies")?;
    scene.only("no policy again", 8080, &all)
}

#[test]
fn not_forms_and_conditions_decide_on_every_path() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let block = |pod: &Pod| format!("{}/32", pod.addresses()[0]);
    let from = |source: Value| json!({"from": [{"source": source}]});
    let to = |operation: Value| json!({"to": [{"operation": operation}]});
    let when = |key: &str, values: Value, others: Value| {
        let condition = json!({"key": key, "values": values, "notValues": others});
        json!({"when": [condition]})
    };
    let (none, server) = (|| json!([]), scene.at(0).ip());
    let all = ["good", "bad", "beside", "stranger"];
    // A rule, whom it meets at port 8080, and whether at port 9090 as well.
    let cases: [(Value, &[&str], bool); 13] = [
        (to(json!({"notPorts": ["9090"]})), &all, false),
        (from(json!({"notNamespaces": ["default"]})), &["stranger"], true),
        (from(json!({"notNamespaces": ["elsewhere"]})), &all, true),
        (
            from(json!({"notIpBlocks": [block(&scene.bad), block(&scene.stranger)]})),
            &["good", "beside"],
            true,
        ),
        (from(json!({"serviceAccounts": ["good", "default/beside"]})), &["good", "beside"], true),
        (from(json!({"notServiceAccounts": ["good"]})), &["bad", "beside", "stranger"], true),
        (
            when("source.ip", json!([block(&scene.bad), block(&scene.stranger)]), none()),
            &["bad", "stranger"],
            true,
        ),
        (when("source.ip", none(), json!([block(&scene.beside)])), &["good", "bad", "stranger"], true),
        (when("source.principal", json!([principal("bad")]), none()), &["bad"], true),
        (
            when("source.principal", none(), json!([principal("good"), principal("bad")])),
            &["beside", "stranger"],
            true,
        ),
        (when("source.namespace", json!(["default"]), none()), &["good", "bad", "beside"], true),
        (when("destination.port", json!(["8080"]), none()), &all, false),
        (when("destination.ip", none(), json!([server])), &[], true),
    ];
    // Nobody meets it, but it leads what comes through the proxy.
    let http = to(json!({"methods": ["GET"]}));
    for (rule, met, anywhere) in cases {
        for (action, also) in [("ALLOW", None), ("DENY", None), ("ALLOW", Some(&http))] {
            let rules: Vec<_> = [&rule].into_iter().chain(also).cloned().collect();
            let what = format!("{action} {rules:?}");
            scene.put(&[authorization_policy("default", "p", Some("server"), action, &rules)])?;
            for port in [8080, 9090] {
                let meets = |name: &&str| met.contains(name) && (port == 8080 || anywhere);
                let let_in: Vec<_> =
                    all.into_iter().filter(|name| meets(name) == (action == "ALLOW")).collect();
                scene.only(&what, port, &let_in)?;
            }
        }
    }
    let steered = scene.mesh.agents[1].reason("inbound_steered")?;
    ensure!(steered > 20, "{steered} were led to the proxy");
    Ok(())
}

#[test]
fn a_selector_in_the_root_namespace_means_workloads_of_all_and_no_others() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let _other = peer::tcp_echo(&scene.beside, "other", 8080)?;
    scene.put(&[authorization_policy("mesh-system", "no-server", Some("server"), "ALLOW", &[])])?;
    scene.only("in the root namespace", 8080, &[])?;
    for pod in [&scene.good, &scene.stranger] {
        let seen = peer::connect(pod, &scene.beside.address(8080)).count(5).run()?;
        ensure!(seen.of("other") == 5, "{}: {seen:?}", pod.name);
    }
    // The same in a namespace that is not the server's: nobody's.
    scene.put(&[authorization_policy("elsewhere", "no-server", Some("server"), "ALLOW", &[])])?;
    scene.only("in another namespace", 8080, &["good", "bad", "beside", "stranger"])
}

#[test]
fn a_dry_run_refuses_nobody_and_tells_of_whom_it_would() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let server = &scene.mesh.agents[1];
    // How often it would have refused: in the kernel, by the proxy.
    let would = || -> anyhow::Result<[u64; 2]> {
        let denials = server.denials()?;
        let of = |side: &str| {
            let all = denials["counts"].as_array().into_iter().flatten();
            let ours = all.filter(|count| count["policy"] == "default/dry" && count["side"] == side);
            ours.filter(|count| count["dry_run"] == true).filter_map(|count| count["denials"].as_u64()).sum()
        };
        Ok([of("server"), of("proxy")])
    };
    let connect = |pod: &Pod, times: u64| -> anyhow::Result<()> {
        let seen = peer::connect(pod, &scene.at(8080)).count(times).run()?;
        ensure!(seen.of("server") == times, "{}: {seen:?}", pod.name);
        Ok(())
    };
    let from =
        [json!({"principals": [principal("bad"), principal("beside")]}), json!({"notPrincipals": ["*"]})];
    let rules = from.map(|source| json!({"from": [{"source": source}]}));
    let mut dry = authorization_policy("default", "dry", Some("server"), "DENY", &rules);
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    // Beside a policy in force, and without any.
    let allow = authorization_policy("default", "all", Some("server"), "ALLOW", &[json!({})]);
    for (what, policies) in [("alone", vec![dry.clone()]), ("with another", vec![dry, allow])] {
        scene.put(&policies)?;
        let begun = would()?;
        until("the dry run is known", Duration::from_secs(5), || {
            connect(&scene.beside, 1)?;
            connect(&scene.bad, 1)?;
            let now = would()?;
            ensure!(now[0] > begun[0] && now[1] > begun[1], "{what}: {begun:?}, {now:?}");
            Ok(())
        })?;
        // What has been said of those.
        std::thread::sleep(Duration::from_millis(300));
        let before = would()?;
        for (pod, times) in [(&scene.good, 5), (&scene.bad, 4), (&scene.beside, 3), (&scene.stranger, 2)] {
            connect(pod, times)?;
        }
        until("all are told", Duration::from_secs(5), || {
            let now = would()?;
            ensure!([now[0] - before[0], now[1] - before[1]] == [3 + 2, 4], "{what}: {before:?}, {now:?}");
            Ok(())
        })?;
    }
    let table = server.meshctl(&["node", "denials"])?;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    ensure!(table.contains("dry run") && !table.contains("enforced"), "{table}");
    let told = std::fs::read_to_string(log_of(server.node()))?;
    ensure!(told.contains("a policy in dry run would have refused"), "nothing in the log");
    let counted = server.metric("mesh_agent_policy_dry_run_denials_total", "default/dry")?;
    ensure!(counted >= 18.0, "{counted} in the metrics");
    // Gone: nobody is told of any more.
    scene.mesh.cluster.manifests().remove("policies")?;
    until("the dry run has gone", Duration::from_secs(5), || {
        let before = would()?;
        connect(&scene.beside, 1)?;
        connect(&scene.bad, 1)?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(would()? == before, "still told");
        Ok(())
    })
}

#[test]
fn a_denial_is_told_with_names_and_meshctl_explains_it() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let service = Service::new("server", [10, 96, 0, 9]).tcp(80, 8080).pods([&*scene.server.pod]);
    scene.mesh.serve(&service, &[scene.at(8080)])?;
    let allow = authorization_policy(
        "default",
        "good-only",
        Some("server"),
        "ALLOW",
        &[json!({"from": [{"source": {"principals": [principal("good")]}}]})],
    );
    scene.put(&[allow])?;
    scene.only("ALLOW by principal", 8080, &["good"])?;
    for (agent, policy, source) in [(0, "good-only", "bad"), (1, "good-only", "beside")] {
        until("the denial is told", Duration::from_secs(5), || {
            let denials = scene.mesh.agents[agent].denials()?;
            let mut last = denials["last"].as_array().into_iter().flatten();
            let found = last.any(|denial| {
                let of = |end: &str| denial[end]["workload"].as_str().unwrap_or_default().to_owned();
                of("destination").ends_with("/server")
                    && of("source").ends_with(source)
                    && denial["policy"].as_str().is_some_and(|name| name.ends_with(policy))
            });
            ensure!(found, "node {agent}: {denials}");
            Ok(())
        })?;
        let table = scene.mesh.agents[agent].meshctl(&["node", "denials"])?;
        let table = String::from_utf8_lossy(&table.stdout).into_owned();
        ensure!(table.contains(source) && table.contains(policy), "{table}");
    }
    for (from, verdict) in [("default/good", "allowed"), ("default/bad", "denied"), ("none", "denied")] {
        let told = scene.mesh.agents[0].meshctl(&["explain", "--from", from, "--to", "default/server:80"])?;
        let told = [told.stdout, told.stderr].concat();
        let told = String::from_utf8_lossy(&told).into_owned();
        ensure!(told.contains(verdict) && told.contains("good-only"), "{from}: {told}");
    }
    // The log says the same of each, and by which of the rules.
    let meets = |account: &str| json!({"from": [{"source": {"principals": [principal(account)]}}]});
    let rules = [meets("nobody"), meets("bad"), meets("beside")];
    scene.put(&[authorization_policy("default", "some", Some("server"), "DENY", &rules)])?;
    for (agent, pod, rule) in [(0, &scene.bad, 1), (1, &scene.beside, 2)] {
        let words = [
            "a connection was refused by policy ".to_owned(),
            format!(" source=\"spiffe://{}\" ", principal(&pod.name)),
            format!(" destination=\"spiffe://{}\" ", principal("server")),
            format!(" port=8080 policy=default/some rule={rule} "),
            " side=\"client\" ".to_owned(),
        ];
        until("the log tells of it", Duration::from_secs(10), || {
            peer::connect(pod, &scene.at(8080)).run()?;
            let log = std::fs::read_to_string(log_of(scene.mesh.agents[agent].node()))?;
            let told = |line: &str| words.iter().all(|word| line.contains(word));
            ensure!(log.lines().any(told), "no line with {words:?} in {log}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nothing_fails_open_when_a_policy_cannot_be_understood() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let allow = authorization_policy(
        "default",
        "p",
        Some("server"),
        "ALLOW",
        &[json!({
            "from": [{"source": {"principals": [principal("good")]}}]
        })],
    );
    scene.put(std::slice::from_ref(&allow))?;
    scene.only("ALLOW by principal", 8080, &["good"])?;
    // A broken edit leaves what was in force.
    let mut broken = allow;
    broken["spec"]["rules"][0]["from"][0]["source"]["ipBlocks"] = json!(["10.0.0.0/99"]);
    scene.put(&[broken])?;
    until("the refusal names the field", Duration::from_secs(10), || {
        let status = scene.mesh.control.meshctl_json(&["status"])?.to_string();
        ensure!(status.contains("ipBlocks"), "{status}");
        Ok(())
    })?;
    scene.only("after a broken edit", 8080, &["good"])
}
