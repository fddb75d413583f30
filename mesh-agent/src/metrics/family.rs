//! Collects series of equal labels, and writes them as text.

use std::collections::BTreeMap;

use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType, Summary};
use prometheus::{Encoder, TextEncoder};

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    /// Sum and count without quantiles.
    Summary,
}

#[derive(Debug, Default)]
pub(super) struct Families(Vec<Family>);

#[derive(Debug)]
pub(super) struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    series: BTreeMap<Vec<(&'static str, String)>, (f64, u64)>,
}

impl Families {
    /// Begins a metric.
    pub(super) fn family(&mut self, name: &'static str, help: &'static str, kind: Kind) -> &mut Family {
        self.0.push(Family { name, help, kind, series: BTreeMap::new() });
        let last = self.0.len() - 1;
        &mut self.0[last]
    }

    /// The text; metrics without series are left out, as the format wants.
    pub(super) fn text(self) -> String {
        let families: Vec<MetricFamily> =
            self.0.into_iter().filter(|family| !family.series.is_empty()).map(Family::finish).collect();
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "metrics could not be written");
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

impl Family {
    /// Adds to the series of these labels.
    pub(super) fn add<'a>(&mut self, labels: impl IntoIterator<Item = (&'static str, &'a str)>, value: f64) {
        self.add_summary(labels, value, 0);
    }

    /// Adds to the sum and the count of these labels.
    pub(super) fn add_summary<'a>(
        &mut self,
        labels: impl IntoIterator<Item = (&'static str, &'a str)>,
        sum: f64,
        count: u64,
    ) {
        let labels = labels.into_iter().map(|(name, value)| (name, value.to_owned())).collect();
        let series = self.series.entry(labels).or_default();
        series.0 += sum;
        series.1 += count;
    }

    fn finish(self) -> MetricFamily {
        let metrics =
            self.series.into_iter().map(|(labels, value)| metric(self.kind, labels, value)).collect();
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(match self.kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Summary => MetricType::SUMMARY,
        });
        family.set_metric(metrics);
        family
    }
}

fn metric(kind: Kind, labels: Vec<(&'static str, String)>, (value, count): (f64, u64)) -> Metric {
    let labels = labels.into_iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value);
        pair
    });
    let mut metric = Metric::from_label(labels.collect());
    match kind {
        Kind::Counter => {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        }
        Kind::Gauge => {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        Kind::Summary => {
            let mut summary = Summary::default();
            summary.set_sample_sum(value);
            summary.set_sample_count(count);
            metric.set_summary(summary);
        }
    }
    metric
}
