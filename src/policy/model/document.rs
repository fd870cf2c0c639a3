//! Counts the pages of a PDF and extracts its text as far as it can be read.
//!
//! Guarantees: time and memory are bounded, whatever the document contains. If the page tree and the pages disagree, the larger number
//! counts.
//! Non-goals: encrypted documents, which only their readers can open, and reading text in its visual layout.

use std::io::Read;

use flate2::read::ZlibDecoder;
use memchr::memmem;

/// Longest stream that is decompressed, and maximum size of all decompressed streams, in bytes.
const LONGEST_STREAM: usize = 2 << 20;
const MOST_UNPACKED: usize = 32 << 20;
/// Longest text that is extracted, in bytes.
const LONGEST_TEXT: usize = 8 << 20;
/// Maximum distance, in bytes, from the start of a stream's dictionary to the stream.
const DICTIONARY: usize = 512;
/// Maximum number of streams that are read. A document with more streams is not trusted at all.
const MOST_STREAMS: usize = 50_000;
/// Text that is assumed for a stream that is too long to decompress, in bytes: the text of a full page.
const TEXT_OF_A_PAGE: usize = 8_000;

/// The contents of a document.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pdf {
    pub(super) pages: i64,
    pub(super) text: String,
}

/// Reads a document. Returns `None` if it finds no page.
pub(super) fn read(bytes: &[u8]) -> Option<Pdf> {
    let mut found = Found::default();
    found.objects(bytes);
    let (mut left, mut streams) = (MOST_UNPACKED, 0_usize);
    let mut at = 0;
    while let Some(begin) =
        bytes.get(at..).and_then(|rest| memmem::find(rest, b"stream")).map(|begin| at.saturating_add(begin))
    {
        let dictionary = bytes.get(begin.saturating_sub(DICTIONARY)..begin).unwrap_or_default();
        let dictionary =
            memmem::rfind(dictionary, b"obj").and_then(|from| dictionary.get(from..)).unwrap_or(dictionary);
        let data = begin.saturating_add(b"stream".len());
        let end = bytes.get(data..).and_then(|rest| memmem::find(rest, b"endstream"));
        let Some(end) = end.map(|end| data.saturating_add(end)) else { break };
        streams = streams.saturating_add(1);
        if streams > MOST_STREAMS {
            return None;
        }
        at = end.saturating_add(b"endstream".len());
        let data = bytes.get(data..end).unwrap_or_default();
        let data = data.strip_prefix(b"\r\n").or_else(|| data.strip_prefix(b"\n")).unwrap_or(data);
        found.stream(dictionary, data, &mut left);
    }
    let pages = found.pages.max(found.tree);
    (pages > 0).then_some(Pdf { pages, text: found.text })
}

#[derive(Default)]
struct Found {
    /// The number of objects that are pages.
    pages: i64,
    /// The largest page count in a node of the page tree.
    tree: i64,
    text: String,
}

impl Found {
    fn stream(&mut self, dictionary: &[u8], data: &[u8], left: &mut usize) {
        let has = |word: &[u8]| memmem::find(dictionary, word).is_some();
        // Pictures and fonts have no text. Other compression methods are not supported.
        if has(b"/Image") || has(b"/FontFile") || has(b"/Length1") || has(b"/DCTDecode") {
            return;
        }
        if !has(b"/FlateDecode") && !has(b"/Fl ") {
            return self.unpacked(dictionary, data);
        }
        let most = LONGEST_STREAM.min(*left);
        let mut unpacked = Vec::new();
        let limit = u64::try_from(most).unwrap_or(u64::MAX);
        // The bytes before an error count.
        let _ = ZlibDecoder::new(data).take(limit).read_to_end(&mut unpacked);
        *left = left.saturating_sub(unpacked.len());
        if unpacked.len() >= most {
            // The stream counts as if it were full of text.
            let words = "text ".repeat(TEXT_OF_A_PAGE / 5);
            self.say(&words);
        }
        self.unpacked(dictionary, &unpacked);
    }

