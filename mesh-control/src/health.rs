//! `/metrics`, `/healthz/live` and `/healthz/ready`, over plain HTTP/1.1.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tracing::debug;

use crate::{catalog::Catalog, metrics::Metrics, xds::Agents};

/// Connections at a time; a scraper needs one.
const MAX_CONNECTIONS: usize = 64;
/// A connection lives no longer, however slow its client is.
const MAX_AGE: Duration = Duration::from_secs(60);

/// What the answers are made of.
pub(crate) struct Health {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) agents: Arc<Agents>,
    pub(crate) metrics: Arc<Metrics>,
    /// True once the first reading of the manifests is published.
    pub(crate) ready: watch::Receiver<bool>,
}

impl Health {
    /// Answers until the listener is dropped with the task.
    pub(crate) async fn serve(self, listener: TcpListener) -> anyhow::Result<()> {
        let (health, places) = (Arc::new(self), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
        loop {
            let place = Arc::clone(&places).acquire_owned().await?;
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, say: trying again at once would only burn time.
                    debug!(%error, "accepting a scrape");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let health = Arc::clone(&health);
            tokio::spawn(async move {
                let answer = service_fn(|request| {
                    let response = health.answer(&request);
                    async { Ok::<_, Infallible>(response) }
                });
                let serving = http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                match timeout(MAX_AGE, serving).await {
                    Ok(Ok(())) | Err(_) => {}
                    Ok(Err(error)) => debug!(%error, "scrape ended"),
                }
                drop(place);
            });
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return reply(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n".to_owned());
        }
        match request.uri().path() {
            "/metrics" => match self.scrape() {
                Ok(text) => reply(StatusCode::OK, text),
                Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            "/healthz/live" => reply(StatusCode::OK, "live\n".to_owned()),
            "/healthz/ready" if *self.ready.borrow() => reply(StatusCode::OK, "ready\n".to_owned()),
            "/healthz/ready" => {
                reply(StatusCode::SERVICE_UNAVAILABLE, "the manifests are being read\n".to_owned())
            }
            path => reply(StatusCode::NOT_FOUND, format!("no {path} here\n")),
        }
    }

    fn scrape(&self) -> prometheus::Result<String> {
        let contents = self.catalog.read();
        let (services, workloads) = contents.counts();
        let (agents, lag) = self.agents.summary(&contents);
        let as_gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.metrics.services.set(as_gauge(services));
        self.metrics.workloads.set(as_gauge(workloads));
        self.metrics.policies.set(as_gauge(self.catalog.policies().policies()));
        self.metrics.revision.set(as_gauge(contents.revision()));
        self.metrics.agents.set(as_gauge(agents as u64));
        self.metrics.max_lag.set(as_gauge(lag));
        drop(contents);
        self.metrics.text()
    }
}

fn reply(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, plain);
    response
}
