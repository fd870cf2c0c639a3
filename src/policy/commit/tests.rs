use proptest::prelude::*;
use serde_json::json;

use super::*;

fn salt() -> Salt {
    Salt::new([7; 32])
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1000_i64..1000).prop_map(Value::from),
        "[a-z~/\"é]{0,6}".prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z~/01]{0,4}", inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect()))
        ]
    })
}

/// Returns the pointers of all fields.
fn fields(value: &Value, at: &str) -> Vec<String> {
    if is_field(value) {
        return vec![at.to_owned()];
    }
    let inner = |name: &str, value| fields(value, &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")));
    match value {
        Value::Array(items) => items.iter().enumerate().flat_map(|(n, item)| inner(&n.to_string(), item)).collect(),
        Value::Object(members) => members.iter().flat_map(|(name, member)| inner(name, member)).collect(),
        _ => unreachable!(),
    }
}

/// The form is fixed, because logs that are written now are read for years.
#[test]
fn the_form_is_this() {
    let value = json!({"card": {"number": "4111"}, "items": [1, true], "none": {}});
    let own = |label: &[u8], digest: &[u8; 32]| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
        hmac::sign(&key, &[label, digest].concat()).as_ref().to_vec()
    };
    let field = |pointer: &str, text: &str| {
        let digest = canonical::sha256(text.as_bytes());
        let own = own(&[&[1], pointer.as_bytes(), &[0]].concat(), &digest);
        hex::encode(canonical::sha256(&[own, digest.to_vec()].concat()))
    };
    let committed = format!(
        r#"{{"card":{{"number":"{}"}},"items":["{}","{}"],"none":"{}"}}"#,
        field("/card/number", "\"4111\""),
        field("/items/0", "1"),
        field("/items/1", "true"),
        field("/none", "{}")
    );
    assert_eq!(salt().value(&value).unwrap(), hex::encode(canonical::sha256(committed.as_bytes())));
    let digest = canonical::sha256(b"prompt");
    let expected = canonical::sha256(&[own(&[0], &digest), digest.to_vec()].concat());
    assert_eq!(salt().bytes(b"prompt"), hex::encode(expected));
}

#[test]
fn a_salt_goes_round_and_is_not_shown() {
    let text = String::from(salt());
    assert_eq!(Salt::try_from(format!("{text}\n")).unwrap(), salt());
    assert!(Salt::try_from("AAAA".to_owned()).is_err());
    assert_eq!(format!("{:?}", salt()), "Salt(…)");
}

proptest! {
    /// Each field can be disclosed, and its opening proves this field and nothing else.
    #[test]
    fn a_field_is_disclosed_by_itself(value in any_json(), other in any_json()) {
        let whole = salt().value(&value).unwrap();
        for pointer in fields(&value, "") {
            let opening = salt().open(&value, &pointer).unwrap().unwrap();
            prop_assert_eq!(opening.commitment().unwrap(), whole.clone());
            prop_assert_eq!(Some(&opening.value), value.pointer(&pointer));
            let lie = Opening { value: other.clone(), ..opening.clone() };
            prop_assert!(other == opening.value || lie.commitment().is_err());
            let text = serde_json::to_string(&opening).unwrap();
            prop_assert_eq!(serde_json::from_str::<Opening>(&text).unwrap(), opening);
        }
    }

    /// The same value has the same commitment. Another salt gives another commitment.
    #[test]
    fn commitments_are_told_apart_by_value_and_salt(one in any_json(), other in any_json()) {
        let commitment = salt().value(&one).unwrap();
        prop_assert_eq!(commitment == salt().value(&other).unwrap(), one == other);
        prop_assert_ne!(commitment, Salt::new([8; 32]).value(&one).unwrap());
    }

    /// The opening of one field contains no value of another field.
    #[test]
    fn nothing_else_is_in_an_opening(secret in "[A-Z]{12}") {
        let value = json!({"a": "shown", "b": {"c": secret.clone()}});
        let opening = salt().open(&value, "/a").unwrap().unwrap();
        prop_assert!(!serde_json::to_string(&opening).unwrap().contains(&secret));
    }
}
