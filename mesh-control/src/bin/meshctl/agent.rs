//! Asking the node's agent: HTTP/1.1 with JSON over its unix socket.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::UnixStream, time::timeout};

const TIMEOUT: Duration = Duration::from_secs(30);

/// The agent's answer to a GET of `path`.
pub(crate) async fn get(socket: &Path, path: &str) -> anyhow::Result<Value> {
    let about = || format!("no agent answers at {}", socket.display());
    timeout(TIMEOUT, exchange(socket, path)).await.with_context(about)?
}

async fn exchange(socket: &Path, path: &str) -> anyhow::Result<Value> {
    let about = || format!("no agent answers at {}", socket.display());
    let stream = UnixStream::connect(socket).await.with_context(about)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.with_context(about)?;
    let driver = tokio::spawn(connection);
    let request = Request::get(path).header(HOST, "agent").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await.with_context(about)?;
    let status = response.status();
    let body = response.into_body().collect().await.context("reading the agent's answer")?.to_bytes();
    driver.abort();
    if !status.is_success() {
        bail!("the agent answers {path} with {status}: {}", String::from_utf8_lossy(&body).trim());
    }
    serde_json::from_slice(&body).with_context(|| format!("the agent's answer to {path} is not JSON"))
}
