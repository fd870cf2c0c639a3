use std::io::Write;

use flate2::{Compression, Crc, write::ZlibEncoder};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::policy::model::document::tests::pdf;

fn of(api: Api, name: &str, body: &Value) -> i64 {
    prompt(api, body.as_object().unwrap(), &Model::named(name, None)).tokens
}

fn base64(bytes: &[u8]) -> String {
    data_encoding::BASE64.encode(bytes)
}

/// A grey picture of noise, which cannot be compressed: about one byte per pixel.
pub(super) fn png(width: u32, height: u32) -> Vec<u8> {
    let mut noise = 1_u32;
    let mut rows = Vec::new();
    for _ in 0..height {
        rows.push(0);
        rows.extend((0..width).map(|_| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            noise.to_be_bytes()[0]
        }));
    }
    let mut packed = ZlibEncoder::new(Vec::new(), Compression::none());
    packed.write_all(&rows).unwrap();
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let size: Vec<u8> = [width.to_be_bytes(), height.to_be_bytes()].concat();
    for (kind, data) in
        [(b"IHDR", [&size[..], &[8, 0, 0, 0, 0]].concat()), (b"IDAT", packed.finish().unwrap()), (b"IEND", vec![])]
    {
        png.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        let mut crc = Crc::new();
        crc.update(kind);
        crc.update(&data);
        png.extend(kind);
        png.extend(data);
        png.extend(crc.sum().to_be_bytes());
    }
    png
}

fn within_1_3(what: &str, set_aside: i64, charged: i64) {
    let most = charged.saturating_mul(13) / 10;
    assert!((charged..=most).contains(&set_aside), "{what}: {set_aside} set aside, {charged} charged");
}

