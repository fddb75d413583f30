//! Flags of the node proxy.

use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::Duration;

use clap::Args;

use super::ConfigError;
use crate::proxy::congestion::Congestion;
use crate::proxy::limits::Limits;
use crate::proxy::tls::Protocol;

/// Flags of the node proxy. Limits hold for each pod and each side (connections of the pod, connections to it), so that no pod can
/// starve its node.
#[derive(Debug, Clone, Args)]
pub struct ProxyArgs {
    /// What tunnels to other nodes speak, the best first: stream (between agents of this mesh), hbone (ztunnel's)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "stream,hbone")]
    pub tunnel_protocols: Vec<Protocol>,
    /// Congestion control of connections to other nodes' proxies, as Linux names it: cubic, bbr, … [default: the one that the pod's network
    /// namespace has]
    #[arg(long, value_name = "NAME")]
    pub tunnel_congestion_control: Option<Congestion>,
    /// Certificates of peers that were revoked: lists in PEM, or one in DER; read anew when the file changes. One that cannot be used refuses every
    /// peer
    #[arg(long, env = "MESH_CRL", value_name = "FILE")]
    pub crl: Option<PathBuf>,
    /// Connections that a stopping agent lets end by themselves are reset after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub drain_timeout: f64,
    /// Connections to an endpoint that has gone are ended after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub endpoint_grace: f64,
    /// Threads that carry connections [default: one for each processor, 4 at most]
    #[arg(long, value_name = "N")]
    pub proxy_threads: Option<usize>,
    /// A thread that has just passed on a short message looks for the next one for up to so many microseconds before it sleeps, as long as that
    /// pays: round trips are shorter, at the price of processor time; 0 never does
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 100)]
    pub proxy_busy_poll: u64,
    /// Most connections of a pod through the proxy, and most to it
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub proxy_max_connections: usize,
    /// Most handshakes of a pod at a time, an eighth of them with one address; more of them wait
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub proxy_max_handshakes: usize,
    /// Most memory of a pod's busy connections, in MiB; more of them go on with small buffers
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub proxy_buffers: usize,
    /// Most tunnels of a pod that wait for the next connection; of those that connections share (hbone), as many wait as were needed
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub proxy_max_idle_tunnels: usize,
    /// A tunnel waits so many seconds for the next connection
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0)]
    pub proxy_idle_timeout: f64,
    /// A connection to a node or to an application takes at most so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub proxy_connect_timeout: f64,
}

/// The node proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    /// What tunnels speak, the best first.
    pub protocols: Vec<Protocol>,
    /// Congestion control of tunnels.
    pub tunnel_congestion: Congestion,
    /// Revocation lists.
    pub crl: Option<PathBuf>,
    /// How long a stopping agent waits for connections.
    pub drain_timeout: Duration,
    /// How long connections to an endpoint that has gone may go on.
    pub endpoint_grace: Duration,
    /// Threads that carry connections.
    pub threads: usize,
    /// How long these look for the next event before they sleep.
    pub busy_poll: Duration,
    /// What each side of a pod may use.
    pub limits: Limits,
}

/// Longest time of a flag, so that no sum of them overflows.
const LONGEST: f64 = 86_400.0;
/// More permits than this, a semaphore does not have; no node has memory for as many connections.
const MOST: usize = 1 << 24;
/// Threads, when the user does not say how many: more would mostly sleep, and cost memory all the same.
const THREADS: usize = 4;
const MOST_THREADS: usize = 1024;
/// Microseconds; looking for longer saves nothing that anybody would notice.
const LONGEST_BUSY_POLL: u64 = 10_000;

