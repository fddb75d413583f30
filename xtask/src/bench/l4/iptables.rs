//! kube-proxy's rules in iptables mode, as it writes them for ClusterIP services.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

/// A service port.
pub(super) struct Rule {
    /// `namespace/name:port`
    pub(super) name: String,
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) endpoints: Vec<SocketAddr>,
    /// `sessionAffinity: ClientIP`
    pub(super) affinity: bool,
}

/// What comes before the services: the chains of every cluster. The pods' range is not masqueraded.
const HEAD: &str = "\
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";

const HOOKS: &str = "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";

const TAIL: &str = "\
-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
";

/// Input for `iptables-restore`.
pub(super) fn rules(services: impl Iterator<Item = Rule>) -> Result<String, std::fmt::Error> {
    let (mut chains, mut rules) = (String::new(), String::new());
    for service in services {
        one(&service, &mut chains, &mut rules)?;
    }
    Ok(format!("{HEAD}{chains}{HOOKS}{rules}{TAIL}"))
}

fn one(service: &Rule, chains: &mut String, rules: &mut String) -> std::fmt::Result {
    let Rule { name, address, port, endpoints, affinity } = service;
    let portal =
        format!("-m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {address}/32 --dport {port}");
    let svc = format!("KUBE-SVC-{}", hash(name));
    writeln!(chains, ":{svc} - [0:0]")?;
    writeln!(rules, "-A KUBE-SERVICES {portal} -j {svc}")?;
    writeln!(rules, "-A {svc} {portal} ! -s 10.0.0.0/8 -j KUBE-MARK-MASQ")?;
    let seps: Vec<_> =
        endpoints.iter().map(|to| (format!("KUBE-SEP-{}", hash(&format!("{name}{to}"))), to)).collect();
    if *affinity {
        for (sep, to) in &seps {
            let recent = format!("-m recent --name {sep} --rcheck --seconds 10800 --reap");
            writeln!(rules, "-A {svc} -m comment --comment \"{name} -> {to}\" {recent} -j {sep}")?;
        }
    }
    for (i, (sep, to)) in seps.iter().enumerate() {
        writeln!(chains, ":{sep} - [0:0]")?;
        let left = seps.len() - i;
        let statistic = match left {
            1 => String::new(),
            left => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
        };
        writeln!(rules, "-A {svc} -m comment --comment \"{name} -> {to}\" {statistic}-j {sep}")?;
        writeln!(rules, "-A {sep} -m comment --comment \"{name}\" -s {}/32 -j KUBE-MARK-MASQ", to.ip())?;
        let recent = if *affinity { format!("-m recent --name {sep} --set ") } else { String::new() };
        writeln!(
            rules,
            "-A {sep} -m comment --comment \"{name}\" {recent}-m tcp -p tcp -j DNAT --to-destination {to}"
        )?;
    }
    Ok(())
}

/// Sixteen characters of base 32 that stand for `text`, as in kube-proxy's names of chains.
fn hash(text: &str) -> String {
    let fnv = |start: u64| {
        text.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    };
    let bits = u128::from(fnv(0xcbf2_9ce4_8422_2325)) << 64 | u128::from(fnv(0x9e37_79b9_7f4a_7c15));
    let digit = |i: u32| b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[(bits >> (128 - 5 * (i + 1)) & 31) as usize];
    (0..16).map(|i| char::from(digit(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_of_two_endpoints_becomes_a_chain_of_chains() -> std::fmt::Result {
        let endpoints = vec!["10.0.0.1:8080".parse().unwrap(), "10.0.0.2:8080".parse().unwrap()];
        let address = "10.96.0.1".parse().unwrap();
        let text = rules(
            [Rule { name: "default/web:http".into(), address, port: 80, endpoints, affinity: false }]
                .into_iter(),
        )?;
        assert_eq!(text.matches("--probability 0.5").count(), 1);
        assert_eq!(text.matches("-j DNAT --to-destination 10.0.0.").count(), 2);
        assert_eq!(text.matches("\n:KUBE-SEP-").count(), 2);
        assert!(text.trim_end().ends_with("-j KUBE-NODEPORTS\nCOMMIT"));
        Ok(())
    }
}
