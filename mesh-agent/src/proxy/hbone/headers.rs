//! Headers of a CONNECT. Pure.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Version};

use crate::proxy::stream::{self, Reason};

const FORWARDED: &str = "forwarded";
const TRACEPARENT: &str = "traceparent";

/// A CONNECT that no workload of ours can answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Only CONNECT makes a stream.
    #[error("not a CONNECT")]
    Method,
    /// An address and a port are wanted.
    #[error("the authority is no address with a port")]
    Authority,
}

/// What a CONNECT asks for.
pub type Asked = stream::Request;

/// Names a trace that begins here, by numbers at random (W3C Trace Context, section 3.2). Whether it is recorded is for others to say.
pub(super) fn traceparent(random: [u8; 24]) -> Box<str> {
    let number = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (trace, parent) = random.split_at(16);
    format!("00-{}-{}-00", number(trace), number(parent)).into()
}

/// The head of a request. The baggage describes the source to the peer's telemetry; nothing is decided by it.
pub(super) fn request(asked: &Asked, baggage: Option<&HeaderValue>) -> Result<Request<()>, http::Error> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(asked.destination.to_string());
    if let Some(client) = asked.client {
        let host = asked.host.as_deref().map(|host| format!(";host={host}")).unwrap_or_default();
        request = request.header(FORWARDED, format!("for=\"{client}\"{host}"));
    }
    if let Some(traceparent) = asked.traceparent.as_deref() {
        request = request.header(TRACEPARENT, traceparent);
    }
    if let Some(baggage) = baggage {
        request = request.header("baggage", baggage);
    }
    request.body(())
}

/// Reads a request.
pub fn asked<B>(request: &Request<B>) -> Result<Asked, BadRequest> {
    if request.method() != Method::CONNECT {
        return Err(BadRequest::Method);
    }
    let authority = request.uri().authority().ok_or(BadRequest::Authority)?;
    let destination: SocketAddr = authority.as_str().parse().map_err(|_name| BadRequest::Authority)?;
    let (client, host) = forwarded(request.headers());
    let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let traceparent = text(TRACEPARENT).filter(|text| text.len() == 55).map(Into::into);
    Ok(Asked { client, host, traceparent, ..Asked::to(destination) })
}

/// `for` and `host` of the first element (RFC 7239).
fn forwarded(headers: &HeaderMap) -> (Option<SocketAddr>, Option<Box<str>>) {
    let value = headers.get(FORWARDED).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (mut client, mut host) = (None, None);
    for pair in value.split(',').next().unwrap_or_default().split(';') {
        let Some((name, value)) = pair.split_once('=') else { continue };
        let value = value.trim().trim_matches('"');
        if name.trim().eq_ignore_ascii_case("for") {
            client = value.parse().ok();
        } else if name.trim().eq_ignore_ascii_case("host") && (1..=253).contains(&value.len()) {
            host = Some(value.into());
        }
    }
    (client, host)
}

/// The status that tells a refusal.
pub(super) fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::Policy => StatusCode::UNAUTHORIZED,
        Reason::BadRequest => StatusCode::BAD_REQUEST,
        Reason::Upstream | Reason::Draining | Reason::Limit => StatusCode::SERVICE_UNAVAILABLE,
        Reason::Timeout => StatusCode::GATEWAY_TIMEOUT,
    }
}

/// What a status tells.
pub(super) fn reason(status: StatusCode) -> Reason {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Reason::Policy,
        StatusCode::GATEWAY_TIMEOUT => Reason::Timeout,
        status if status.is_client_error() => Reason::BadRequest,
        _ => Reason::Upstream,
    }
}
