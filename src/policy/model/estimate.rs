//! How many tokens the prompt of a request is at most: one a byte of its body (byte-level tokenizers never make more), and a flat sum for each
//! image.

use serde_json::{Map, Value};

/// Tokens that one image may cost: above what the large providers charge for their largest tiling.
const TOKENS_PER_IMAGE: i64 = 4_096;
/// Tokens that roles, separators and the reply's priming may add to a message beyond its bytes.
const TOKENS_PER_REQUEST: i64 = 64;

/// The most tokens that the prompt of a request is.
pub(super) fn prompt(body: &Map<String, Value>) -> i64 {
    let bytes = serde_json::to_vec(body).map_or(i64::MAX, |bytes| i64::try_from(bytes.len()).unwrap_or(i64::MAX));
    let images = body.values().map(count_images).fold(0i64, i64::saturating_add);
    bytes.saturating_add(images.saturating_mul(TOKENS_PER_IMAGE)).saturating_add(TOKENS_PER_REQUEST)
}

fn count_images(value: &Value) -> i64 {
    match value {
        Value::Array(items) => items.iter().map(count_images).fold(0, i64::saturating_add),
        Value::Object(fields) => {
            let own = matches!(
                fields.get("type").and_then(Value::as_str),
                Some("image_url" | "input_image" | "image" | "input_audio" | "file" | "input_file" | "document")
            );
            fields.values().map(count_images).fold(i64::from(own), i64::saturating_add)
        }
        _ => 0,
    }
}
