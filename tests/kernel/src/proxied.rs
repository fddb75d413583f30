//! `connect` towards workloads of the mesh: to the node proxy, direct, or not at all; and what `connection` and `peername` do for it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use mesh_common::abi::{Algorithm, Caller, Denial, Endpoint, Peer, Protocol, Proxy, Reason, Socket, Verdict};

use crate::link;
use crate::runner::Test;
use crate::sandbox::{Sandbox, endpoint, key};
use crate::traffic::{HOST4, HOST6, Listeners, VIP4, VIP6, connect, refused, through_ipv6};

/// The tests of this way.
pub const TESTS: &[Test] = &[
    Test { name: "proxied::ipv4_to_a_workload_of_another_node_comes_to_the_proxy", run: ipv4 },
    Test { name: "proxied::ipv6_to_a_workload_of_another_node_comes_to_the_proxy", run: ipv6 },
    Test { name: "proxied::ipv4_through_ipv6_comes_to_the_proxy", run: mapped },
    Test { name: "proxied::a_workload_that_is_dialled_itself_comes_to_the_proxy", run: no_service },
    Test { name: "proxied::without_a_live_and_ready_proxy_policy_says_what_happens", run: without_proxy },
    Test { name: "proxied::policy_refuses_in_connect", run: denied },
    Test { name: "proxied::a_verdict_on_a_port_comes_before_the_one_on_all_others", run: ports },
    Test {
        name: "proxied::a_missing_verdict_refuses_on_this_node_and_is_the_proxys_elsewhere",
        run: missing,
    },
    Test { name: "proxied::ports_of_the_proxy_are_refused", run: reserved },
    Test { name: "proxied::a_workload_of_this_node_is_told_who_calls", run: caller },
    Test { name: "proxied::a_pod_that_calls_itself_is_left_alone", run: itself },
    Test { name: "proxied::whoever_is_no_workload_is_left_alone", run: nobody },
    Test { name: "proxied::a_server_sees_the_client_behind_the_proxy", run: behind },
    Test { name: "proxied::between_application_and_proxy_nothing_is_paced", run: unpaced },
];

const FAR4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 7));
const FAR6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 7));
const OURS: u64 = 5;
const THEIRS: u64 = 8;
/// A set of policies.
const SET: u32 = 3;

/// A peer on another node, a proxy that is alive and ready, and its listener for this family.
fn scene(sandbox: &mut Sandbox, far: IpAddr, policies: u32) -> Result<TcpListener> {
    sandbox.become_workload(OURS)?;
    sandbox.peer(far, Peer { workload: THEIRS, flags: Peer::MESHED, policies })?;
    sandbox.proxy(OURS, link::cookie()?, Proxy::READY, HOST4, HOST6)?;
    sandbox.node(true, 0, 0)?;
    let host = if far.is_ipv4() { HOST4 } else { HOST6 };
    TcpListener::bind((host, Proxy::OUTBOUND)).context("cannot listen as the proxy")
}

fn ipv4(sandbox: &mut Sandbox) -> Result<()> {
    comes(sandbox, FAR4, VIP4, |address| address)
}

fn ipv6(sandbox: &mut Sandbox) -> Result<()> {
    comes(sandbox, FAR6, VIP6, |address| address)
}

fn mapped(sandbox: &mut Sandbox) -> Result<()> {
    comes(sandbox, FAR4, VIP4, through_ipv6)
}

