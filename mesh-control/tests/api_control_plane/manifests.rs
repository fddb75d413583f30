//! Manifests as tests write them.

pub(crate) const WEB: &str = "shop/web.shop.svc.cluster.local";

/// Several documents in one file.
pub(crate) fn file(documents: &[String]) -> String {
    documents.join("---\n")
}

/// A service of the namespace `shop`; `spec` is added to its spec in flow style.
pub(crate) fn service(name: &str, spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n")
}

/// `web` at 10.96.0.1:80, serving 8080 of the pods labelled `app: web`.
pub(crate) fn web() -> String {
    service(
        "web",
        "clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]",
    )
}

/// A ready pod labelled `app: web` on `node-a`; `more` is added to its status.
pub(crate) fn pod(name: &str, ip: &str) -> String {
    pod_with(name, ip, "", "", "True")
}

pub(crate) fn pod_with(name: &str, ip: &str, meta: &str, spec: &str, ready: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: shop, uid: uid-{name}, labels: {{app: web}}{meta}}}\n\
         spec: {{nodeName: node-a, serviceAccountName: web{spec}}}\n\
         status: {{phase: Running, podIP: {ip}, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: '{ready}'}}]}}\n"
    )
}

/// A slice of `web`: endpoints and ports in flow style.
pub(crate) fn slice(name: &str, family: &str, endpoints: &[String], ports: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: {family}\nendpoints: [{}]\nports: [{ports}]\n",
        endpoints.join(", ")
    )
}

/// An endpoint without a pod.
pub(crate) fn endpoint(ip: &str) -> String {
    format!("{{addresses: ['{ip}']}}")
}

/// An endpoint that stands for a pod, with conditions.
pub(crate) fn pod_endpoint(pod: &str, ip: &str, conditions: &str) -> String {
    format!(
        "{{addresses: ['{ip}'], conditions: {{{conditions}}}, targetRef: {{kind: Pod, namespace: shop, name: {pod}}}}}"
    )
}

pub(crate) fn node(name: &str, zone: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: \
         {{topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: {zone}}}}}\n"
    )
}

/// The name of a pod's resource.
pub(crate) fn pod_uid(name: &str) -> String {
    format!("Kubernetes//Pod/shop/{name}")
}

pub(crate) fn slice_uid(slice: &str, ip: &str) -> String {
    format!("Kubernetes/discovery.k8s.io/EndpointSlice/shop/{slice}/{ip}")
}

/// A policy of the namespace `shop`; its spec in flow style.
pub(crate) fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
    )
}

pub(crate) fn peers(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
    )
}
