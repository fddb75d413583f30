//! `tag`: a UDP socket knows whose it is from its creation on, a TCP socket from its first call of a service.

use anyhow::{Context, Result, ensure};
use mesh_common::abi::{Algorithm, Protocol, Reason};

use crate::runner::Test;
use crate::sandbox::{Sandbox, key};
use crate::traffic::{HOST4, Listeners, VIP4, connect, udp};

/// The tests of this hook.
pub const TESTS: &[Test] = &[
    Test { name: "tag::a_udp_socket_of_a_workload_is_marked_when_created", run: marked },
    Test { name: "tag::tcp_sockets_have_no_record_but_for_a_call_of_a_service", run: tcp },
    Test { name: "tag::the_innermost_workload_counts", run: innermost },
    Test { name: "tag::a_process_of_no_workload_leaves_no_record", run: unmarked },
];

fn marked(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(7)?;
    let socket = udp(HOST4)?;
    let record = sandbox.record(&socket)?.context("the socket has no record")?;
    ensure!(record.workload == 7, "marked as {}", record.workload);
    ensure!(!record.dialled.is_some() && record.service == 0, "a new socket remembers {record:?}");
    Ok(())
}

fn tcp(sandbox: &mut Sandbox) -> Result<()> {
    let outside = udp(HOST4)?;
    sandbox.become_workload(8)?;
    ensure!(sandbox.record(&outside)?.is_none(), "a socket from before the workload was marked");
    let listeners = Listeners::at(HOST4, 1)?;
    let direct = connect(listeners.addresses()?[0])?;
    let (_, accepted) = listeners.accept()?;
    ensure!(sandbox.record(&direct)?.is_none(), "a socket that called no service has a record");
    ensure!(sandbox.record(&accepted)?.is_none(), "an accepted socket has a record");
    let vip = (VIP4, 80).into();
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &listeners.addresses()?)?;
    let client = connect(vip)?;
    let (_, accepted) = listeners.accept()?;
    let record = sandbox.record(&client)?.context("a socket that called a service has no record")?;
    ensure!((record.workload, record.service) == (8, 1), "the record is {record:?}");
    ensure!(sandbox.record(&accepted)?.is_none(), "a socket accepted from a service's client has a record");
    Ok(())
}

fn innermost(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(1)?;
    sandbox.enter_nested_workload(2)?;
    let record = sandbox.record(&udp(HOST4)?)?.context("the socket has no record")?;
    ensure!(record.workload == 2, "marked as {}", record.workload);
    Ok(())
}

fn unmarked(sandbox: &mut Sandbox) -> Result<()> {
    let before = sandbox.reason(Reason::NotWorkload)?;
    let socket = udp(HOST4)?;
    ensure!(sandbox.record(&socket)?.is_none(), "the socket has a record");
    ensure!(sandbox.reason(Reason::NotWorkload)? == before + 1, "the reason was not counted");
    // It is balanced all the same, and then has a record of no workload.
    let listeners = Listeners::at(HOST4, 1)?;
    let vip = (VIP4, 80).into();
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &listeners.addresses()?)?;
    let client = connect(vip)?;
    let record = sandbox.record(&client)?.context("a balanced socket has no record")?;
    ensure!((record.workload, record.service) == (0, 1), "the record is {record:?}");
    ensure!(sandbox.reason(Reason::NotWorkload)? == before + 2, "the call without a source was not counted");
    Ok(())
}
