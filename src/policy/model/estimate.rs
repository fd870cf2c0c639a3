//! Estimates the prompt tokens of a request: text by a tokenizer, pictures, documents and sound by their properties.
//!
//! Guarantees: text never counts more than one token per byte. Data that looks like a picture counts as text if the API reads text in its
//! place. A part that cannot be read counts as the most that such a part can cost. Time and memory are proportional to the request.
//! Non-goals: exact counts. docs/model-budgets.md says by how much each rule can be wrong.

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::{Map, Value};

use super::{
    api::Api,
    bpe,
    catalogue::{Counting, Model},
    document::{self, Pdf},
    picture::Detail,
    sound,
};

/// Tokens that providers add to any request: roles, separators, the start of the reply.
const OF_A_REQUEST: i64 = 64;
/// Tokens around a message.
const OF_A_MESSAGE: i64 = 4;
/// Tokens that Anthropic adds to the prompt if there are tools: 264 to 804 according to its documentation, and more if the tools control a
/// computer.
const OF_TOOLS: i64 = 1_000;
/// Maximum text that the tokenizer counts, in bytes: more than any model accepts. The rest counts as one token per byte.
const MOST_COUNTED: usize = 8 << 20;
/// Bytes of a picture that are read to find its size.
const HEAD_OF_A_PICTURE: usize = 1 << 20;
/// Minimum tokens of a file of an unknown type.
const OF_A_FILE: i64 = 4_096;
/// Pages of a document whose pages cannot be counted: the most that a large provider accepts.
const MOST_PAGES: i64 = 600;
/// The picture of a page, as providers render it: letter format.
const PAGE: (i64, i64) = (1_024, 1_325);
/// Bytes of the longest existing token.
const LONGEST_TOKEN: i64 = 128;
/// Bytes of base64 per token of a thought that its provider has encrypted. Four bytes of base64 are three bytes of the thought, and a token
/// of text has three to five bytes.
const BYTES_PER_SEALED_TOKEN: i64 = 4;
/// Maximum bytes per token in a text that people or programs write.
const BYTES_PER_TOKEN: i64 = 16;

/// The variants of base64 that clients write.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The size of a prompt in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The tokens to reserve.
    pub tokens: i64,
    /// The minimum, whatever the provider reports.
    pub least: i64,
}

/// Loads the tokenizer, which takes some tens of milliseconds, once.
pub fn prepare() {
    bpe::count("a");
}

/// Estimates the prompt of a request to this model.
pub fn prompt(api: Api, body: &Map<String, Value>, model: &Model) -> Prompt {
    let mut count = Count {
        model,
        is_bounded_cost: false,
        tokens: 0,
        bytes: 0,
        uncounted: 0,
        others: OF_A_REQUEST,
        room: MOST_COUNTED,
    };
    count.body(body);
    if api == Api::Messages && body.get("tools").and_then(Value::as_array).is_some_and(|tools| !tools.is_empty()) {
        count.add(OF_TOOLS);
    }
    count.sum()
}

/// Returns a quick minimum of the prompt of a request. The gateway uses it to check a reservation that the harness may have made with an
/// older catalogue. Pictures, and the tokens around texts, count half.
pub fn least(body: &Map<String, Value>, model: &Model) -> i64 {
    let mut count = Count { model, is_bounded_cost: true, tokens: 0, bytes: 0, uncounted: 0, others: 0, room: 0 };
    count.body(body);
    (count.bytes / LONGEST_TOKEN).saturating_add(count.others / 2)
}

struct Count<'m> {
    model: &'m Model,
    /// Whether texts are not tokenized and files are not opened.
    is_bounded_cost: bool,
    /// The tokens that the tokenizer has counted, and the bytes of their text.
    tokens: i64,
    bytes: i64,
    /// Bytes of text that the tokenizer has not read.
    uncounted: i64,
    /// All other tokens.
    others: i64,
    /// Bytes that the tokenizer may still read.
    room: usize,
}

