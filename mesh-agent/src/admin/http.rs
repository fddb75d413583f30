//! HTTP/1.1 on both listeners.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::{debug, warn};

use super::AdminRequest;
use crate::metrics;

/// An owner that does not answer for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(5);
/// A client has so long to send its request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections at a time, so that a port that anybody may reach cannot use up the agent's descriptors.
const CONNECTIONS: usize = 64;

type Reply = Response<Full<Bytes>>;
type Owner = mpsc::Sender<AdminRequest>;

/// Serves the admin interface. Ends when the owner is gone.
pub async fn serve_admin(listener: UnixListener, owner: Owner) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = owner.closed() => return,
        };
        match accepted {
            Ok((stream, _peer)) => {
                tokio::spawn(connection(stream, owner.clone(), Surface::Admin, permit));
            }
            Err(error) => accept_failed(&error).await,
        }
    }
}

/// Serves metrics and health. Ends when the owner is gone.
pub async fn serve_metrics(listener: TcpListener, owner: Owner) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = owner.closed() => return,
        };
        match accepted {
            Ok((stream, _peer)) => {
                tokio::spawn(connection(stream, owner.clone(), Surface::Metrics, permit));
            }
            Err(error) => accept_failed(&error).await,
        }
    }
}

/// Mostly "too many open files": trying again at once would only burn a processor.
async fn accept_failed(error: &std::io::Error) {
    warn!(%error, "a connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Surface {
    Admin,
    Metrics,
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    owner: Owner,
    surface: Surface,
    _permit: tokio::sync::OwnedSemaphorePermit,
) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let owner = owner.clone();
        async move {
            let path = request.uri().path().to_owned();
            Ok::<_, Infallible>(answer(surface, request.method(), &path, &owner).await)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        debug!(%error, "a client went away");
    }
}

async fn answer(surface: Surface, method: &Method, path: &str, owner: &Owner) -> Reply {
    if method != Method::GET && method != Method::HEAD {
        let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        reply.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return reply;
    }
    let path = path.trim_end_matches('/');
    match (surface, path) {
        (Surface::Admin, "/status") => json(ask(owner, AdminRequest::Status).await),
        (Surface::Admin, "/services") => json(ask(owner, AdminRequest::Services).await),
        (Surface::Admin, "/workloads") => json(ask(owner, AdminRequest::Workloads).await),
        (Surface::Admin, "/stats") => json(ask(owner, AdminRequest::Stats).await),
        (Surface::Admin, "/certificates") => json(ask(owner, AdminRequest::Certificates).await),
        (Surface::Admin, "/denials") => json(ask(owner, AdminRequest::Denials).await),
        (_, "/metrics") => match ask(owner, AdminRequest::Metrics).await {
            Ok(view) => body(StatusCode::OK, metrics::CONTENT_TYPE, metrics::render(&view)),
            Err(stuck) => stuck.reply(),
        },
        (_, "/healthz/live") => match ask(owner, AdminRequest::Ready).await {
            Ok(_ready_or_not) => text(StatusCode::OK, "ok\n"),
            Err(stuck) => stuck.reply(),
        },
        (_, "/healthz/ready") => match ask(owner, AdminRequest::Ready).await {
            Ok(Ok(())) => text(StatusCode::OK, "ok\n"),
            Ok(Err(reason)) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{reason}\n")),
            Err(stuck) => stuck.reply(),
        },
        (Surface::Admin, _) => text(
            StatusCode::NOT_FOUND,
            "there are /status, /services, /workloads, /stats, /certificates, /denials, /metrics, \
             /healthz/live and /healthz/ready\n",
        ),
        (Surface::Metrics, _) => {
            text(StatusCode::NOT_FOUND, "there are /metrics, /healthz/live and /healthz/ready\n")
        }
    }
}

/// The owner did not answer.
struct Stuck;

impl Stuck {
    fn reply(&self) -> Reply {
        text(StatusCode::SERVICE_UNAVAILABLE, "the agent does not answer\n")
    }
}

async fn ask<T>(owner: &Owner, question: fn(oneshot::Sender<T>) -> AdminRequest) -> Result<T, Stuck> {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        owner.send(question(reply)).await.map_err(|_closed| Stuck)?;
        answer.await.map_err(|_dropped| Stuck)
    };
    tokio::time::timeout(PATIENCE, asked).await.map_err(|_elapsed| Stuck)?
}

fn json<T: Serialize>(answer: Result<T, Stuck>) -> Reply {
    match answer.map(|value| serde_json::to_vec(&value)) {
        Ok(Ok(bytes)) => body(StatusCode::OK, "application/json", bytes),
        Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
        Err(stuck) => stuck.reply(),
    }
}

fn text(status: StatusCode, text: &str) -> Reply {
    body(status, "text/plain; charset=utf-8", text.to_owned())
}

fn body(status: StatusCode, kind: &'static str, content: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(content.into()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}

#[cfg(test)]
mod tests;