fn comes(
    sandbox: &mut Sandbox,
    far: IpAddr,
    vip: IpAddr,
    written: fn(SocketAddr) -> SocketAddr,
) -> Result<()> {
    let proxy = scene(sandbox, far, 0)?;
    let (vip, backend) = (SocketAddr::new(vip, 80), SocketAddr::new(far, 8080));
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &[backend])?;
    let client = connect(written(vip))?;
    ensure!(client.peer_addr()? == written(vip), "the peer shows as {}", client.peer_addr()?);
    let (accepted, from) = proxy.accept()?;
    ensure!(from.ip() == accepted.local_addr()?.ip(), "the source is {from}, not the pod's own address");
    let original = sandbox.original(link::cookie()?, from)?.context("the proxy is told nothing")?;
    ensure!(original.workload == OURS && original.service == 1, "told {original:?}");
    ensure!(original.dialled == endpoint(vip) && original.chosen == endpoint(backend), "told {original:?}");
    let record = sandbox.record(&client)?.context("the socket has no record")?;
    ensure!(record.flags & Socket::PROXIED != 0, "the record is {record:?}");
    ensure!(sandbox.reason(Reason::Proxied)? == 1, "counted {} times", sandbox.reason(Reason::Proxied)?);
    ensure!(sandbox.open(1, 0)? == 1, "the backend has {} connections", sandbox.open(1, 0)?);
    Ok(())
}

fn no_service(sandbox: &mut Sandbox) -> Result<()> {
    let proxy = scene(sandbox, FAR4, 0)?;
    let far = SocketAddr::new(FAR4, 8080);
    let client = connect(far)?;
    let (_, from) = proxy.accept()?;
    let original = sandbox.original(link::cookie()?, from)?.context("the proxy is told nothing")?;
    ensure!(
        original.service == 0 && original.dialled == endpoint(far) && original.chosen == endpoint(far),
        "told {original:?}"
    );
    ensure!(client.peer_addr()? == far, "the peer shows as {}", client.peer_addr()?);
    // What is no longer a workload's is dialled as it is, by a new socket and by one that was noted before.
    ensure!(sandbox.original(link::cookie()?, SocketAddr::new(HOST4, 1))?.is_none(), "told of nothing");
    Ok(())
}

fn without_proxy(sandbox: &mut Sandbox) -> Result<()> {
    let _proxy = scene(sandbox, FAR4, 0)?;
    let far = SocketAddr::new(FAR4, 8080);
    let cookie = link::cookie()?;
    let direct = || -> Result<()> {
        // There is no route, so what goes direct fails, but not as a refusal.
        let error = TcpStream::connect(far).err().context("reached a workload that does not exist")?;
        ensure!(error.raw_os_error() == Some(libc::ENETUNREACH), "not direct: {error}");
        Ok(())
    };
    let guarded = Peer { workload: THEIRS, flags: Peer::MESHED, policies: SET };
    let open = Peer { policies: 0, ..guarded };
    // Allowed by policy, so that what refuses is the missing proxy alone.
    sandbox.verdict(OURS, SET, 0, 4, Verdict::ALLOW)?;

    sandbox.node(false, 0, 0)?;
    direct()?;
    ensure!(sandbox.reason(Reason::ProxyDeadDirect)? == 1, "a dead proxy, no policy: not counted");
    sandbox.peer(FAR4, guarded)?;
    refused(TcpStream::connect(far))?;
    ensure!(sandbox.reason(Reason::ProxyDead)? == 1, "a dead proxy, policy: not counted");

    sandbox.node(true, 0, 0)?;
    sandbox.proxy(OURS, cookie, 0, HOST4, HOST6)?;
    refused(TcpStream::connect(far))?;
    ensure!(sandbox.reason(Reason::ProxyNotReady)? == 1, "not ready, policy: not counted");
    sandbox.peer(FAR4, open)?;
    direct()?;
    ensure!(sandbox.reason(Reason::ProxyNotReadyDirect)? == 1, "not ready, no policy: not counted");
    Ok(())
}

fn denied(sandbox: &mut Sandbox) -> Result<()> {
    let _proxy = scene(sandbox, FAR4, SET)?;
    let vip = SocketAddr::new(VIP4, 80);
    let backend = SocketAddr::new(FAR4, 8080);
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &[backend])?;
    sandbox.verdict(OURS, SET, 0, 4, Verdict::DENY)?;
    refused(TcpStream::connect(vip))?;
    ensure!(sandbox.reason(Reason::Denied)? == 1, "counted {} times", sandbox.reason(Reason::Denied)?);
    let told = sandbox.denials()?;
    let expected = Denial {
        source_workload: OURS,
        destination_workload: THEIRS,
        source: Endpoint::default(),
        destination: endpoint(backend),
        policies: SET,
        verdict: Verdict { policy: 7, rule: 3, action: Verdict::DENY },
        side: Denial::CLIENT,
    };
    ensure!(told == [expected], "told {told:?}");
    Ok(())
}

