//! What peers that speak HTTP/2 are told about a workload, for their telemetry: W3C baggage with the names that ztunnel uses. Nothing
//! is decided by it.

use http::HeaderValue;

use crate::snapshot::Workload;

/// The header for a workload; none where its names do not fit into one.
pub(super) fn of(workload: &Workload) -> Option<HeaderValue> {
    let pairs = [
        ("k8s.cluster.name", &*workload.cluster),
        ("k8s.namespace.name", &*workload.account().namespace),
        ("k8s.pod.name", &*workload.name),
        ("cloud.region", &*workload.locality.region),
        ("cloud.availability_zone", &*workload.locality.zone),
    ];
    let plain = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
    };
    let told = pairs.iter().filter(|(_, value)| plain(value));
    let text = told.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",");
    HeaderValue::from_str(&text).ok().filter(|header| !header.is_empty())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::snapshot::{Account, Kin, Place};

    #[test]
    fn only_what_needs_no_escape_is_told() {
        let account = Account { namespace: "shop".into(), ..Account::default() };
        let kin = Kin { account: Arc::new(account), ..Kin::default() };
        let place = Place { cluster: "a,b=c".into(), ..Place::default() };
        let workload = Workload {
            name: "web-1".into(),
            kin: Arc::new(kin),
            place: Arc::new(place),
            ..Workload::default()
        };
        assert_eq!(of(&workload).unwrap(), "k8s.namespace.name=shop,k8s.pod.name=web-1");
        assert_eq!(of(&Workload::default()), None);
    }
}
