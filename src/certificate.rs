//! Serves a TLS certificate from a folder and reloads it when the files change.
//!
//! Guarantees: a renewed certificate is served within seconds, without a restart. A certificate that cannot be read or does not match its
//! key is not used, and the last good one stays in use.
//! Rejects: starting without a usable certificate.

use std::{path::PathBuf, sync::Arc, time::Duration};

use parking_lot::RwLock;
use rustls::{
    ServerConfig,
    crypto::ring::sign::any_supported_type,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// The interval between two reads of the folder. The kubelet itself takes a minute to update a mounted Secret.
pub const LOOK: Duration = Duration::from_secs(10);

/// A certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {file}: {problem}")]
pub struct CertificateError {
    file: String,
    problem: String,
}

/// The certificate that is served now.
#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().clone())
    }
}

/// Loads `tls.crt` and `tls.key`. Returns the server's TLS configuration and a future that never ends. The future keeps the certificate
/// current and reports whether the last read succeeded.
///
/// # Errors
/// Returns an error if either file cannot be used or if the key does not match the certificate.
pub fn serve(
    folder: PathBuf,
    report: impl Fn(bool) + Send + 'static,
) -> Result<(ServerConfig, impl Future<Output = std::convert::Infallible> + Send + 'static), CertificateError> {
    let mut last = read(&folder)?;
    let current = Arc::new(Current(RwLock::new(Arc::new(key_of(&folder, &last)?))));
    report(true);
    let config = ServerConfig::builder().with_no_client_auth().with_cert_resolver(current.clone());
    let follow = async move {
        loop {
            tokio::time::sleep(LOOK).await;
            let looked = read(&folder).and_then(|files| {
                if files == last {
                    return Ok(None);
                }
                key_of(&folder, &files).map(|key| Some((files, key)))
            });
            match looked {
                Ok(None) => report(true),
                Ok(Some((files, key))) => {
                    *current.0.write() = Arc::new(key);
                    last = files;
                    report(true);
                    tracing::info!("serving a renewed certificate");
                }
                Err(error) => {
                    report(false);
                    tracing::warn!(%error, "the certificate cannot be renewed; the last one serves on");
                }
            }
        }
    };
    Ok((config, follow))
}

/// A certificate chain and its key, both in PEM.
type Files = (Vec<u8>, Vec<u8>);

fn read(folder: &std::path::Path) -> Result<Files, CertificateError> {
    let file = |name: &str| {
        let path = folder.join(name);
        std::fs::read(&path).map_err(|e| CertificateError { file: path.display().to_string(), problem: e.to_string() })
    };
    Ok((file("tls.crt")?, file("tls.key")?))
}

fn key_of(folder: &std::path::Path, (chain, key): &Files) -> Result<CertifiedKey, CertificateError> {
    let wrong =
        |name: &str, problem: String| CertificateError { file: folder.join(name).display().to_string(), problem };
    let chain = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| wrong("tls.crt", format!("expected PEM certificates: {e}")))?;
    if chain.is_empty() {
        return Err(wrong("tls.crt", "expected PEM certificates, found none".to_owned()));
    }
    let key =
        PrivateKeyDer::from_pem_slice(key).map_err(|e| wrong("tls.key", format!("expected a PEM private key: {e}")))?;
    let key = any_supported_type(&key).map_err(|e| wrong("tls.key", e.to_string()))?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|e| wrong("tls.key", format!("expected the key of tls.crt: {e}")))?;
    Ok(certified)
}

#[cfg(test)]
mod tests;
