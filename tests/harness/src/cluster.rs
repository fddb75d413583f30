//! The cluster: a fabric that routes between nodes, nodes that route to their pods, all in namespaces of its own.
//!
//! Nothing touches the machine's own network, so every cluster uses the same addresses. Node `i` has
//! 172.16.i.2 and `fd00:ffff:i::2`, its pods 10.(100+i).0.0/16 and `fd00:(100+i)::/64`. Neighbours are static:
//! nothing waits for ARP or duplicate address detection. Service addresses (10.96.0.0/16, `fd00:96::/64` by
//! custom) are routed nowhere: a client outside the mesh is told so at once.

use std::cell::Cell;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;

use crate::binaries;
use crate::control::{Control, ControlOptions};
use crate::manifest::Manifests;
use crate::netns::Netns;
use crate::node::Node;
use crate::process::{Process, Surroundings};
use crate::site::Site;

/// Nodes, a directory of manifests, and a place for a control plane.
#[derive(Debug)]
pub struct Cluster {
    site: Rc<Site>,
    nodes: Cell<u8>,
    manifests: Manifests,
}

impl Cluster {
    /// An empty cluster; it disappears with its last node and pod.
    pub fn start() -> anyhow::Result<Self> {
        Self::new(false)
    }

    /// A cluster that stays when this process ends, until [`crate::site::remove`].
    pub fn start_to_keep() -> anyhow::Result<Self> {
        Self::new(true)
    }

    fn new(kept: bool) -> anyhow::Result<Self> {
        let site = Rc::new(Site::take(kept)?);
        let manifests = Manifests::new(site.dir().join("manifests"));
        Ok(Self { site, nodes: Cell::new(0), manifests })
    }

    /// `mesh-test-PID-N`, the name on everything it occupies.
    pub fn id(&self) -> &str {
        self.site.id()
    }

    /// The namespace between the nodes.
    pub fn fabric(&self) -> &Netns {
        self.site.fabric()
    }

    /// Directory for logs, sockets, state.
    pub fn dir(&self) -> PathBuf {
        self.site.dir().to_owned()
    }

    /// What the control plane reads.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Adds a node in `zone` (of region `r1`), named `node-1`, `node-2`, …, and announces it.
    pub fn node(&self, zone: &str) -> anyhow::Result<Rc<Node>> {
        let index = self.nodes.get() + 1;
        self.nodes.set(index);
        let netns = Netns::create()?;
        self.wire(index, &netns)?;
        let node = Node::new(Rc::clone(&self.site), index, zone, netns)?;
        self.manifests.put(node.name(), &[node.manifest()])?;
        Ok(Rc::new(node))
    }

    /// Starts a control plane over the manifests.
    pub fn control(&self) -> anyhow::Result<Control> {
        Control::start(Rc::clone(&self.site), &ControlOptions::default())
    }

    /// Starts a control plane otherwise than usual.
    pub fn control_with(&self, options: &ControlOptions) -> anyhow::Result<Control> {
        Control::start(Rc::clone(&self.site), options)
    }

    /// A TCP relay in the fabric, from `port` to address `to`; `how` is one of `mesh-peer relay --help`.
    pub fn relay(&self, port: u16, to: &str, how: &[&str]) -> anyhow::Result<Process> {
        let mut command = Command::new(binaries::find("mesh-peer")?);
        command.args(["relay", "--listen", &format!("0.0.0.0:{port}"), "--to", to]).args(how);
        let cgroup = self.site.cgroup().join("relay");
        std::fs::create_dir_all(&cgroup)?;
        let log = self.site.dir().join("relay.log");
        let at = Surroundings { netns: self.fabric(), cgroup: &cgroup, log: &log, persistent: false };
        let mut process = Process::start("relay", command, at, true)?;
        process.line()?;
        Ok(process)
    }

    fn wire(&self, index: u8, node: &Netns) -> anyhow::Result<()> {
        let (link, pods) = (format!("node{index}"), 100 + u16::from(index));
        let (ours, theirs) = (format!("02:00:00:00:{index:02x}:01"), format!("02:00:00:00:{index:02x}:02"));
        let mut fabric = String::new();
        let path = node.path();
        writeln!(
            fabric,
            "link add {link} address {ours} type veth peer name up0 address {theirs} netns {path}\n\
             address add 172.16.{index}.1/24 dev {link}\n\
             address add fd00:ffff:{index}::1/64 dev {link} nodad\n\
             link set {link} up\n\
             neighbour add 172.16.{index}.2 lladdr {theirs} dev {link} nud permanent\n\
             neighbour add fd00:ffff:{index}::2 lladdr {theirs} dev {link} nud permanent\n\
             route add 10.{pods}.0.0/16 via 172.16.{index}.2\n\
             route add fd00:{pods}::/64 via fd00:ffff:{index}::2 dev {link}",
            path = path.display()
        )?;
        self.fabric().ip_batch(&fabric)?;
        node.ip_batch(&format!(
            "link set up0 up\n\
             address add 172.16.{index}.2/24 dev up0\n\
             address add fd00:ffff:{index}::2/64 dev up0 nodad\n\
             neighbour add 172.16.{index}.1 lladdr {ours} dev up0 nud permanent\n\
             neighbour add fd00:ffff:{index}::1 lladdr {ours} dev up0 nud permanent\n\
             route add default via 172.16.{index}.1\n\
             route add default via fd00:ffff:{index}::1 dev up0\n"
        ))
    }
}

/// The address of the fabric, and of what runs there, as node `index` reaches it.
pub(crate) fn fabric_address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 16, index, 1)
}

/// The addresses of node `index`.
pub(crate) fn node_addresses(index: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0xffff, hex_digits(index.into()), 0, 0, 0, 0, 2);
    [Ipv4Addr::new(172, 16, index, 2).into(), v6.into()]
}

/// The addresses of pod number `pod` on node `index`.
pub(crate) fn pod_addresses(index: u8, pod: u16) -> [IpAddr; 2] {
    let [high, low] = (pod + 1).to_be_bytes();
    let v6 = Ipv6Addr::new(0xfd00, hex_digits(100 + u16::from(index)), 0, 0, 0, 0, 0, pod + 1);
    [Ipv4Addr::new(10, 100 + index, high, low).into(), v6.into()]
}

/// The number whose hexadecimal digits read as `decimal` does: addresses above are written with decimal digits.
fn hex_digits(decimal: u16) -> u16 {
    let digit = |power: u32| (decimal / 10_u16.pow(power) % 10) << (4 * power);
    (0..4).map(digit).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_are_configured() {
        assert_eq!(pod_addresses(2, 5).map(|ip| ip.to_string()), ["10.102.0.6", "fd00:102::6"]);
        assert_eq!(node_addresses(12).map(|ip| ip.to_string()), ["172.16.12.2", "fd00:ffff:12::2"]);
    }
}
