//! Errors as OpenAI's clients know them.

use std::io::Write;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// A line of the log. Nobody need read it: `eprintln!` would panic where it was closed.
pub fn log(line: &str) {
    let _ = writeln!(std::io::stderr(), "hymba: {line}");
}

#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    message: String,
    param: Option<&'static str>,
    code: Option<&'static str>,
}

pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    /// The request cannot be served as it is.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::status(StatusCode::BAD_REQUEST, message)
    }

    /// A field of it cannot be used.
    pub fn field(param: &'static str, message: impl Into<String>) -> Self {
        ApiError { param: Some(param), ..Self::bad(message) }
    }

    pub fn too_long(message: impl Into<String>) -> Self {
        ApiError { code: Some("context_length_exceeded"), ..Self::bad(message) }
    }

    pub fn status(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, code: None }
    }

    pub fn no_model(asked: &str, served: &str) -> Self {
        let message = format!("there is no model {asked:?}; this server has {served:?}");
        ApiError { code: Some("model_not_found"), ..Self::status(StatusCode::NOT_FOUND, message) }
    }

    pub fn unauthorized() -> Self {
        let message = "an API key is needed: Authorization: Bearer KEY";
        ApiError { code: Some("invalid_api_key"), ..Self::status(StatusCode::UNAUTHORIZED, message) }
    }

    pub fn busy() -> Self {
        let message = "the server is busy; try again later";
        ApiError { code: Some("rate_limit_exceeded"), ..Self::status(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    pub fn stopping() -> Self {
        Self::status(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down")
    }

    /// What broke is in the log; strangers are told no more than that.
    pub fn internal(what: &str) -> Self {
        log(what);
        Self::status(StatusCode::INTERNAL_SERVER_ERROR, "internal error of the server")
    }

    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

/// Of what is wrong with what users say.
impl From<hymba::Error> for ApiError {
    fn from(error: hymba::Error) -> Self {
        use hymba::Error;
        match error {
            Error::Option { option, .. } => ApiError::field(option, error.to_string()),
            Error::Tokens(_)
            | Error::Text { .. }
            | Error::Shape { .. }
            | Error::Lengths(_)
            | Error::State(_)
            | Error::Logits(_) => ApiError::bad(error.to_string()),
            error => ApiError::internal(&error.to_string()),
        }
    }
}

/// How the work on a request can end badly.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// It took too long.
    Timeout,
    /// The server is going down.
    Stopped,
    /// It cannot be done, for this reason.
    Refused(String),
    /// Something broke that should not have.
    Internal(String),
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Timeout => ApiError::status(StatusCode::GATEWAY_TIMEOUT, "it took longer than the server allows"),
            Failure::Stopped => ApiError::stopping(),
            Failure::Refused(reason) => ApiError::bad(reason),
            Failure::Internal(what) => ApiError::internal(&what),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS || self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
