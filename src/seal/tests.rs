use std::{convert::Infallible, io::Write};

use http::Response;
use http_body_util::BodyExt;
use hyper::{body::Incoming, service::service_fn};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::{evidence::record::TaskClosed, policy::rule::Rule};

/// Starts a gateway with a certificate for `name` that returns this reply. Returns its address and authority.
pub(crate) async fn gateway(name: &str, status: u16, body: String) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    (serve(vec![certificate.der().clone()], private, status, body).await, certificate.pem())
}

/// Starts a gateway with this certificate that returns this reply. Returns its address.
pub(crate) async fn serve(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    status: u16,
    body: String,
) -> String {
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(Arc::new(config));
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let body = body.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let body = body.clone();
                async move {
                    assert_eq!(request.uri().path(), wire::LOG_SEAL);
                    assert_eq!(request.headers()[header::AUTHORIZATION], "Bearer secret");
                    let bytes = request.into_body().collect().await.unwrap().to_bytes();
                    let asked: SealRequest = serde_json::from_slice(&bytes).unwrap();
                    assert!(!asked.uid.is_empty());
                    Ok::<_, Infallible>(Response::builder().status(status).body(Full::new(Bytes::from(body))).unwrap())
                }
            });
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    });
    address
}

pub(crate) fn request() -> SealRequest {
    SealRequest {
        namespace: "ns".into(),
        name: "t".into(),
        uid: "u".into(),
        attempt: 1,
        bucket: "b".into(),
        prefix: String::new(),
        closed: TaskClosed {
            phase: "Succeeded".into(),
            failure_class: String::new(),
            reason: "x".into(),
            exit_code: Some(0),
            images: Default::default(),
        },
        presumed: false,
    }
}

pub(crate) fn token() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"secret\n").unwrap();
    file
}

pub(crate) fn reply() -> SealReply {
    SealReply {
        compensation_commitment: Some(Default::default()),
        closed: None,
        origin: "belay.dev/task/u".into(),
        location: "s3://b/ns/t/u".into(),
        endpoint: None,
        size: 3,
        root: "AA==".into(),
        usage: Default::default(),
        denied: Default::default(),
    }
}

#[tokio::test]
async fn a_log_is_sealed() {
    let (address, authority) = gateway(wire::SERVER_NAME, 200, serde_json::to_string(&reply()).unwrap()).await;
    let token = token();
    let gateway = Gateway::new(address, token.path().into(), &authority).unwrap();
    assert_eq!(gateway.seal(&request()).await.unwrap(), reply());
}

#[tokio::test]
async fn a_refusal_is_told_in_the_gateways_words() {
    let refusal = Refusal { rule: Rule::Evidence, reason: "the bucket is away".into() };
    let (address, authority) = gateway(wire::SERVER_NAME, 503, serde_json::to_string(&refusal).unwrap()).await;
    let token = token();
    let error = Gateway::new(address, token.path().into(), &authority).unwrap().seal(&request()).await.unwrap_err();
    assert!(matches!(&error, SealError::Refused(told) if *told == refusal), "{error}");
}

#[tokio::test]
async fn what_is_no_answer_is_an_error() {
    let (address, authority) = gateway(wire::SERVER_NAME, 200, "<html>".into()).await;
    let token = token();
    let error = Gateway::new(address, token.path().into(), &authority).unwrap().seal(&request()).await.unwrap_err();
    assert!(matches!(error, SealError::Answer { status: StatusCode::OK, .. }), "{error}");
}

#[tokio::test]
async fn the_token_goes_to_no_other_certificate() {
    let token = token();
    let (address, authority) = gateway("another-name", 200, serde_json::to_string(&reply()).unwrap()).await;
    let error =
        Gateway::new(address.clone(), token.path().into(), &authority).unwrap().seal(&request()).await.unwrap_err();
    assert!(matches!(error, SealError::Unreachable { .. }), "{error}");
    let (_, other) = gateway(wire::SERVER_NAME, 200, String::new()).await;
    let error = Gateway::new(address, token.path().into(), &other).unwrap().seal(&request()).await.unwrap_err();
    assert!(matches!(error, SealError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn without_a_token_nothing_is_asked() {
    let (_, authority) = gateway(wire::SERVER_NAME, 200, String::new()).await;
    let gateway = Gateway::new("127.0.0.1:1".into(), "/nonexistent".into(), &authority).unwrap();
    assert!(matches!(gateway.seal(&request()).await.unwrap_err(), SealError::Token { .. }));
}
