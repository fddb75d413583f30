//! Wires the parts together and owns their tasks.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use mesh_common::api::{
    envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
    istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer,
    mesh::v1::management_server::ManagementServer,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tonic::transport::Server;
use tracing::{info, warn};

use crate::{
    catalog::Catalog,
    certificates::Certificates,
    config::Config,
    connections::{Bounds, Connections},
    health::Health,
    identity::is_name,
    index::Mesh,
    joined::Kept,
    keeper::Keeper,
    last_good::LastGood,
    management::Management,
    manifest::is_label,
    metrics::Metrics,
    pipeline::{Joining, Order, Pipeline, Report, State},
    source::{Batch, Source},
    tls,
    xds::{Agents, Discovery, Shared},
};

/// A client that returns may list a hundred thousand versions in one request.
const MAX_REQUEST: usize = 64 << 20;
/// A request for a certificate is a key and a name.
const MAX_CERTIFICATE_REQUEST: usize = 64 << 10;
/// Finds clients that went without a word.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// What one agent does at a time is one stream and a few requests for certificates.
const MAX_STREAMS: u32 = 64;
/// Connections at a time whose callers have not authenticated yet. A handshake is a millisecond's work: as many as wait in a storm.
const MAX_STRANGERS: usize = 4_096;
/// Connections of meshctl at a time.
const MAX_MANAGEMENT: usize = 256;
/// Orders that may wait for the pipeline: all nodes of a large mesh may come at once.
const MAX_ORDERS: usize = 16_384;
/// Streams end at once when asked; what does not is cut off.
const GRACE: Duration = Duration::from_secs(5);

/// A running control plane; dropped, it stops at once.
#[derive(Debug)]
pub struct ControlPlane {
    xds: SocketAddr,
    management: SocketAddr,
    metrics: SocketAddr,
    stop: watch::Sender<bool>,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl ControlPlane {
    /// Starts a control plane; returns when the manifests were read and all ports answer.
    ///
    /// # Errors
    /// When the directory of manifests cannot be read, or a port is taken; the message names the option.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let (readiness, ready) = watch::channel(false);
        let (catalog, agents, report) =
            (Arc::<Catalog>::default(), Arc::<Agents>::default(), Arc::<Report>::default());
        let metrics = Arc::new(Metrics::new().context("registering metrics")?);
        let started = Instant::now();
        let mut tasks = JoinSet::new();

        // Health is answered from the beginning; the other ports open when there is something to serve.
        let (listener, metrics_address) = bind("--metrics-address", config.metrics_address).await?;
        let health = Health {
            catalog: Arc::clone(&catalog),
            agents: Arc::clone(&agents),
            metrics: Arc::clone(&metrics),
            ready,
        };
        tasks.spawn(health.serve(listener));

        anyhow::ensure!(
            is_name(&config.trust_domain),
            "--trust-domain {:?}: letters, digits, '-', '.' and '_' only",
            config.trust_domain
        );
        anyhow::ensure!(
            is_label(&config.root_namespace),
            "--root-namespace {:?} is not a DNS label",
            config.root_namespace
        );
        let kept = (config.clone(), Arc::clone(&metrics));
        let keeper = tokio::task::spawn_blocking(move || Keeper::start(kept.0, kept.1, SystemTime::now()));
        let keeper = keeper.await.context("reading certificates")??;
        let in_force = keeper.subscribe();
        let certificates = Certificates {
            in_force: in_force.clone(),
            catalog: Arc::clone(&catalog),
            metrics: Arc::clone(&metrics),
            trust_domain: config.trust_domain.clone(),
            lifetime: config.certificate_lifetime,
        };
        let mesh = Mesh {
            cluster_id: config.cluster_id,
            cluster_domain: config.cluster_domain,
            trust_domain: config.trust_domain,
            root_namespace: config.root_namespace,
        };
        let (source, batch) = Source::open(&config.manifests).await?;
        let option = || format!("--state-dir {}", config.state_dir.display());
        let last_good = LastGood::open(&config.state_dir).with_context(option)?;
        let state = State { last_good, joined: Kept::new(&config.state_dir) };
        let served = (Arc::clone(&catalog), Arc::clone(&agents));
        let pipeline = Pipeline::new(mesh, state, served, Arc::clone(&report), Arc::clone(&metrics));
        let (orders, ordered) = mpsc::channel(MAX_ORDERS);
        let joining = Joining { orders, joined: pipeline.joined() };
        let (pipeline, started_from) = blocking(pipeline, |pipeline| pipeline.start(batch)).await?;
        started_from.with_context(option)?;

        let (listener, xds) = bind("--xds-address", config.xds_address).await?;
        let shared = Shared {
            catalog: Arc::clone(&catalog),
            agents: Arc::clone(&agents),
            metrics: Arc::clone(&metrics),
            stop: stopped.clone(),
            in_force: in_force.clone(),
            joining: joining.clone(),
        };
        let discovery = AggregatedDiscoveryServiceServer::new(Discovery::new(shared))
            .max_decoding_message_size(MAX_REQUEST);
        let certificates = IstioCertificateServiceServer::new(certificates)
            .max_decoding_message_size(MAX_CERTIFICATE_REQUEST);
        let bounds = Bounds {
            all: config.max_connections,
            strangers: MAX_STRANGERS,
            of_address: config.max_unauthenticated_per_address,
            strange: config.authentication_timeout,
            idle: config.idle_timeout,
        };
        let connections = Connections::new("xds", bounds, Arc::clone(&metrics));
        let (incoming, accepting) = tls::accept(listener, in_force, connections);
        let serving = server()
            .add_service(discovery)
            .add_service(certificates)
            .serve_with_incoming_shutdown(incoming, ended(stopped.clone()));
        tasks.spawn(async {
            accepting.await;
            Ok(())
        });
        tasks.spawn(keeper.run(ended(stopped.clone())));
        tasks.spawn(async { serving.await.context("serving agents") });

        let (listener, management) = bind("--management-address", config.management_address).await?;
        let service = ManagementServer::new(Management { catalog, agents, report, started, joining });
        // Nobody authenticates here: whoever asks something is known.
        let (strangers, of_address) = (MAX_MANAGEMENT, MAX_MANAGEMENT);
        let bounds = Bounds { all: MAX_MANAGEMENT, strangers, of_address, ..bounds };
        let connections = Connections::new("management", bounds, metrics);
        let (incoming, accepting) = tls::accept_plain(listener, connections);
        tasks.spawn(async {
            accepting.await;
            Ok(())
        });
        let serving =
            server().add_service(service).serve_with_incoming_shutdown(incoming, ended(stopped.clone()));
        tasks.spawn(async { serving.await.context("serving meshctl") });

        let (send, batches) = mpsc::channel(1);
        tasks.spawn(read(source, send, stopped.clone()));
        tasks.spawn(follow(batches, ordered, pipeline, stopped));
        readiness.send_replace(true);
        info!(%xds, %management, metrics = %metrics_address, milliseconds = started.elapsed().as_millis() as u64, "ready");
        Ok(Self { xds, management, metrics: metrics_address, stop, tasks })
    }

