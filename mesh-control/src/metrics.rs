//! What is counted, in Prometheus' form.

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

/// The counters of one control plane.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) responses: IntCounter,
    pub(crate) resources_sent: IntCounter,
    pub(crate) removals_sent: IntCounter,
    pub(crate) acknowledgements: IntCounter,
    pub(crate) rejections: IntCounter,
    pub(crate) files_read: IntCounter,
    pub(crate) update_seconds: Histogram,
    pub(crate) files: IntGauge,
    pub(crate) file_errors: IntGauge,
    pub(crate) keep_failures: IntCounter,
    pub(crate) services: IntGauge,
    pub(crate) workloads: IntGauge,
    pub(crate) policies: IntGauge,
    pub(crate) joined: IntGauge,
    pub(crate) revision: IntGauge,
    pub(crate) agents: IntGauge,
    pub(crate) max_lag: IntGauge,
    pub(crate) issued: IntCounter,
    pub(crate) refused_certificates: IntCounterVec,
    pub(crate) refused_streams: IntCounterVec,
    pub(crate) ended_streams: IntCounterVec,
    pub(crate) failed_handshakes: IntCounterVec,
    pub(crate) connections: IntGauge,
    pub(crate) refused_connections: IntCounterVec,
    pub(crate) ended_connections: IntCounterVec,
    pub(crate) refused_files: IntCounterVec,
    pub(crate) issuer_end: IntGauge,
    pub(crate) roots: IntGauge,
}

impl Metrics {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::with_opts(Opts::new(format!("mesh_control_{name}"), help))?;
            registry.register(Box::new(counter.clone())).map(|()| counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::with_opts(Opts::new(format!("mesh_control_{name}"), help))?;
            registry.register(Box::new(gauge.clone())).map(|()| gauge)
        };
        let by = |label: &str, name: &str, help: &str| {
            let counter = IntCounterVec::new(Opts::new(format!("mesh_control_{name}"), help), &[label])?;
            registry.register(Box::new(counter.clone())).map(|()| counter)
        };
        let buckets = prometheus::exponential_buckets(0.000_1, 4.0, 10)?;
        let help = "Time from a batch of changed files to the publication of what they change";
        let update_seconds =
            Histogram::with_opts(HistogramOpts::new("mesh_control_update_seconds", help).buckets(buckets))?;
        registry.register(Box::new(update_seconds.clone()))?;
        Ok(Self {
            responses: counter("xds_responses_total", "Responses sent to agents")?,
            resources_sent: counter("xds_resources_sent_total", "Resources sent to agents")?,
            removals_sent: counter("xds_removals_sent_total", "Removals sent to agents")?,
            acknowledgements: counter("xds_acknowledgements_total", "Responses that agents accepted")?,
            rejections: counter("xds_rejections_total", "Responses that agents refused")?,
            files_read: counter("files_read_total", "Manifest files read, again after each change")?,
            files: gauge("files", "Manifest files known")?,
            file_errors: gauge("file_errors", "Faults and notes reported about manifests")?,
            keep_failures: counter(
                "keep_failures_total",
                "Manifests whose copy for the next start could not be written or removed",
            )?,
            services: gauge("services", "Services served")?,
            workloads: gauge("workloads", "Workloads served")?,
            joined: gauge("nodes_joined", "Nodes whose agent has joined")?,
            policies: gauge("policies", "Policies served")?,
            revision: gauge("revision", "Changes of resources since the start")?,
            agents: gauge("agents_connected", "Connected agents")?,
            max_lag: gauge(
                "agents_max_lag_revisions",
                "Largest number of changes that an agent has not acknowledged",
            )?,
            issued: counter("certificates_issued_total", "Certificates issued")?,
            refused_certificates: by(
                "reason",
                "certificates_refused_total",
                "Requests for certificates that were refused",
            )?,
            refused_streams: by(
                "reason",
                "xds_streams_refused_total",
                "Streams of agents that were refused",
            )?,
            ended_streams: by(
                "reason",
                "xds_streams_ended_total",
                "Streams of agents that were ended, since what opened them has expired or is no longer accepted",
            )?,
            failed_handshakes: by("reason", "handshakes_failed_total", "TLS handshakes that failed")?,
            connections: gauge("connections", "Connections of agents and of meshctl")?,
            refused_connections: by(
                "port",
                "connections_refused_total",
                "Connections that were refused, since there were as many as may be",
            )?,
            ended_connections: by(
                "reason",
                "connections_ended_total",
                "Connections that were ended: not authenticated in time, the oldest of too many such, or idle",
            )?,
            refused_files: by(
                "what",
                "credentials_refused_total",
                "Changed certificates and credentials that cannot be used",
            )?,
            issuer_end: gauge(
                "issuer_not_after_seconds",
                "When the issuing certificate or its chain expires",
            )?,
            roots: gauge("trusted_roots", "Roots that are trusted")?,
            update_seconds,
            registry,
        })
    }

    /// The text that a scrape gets.
    pub(crate) fn text(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
