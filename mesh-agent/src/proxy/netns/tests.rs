use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use super::*;
use crate::fixtures::NetworkNamespace;

/// Threads of this process in that namespace, and descriptors of it.
fn uses(inode: u64) -> usize {
    let is_there = |path: PathBuf| std::fs::metadata(path).is_ok_and(|found| found.ino() == inode);
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    tasks
        .map(|task| task.path().join("ns/net"))
        .chain(descriptors.map(|fd| fd.path()))
        .filter(|path| is_there(path.clone()))
        .count()
}

#[tokio::test]
async fn sockets_are_in_the_pod_and_only_there() {
    let Some(pod) = NetworkNamespace::new() else { return };
    let address: SocketAddr = "127.0.0.1:15008".parse().unwrap();
    let inode = std::fs::metadata(pod.path()).unwrap().ino();
    let before = uses(inode);
    {
        let namespace = Namespace::open(&pod.path()).unwrap();
        assert!(uses(inode) > before);
        let listener = namespace.listen(address).await.unwrap();
        let six = namespace.listen("[::1]:15008".parse().unwrap()).await.unwrap();
        // Another pod, or the node, may use the same port: nobody listens there.
        assert!(TcpStream::connect(address).await.is_err());
        let (client, accepted) = tokio::join!(namespace.connect(address), listener.accept());
        let (mut client, (mut accepted, _peer)) = (client.unwrap(), accepted.unwrap());
        client.write_all(b"hello").await.unwrap();
        accepted.read_exact(&mut [0; 5]).await.unwrap();
        let from = "127.0.0.9:0".parse().unwrap();
        let client = namespace.bound(from, address).await.unwrap();
        let (client, accepted) = tokio::join!(client.connect(address), listener.accept());
        drop(client.unwrap());
        assert_eq!(accepted.unwrap().1.ip(), from.ip());
        // More than are made ahead, each of them in the pod.
        for _ in 0..3 * AHEAD {
            let (client, accepted) = tokio::join!(namespace.connect(address), listener.accept());
            assert_eq!(client.unwrap().peer_addr().unwrap(), address);
            accepted.unwrap();
        }
        drop(six);
    }
    let gone = async {
        while uses(inode) > before {
            sleep(Duration::from_millis(10)).await
        }
    };
    timeout(Duration::from_secs(5), gone).await.unwrap();
}

#[tokio::test]
async fn a_namespace_that_is_none_is_an_error() {
    assert!(Namespace::of_process(u32::MAX).is_err());
    assert!(Namespace::open(Path::new("/dev/null")).is_err());
}

#[tokio::test]
async fn each_hop_has_its_own_congestion_control() {
    let Some(pod) = NetworkNamespace::new() else { return };
    let name = |tcp: &TcpStream| {
        let name = socket2::SockRef::from(tcp).tcp_congestion().unwrap();
        String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
    };
    let namespace = Namespace::open(&pod.path()).unwrap();
    let setting = "/proc/sys/net/ipv4/tcp_congestion_control";
    namespace.run(move || std::fs::write(setting, "cubic")).await.unwrap();
    let (ours, theirs) = ("127.0.0.1:15001".parse().unwrap(), "127.0.0.1:15008".parse().unwrap());
    let listener = namespace.listen_with(&Congestion::WITHIN_POD, ours).await.unwrap();
    let other = namespace.listen(theirs).await.unwrap();
    let (client, accepted) = tokio::join!(namespace.connect(ours), listener.accept());
    let (default, accepted) = (name(&client.unwrap()), name(&accepted.unwrap().0));
    assert_eq!(accepted, "reno");
    let (client, accepted) =
        tokio::join!(namespace.connect_with(&Congestion::WITHIN_POD, theirs), other.accept());
    assert_eq!((name(&client.unwrap()), name(&accepted.unwrap().0)), ("reno".to_owned(), default.clone()));
    let bound = namespace.bound("127.0.0.9:0".parse().unwrap(), ours).await.unwrap();
    assert_eq!(name(&bound.connect(ours).await.unwrap()), "reno");
    assert_eq!(default, "cubic");
    let missing = "not_there".parse().unwrap();
    assert!(namespace.connect_with(&missing, ours).await.is_err());
}
