//! New connections, and established ones, lane by lane within each round.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_harness::peer;
use mesh_harness::report::Stream;

use super::super::Args;
use super::super::report::{Report, Target};
use super::world::Lane;

/// Clients that connect at a time; as many as there are processors here.
const CONCURRENCY: usize = 2;

/// Everything that is compared.
pub(super) struct Lanes<'a> {
    pub(super) direct: &'a Lane,
    pub(super) mesh_few: &'a Lane,
    pub(super) iptables_few: &'a Lane,
    pub(super) mesh_many: &'a Lane,
    pub(super) iptables_many: &'a Lane,
}

/// Rates of one lane over the rounds.
#[derive(Default)]
struct Rates {
    per_second: Vec<f64>,
    cpu_us: Vec<f64>,
    p99_us: Vec<f64>,
}

/// Connect, ask, be answered, close: as fast as it goes.
pub(super) fn connections(args: &Args, lanes: &Lanes<'_>, report: &mut Report) -> Result<()> {
    let many = format!("{} services", args.services);
    let all = [
        ("direct".to_owned(), lanes.direct),
        ("mesh, 10 services".to_owned(), lanes.mesh_few),
        ("iptables, 10 services".to_owned(), lanes.iptables_few),
        (format!("mesh, {many}"), lanes.mesh_many),
        (format!("iptables, {many}"), lanes.iptables_many),
    ];
    let mut rates: [Rates; 5] = Default::default();
    // A first round warms caches and is not counted.
    for round in 0..=args.rounds {
        for (turn, _) in all.iter().enumerate() {
            // Every round begins with another lane.
            let i = (turn + round) % all.len();
            let (name, lane) = &all[i];
            let one = measure(lane, Duration::from_secs_f64(args.seconds)).with_context(|| name.clone())?;
            if round > 0 {
                rates[i].per_second.push(one.0);
                rates[i].cpu_us.push(one.1);
                rates[i].p99_us.push(one.2);
            }
        }
    }
    for ((name, _), rate) in all.iter().zip(&rates) {
        report.add(format!("connections, {name}"), &rate.per_second, "1/s", Target::None);
        report.add(format!("connections, {name}: CPU"), &rate.cpu_us, "µs each", Target::None);
        report.add(format!("connections, {name}: p99"), &rate.p99_us, "µs", Target::None);
    }
    let [direct, mesh_few, iptables_few, mesh_many, iptables_many] = &rates;
    let mut ratio = |what: String, of: &Rates, to: &Rates, least| {
        let ratios: Vec<f64> = of.per_second.iter().zip(&to.per_second).map(|(of, to)| of / to).collect();
        report.add(what, &ratios, "×", Target::AtLeast(least));
    };
    ratio("connections, mesh / direct, 10 services".into(), mesh_few, direct, 0.97);
    ratio(format!("connections, mesh / direct, {many}"), mesh_many, direct, 0.97);
    ratio("connections, mesh / iptables, 10 services".into(), mesh_few, iptables_few, 1.0);
    ratio(format!("connections, mesh / iptables, {many}"), mesh_many, iptables_many, 2.0);
    Ok(())
}

/// Connections per second, processor time of client and server for each, and the 99th percentile.
fn measure(lane: &Lane, time: Duration) -> Result<(f64, f64, f64)> {
    let mut client = peer::connect(&lane.client, &lane.to[0]).concurrency(CONCURRENCY).blocking();
    for to in &lane.to[1..] {
        client = client.to(to);
    }
    let before = lane.server.usage()?.cpu_s;
    let seen = client.duration(time).run()?;
    ensure!(seen.failed.is_empty(), "connections failed: {:?} {:?}", seen.failed, seen.failures);
    let cpu = seen.cpu_s + lane.server.usage()?.cpu_s - before;
    Ok((seen.answered as f64 / seen.elapsed_s, cpu * 1e6 / seen.answered as f64, seen.whole.p99_us))
}

/// Round trips and throughput of one connection, directly and through the mesh.
pub(super) fn established(args: &Args, direct: &Lane, mesh: &Lane, report: &mut Report) -> Result<()> {
    let time = Duration::from_secs_f64(args.seconds);
    let trip = |lane: &Lane| peer::request(&lane.client, &lane.to[0], 64, time);
    let flood = |lane: &Lane| peer::throughput(&lane.client, &lane.to[0], 128 << 10, time);
    let trips = pairs(args.rounds, || trip(direct), || trip(mesh))?;
    let floods = pairs(args.rounds, || flood(direct), || flood(mesh))?;
    let mean = |stream: &Stream| stream.round_trip.mean_us;
    let gigabits = |stream: &Stream| stream.received as f64 * 8.0 / stream.elapsed_s / 1e9;
    let both = Target::Within(0.98, 1.02);
    for (what, unit, pairs, figure) in [
        ("round trip of 64 bytes", "µs", &trips, &mean as &dyn Fn(&Stream) -> f64),
        ("throughput of one connection", "Gbit/s", &floods, &gigabits),
    ] {
        for (name, side) in [("direct", 0), ("mesh", 1)] {
            let of = |pair: &[Stream; 2]| figure(&pair[side]);
            report.add(
                format!("{what}, {name}"),
                &pairs.iter().map(of).collect::<Vec<_>>(),
                unit,
                Target::None,
            );
            let cpu = |pair: &[Stream; 2]| pair[side].cpu_s / pair[side].elapsed_s;
            report.add(
                format!("{what}, {name}: client CPU"),
                &pairs.iter().map(cpu).collect::<Vec<_>>(),
                "s/s",
                Target::None,
            );
        }
        let ratios: Vec<f64> = pairs.iter().map(|pair| figure(&pair[1]) / figure(&pair[0])).collect();
        report.add(format!("{what}, mesh / direct"), &ratios, "×", both);
    }
    Ok(())
}

/// Both, alternately, the order changing with every round; the first round is not counted.
fn pairs(
    rounds: usize,
    direct: impl Fn() -> Result<Stream>,
    mesh: impl Fn() -> Result<Stream>,
) -> Result<Vec<[Stream; 2]>> {
    let mut pairs = Vec::new();
    for round in 0..=rounds {
        let pair = if round.is_multiple_of(2) {
            let direct = direct()?;
            [direct, mesh()?]
        } else {
            let mesh = mesh()?;
            [direct()?, mesh]
        };
        ensure!(pair.iter().all(|stream| stream.exact), "bytes were lost or changed");
        if round > 0 {
            pairs.push(pair);
        }
    }
    Ok(pairs)
}
