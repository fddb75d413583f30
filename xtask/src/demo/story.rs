//! What happens in the shop, told with what was really seen.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_harness::report::Attempts;
use mesh_harness::{Endpoint, peer};

use super::shop::{App, Shop};
use super::{guarded, short};

/// How finely is looked at what becomes of a dead proxy's connections.
const STEP: Duration = Duration::from_millis(150);
/// Far longer than a dead proxy can seem alive.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn tell(shop: &mut Shop) -> Result<()> {
    opening(shop);
    spread(shop)?;
    guarded::what_crosses_the_cable(shop)?;
    an_endpoint_goes(shop)?;
    a_service_changes(shop)?;
    guarded::who_may_pay(shop)?;
    guarded::plaintext_is_refused(shop)?;
    the_agent_is_killed(shop)?;
    what_can_be_seen(shop)
}

pub(super) fn chapter(title: &str) {
    println!("\n━━ {title} {}", "━".repeat(90_usize.saturating_sub(title.chars().count())));
}

fn opening(shop: &Shop) {
    chapter("The shop");
    for node in &shop.nodes {
        println!("{} in {}, {}", node.name(), node.zone(), node.addresses()[0]);
        let pods = shop.apps().into_iter().flat_map(|app| &app.pods);
        let here =
            pods.map(|(pod, _)| pod).chain([&shop.storefront]).filter(|pod| pod.node().name() == node.name());
        for pod in here {
            println!("    {:<12} {:<12} {}", pod.name, pod.addresses()[0], pod.addresses()[1]);
        }
    }
    println!(
        "No sidecar, no iptables rule, nothing in the pods: storefront's connect() itself goes to the right place."
    );
    println!(
        "What stays on a node meets no proxy; what goes to the other one goes through the node's agent, by mutual TLS."
    );
}

fn spread(shop: &Shop) -> Result<()> {
    chapter("Who answers");
    for (app, note) in [
        (&shop.cart, "weighted random, the default"),
        (&shop.catalog, "round robin; service port 80, target port 9000"),
        (&shop.payments, "client affinity: one client, one backend"),
    ] {
        ask(shop, app, note)?;
    }
    let v6 = (shop.cart.service.addresses[1], 80).into();
    let seen = peer::connect(&shop.storefront, &v6).count(100).run()?;
    show(&format!("cart over IPv6, {v6}"), "storefront", &seen)?;
    let seen = peer::udp(&shop.storefront, &shop.names.at()).count(100).run()?;
    show(&format!("names over UDP, {}", shop.names.at()), "storefront", &seen)?;
    let source = seen.peers.keys().next().map_or("", String::as_str);
    println!("  the answers come from {source}: the address that was asked");
    Ok(())
}

fn an_endpoint_goes(shop: &Shop) -> Result<()> {
    chapter("An endpoint goes, while storefront keeps connecting");
    let running = peer::connect(&shop.storefront, &shop.catalog.at()).concurrency(2).count(0).start()?;
    std::thread::sleep(Duration::from_millis(300));
    let fewer = shop.catalog.with_pods(|number| number != 1);
    let began = Instant::now();
    shop.cluster.manifests().put_service(&fewer)?;
    let left: Vec<_> = [0, 2].map(|i| shop.catalog.pods[i].0.address(9000)).into();
    shop.agents[0].wait_for_backends(&shop.catalog.at(), &left)?;
    println!("catalog-2 is taken out of the manifest; {:.0?} later the kernel has it", began.elapsed());
    std::thread::sleep(Duration::from_millis(300));
    show("catalog, before and after", "storefront", &running.finish()?)?;
    let seen = peer::connect(&shop.storefront, &shop.catalog.at()).count(100).run()?;
    show("catalog, from now on", "storefront", &seen)?;
    ensure!(seen.of("catalog-2") == 0, "catalog-2 still gets connections");
    println!("\nAll of cart's endpoints become unready:");
    let unready = shop.cart.pods.iter().map(|(pod, _)| Endpoint::of(pod).unready());
    shop.cluster.manifests().put_service(&shop.cart.service.clone().endpoints(unready))?;
    shop.agents[0].wait_for_backends(&shop.cart.at(), &[])?;
    let seen = peer::connect(&shop.storefront, &shop.cart.at()).count(100).run()?;
    println!("  100 connects: {:?}, after {:.0} µs each (median)", seen.failed, seen.failing.p50_us);
    shop.cluster.manifests().put_service(&shop.cart.service)
}

fn a_service_changes(shop: &Shop) -> Result<()> {
    chapter("A service changes");
    println!("payments shall stay on the caller's node (internalTrafficPolicy: Local), without affinity:");
    let mut local = shop.payments.service.clone();
    (local.local_only, local.affinity_seconds) = (true, None);
    shop.cluster.manifests().put_service(&local)?;
    shop.agents[0].wait_for_backends(&shop.payments.at(), &[shop.payments.pods[0].0.address(8443)])?;
    ask(shop, &shop.payments, "storefront is on node-1")
}

