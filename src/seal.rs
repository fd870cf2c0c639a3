//! The client that asks the gateway to seal a task's log.
//!
//! Guarantees: the request goes only to a server with a certificate of the gateway's own certificate authority. Each request carries a
//! freshly read token. A request can be repeated, because sealing a sealed log returns the same reply.
//!
//! Non-goals: interpreting denials. The caller gets them in the gateway's words.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::wire::{self, Refusal, SealReply, SealRequest};

/// The timeout of the whole exchange, during which the gateway writes to the evidence bucket.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest reply, in bytes.
const LONGEST_REPLY: usize = 64 * 1024;

/// The reason why a log is not sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The certificate authority cannot be used.
    #[error("expected the gateway's certificate authority in PEM, found none that can be used: {0}")]
    Authority(String),
    /// The token cannot be read.
    #[error("cannot read the operator's token for the gateway at {path}: {cause}")]
    Token {
        /// The file of the token.
        path: PathBuf,
        /// The error.
        cause: std::io::Error,
    },
    /// The gateway cannot be reached.
    #[error("cannot reach the gateway at {address}: {cause}")]
    Unreachable {
        /// The gateway's address.
        address: String,
        /// The error.
        cause: String,
    },
    /// The gateway denied the request.
    #[error("the gateway does not seal the log: {} ({})", .0.reason, .0.rule)]
    Refused(Refusal),
    /// The gateway sent something that is not a reply of this protocol.
    #[error("the gateway answered {status} with a body that is no answer: {cause}")]
    Answer {
        /// The HTTP status.
        status: StatusCode,
        /// What is wrong with the body.
        cause: String,
    },
}

/// A client that seals logs.
pub trait Seal: Send + Sync {
    /// Seals a log. Every error may be temporary.
    fn seal<'a>(&'a self, request: &'a SealRequest) -> BoxFuture<'a, Result<SealReply, SealError>>;
}

impl Seal for Gateway {
    fn seal<'a>(&'a self, request: &'a SealRequest) -> BoxFuture<'a, Result<SealReply, SealError>> {
        Box::pin(Self::seal(self, request))
    }
}

/// The client for the gateway.
pub struct Gateway {
    address: String,
    token: PathBuf,
    tls: TlsConnector,
}

impl Gateway {
    /// Creates a client for the gateway at `address`, a `host:port`. The gateway must have a certificate of `authority`. The file `token`
    /// has the token.
    ///
    /// # Errors
    /// Returns an error if `authority` is not a PEM certificate.
    pub fn new(address: String, token: PathBuf, authority: &str) -> Result<Self, SealError> {
        let unusable = |error: &dyn std::fmt::Display| SealError::Authority(error.to_string());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(authority.as_bytes()) {
            roots.add(certificate.map_err(|error| unusable(&error))?).map_err(|error| unusable(&error))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { address, token, tls: TlsConnector::from(Arc::new(config)) })
    }

    /// Seals a log.
    ///
    /// # Errors
    /// Returns a [`SealError`]. Every error may be temporary.
    pub async fn seal(&self, request: &SealRequest) -> Result<SealReply, SealError> {
        let token = tokio::fs::read_to_string(&self.token)
            .await
            .map_err(|cause| SealError::Token { path: self.token.clone(), cause })?;
        match tokio::time::timeout(TIMEOUT, self.exchange(request, token.trim())).await {
            Ok(reply) => reply,
            Err(_) => Err(self.unreachable(&format!("no answer in {} s", TIMEOUT.as_secs()))),
        }
    }

    async fn exchange(&self, request: &SealRequest, token: &str) -> Result<SealReply, SealError> {
        let name = ServerName::try_from(wire::SERVER_NAME).map_err(|error| self.unreachable(&error))?;
        let stream = TcpStream::connect(&self.address).await.map_err(|error| self.unreachable(&error))?;
        let stream = self.tls.connect(name, stream).await.map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unreachable(&error))?;
        // The connection ends with the sender. Its errors are reported by the request.
        tokio::spawn(connection);
        let body = serde_json::to_vec(request).map_err(|error| self.unreachable(&error))?;
        let request = Request::post(wire::LOG_SEAL)
            .header(header::HOST, wire::SERVER_NAME)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.unreachable(&error))?;
        let reply = sender.send_request(request).await.map_err(|error| self.unreachable(&error))?;
        let status = reply.status();
        let body =
            Limited::new(reply.into_body(), LONGEST_REPLY).collect().await.map_err(|error| self.unreachable(&error))?;
        let body = body.to_bytes();
        let answer = |error: serde_json::Error| SealError::Answer { status, cause: error.to_string() };
        if status.is_success() {
            serde_json::from_slice(&body).map_err(answer)
        } else {
            Err(SealError::Refused(serde_json::from_slice(&body).map_err(answer)?))
        }
    }

    fn unreachable(&self, cause: &(impl std::fmt::Display + ?Sized)) -> SealError {
        SealError::Unreachable { address: self.address.clone(), cause: cause.to_string() }
    }
}

#[cfg(test)]
pub(crate) mod tests;
