//! Connections: who may come in, how long they may take, and how everything ends.

mod patience;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::de::DeserializeOwned;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tower_http::catch_panic::CatchPanicLayer;

use super::Limits;
use super::error::{ApiError, ApiResult, log};
use super::metrics::Metrics;
use crate::{interrupt, output};
use patience::Patience;

/// The endpoints of a model, and how its work ends.
pub struct Service {
    pub router: Router,
    /// Takes nothing new.
    pub close: Box<dyn Fn() + Send + Sync>,
    /// Ends what is going on.
    pub abort: Box<dyn Fn() + Send + Sync>,
    /// Waits until all is over; it may take a while.
    pub join: Box<dyn FnOnce() + Send>,
}

/// Who may come in.
#[derive(Clone)]
pub struct Door {
    key: Option<Arc<str>>,
    /// Whether only programs of this machine may connect: then requests for names of other machines are refused, by
    /// which a web page could make a browser talk to the server.
    local: bool,
}

impl Door {
    pub fn new(key: Option<String>, local: bool) -> Self {
        Door { key: key.map(Into::into), local }
    }

    fn check(&self, path: &str, headers: &HeaderMap) -> ApiResult<()> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let host = text(header::HOST).unwrap_or_default();
        if self.key.is_none() && self.local && !is_local(host) {
            let message = "the Host must be this machine (localhost); other names need an API key";
            return Err(ApiError::status(StatusCode::FORBIDDEN, message));
        }
        // web pages of others: browsers tell where they come from
        if let Some(origin) = headers.get(header::ORIGIN)
            && self.key.is_none()
            && origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_none_or(|(_, from)| from != host)
        {
            return Err(ApiError::status(StatusCode::FORBIDDEN, "requests from pages of other servers are refused"));
        }
        let Some(key) = &self.key else { return Ok(()) };
        let given = text(header::AUTHORIZATION).and_then(|value| value.split_once(' '));
        let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, given)| given.trim());
        match given {
            _ if path == "/health" => Ok(()),
            Some(given) if same(given.as_bytes(), key.as_bytes()) => Ok(()),
            _ => Err(ApiError::unauthorized()),
        }
    }
}

/// Compares in constant time, so that the time does not reveal where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[derive(Clone)]
struct Common {
    door: Door,
    metrics: Arc<Metrics>,
}

/// Answers until it is told to stop; then what was begun gets its time to end.
pub async fn serve(
    address: SocketAddr,
    service: Service,
    door: Door,
    limits: Limits,
    metrics: Arc<Metrics>,
    stop: watch::Sender<bool>,
) -> Result<()> {
    let Service { router, close, abort, join } = service;
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let mut signal = std::pin::pin!(stop_signal()?);
    let common = Common { door, metrics };
    let router = router
        .route("/health", get(async || axum::Json(serde_json::json!({"status": "ok"}))))
        .route("/metrics", get(metrics_text).with_state(common.clone()))
        .fallback(async || {
            ApiError::status(StatusCode::NOT_FOUND, "there is nothing here; /v1/models names the model served")
        })
        .method_not_allowed_fallback(async || ApiError::status(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"))
        .layer(CatchPanicLayer::custom(|_| ApiError::internal("a handler panicked").into_response()))
        .layer(middleware::from_fn_with_state(common, watch_over));
    // nobody need read it
    let _ = output::out(format!("listening on http://{}\n", listener.local_addr()?));

    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place?,
            () = &mut signal => break,
        };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    // too many open files, or a client that has already gone
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            },
            () = &mut signal => break,
        };
        let (router, stopping, io_timeout) = (router.clone(), stop.subscribe(), limits.io_timeout);
        tokio::spawn(async move {
            let _place = place;
            connection(stream, router, stopping, io_timeout).await;
        });
    }
    let second = stop_signal()?;
    tokio::spawn(async move {
        second.await;
        std::process::exit(interrupt::EXIT_CODE.into());
    });
    drop(listener);
    log("stopping; a second signal ends it at once");
    stop.send_replace(true);
    close();
    let _ = tokio::time::timeout(limits.drain, stop.closed()).await;
    abort();
    let _ = tokio::time::timeout(Duration::from_secs(1), stop.closed()).await;
    tokio::task::spawn_blocking(join).await?;
    Ok(())
}

async fn connection(
    stream: tokio::net::TcpStream,
    router: Router,
    mut stopping: watch::Receiver<bool>,
    io_timeout: Duration,
) {
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(Patience::new(stream, io_timeout));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(io_timeout);
    let connection = http.serve_connection(io, TowerToHyperService::new(router)).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => {}
        () = async { drop(stopping.wait_for(|stop| *stop).await) } => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

/// Ctrl-C, or what `kill` and service managers send.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    let (mut interrupt, mut terminate) = {
        use tokio::signal::unix::{SignalKind, signal};
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    Ok(async move {
        #[cfg(unix)]
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
    })
}

/// Around every request: the door, and counting.
async fn watch_over(State(common): State<Common>, request: Request, next: Next) -> Response {
    const PATHS: [&str; 8] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/classify",
        "/stream",
        "/health",
        "/metrics",
    ];
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let path = PATHS.into_iter().find(|known| *known == path).unwrap_or("other");
    let response = match common.door.check(path, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    common.metrics.response(path, response.status().as_u16());
    response
}

async fn metrics_text(State(common): State<Common>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], common.metrics.text()).into_response()
}

/// The JSON of a request.
pub async fn json<T: DeserializeOwned>(request: Request, limits: &Limits) -> ApiResult<T> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    // what a web page can send without asking first is not JSON
    if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
        let message = "the body must be application/json, and say so in Content-Type";
        return Err(ApiError::status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let body = axum::body::to_bytes(request.into_body(), limits.max_body);
    let bytes = match tokio::time::timeout(limits.io_timeout, body).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = cause {
                if error.is::<http_body_util::LengthLimitError>() {
                    let message = format!("the body has more than {} bytes", limits.max_body);
                    return Err(ApiError::status(StatusCode::PAYLOAD_TOO_LARGE, message));
                }
                cause = error.source();
            }
            return Err(ApiError::bad("the body did not arrive"));
        }
        Err(_) => return Err(ApiError::status(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive")),
    };
    serde_json::from_slice(&bytes).map_err(|error| ApiError::bad(format!("the body cannot be used: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn who_may_come_in() {
        let open = Door::new(None, true);
        for (host, allowed) in [
            ("127.0.0.1:8080", true),
            ("localhost", true),
            ("[::1]:80", true),
            ("evil.example:8080", false),
            ("127.0.0.1.evil.example", false),
            ("", false),
        ] {
            assert_eq!(open.check("/v1/models", &headers(&[("host", host)])).is_ok(), allowed, "{host}");
        }
        let page = |origin| headers(&[("host", "localhost:1"), ("origin", origin)]);
        assert!(open.check("/stream", &page("http://localhost:1")).is_ok());
        assert!(open.check("/stream", &page("https://evil.example")).is_err());
        assert!(open.check("/stream", &page("null")).is_err());

        let locked = Door::new(Some("secret".into()), false);
        let with = |value| headers(&[("host", "a"), ("authorization", value)]);
        assert!(locked.check("/v1/models", &with("Bearer secret")).is_ok());
        for wrong in ["Bearer secre", "Bearer secretx", "Basic secret", "secret", "Bearer "] {
            assert!(locked.check("/metrics", &with(wrong)).is_err(), "{wrong}");
        }
        assert!(locked.check("/health", &headers(&[])).is_ok());
    }
}