/// A screenshot of 2 MB. The charges follow the published rules of the providers, computed by hand for 1920 by 1080 pixels:
/// - OpenAI, "Calculating costs" in its guide to images: gpt-4o scales to 1365 by 768, 6 tiles, 85 + 6 × 170. gpt-4.1-mini: 60 × 34 squares
///   of 32 pixels are more than 1,536. After scaling, 52 × 29 are left, × 1.62. gpt-5.6: 60 × 34 × 1.2.
/// - Anthropic, "Evaluate image size" on its page on vision: squares of 28 pixels. claude-sonnet-4-5 scales to 1456 by 819, 52 × 30.
///   claude-opus-4-7 does not scale, 69 × 39.
/// - Google, "Understand and count tokens": 6 crops of 258.
#[test]
fn a_screenshot_of_2_mb_is_set_aside_for_what_it_is() {
    let picture = png(1_920, 1_080);
    assert!((2_000_000..2_200_000).contains(&picture.len()), "{}", picture.len());
    let url = format!("data:image/png;base64,{}", base64(&picture));
    for (name, charged) in [("gpt-4o", 1_105), ("gpt-4.1-mini", 2_443), ("gpt-5.6", 2_448), ("gemini-2.5-pro", 6 * 258)]
    {
        let content =
            json!([{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]);
        let body = json!({"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 50});
        within_1_3(name, of(Api::ChatCompletions, name, &body), charged + 11);
        let content = json!([{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": url}]);
        let body = json!({"model": name, "input": [{"role": "user", "content": content}]});
        within_1_3(name, of(Api::Responses, name, &body), charged + 11);
        let output = json!({"type": "computer_screenshot", "image_url": url});
        let body =
            json!({"model": name, "input": [{"type": "computer_call_output", "call_id": "c", "output": output}]});
        within_1_3(name, of(Api::Responses, name, &body), charged + 7);
    }
    for (name, charged) in [("claude-sonnet-4-5", 52 * 30), ("claude-opus-4-7", 69 * 39)] {
        let source = json!({"type": "base64", "media_type": "image/png", "data": base64(&picture)});
        let picture = json!({"type": "image", "source": source});
        let content = json!([picture.clone(), {"type": "text", "text": "What is it?"}]);
        let body = json!({"model": name, "max_tokens": 50, "messages": [{"role": "user", "content": content}]});
        within_1_3(name, of(Api::Messages, name, &body), charged + 11);
        let result = json!([{"type": "tool_result", "tool_use_id": "t", "content": [picture]}]);
        let body = json!({"model": name, "max_tokens": 50, "messages": [{"role": "user", "content": result}]});
        within_1_3(name, of(Api::Messages, name, &body), charged + 11);
    }
}

/// A document of 100 full pages. Anthropic, "Estimate your costs" on its page on PDFs: the tokens of the text of each page, and those of
/// its picture, which others have measured as 1,570 for a page in letter format, for old and new models alike. Google: 258 per page.
/// OpenAI's models: the text and a picture of each page, by the rule of the model: 765 for gpt-4o.
#[test]
fn a_document_of_100_pages_is_set_aside_for_what_it_is() {
    let line = "The quick brown fox jumps over the lazy dog, and the dog does not mind it much.";
    let text = vec![line; 45].join("\n");
    let of_the_text = i64::try_from(bpe::count(&text)).unwrap();
    assert!((700..1_000).contains(&of_the_text), "{of_the_text}");
    let pages: Vec<String> = (0..100).map(|page| text.replace("fox", &format!("fox {page}"))).collect();
    let body = |name: &str, part: Value| json!({"model": name, "max_tokens": 50, "messages": [{"role": "user", "content": [part]}]});
    for (pack, objects) in [(false, false), (true, false), (true, true)] {
        let file = base64(&pdf(&pages, pack, objects));
        let source = json!({"type": "base64", "media_type": "application/pdf", "data": file});
        let document = json!({"type": "document", "source": source});
        let of_claude = of_the_text * 116 / 100;
        let body_of = |name| body(name, document.clone());
        within_1_3("sonnet", of(Api::Messages, "claude-sonnet-4-5", &body_of("")), 100 * (1_570 + of_claude));
        within_1_3("opus", of(Api::Messages, "claude-opus-4-7", &body_of("")), 100 * (1_570 + of_claude * 133 / 100));
        let file = json!({"filename": "a.pdf", "file_data": format!("data:application/pdf;base64,{file}")});
        let body_of = |name| body(name, json!({"type": "file", "file": file}));
        within_1_3("gpt-4o", of(Api::ChatCompletions, "gpt-4o", &body_of("")), 100 * (765 + of_the_text));
        within_1_3("gemini", of(Api::ChatCompletions, "gemini-2.5-pro", &body_of("")), 100 * 258);
    }
}

/// A conversation of 150,000 tokens: this project's own prose, programs and manifests, as messages of users, a model and tools. OpenAI
/// charges by its tokenizer and by its cookbook, "How to count tokens": 3 around each message, one for its role, 3 for the reply, and for a
/// tool call the name and the arguments.
#[test]
fn a_conversation_of_150_000_tokens_is_set_aside_for_what_it_is() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let texts = [
        "README.md",
        "SECURITY.md",
        "src/policy/json.rs",
        "src/policy/config.rs",
        "src/policy/config/tool.rs",
        "crds/policypacks.yaml",
        "docs/evidence-format.md",
    ];
    let texts: Vec<String> = texts.iter().filter_map(|name| std::fs::read_to_string(folder.join(name)).ok()).collect();
    assert!(texts.len() >= 5);
    let texts = texts.concat();
    let paragraphs: Vec<&str> = texts.split("\n\n").filter(|text| !text.trim().is_empty()).collect();
    let (mut charged, mut messages) = (3, Vec::new());
    for (turn, text) in paragraphs.iter().cycle().enumerate() {
        let tokens = |text: &str| i64::try_from(bpe::count(text)).unwrap();
        match turn % 4 {
            0 => messages.push(json!({"role": "user", "content": text})),
            1 => {
                let arguments = json!({"path": "src/lib.rs", "text": text}).to_string();
                charged += tokens("edit_file") + tokens(&arguments);
                let call = json!({"id": format!("c{turn}"), "type": "function", "function": {"name": "edit_file", "arguments": arguments}});
                messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
            }
            2 => messages.push(json!({"role": "tool", "tool_call_id": format!("c{}", turn - 1), "content": text})),
            _ => messages.push(json!({"role": "assistant", "content": [{"type": "text", "text": text}]})),
        }
        charged += 4 + if turn % 4 == 1 { 0 } else { tokens(text) };
        if charged >= 150_000 {
            break;
        }
    }
    assert!(messages.len() > 100, "{}", messages.len());
    let body = json!({"model": "gpt-4o", "messages": messages, "max_tokens": 50, "stream": true});
    assert!((1_000..charged).contains(&least(body.as_object().unwrap(), &Model::named("gpt-4o", None))));
    within_1_3("gpt-4o", of(Api::ChatCompletions, "gpt-4o", &body), charged);
    // An estimate from the length of the text alone would be more than three times as high.
    assert!(i64::try_from(body.to_string().len()).unwrap() > 3 * charged);
}

/// Data that only looks like a picture is text that the model reads.
#[test]
fn data_that_stands_where_text_is_read_counts_as_text() {
    let data = base64(&png(200, 200));
    let url = format!("data:image/png;base64,{data}");
    let text = i64::try_from(bpe::count(&url)).unwrap();
    assert!(text > 20_000, "{text}");
    let user = |content: Value| json!({"model": "gpt-4o", "messages": [{"role": "user", "content": content}]});
    let source = json!({"type": "base64", "media_type": "image/png", "data": data});
    for body in [
        user(json!(url)),
        user(json!([{"type": "text", "text": url}])),
        user(json!([{"type": "tool_result", "content": url}])),
        user(json!([{"type": "tool_use", "name": "t", "input": {"type": "image", "source": source}}])),
        user(json!([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}, "title": url}])),
        json!({"model": "gpt-4o", "messages": [], "tools": [{"type": "function", "function": {"description": url}}]}),
        json!({"model": "gpt-4o", "input": url}),
        json!({"model": "gpt-4o", "input": [{"type": "function_call_output", "call_id": "c", "output": url}]}),
        json!({"model": "gpt-4o", "messages": [], "system": url}),
        json!({"model": "gpt-4o", "messages": [], "unheard_of": {"type": "image", "source": source}}),
        json!({"model": "gpt-4o", "messages": [{"role": url, "content": ""}]}),
        json!({"model": "gpt-4o", "messages": [{"role": "user", "content": "", "name": url}]}),
    ] {
        for api in [Api::ChatCompletions, Api::Responses, Api::Messages] {
            let counted = of(api, "gpt-4o", &body);
            assert!(counted >= text, "{counted} of {text}: {}", body.to_string().chars().take(150).collect::<String>());
        }
    }
    // The control, also for the quick minimum.
    let picture = user(json!([{"type": "image_url", "image_url": {"url": url}}]));
    assert!(of(Api::ChatCompletions, "gpt-4o", &picture) < 400);
    assert!(least(picture.as_object().unwrap(), &Model::named("gpt-4o", None)) < 200);
}

/// Encrypted thoughts of 6 kB each are sent back, and are charged as thoughts.
#[test]
fn sealed_thoughts_count_as_thoughts() {
    let sealed = base64(&png(67, 66));
    assert!((5_900..6_100).contains(&sealed.len()), "{}", sealed.len());
    let url_safe = sealed.replace('+', "-").replace('/', "_");
    let many = |item: Value| vec![item; 50];
    let said = |message: Value| json!({"model": "m", "messages": many(message)});
    let content = |part: Value| said(json!({"role": "assistant", "content": [part]}));
    let items = |item: Value| json!({"model": "m", "input": many(item)});
    let calls = |more: Value| {
        let call =
            json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "extra_content": more});
        said(json!({"role": "assistant", "content": null, "tool_calls": [call]}))
    };
    for (api, body) in [
        (Api::Responses, items(json!({"type": "reasoning", "id": "r", "summary": [], "encrypted_content": sealed}))),
        (Api::Responses, items(json!({"type": "compaction", "encrypted_content": url_safe}))),
        (Api::Messages, content(json!({"type": "redacted_thinking", "data": sealed}))),
        (Api::Messages, content(json!({"type": "thinking", "thinking": "Hm.", "signature": sealed}))),
        (
            Api::ChatCompletions,
            said(
                json!({"role": "assistant", "content": "", "thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": sealed}]}),
            ),
        ),
        (
            Api::ChatCompletions,
            said(
                json!({"role": "assistant", "content": "", "reasoning_details": [{"type": "reasoning.encrypted", "data": sealed}]}),
            ),
        ),
        (Api::ChatCompletions, calls(json!({"google": {"thought_signature": sealed}}))),
    ] {
        for name in ["gpt-5", "claude-opus-4-7", "our-own"] {
            let counted = of(api, name, &body);
            assert!((74_000..80_000).contains(&counted), "{name}: {counted} of {}", body.to_string().split_at(150).0);
        }
        let body = body.as_object().unwrap();
        let by_bytes = Model { counting: Counting::Bytes, ..Model::named("", None) };
        assert!(prompt(api, body, &by_bytes).tokens > 50 * 5_900, "whoever counts bytes counts each");
        for model in [Model::named("gpt-5", None), by_bytes] {
            let counted = prompt(api, body, &model);
            assert!(least(body, &model) <= counted.tokens && counted.least <= counted.tokens, "{counted:?}");
        }
    }
    // The control: in a place that the model reads, and if it is not base64, it counts as text.
    let sentence = "What has spaces in it was never sealed by anybody. ".repeat(120);
    for (api, body, from) in [
        (Api::Responses, items(json!({"type": "message", "role": "user", "content": sealed})), 150_000),
        (Api::Responses, items(json!({"type": "function_call_output", "call_id": "c", "output": sealed})), 150_000),
        (
            Api::Responses,
            items(json!({"type": "message", "role": "user", "content": "", "encrypted_content": sealed})),
            150_000,
        ),
        (Api::Messages, content(json!({"type": "thinking", "thinking": sealed, "signature": ""})), 150_000),
        (
            Api::Messages,
            content(
                json!({"type": "tool_use", "id": "t", "name": "t", "input": {"type": "redacted_thinking", "data": sealed}}),
            ),
            150_000,
        ),
        (Api::ChatCompletions, said(json!({"role": "assistant", "content": "", "reasoning_content": sealed})), 150_000),
        (
            Api::Responses,
            items(json!({"type": "reasoning", "summary": [], "encrypted_content": sentence})),
            50 * 120 * 10,
        ),
    ] {
        let counted = of(api, "gpt-5", &body);
        assert!(counted >= from, "{counted} of {}", body.to_string().split_at(150).0);
    }
}

