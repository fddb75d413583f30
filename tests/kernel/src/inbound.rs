//! `inbound`: who may connect to a workload of this node, at the workload's own network namespace.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_common::abi::{Denial, Node, Peer, Proxy, Reason, Verdict};

use crate::link::{self, ALSO_THERE4, HERE4, HERE6, THERE4, THERE6, There};
use crate::runner::Test;
use crate::sandbox::{Sandbox, endpoint};

/// The tests of this hook.
pub const TESTS: &[Test] = &[
    Test { name: "inbound::without_policies_everybody_comes_in", run: open },
    Test { name: "inbound::who_has_no_identity_is_judged_by_address", run: plain },
    Test { name: "inbound::a_listener_that_was_there_before_is_guarded", run: before },
    Test { name: "inbound::a_workload_of_this_node_is_judged_by_its_cgroup", run: caller },
    Test { name: "inbound::the_node_itself_always_comes_in", run: probe },
    Test { name: "inbound::a_former_caller_is_not_believed_of_who_comes_now", run: former },
    Test { name: "inbound::a_missing_verdict_refuses", run: missing },
    Test { name: "inbound::ports_of_the_proxy_are_closed_but_for_tunnels", run: reserved },
    Test { name: "inbound::an_address_of_no_workload_is_closed_where_policies_are_in_force", run: unknown },
    Test { name: "inbound::what_the_pod_says_to_itself_passes", run: loopback },
    Test {
        name: "inbound::where_policies_in_dry_run_apply_the_agent_is_told_of_who_is_let_in",
        run: rehearsed,
    },
    Test { name: "inbound::who_is_let_in_takes_no_room_from_denials", run: crowded },
    Test { name: "inbound::where_policies_ask_for_http_the_proxy_takes_who_is_let_in", run: steered },
    Test { name: "inbound::without_the_proxy_nobody_comes_in_where_policies_ask_for_http", run: unsteered },
    Test { name: "inbound::the_proxy_can_ask_who_called_when_the_call_is_over", run: steered_caller },
    Test {
        name: "inbound::nobody_is_led_to_the_proxy_of_another_with_the_same_address",
        run: another_listener,
    },
    Test { name: "inbound::an_established_connection_goes_on_whatever_policy_says", run: established },
];

const OURS: u64 = 5;
const THEIRS: u64 = 8;
const SET: u32 = 3;

/// A guarded namespace at the other end of a cable.
struct Scene {
    there: There,
    _link: aya::programs::links::FdLink,
}

impl Scene {
    fn enter(sandbox: &mut Sandbox) -> Result<Self> {
        let there = There::join()?;
        let link = sandbox.guard(there.namespace())?;
        Ok(Self { there, _link: link })
    }

    fn listen(&self, at: impl Into<SocketAddr>) -> Result<TcpListener> {
        let at = at.into();
        self.there.run(move || TcpListener::bind(at).context("cannot listen"))
    }
}

fn workload(policies: u32, flags: u32) -> Peer {
    Peer { workload: THEIRS, flags, policies }
}

/// That the connection is refused by a reset, not by silence: only that has this error.
fn shut(at: impl Into<SocketAddr>) -> Result<()> {
    crate::traffic::refused(TcpStream::connect_timeout(&at.into(), Duration::from_secs(10)))
}

fn reaches(server: &TcpListener) -> Result<()> {
    let client = crate::traffic::connect(server.local_addr()?)?;
    let (_, from) = server.accept()?;
    ensure!(from == client.local_addr()?, "the client shows as {from}");
    Ok(())
}

fn both() -> [(IpAddr, IpAddr, u16); 2] {
    [(THERE4, HERE4, 4), (THERE6, HERE6, 6)]
}

fn open(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    for (there, ..) in both() {
        let server = scene.listen((there, 0))?;
        reaches(&server)?;
        sandbox.peer(there, workload(0, Peer::LOCAL))?;
        reaches(&server)?;
    }
    ensure!(sandbox.denials()?.is_empty(), "something was denied");
    Ok(())
}