fn ports(sandbox: &mut Sandbox) -> Result<()> {
    let _proxy = scene(sandbox, FAR4, SET)?;
    sandbox.verdict(OURS, SET, 0, 4, Verdict::ALLOW)?;
    sandbox.verdict(OURS, SET, 8080, 4, Verdict::DENY)?;
    refused(TcpStream::connect((FAR4, 8080)))?;
    connect((FAR4, 8081).into())?;
    // A verdict for the other family, or on somebody else, is none.
    sandbox.verdict(OURS, SET, 8081, 6, Verdict::DENY)?;
    sandbox.verdict(OURS + 1, SET, 8081, 4, Verdict::DENY)?;
    connect((FAR4, 8081).into())?;
    Ok(())
}

fn missing(sandbox: &mut Sandbox) -> Result<()> {
    let _proxy = scene(sandbox, FAR4, SET)?;
    connect((FAR4, 8080).into())?;
    sandbox.peer(FAR4, Peer { workload: THEIRS, flags: Peer::LOCAL, policies: SET })?;
    refused(TcpStream::connect((FAR4, 8080)))?;
    ensure!(sandbox.reason(Reason::NoVerdict)? == 1, "counted {} times", sandbox.reason(Reason::NoVerdict)?);
    ensure!(sandbox.denials()?.len() == 1, "it was not told");
    Ok(())
}

fn reserved(sandbox: &mut Sandbox) -> Result<()> {
    let _proxy = scene(sandbox, FAR4, 0)?;
    for flags in [Peer::MESHED, Peer::LOCAL] {
        sandbox.peer(FAR4, Peer { workload: THEIRS, flags, policies: 0 })?;
        for port in [Proxy::OUTBOUND, Proxy::PLAIN] {
            refused(TcpStream::connect((FAR4, port)))?;
        }
        let error = TcpStream::connect((FAR4, Proxy::TUNNEL)).err().context("reached what does not exist")?;
        ensure!(error.raw_os_error() == Some(libc::ENETUNREACH), "tunnels are for proxies to dial: {error}");
    }
    ensure!(sandbox.reason(Reason::ReservedPort)? == 4, "not counted");
    Ok(())
}

fn caller(sandbox: &mut Sandbox) -> Result<()> {
    for (host, vip, written) in [
        (HOST4, VIP4, (|address| address) as fn(SocketAddr) -> SocketAddr),
        (HOST6, VIP6, |address| address),
        (HOST4, VIP4, through_ipv6),
    ] {
        let listeners = Listeners::at(host, 1)?;
        let backend = listeners.addresses()?[0];
        sandbox.peer(host, Peer { workload: THEIRS, flags: Peer::LOCAL, policies: 0 })?;
        sandbox.service(1, key((vip, 80).into(), Protocol::Tcp), Algorithm::WeightedRandom, &[backend])?;
        let cookie = link::cookie()?;
        for (workload, node, told) in
            [(0, cookie, Some(0)), (0, cookie + 1, Some(Caller::STRANGER)), (OURS, 0, Some(OURS))]
        {
            if workload != 0 {
                sandbox.become_workload(workload)?;
            }
            sandbox.node(false, node, 0)?;
            for dialled in [SocketAddr::new(vip, 80), backend] {
                let _client = connect(written(dialled))?;
                let (_, accepted) = listeners.accept()?;
                let found = sandbox.caller(accepted.peer_addr()?, backend)?.map(|caller| caller.workload);
                ensure!(found == told, "{dialled}: told {found:?} instead of {told:?}");
            }
        }
        sandbox.leave_workload()?;
    }
    Ok(())
}

