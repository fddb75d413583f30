//! The shop: who runs where, and which services they form.

use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_harness::process::Process;
use mesh_harness::{Agent, Algorithm, Cluster, Control, Node, Pod, Service, peer, until};

const PATIENCE: Duration = Duration::from_secs(20);

/// Everything that runs. Fields go in order, agents before the cluster.
pub(super) struct Shop {
    pub(super) agents: Vec<Agent>,
    pub(super) control: Control,
    pub(super) storefront: Pod,
    pub(super) cart: App,
    pub(super) catalog: App,
    pub(super) payments: App,
    pub(super) names: App,
    pub(super) nodes: Vec<Rc<Node>>,
    pub(super) cluster: Cluster,
}

/// A service with its pods.
pub(super) struct App {
    pub(super) service: Service,
    pub(super) pods: Vec<(Pod, Process)>,
}

impl App {
    /// Pods `NAME-1`, `NAME-2`, … on the nodes given by number, each with a server.
    fn new(shop: (&Cluster, &[Rc<Node>]), service: Service, on: &[usize]) -> Result<Self> {
        let (cluster, nodes) = shop;
        let mut pods = Vec::new();
        for (number, node) in on.iter().enumerate() {
            let mut plan = nodes[*node].plan(&format!("{}-{}", service.name, number + 1));
            plan.service_account = service.name.clone();
            let pod = plan.start()?;
            let port = &service.ports[0];
            let server = match port.protocol {
                "UDP" => peer::udp_echo(&pod, &pod.name, port.target)?,
                _ => peer::tcp_echo(&pod, &pod.name, port.target)?,
            };
            // Policies choose pods by their labels, and those of a service have one in common.
            let mut manifest = pod.manifest();
            manifest["metadata"]["labels"]["app"] = service.name.as_str().into();
            cluster.manifests().put(&format!("pod-{}", pod.name), &[manifest])?;
            pods.push((pod, server));
        }
        let service = service.pods(pods.iter().map(|(pod, _)| &**pod));
        cluster.manifests().put_service(&service)?;
        Ok(Self { service, pods })
    }

    /// The service's address and first port.
    pub(super) fn at(&self) -> std::net::SocketAddr {
        self.service.at(self.service.ports[0].port)
    }

    /// The service over only those of its pods that `keep` admits, by number.
    pub(super) fn with_pods(&self, keep: impl Fn(usize) -> bool) -> Service {
        let kept =
            self.pods.iter().enumerate().filter(|(number, _)| keep(*number)).map(|(_, (pod, _))| &**pod);
        self.service.clone().pods(kept)
    }
}

impl Shop {
    /// Starts it all, and waits until the kernel of both nodes has every service, and mutual TLS is between them.
    pub(super) fn open(keep: bool) -> Result<Self> {
        let cluster = if keep { Cluster::start_to_keep()? } else { Cluster::start()? };
        let nodes = vec![cluster.node("zone-a")?, cluster.node("zone-b")?];
        let control = cluster.control()?;
        let on = (&cluster, &nodes[..]);
        let cart =
            Service::new("cart", [10, 96, 0, 10]).also_at([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10]).tcp(80, 8080);
        let cart = App::new(on, cart, &[0, 1])?;
        let catalog = Service::new("catalog", [10, 96, 0, 20]).tcp(80, 9000).balanced(Algorithm::RoundRobin);
        let catalog = App::new(on, catalog, &[0, 1, 1])?;
        let payments = Service::new("payments", [10, 96, 0, 30]).tcp(443, 8443);
        let payments = App::new(on, Service { affinity_seconds: Some(600), ..payments }, &[0, 1])?;
        let names = Service::new("names", [10, 96, 0, 53]).udp(53, 5353);
        let names = App::new(on, names, &[0, 1])?;
        let mut storefront = nodes[0].plan("storefront");
        storefront.service_account = "storefront".to_owned();
        let storefront = storefront.start()?;
        cluster.manifests().put_pods([&*storefront])?;
        let agents = nodes.iter().map(Node::agent).collect::<Result<Vec<_>>>()?;
        agents[0].wait_for_workloads(&["storefront"])?;
        for agent in &agents {
            for app in [&cart, &catalog, &payments] {
                let target = app.service.ports[0].target;
                let backends: Vec<_> = app.pods.iter().map(|(pod, _)| pod.address(target)).collect();
                agent.wait_for_backends(&app.at(), &backends)?;
            }
        }
        let shop = Self { agents, control, storefront, cart, catalog, payments, names, nodes, cluster };
        shop.wait_until_carried()?;
        Ok(shop)
    }

    /// Its services.
    pub(super) fn apps(&self) -> [&App; 4] {
        [&self.cart, &self.catalog, &self.payments, &self.names]
    }

    /// Waits until what leaves node-1 goes under mutual TLS: both ends have their certificates, and each node knows that the other's agent
    /// has joined.
    pub(super) fn wait_until_carried(&self) -> Result<()> {
        for agent in &self.agents {
            let here = |pod: &&Pod| pod.node().name() == agent.node().name();
            let pods = self.apps().into_iter().flat_map(|app| &app.pods).map(|(pod, _)| pod);
            let names: Vec<_> =
                pods.chain([&self.storefront]).filter(here).map(|pod| pod.name.as_str()).collect();
            agent.wait_for_proxies(&names)?;
        }
        let far = self.catalog.pods[2].0.address(9000);
        until("connections to node-2 are carried under mutual TLS", PATIENCE, || {
            let before = self.agents[0].reason("proxied")?;
            let seen = peer::connect(&self.storefront, &far).run()?;
            ensure!(self.agents[0].reason("proxied")? > before && seen.failed.is_empty(), "{seen:?}");
            Ok(())
        })
    }
}
