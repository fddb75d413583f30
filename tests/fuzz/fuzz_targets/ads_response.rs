//! Responses of a control plane, with the resources in them: workloads and services, and policies.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use libfuzzer_sys::fuzz_target;
use mesh_agent::config::NodeConfig;
use mesh_agent::snapshot::Interner;
use mesh_agent::xds::session::{Kind, Session, Step};
use mesh_common::api::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use prost::Message as _;

fuzz_target!(|bytes: &[u8]| {
    let Ok(response) = DeltaDiscoveryResponse::decode(bytes) else { return };
    let node = NodeConfig {
        name: "n".to_owned(),
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        namespace: "m".to_owned(),
        id: "ztunnel~127.0.0.1~n.m~m.svc.cluster.local".to_owned(),
        cluster_id: "c".to_owned(),
        region: None,
        zone: None,
    };
    let mut session = Session::new(&node, Interner::default());
    for kind in [Kind::Addresses, Kind::Policies] {
        let mut response = response.clone();
        // Found by chance too seldom.
        response.type_url = kind.url().to_owned();
        for resource in response.resources.iter_mut().filter_map(|resource| resource.resource.as_mut()) {
            resource.type_url = kind.url().to_owned();
        }
        let (nonce, sent) = (response.nonce.clone(), response.resources.len());
        match session.response(response) {
            // What is refused is named, once for each resource at most.
            Step::Apply(change) => {
                let rejected = change.update.rejected();
                assert!(change.kind == kind && rejected.len() <= sent);
                let answer = session.answer(kind, nonce, &rejected);
                assert_eq!(answer.error_detail.is_some(), !rejected.is_empty());
            }
            Step::Refuse { reason, .. } | Step::Leave { reason } => assert!(!reason.is_empty()),
        }
    }
});
