//! What crosses between the nodes, and who may connect to whom.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_harness::capture::Segment;
use mesh_harness::manifest::peer_authentication;
use mesh_harness::report::Attempts;
use mesh_harness::{Capture, Pod, Service, peer, until};

use super::shop::Shop;
use super::story::{chapter, show};

/// Where node proxies take tunnels.
const TUNNEL: u16 = 15008;
/// How long a change may take to reach the kernel of both nodes.
const PATIENCE: Duration = Duration::from_secs(10);

const ONLY_STOREFRONT: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-storefront, namespace: default}
spec:
  selector: {matchLabels: {app: payments}}
  action: ALLOW
  rules:
  - from:
    - source: {principals: [cluster.local/ns/default/sa/storefront]}
";

pub(super) fn what_crosses_the_cable(shop: &Shop) -> Result<()> {
    chapter("What crosses the cable between the nodes");
    // A pod that has not called the other node yet: its first connection begins with a handshake.
    let (client, (server, _)) = (&shop.cart.pods[0].0, &shop.catalog.pods[2]);
    let to = server.address(9000);
    let outsider = shop.nodes[0].pod("outsider")?;
    println!(
        "{} on node-1 calls {} on node-2, at {to}, and a tap lies on the cable:",
        client.name, server.name
    );
    let (seen, segments) = tapped(shop, client, &to)?;
    ensure!(seen.of(&server.name) == 20, "{seen:?}");
    let tunnel = |s: &&Segment| s.destination.port() == TUNNEL || s.source.port() == TUNNEL;
    let tunnels: Vec<_> = segments.iter().filter(tunnel).collect();
    // RFC 8446, section 5.1: type 22 is a handshake, 23 everything after it.
    let record = |kind: u8| tunnels.iter().find(|s| s.payload.starts_with(&[kind, 3])).copied();
    let hello = record(22).context("no handshake crossed the cable")?;
    let data = record(23).context("no TLS record crossed the cable")?;
    println!("  a TLS handshake, {} → {}:", hello.source, hello.destination);
    println!("      {}", hex(&hello.payload));
    println!("  and from then on only such records, the certificates encrypted as well:");
    println!("      {}", hex(&data.payload));
    let found = occurrences(&segments, &server.name);
    println!(
        "  every answer begins with the server's name, {:?}: seen on the cable {found} times",
        server.name
    );
    ensure!(found == 0, "the name crossed in the clear");
    let own = client.addresses()[0];
    let saw = seen.seen_as.keys().next().map_or("", String::as_str);
    println!("  its client is {saw} to {}: that is the pod's own address, not a proxy's", server.name);
    ensure!(seen.seen_as.len() == 1 && saw.contains(&own.to_string()), "{:?} instead of {own}", seen.seen_as);
    let (_, segments) = tapped(shop, &outsider, &to)?;
    let found = occurrences(&segments, &server.name);
    println!(
        "The same from a pod outside the mesh: {:?} is seen {found} times (each answer on both ends)",
        server.name
    );
    ensure!(found > 0, "the tap saw nothing");
    Ok(())
}

pub(super) fn who_may_pay(shop: &Shop) -> Result<()> {
    chapter("Only storefront may reach payments");
    let payments = Service { affinity_seconds: None, ..shop.payments.service.clone() };
    shop.cluster.manifests().put_service(&payments)?;
    print!("{ONLY_STOREFRONT}");
    shop.cluster.manifests().put_text("only-storefront", ONLY_STOREFRONT)?;
    let (near, far) = (&shop.cart.pods[0].0, &shop.cart.pods[1].0);
    for pod in [near, far] {
        until("payments refuses cart", PATIENCE, || {
            let seen = peer::connect(pod, &shop.payments.at()).count(10).run()?;
            ensure!(seen.failed.get("ECONNREFUSED") == Some(&10), "{seen:?}");
            Ok(())
        })?;
    }
    let seen = peer::connect(&shop.storefront, &shop.payments.at()).count(100).run()?;
    show("payments", "storefront", &seen)?;
    ensure!(seen.by_name.len() == 2, "payments is not balanced: {seen:?}");
    let seen = peer::connect(near, &shop.payments.at()).count(100).run()?;
    println!("\ncart-1 → payments: {:?}, after {:.0} µs each (median)", seen.failed, seen.failing.p50_us);
    ensure!(seen.failed.get("ECONNREFUSED") == Some(&100), "{seen:?}");
    for from in ["default/cart-1", "default/storefront"] {
        ask(shop, &["explain", "--from", from, "--to", "default/payments:443"])?;
    }
    // They are read several times a second.
    until("the denial is told", PATIENCE, || {
        let denials = shop.agents[0].denials()?;
        ensure!(denials["last"].as_array().is_some_and(|all| !all.is_empty()), "{denials}");
        Ok(())
    })?;
    println!("\n$ meshctl node denials | head -n 8");
    let output = meshctl(shop, &["node", "denials"])?;
    output.lines().take(8).for_each(|line| println!("{line}"));
    Ok(())
}