fn plain(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    for (there, here, _) in both() {
        let server = scene.listen((there, 0))?;
        let port = server.local_addr()?.port();
        let other = scene.listen((there, 0))?;
        sandbox.peer(there, workload(SET, 0))?;
        let all = (if here.is_ipv4() { "0.0.0.0" } else { "::" }.parse()?, 0);
        let block = (here, if here.is_ipv4() { 24 } else { 64 });
        let exact = (here, if here.is_ipv4() { 32 } else { 128 });
        // The longest prefix decides, and a port that a policy names by itself.
        sandbox.plain_verdict(SET, 0, all, Verdict::DENY)?;
        sandbox.denials()?;
        shut((there, port))?;
        let told = sandbox.denials()?;
        let [denial] = told.as_slice() else { anyhow::bail!("told {told:?}") };
        ensure!(denial.source_workload == 0 && denial.destination_workload == THEIRS, "told {denial:?}");
        ensure!(denial.destination == endpoint((there, port).into()), "told {denial:?}");
        ensure!(denial.source.address() == endpoint((here, 1).into()).address(), "told {denial:?}");
        ensure!(denial.verdict == Verdict { policy: 7, rule: 3, action: Verdict::DENY }, "told {denial:?}");
        ensure!(denial.policies == SET && denial.side == Denial::SERVER, "told {denial:?}");
        sandbox.plain_verdict(SET, 0, block, Verdict::ALLOW)?;
        reaches(&server)?;
        sandbox.plain_verdict(SET, 0, exact, Verdict::DENY)?;
        shut((there, port))?;
        sandbox.plain_verdict(SET, port, all, Verdict::ALLOW)?;
        reaches(&server)?;
        shut(other.local_addr()?)?;
    }
    ensure!(sandbox.reason(Reason::InboundAdmitted)? >= 4, "admissions are not counted");
    ensure!(
        sandbox.reason(Reason::InboundDenied)? == 6,
        "{} denials",
        sandbox.reason(Reason::InboundDenied)?
    );
    Ok(())
}

fn before(sandbox: &mut Sandbox) -> Result<()> {
    let there = There::join()?;
    let server = there.run(|| TcpListener::bind((THERE4, 0)).context("cannot listen"))?;
    sandbox.peer(THERE4, workload(SET, 0))?;
    reaches(&server)?;
    let link = sandbox.guard(there.namespace())?;
    shut(server.local_addr()?)?;
    drop(link);
    reaches(&server)
}

fn caller(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    sandbox.become_workload(OURS)?;
    for (there, here, family) in both() {
        let server = scene.listen((there, 0))?;
        let port = server.local_addr()?.port();
        sandbox.peer(there, workload(SET, Peer::LOCAL))?;
        // By its address it would come in: it is known better.
        sandbox.plain_verdict(SET, 0, (here, 0), Verdict::ALLOW)?;
        sandbox.verdict(OURS, SET, 0, family, Verdict::DENY)?;
        shut((there, port))?;
        // Refused in connect() already, so the server's side is shown with a verdict that comes in between.
        sandbox.verdict(OURS, SET, 0, family, Verdict::ALLOW)?;
        reaches(&server)?;
        sandbox.verdict(OURS, SET, port, family, Verdict::DENY)?;
        shut((there, port))?;
    }
    ensure!(sandbox.reason(Reason::InboundAdmitted)? == 2, "admissions are not counted");
    Ok(())
}

fn probe(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    sandbox.peer(THERE4, workload(SET, Peer::LOCAL))?;
    sandbox.plain_verdict(SET, 0, (HERE4, 0), Verdict::DENY)?;
    // In another namespace than the node's it would be a pod that the mesh does not know.
    sandbox.node(true, link::cookie()? + 1, 0)?;
    shut(server.local_addr()?)?;
    sandbox.node(true, link::cookie()?, 0)?;
    reaches(&server)
}

