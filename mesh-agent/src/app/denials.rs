//! Who was refused, as the proxies and the kernel programs tell it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use aya::maps::{MapData, RingBuf};
use mesh_common::abi;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use super::owner::Owner;
use crate::datapath::passages::{self, socket_address};
use crate::identity::spiffe_of;
use crate::pods::host::{Denial, Judged, Side};
use crate::policy::{self, Caller, Cause, NO_MATCH, NO_VERDICT, Refusal};
use crate::snapshot::Workload;

/// How often the kernel programs' denials are read.
const LOOK: Duration = Duration::from_millis(100);

/// Denials of which nobody can say more than that there were so many.
pub(super) type Untold = Arc<UntoldCounts>;

/// See [`Untold`].
#[derive(Debug, Default)]
pub(super) struct UntoldCounts {
    pub(super) refused: AtomicU64,
    /// By policies in dry run.
    pub(super) rehearsed: AtomicU64,
}

/// Reads what the kernel programs tell of denials. What there is no room for is counted by the programs. Looking often enough is simpler than being
/// woken, and the ring holds what comes in between.
pub(super) async fn read(mut ring: RingBuf<MapData>, told: mpsc::Sender<abi::Denial>, untold: Untold) {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        while let Some(denial) = ring.next().map(|bytes| passages::denial(&bytes)) {
            match denial {
                // The agent may be about to end.
                Ok(denial) => drop(told.send(denial).await),
                Err(error) => {
                    untold.refused.fetch_add(1, Relaxed);
                    warn!(%error, "what the kernel programs told cannot be read");
                }
            }
        }
    }
}

impl Owner {
    /// Takes in a denial of the kernel programs, or what may be one by policies in dry run.
    pub(super) fn kernel_denied(&mut self, denial: &abi::Denial) {
        let side = match denial.side {
            abi::Denial::ADMITTED => return self.kernel_admitted(denial),
            abi::Denial::CLIENT => policy::Side::Client,
            _ => policy::Side::Server,
        };
        let (policy, cause) = match denial.verdict {
            verdict if verdict.is_missing() => (NO_VERDICT.into(), None),
            abi::Verdict { policy: 0, .. } => {
                let asking = self.policies.asking(denial.policies);
                (asking.unwrap_or_else(|| NO_MATCH.into()), Some(Cause::NoMatch))
            }
            abi::Verdict { policy, .. } => {
                let name = self.policies.name(policy);
                let cause = name.as_ref().map(|name| self.policies.cause(name));
                (name.unwrap_or_else(|| format!("number {policy}").into()), cause)
            }
        };
        let refusal = Refusal {
            at: SystemTime::now(),
            side,
            source: self.end(denial.source_workload, socket_address(&denial.source)),
            destination: self.end(denial.destination_workload, socket_address(&denial.destination)),
            policy,
            rule: (cause == Some(Cause::Rule)).then_some(usize::from(denial.verdict.rule)),
            cause,
            dry_run: false,
        };
        self.denials.tell(refusal, Instant::now());
    }

    /// Takes in that the kernel programs let somebody in to a workload that policies in dry run apply to, and judges what those would have said.
    fn kernel_admitted(&mut self, admitted: &abi::Denial) {
        let (source, destination) = (socket_address(&admitted.source), socket_address(&admitted.destination));
        let (Some(source), Some(destination)) = (source, destination) else { return };
        // It may have gone meanwhile.
        let Some(workload) = self.of_identity(admitted.destination_workload) else { return };
        let caller = self.of_identity(admitted.source_workload).and_then(|caller| spiffe_of(&caller).ok());
        let (from, to) = (source.ip(), destination.ip());
        let judged = self.policies.shared().judge(&workload, caller.as_ref(), from, to, destination.port());
        let Some((policy, rule)) = judged.would_deny else { return };
        let refusal = Refusal {
            at: SystemTime::now(),
            side: policy::Side::Server,
            source: self.end(admitted.source_workload, Some(source)),
            destination: self.end(admitted.destination_workload, Some(destination)),
            policy,
            rule,
            cause: Some(cause_of(rule)),
            dry_run: true,
        };
        self.denials.tell(refusal, Instant::now());
    }

    /// The workload of this node with that identity.
    fn of_identity(&self, workload: u64) -> Option<Arc<Workload>> {
        self.datapath.workload(workload).and_then(|uid| self.snapshot.workload(uid)).cloned()
    }

    fn end(&self, workload: u64, address: Option<SocketAddr>) -> Caller {
        // Of workloads of other nodes only the address is known here.
        let by_address = || {
            let found = self.mesh.at(address?.ip())?;
            (abi::identity_of(&found.uid()).0 == workload).then_some(found)
        };
        match self.of_identity(workload).or_else(by_address) {
            Some(found) => known(&found, address),
            None => Caller { address, ..Caller::default() },
        }
    }
}

/// A denial of a proxy, as the owner keeps them.
pub(super) fn refusal(denial: Denial) -> Refusal {
    let Judged { allowed: dry_run, policy, rule, cause, would_deny } = denial.judged;
    let (policy, rule, cause) = match would_deny {
        Some((policy, rule)) => (Some(policy), rule, Some(cause_of(rule))),
        None => (policy, rule, cause),
    };
    Refusal {
        at: SystemTime::now(),
        side: match denial.side {
            Side::Outbound => policy::Side::Client,
            Side::Inbound => policy::Side::Proxy,
        },
        source: Caller {
            workload: None,
            identity: denial.source.map(|source| source.to_string()),
            address: Some(SocketAddr::new(denial.source_ip, 0)),
        },
        destination: known(&denial.destination, Some(denial.address)),
        policy: policy.unwrap_or_else(|| NO_MATCH.into()),
        rule,
        cause,
        dry_run,
    }
}

/// Why somebody is refused who is not refused for want of policies.
fn cause_of(rule: Option<usize>) -> Cause {
    if rule.is_some() { Cause::Rule } else { Cause::NoMatch }
}

fn known(workload: &Workload, address: Option<SocketAddr>) -> Caller {
    Caller {
        workload: Some(workload.uid()),
        identity: spiffe_of(workload).ok().map(|identity| identity.to_string()),
        address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::fixtures::{parsed_workload, workload};

    #[test]
    fn a_denial_names_both_ends_policy_and_rule() {
        let destination = parsed_workload(workload("c//Pod/shop/db", "10.0.0.1", "n", &[]));
        let denial = Denial {
            side: Side::Inbound,
            source: Some("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()),
            source_ip: "10.0.0.2".parse().unwrap(),
            destination,
            address: "10.0.0.1:80".parse().unwrap(),
            judged: Judged {
                policy: Some("shop/one".into()),
                rule: Some(2),
                cause: Some(Cause::Rule),
                ..Judged::default()
            },
        };
        let told = refusal(denial.clone());
        assert_eq!((told.side, &*told.policy, told.rule), (policy::Side::Proxy, "shop/one", Some(2)));
        assert_eq!(told.source.identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/web"));
        assert_eq!(told.destination.workload.as_deref(), Some("c//Pod/shop/db"));
        assert_eq!(told.destination.address, Some("10.0.0.1:80".parse().unwrap()));
        assert_eq!((told.cause, told.dry_run), (Some(Cause::Rule), false));

        let would_deny = Some(("shop/trial".into(), None));
        let told =
            refusal(Denial { judged: Judged { allowed: true, would_deny, ..denial.judged }, ..denial });
        assert_eq!((&*told.policy, told.rule, told.dry_run), ("shop/trial", None, true));
        assert_eq!(told.cause, Some(Cause::NoMatch));
    }
}
