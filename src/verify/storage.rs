//! Checks how the log is stored: each object has one version, is locked unless it is an incident, and is not hidden.

use std::collections::BTreeMap;

use super::report::{Check, Locks, Report};
use crate::canonical;
use crate::evidence::{
    log::{INCIDENTS, Log},
    segment::Segment,
    store::{Mode, StoredObject},
};

/// Adds a finding for everything that does not hold. `newer` says that the log is of a later version, which may name its objects
/// differently.
pub(super) fn check(log: &Log, newer: bool, report: &mut Report) {
    for key in log.segments.keys().filter(|key| !newer && Segment::first_of(key).is_none()) {
        report.add(
            Check::StoreKey,
            Some(key),
            None,
            format!("expected a key such as {}, found another", Segment::key(0)),
        );
    }
    for (key, problem) in &log.odd {
        report.add(Check::StoreObject, Some(key), None, problem);
    }
    for (key, bytes) in &log.incidents {
        report.summary.incidents += 1;
        let expected = format!("{INCIDENTS}{}.json", hex::encode(canonical::sha256(bytes)));
        if *key != expected && !newer {
            report.add(Check::StoreIncident, Some(key), None, format!("expected the name {expected} for these bytes"));
        }
    }
    if let Some(versions) = &log.versions {
        check_versions(versions, report);
    }
}

fn check_versions(versions: &[StoredObject], report: &mut Report) {
    let mut by_key: BTreeMap<&str, Vec<&StoredObject>> = BTreeMap::new();
    for version in versions {
        by_key.entry(&version.key).or_default().push(version);
    }
    let mut locks = Locks { mode: Some(Mode::Compliance), until: None };
    for (key, versions) in by_key {
        for marker in versions.iter().filter(|v| v.delete_marker) {
            let message =
                format!("expected no delete marker, found {}: a user tried to hide the object", marker.version_id);
            report.add(Check::StoreDeleted, Some(key), None, message);
        }
        let hidden = versions.iter().any(|v| v.delete_marker);
        let objects: Vec<_> = versions.into_iter().filter(|v| !v.delete_marker).collect();
        if let [object] = objects.as_slice() {
            // Stores differ in what they report about the lock of a hidden version. A hidden version is a finding anyway.
            if !hidden && !key.starts_with(INCIDENTS) {
                check_lock(object, &mut locks, report);
            }
        } else {
            let ids: Vec<_> = objects.iter().map(|v| v.version_id.as_str()).collect();
            let message = format!("expected one version, found {}: {}", objects.len(), ids.join(", "));
            report.add(Check::StoreVersions, Some(key), None, message);
        }
    }
    report.summary.locks = Some(locks);
}

fn check_lock(object: &StoredObject, locks: &mut Locks, report: &mut Report) {
    let (found, holds) = match (object.mode, object.retain_until, object.written) {
        (None, _, _) | (_, None, _) => ("no lock".to_owned(), false),
        (_, Some(until), Some(written)) => (format!("a lock until {until} on an object of {written}"), until > written),
        (_, Some(until), None) => (format!("a lock until {until} on an object of unknown age"), false),
    };
    if !holds {
        let message = format!("expected a lock that ends after the object was written, found {found}");
        report.add(Check::StoreRetention, Some(&object.key), None, message);
    }
    // The log's lock is the weakest lock of its objects.
    if object.mode != Some(Mode::Compliance) && locks.mode.is_some() {
        locks.mode = object.mode;
    }
    if let Some(until) = object.retain_until {
        locks.until = Some(locks.until.map_or(until, |earliest| earliest.min(until)));
    }
}
