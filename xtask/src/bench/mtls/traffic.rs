//! Bytes, round trips and connections, by each way in turn.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_harness::peer;

use super::super::Args;
use super::super::report::{Report, Target};
use super::Kind;
use super::lane::{Cpu, Lane, PORT};

/// Bytes of one write.
const WRITE: usize = 128 << 10;
/// Bytes of a request and of its answer.
const REQUEST: usize = 64;

/// Several figures of each lane, over the rounds.
struct Rounds<const N: usize> {
    lanes: Vec<(Kind, [Vec<f64>; N])>,
}

/// Measures every lane in every round, which begins with another lane each time; the first round warms caches and is not counted.
fn rounds<const N: usize>(
    args: &Args,
    lanes: &[Lane],
    measure: impl Fn(&Lane, Duration) -> Result<[f64; N]>,
) -> Result<Rounds<N>> {
    let mut seen: Vec<_> = lanes.iter().map(|lane| (lane.kind, [const { Vec::new() }; N])).collect();
    for round in 0..=args.rounds {
        for turn in 0..lanes.len() {
            let at = (turn + round) % lanes.len();
            let figures = measure(&lanes[at], Duration::from_secs_f64(args.seconds))?;
            if round > 0 {
                for (samples, figure) in seen[at].1.iter_mut().zip(figures) {
                    samples.push(figure);
                }
            }
        }
    }
    Ok(Rounds { lanes: seen })
}

impl<const N: usize> Rounds<N> {
    fn of(&self, kind: Kind) -> Option<&[Vec<f64>; N]> {
        self.lanes.iter().find(|(known, _)| *known == kind).map(|(_, samples)| samples)
    }

    /// The figure itself, of every lane.
    fn show(&self, report: &mut Report, figure: usize, what: &str, unit: &'static str) {
        for (kind, samples) in &self.lanes {
            // A direct connection has no proxies.
            if samples[figure].iter().any(|sample| *sample != 0.0) {
                report.add(format!("{what}, {}", kind.name()), &samples[figure], unit, Target::None);
            }
        }
    }

    /// A figure of the mesh, by either protocol, and of proxies that only copy, as a part of another lane's; in each round. Only our own
    /// protocol has a target.
    fn compare(&self, report: &mut Report, figure: usize, what: &str, with: Kind, target: Target) {
        let Some(other) = self.of(with) else { return };
        for kind in [Kind::Stream, Kind::Hbone, Kind::Plain] {
            let Some(seen) = self.of(kind).filter(|_| kind != with) else { continue };
            let ratios: Vec<f64> = seen[figure].iter().zip(&other[figure]).map(|(of, to)| of / to).collect();
            let target = if kind == Kind::Stream { target } else { Target::None };
            report.add(format!("{what}, {} / {}", kind.name(), with.name()), &ratios, "×", target);
        }
    }

    /// What the mesh adds to a direct connection's figure, as a part of what nginx adds.
    fn compare_added(&self, report: &mut Report, figure: usize, what: &str, target: Target) {
        let (Some(direct), Some(nginx)) = (self.of(Kind::Direct), self.of(Kind::Nginx)) else { return };
        for kind in [Kind::Stream, Kind::Hbone] {
            let Some(mesh) = self.of(kind) else { continue };
            let added = |round: usize, of: &[Vec<f64>; N]| of[figure][round] - direct[figure][round];
            let ratios: Vec<f64> =
                (0..mesh[figure].len()).map(|round| added(round, mesh) / added(round, nginx)).collect();
            let target = if kind == Kind::Stream { target } else { Target::None };
            report.add(format!("{what} added, {} / nginx", kind.name()), &ratios, "×", target);
        }
    }
}

/// Processor time since `before`.
fn since(before: Cpu, lane: &Lane) -> Result<Cpu> {
    let now = lane.cpu()?;
    Ok(Cpu { proxies: now.proxies - before.proxies, all: now.all - before.all })
}

/// As much as so many connections carry.
pub(super) fn throughput(args: &Args, lanes: &[Lane], connections: usize, report: &mut Report) -> Result<()> {
    let seen = rounds(args, lanes, |lane, time| {
        let before = lane.cpu()?;
        let seen = peer::throughput_of(&lane.client, &lane.to(PORT), connections, WRITE, time)?;
        ensure!(seen.exact, "{}: bytes were lost", lane.kind.name());
        let (cpu, gigabytes) = (since(before, lane)?, seen.received as f64 / 1e9);
        Ok([gigabytes * 8.0 / seen.elapsed_s, cpu.proxies / gigabytes, cpu.all / gigabytes])
    })?;
    let what = |figure: &str| {
        format!("{figure}, {connections} connection{}", if connections == 1 { "" } else { "s" })
    };
    seen.show(report, 0, &what("throughput"), "Gbit/s");
    seen.compare(report, 0, &what("throughput"), Kind::Nginx, Target::AtLeast(1.6));
    seen.compare(report, 0, &what("throughput"), Kind::Direct, Target::None);
    seen.show(report, 1, &what("CPU of both proxies"), "s/GB");
    seen.compare(report, 1, &what("CPU of both proxies"), Kind::Nginx, Target::AtMost(0.6));
    seen.show(report, 2, &what("CPU of everything"), "s/GB");
    seen.compare(report, 2, &what("CPU of everything"), Kind::Nginx, Target::None);
    Ok(())
}

