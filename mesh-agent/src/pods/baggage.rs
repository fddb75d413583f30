//! What peers that speak HTTP/2 are told about a workload, for their telemetry: W3C baggage with the names that ztunnel uses. Nothing
//! is decided by it.

use http::HeaderValue;

use crate::snapshot::{Controller, Workload};

/// The header for a workload; none where its names do not fit into one.
pub(super) fn of(workload: &Workload) -> Option<HeaderValue> {
    let app = workload.app.as_deref().cloned().unwrap_or_default();
    let controller = match app.controller {
        Controller::Deployment => "k8s.deployment.name",
        Controller::CronJob => "k8s.cronjob.name",
        Controller::Job => "k8s.job.name",
        Controller::Pod => "k8s.pod.name",
    };
    let pairs = [
        ("k8s.cluster.name", &*workload.cluster),
        ("k8s.namespace.name", &*workload.account().namespace),
        // What has no controller's name is one of its own.
        (controller, if app.name.is_empty() { &*workload.name } else { &*app.name }),
        ("service.name", &*app.service),
        ("service.version", &*app.version),
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
    use crate::snapshot::{Account, App, Kin, Locality, Place};

    #[test]
    fn a_workload_is_told_as_ztunnel_tells_it() {
        let told = |controller, name: &str| {
            let (service, version) = ("web".into(), "v2".into());
            let app = App { controller, name: name.into(), service, version };
            let locality = Locality { region: "r1".into(), zone: "z1".into(), ..Locality::default() };
            let place = Place {
                cluster: "Kubernetes".into(),
                locality: Arc::new(locality),
                app: Some(Arc::new(app)),
                ..Place::default()
            };
            let account = Account { namespace: "shop".into(), ..Account::default() };
            let kin = Arc::new(Kin { account: Arc::new(account), ..Kin::default() });
            let place = Arc::new(place);
            of(&Workload { name: "web-1".into(), kin, place, ..Workload::default() }).unwrap()
        };
        for (controller, name, wanted) in [
            (Controller::Deployment, "web", "deployment.name=web"),
            (Controller::CronJob, "sweep", "cronjob.name=sweep"),
            (Controller::Job, "once", "job.name=once"),
            (Controller::Pod, "web-1", "pod.name=web-1"),
            (Controller::Pod, "", "pod.name=web-1"),
        ] {
            let header = told(controller, name);
            let wanted = format!(
                "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.{wanted},service.name=web,service.version=v2,cloud.region=r1,cloud.availability_zone=z1"
            );
            assert_eq!(header, wanted);
        }
    }

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
