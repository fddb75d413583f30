//! A cluster on one machine: nodes and pods made of network namespaces and cgroups, with real processes inside.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use mesh_harness::{Cluster, peer};
//! let cluster = Cluster::start()?;
//! let node = cluster.node("z1")?;
//! let (server, client) = (node.pod("server")?, node.pod("client")?);
//! let _echo = peer::tcp_echo(&server, "server", 8080)?;
//! let report = peer::connect(&client, &server.address(8080)).count(10).run()?;
//! assert_eq!(report.of("server"), 10);
//! # Ok(())
//! # }
//! ```

pub mod agent;
pub mod binaries;
pub mod capture;
pub mod cgroup;
pub mod clock;
pub mod cluster;
pub mod control;
pub mod hbone;
pub mod http;
pub mod manifest;
pub mod netns;
pub mod node;
pub mod peer;
pub mod pod;
pub mod process;
pub mod report;
pub mod site;
pub mod skip;
pub mod sys;
pub mod wait;

pub use agent::{Agent, AgentOptions};
pub use capture::Capture;
pub use clock::Clock;
pub use cluster::Cluster;
pub use control::{Control, ControlOptions};
pub use manifest::{Algorithm, Endpoint, Service};
pub use node::Node;
pub use pod::Pod;
pub use wait::until;

/// Tells the person at the terminal, past the capture of test output.
pub fn say(text: &str) {
    use std::io::Write;
    // Without a terminal there is no one to tell.
    drop(writeln!(std::io::stderr(), "{text}"));
}
