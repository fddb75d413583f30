//! Manifests, as Kubernetes has them, and the directory from which the control plane reads them.

use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use serde_json::{Value, json};

use crate::pod::PodPlan;

/// The directory that a control plane watches. Files are replaced whole, as `kubectl` and careful editors do.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The directory.
    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    /// Writes or replaces file `name`.yaml with these documents.
    pub fn put(&self, name: &str, documents: &[Value]) -> anyhow::Result<()> {
        let documents = documents.iter().map(serde_norway::to_string).collect::<Result<Vec<_>, _>>()?;
        self.put_text(name, &documents.join("---\n"))
    }

    /// Writes or replaces file `name`.yaml with this text.
    pub fn put_text(&self, name: &str, text: &str) -> anyhow::Result<()> {
        // A hidden name beside the target: renaming within a directory is atomic.
        let draft = self.dir.join(format!(".{name}.draft"));
        fs::write(&draft, text).with_context(|| draft.display().to_string())?;
        Ok(fs::rename(&draft, self.file(name))?)
    }

    /// Removes file `name`.yaml.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        fs::remove_file(self.file(name)).with_context(|| name.to_owned())
    }

    /// Writes the manifests of pods, each in a file of its own.
    pub fn put_pods<'a>(&self, pods: impl IntoIterator<Item = &'a PodPlan>) -> anyhow::Result<()> {
        pods.into_iter().try_for_each(|pod| self.put(&format!("pod-{}", pod.name), &[pod.manifest()]))
    }

    /// Writes a service with its endpoints.
    pub fn put_service(&self, service: &Service) -> anyhow::Result<()> {
        self.put(&format!("service-{}", service.name), &service.manifests())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.yaml"))
    }
}

/// A PeerAuthentication of `namespace` with this mode; for the workloads labelled `app: APP`, if one is named.
pub fn peer_authentication(namespace: &str, name: &str, app: Option<&str>, mode: &str) -> Value {
    let mut spec = json!({"mtls": {"mode": mode}});
    if let Some(app) = app {
        spec["selector"] = json!({"matchLabels": {"app": app}});
    }
    security("PeerAuthentication", namespace, name, spec)
}

/// An AuthorizationPolicy of `namespace` with these rules; for the workloads labelled `app: APP`, if one is named.
pub fn authorization_policy(
    namespace: &str,
    name: &str,
    app: Option<&str>,
    action: &str,
    rules: &[Value],
) -> Value {
    let mut spec = json!({"action": action, "rules": rules});
    if let Some(app) = app {
        spec["selector"] = json!({"matchLabels": {"app": app}});
    }
    security("AuthorizationPolicy", namespace, name, spec)
}

fn security(kind: &str, namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    })
}

/// How a service picks a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// The default.
    WeightedRandom,
    /// In turn.
    RoundRobin,
    /// The less busy of two.
    LeastConnections,
    /// By consistent hash.
    Maglev,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A service, its endpoints and its balancing policy: one file.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name, in namespace `default`.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Who answers.
    pub endpoints: Vec<Endpoint>,
    /// `sessionAffinity: ClientIP` for this many seconds.
    pub affinity_seconds: Option<u32>,
    /// `internalTrafficPolicy: Local`.
    pub local_only: bool,
    /// `trafficDistribution`.
    pub distribution: Option<String>,
    /// `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// A TrafficPolicy with this balancer.
    pub algorithm: Option<Algorithm>,
}

/// A port of a service.
#[derive(Debug, Clone)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// The port of the service.
    pub port: u16,
    /// The port of the endpoints.
    pub target: u16,
}

/// An endpoint of a service.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Where it is.
    pub address: IpAddr,
    /// New connections may go to it.
    pub ready: bool,
    /// It still answers.
    pub serving: bool,
    /// It is on its way out.
    pub terminating: bool,
    /// Its node.
    pub node: Option<String>,
    /// Its zone.
    pub zone: Option<String>,
    /// Its pod.
    pub pod: Option<String>,
}

impl Endpoint {
    /// A ready endpoint that is nobody's pod.
    pub fn at(address: impl Into<IpAddr>) -> Self {
        let address = address.into();
        Self { address, ready: true, serving: true, terminating: false, node: None, zone: None, pod: None }
    }

    /// The IPv4 endpoint of a pod.
    pub fn of(pod: &PodPlan) -> Self {
        Self::of_pod_at(pod, pod.addresses()[0])
    }

    /// The IPv6 endpoint of a pod.
    pub fn of6(pod: &PodPlan) -> Self {
        Self::of_pod_at(pod, pod.addresses()[1])
    }

    fn of_pod_at(pod: &PodPlan, address: IpAddr) -> Self {
        let (node, zone) = (Some(pod.node().name().into()), Some(pod.node().zone().into()));
        Self { node, zone, pod: Some(pod.name.clone()), ..Self::at(address) }
    }

    /// Not ready.
    pub fn unready(self) -> Self {
        Self { ready: false, serving: false, ..self }
    }

    /// Terminating, but still serving.
    pub fn draining(self) -> Self {
        Self { ready: false, serving: true, terminating: true, ..self }
    }
}

impl Service {
    /// A service without ports and endpoints.
    pub fn new(name: &str, address: impl Into<IpAddr>) -> Self {
        Self {
            name: name.into(),
            addresses: vec![address.into()],
            ports: Vec::new(),
            endpoints: Vec::new(),
            affinity_seconds: None,
            local_only: false,
            distribution: None,
            publish_not_ready: false,
            algorithm: None,
        }
    }

