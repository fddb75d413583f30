//! Status, metrics, and the `meshctl` command itself.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Output, Stdio},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixListener},
};

use crate::{manifests::*, world::World};

async fn meshctl(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshctl"));
    command.args(arguments);
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

async fn shown(world: &World, arguments: &[&str]) -> String {
    let url = format!("http://{}", world.control.management_address());
    let output = meshctl(&[&["--control-plane", &url], arguments].concat()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) async fn scrape(world: &World, path: &str) -> String {
    let mut stream = TcpStream::connect(world.control.metrics_address()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn status_tells_who_is_connected_and_how_far() {
    let world = World::start(&[("web.yaml", &web())]).await;
    assert_eq!(world.status().await.agents, []);
    let subscriber = world.subscriber().await;
    let status = world.status_when(|status| status.agents.first().is_some_and(|agent| agent.synced)).await;
    let agent = &status.agents[0];
    assert_eq!((agent.node.as_str(), agent.version.as_str()), ("node-a", "1.2.3"));
    assert_eq!((agent.lag, agent.lag_milliseconds, agent.acknowledged_revision), (0, 0, status.revision));
    assert_eq!((status.services, status.workloads), (1, 0));
    world.write("web.yaml", &web().replace("10.96.0.1", "10.96.0.2"));
    let status = world.status_when(|status| status.agents[0].lag_milliseconds > 20).await;
    assert_eq!((status.agents[0].lag, status.agents[0].synced), (1, false));
    drop(subscriber);
    world.status_when(|status| status.agents.is_empty()).await;
}

#[tokio::test]
async fn meshctl_shows_services_endpoints_and_workloads() {
    let other = "apiVersion: v1\nkind: Pod\nmetadata: {name: x, namespace: elsewhere}\nspec: {nodeName: n}\n"
        .to_owned();
    let documents = [web(), pod("a", "10.0.0.1"), pod_with("b", "10.0.0.2", "", "", "False"), other];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let table = shown(&world, &["get", "services"]).await;
    assert!(table.contains("web.shop.svc.cluster.local") && table.contains("80/TCP"), "{table}");
    let json = shown(&world, &["get", "endpoints", "-n", "shop", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let endpoints = json.as_array().unwrap();
    let of = |i: usize| {
        (
            endpoints[i]["address"].as_str().unwrap(),
            endpoints[i]["target_port"].as_u64().unwrap(),
            endpoints[i]["state"].as_str().unwrap(),
        )
    };
    assert_eq!([of(0), of(1)], [("10.0.0.1", 8080, "ready"), ("10.0.0.2", 8080, "unready")]);
    let yaml = shown(&world, &["-o", "yaml", "get", "workloads", "-n", "elsewhere"]).await;
    let yaml: serde_norway::Value = serde_norway::from_str(&yaml).unwrap();
    assert_eq!(yaml.as_sequence().unwrap().len(), 1);
    assert_eq!(yaml[0]["uid"], "Kubernetes//Pod/elsewhere/x");
}

#[tokio::test]
async fn meshctl_shows_the_status() {
    let world = World::start(&[("web.yaml", &web()), ("bad.yaml", "kind: Service\n")]).await;
    let _subscriber = world.subscriber().await;
    let table = shown(&world, &["status"]).await;
    for part in ["node-a", "1.2.3", "bad.yaml", "apiVersion", "is missing"] {
        assert!(table.contains(part), "{part} in {table}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&shown(&world, &["status", "-o", "json"]).await).unwrap();
    assert_eq!(json["agents"][0]["node"], "node-a");
    assert_eq!(json["file_errors"][0]["field"], "apiVersion");
}

#[tokio::test]
async fn meshctl_names_who_has_an_address_in_vain() {
    let entry = |name: &str, year: u32| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
             metadata: {{name: {name}, namespace: shop, creationTimestamp: '{year}-01-01T00:00:00Z'}}\n\
             spec: {{address: 10.0.0.7}}\n"
        )
    };
    let world = World::start(&[("new.yaml", &entry("a", 2024)), ("old.yaml", &entry("b", 2020))]).await;
    let subscriber = world.subscriber().await;
    let table = shown(&world, &["status"]).await;
    for part in ["new.yaml", "spec.address", "10.0.0.7 belongs to WorkloadEntry shop/b"] {
        assert!(table.contains(part), "{part} in {table}");
    }
    let outdone = |name: &str| {
        subscriber.workload(&format!("Kubernetes/networking.istio.io/WorkloadEntry/shop/{name}")).1.outdone
    };
    assert!(outdone("a") && !outdone("b"));
}

#[tokio::test]
async fn meshctl_explains_a_connection() {
    let client = pod("client", "10.0.0.9")
        .replace("app: web", "app: client")
        .replace("serviceAccountName: web", "serviceAccountName: client");
    let allow = "selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {ports: ['1']}}]}, {from: [{source: {serviceAccounts: [client]}}]}]";
    let far = pod("far", "10.0.0.2").replace("node-a", "node-b");
    let documents = [web(), pod("near", "10.0.0.1"), far, client, policy("allow-client", allow)];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let _a = world.subscriber().await;
    let _b = crate::subscriber::Subscriber::nameless(
        &world,
        &crate::client::Shows::token_of(crate::client::TOKEN_B),
    )
    .await;
    world.status_when(|status| status.agents.len() == 2).await;
    let ask = async |from: &str| {
        let json = shown(&world, &["explain", "--from", from, "--to", "shop/web:80", "-o", "json"]).await;
        serde_json::from_str::<serde_json::Value>(&json).unwrap()
    };
    // The join of node-b may still be on its way.
    let mut answer = ask("shop/client").await;
    while answer["backends"][0]["path"] != "mtls" {
        answer = ask("shop/client").await;
    }
    assert_eq!(answer["source"], "spiffe://cluster.local/ns/shop/sa/client");
    for (i, address, path) in [(0, "10.0.0.2:8080", "mtls"), (1, "10.0.0.1:8080", "kernel")] {
        let backend = &answer["backends"][i];
        assert_eq!(
            (backend["address"].as_str(), backend["path"].as_str()),
            (Some(address), Some(path)),
            "{answer}"
        );
        assert_eq!(
            (&backend["allowed"], &backend["policy"], &backend["rule"]),
            (&true.into(), &"shop/allow-client".into(), &1.into())
        );
        assert_eq!((&backend["share"], &backend["choice"]), (&0.5.into(), &"".into()));
    }
    let workloads = shown(&world, &["get", "workloads", "-o", "json"]).await;
    let workloads: serde_json::Value = serde_json::from_str(&workloads).unwrap();
    let near = workloads.as_array().unwrap().iter().find(|workload| workload["name"] == "near").unwrap();
    assert_eq!((&near["meshed"], &near["policies"][0]), (&true.into(), &"shop/allow-client".into()));
    let metrics = scrape(&world, "/metrics").await;
    for line in ["mesh_control_policies 1", "mesh_control_nodes_joined 2"] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    let answer = ask("none").await;
    assert_eq!(
        (&answer["backends"][1]["path"], &answer["backends"][1]["allowed"]),
        (&"plaintext".into(), &false.into())
    );
    assert_eq!(answer["backends"][1]["share"], serde_json::Value::Null);
    let table = shown(&world, &["explain", "--from", "shop/client", "--to", "shop/web:80"]).await;
    for part in ["allow-client", "kernel", "mtls", "weighted-random", "ready", "SHARE", " 50 % "] {
        assert!(table.contains(part), "{part} in {table}");
    }
    let url = format!("http://{}", world.control.management_address());
    let output =
        meshctl(&["--control-plane", &url, "explain", "--from", "none", "--to", "shop/web:81"]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("has no TCP port 81; it has 80"), "{text}");
    let output = meshctl(&["--control-plane", &url, "forget-node", "node-x"]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("no agent of \"node-x\" has joined"), "{text}");
}

#[tokio::test]
async fn meshctl_says_in_one_sentence_what_fails() {
    for arguments in
        [["--control-plane", "http://127.0.0.1:1", "status"], ["--agent-socket", "/nowhere/sock", "node"]]
    {
        let mut arguments = arguments.to_vec();
        if arguments[2] == "node" {
            arguments.push("stats");
        }
        let output = meshctl(&arguments).await;
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(text.starts_with("meshctl: ") && text.trim_end().lines().count() == 1, "{text}");
        assert!(text.contains(arguments[1]), "{text}");
    }
}

#[tokio::test]
async fn meshctl_shows_a_node() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("admin.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let body = r#"[{"service":"shop/web.shop","address":"fd00::1","port":80,"protocol":"TCP","algorithm":"maglev","affinity_seconds":0,
        "generation":7,"id":1,"backends":[{"id":3,"address":"10.0.0.1","port":8080,"weight":1,"workload":"u","open_connections":2}]}]"#;
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            let found = request[..length].starts_with(b"GET /services HTTP/1.1");
            let (status, body) = if found { ("200 OK", body) } else { ("404 Not Found", "no such view") };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        }
    });
    let socket = socket.to_str().unwrap();
    let output = meshctl(&["node", "services", "--agent-socket", socket]).await;
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("[fd00::1]:80/TCP") && table.contains("10.0.0.1:8080") && table.contains("maglev"),
        "{table}"
    );
    let output = meshctl(&["node", "stats", "--agent-socket", socket]).await;
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("404"));
}

#[tokio::test]
async fn metrics_and_health_are_served() {
    let world = World::start(&[("web.yaml", &web()), ("bad.yaml", "kind: [")]).await;
    let _subscriber = world.subscriber().await;
    let metrics = scrape(&world, "/metrics").await;
    for line in [
        "mesh_control_services 1",
        "mesh_control_file_errors 1",
        "mesh_control_agents_connected 1",
        "mesh_control_xds_resources_sent_total 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    assert!(scrape(&world, "/healthz/live").await.starts_with("HTTP/1.1 200"));
    assert!(scrape(&world, "/healthz/ready").await.starts_with("HTTP/1.1 200"));
    assert!(scrape(&world, "/else").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn the_command_serves_until_it_is_told_to_stop() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("web.yaml"), web()).unwrap();
    let ports =
        ["--xds-address", "--management-address", "--metrics-address"].map(|option| [option, "127.0.0.1:0"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-control"));
    command.args(["run", "--log-format", "json", "--manifests"]).arg(dir.path()).args(ports.as_flattened());
    command.arg("--ca-dir").arg(dir.path().join(".ca"));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let ended = tokio::task::spawn_blocking(move || {
        let mut told = false;
        for line in log.lines().map_while(Result::ok) {
            if !told && line.contains("\"ready\"") {
                Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
                told = true;
            }
        }
        (told, child.wait().unwrap())
    });
    let (told, status) = ended.await.unwrap();
    assert!(told && status.success(), "{status}");
}

#[tokio::test]
async fn the_command_names_the_option_at_fault() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca");
    let run = move || {
        Command::new(env!("CARGO_BIN_EXE_mesh-control"))
            .args(["run", "--manifests", "/nowhere"])
            .args(["--metrics-address", "127.0.0.1:0", "--ca-dir"])
            .arg(&ca)
            .output()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("mesh-control: --manifests /nowhere: "), "{text}");
}
