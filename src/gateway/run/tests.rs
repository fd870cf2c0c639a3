use std::sync::atomic::AtomicUsize;

use kube::runtime::reflector::store::Writer;
use serde_json::{Value, json};

use super::*;
use crate::{
    api::PolicyPack,
    gateway::{
        cluster::{Fetch, Stores},
        testing::{self, Memory},
    },
    lenient::Lenient,
};

/// Nobody asks the API server here.
struct Nobody;

impl Fetch for Nobody {
    fn pod<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
    ) -> BoxFuture<'a, Result<Option<k8s_openapi::api::core::v1::Pod>, String>> {
        Box::pin(async { Ok(None) })
    }

    fn task<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Option<crate::api::AgentTask>, String>> {
        Box::pin(async { Ok(None) })
    }
}

/// Two buckets, by their names. A bucket of another name cannot be reached.
#[derive(Default)]
struct Two {
    one: Arc<Memory>,
    two: Arc<Memory>,
    asked: AtomicUsize,
}

impl Buckets for Two {
    fn bucket<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            match name {
                "one" => Ok(self.one.clone() as Arc<dyn Store>),
                "two" => Ok(self.two.clone() as Arc<dyn Store>),
                _ => Err(StoreError::Unavailable {
                    action: "reach",
                    key: String::new(),
                    place: name.to_owned(),
                    detail: "no such host".to_owned(),
                }),
            }
        })
    }

    fn endpoint(&self) -> Option<String> {
        None
    }
}

fn pack(environment: &str, bucket: &str) -> Lenient<PolicyPack> {
    let pack: Value = json!({
        "apiVersion": "belay.dev/v1alpha1", "kind": "PolicyPack",
        "metadata": { "name": environment, "uid": environment, "generation": 1 },
        "spec": {
            "environment": environment,
            "namespaceSelector": { "matchLabels": { "belay": environment } },
            "workflowClasses": [],
            "evidence": { "bucket": bucket, "mode": "Compliance", "retentionDays": 30 },
        },
    });
    let pack: Lenient<PolicyPack> = serde_json::from_value(pack).unwrap();
    assert!(pack.0.is_ok(), "a pack that cannot be read has no bucket");
    pack
}

#[tokio::test(start_paused = true)]
async fn the_store_is_up_while_the_buckets_of_all_packs_answer() {
    let buckets = Arc::new(Two::default());
    let signer = Signer::from_pkcs8(WITNESS_NAME, &testing::witness_key()).unwrap();
    let metrics = testing::metrics();
    let witness = Arc::new(Witness::new(signer, buckets.clone(), metrics.clone()));
    let mut packs = Writer::default();
    let stores = Stores {
        pods: Writer::default().as_reader(),
        tasks: Writer::default().as_reader(),
        contracts: Writer::default().as_reader(),
        packs: packs.as_reader(),
        namespaces: Writer::default().as_reader(),
        approvals: Writer::default().as_reader(),
        secrets: Writer::default().as_reader(),
    };
    let mut apply = |pack| packs.apply_watcher_event(&kube::runtime::watcher::Event::Apply(pack));
    apply(pack("dev", "one"));
    apply(pack("prod", "two"));
    let cluster = Arc::new(Cluster::new(stores, Arc::new(Nobody)));
    let probing = {
        let (cluster, witness, metrics) = (cluster.clone(), witness.clone(), metrics.clone());
        tokio::spawn(async move { probe(&cluster, &witness, &metrics).await })
    };
    // After this the buckets were asked again.
    let up = async || {
        let asked = buckets.asked.load(Ordering::SeqCst);
        tokio::time::sleep(PROBE + Duration::from_secs(1)).await;
        assert!(buckets.asked.load(Ordering::SeqCst) > asked);
        metrics.store_up.get()
    };
    assert_eq!(up().await, 1);
    // Either bucket alone is enough, and so is one that cannot be reached at all.
    for bucket in [&buckets.one, &buckets.two] {
        bucket.down.store(true, Ordering::SeqCst);
        assert_eq!((up().await, up().await), (0, 0));
        bucket.down.store(false, Ordering::SeqCst);
        assert_eq!((up().await, up().await), (1, 1));
    }
    apply(pack("stage", "elsewhere"));
    assert_eq!(up().await, 0);
    apply(pack("stage", "two"));
    assert_eq!(up().await, 1);
    // A bucket that answers and does not lock is up: `belay_gateway_store_errors_total` is about that.
    buckets.one.keeps_open.store(true, Ordering::SeqCst);
    assert_eq!(up().await, 1);
    probing.abort();
}