    /// With a further address, of the other family.
    pub fn also_at(mut self, address: impl Into<IpAddr>) -> Self {
        self.addresses.push(address.into());
        self
    }

    /// With a TCP port.
    pub fn tcp(self, port: u16, target: u16) -> Self {
        self.port("TCP", port, target)
    }

    /// With a UDP port.
    pub fn udp(self, port: u16, target: u16) -> Self {
        self.port("UDP", port, target)
    }

    fn port(mut self, protocol: &'static str, port: u16, target: u16) -> Self {
        let name = format!("{}-{port}", protocol.to_lowercase());
        self.ports.push(Port { name, protocol, port, target });
        self
    }

    /// With these endpoints instead of those it has.
    pub fn endpoints(mut self, endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        self.endpoints = endpoints.into_iter().collect();
        self
    }

    /// With these pods as endpoints, in the families of the service's addresses.
    pub fn pods<'a>(self, pods: impl IntoIterator<Item = &'a PodPlan>) -> Self {
        let (v4, v6) = (self.has_family(false), self.has_family(true));
        let of = |pod: &'a PodPlan| [v4.then(|| Endpoint::of(pod)), v6.then(|| Endpoint::of6(pod))];
        self.endpoints(pods.into_iter().flat_map(of).flatten())
    }

    /// With a balancer.
    pub fn balanced(self, algorithm: Algorithm) -> Self {
        Self { algorithm: Some(algorithm), ..self }
    }

    /// The address that clients dial, with port `port`.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses[0], port)
    }

    fn has_family(&self, v6: bool) -> bool {
        self.addresses.iter().any(|address| address.is_ipv6() == v6)
    }

    /// Its documents: Service, EndpointSlices of both families, TrafficPolicy.
    pub fn manifests(&self) -> Vec<Value> {
        let mut documents = vec![self.service()];
        documents.extend([false, true].into_iter().filter_map(|v6| self.slice(v6)));
        documents.extend(self.algorithm.map(|algorithm| self.policy(algorithm)));
        documents
    }

    fn service(&self) -> Value {
        let port = |p: &Port| json!({"name": p.name, "protocol": p.protocol, "port": p.port, "targetPort": p.target});
        let ports: Vec<_> = self.ports.iter().map(port).collect();
        let families = self.addresses.iter().map(|ip| if ip.is_ipv6() { "IPv6" } else { "IPv4" });
        let mut spec = json!({
            "type": "ClusterIP",
            "clusterIP": self.addresses[0],
            "clusterIPs": self.addresses,
            "ipFamilies": families.collect::<Vec<_>>(),
            "selector": {"app": self.name},
            "ports": ports,
            "publishNotReadyAddresses": self.publish_not_ready,
        });
        if let Some(seconds) = self.affinity_seconds {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        if self.local_only {
            spec["internalTrafficPolicy"] = json!("Local");
        }
        if let Some(distribution) = &self.distribution {
            spec["trafficDistribution"] = json!(distribution);
        }
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": self.name, "namespace": "default"},
            "spec": spec,
        })
    }

    fn slice(&self, v6: bool) -> Option<Value> {
        let mine = self.endpoints.iter().filter(|endpoint| endpoint.address.is_ipv6() == v6);
        let endpoints: Vec<_> = mine.map(Endpoint::manifest).collect();
        if endpoints.is_empty() && !self.has_family(v6) {
            return None;
        }
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|p| json!({"name": p.name, "protocol": p.protocol, "port": p.target}))
            .collect();
        let family = if v6 { "IPv6" } else { "IPv4" };
        Some(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{}", self.name, family.to_lowercase()), "namespace": "default",
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": family,
            "ports": ports,
            "endpoints": endpoints,
        }))
    }

    fn policy(&self, algorithm: Algorithm) -> Value {
        json!({
            "apiVersion": "mesh.dev/v1alpha1", "kind": "TrafficPolicy",
            "metadata": {"name": self.name, "namespace": "default"},
            "spec": {
                "targetRefs": [{"group": "", "kind": "Service", "name": self.name}],
                "balancer": {"algorithm": algorithm.to_string()},
            },
        })
    }
}

impl Endpoint {
    fn manifest(&self) -> Value {
        let mut endpoint = json!({
            "addresses": [self.address],
            "conditions": {"ready": self.ready, "serving": self.serving, "terminating": self.terminating},
        });
        if let Some(node) = &self.node {
            endpoint["nodeName"] = json!(node);
        }
        if let Some(zone) = &self.zone {
            endpoint["zone"] = json!(zone);
        }
        if let Some(pod) = &self.pod {
            endpoint["targetRef"] = json!({"kind": "Pod", "namespace": "default", "name": pod});
        }
        endpoint
    }
}

/// A ServiceEntry with static endpoints of given weights, all on `target`.
pub fn weighted_service(
    name: &str,
    address: IpAddr,
    port: u16,
    target: u16,
    weights: &[(IpAddr, u32)],
) -> Value {
    let endpoint = |(address, weight): &(IpAddr, u32)| json!({"address": address, "weight": weight});
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "hosts": [format!("{name}.example.com")],
            "addresses": [address],
            "ports": [{"number": port, "targetPort": target, "name": "tcp", "protocol": "TCP"}],
            "location": "MESH_INTERNAL",
            "resolution": "STATIC",
            "endpoints": weights.iter().map(endpoint).collect::<Vec<_>>(),
        },
    })
}
