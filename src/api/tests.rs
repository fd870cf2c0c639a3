//! Checks the schemas that the API server gets.

use serde_json::Value;

use super::all_crds;

/// Collects every value of a schema that is below the items of a list, with its path.
fn below_lists<'a>(schema: &'a Value, path: &str, in_list: bool, found: &mut Vec<(String, &'a Value)>) {
    let Some(members) = schema.as_object() else { return };
    for (name, member) in members {
        let path = format!("{path}.{name}");
        // A property may have any name.
        if name == "properties" {
            for (name, property) in member.as_object().into_iter().flatten() {
                below_lists(property, &format!("{path}.{name}"), in_list, found);
            }
            continue;
        }
        if in_list {
            found.push((path.clone(), member));
        }
        below_lists(member, &path, in_list || name == "items", found);
    }
}

/// Argo CD compares whole lists and does not know the schema. It reports every default that the API server writes into a list as drift.
#[test]
fn no_list_has_defaults_inside() {
    for crd in all_crds() {
        let crd = serde_json::to_value(crd).unwrap();
        let mut found = Vec::new();
        below_lists(&crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "", false, &mut found);
        assert!(!found.is_empty(), "{}: no list at all", crd["spec"]["names"]["kind"]);
        found.retain(|(path, _)| path.ends_with(".default"));
        assert!(found.is_empty(), "{}: {found:?}", crd["spec"]["names"]["kind"]);
    }
}

/// A new field of a task's spec must be in the immutability rule.
#[test]
fn every_member_of_a_tasks_spec_is_immutable() {
    let crd = serde_json::to_value(&all_crds()[0]).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let rules = schema["x-kubernetes-validations"].as_array().unwrap();
    let rule = rules.iter().filter_map(|rule| rule["rule"].as_str()).find(|rule| rule.contains("oldSelf")).unwrap();
    let members = schema["properties"]["spec"]["properties"].as_object().unwrap().keys();
    let same = |member: &String| {
        let (new, old) = (format!("self.spec.{member}"), format!("oldSelf.spec.{member}"));
        format!("has({new}) == has({old}) && (!has({new}) || {new} == {old})")
    };
    let mut expected: Vec<_> = members.map(same).collect();
    let mut compared: Vec<_> = rule.replace(" && has(", "\nhas(").lines().map(str::to_owned).collect();
    expected.sort();
    compared.sort();
    assert_eq!(compared, expected);
}
