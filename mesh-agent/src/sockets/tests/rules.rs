//! Which connections go.

use super::*;

const EPHEMERAL: std::ops::RangeInclusive<u16> = 32768..=60999;
const POD: &str = "10.0.0.1";

/// Everything from outside is forbidden on port 80; 10.0.0.66 has gone.
struct Strict {
    caller: Option<Caller>,
}

impl Judge for Strict {
    fn is_carried(&self, _local: SocketAddr, _remote: SocketAddr) -> bool {
        false
    }

    fn caller(&self, _local: SocketAddr, _remote: SocketAddr) -> Option<Caller> {
        self.caller
    }

    fn permits(&self, caller: Caller, _remote: IpAddr, local: SocketAddr) -> bool {
        match caller {
            Caller::Workload(number) => number == 1,
            Caller::Node => true,
            Caller::Unknown | Caller::Stranger => local.port() != 80,
        }
    }

    fn gone(&self, remote: SocketAddr) -> bool {
        remote.ip() == ip("10.0.0.66")
    }
}

fn socket(state: State, local: &str, remote: &str) -> Connection {
    let (local, remote) = (address(local), address(remote));
    Connection { local, remote, state, uid: 0, inode: 1, family: 2, id: [0; 48] }
}

fn grounds(caller: Option<Caller>, sockets: &[Connection]) -> Vec<(SocketAddr, Ground)> {
    let gone = revoke(sockets, &[ip(POD)], &EPHEMERAL, &Strict { caller });
    gone.into_iter().map(|(socket, ground)| (socket.remote, ground)).collect()
}

#[test]
fn what_came_in_is_judged_by_its_caller() {
    let sockets = [
        socket(State::Listen, "0.0.0.0:80", "0.0.0.0:0"),
        socket(State::Established, "10.0.0.1:80", "10.0.0.2:40000"),
        socket(State::CloseWait, "10.0.0.1:80", "10.0.0.3:40000"),
        socket(State::SynReceived, "10.0.0.1:80", "10.0.0.4:40000"),
        socket(State::Established, "10.0.0.1:81", "10.0.0.5:40000"),
    ];
    let unknown = Ground::Policy(Caller::Unknown);
    let (a, b, c) = (address("10.0.0.2:40000"), address("10.0.0.3:40000"), address("10.0.0.4:40000"));
    assert_eq!(grounds(None, &sockets), [(a, unknown), (b, unknown), (c, unknown)]);
    assert_eq!(grounds(Some(Caller::Node), &sockets), []);
    assert_eq!(grounds(Some(Caller::Workload(1)), &sockets), []);
    // A workload that may not: on every port, since the port does not count for it here.
    assert_eq!(grounds(Some(Caller::Workload(2)), &sockets).len(), 4);
}

#[test]
fn what_went_out_is_judged_by_its_endpoint() {
    let gone = address("10.0.0.66:80");
    let sockets = [
        socket(State::Established, "10.0.0.1:40000", "10.0.0.66:80"),
        socket(State::Established, "10.0.0.1:40001", "10.0.0.67:80"),
        socket(State::SynSent, "10.0.0.1:1000", "10.0.0.66:80"),
    ];
    assert_eq!(grounds(None, &sockets), [(gone, Ground::Gone), (gone, Ground::Gone)]);
}

#[test]
fn the_listener_tells_the_direction_and_without_it_the_port() {
    // A server on a port that others take for going out.
    let listening = [
        socket(State::Listen, "[::]:40000", "[::]:0"),
        socket(State::Established, "10.0.0.1:40000", "10.0.0.66:80"),
    ];
    assert_eq!(grounds(None, &listening), [], "it came in, and port 40000 is open");
    // A server that no longer listens: its connections are still what came in.
    let closed = [socket(State::Established, "10.0.0.1:80", "10.0.0.2:40000")];
    assert_eq!(grounds(None, &closed).len(), 1);
    // One whose caller is known came in, whatever its port.
    let known = [socket(State::Established, "10.0.0.1:40000", "10.0.0.2:50000")];
    assert_eq!(grounds(Some(Caller::Workload(2)), &known).len(), 1);
}

#[test]
fn the_proxys_own_and_the_pods_own_are_let_be() {
    let sockets = [
        socket(State::Listen, "10.0.0.1:80", "0.0.0.0:0"),
        // The application on its way to the proxy, either end; the proxy on its way to the application.
        socket(State::Established, "10.0.0.1:40000", "10.0.0.1:15001"),
        socket(State::Established, "10.0.0.1:15001", "10.0.0.1:40000"),
        socket(State::Established, "10.0.0.1:80", "10.0.0.1:50000"),
        socket(State::Established, "127.0.0.1:80", "127.0.0.6:50000"),
        socket(State::Established, "[::1]:80", "[::1]:50000"),
        // Tunnels, both ways.
        socket(State::Established, "10.0.0.1:15008", "10.0.0.66:40000"),
        socket(State::Established, "10.0.0.1:40000", "10.0.0.66:15008"),
        socket(State::Established, "10.0.0.1:15006", "10.0.0.66:40000"),
    ];
    assert_eq!(grounds(Some(Caller::Workload(2)), &sockets), []);
    assert_eq!(grounds(None, &sockets), []);
}