    fn unpacked(&mut self, dictionary: &[u8], data: &[u8]) {
        if memmem::find(dictionary, b"/ObjStm").is_some() {
            self.objects(data);
        } else if memmem::find(data, b"Tj").is_some() || memmem::find(data, b"TJ").is_some() {
            self.shown(data);
        }
    }

    /// Counts the pages among the objects.
    fn objects(&mut self, bytes: &[u8]) {
        for at in memmem::find_iter(bytes, b"/Type") {
            let kind = bytes.get(at.saturating_add(5)..).unwrap_or_default().trim_ascii_start();
            let Some(behind) = kind.strip_prefix(b"/Page") else { continue };
            match behind.first() {
                Some(b's') => self.tree = self.tree.max(node(bytes, at)),
                Some(byte) if byte.is_ascii_alphanumeric() => {}
                _ => self.pages = self.pages.saturating_add(1),
            }
        }
    }

    /// Extracts the text that a page shows.
    fn shown(&mut self, content: &[u8]) {
        let mut rest = content;
        while let Some((byte, behind)) = rest.split_first() {
            rest = match byte {
                b'(' => self.literal(behind),
                b'<' if behind.first() != Some(&b'<') => self.hexadecimal(behind),
                b'<' => behind.get(1..).unwrap_or_default(),
                // The end of a line or of a piece of a line.
                b'T' if matches!(behind.first(), Some(b'*' | b'd' | b'D' | b'm')) => {
                    self.say(" ");
                    behind
                }
                _ => behind,
            };
        }
    }

    fn literal<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let (mut depth, mut escaped, mut text) = (1_usize, false, String::new());
        for (index, byte) in bytes.iter().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'(' => depth = depth.saturating_add(1),
                b')' => depth = depth.saturating_sub(1),
                _ => text.push(char::from(*byte)),
            }
            if depth == 0 {
                self.say(&text);
                return bytes.get(index.saturating_add(1)..).unwrap_or_default();
            }
        }
        self.say(&text);
        &[]
    }

    /// Counts the characters of fonts that have many: two bytes each, whose meaning is in the font. Each counts as one token, which is what
    /// characters of such scripts cost.
    fn hexadecimal<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let end = memchr::memchr(b'>', bytes).unwrap_or(bytes.len());
        self.say(&"\u{4e00}".repeat(end / 4));
        bytes.get(end.saturating_add(1)..).unwrap_or_default()
    }

    fn say(&mut self, text: &str) {
        if self.text.len().saturating_add(text.len()) <= LONGEST_TEXT {
            self.text.push_str(text);
        }
    }
}