impl Count<'_> {
    fn body(&mut self, body: &Map<String, Value>) {
        for (name, value) in body {
            match (name.as_str(), value) {
                // These members are not part of the prompt.
                ("model" | "stream_options", _) | (_, Value::Number(_) | Value::Bool(_) | Value::Null) => {}
                ("messages" | "input", value) => self.turns(value),
                ("system" | "instructions", value) => self.content(value),
                ("tools", Value::Array(tools)) if tools.is_empty() => {}
                (_, value) => self.json(value),
            }
        }
    }

    fn sum(&self) -> Prompt {
        let text = match self.model.counting {
            Counting::O200k(percent) => (self.tokens.saturating_mul(percent).saturating_add(99) / 100).min(self.bytes),
            Counting::Bytes => self.bytes,
        };
        let all_text = self.bytes.saturating_add(self.uncounted);
        Prompt {
            tokens: text.saturating_add(self.uncounted).saturating_add(self.others),
            // Some texts are long runs of one character, and one token can cover many of them.
            least: (all_text / BYTES_PER_TOKEN).min(self.tokens.saturating_mul(4) / 5),
        }
    }

    fn add(&mut self, tokens: i64) {
        self.others = self.others.saturating_add(tokens);
    }

    fn text(&mut self, text: &str) {
        let bytes = length(text.len());
        if self.is_bounded_cost {
            self.bytes = self.bytes.saturating_add(bytes);
        } else if text.len() <= self.room {
            self.room = self.room.saturating_sub(text.len());
            self.tokens = self.tokens.saturating_add(length(bpe::count(text)));
            self.bytes = self.bytes.saturating_add(bytes);
        } else {
            self.uncounted = self.uncounted.saturating_add(bytes);
        }
    }

    /// Counts a value that a provider serializes for its model: names and texts, and the characters around them.
    fn json(&mut self, value: &Value) {
        match value {
            Value::String(text) => {
                self.text(text);
                self.add(1);
            }
            Value::Array(items) => {
                self.add(1);
                items.iter().for_each(|item| self.json(item));
            }
            Value::Object(members) => {
                self.add(1);
                members.iter().for_each(|(name, value)| self.member(name, value));
            }
            Value::Number(number) => self.text(&number.to_string()),
            Value::Bool(_) | Value::Null => self.add(1),
        }
    }

    fn member(&mut self, name: &str, value: &Value) {
        self.text(name);
        self.add(1);
        self.json(value);
    }

    /// Counts messages, and other items between them.
    fn turns(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.text(text),
            Value::Array(turns) => turns.iter().for_each(|turn| self.turn(turn)),
            other => self.json(other),
        }
    }

    fn turn(&mut self, turn: &Value) {
        let Value::Object(members) = turn else { return self.json(turn) };
        self.add(OF_A_MESSAGE);
        for (name, value) in members {
            match (name.as_str(), value) {
                ("content" | "output", value) => self.content(value),
                // These members are part of the tokens around a message.
                ("role" | "type" | "status", Value::String(word)) if word.len() < 32 => {}
                (name, Value::String(sealed)) if is_sealed(members, name) => self.sealed(sealed),
                ("tool_calls", Value::Array(calls)) => calls.iter().for_each(|call| self.tool_call(call)),
                (name, value) if OF_PROVIDERS.contains(&name) => self.of_provider(value),
                (_, value) => self.member(name, value),
            }
        }
    }

    fn tool_call(&mut self, call: &Value) {
        let Value::Object(members) = call else { return self.json(call) };
        self.add(1);
        for (name, value) in members {
            if OF_PROVIDERS.contains(&name.as_str()) { self.of_provider(value) } else { self.member(name, value) }
        }
    }

    /// Counts what a provider or a proxy added to a reply and the agent sends back, such as thoughts.
    fn of_provider(&mut self, value: &Value) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| self.of_provider(item)),
            Value::Object(members) => {
                for (name, value) in members {
                    match value {
                        Value::String(sealed) if is_sealed(members, name) => self.sealed(sealed),
                        value => {
                            self.text(name);
                            self.of_provider(value);
                        }
                    }
                }
            }
            other => self.json(other),
        }
    }

    /// Counts a thought that only its provider can read. The provider charges the thought and not its base64 form.
    fn sealed(&mut self, sealed: &str) {
        let is_base64 = sealed.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/-_=".contains(&byte));
        if is_base64 && self.model.counting != Counting::Bytes {
            self.add(length(sealed.len()) / BYTES_PER_SEALED_TOKEN + 1);
        } else {
            self.text(sealed);
        }
    }

    /// Counts the content of a message or of a tool's result.
    fn content(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.text(text),
            Value::Array(parts) => parts.iter().for_each(|part| self.part(part)),
            Value::Object(_) => self.part(value),
            other => self.json(other),
        }
    }

    fn part(&mut self, part: &Value) {
        let Value::Object(members) = part else { return self.content(part) };
        match members.get("type").and_then(Value::as_str).unwrap_or_default() {
            "image_url" | "input_image" | "image" | "computer_screenshot" => {
                self.but(members, &["image_url", "source"]);
                self.picture(members);
            }
            "input_audio" => {
                self.but(members, &["input_audio"]);
                self.sound(members.get("input_audio"));
            }
            "file" | "input_file" | "document" => {
                self.but(members, &["file", "file_data", "source"]);
                self.file(members);
            }
            "tool_result" => {
                self.but(members, &["content"]);
                members.get("content").into_iter().for_each(|content| self.content(content));
            }
            _ => self.but(members, &[]),
        }
    }

    /// Counts the members of a part besides its data, as text.
    fn but(&mut self, members: &Map<String, Value>, without: &[&str]) {
        for (name, value) in members {
            match (name.as_str(), value) {
                ("type", Value::String(word)) if word.len() < 32 => {}
                ("text", Value::String(text)) => self.text(text),
                (name, Value::String(sealed)) if is_sealed(members, name) => self.sealed(sealed),
                (name, _) if without.contains(&name) => {}
                (name, value) => self.member(name, value),
            }
        }
    }

    fn picture(&mut self, part: &Map<String, Value>) {
        let url = part.get("image_url");
        let detail = part.get("detail").or_else(|| url?.get("detail")).and_then(Value::as_str);
        let detail = match detail {
            Some("low") => Detail::Low,
            Some("original") => Detail::Original,
            _ => Detail::High,
        };
        let inline = url.and_then(|url| url.as_str().or_else(|| url.get("url")?.as_str())).and_then(of_data_url);
        let data = inline.or_else(|| of_source(part)).map(|(_, data)| data);
        let size = data.and_then(|data| imagesize::blob_size(&decoded(data, HEAD_OF_A_PICTURE)?).ok());
        let size = size.map(|size| (length(size.width), length(size.height)));
        self.add(self.model.pictures.tokens(size, detail));
    }

    fn sound(&mut self, sound: Option<&Value>) {
        if self.is_bounded_cost {
            return;
        }
        let data = sound.and_then(|sound| sound.get("data")).and_then(Value::as_str);
        let seconds =
            data.and_then(|data| decoded(data, usize::MAX)).map_or(sound::LONGEST, |bytes| sound::seconds(&bytes));
        self.add(seconds.saturating_mul(self.model.sound_per_second));
    }

    fn file(&mut self, part: &Map<String, Value>) {
        if self.is_bounded_cost {
            return;
        }
        match part.get("source") {
            // Anthropic's form: text, or parts.
            Some(source) if source.get("type").and_then(Value::as_str) == Some("text") => {
                return source.get("data").into_iter().for_each(|text| self.content(text));
            }
            Some(source) if source.get("content").is_some() => {
                return source.get("content").into_iter().for_each(|content| self.content(content));
            }
            _ => {}
        }
        let inline = part.get("file_data").or_else(|| part.get("file")?.get("file_data")).and_then(Value::as_str);
        let inline = inline.map(|data| of_data_url(data).unwrap_or(("", data)));
        let Some((kind, data)) = inline.or_else(|| of_source(part)) else {
            return self.pages(MOST_PAGES);
        };
        match decoded(data, usize::MAX) {
            None => self.pages(MOST_PAGES),
            Some(bytes) if kind == "application/pdf" || bytes.starts_with(b"%PDF-") => self.pdf(document::read(&bytes)),
            Some(bytes) => match String::from_utf8(bytes) {
                Ok(text) => self.text(&text),
                // Compressed content may be longer than the file.
                Err(packed) => self.add(length(packed.as_bytes().len()).max(OF_A_FILE)),
            },
        }
    }

    fn pdf(&mut self, pdf: Option<Pdf>) {
        let Some(Pdf { pages, text }) = pdf else { return self.pages(MOST_PAGES) };
        self.add(
            pages.saturating_mul(
                self.model.page.unwrap_or_else(|| self.model.pictures.tokens(Some(PAGE), Detail::High)),
            ),
        );
        // Models of some providers read only the pictures of the pages.
        if self.model.page.is_none() {
            self.text(&text);
        }
    }

    /// Counts pages with unknown content. Each counts as the largest page by Anthropic's documentation.
    fn pages(&mut self, pages: i64) {
        self.add(pages.saturating_mul(self.model.page.unwrap_or(3_000)));
    }
}

