use proptest::prelude::*;
use rstest::rstest;

use super::*;

/// The example of golang.org/x/mod/sumdb/note.
const GO_KEY: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
const GO_SEED: &str = "gQoUAtUUbI2E8kQzMPVAgOv5juF9nHT2JS/F1ccoMXM=";
const GO_NOTE: &str = "If you think cryptography is the answer to your problem,\n\
    then you don't know what your problem is.\n\n\
    — PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";

/// Written by github.com/transparency-dev/formats v0.1.1 with this seed, at Unix time 1795475748.
const WITNESS_SEED: &str = "7jopeHDESBBpcJZJSmuR5I+kZxoW17URgw1GwpE4cPY=";
const WITNESS_KEY: &str = "belay.dev/witness+223be0f0+BAd0Yc/vTFLr/s8s8hGDWztYdRpiEddDLRBYk5a6knx7";
const WITNESS_TIME: u64 = 0x6b04_c924;
const COSIGNED: &str = "belay.dev/task/0b4f\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n\
    — belay.dev/witness Ijvg8AAAAABrBMkkjL4BfzNq9DH1x2ucmJEmhZcEhFZO+7+HdEU+HnnS/+PKkBMk8HNwg+LBxeJ/MC6TQyiz0A0NtvC2uPAZd3MaCw==\n";

/// Returns a key from its 32-byte seed.
fn signer(name: &str, seed: &str) -> Signer {
    let mut document = hex::decode("302e020100300506032b657004220420").unwrap();
    document.extend(BASE64.decode(seed).unwrap());
    Signer::from_pkcs8(name, &document).unwrap()
}

fn checkpoint() -> Checkpoint {
    Checkpoint { origin: origin("0b4f"), size: 3, root: [7; 32] }
}

#[test]
fn go_note_is_read_verified_and_made_again() {
    let key: VerifierKey = GO_KEY.parse().unwrap();
    assert_eq!((key.name(), key.to_string().as_str()), ("PeterNeumann", GO_KEY));
    let note = Note::parse(GO_NOTE).unwrap();
    assert_eq!(note.to_string(), GO_NOTE);
    note.verify(&key).unwrap();
    let signer = signer("PeterNeumann", GO_SEED);
    assert_eq!(signer.verifier(), key);
    assert_eq!(note.signatures, [signer.signature(KeyType::Log, None, &note.text)]);
}

#[test]
fn cosignature_of_the_reference_implementation_is_read_verified_and_made_again() {
    let key: VerifierKey = WITNESS_KEY.parse().unwrap();
    assert!(key.is_witness());
    let note = Note::parse(COSIGNED).unwrap();
    assert_eq!(note.verify_cosignature(&key).unwrap(), WITNESS_TIME);
    let witness = signer(WITNESS_NAME, WITNESS_SEED);
    assert_eq!(witness.verifier().to_string(), WITNESS_KEY);
    let mut ours = Note::unsigned(&note.checkpoint().unwrap());
    ours.cosign(&witness, WITNESS_TIME);
    assert_eq!(ours.to_string(), COSIGNED);
}

#[test]
fn checkpoint_of_the_specification_is_read() {
    // The example of c2sp.org/tlog-cosignature.
    let text = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n\
        — example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n\
        — witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n";
    let note = Note::parse(text).unwrap();
    let checkpoint = note.checkpoint().unwrap();
    assert_eq!((checkpoint.origin.as_str(), checkpoint.size), ("example.com/behind-the-sofa", 20_852_163));
    assert_eq!(checkpoint.to_string(), note.text);
    assert_eq!(note.signatures.len(), 2);
    assert_eq!(note.signatures[1].bytes[..8], 1_679_315_147_u64.to_be_bytes());
    assert_eq!(note.to_string(), text);
}

#[test]
fn witness_key_of_another_project_is_read() {
    // From transparency-dev/formats' tests: a key of type 4.
    let key: VerifierKey = "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2".parse().unwrap();
    assert!(key.is_witness());
}

#[rstest]
#[case::empty("")]
#[case::no_id("PeterNeumann")]
#[case::wrong_id("PeterNeumann+c74f20a4+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")]
#[case::upper_case_id("PeterNeumann+C74F20A3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")]
#[case::space_in_name("Peter Neumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")]
#[case::wrong_length("PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==")]
#[case::unknown_type("PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")]
#[case::newline("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW\n")]
fn broken_keys_are_refused(#[case] text: &str) {
    assert!(text.parse::<VerifierKey>().is_err());
}

#[rstest]
#[case::no_newline("a\n1\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=")]
#[case::leading_zero("a\n01\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n")]
#[case::plus("a\n+1\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n")]
#[case::too_large("a\n18446744073709551616\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n")]
#[case::short_root("a\n1\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBw==\n")]
#[case::loose_base64("a\n1\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwd=\n")]
#[case::no_origin("\n1\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n")]
#[case::extension("a\n1\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\nmore\n")]
#[case::two_lines("a\n1\n")]
fn broken_checkpoints_are_refused(#[case] text: &str) {
    assert!(matches!(Checkpoint::parse(text), Err(NoteError::Checkpoint(_))));
}