pub(super) fn plaintext_is_refused(shop: &Shop) -> Result<()> {
    chapter("PeerAuthentication STRICT: whoever shows no identity is refused");
    let outsider = shop.nodes[0].pod("another-outsider")?;
    let kubelet = shop.nodes[1].host_workload("kubelet", "system.slice/kubelet.service")?;
    let server = &shop.catalog.pods[2].0;
    let to = server.address(9000);
    let seen = peer::connect(&outsider, &to).count(20).run()?;
    println!(
        "before, in the clear: {} of 20 connections of a pod outside the mesh to {}",
        seen.answered, server.name
    );
    ensure!(seen.of(&server.name) == 20, "{seen:?}");
    let strict = peer_authentication("default", "strict", Some("catalog"), "STRICT");
    shop.cluster.manifests().put("strict", &[strict])?;
    let seen = until("plaintext is refused", PATIENCE, || {
        let seen = peer::connect(&outsider, &to).count(20).run()?;
        ensure!(seen.failed.get("ECONNREFUSED") == Some(&20), "{seen:?}");
        Ok(seen)
    })?;
    println!("under STRICT: {:?}", seen.failed);
    let seen = peer::connect(&shop.storefront, &to).count(20).run()?;
    println!("storefront, by mutual TLS: {} of 20", seen.answered);
    ensure!(seen.of(&server.name) == 20, "{seen:?}");
    let seen = peer::connect(&kubelet, &to).count(20).run()?;
    println!("a process of the pod's own node, such as the kubelet with its probes: {} of 20", seen.answered);
    ensure!(seen.of(&server.name) == 20, "{seen:?}");
    shop.cluster.manifests().remove("strict")?;
    until("plaintext is taken again", PATIENCE, || {
        let seen = peer::connect(&outsider, &to).run()?;
        ensure!(seen.of(&server.name) == 1, "{seen:?}");
        Ok(())
    })
}

/// Twenty connections, and what they put on the cable.
fn tapped(shop: &Shop, client: &Pod, to: &SocketAddr) -> Result<(Attempts, Vec<Segment>)> {
    let tap = Capture::start(shop.cluster.fabric())?;
    let seen = peer::connect(client, to).count(20).run()?;
    Ok((seen, tap.finish()?))
}

fn occurrences(segments: &[Segment], text: &str) -> usize {
    let in_one = |s: &Segment| s.payload.windows(text.len()).filter(|part| *part == text.as_bytes()).count();
    segments.iter().map(in_one).sum()
}

/// The first bytes.
fn hex(bytes: &[u8]) -> String {
    let shown: Vec<_> = bytes.iter().take(32).map(|byte| format!("{byte:02x}")).collect();
    format!("{} … ({} bytes)", shown.join(" "), bytes.len())
}

fn ask(shop: &Shop, command: &[&str]) -> Result<()> {
    println!("\n$ meshctl {}", command.join(" "));
    print!("{}", meshctl(shop, command)?);
    Ok(())
}

fn meshctl(shop: &Shop, command: &[&str]) -> Result<String> {
    let output = shop.agents[0].meshctl(command)?;
    ensure!(output.status.success(), "meshctl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