fn itself(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(OURS)?;
    let listeners = Listeners::at(HOST4, 1)?;
    let backend = listeners.addresses()?[0];
    // Guarded, and with no verdict at all.
    sandbox.peer(HOST4, Peer { workload: OURS, flags: Peer::LOCAL | Peer::MESHED, policies: SET })?;
    sandbox.proxy(OURS, link::cookie()?, Proxy::READY, HOST4, HOST6)?;
    sandbox.node(true, 0, 0)?;
    let _client = connect(backend)?;
    let (_, accepted) = listeners.accept()?;
    ensure!(sandbox.caller(accepted.peer_addr()?, backend)?.is_none(), "a pod was told of itself");
    Ok(())
}

fn nobody(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.peer(FAR4, Peer { workload: THEIRS, flags: Peer::MESHED, policies: SET })?;
    sandbox.node(true, 0, 0)?;
    let error = TcpStream::connect((FAR4, 80)).err().context("reached a workload that does not exist")?;
    ensure!(error.raw_os_error() == Some(libc::ENETUNREACH), "not direct: {error}");
    Ok(())
}

fn behind(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(OURS)?;
    let cookie = link::cookie()?;
    for (host, far) in [(HOST4, FAR4), (HOST6, FAR6)] {
        let server = TcpListener::bind((host, 0))?;
        let real = SocketAddr::new(far, 4321);
        let client = socket2::Socket::new(
            socket2::Domain::for_address(server.local_addr()?),
            socket2::Type::STREAM,
            None,
        )?;
        client.bind(&SocketAddr::new(host, 0).into())?;
        let own = client.local_addr()?.as_socket().context("no address")?;
        sandbox.client(cookie, own, real)?;
        client.connect(&server.local_addr()?.into())?;
        let (accepted, from) = server.accept()?;
        ensure!(from == real && accepted.peer_addr()? == real, "accept() tells {from}");
    }
    // A listener for both families, as many servers have.
    let server = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
    server.set_only_v6(false)?;
    server.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())?;
    server.listen(1)?;
    let server: TcpListener = server.into();
    let client = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    client.bind(&SocketAddr::new(HOST4, 0).into())?;
    let real = SocketAddr::new(FAR4, 4321);
    sandbox.client(cookie, client.local_addr()?.as_socket().context("no address")?, real)?;
    client.connect(&SocketAddr::new(HOST4, server.local_addr()?.port()).into())?;
    let (_, from) = server.accept()?;
    ensure!(from == through_ipv6(real), "accept() tells {from}");
    Ok(())
}

fn unpaced(sandbox: &mut Sandbox) -> Result<()> {
    let congestion = |tcp: &TcpStream| -> Result<String> {
        let name = socket2::SockRef::from(tcp).tcp_congestion()?;
        Ok(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned())
    };
    let others = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control")?;
    let other = others.split_whitespace().find(|name| *name != Proxy::CONGESTION);
    let other = other.context("this kernel has only one congestion control")?;
    std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", other)?;
    let (within, cookie) = (Proxy::CONGESTION, link::cookie()?);
    for (host, far) in [(HOST4, FAR4), (HOST6, FAR6)] {
        let proxy = scene(sandbox, far, 0)?;
        let client = connect(SocketAddr::new(far, 8080))?;
        let (at_proxy, _) = proxy.accept()?;
        ensure!(congestion(&client)? == within, "an application has {}", congestion(&client)?);
        ensure!(congestion(&at_proxy)? == other, "what is the proxy's own to say was changed");
        // The proxy, which shows another client; then a process of the pod.
        let server = TcpListener::bind((host, 0))?;
        for (shown, expected) in [(true, within), (false, other)] {
            let domain = socket2::Domain::for_address(server.local_addr()?);
            let client = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
            client.bind(&SocketAddr::new(host, 0).into())?;
            let own = client.local_addr()?.as_socket().context("no address")?;
            if shown {
                sandbox.client(cookie, own, SocketAddr::new(far, 4321))?;
            }
            client.connect(&server.local_addr()?.into())?;
            let (accepted, _) = server.accept()?;
            ensure!(congestion(&accepted)? == expected, "a server has {}", congestion(&accepted)?);
        }
    }
    ensure!(sandbox.reason(Reason::Paced)? == 0, "it could not be set");
    Ok(())
}