#[rstest]
#[case::no_empty_line("a\n— b AAAAAAA=\n")]
#[case::no_dash("a\n\nb AAAAAAA=\n")]
#[case::hyphen("a\n\n- b AAAAAAA=\n")]
#[case::no_last_newline("a\n\n— b AAAAAAA=")]
#[case::too_short("a\n\n— b AAAAAA==\n")]
#[case::not_base64("a\n\n— b AAAA*AA=\n")]
#[case::plus_in_name("a\n\n— b+c AAAAAAA=\n")]
#[case::two_spaces("a\n\n— b  AAAAAAA=\n")]
#[case::carriage_return("a\r\n\n— b AAAAAAA=\n")]
#[case::tab("a\tb\n\n— b AAAAAAA=\n")]
#[case::seventeen(&format!("a\n\n{}", "— b AAAAAAA=\n".repeat(17)))]
fn broken_notes_are_refused(#[case] text: &str) {
    assert!(matches!(Note::parse(text), Err(NoteError::Syntax(_))), "{:?}", Note::parse(text));
}

#[test]
fn each_key_verifies_its_own_kind_of_signature_only() {
    let attempt = Signer::generate(&attempt_key_name("0b4f", 1)).unwrap();
    let witness = Signer::generate(WITNESS_NAME).unwrap();
    let mut note = Note::sign(&checkpoint(), &attempt);
    assert!(matches!(note.verify_cosignature(&witness.verifier()), Err(NoteError::Missing { .. })));
    note.cosign(&witness, 1000);
    note.cosign(&witness, 2000);
    assert_eq!(note.signatures.len(), 2, "the second cosignature replaces the first");
    note.verify(&attempt.verifier()).unwrap();
    assert_eq!(note.verify_cosignature(&witness.verifier()).unwrap(), 2000);
    assert!(matches!(note.verify(&witness.verifier()), Err(NoteError::KeyType { .. })));
    assert!(matches!(note.verify_cosignature(&attempt.verifier()), Err(NoteError::KeyType { .. })));
    let other = Signer::generate(&attempt_key_name("0b4f", 1)).unwrap();
    assert!(matches!(note.verify(&other.verifier()), Err(NoteError::Missing { .. })), "same name, another key");
}

#[test]
fn a_changed_text_or_signature_is_forged() {
    let attempt = Signer::generate(&attempt_key_name("0b4f", 1)).unwrap();
    let witness = Signer::generate(WITNESS_NAME).unwrap();
    let mut note = Note::sign(&checkpoint(), &attempt);
    note.cosign(&witness, 1000);
    let mut other = note.clone();
    other.text = Checkpoint { size: 4, ..checkpoint() }.to_string();
    assert!(matches!(other.verify(&attempt.verifier()), Err(NoteError::Forged(_))));
    assert!(matches!(other.verify_cosignature(&witness.verifier()), Err(NoteError::Forged(_))));
    let mut later = note.clone();
    later.signatures[1].bytes[7] ^= 1;
    assert!(matches!(later.verify_cosignature(&witness.verifier()), Err(NoteError::Forged(_))), "the time is signed");
    // A good signature beside a bad one under the same key does not save the note.
    let mut both = note.clone();
    both.signatures.push(Signature { bytes: vec![0; 64], ..note.signatures[0].clone() });
    assert!(matches!(both.verify(&attempt.verifier()), Err(NoteError::Forged(_))));
}

#[test]
fn keys_of_other_kinds_and_names_are_refused() {
    assert!(matches!(Signer::from_pkcs8("a", b"not a key"), Err(KeyError::Pkcs8(_))));
    for name in ["", "a b", "a+b", "a\n", "a\u{a0}b"] {
        assert!(matches!(Signer::generate(name), Err(KeyError::Name(_))), "{name:?}");
    }
    let debug = format!("{:?}", signer("a", GO_SEED));
    assert!(debug.contains("a+") && !debug.contains("gQoU"), "{debug}");
}

proptest! {
    #[test]
    fn nothing_makes_the_parsers_panic(text in any::<String>(), bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Note::parse(&text);
        let _ = Checkpoint::parse(&text);
        let _ = text.parse::<VerifierKey>();
        let _ = Note::parse(&String::from_utf8_lossy(&bytes));
        let _ = Signer::from_pkcs8("a", &bytes);
    }

    #[test]
    fn what_is_accepted_has_one_form(text in "[a\n— =+A]{0,60}") {
        if let Ok(note) = Note::parse(&text) {
            prop_assert_eq!(note.to_string(), text);
        }
    }

    #[test]
    fn notes_go_round(origin in "[!-*,-~]{1,40}", size in any::<u64>(), root in any::<Hash>(), time in 0..i64::MAX as u64) {
        let checkpoint = Checkpoint { origin, size, root };
        prop_assert_eq!(&Checkpoint::parse(&checkpoint.to_string()).unwrap(), &checkpoint);
        let mut note = Note::sign(&checkpoint, &signer("a", GO_SEED));
        let witness = signer(WITNESS_NAME, WITNESS_SEED);
        note.cosign(&witness, time);
        let again = Note::parse(&note.to_string()).unwrap();
        prop_assert_eq!(again.verify_cosignature(&witness.verifier()), Ok(time));
        prop_assert_eq!(again, note);
    }

    #[test]
    fn mangled_notes_do_not_verify(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let mut bytes = COSIGNED.as_bytes().to_vec();
        bytes[at.index(COSIGNED.len())] ^= 1_u8 << bit;
        let key = WITNESS_KEY.parse().unwrap();
        let verified = String::from_utf8(bytes).ok().and_then(|t| Note::parse(&t).ok()).map(|n| n.verify_cosignature(&key));
        prop_assert!(!matches!(verified, Some(Ok(_))));
    }
}
