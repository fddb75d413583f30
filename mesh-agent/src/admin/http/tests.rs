use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::super::view;
use super::*;
use crate::fixtures::Directory;
use crate::policy::DenialsView;

/// An owner that answers with empty lists, and about readiness as told.
fn owner(ready: Result<(), String>) -> Owner {
    let (sender, mut requests) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            match request {
                AdminRequest::Status(reply) => drop(reply.send(status())),
                AdminRequest::Services(reply) => drop(reply.send(Vec::new())),
                AdminRequest::Workloads(reply) => drop(reply.send(vec![workload()])),
                AdminRequest::Certificates(reply) => drop(reply.send(Vec::new())),
                AdminRequest::Denials(reply) => drop(reply.send(DenialsView::default())),
                AdminRequest::Stats(reply) => drop(reply.send(view::Stats::default())),
                AdminRequest::Metrics(reply) => drop(reply.send(metrics::View::default())),
                AdminRequest::Ready(reply) => drop(reply.send(ready.clone())),
            }
        }
    });
    sender
}

fn status() -> view::Status {
    view::Status {
        version: "0.1.0".into(),
        node: "node-a".into(),
        ready: true,
        control_plane: view::ControlPlane { address: "https://c".into(), connected: false, last_error: None },
        certificate_authority: view::Authority { address: "https://c".into(), ..view::Authority::default() },
        snapshot: view::SnapshotView { source: view::Source::ControlPlane, services: 1, workloads: 2 },
        rejected: Vec::new(),
        refused: Vec::new(),
        programs: Vec::new(),
        maps: Vec::new(),
        write_failures: 0,
        write_retries: 0,
    }
}

fn workload() -> view::Workload {
    view::Workload {
        uid: "c//Pod/a/b".into(),
        identity: "00000000deadbeef".into(),
        namespace: "a".into(),
        name: "b".into(),
        service_account: "s".into(),
        cgroups: vec![view::Cgroup { id: 7, path: "x".into() }],
        proxy: "ready".into(),
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> (u16, String) {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    (status, body)
}

async fn over_tcp(owner: Owner, request: &str) -> (u16, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve_metrics(listener, owner));
    exchange(TcpStream::connect(address).await.unwrap(), request).await
}

async fn get_tcp(owner: Owner, path: &str) -> (u16, String) {
    over_tcp(owner, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
}

#[tokio::test]
async fn the_socket_answers_in_json() {
    let directory = Directory::new();
    let path = directory.path().join("admin.sock");
    let listener = super::super::bind(&path).unwrap();
    tokio::spawn(serve_admin(listener, owner(Ok(()))));
    let get = async |what: &str| {
        let stream = UnixStream::connect(&path).await.unwrap();
        let request = format!("GET {what} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let (code, body) = exchange(stream, &request).await;
        assert_eq!(code, 200, "{what}: {body}");
        serde_json::from_str::<serde_json::Value>(&body).unwrap()
    };
    let status = get("/status").await;
    assert_eq!(status["snapshot"]["source"], "control-plane");
    assert_eq!(status["control_plane"]["last_error"], serde_json::Value::Null);
    assert_eq!(status["write_failures"], 0);
    assert_eq!(get("/services").await, serde_json::json!([]));
    assert_eq!(get("/certificates").await, serde_json::json!([]));
    let workloads = get("/workloads/").await;
    assert_eq!(workloads[0]["identity"], "00000000deadbeef");
    assert_eq!(workloads[0]["cgroups"], serde_json::json!([{"id": 7, "path": "x"}]));
    assert_eq!(get("/stats").await, serde_json::json!({"connections": [], "reasons": [], "maps": []}));
}

#[tokio::test]
async fn the_port_gives_metrics_and_health_only() {
    let (code, body) = get_tcp(owner(Ok(())), "/metrics").await;
    assert!(code == 200 && body.contains("mesh_agent_build_info"), "{code} {body}");
    assert_eq!(get_tcp(owner(Ok(())), "/healthz/live").await.0, 200);
    assert_eq!(get_tcp(owner(Ok(())), "/healthz/ready").await.0, 200);
    for path in [
        "/status",
        "/services",
        "/workloads",
        "/stats",
        "/certificates",
        "/",
        "//",
        "/../status",
        "/metrics/x",
    ] {
        assert_eq!(get_tcp(owner(Ok(())), path).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn an_agent_that_is_not_ready_says_why_but_lives() {
    let not = || owner(Err("no snapshot yet".to_owned()));
    assert_eq!(get_tcp(not(), "/healthz/ready").await, (503, "no snapshot yet\n".to_owned()));
    assert_eq!(get_tcp(not(), "/healthz/live").await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_is_stuck_is_not_alive() {
    let (sender, requests) = mpsc::channel(8);
    for (method, path) in [("GET", "/healthz/live"), ("GET", "/healthz/ready"), ("GET", "/metrics")] {
        let reply = answer(Surface::Metrics, &method.parse().unwrap(), path, &sender).await;
        assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    drop(requests);
    let reply = answer(Surface::Admin, &Method::GET, "/status", &sender).await;
    assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn only_reading_is_allowed() {
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let request = format!(
            "{method} /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        assert_eq!(over_tcp(owner(Ok(())), &request).await.0, 405, "{method}");
    }
}

#[tokio::test]
async fn rubbish_is_refused() {
    let long = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(100_000));
    for request in ["\x16\x03\x01 what is this\r\n\r\n", "GET\r\n\r\n", long.as_str()] {
        let (code, _) = over_tcp(owner(Ok(())), request).await;
        assert!((400..500).contains(&code), "{code}");
    }
}

#[tokio::test]
async fn idle_connections_do_not_lock_others_out_for_ever() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve_metrics(listener, owner(Ok(()))));
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS {
        idle.push(TcpStream::connect(address).await.unwrap());
    }
    let stream = TcpStream::connect(address).await.unwrap();
    let request = "GET /healthz/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answered = tokio::time::timeout(HEADER_TIMEOUT * 2, exchange(stream, request)).await;
    assert_eq!(answered.expect("locked out").0, 200);
}