fn former(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    let to = server.local_addr()?;
    sandbox.peer(THERE4, workload(SET, Peer::LOCAL))?;
    sandbox.plain_verdict(SET, 0, (HERE4, 0), Verdict::DENY)?;
    sandbox.node(true, link::cookie()?, 0)?;
    let probe = crate::traffic::connect(to)?;
    let (accepted, from) = server.accept()?;
    ensure!(sandbox.caller(from, to)?.is_some(), "a probe is not noted");
    // The server's end first, so that the client's port does not wait.
    drop(accepted);
    drop(probe);
    crate::runner::until("the note goes with the connection", || Ok(sandbox.caller(from, to)?.is_none()))?;
    // Another from the same port, of which nobody was told (as from outside), where a note was left behind.
    sandbox.note_caller(from, to, 0, false)?;
    let stranger = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    stranger.set_reuse_address(true)?;
    stranger.bind(&from.into())?;
    sandbox.peer(THERE4, workload(SET, 0))?;
    crate::traffic::refused(stranger.connect(&to.into()))
}

fn missing(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    sandbox.peer(THERE4, workload(SET, 0))?;
    sandbox.plain_verdict(SET + 1, 0, (HERE4, 0), Verdict::ALLOW)?;
    shut(server.local_addr()?)?;
    ensure!(sandbox.reason(Reason::InboundNoVerdict)? == 1, "not counted");
    let told = sandbox.denials()?;
    ensure!(told.len() == 1 && told[0].verdict == Verdict::default(), "told {told:?}");
    Ok(())
}

fn rehearsed(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    sandbox.become_workload(OURS)?;
    for (there, here, family) in both() {
        let server = scene.listen((there, 0))?;
        let to = server.local_addr()?;
        let mut told = |policies, flags, who| -> Result<()> {
            sandbox.peer(there, workload(policies, flags))?;
            reaches(&server)?;
            let told = sandbox.denials()?;
            let [told] = told.as_slice() else { anyhow::bail!("told {told:?}") };
            ensure!((told.side, told.policies) == (Denial::ADMITTED, policies), "told {told:?}");
            ensure!((told.source_workload, told.destination_workload) == (who, THEIRS), "told {told:?}");
            ensure!(told.source.address() == endpoint((here, 1).into()).address(), "told {told:?}");
            ensure!(told.destination == endpoint(to), "told {told:?}");
            Ok(())
        };
        // Nothing is in force: nobody is judged, and a verdict that is not there refuses nobody.
        told(0, Peer::LOCAL | Peer::REHEARSED, OURS)?;
        told(0, Peer::REHEARSED, 0)?;
        sandbox.verdict(OURS, SET, 0, family, Verdict::ALLOW)?;
        let mut told = |flags, side| -> Result<()> {
            sandbox.peer(there, workload(SET, flags))?;
            if side == Denial::SERVER {
                shut(to)?
            } else {
                reaches(&server)?
            }
            let told = sandbox.denials()?;
            ensure!(told.len() == 1 && told[0].side == side, "told {told:?}");
            Ok(())
        };
        told(Peer::LOCAL | Peer::REHEARSED, Denial::ADMITTED)?;
        // By its address, for whom nothing is written.
        told(Peer::REHEARSED, Denial::SERVER)?;
    }
    ensure!(sandbox.reason(Reason::InboundAdmitted)? == 2, "without policies in force nobody is admitted");
    // A probe of the node's is let in whatever policy says.
    sandbox.leave_workload()?;
    sandbox.node(true, link::cookie()?, 0)?;
    sandbox.peer(THERE4, workload(0, Peer::LOCAL | Peer::REHEARSED))?;
    reaches(&scene.listen((THERE4, 0))?)?;
    ensure!(sandbox.denials()?.is_empty(), "told of the node itself");
    Ok(())
}

