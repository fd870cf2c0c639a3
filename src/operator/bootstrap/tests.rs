use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use super::*;
use crate::{operator::tests::cluster::Cluster, seal};

const SECRETS: &str = "/api/v1/namespaces/belay-system/secrets";
const KEY: &str = "/api/v1/namespaces/belay-system/configmaps/belay-witness-key";

fn at(days: i64) -> Timestamp {
    Timestamp::now().checked_add(SignedDuration::from_hours(24 * days)).unwrap()
}

fn data(cluster: &Cluster, name: &str, key: &str) -> Vec<u8> {
    let secret: Secret = serde_json::from_value(cluster.get(&format!("{SECRETS}/{name}")).unwrap()).unwrap();
    secret.data.unwrap()[key].0.clone()
}

/// Checks whether the operator accepts a gateway that serves the created certificate.
async fn serves(cluster: &Cluster, authority: &str) -> bool {
    let chain = CertificateDer::pem_slice_iter(&data(cluster, GATEWAY_TLS, TLS_CERT)).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(&data(cluster, GATEWAY_TLS, TLS_KEY)).unwrap();
    let address = seal::tests::serve(chain, key, 200, serde_json::to_string(&seal::tests::reply()).unwrap()).await;
    let token = seal::tests::token();
    let gateway = seal::Gateway::new(address, token.path().into(), authority).unwrap();
    gateway.seal(&seal::tests::request()).await.is_ok()
}

#[tokio::test]
async fn what_is_absent_is_made_once() {
    let cluster = Cluster::default();
    let authority = ensure(&cluster.client(), "belay-system", false, at(0)).await.unwrap();
    assert_eq!(cluster.writes().len(), 4);
    assert!(serves(&cluster, &authority).await);
    let signer = Signer::from_pkcs8(WITNESS_NAME, &data(&cluster, WITNESS, WITNESS_PK8)).unwrap();
    assert_eq!(cluster.get(KEY).unwrap()["data"][VKEY], signer.verifier().to_string());
    assert!(signer.verifier().is_witness());
    assert_eq!(ensure(&cluster.client(), "belay-system", false, at(1)).await.unwrap(), authority);
    assert_eq!(cluster.writes(), Vec::<String>::new());
}

#[rstest::rstest]
#[case::gateway(false, &[GATEWAY_TLS])]
#[case::and_webhook(true, &[GATEWAY_TLS, WEBHOOK_TLS])]
#[tokio::test]
async fn only_certificates_are_renewed_and_their_authority_stays(#[case] webhook: bool, #[case] renewed: &[&str]) {
    let cluster = Cluster::default();
    let authority = ensure(&cluster.client(), "belay-system", webhook, at(-340)).await.unwrap();
    let (witness, before) = (data(&cluster, WITNESS, WITNESS_PK8), data(&cluster, GATEWAY_TLS, TLS_CERT));
    cluster.requests();
    assert_eq!(ensure(&cluster.client(), "belay-system", webhook, at(0)).await.unwrap(), authority);
    let patches: Vec<_> = renewed.iter().map(|name| format!("PATCH {SECRETS}/{name}")).collect();
    assert_eq!(cluster.writes(), patches);
    assert_ne!(data(&cluster, GATEWAY_TLS, TLS_CERT), before);
    assert_eq!(data(&cluster, WITNESS, WITNESS_PK8), witness);
    assert!(serves(&cluster, &authority).await);
    cluster.requests();
    ensure(&cluster.client(), "belay-system", webhook, at(0)).await.unwrap();
    assert_eq!(cluster.writes(), Vec::<String>::new());
}

#[tokio::test]
async fn a_webhook_that_is_switched_on_later_gets_a_certificate_of_the_same_authority() {
    let cluster = Cluster::default();
    let authority = ensure(&cluster.client(), "belay-system", false, at(0)).await.unwrap();
    assert!(cluster.get(&format!("{SECRETS}/{WEBHOOK_TLS}")).is_none());
    cluster.requests();
    assert_eq!(ensure(&cluster.client(), "belay-system", true, at(1)).await.unwrap(), authority);
    assert_eq!(cluster.writes(), [format!("POST {SECRETS}")]);
    assert_eq!(data(&cluster, WEBHOOK_TLS, CA_CERT), authority.as_bytes());
    assert_ne!(data(&cluster, WEBHOOK_TLS, TLS_CERT), data(&cluster, GATEWAY_TLS, TLS_CERT));
}

#[tokio::test]
async fn another_witness_than_the_published_one_is_refused() {
    let cluster = Cluster::default();
    ensure(&cluster.client(), "belay-system", false, at(0)).await.unwrap();
    cluster.remove(&format!("{SECRETS}/{WITNESS}"));
    let error = ensure(&cluster.client(), "belay-system", false, at(0)).await.unwrap_err();
    assert!(matches!(error, BootstrapError::Witness { .. }), "{error}");
}

#[tokio::test]
async fn a_secret_that_is_something_else_is_refused_and_kept() {
    let cluster = Cluster::default();
    let path = format!("{SECRETS}/{WITNESS}");
    let metadata = serde_json::json!({ "name": WITNESS, "namespace": "belay-system" });
    let secret = serde_json::json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": { "witness.pk8": "AAAA" } });
    cluster.put(&path, secret);
    let before = cluster.get(&path);
    let error = ensure(&cluster.client(), "belay-system", false, at(0)).await.unwrap_err();
    assert!(matches!(error, BootstrapError::Content { name: WITNESS, .. }), "{error}");
    assert_eq!(cluster.get(&path), before);
}