/// Members of messages and calls in which compatible servers and proxies put provider-specific data.
const OF_PROVIDERS: [&str; 4] = ["thinking_blocks", "reasoning_details", "extra_content", "provider_specific_fields"];

/// Returns whether this member of an item or a part holds a thought that its provider has encrypted.
fn is_sealed(members: &Map<String, Value>, name: &str) -> bool {
    let kind = members.get("type").and_then(Value::as_str).unwrap_or_default();
    match name {
        "encrypted_content" => ["reasoning", "compaction", "compaction_summary"].contains(&kind),
        "data" => ["redacted_thinking", "reasoning.encrypted"].contains(&kind),
        "signature" => ["thinking", "reasoning.text"].contains(&kind),
        // Gemini's member is in an object without a type.
        "thought_signature" => kind.is_empty(),
        _ => false,
    }
}

fn length(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

/// Returns the media type and the base64 text of a `data:` URL.
fn of_data_url(url: &str) -> Option<(&str, &str)> {
    let (head, data) =
        url.split_at_checked(5).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("data:"))?.1.split_once(',')?;
    let kind = head.split(';').next().unwrap_or_default();
    head.to_ascii_lowercase().ends_with(";base64").then_some((kind, data))
}

/// Returns the media type and the base64 text of a `source` in Anthropic's form.
fn of_source(part: &Map<String, Value>) -> Option<(&str, &str)> {
    let source = part.get("source")?;
    let kind = source.get("media_type").and_then(Value::as_str).unwrap_or_default();
    source.get("data").and_then(Value::as_str).map(|data| (kind, data))
}

/// Decodes the base64 text, up to `most` bytes of content.
fn decoded(base64: &str, most: usize) -> Option<Vec<u8>> {
    let bytes = base64.as_bytes();
    let most = most.checked_mul(4).map_or(bytes.len(), |most| most.min(bytes.len()));
    let head = bytes.get(..most)?;
    if head.iter().any(u8::is_ascii_whitespace) {
        let whole: Vec<u8> = head.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
        return in_fours(&whole, most < bytes.len());
    }
    in_fours(head, most < bytes.len())
}

fn in_fours(base64: &[u8], is_cut: bool) -> Option<Vec<u8>> {
    let whole = if is_cut { base64.len() / 4 * 4 } else { base64.len() };
    BASE64.decode(base64.get(..whole)?).ok()
}

#[cfg(test)]
mod tests;