fn crowded(sandbox: &mut Sandbox) -> Result<()> {
    const MORE_THAN_FIT: usize = 900;
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    sandbox.peer(THERE4, workload(0, Peer::REHEARSED))?;
    for _ in 0..MORE_THAN_FIT {
        reaches(&server)?;
    }
    let lost = sandbox.reason(Reason::RehearsalLost)? as usize;
    ensure!(lost > 0, "all found room");
    sandbox.peer(THERE4, workload(SET, 0))?;
    shut(server.local_addr()?)?;
    let told = sandbox.denials()?;
    ensure!(told.len() + lost == MORE_THAN_FIT + 1, "{} told, {lost} lost", told.len());
    ensure!(told.last().is_some_and(|last| last.side == Denial::SERVER), "the denial is not told");
    ensure!(sandbox.reason(Reason::DenialLost)? == 0, "a denial was lost");
    Ok(())
}

const STEERED: u32 = Peer::LOCAL | Peer::STEERED;

fn steered(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    sandbox.become_workload(OURS)?;
    sandbox.node(true, link::cookie()?, 0)?;
    sandbox.proxy(THEIRS, 77, 0, THERE4, THERE6)?;
    for (there, here, family) in both() {
        let server = scene.listen((there, 0))?;
        let proxy = scene.listen((there, Proxy::PLAIN))?;
        sandbox.listener(THEIRS, there, &proxy)?;
        sandbox.verdict(OURS, SET, 0, family, Verdict::ALLOW)?;
        sandbox.plain_verdict(SET, 0, (here, 0), Verdict::ALLOW)?;
        // By its cgroup, and by its address, as from another node.
        for flags in [STEERED, Peer::STEERED] {
            sandbox.peer(there, workload(SET, flags))?;
            let client = crate::traffic::connect(server.local_addr()?)?;
            let (mut taken, from) = proxy.accept()?;
            ensure!(from == client.local_addr()?, "the client shows as {from}");
            let at = taken.local_addr()?;
            ensure!(at == server.local_addr()?, "taken at {at}: where the application listens is forgotten");
            let known = if flags == STEERED { OURS } else { 0 };
            let told = sandbox.steered(from, at)?;
            ensure!(told == Some(known), "the proxy is told {told:?}");
            let mut client = client;
            crate::traffic::exchange(&mut client, &mut taken, 10_000, 10_000)?;
        }
        // Whoever the policies refuse, as far as the kernel sees.
        sandbox.plain_verdict(SET, 0, (here, 0), Verdict::DENY)?;
        shut(server.local_addr()?)?;
        // The pod itself, from its own address, as the proxy does: to the application.
        let (at, inside) = (server.local_addr()?, server.try_clone()?);
        scene.there.run(move || {
            crate::namespace::loopback_up()?;
            let from = socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None)?;
            from.bind(&SocketAddr::new(at.ip(), 0).into())?;
            from.connect(&at.into())?;
            inside.accept()?;
            Ok(())
        })?;
    }
    ensure!(sandbox.reason(Reason::InboundSteered)? == 4, "not counted");
    ensure!(sandbox.reason(Reason::InboundAdmitted)? == 0, "let in without the proxy");
    // A probe of the node's goes where it always goes.
    sandbox.leave_workload()?;
    sandbox.peer(THERE4, workload(SET, STEERED))?;
    reaches(&scene.listen((THERE4, 0))?)
}

