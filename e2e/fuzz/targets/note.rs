//! A C2SP signed note, the checkpoint in it, and a verifier key: each is read only from the text that Belay would write, and no text
//! carries a signature that its key did not make.
#![no_main]

use std::sync::LazyLock;

use belay::evidence::note::{Checkpoint, Note, Signer, VerifierKey, WITNESS_NAME};
use libfuzzer_sys::fuzz_target;

/// The maximum number of signatures that C2SP asks a verifier to accept.
const MAX_SIGNATURES: usize = 16;
/// A time of a cosignature, in seconds since 1970.
const TIME: u64 = 1_700_000_000;

/// A witness whose key is the same in every run, so that every failure can be repeated.
static WITNESS: LazyLock<Signer> = LazyLock::new(|| signer(WITNESS_NAME, 1));
/// A log, likewise.
static LOG: LazyLock<Signer> = LazyLock::new(|| signer("belay.dev/task/1/1", 2));

/// Returns a key that is made of one repeated byte, in PKCS#8 (RFC 8410, section 7).
fn signer(name: &str, byte: u8) -> Signer {
    let start = hex::decode("302e020100300506032b657004220420").expect("hex");
    Signer::from_pkcs8(name, &[start, vec![byte; 32]].concat()).expect("a key")
}

fuzz_target!(|text: &str| {
    if let Ok(note) = Note::parse(text) {
        assert_eq!(note.to_string(), text);
        assert!(note.signatures.len() <= MAX_SIGNATURES);
        assert!(note.verify(&LOG.verifier()).is_err() && note.verify_cosignature(&WITNESS.verifier()).is_err());
        if let Ok(checkpoint) = note.checkpoint() {
            assert_eq!(checkpoint.to_string(), note.text);
            cosigned(note, &checkpoint);
        }
    }
    if let Ok(key) = text.trim_end().parse::<VerifierKey>() {
        assert_eq!(key.to_string(), text.trim_end());
    }
});

/// A signature holds for its own text and for no other one, before and after the note is written and read.
fn cosigned(note: Note, checkpoint: &Checkpoint) {
    let mut signed = Note::sign(checkpoint, &LOG);
    // A signature that claims to be by the log's key would make the other one count for nothing, as it has to.
    signed.signatures.extend(note.signatures.into_iter().filter(|signature| !signature.claims(&LOG.verifier())));
    signed.cosign(&WITNESS, TIME);
    if signed.signatures.len() > MAX_SIGNATURES {
        return;
    }
    assert_eq!(Note::parse(&signed.to_string()).as_ref(), Ok(&signed));
    assert_eq!(signed.verify(&LOG.verifier()), Ok(()));
    assert_eq!(signed.verify_cosignature(&WITNESS.verifier()), Ok(TIME));
    let other = Checkpoint { size: checkpoint.size ^ 1, ..checkpoint.clone() };
    let forged = Note { text: other.to_string(), ..signed };
    assert!(forged.verify(&LOG.verifier()).is_err() && forged.verify_cosignature(&WITNESS.verifier()).is_err());
}