#[test]
fn what_cannot_be_read_counts_as_the_most_that_it_can_be() {
    let user = |part: Value| json!({"model": "gpt-4o", "messages": [{"role": "user", "content": [part]}]});
    let wav = |seconds: usize| {
        let mut wav =
            b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\x00\x7d\0\0\x02\0\x10\0data\0\0\0\0".to_vec();
        wav.resize(wav.len() + 32_000 * seconds, 0);
        base64(&wav)
    };
    for (part, from, to) in [
        (json!({"type": "image_url", "image_url": {"url": "https://a.test/b.png"}}), 1_445, 1_545),
        (json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), 1_445, 1_545),
        (json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}), 1_445, 1_545),
        (json!({"type": "input_image", "file_id": "f"}), 1_445, 1_545),
        (json!({"type": "file", "file": {"file_id": "f"}}), 1_800_000, 1_801_000),
        (json!({"type": "document", "source": {"type": "url", "url": "https://a.test"}}), 1_800_000, 1_801_000),
        (
            json!({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}),
            1_800_000,
            1_801_000,
        ),
        // A text file and a binary file.
        (
            json!({"type": "file", "file": {"file_data": format!("data:text/plain;base64,{}", base64(&b"word ".repeat(1_000)))}}),
            1_000,
            1_200,
        ),
        (
            json!({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "word ".repeat(1_000)}}),
            1_000,
            1_200,
        ),
        (
            json!({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "word ".repeat(1_000)}]}}),
            1_000,
            1_200,
        ),
        (json!({"type": "file", "file": {"file_data": base64(&[0xff; 100])}}), 4_096, 4_300),
        (json!({"type": "file", "file": {"file_data": base64(&[0xff; 100_000])}}), 100_000, 100_200),
        // Half a minute of sound, and data that is not sound.
        (json!({"type": "input_audio", "input_audio": {"data": wav(30), "format": "wav"}}), 30 * 32, 32 * 32 + 100),
        (json!({"type": "input_audio", "input_audio": {"data": "!", "format": "mp3"}}), 3_600 * 32, 3_600 * 32 + 100),
        (json!({"type": "input_audio"}), 3_600 * 32, 3_600 * 32 + 100),
    ] {
        let shown = part.to_string().chars().take(120).collect::<String>();
        let counted = of(Api::ChatCompletions, "gpt-4o", &user(part));
        assert!((from..=to).contains(&counted), "{counted}, expected {from} to {to}: {shown}");
    }
}

