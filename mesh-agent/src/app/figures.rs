//! What is scraped of proxies and policy.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::denials::UntoldCounts;
use super::owner::Owner;
use crate::metrics::{self, Proxy, ProxySide};
use crate::pods::figures::{Figures, SideFigures};
use crate::pods::host::Side;
use crate::sockets::Sweeper;

/// The part of a scrape that is about policy.
pub(super) fn of_policy(owner: &Owner, swept: &Sweeper, untold: &UntoldCounts) -> metrics::Policy {
    let counts = owner.policies.counts();
    let understood = counts.policies.saturating_sub(counts.not_understood);
    let swept = swept.counts();
    metrics::Policy {
        complete: counts.complete,
        policies: vec![
            ("understood", understood as u64),
            ("not-understood", counts.not_understood as u64),
            ("awaited", counts.awaited as u64),
        ],
        refusing: vec![
            ("policies-not-arrived", counts.refusing_not_arrived as u64),
            ("policy-missing", counts.refusing as u64),
        ],
        left_out: (counts.left_out + counts.plain_left_out) as u64,
        unplaced: owner.unplaced() as u64,
        write_failures: counts.write_failures,
        denials: refused(owner, false),
        rehearsed: refused(owner, true),
        untold_denials: untold.refused.load(Relaxed),
        untold_rehearsals: untold.rehearsed.load(Relaxed),
        destroyed: [
            ("policy", &swept.policy),
            ("endpoint-gone", &swept.gone),
            ("unsupported", &swept.unsupported),
            ("failed", &swept.failed),
        ]
        .map(|(reason, count)| (reason, count.load(Relaxed)))
        .to_vec(),
    }
}

/// How often each policy refused, or each in dry run would have.
fn refused(owner: &Owner, dry_run: bool) -> Vec<(String, &'static str, u64)> {
    let counts = owner.denials.counts().filter(|(_, _, dry, _)| *dry == dry_run);
    counts.map(|(policy, side, _, count)| (policy.to_owned(), side.name(), count)).collect()
}

/// The part of a scrape that is about the proxies.
pub(super) fn of_proxies(figures: &Figures) -> Proxy {
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
        busy_polls: vec![
            ("found", figures.looks.found.load(Relaxed)),
            ("in-vain", figures.looks.in_vain.load(Relaxed)),
        ],
        busy_poll_seconds: figures.looks.nanoseconds.load(Relaxed) as f64 / 1e9,
    }
}

fn side(of: Side, figures: &SideFigures, connections: u64) -> ProxySide {
    let counts = &figures.counts;
    let read = |counter: &AtomicU64| counter.load(Relaxed);
    let (sent, received) = figures.moved();
    let mut outcomes = figures.outcomes();
    outcomes.insert("stopped", read(&counts.stopped));
    outcomes.insert("stranded", read(&counts.stranded));
    outcomes.insert("malformed", read(&counts.malformed));
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
            ("refused", read(&counts.refused_handshakes)),
        ],
        reused: read(&counts.reused),
        retried: read(&counts.retried),
        limits: vec![
            ("connections", read(&counts.over_connections)),
            ("handshakes", read(&counts.over_handshakes)),
            ("buffers", read(&counts.over_buffers)),
            ("unread", read(&counts.over_unread)),
            ("idle-tunnels", read(&counts.over_idle)),
            ("accept", read(&counts.unaccepted)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_proxies_count_is_told() {
        let figures = Figures::default();
        figures.inbound.counts.over_connections.store(3, Relaxed);
        let proxy = of_proxies(&figures);
        assert_eq!(proxy.sides[1].name, "inbound");
        assert!(proxy.sides[1].limits.contains(&("connections", 3)));
    }
}