fn the_agent_is_killed(shop: &mut Shop) -> Result<()> {
    chapter("The agent of node-1 is killed, while storefront keeps connecting");
    let pid = shop.agents[0].pid();
    shop.agents[0].process().kill()?;
    println!(
        "kill -9 {pid}: nothing reads the kernel's maps now, and they go on being used. What was led to the"
    );
    println!("agent's proxy is refused until its heartbeat has run out, less than a second later:");
    let (began, mut refused) = (Instant::now(), true);
    while refused {
        let at = began.elapsed().as_millis();
        let seen = peer::connect(&shop.storefront, &shop.catalog.at()).duration(STEP).run()?;
        let of = |name| seen.of(name);
        println!(
            "  from {at:>4} ms: catalog-1 {:>4}, catalog-3 {:>4}, refused {:>4}",
            of("catalog-1"),
            of("catalog-3"),
            seen.failed_total()
        );
        refused = seen.failed_total() > 0;
        ensure!(!refused || began.elapsed() < PATIENCE, "it does not end: {:?}", seen.failed);
    }
    println!("\nAfter that catalog-3, on the other node, is reached without TLS, since no policy guards it:");
    let catalog = peer::connect(&shop.storefront, &shop.catalog.at()).count(300).run()?;
    show("catalog", "storefront", &catalog)?;
    println!("\npayments is guarded by policy. payments-1 is on this node, where the kernel decides;");
    println!("payments-2 is not, and without a certificate nobody gets there:");
    let seen = peer::connect(&shop.storefront, &shop.payments.at()).count(300).run()?;
    attempts("payments", &seen);
    let (near, refused) = (seen.of("payments-1"), seen.failed.get("ECONNREFUSED").copied().unwrap_or(0));
    ensure!(
        near > 0 && refused > 0 && near + refused == seen.attempts,
        "payments was to be half there: {seen:?}"
    );

    let running = peer::connect(&shop.storefront, &shop.catalog.at()).concurrency(2).count(0).start()?;
    let began = Instant::now();
    shop.agents[0] = shop.nodes[0].agent()?;
    println!("\na new agent is ready after {:.1?}, and has adopted what it found", began.elapsed());
    shop.wait_until_carried()?;
    println!("what goes to node-2 goes by mutual TLS again {:.1?} after its start", began.elapsed());
    show("catalog, all through that", "storefront", &running.finish()?)?;
    show("payments", "storefront", &peer::connect(&shop.storefront, &shop.payments.at()).count(300).run()?)
}

fn what_can_be_seen(shop: &Shop) -> Result<()> {
    chapter("What can be seen");
    for command in [
        &["status"][..],
        &["get", "services"],
        &["get", "endpoints"],
        &["node", "services"],
        &["node", "workloads"],
        &["node", "certificates"],
        &["node", "stats"],
    ] {
        println!("\n$ meshctl {}", command.join(" "));
        let output = shop.agents[0].meshctl(command)?;
        ensure!(output.status.success(), "meshctl: {}", String::from_utf8_lossy(&output.stderr));
        print!("{}", String::from_utf8_lossy(&output.stdout));
    }
    println!(
        "\n$ curl -s http://node-1:15020/metrics | grep -E 'opened_total.*catalog|mesh_agent_(datapath|map_entries)'"
    );
    let metrics = shop.agents[0].metrics()?;
    let asked = |line: &&str| {
        line.contains("opened_total{") && line.contains("catalog")
            || line.starts_with("mesh_agent_datapath")
            || line.starts_with("mesh_agent_map_entries")
    };
    metrics.lines().filter(asked).for_each(|line| println!("{line}"));
    let errors = shop.control.meshctl_json(&["status"])?;
    ensure!(errors["file_errors"].as_array().is_none_or(Vec::is_empty), "refused manifests: {errors}");
    Ok(())
}

/// Sends 300 connections, and shows who answered.
fn ask(shop: &Shop, app: &App, note: &str) -> Result<()> {
    let seen = peer::connect(&shop.storefront, &app.at()).count(300).run()?;
    show(&format!("{}, {} ({note})", app.service.name, app.at()), "storefront", &seen)
}

/// Shows who answered; nothing may have failed.
pub(super) fn show(what: &str, from: &str, seen: &Attempts) -> Result<()> {
    println!();
    told(what, from, seen);
    ensure!(seen.failed.is_empty(), "failures: {:?} {:?}", seen.failed, seen.failures);
    Ok(())
}

/// Shows who answered, and what failed.
fn attempts(what: &str, seen: &Attempts) {
    told(what, "storefront", seen);
    for (error, count) in &seen.failed {
        println!("  {error:<12} {count:>6}");
    }
}

fn told(what: &str, from: &str, seen: &Attempts) {
    println!(
        "{from} → {what}: {} in {:.2} s, median {:.0} µs",
        seen.attempts, seen.elapsed_s, seen.whole.p50_us
    );
    for (name, count) in &seen.by_name {
        let bar = "█".repeat((seen.share(name) * 40.0).round() as usize);
        println!("  {name:<12} {count:>6}  {bar}");
    }
}

/// Commands to try in what keeps running.
pub(super) fn invite(shop: &Shop, programs: &Path) {
    let (id, at) = (shop.cluster.id(), |name: &str| short(&programs.join(name)));
    let socket = shop.nodes[0].admin_socket();
    let meshctl =
        format!("nsenter --net=/run/netns/{id}-fabric {} --agent-socket {}", at("meshctl"), socket.display());
    let inside = format!(
        "{} in --netns /run/netns/{id}-storefront --cgroup {} --",
        at("mesh-peer"),
        shop.storefront.cgroup().path().display()
    );
    chapter("It keeps running. Try");
    println!("# as storefront:");
    println!("{inside} {} connect --to {} --count 50", at("mesh-peer"), shop.catalog.at());
    println!("{inside} bash");
    println!("# the control plane, and the kernel of node-1:");
    println!("{meshctl} get services\n{meshctl} status\n{meshctl} node stats -o yaml");
    println!("# who may, and who may not, and who was refused:");
    println!("{meshctl} explain --from default/cart-1 --to default/payments:443\n{meshctl} node denials");
    println!("# change a service, and watch it take effect:");
    println!("$EDITOR {}/service-catalog.yaml", shop.cluster.manifests().dir().display());
    println!("nsenter --net=/run/netns/{id}-node-1 curl -s http://127.0.0.1:15020/metrics");
    println!("# the end:\ncargo xtask demo --stop");
}
