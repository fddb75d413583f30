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