#[test]
fn a_text_of_many_megabytes_is_counted_in_time() {
    let body = json!({"model": "gpt-4o", "messages": [{"role": "user", "content": "a".repeat(MOST_COUNTED + 1)}]});
    assert!(of(Api::ChatCompletions, "gpt-4o", &body) > 8 << 20, "beyond what is counted a byte is a token");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// With one token per byte, no text costs more than the reservation. With the tokenizer of another model, a text costs at most a third
    /// more, and never less than the minimum.
    #[test]
    fn the_prompt_covers_its_text(texts in prop::collection::vec("(\\PC|[a-z ]{5}){0,60}", 0..6)) {
        let messages: Vec<Value> = texts.iter().map(|text| json!({"role": "user", "content": text})).collect();
        let body = json!({"model": "m", "messages": messages});
        let body = body.as_object().unwrap();
        let bytes: i64 = texts.iter().map(|text| length(text.len())).sum();
        let tokens: i64 = texts.iter().map(|text| length(bpe::count(text))).sum();
        let by_bytes = Model { counting: Counting::Bytes, ..Model::named("", None) };
        let counted = prompt(Api::Messages, body, &by_bytes);
        prop_assert!(counted.tokens >= bytes && counted.least <= tokens);
        prop_assert!(counted.least >= (bytes / 16).min(tokens * 4 / 5));
        for name in ["gpt-4o", "claude-opus-4-7", "mistral-large-latest", "our-own"] {
            let model = Model::named(name, None);
            let counted = prompt(Api::ChatCompletions, body, &model);
            prop_assert!(counted.tokens >= tokens, "{name}: {counted:?} of {tokens}");
            prop_assert!(least(body, &model) <= counted.tokens);
            prop_assert!(counted.least <= tokens && counted.least <= counted.tokens);
            prop_assert!(counted.tokens <= bytes + OF_A_REQUEST + OF_A_MESSAGE * length(texts.len()), "{name}");
        }
    }
}
