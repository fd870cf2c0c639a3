//! Creates the Secrets of the system namespace once, and never overwrites them.
//!
//! Guarantees: An existing key is kept. Only serving certificates are renewed, under the same authority.
//!
//! Rejects: A witness key whose public half differs from the published one, because the published key has signed evidence.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client, ResourceExt,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::{
    evidence::note::{self, Signer, WITNESS_NAME},
    render::names::{FIELD_MANAGER, MANAGED_BY, MANAGER, WEBHOOK},
    wire::SERVER_NAME,
};

/// The Secret with the gateway's certificate and key, and the authority's certificate.
pub const GATEWAY_TLS: &str = "belay-gateway-tls";
/// The Secret with the webhook's certificate and key, and the authority's certificate.
pub const WEBHOOK_TLS: &str = "belay-webhook-tls";
/// The Secret with the authority's certificate and key. Only the operator uses it.
pub const GATEWAY_CA: &str = "belay-gateway-ca";
/// The Secret with the witness's private key.
pub const WITNESS: &str = "belay-witness";
/// The ConfigMap with the witness's public key.
pub const WITNESS_KEY: &str = "belay-witness-key";

const TLS_CERT: &str = "tls.crt";
const TLS_KEY: &str = "tls.key";
const CA_CERT: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const WITNESS_PK8: &str = "witness.pk8";
const VKEY: &str = "vkey";
/// Annotation: when the serving certificate expires.
const NOT_AFTER: &str = "belay.dev/not-after";

/// The lifetime of the authority, in days. It is as long as an installation may live, because every running harness has a copy of the
/// certificate.
const CA_DAYS: i64 = 3650;
/// The lifetime of a serving certificate, in days.
const SERVING_DAYS: i64 = 365;
/// A serving certificate is renewed if it expires in less than this many days.
const RENEW_DAYS: i64 = 30;

/// Why the Secrets are not available.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The API server returned an error, or the connection to it failed.
    #[error("cannot {verb} {name}: {cause}")]
    Kube {
        /// The verb of the request.
        verb: &'static str,
        /// The name of the object.
        name: &'static str,
        /// The error.
        cause: Box<kube::Error>,
    },
    /// An object exists and does not have the expected content.
    #[error(
        "expected {expected} in {name}, found {found}; restore it from a backup, or delete it to have a new one made"
    )]
    Content {
        /// The name of the object.
        name: &'static str,
        /// The expected content.
        expected: &'static str,
        /// The content that was found.
        found: String,
    },
    /// The published key is not the public half of the witness key.
    #[error(
        "expected the public half of Secret {WITNESS} in ConfigMap {WITNESS_KEY} (`{expected}`), found `{found}`; evidence was \
         signed by the key that was published: restore that Secret, or, if it is lost, keep the published key with the old \
         evidence and delete the ConfigMap"
    )]
    Witness {
        /// The public half of the witness key.
        expected: String,
        /// The published key.
        found: String,
    },
    /// A certificate cannot be created.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The witness's key cannot be created.
    #[error("cannot make the witness's key: {0}")]
    Key(#[from] note::KeyError),
}

/// Creates the missing objects and renews certificates that expire soon. The webhook's certificate is created only if there is a webhook.
/// Returns the authority's certificate in PEM.
///
/// # Errors
/// See [`BootstrapError`].
pub async fn ensure(client: &Client, namespace: &str, webhook: bool, now: Timestamp) -> Result<String, BootstrapError> {
    let secrets = Api::<Secret>::namespaced(client.clone(), namespace);
    let config_maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let authority = authority(&secrets, now).await?;
    serving(&secrets, &authority, GATEWAY_TLS, SERVER_NAME, now).await?;
    if webhook {
        serving(&secrets, &authority, WEBHOOK_TLS, &webhook_name(namespace), now).await?;
    }
    witness(&secrets, &config_maps).await?;
    Ok(authority.certificate)
}

/// Returns the name by which the API server calls the webhook.
pub fn webhook_name(namespace: &str) -> String {
    format!("{WEBHOOK}.{namespace}.svc")
}