    /// Where agents subscribe.
    pub fn xds_address(&self) -> SocketAddr {
        self.xds
    }

    /// Where meshctl asks.
    pub fn management_address(&self) -> SocketAddr {
        self.management
    }

    /// Where metrics and health are served.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// Runs until `stop` completes, or until a part fails.
    ///
    /// # Errors
    /// The failure of the part that ended by itself.
    pub async fn run_until(mut self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::select! {
            () = stop => self.stop().await,
            ended = self.tasks.join_next() => {
                let failure = match ended {
                    Some(Ok(Ok(()))) | None => anyhow::anyhow!("a part of the control plane ended by itself"),
                    Some(Ok(Err(error))) => error,
                    Some(Err(panic)) => anyhow::Error::new(panic).context("a part of the control plane failed"),
                };
                self.stop().await.ok();
                Err(failure)
            }
        }
    }

    /// Ends the streams and all tasks.
    ///
    /// # Errors
    /// A failure of a part while it ended.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.send_replace(true);
        let drain = async {
            // The health port has no end of its own.
            while self.tasks.len() > 1
                && let Some(ended) = self.tasks.join_next().await
            {
                ended.context("stopping")??;
            }
            anyhow::Ok(())
        };
        let outcome = timeout(GRACE, drain).await;
        self.tasks.shutdown().await;
        match outcome {
            Ok(outcome) => outcome,
            Err(_elapsed) => {
                warn!("clients did not leave in time and were cut off");
                Ok(())
            }
        }
    }
}

/// Reads what changes. A reading that was begun is finished, since its events come only once.
async fn read(
    mut source: Source,
    send: mpsc::Sender<Batch>,
    stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let stop = ended(stopped);
    tokio::pin!(stop);
    loop {
        let batch = tokio::select! {
            () = &mut stop => return Ok(()),
            batch = source.next() => batch.context("following the manifests")?,
        };
        if send.send(batch).await.is_err() {
            return Ok(());
        }
    }
}

/// Takes it in, one batch after another, and does what it is told between them.
async fn follow(
    mut batches: mpsc::Receiver<Batch>,
    mut orders: mpsc::Receiver<Order>,
    mut pipeline: Pipeline,
    stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let stop = ended(stopped);
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => return Ok(()),
            Some(order) = orders.recv() => {
                (pipeline, ()) = blocking(pipeline, |pipeline| pipeline.obey(order)).await?;
            }
            batch = batches.recv() => match batch {
                Some(batch) => (pipeline, ()) = blocking(pipeline, |pipeline| pipeline.apply(batch)).await?,
                // The reader has ended, and why is told by its own task.
                None => return Ok(()),
            },
        }
    }
}

/// Lets the pipeline work where it may block.
async fn blocking<T: Send + 'static>(
    mut pipeline: Pipeline,
    work: impl FnOnce(&mut Pipeline) -> T + Send + 'static,
) -> anyhow::Result<(Pipeline, T)> {
    let work = move || {
        let outcome = work(&mut pipeline);
        (pipeline, outcome)
    };
    tokio::task::spawn_blocking(work).await.context("taking manifests in")
}

async fn bind(option: &str, address: SocketAddr) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("{option} {address}"))?;
    let address = listener.local_addr().with_context(|| format!("{option} {address}"))?;
    Ok((listener, address))
}

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

async fn ended(mut stopped: watch::Receiver<bool>) {
    // A dropped sender means the end, too.
    stopped.wait_for(|stopped| *stopped).await.ok();
}