/// A request and its answer, again and again on one connection.
pub(super) fn round_trips(args: &Args, lanes: &[Lane], report: &mut Report) -> Result<()> {
    let seen = rounds(args, lanes, |lane, time| {
        let seen = peer::request(&lane.client, &lane.to(PORT), REQUEST, time)?;
        ensure!(seen.exact, "{}: bytes were changed", lane.kind.name());
        Ok([seen.round_trip.p50_us, seen.round_trip.p99_us])
    })?;
    for (figure, what) in
        ["round trip of 64 bytes, p50", "round trip of 64 bytes, p99"].into_iter().enumerate()
    {
        seen.show(report, figure, what, "µs");
        seen.compare_added(report, figure, what, Target::AtMost(0.65));
    }
    Ok(())
}

/// Connect, ask, be answered, close; one after the other.
pub(super) fn connections(args: &Args, lanes: &[Lane], report: &mut Report) -> Result<()> {
    let seen = rounds(args, lanes, |lane, time| {
        let before = lane.cpu()?;
        let seen = peer::connect(&lane.client, &lane.to(PORT)).blocking().duration(time).run()?;
        ensure!(seen.failed.is_empty(), "{}: connections failed: {:?}", lane.kind.name(), seen.failures);
        let (cpu, thousands) = (since(before, lane)?, seen.answered as f64 / 1e3);
        let rate = seen.answered as f64 / seen.elapsed_s;
        Ok([rate, cpu.proxies / thousands, cpu.all / thousands, seen.whole.p99_us])
    })?;
    seen.show(report, 0, "connections", "1/s");
    seen.compare(report, 0, "connections", Kind::Direct, Target::AtLeast(0.5));
    seen.compare(report, 0, "connections", Kind::Nginx, Target::None);
    seen.compare(report, 0, "connections", Kind::Plain, Target::None);
    seen.show(report, 3, "connections: p99", "µs");
    seen.show(report, 1, "connections: CPU of both proxies", "s/1000");
    seen.compare(report, 1, "connections: CPU of both proxies", Kind::Nginx, Target::AtMost(0.6));
    seen.show(report, 2, "connections: CPU of everything", "s/1000");
    seen.compare(report, 2, "connections: CPU of everything", Kind::Nginx, Target::None);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(fill: impl FnOnce(&Rounds<1>, &mut Report)) -> Vec<(String, f64, Option<bool>)> {
        let lane = |kind, samples: [f64; 3]| (kind, [samples.to_vec()]);
        let rounds = Rounds {
            lanes: vec![
                lane(Kind::Direct, [0.0, 0.0, 0.0]),
                lane(Kind::Stream, [30.0, 60.0, 100.0]),
                lane(Kind::Nginx, [50.0, 100.0, 200.0]),
            ],
        };
        let mut report = Report::new("test");
        fill(&rounds, &mut report);
        let report: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let row = |row: &serde_json::Value| {
            let what = row["what"].as_str().unwrap().to_owned();
            (what, row["value"].as_f64().unwrap(), row["met"].as_bool())
        };
        report["rows"].as_array().unwrap().iter().map(row).collect()
    }

    #[test]
    fn ratios_are_taken_within_a_round_and_only_of_what_was_measured() {
        let compared = rows(|rounds, report| {
            rounds.compare(report, 0, "CPU", Kind::Nginx, Target::AtMost(0.6));
            rounds.compare(report, 0, "CPU", Kind::Hbone, Target::AtMost(0.6));
            rounds.compare_added(report, 0, "time", Target::AtMost(0.5));
        });
        let expected = [
            ("CPU, mesh / nginx".to_owned(), 0.6, Some(true)),
            ("time added, mesh / nginx".to_owned(), 0.6, Some(false)),
        ];
        assert_eq!(compared, expected);
    }

    #[test]
    fn what_a_lane_does_not_have_is_not_shown() {
        let shown = rows(|rounds, report| rounds.show(report, 0, "CPU", "s"));
        let names: Vec<&str> = shown.iter().map(|(what, ..)| what.as_str()).collect();
        assert_eq!(names, ["CPU, mesh", "CPU, nginx"]);
    }
}