/// The gateway's certificate authority.
struct Authority {
    certificate: String,
    key: String,
}

async fn authority(secrets: &Api<Secret>, now: Timestamp) -> Result<Authority, BootstrapError> {
    let secret = match get(secrets, GATEWAY_CA).await? {
        Some(secret) => secret,
        None => {
            let key = KeyPair::generate()?;
            let certificate = authority_params(now)?.self_signed(&key)?.pem();
            let data = [(CA_CERT, certificate.into_bytes()), (CA_KEY, key.serialize_pem().into_bytes())];
            create(secrets, GATEWAY_CA, secret(GATEWAY_CA, "Opaque", data, None)).await?
        }
    };
    Ok(Authority {
        certificate: text(&secret, GATEWAY_CA, CA_CERT, "a certificate in PEM under ca.crt")?,
        key: text(&secret, GATEWAY_CA, CA_KEY, "a private key in PEM under ca.key")?,
    })
}

fn authority_params(now: Timestamp) -> Result<CertificateParams, rcgen::Error> {
    let mut params = params(now, CA_DAYS, "Belay gateway authority", vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn params(now: Timestamp, days: i64, name: &str, names: Vec<String>) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    // A day early, for clocks that are behind.
    let (begins, ends) = (date(now, -1), date(now, days));
    params.not_before = date_time_ymd(begins.0, begins.1, begins.2);
    params.not_after = date_time_ymd(ends.0, ends.1, ends.2);
    Ok(params)
}

/// Returns the calendar date that is this many days from now.
fn date(now: Timestamp, days: i64) -> (i32, u8, u8) {
    let at = now.checked_add(SignedDuration::from_hours(days.saturating_mul(24))).unwrap_or(now);
    let date = at.to_zoned(jiff::tz::TimeZone::UTC).date();
    // Months and days of calendar dates always fit into these types.
    (i32::from(date.year()), u8::try_from(date.month()).unwrap_or(1), u8::try_from(date.day()).unwrap_or(1))
}

/// Creates or renews the Secret `name` with a certificate for `host`.
async fn serving(
    secrets: &Api<Secret>,
    authority: &Authority,
    name: &'static str,
    host: &str,
    now: Timestamp,
) -> Result<(), BootstrapError> {
    let existing = get(secrets, name).await?;
    if existing.as_ref().is_some_and(|secret| is_fresh(secret, name, authority, now)) {
        return Ok(());
    }
    let issuer = Issuer::new(authority_params(now)?, KeyPair::from_pem(&authority.key)?);
    let key = KeyPair::generate()?;
    let mut leaf = params(now, SERVING_DAYS, host, vec![host.to_owned()])?;
    leaf.use_authority_key_identifier_extension = true;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = leaf.signed_by(&key, &issuer)?.pem();
    let not_after = now.checked_add(SignedDuration::from_hours((SERVING_DAYS - 1) * 24)).unwrap_or(now);
    let data = [
        (TLS_CERT, certificate.into_bytes()),
        (TLS_KEY, key.serialize_pem().into_bytes()),
        (CA_CERT, authority.certificate.clone().into_bytes()),
    ];
    let mut made = secret(name, "kubernetes.io/tls", data, Some(not_after));
    match existing {
        None => create(secrets, name, made).await.map(drop),
        Some(existing) => {
            // Patch only the version that was read, because two simultaneous leaders must not give different certificates to two replicas.
            made.metadata.resource_version = existing.resource_version();
            made.type_ = existing.type_;
            let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            let patched = secrets.patch(name, &parameters, &Patch::Merge(&made)).await;
            patched.map_err(|cause| BootstrapError::Kube { verb: "patch", name, cause: Box::new(cause) })?;
            tracing::info!(secret = name, %not_after, "renewed a serving certificate");
            Ok(())
        }
    }
}

/// Checks whether the serving certificate is from this authority and does not expire soon.
fn is_fresh(secret: &Secret, name: &'static str, authority: &Authority, now: Timestamp) -> bool {
    let renew = now.checked_add(SignedDuration::from_hours(RENEW_DAYS * 24)).unwrap_or(now);
    let lasts = match secret.annotations().get(NOT_AFTER) {
        Some(not_after) => not_after.parse().is_ok_and(|not_after: Timestamp| not_after > renew),
        // A certificate without the annotation is the administrator's own, who also renews it.
        None => true,
    };
    let has = |key: &str| secret.data.as_ref().is_some_and(|data| data.contains_key(key));
    let same = text(secret, name, CA_CERT, "").is_ok_and(|certificate| certificate == authority.certificate);
    lasts && same && has(TLS_CERT) && has(TLS_KEY)
}

async fn witness(secrets: &Api<Secret>, config_maps: &Api<ConfigMap>) -> Result<(), BootstrapError> {
    let secret = match get(secrets, WITNESS).await? {
        Some(secret) => secret,
        None => {
            let key = note::generate_pkcs8()?;
            create(secrets, WITNESS, secret(WITNESS, "Opaque", [(WITNESS_PK8, key)], None)).await?
        }
    };
    let content = |found: String| BootstrapError::Content {
        name: WITNESS,
        expected: "an Ed25519 key in PKCS#8 under witness.pk8",
        found,
    };
    let document =
        secret.data.as_ref().and_then(|data| data.get(WITNESS_PK8)).ok_or_else(|| content("no such key".to_owned()))?;
    let signer = Signer::from_pkcs8(WITNESS_NAME, &document.0).map_err(|error| content(error.to_string()))?;
    let vkey = signer.verifier().to_string();
    let published = match get(config_maps, WITNESS_KEY).await? {
        Some(config_map) => config_map,
        None => {
            let data = Some(BTreeMap::from([(VKEY.to_owned(), vkey.clone())]));
            create(
                config_maps,
                WITNESS_KEY,
                ConfigMap { metadata: metadata(WITNESS_KEY), data, ..ConfigMap::default() },
            )
            .await?
        }
    };
    match published.data.as_ref().and_then(|data| data.get(VKEY)).map(|found| found.trim()) {
        Some(found) if found == vkey => Ok(()),
        found => Err(BootstrapError::Witness { expected: vkey, found: found.unwrap_or("nothing").to_owned() }),
    }
}

async fn get<K>(api: &Api<K>, name: &'static str) -> Result<Option<K>, BootstrapError>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    api.get_opt(name).await.map_err(|cause| BootstrapError::Kube { verb: "get", name, cause: Box::new(cause) })
}

/// Creates the object. If another replica was faster, returns its object.
async fn create<K>(api: &Api<K>, name: &'static str, object: K) -> Result<K, BootstrapError>
where
    K: Clone + serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug,
{
    match api.create(&parameters(), &object).await {
        Ok(created) => {
            tracing::info!(name, "made it, since it was absent");
            Ok(created)
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            api.get(name).await.map_err(|cause| BootstrapError::Kube { verb: "get", name, cause: Box::new(cause) })
        }
        Err(cause) => Err(BootstrapError::Kube { verb: "create", name, cause: Box::new(cause) }),
    }
}

fn parameters() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), MANAGER.to_owned())])),
        ..ObjectMeta::default()
    }
}

fn secret<const N: usize>(name: &str, kind: &str, data: [(&str, Vec<u8>); N], not_after: Option<Timestamp>) -> Secret {
    let mut metadata = metadata(name);
    metadata.annotations = not_after.map(|at| BTreeMap::from([(NOT_AFTER.to_owned(), at.to_string())]));
    Secret {
        metadata,
        type_: Some(kind.to_owned()),
        data: Some(data.into_iter().map(|(key, bytes)| (key.to_owned(), ByteString(bytes))).collect()),
        ..Secret::default()
    }
}

fn text(secret: &Secret, name: &'static str, key: &str, expected: &'static str) -> Result<String, BootstrapError> {
    let bytes = secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| bytes.0.clone());
    let content = |found: &str| BootstrapError::Content { name, expected, found: found.to_owned() };
    String::from_utf8(bytes.ok_or_else(|| content("no such key"))?).map_err(|_| content("bytes that are not text"))
}

#[cfg(test)]
mod tests;