impl ProxyArgs {
    pub(super) fn validate(&self) -> Result<ProxyConfig, ConfigError> {
        let time = |flag, seconds: f64| match Duration::try_from_secs_f64(seconds) {
            Ok(time) if seconds <= LONGEST => Ok(time),
            Ok(_) | Err(_) => {
                Err(ConfigError { flag, reason: format!("{seconds} is not between 0 and {LONGEST} seconds") })
            }
        };
        let positive = |flag, seconds| match time(flag, seconds)? {
            Duration::ZERO => Err(ConfigError { flag, reason: "0 leaves no time for anything".to_owned() }),
            some => Ok(some),
        };
        let most = |flag, least: usize, number: usize| {
            let reason = || format!("{number} is not between {least} and {MOST}");
            if (least..=MOST).contains(&number) {
                Ok(number)
            } else {
                Err(ConfigError { flag, reason: reason() })
            }
        };
        let protocols = self.tunnel_protocols.clone();
        if (1..protocols.len()).any(|at| protocols[..at].contains(&protocols[at])) {
            let reason = "names a protocol twice".to_owned();
            return Err(ConfigError { flag: "--tunnel-protocols", reason });
        }
        let tunnel_congestion = self.tunnel_congestion_control.clone().unwrap_or_default();
        // Before anything is loaded or changed.
        tunnel_congestion.check().map_err(|error| ConfigError {
            flag: "--tunnel-congestion-control",
            reason: error.to_string(),
        })?;
        Ok(ProxyConfig {
            protocols,
            tunnel_congestion,
            crl: self.crl.clone(),
            drain_timeout: time("--drain-timeout", self.drain_timeout)?,
            endpoint_grace: time("--endpoint-grace", self.endpoint_grace)?,
            threads: match self.proxy_threads {
                Some(threads @ 1..=MOST_THREADS) => threads,
                Some(threads) => {
                    let reason = format!("{threads} is not between 1 and {MOST_THREADS}");
                    return Err(ConfigError { flag: "--proxy-threads", reason });
                }
                None => available_parallelism().map_or(1, usize::from).min(THREADS),
            },
            busy_poll: match self.proxy_busy_poll {
                micros @ 0..=LONGEST_BUSY_POLL => Duration::from_micros(micros),
                micros => {
                    let reason = format!("{micros} is not between 0 and {LONGEST_BUSY_POLL} microseconds");
                    return Err(ConfigError { flag: "--proxy-busy-poll", reason });
                }
            },
            limits: Limits {
                connections: most("--proxy-max-connections", 1, self.proxy_max_connections)?,
                handshakes: most("--proxy-max-handshakes", 1, self.proxy_max_handshakes)?,
                buffers: most("--proxy-buffers", 0, self.proxy_buffers)? << 20,
                idle_tunnels: most("--proxy-max-idle-tunnels", 0, self.proxy_max_idle_tunnels)?,
                idle_timeout: positive("--proxy-idle-timeout", self.proxy_idle_timeout)?,
                connect_timeout: positive("--proxy-connect-timeout", self.proxy_connect_timeout)?,
                ..Limits::default()
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        proxy: ProxyArgs,
    }

    fn check(flags: &[&str]) -> Result<ProxyConfig, String> {
        let flags = Flags::try_parse_from([&["test"], flags].concat()).map_err(|error| error.to_string())?;
        flags.proxy.validate().map_err(|error| error.to_string())
    }

    #[test]
    fn without_flags_the_limits_are_the_defaults() {
        let config = check(&[]).unwrap();
        assert_eq!(config.limits, Limits::default());
        assert_eq!(config.protocols, [Protocol::Stream, Protocol::H2]);
        assert_eq!(config.drain_timeout, Duration::from_secs(5));
        assert_eq!(config.busy_poll, Duration::from_micros(100));
    }

    #[test]
    fn a_flag_that_cannot_be_used_is_named() {
        for (flag, value) in [
            ("--drain-timeout", "-1"),
            ("--drain-timeout", "nan"),
            ("--endpoint-grace", "inf"),
            ("--proxy-idle-timeout", "0"),
            ("--proxy-connect-timeout", "1e9"),
            ("--proxy-max-connections", "0"),
            ("--proxy-threads", "0"),
            ("--proxy-threads", "99999"),
            ("--proxy-busy-poll", "10001"),
            ("--proxy-busy-poll", "-1"),
            ("--tunnel-protocols", ""),
            ("--tunnel-protocols", "h2"),
            ("--tunnel-congestion-control", "a name with spaces"),
            ("--tunnel-congestion-control", "not_there"),
            ("--tunnel-protocols", "hbone,stream,hbone"),
            ("--proxy-max-handshakes", "99999999999"),
        ] {
            let error = check(&[&format!("{flag}={value}")]).unwrap_err();
            assert!(error.contains(flag), "{error}");
        }
        assert_eq!(check(&["--drain-timeout=0"]).unwrap().drain_timeout, Duration::ZERO);
        assert_eq!(check(&["--tunnel-protocols", "hbone"]).unwrap().protocols, [Protocol::H2]);
        assert_eq!(check(&["--proxy-buffers=1"]).unwrap().limits.buffers, 1 << 20);
    }
}