/// Returns the page count of a node of the page tree: the largest count in its object.
fn node(bytes: &[u8], at: usize) -> i64 {
    let near = at.saturating_sub(DICTIONARY);
    let from =
        memmem::rfind(bytes.get(near..at).unwrap_or_default(), b"<<").map_or(near, |from| near.saturating_add(from));
    let behind = bytes.get(at.saturating_add(5)..).unwrap_or_default();
    let until = memmem::find(behind, b"/Type").map_or(bytes.len(), |next| at.saturating_add(5).saturating_add(next));
    let object = bytes.get(from..until).unwrap_or_default();
    let counts = memmem::find_iter(object, b"/Count").filter_map(|count| {
        let digits = object.get(count.saturating_add(6)..)?.trim_ascii_start();
        let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
        std::str::from_utf8(digits.get(..end)?).ok()?.parse().ok()
    });
    counts.max().unwrap_or(0)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use flate2::{Compression, write::ZlibEncoder};
    use proptest::prelude::*;

    use super::*;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn stream(out: &mut Vec<u8>, number: usize, dictionary: &str, data: &[u8]) {
        write!(out, "{number} 0 obj\n<<{dictionary} /Length {}>>\nstream\n", data.len()).unwrap();
        out.extend_from_slice(data);
        out.extend_from_slice(b"\nendstream\nendobj\n");
    }

    /// Builds a document with these pages, as PDF writers do: plain, with compressed contents, or with all objects compressed too.
    pub(in super::super) fn pdf(pages: &[String], pack: bool, objects: bool) -> Vec<u8> {
        let mut out = b"%PDF-1.7\n".to_vec();
        let kids: String = (0..pages.len()).map(|page| format!("{} 0 R ", 10 + page)).collect();
        let mut described = vec![
            "1 0 obj\n<</Type /Catalog /Pages 2 0 R>>\nendobj\n".to_owned(),
            format!("2 0 obj\n<</Type /Pages /Count {} /Kids [{kids}]>>\nendobj\n", pages.len()),
            "3 0 obj\n<</Type /Font /Subtype /Type1 /BaseFont /Helvetica>>\nendobj\n".to_owned(),
        ];
        for (page, text) in pages.iter().enumerate() {
            let contents = 100_000 + page;
            described.push(format!(
                "{} 0 obj\n<</Type/Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {contents} 0 R>>\nendobj\n",
                10 + page
            ));
            let lines: String = text
                .lines()
                .map(|line| format!("({}) Tj T*\n", line.replace('\\', "\\\\").replace('(', "\\(").replace(')', "\\)")))
                .collect();
            let content = format!("BT /F1 10 Tf 12 TL 72 720 Td\n{lines}ET\n");
            let (filter, data) =
                if pack { ("/Filter /FlateDecode", packed(content.as_bytes())) } else { ("", content.into_bytes()) };
            stream(&mut out, contents, filter, &data);
        }
        let described = described.concat();
        if objects {
            stream(&mut out, 5, "/Type /ObjStm /N 3 /First 9 /Filter /FlateDecode", &packed(described.as_bytes()));
        } else {
            out.extend_from_slice(described.as_bytes());
        }
        out.extend_from_slice(b"trailer\n<</Root 1 0 R>>\n%%EOF\n");
        out
    }

    #[test]
    fn pages_and_texts_are_found_however_they_are_packed() {
        let pages = vec!["The first page\nhas (two) lines".to_owned(), "and this the second".to_owned()];
        for (pack, objects) in [(false, false), (true, false), (true, true)] {
            let pdf = read(&pdf(&pages, pack, objects)).unwrap();
            assert_eq!(pdf.pages, 2);
            for words in ["The first page", "has two lines", "and this the second"] {
                assert!(pdf.text.contains(words), "{pack} {objects}: {}", pdf.text);
            }
        }
    }

    #[test]
    fn the_larger_number_of_pages_counts() {
        for (bytes, pages) in [
            (&b"%PDF-1.4 << /Type /Pages /Count 77 /Kids [3 0 R] >> << /Type /Page >>"[..], Some(77)),
            (b"%PDF-1.4 << /Count 5 /Type/Pages >> << /Type/Page >> <</Type /Page/x 1>>", Some(5)),
            (b"%PDF-1.4 << /Type /Pages /Count 1 >> << /Type /Page >> <</Type /Page>>", Some(2)),
            (b"%PDF-1.4 << /Type /Pages /Count -3 >> << /Type /Page >>", Some(1)),
            (b"%PDF-1.4 << /Type /PageLabel >>", None),
            (b"%PDF-1.4 encrypted", None),
            (b"", None),
        ] {
            assert_eq!(read(bytes).map(|pdf| pdf.pages), pages, "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn what_unpacks_to_much_is_not_unpacked() {
        let mut bomb = b"%PDF-1.7 << /Type /Page >>".to_vec();
        let much = packed(&b"(a) Tj ".repeat(320_000));
        (0..20).for_each(|number| stream(&mut bomb, number, "/Filter /FlateDecode", &much));
        let read = read(&bomb).unwrap();
        assert!(read.text.len() <= LONGEST_TEXT, "{}", read.text.len());
        let many = b"%PDF-1.7 << /Type /Page >> ".iter().copied().chain(b"stream endstream ".repeat(MOST_STREAMS + 1));
        assert_eq!(super::read(&many.collect::<Vec<_>>()), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn whatever_is_in_it_is_read(bytes in prop::collection::vec(any::<u8>(), 0..600), words in prop::collection::vec(
            prop::sample::select(vec!["/Type", "/Page", "/Pages", "/Count", " 99999999999999999999", "stream", "endstream", "obj", "<<", "(", "\\", "Tj", "<41"]), 0..40)
        ) {
            let _ = read(&bytes);
            let _ = read(words.concat().as_bytes());
        }
    }
}
