//! How the servers of the control plane are reached.

use std::path::PathBuf;

use rustls::pki_types::ServerName;
use tonic::transport::Uri;

use super::{ConfigError, NodeConfig, RunArgs, absolute};

/// How to reach the control plane.
#[derive(Debug, Clone)]
pub struct XdsConfig {
    /// Where services and workloads come from.
    pub server: ServerConfig,
    /// Where certificates come from.
    pub authority: ServerConfig,
    /// The node that asks.
    pub node: NodeConfig,
}

/// One server of the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Its URL, `https://HOST:PORT`.
    pub address: Uri,
    /// The name that its certificate has to be for.
    pub name: ServerName<'static>,
    /// Roots that vouch for it, PEM.
    pub root: PathBuf,
    /// Token to show it.
    pub token: Option<PathBuf>,
}

impl RunArgs {
    /// The control plane, if there is one.
    pub(super) fn xds(&self, node: &NodeConfig) -> Result<Option<XdsConfig>, ConfigError> {
        let Some(url) = &self.control_plane else {
            return match &self.ca_address {
                Some(_) => Err(ConfigError {
                    flag: "--ca-address",
                    reason: "there is no --control-plane, which says whose certificates are needed"
                        .to_owned(),
                }),
                None => Ok(None),
            };
        };
        let address = https("--control-plane", url)?;
        let Some(root) = &self.control_plane_root else {
            return Err(ConfigError {
                flag: "--control-plane-root",
                reason: "missing; name a file with the root certificates that vouch for --control-plane"
                    .to_owned(),
            });
        };
        let name = match &self.control_plane_name {
            Some(name) => server_name("--control-plane-name", name)?,
            None => server_name("--control-plane", host(&address))?,
        };
        let server = ServerConfig {
            address,
            name,
            root: absolute("--control-plane-root", root)?,
            token: self.token_file.as_deref().map(|path| absolute("--token-file", path)).transpose()?,
        };
        let authority = match &self.ca_address {
            Some(url) => {
                let address = https("--ca-address", url)?;
                let name = server_name("--ca-address", host(&address))?;
                ServerConfig { address, name, ..server.clone() }
            }
            None => server.clone(),
        };
        Ok(Some(XdsConfig { server, authority, node: node.clone() }))
    }
}

/// As istiod wants it: it refuses streams of any other form.
pub(super) fn node_id(id: &str) -> Result<String, ConfigError> {
    let wrong = |reason: &str| Err(ConfigError { flag: "--node-id", reason: format!("{id:?}: {reason}") });
    if !id.chars().all(|c| c.is_ascii_graphic()) {
        return wrong("holds a space, a control character, or what is not ASCII");
    }
    match id.split('~').collect::<Vec<_>>().as_slice() {
        ["sidecar" | "router" | "waypoint" | "ztunnel", ip, name, domain] => {
            if ip.parse::<std::net::IpAddr>().is_err() {
                return wrong("its second part is no IP address");
            }
            if name.is_empty() || domain.is_empty() {
                return wrong("a part is empty");
            }
            Ok(id.to_owned())
        }
        _ => {
            wrong("wanted sidecar, router, waypoint or ztunnel, and three more parts, with '~' between them")
        }
    }
}

fn https(flag: &'static str, url: &str) -> Result<Uri, ConfigError> {
    let wrong = |reason: String| ConfigError { flag, reason };
    let uri: Uri = url.parse().map_err(|error| wrong(format!("{url:?}: {error}")))?;
    match uri.scheme_str() {
        Some("https") => {}
        Some("http") => {
            return Err(wrong(format!(
                "{url:?}: nothing is sent without TLS, write https (and see --control-plane-root)"
            )));
        }
        Some(other) => return Err(wrong(format!("{url:?}: scheme {other:?} is not supported, use https"))),
        None => return Err(wrong(format!("{url:?} has no scheme, write https://{url}"))),
    }
    if host(&uri).is_empty() {
        return Err(wrong(format!("{url:?} names no host")));
    }
    let plain = matches!(uri.path_and_query().map(|path| path.as_str()), None | Some("/"));
    if !plain || uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(wrong(format!("{url:?} holds more than scheme, host and port")));
    }
    Ok(uri)
}

/// Host of a URL, an IPv6 address without its brackets.
fn host(uri: &Uri) -> &str {
    uri.host().unwrap_or_default().trim_matches(['[', ']'])
}

fn server_name(flag: &'static str, name: &str) -> Result<ServerName<'static>, ConfigError> {
    let wrong = |error| ConfigError { flag, reason: format!("{name:?}: {error}") };
    ServerName::try_from(name.to_owned()).map_err(wrong)
}
