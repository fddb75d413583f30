//! A pair of nginx: one beside the client makes TLS of what it dials, one beside the server ends it. Both verify the other.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_harness::process::Process;
use mesh_harness::{Pod, until};

use super::lane::{IDLE_PORT, PORT};
use crate::command::output;

/// What it needs.
pub(super) const PACKAGES: &[&str] = &["nginx", "libnginx-mod-stream", "openssl"];
/// Added to a server's port: where its nginx takes TLS.
const TLS: u16 = 10_000;
const NAMES: [&str; 2] = ["client", "server"];

/// Starts both in the networks of client and server and in these cgroups, with TLS between them or without.
pub(super) fn start(
    dir: &Path,
    pods: [&Pod; 2],
    cgroups: [PathBuf; 2],
    secured: bool,
) -> Result<Vec<Process>> {
    if secured {
        certificates(dir)?;
    }
    let [_client, server] = pods;
    let mut running = Vec::new();
    for ((name, pod), cgroup) in NAMES.iter().zip(pods).zip(&cgroups) {
        let config = dir.join(format!("nginx-{name}.conf"));
        fs::write(&config, configuration(dir, name, server, secured))?;
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-p").arg(dir).arg("-c").arg(&config).args(["-e", "stderr"]);
        running.push(pod.run_beside(command, cgroup)?);
    }
    for ((process, pod), port) in running.iter_mut().zip(pods).zip([PORT, PORT + TLS]) {
        let at = match port {
            PORT => SocketAddr::from(([127, 0, 0, 1], port)),
            _ => server.address(port),
        };
        until("nginx listens", Duration::from_secs(10), || {
            let ended = process.ended()?;
            ensure!(ended.is_none(), "nginx has ended: {}", process.log_tail());
            pod.netns().run(|| Ok(std::net::TcpStream::connect(at)?))?;
            Ok(())
        })?;
    }
    Ok(running)
}

/// The same ciphers, key sizes and half-closing as the mesh; everything else as nginx has it.
fn configuration(dir: &Path, name: &str, server: &Pod, secured: bool) -> String {
    let ssl = if secured { " ssl" } else { "" };
    let ports = [PORT, IDLE_PORT].map(|port| {
        let between = server.address(port + TLS);
        match name {
            "client" => format!("server {{ listen 127.0.0.1:{port}; proxy_pass {between}; }}"),
            _ => format!("server {{ listen {between}{ssl}; proxy_pass 127.0.0.1:{port}; }}"),
        }
    });
    let tls = if secured { tls(dir, name) } else { String::new() };
    let dir = dir.display();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n\
         daemon off; user root; worker_processes auto; worker_rlimit_nofile 65536;\n\
         pid {dir}/nginx-{name}.pid; error_log stderr warn;\n\
         events {{ worker_connections 16384; }}\n\
         stream {{\n\
         proxy_half_close on; proxy_timeout 1h;\n\
         {tls}\n{}\n}}\n",
        ports.join("\n")
    )
}

fn tls(dir: &Path, name: &str) -> String {
    let dir = dir.display();
    let (role, verify) = if name == "client" {
        let trusted = format!("proxy_ssl_trusted_certificate {dir}/nginx-ca.pem;");
        ("proxy_ssl", format!("proxy_ssl on; proxy_ssl_verify on; proxy_ssl_name server; {trusted}"))
    } else {
        ("ssl", format!("ssl_verify_client on; ssl_client_certificate {dir}/nginx-ca.pem;"))
    };
    format!(
        "{role}_protocols TLSv1.3; {role}_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;\n\
         {role}_certificate {dir}/nginx-{name}.pem; {role}_certificate_key {dir}/nginx-{name}.key;\n\
         {verify}"
    )
}

/// An authority on P-256, and a certificate for each end.
fn certificates(dir: &Path) -> Result<()> {
    let openssl =
        |words: &str| output(Command::new("openssl").current_dir(dir).args(words.split(' '))).map(drop);
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!(
        "req -x509 {key} -keyout nginx-ca.key -out nginx-ca.pem -days 2 -subj /CN=bench \
         -addext basicConstraints=critical,CA:TRUE"
    ))?;
    for name in NAMES {
        openssl(&format!("req {key} -keyout nginx-{name}.key -out nginx-{name}.csr -subj /CN={name}"))?;
        fs::write(dir.join("nginx.ext"), format!("subjectAltName=DNS:{name}\n"))?;
        openssl(&format!(
            "x509 -req -in nginx-{name}.csr -CA nginx-ca.pem -CAkey nginx-ca.key -CAcreateserial -days 2 \
             -extfile nginx.ext -out nginx-{name}.pem"
        ))?;
    }
    Ok(())
}
