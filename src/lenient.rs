//! Decoding of the API server's objects that survives objects from newer or older versions.
//!
//! Guarantees: an object that cannot be decoded keeps its metadata and the reason, so that it breaks neither a list nor a watch.
//!
//! Non-goals: managed fields. They are a large part of most objects, and Belay does not read them.
//!
//! Works like [`kube::core::DeserializeGuard`], which copies each object twice. The copies matter because two gateways and an operator read
//! every pod of every task.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, core::error_boundary::InvalidObject};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::{Map, Value};

/// An object, or the reason why it cannot be decoded.
#[derive(Clone, Debug)]
pub struct Lenient<K>(pub Result<K, InvalidObject>);

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = Map::deserialize(deserializer)?;
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        let object = Value::Object(object);
        Ok(Self(match K::deserialize(&object) {
            Ok(read) => Ok(read),
            Err(error) => {
                let metadata = object.get("metadata").map(ObjectMeta::deserialize).transpose();
                let metadata = metadata.map_err(D::Error::custom)?.unwrap_or_default();
                Err(InvalidObject { error: error.to_string(), metadata })
            }
        }))
    }
}

impl<K: Resource> Resource for Lenient<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(of: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(of)
    }

    fn group(of: &Self::DynamicType) -> Cow<'_, str> {
        K::group(of)
    }

    fn version(of: &Self::DynamicType) -> Cow<'_, str> {
        K::version(of)
    }

    fn plural(of: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|invalid| &invalid.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|invalid| &mut invalid.metadata, K::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use kube::core::{DeserializeGuard, ObjectList};
    use serde_json::json;

    use super::*;

    fn pod(containers: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "triage-1", "uid": "u", "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:spec": {}}}]},
            "spec": {"containers": containers},
        })
    }

    #[test]
    fn one_that_cannot_be_read_spoils_no_list() {
        let good = json!([{"name": "agent"}]);
        let list = json!({
            "apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"},
            "items": [pod(&good), pod(&json!("none")), {"metadata": {}}],
        });
        let list: ObjectList<Lenient<Pod>> = serde_json::from_value(list).unwrap();
        let [read, unread, bare] = list.items.try_into().unwrap();
        let Lenient(Ok(read)) = read else { panic!("{read:?}") };
        assert_eq!(read.spec.unwrap().containers[0].name, "agent");
        assert_eq!(read.metadata.managed_fields, None);
        assert_eq!(unread.meta().uid.as_deref(), Some("u"));
        let why = unread.0.unwrap_err().error;
        assert!(why.contains("expected a sequence"), "{why}");
        assert!(bare.0.is_ok());
    }

    #[test]
    fn what_it_reads_is_what_kube_reads() {
        for object in [
            pod(&json!([])),
            pod(&json!(1)),
            json!({}),
            json!({"spec": {"containers": 1}}),
            json!({"metadata": {"labels": 1}}),
            json!({"metadata": []}),
            json!(7),
        ] {
            let ours = serde_json::from_value::<Lenient<Pod>>(object.clone());
            let kube = serde_json::from_value::<DeserializeGuard<Pod>>(object.clone());
            let said =
                |read: Option<(bool, &ObjectMeta)>| read.map(|(whole, of)| (whole, of.name.clone(), of.uid.clone()));
            assert_eq!(
                said(ours.as_ref().ok().map(|one| (one.0.is_ok(), one.meta()))),
                said(kube.as_ref().ok().map(|one| (one.0.is_ok(), one.meta()))),
                "{object}"
            );
        }
    }
}
