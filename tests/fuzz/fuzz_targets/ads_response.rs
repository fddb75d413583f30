//! Responses of a control plane, with the resources in them.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use libfuzzer_sys::fuzz_target;
use mesh_agent::config::NodeConfig;
use mesh_agent::snapshot::Interner;
use mesh_agent::xds::session::{Session, Step};
use mesh_common::api::ADDRESS_TYPE;
use mesh_common::api::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use prost::Message as _;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut response) = DeltaDiscoveryResponse::decode(bytes) else { return };
    // Found by chance too seldom.
    response.type_url = ADDRESS_TYPE.to_owned();
    for resource in response.resources.iter_mut().filter_map(|resource| resource.resource.as_mut()) {
        resource.type_url = ADDRESS_TYPE.to_owned();
    }
    let node = NodeConfig {
        name: "n".to_owned(),
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        namespace: "m".to_owned(),
        id: "ztunnel~127.0.0.1~n.m~m.svc.cluster.local".to_owned(),
        cluster_id: "c".to_owned(),
        region: None,
        zone: None,
    };
    let (nonce, sent) = (response.nonce.clone(), response.resources.len());
    let mut session = Session::new(&node, Interner::default());
    match session.response(response) {
        // What is refused is named, once for each resource at most.
        Step::Apply(change) => {
            assert!(change.rejected.len() <= sent);
            let answer = session.answer(nonce, &change.rejected);
            assert_eq!(answer.error_detail.is_some(), !change.rejected.is_empty());
        }
        Step::Refuse { reason, .. } | Step::Leave { reason } => assert!(!reason.is_empty()),
    }
});
