//! The gateway's own credentials can neither delete evidence nor shorten its lock, on two stores.

use aws_sdk_s3::{
    Client,
    config::{BehaviorVersion, Credentials, Region},
    primitives::DateTime,
    types::{ObjectLockMode, ObjectLockRetention, ObjectLockRetentionMode},
};
use aws_smithy_http_client::tls;

use crate::support::setting;

/// Returns a client of the store that these settings name.
pub fn store(endpoint: &str, key: &str, secret: &str) -> Client {
    let provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
    let http = aws_smithy_http_client::Builder::new().tls_provider(provider).build_https();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(setting("S3_REGION")))
        .endpoint_url(setting(endpoint))
        .credentials_provider(Credentials::new(setting(key), setting(secret), None, None, "e2e"))
        .force_path_style(true)
        .http_client(http)
        .build();
    Client::from_conf(config)
}

async fn holds(endpoint: &str, key: &str, secret: &str) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let gateway = store(endpoint, key, secret);
    let bucket = setting("S3_BUCKET");
    let object = format!("e2e/locks/{}", jiff::Timestamp::now().as_nanosecond());
    let now = jiff::Timestamp::now().as_second();
    let day = 24 * 60 * 60;
    let put = gateway
        .put_object()
        .bucket(&bucket)
        .key(&object)
        .body(b"evidence".to_vec().into())
        .checksum_algorithm(aws_sdk_s3::types::ChecksumAlgorithm::Sha256)
        .object_lock_mode(ObjectLockMode::Compliance)
        .object_lock_retain_until_date(DateTime::from_secs(now + day))
        .if_none_match("*")
        .send()
        .await
        .expect("the gateway's credentials must be able to write");
    let version = put.version_id().expect("the bucket has no versions").to_owned();

    for bypass in [None, Some(true)] {
        let deleted = gateway
            .delete_object()
            .bucket(&bucket)
            .key(&object)
            .version_id(&version)
            .set_bypass_governance_retention(bypass)
            .send()
            .await;
        assert!(deleted.is_err(), "{endpoint}: the gateway deleted a locked version (bypass {bypass:?})");
        for (mode, until) in
            [(ObjectLockRetentionMode::Compliance, now + day / 2), (ObjectLockRetentionMode::Governance, now + day)]
        {
            let retention =
                ObjectLockRetention::builder().mode(mode.clone()).retain_until_date(DateTime::from_secs(until)).build();
            let shortened = gateway
                .put_object_retention()
                .bucket(&bucket)
                .key(&object)
                .version_id(&version)
                .retention(retention)
                .set_bypass_governance_retention(bypass)
                .send()
                .await;
            assert!(shortened.is_err(), "{endpoint}: the gateway set {mode:?} until {until} (bypass {bypass:?})");
        }
    }
    let overwritten = gateway
        .put_object()
        .bucket(&bucket)
        .key(&object)
        .body(b"forged".to_vec().into())
        .if_none_match("*")
        .checksum_algorithm(aws_sdk_s3::types::ChecksumAlgorithm::Sha256)
        .send()
        .await;
    assert!(overwritten.is_err(), "{endpoint}: a conditional put went over a segment");
    let body = gateway.get_object().bucket(&bucket).key(&object).version_id(&version).send().await;
    let body = body.expect("the locked version is gone").body.collect().await.unwrap().into_bytes();
    assert_eq!(&body[..], b"evidence");
}

#[tokio::test]
async fn evidence_is_locked_on_versitygw() {
    holds("S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY").await;
}

#[tokio::test]
async fn evidence_is_locked_on_seaweedfs() {
    holds("SEAWEED_ENDPOINT", "SEAWEED_ACCESS_KEY", "SEAWEED_SECRET_KEY").await;
}
