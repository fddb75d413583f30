//! Answers about certificates.

use std::time::SystemTime;

use crate::admin::view;
use crate::config::XdsConfig;
use crate::identity::report::{self, Report, STATES};
use crate::identity::schedule::Subject;
use crate::metrics::Certificates;

/// `/certificates`
pub(super) fn list(report: &Report) -> Vec<view::Certificate> {
    let now = SystemTime::now();
    let one = |of: &report::Certificate| view::Certificate {
        identity: of.identity.clone(),
        node: of.subject == Subject::Node,
        state: of.state(now).to_owned(),
        fetching: of.fetching,
        serial_number: of.number.clone(),
        not_before: of.validity.map(|(from, _)| report::show(from)),
        not_after: of.validity.map(|(_, to)| report::show(to)),
        renewal: of.renewal.map(report::show),
        last_error: of.last_error.clone(),
    };
    report.certificates.iter().map(one).collect()
}

/// The part of `/status`.
pub(super) fn authority(config: Option<&XdsConfig>, report: &Report) -> view::Authority {
    let node = report.certificates.iter().find(|of| of.subject == Subject::Node);
    let errors = || report.certificates.iter().find_map(|of| of.last_error.clone());
    let counted = states(report).into_iter().map(|(state, count)| (state.to_owned(), count));
    view::Authority {
        address: config.map(|xds| xds.authority.address.to_string()).unwrap_or_default(),
        node_identity: node.map(|of| of.identity.clone()).unwrap_or_default(),
        last_error: node.and_then(|of| of.last_error.clone()).or_else(errors),
        certificates: counted.collect(),
    }
}

/// The part of a scrape.
pub(super) fn figures(report: &Report) -> Certificates {
    Certificates {
        states: states(report),
        fetches: report.fetches.iter().map(|(outcome, count)| (*outcome, *count)).collect(),
        earliest_expiry: report.earliest_expiry(SystemTime::now()),
    }
}

fn states(report: &Report) -> Vec<(&'static str, u64)> {
    let now = SystemTime::now();
    let count = |state| report.certificates.iter().filter(|of| of.state(now) == state).count() as u64;
    STATES.into_iter().map(|state| (state, count(state))).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn what_is_known_of_a_certificate_is_shown() {
        let year = Duration::from_secs(365 * 86_400);
        let from = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let node = report::Certificate {
            subject: Subject::Node,
            identity: String::new(),
            number: None,
            validity: None,
            renewal: None,
            fetching: false,
            last_error: Some("Unauthenticated: unknown token".to_owned()),
        };
        let subject = Subject::Workload("spiffe://td/ns/shop/sa/web".parse().unwrap());
        let web = report::Certificate {
            subject,
            identity: "spiffe://td/ns/shop/sa/web".to_owned(),
            number: Some("0a1b".to_owned()),
            validity: Some((from, from + year * 100)),
            renewal: Some(from + year),
            fetching: true,
            last_error: None,
        };
        let report = Report::default().with(vec![node, web]);
        let [node, web] = list(&report).try_into().unwrap();
        assert!(node.node && node.state == "failed" && node.not_after.is_none());
        assert!(!web.node && web.fetching && web.state == "ready");
        assert_eq!(web.not_before.as_deref(), Some("2023-11-14T22:13:20Z"));
        assert_eq!(web.renewal.as_deref(), Some("2024-11-13T22:13:20Z"));
        let authority = authority(None, &report);
        assert_eq!(authority.last_error.as_deref(), Some("Unauthenticated: unknown token"));
        assert_eq!((authority.certificates["ready"], authority.certificates["failed"]), (1, 1));
        let figures = figures(&report);
        assert_eq!(figures.states, [("ready", 1), ("fetching", 0), ("failed", 1), ("expired", 0)]);
        assert!(figures.earliest_expiry.is_some_and(|left| left > 86_400.0));
    }
}
