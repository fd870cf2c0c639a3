//! A bucket with Object Lock as a store.
//!
//! Guarantees: every put is conditional (`If-None-Match: *`), carries its SHA-256 and its retention, by the store's own clock, and is
//! complete or absent. Every call ends in bounded time.
//! Non-goals: creating or changing buckets, and trusting a bucket's default retention.
//!
//! A delete marker hides an object but removes nothing. `Store::list_versions` reports both, and auditors use it.

use std::{
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use aws_config::{
    BehaviorVersion, Region, environment::region::EnvironmentVariableRegionProvider, meta::region::RegionProviderChain,
};
use aws_sdk_s3::{
    Client,
    config::{
        ConfigBag, Intercept, ProvideCredentials, RequestChecksumCalculation, RuntimeComponents,
        SharedCredentialsProvider,
        http::HttpResponse,
        interceptors::{BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextMut},
        retry::RetryConfig,
        timeout::TimeoutConfig,
    },
    error::{BoxError, DisplayErrorContext, ProvideErrorMetadata, SdkError},
    primitives::{ByteStream, DateTime, DateTimeFormat},
    types::{ChecksumAlgorithm, ObjectLockMode},
};
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode};
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, future::BoxFuture};
use jiff::Timestamp;

use super::{Mode, PutError, Retention, Store, StoreError, StoredObject};
use crate::canonical;

/// The time limit for a connection. A store that does not accept a connection by then is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The time limit of one try of a call. A segment is small, so a store that takes longer is worth another try.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// The time limit of a call with its retries. The agent waits for it before each side effect.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(25);
/// The number of tries of a call. The SDK waits with jitter between them.
const ATTEMPTS: u32 = 3;
/// The number of requests for retention at the same time. Retention is requested version by version.
const PARALLEL: usize = 8;
/// The region in signatures if none is configured. Stores other than AWS accept any region.
const DEFAULT_REGION: &str = "us-east-1";

/// The length of a day in a retention, without calendar and time zone.
const SECONDS_A_DAY: i64 = 86_400;
/// The header with the end of the lock.
const RETAIN_UNTIL: &str = "x-amz-object-lock-retain-until-date";

/// How to reach a bucket.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The bucket.
    pub bucket: String,
    /// The URL of a store that is not AWS.
    pub endpoint: Option<String>,
    /// Whether to use `https://endpoint/bucket/key` rather than `https://bucket.endpoint/key`.
    pub path_style: bool,
    /// The region; `AWS_REGION` or `us-east-1` if absent.
    pub region: Option<String>,
    /// PEM certificates to trust in addition to the system's, for a store with a private certificate authority.
    pub ca: Option<Vec<u8>>,
}

/// The error of options from which no client can be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the certificates for the object store: {0}; expected PEM")]
pub struct OptionsError(String);

/// A bucket as a store.
#[derive(Clone, Debug)]
pub struct S3 {
    client: Client,
    bucket: String,
    credentials: Option<SharedCredentialsProvider>,
    clock: Clock,
}

/// The store's clock, as the store's replies report it. The SDK signs by it, so a machine with a wrong clock gets access all the same. A
/// lock that ends by that machine's clock could be too short.
#[derive(Clone, Debug, Default)]
struct Clock(Arc<AtomicI64>);

impl Clock {
    fn now(&self) -> i64 {
        Timestamp::now().as_second().saturating_add(self.0.load(Ordering::Relaxed))
    }
}

