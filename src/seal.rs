//! Asks the gateway to end a task's log.
//!
//! Promises: the request goes to the gateway's own certificate authority's certificate, with a token that is read anew each time;
//! asking again is safe, since sealing a sealed log answers the same. Refuses: to guess; what the gateway refuses is reported in
//! its words.

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

/// For the whole exchange: the gateway writes to the object store meanwhile.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Longest reply.
const LONGEST_REPLY: usize = 64 * 1024;

/// Why a log is not sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The certificate authority cannot be used.
    #[error("expected the gateway's certificate authority in PEM, found none that can be used: {0}")]
    Authority(String),
    /// No token.
    #[error("cannot read the operator's token for the gateway at {path}: {cause}")]
    Token {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// No way to it.
    #[error("cannot reach the gateway at {address}: {cause}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why not.
        cause: String,
    },
    /// It refuses.
    #[error("the gateway does not seal the log: {} ({})", .0.reason, .0.rule)]
    Refused(Refusal),
    /// It answered something else.
    #[error("the gateway answered {status} with a body that is no answer: {cause}")]
    Answer {
        /// The HTTP status.
        status: StatusCode,
        /// What is wrong with the body.
        cause: String,
    },
}

/// Whoever ends a task's log.
pub trait Seal: Send + Sync {
    /// Seals a log. Every error may pass with time.
    fn seal<'a>(&'a self, request: &'a SealRequest) -> BoxFuture<'a, Result<SealReply, SealError>>;
}

impl Seal for Gateway {
    fn seal<'a>(&'a self, request: &'a SealRequest) -> BoxFuture<'a, Result<SealReply, SealError>> {
        Box::pin(Self::seal(self, request))
    }
}

/// The way to the gateway.
pub struct Gateway {
    address: String,
    token: PathBuf,
    tls: TlsConnector,
}

impl Gateway {
    /// At `address`, a `host:port`, with a certificate of this authority, and a token in this file.
    ///
    /// # Errors
    /// If the authority is not PEM of a certificate.
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
    /// See [`SealError`]. All of them may pass with time.
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
        // It ends with the sender; what goes wrong on it is what the request reports.
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