fn unsteered(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    sandbox.node(true, 0, 0)?;
    sandbox.peer(THERE4, workload(SET, Peer::STEERED))?;
    sandbox.plain_verdict(SET, 0, (HERE4, 0), Verdict::ALLOW)?;
    shut(server.local_addr()?)?;
    let proxy = scene.listen((THERE4, Proxy::PLAIN))?;
    sandbox.listener(THEIRS, THERE4, &proxy)?;
    let led = crate::traffic::connect(server.local_addr()?)?;
    ensure!(proxy.accept()?.1 == led.local_addr()?, "not led to the proxy");
    // It hangs: its sockets are there.
    sandbox.node(false, 0, 0)?;
    shut(server.local_addr()?)?;
    // It has gone, and nobody has written anything.
    sandbox.node(true, 0, 0)?;
    drop(proxy);
    shut(server.local_addr()?)?;
    let refused = sandbox.reason(Reason::InboundNoProxy)?;
    ensure!(refused == 3, "{refused} are counted");
    sandbox.peer(THERE4, workload(SET, 0))?;
    reaches(&server)
}

fn steered_caller(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    let to = server.local_addr()?;
    let proxy = scene.listen((THERE4, Proxy::PLAIN))?;
    sandbox.listener(THEIRS, THERE4, &proxy)?;
    sandbox.proxy(THEIRS, 77, 0, THERE4, THERE6)?;
    sandbox.node(true, 0, 0)?;
    sandbox.become_workload(OURS)?;
    sandbox.peer(THERE4, workload(SET, STEERED))?;
    sandbox.verdict(OURS, SET, 0, 4, Verdict::ALLOW)?;
    // Over, by a reset, before anybody asks.
    let client = crate::traffic::connect(to)?;
    let from = client.local_addr()?;
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    ensure!(sandbox.caller(from, to)?.is_none(), "a note stays of a connection that is over");
    let told = sandbox.steered(from, to)?;
    ensure!(told == Some(OURS), "the proxy is told {told:?}");
    Ok(())
}

fn another_listener(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    let other = scene.listen((THERE4, Proxy::PLAIN))?;
    // Of somebody who claims the same address.
    sandbox.listener(THEIRS + 1, THERE4, &other)?;
    sandbox.node(true, 0, 0)?;
    sandbox.peer(THERE4, workload(SET, Peer::STEERED))?;
    sandbox.plain_verdict(SET, 0, (HERE4, 0), Verdict::ALLOW)?;
    shut(server.local_addr()?)?;
    let refused = sandbox.reason(Reason::InboundNoProxy)?;
    ensure!(refused == 1, "{refused} are counted");
    Ok(())
}

fn reserved(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    for port in [Proxy::OUTBOUND, Proxy::PLAIN] {
        let _server = scene.listen((THERE4, port))?;
        shut((THERE4, port))?;
    }
    ensure!(sandbox.reason(Reason::InboundReserved)? == 2, "not counted");
    sandbox.peer(THERE4, workload(SET, 0))?;
    reaches(&scene.listen((THERE4, Proxy::TUNNEL))?)
}

fn unknown(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    sandbox.peer(THERE4, workload(SET, 0))?;
    let server = scene.listen((ALSO_THERE4, 0))?;
    reaches(&server)?;
    sandbox.node(true, 0, Node::GUARDED)?;
    shut(server.local_addr()?)
}

fn loopback(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    sandbox.peer(THERE4, workload(SET, 0))?;
    scene.there.run(|| {
        crate::namespace::loopback_up()?;
        reaches(&TcpListener::bind((THERE4, 0))?)?;
        reaches(&TcpListener::bind((THERE4, Proxy::OUTBOUND))?)
    })
}

fn established(sandbox: &mut Sandbox) -> Result<()> {
    let scene = Scene::enter(sandbox)?;
    let server = scene.listen((THERE4, 0))?;
    let mut client = crate::traffic::connect(server.local_addr()?)?;
    let (mut accepted, _) = server.accept()?;
    sandbox.peer(THERE4, workload(SET, 0))?;
    crate::traffic::exchange(&mut client, &mut accepted, 100_000, 100_000)?;
    // No program ran for any of that.
    ensure!(sandbox.reason(Reason::InboundNoVerdict)? == 0, "an established connection was judged");
    shut(server.local_addr()?)
}