impl Intercept for Clock {
    fn name(&self) -> &'static str {
        "Clock"
    }

    fn read_before_deserialization(
        &self,
        reply: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = reply.response().headers().get("date");
        if let Some(date) = date.and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok()) {
            self.0.store(date.secs().saturating_sub(Timestamp::now().as_second()), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Sets until when an object is locked. Each try sets it again, because the rejection of the last try may have reported the store's time.
#[derive(Debug)]
struct Locked {
    days: i64,
    clock: Clock,
}

impl Intercept for Locked {
    fn name(&self) -> &'static str {
        "Locked"
    }

    fn modify_before_signing(
        &self,
        put: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let until = self.clock.now().saturating_add(self.days.saturating_mul(SECONDS_A_DAY));
        let until = DateTime::from_secs(until).fmt(DateTimeFormat::DateTime)?;
        put.request_mut().headers_mut().try_insert(RETAIN_UNTIL, until)?;
        Ok(())
    }
}

impl S3 {
    /// Returns a client of the bucket. Credentials come from `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or else from the SDK's
    /// default chain (profiles, web identity, container and instance roles). Nothing is sent yet.
    ///
    /// # Errors
    /// Returns an error if the certificates cannot be read.
    pub async fn connect(options: Options) -> Result<Self, OptionsError> {
        let mut trust = TrustStore::default();
        if let Some(pem) = options.ca {
            trust = trust.with_pem_certificate(pem);
        }
        let tls = TlsContext::builder().with_trust_store(trust).build().map_err(|e| OptionsError(e.to_string()))?;
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(Provider::Rustls(CryptoMode::Ring))
            .tls_context(tls)
            .build_https();
        let region = RegionProviderChain::first_try(options.region.map(Region::new))
            .or_else(EnvironmentVariableRegionProvider::new())
            .or_else(DEFAULT_REGION);
        let shared = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http)
            .region(region)
            .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS))
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                    .operation_timeout(OPERATION_TIMEOUT)
                    .build(),
            )
            .load()
            .await;
        let clock = Clock::default();
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(options.path_style)
            .interceptor(clock.clone())
            // The SHA-256 is set explicitly. Not every store accepts an additional CRC32.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired);
        config.set_endpoint_url(options.endpoint.or_else(|| shared.endpoint_url().map(str::to_owned)));
        let credentials = shared.credentials_provider();
        Ok(Self { client: Client::from_conf(config.build()), bucket: options.bucket, credentials, clock })
    }

    /// Returns whether there are credentials to sign with. Without them every call fails, with an error that does not say so.
    pub async fn has_credentials(&self) -> bool {
        match &self.credentials {
            Some(provider) => provider.provide_credentials().await.is_ok(),
            None => false,
        }
    }

    /// Converts an SDK error to a store error.
    fn error<E>(&self, action: &'static str, key: &str, error: SdkError<E, HttpResponse>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let status = error.raw_response().map(|r| r.status().as_u16());
        let detail = match (error.code(), error.message(), status) {
            (Some(code), Some(message), _) => format!("{code}: {message}"),
            (Some(code), None, _) => code.to_owned(),
            (None, _, Some(status)) => format!("HTTP {status}"),
            // `dispatch failure` alone helps nobody. The chain of causes names the address and the problem.
            (None, ..) if error.source().is_some() => DisplayErrorContext(&error).to_string(),
            (None, ..) => error.to_string(),
        };
        let (key, place) = (key.to_owned(), format!("s3://{}", self.bucket));
        match (error.code(), status) {
            (Some("NoSuchKey" | "NotFound"), _) => StoreError::NotFound { key, place },
            (None, Some(404)) => StoreError::NotFound { key, place },
            (_, Some(401 | 403)) => StoreError::Forbidden { action, key, place, detail },
            _ => StoreError::Unavailable { action, key, place, detail },
        }
    }

    fn unavailable(&self, action: &'static str, key: &str, detail: String) -> StoreError {
        StoreError::Unavailable { action, key: key.to_owned(), place: format!("s3://{}", self.bucket), detail }
    }

    async fn put(&self, key: &str, body: Bytes, retention: Option<&Retention>) -> Result<String, PutError> {
        let digest = BASE64.encode(canonical::sha256(&body));
        let mut put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .if_none_match("*")
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .checksum_sha256(digest)
            .content_type("application/jsonl")
            .body(ByteStream::from(body));
        let mut locked = None;
        if let Some(Retention { mode, days }) = retention {
            put = put.object_lock_mode(match mode {
                Mode::Compliance => ObjectLockMode::Compliance,
                Mode::Governance => ObjectLockMode::Governance,
            });
            locked = Some(Locked { days: *days, clock: self.clock.clone() });
        }
        let mut put = put.customize();
        if let Some(locked) = locked {
            put = put.interceptor(locked);
        }
        match put.send().await {
            Ok(done) => Ok(done.version_id.unwrap_or_else(|| NO_VERSION.to_owned())),
            Err(e) => match e.raw_response().map(|r| r.status().as_u16()) {
                // AWS answers two conditional puts at the same moment with 409: one of them has won or will win.
                Some(412) => Err(PutError::Exists),
                Some(409) if e.code() == Some("ConditionalRequestConflict") => Err(PutError::Exists),
                _ => Err(self.error("write", key, e).into()),
            },
        }
    }

    async fn read(&self, key: &str) -> Result<Bytes, StoreError> {
        let object = self.client.get_object().bucket(&self.bucket).key(key).send().await;
        let object = object.map_err(|e| self.error("read", key, e))?;
        match object.body.collect().await {
            Ok(body) => Ok(body.into_bytes()),
            Err(e) => Err(self.unavailable("read", key, e.to_string())),
        }
    }

    async fn versions(&self, prefix: &str) -> Result<Vec<StoredObject>, StoreError> {
        let mut found = Vec::new();
        let (mut key_marker, mut version_marker) = (None, None);
        loop {
            let page = self
                .client
                .list_object_versions()
                .bucket(&self.bucket)
                .prefix(prefix)
                .set_key_marker(key_marker.clone())
                .set_version_id_marker(version_marker.clone())
                .send()
                .await
                .map_err(|e| self.error("list", prefix, e))?;
            found.extend(page.versions().iter().map(|v| StoredObject {
                key: v.key().unwrap_or_default().to_owned(),
                version_id: v.version_id().unwrap_or(NO_VERSION).to_owned(),
                size: v.size().and_then(|n| u64::try_from(n).ok()).unwrap_or_default(),
                written: v.last_modified().and_then(timestamp),
                retain_until: None,
                mode: None,
                is_latest: v.is_latest().unwrap_or_default(),
                delete_marker: false,
            }));
            found.extend(page.delete_markers().iter().map(|v| StoredObject {
                key: v.key().unwrap_or_default().to_owned(),
                version_id: v.version_id().unwrap_or(NO_VERSION).to_owned(),
                size: 0,
                written: v.last_modified().and_then(timestamp),
                retain_until: None,
                mode: None,
                is_latest: v.is_latest().unwrap_or_default(),
                delete_marker: true,
            }));
            if page.is_truncated() != Some(true) {
                break;
            }
            let next = (page.next_key_marker, page.next_version_id_marker);
            if next.0.is_none() || next == (key_marker, version_marker) {
                // Stopping here would hide versions, and continuing would never end.
                let detail = "the listing is cut off and does not say where it goes on".to_owned();
                return Err(self.unavailable("list", prefix, detail));
            }
            (key_marker, version_marker) = next;
        }
        found.sort_by(|a, b| (&a.key, a.written, &a.version_id).cmp(&(&b.key, b.written, &b.version_id)));
        // versitygw starts each page with the last entry of the one before.
        found.dedup_by(|a, b| (&a.key, &a.version_id) == (&b.key, &b.version_id));
        futures::stream::iter(found).map(|object| self.with_lock(object)).buffered(PARALLEL).try_collect().await
    }

    /// Returns the object with its lock, which listings do not have. Uses `HEAD`, because versitygw answers `GetObjectRetention` in a form
    /// that the SDK cannot read. The `HEAD` of versitygw reports the lock of the newest version only.
    async fn with_lock(&self, object: StoredObject) -> Result<StoredObject, StoreError> {
        if object.delete_marker {
            return Ok(object);
        }
        let StoredObject { retain_until, mode, .. } = self.head(&object.key, &object.version_id).await?;
        Ok(StoredObject { retain_until, mode, ..object })
    }

    async fn head(&self, key: &str, version: &str) -> Result<StoredObject, StoreError> {
        let id = Some(version.to_owned()).filter(|id| id != NO_VERSION);
        let head = self.client.head_object().bucket(&self.bucket).key(key).set_version_id(id).send().await;
        let head = head.map_err(|e| self.error("read the lock of", key, e))?;
        Ok(StoredObject {
            key: key.to_owned(),
            version_id: version.to_owned(),
            size: head.content_length().and_then(|n| u64::try_from(n).ok()).unwrap_or_default(),
            written: head.last_modified().and_then(timestamp),
            retain_until: head.object_lock_retain_until_date().and_then(timestamp),
            mode: match head.object_lock_mode() {
                Some(ObjectLockMode::Compliance) => Some(Mode::Compliance),
                Some(ObjectLockMode::Governance) => Some(Mode::Governance),
                _ => None,
            },
            is_latest: true,
            delete_marker: false,
        })
    }

    async fn keys(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut pages = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).into_paginator().send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|e| self.error("list", prefix, e))?;
            keys.extend(page.contents().iter().filter_map(|o| o.key().map(str::to_owned)));
        }
        keys.sort();
        Ok(keys)
    }
}

/// The version ID that S3 uses in a bucket without versions.
const NO_VERSION: &str = "null";

/// Converts the SDK's time.
fn timestamp(time: &DateTime) -> Option<Timestamp> {
    Timestamp::from_second(time.secs()).ok()
}

impl Store for S3 {
    fn create<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>> {
        Box::pin(self.put(key, body, retention))
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(self.read(key))
    }

    fn list_versions<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<StoredObject>, StoreError>> {
        Box::pin(self.versions(prefix))
    }

    fn lock<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<StoredObject>, StoreError>> {
        Box::pin(async move { self.head(key, NO_VERSION).await.map(Some) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>> {
        Box::pin(self.keys(prefix))
    }
}

#[cfg(test)]
mod tests;
