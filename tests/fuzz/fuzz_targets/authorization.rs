//! Policies of a control plane, and what they then say of connections.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libfuzzer_sys::fuzz_target;
use mesh_common::api::istio::security::Authorization;
use mesh_common::policy::{Action, Attempt, Mentions, Policy, Principal, SourceIp, evaluate};
use prost::Message as _;

fuzz_target!(|bytes: &[u8]| {
    // A port, and a policy.
    let Some((port, message)) = bytes.split_first_chunk() else { return };
    let Ok(message) = Authorization::decode(message) else { return };
    let policy = match Policy::try_from(&message) {
        Ok(policy) => policy,
        Err(invalid) => {
            assert!(!invalid.field.is_empty() && !invalid.reason.is_empty());
            return;
        }
    };
    assert_eq!(policy.rules.len(), message.rules.len());
    let mentions = Mentions::of([&policy].into_iter());
    let port = u16::from_be_bytes(*port);
    let principal = Principal { trust_domain: "cluster.local", namespace: "a", service_account: "x" };
    let addresses: [IpAddr; 2] = [Ipv4Addr::new(10, 1, 1, 1).into(), Ipv6Addr::LOCALHOST.into()];
    for source in [None, Some(principal)] {
        for ip in addresses {
            let source_ip = SourceIp::One(ip);
            let at = |port| Attempt { source, source_ip, destination_ip: ip, port };
            let decision = evaluate([&policy].into_iter(), &at(port));
            if policy.dry_run || (policy.action == Action::Deny && policy.rules.is_empty()) {
                assert!(decision.allows(), "what never matches never refuses");
            }
            // What is put into tables by the ports that are mentioned holds for the others, too.
            if let Some(other) = mentions.other_port().filter(|_| port > 0 && !mentions.ports.contains(&port))
            {
                assert_eq!(decision, evaluate([&policy].into_iter(), &at(other)));
            }
        }
    }
});
