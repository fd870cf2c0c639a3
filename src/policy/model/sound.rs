//! Computes the duration of sound.
//!
//! Guarantees: the duration is never shorter than the header says. Without a header, it is as long as that many bytes of speech can be.
//! Non-goals: decoding sound.

/// Seconds of sound that cannot be read at all.
pub(super) const LONGEST: i64 = 3_600;
/// Minimum bytes per second of compressed speech: 16 kilobits.
const FEWEST_BYTES: i64 = 2_000;

/// Returns the seconds, rounded up.
pub(super) fn seconds(bytes: &[u8]) -> i64 {
    let length = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
    // The length in a header can be false, and providers may read more than it says. So the length of the data counts.
    let rate = byte_rate(bytes).filter(|rate| *rate >= FEWEST_BYTES).unwrap_or(FEWEST_BYTES);
    length.saturating_add(rate).saturating_sub(1) / rate
}

/// Returns the bytes per second from the header of a WAV file.
fn byte_rate(bytes: &[u8]) -> Option<i64> {
    if bytes.get(..4)? != b"RIFF" || bytes.get(8..12)? != b"WAVE" {
        return None;
    }
    // The format is in one of the first chunks.
    let head = bytes.get(12..bytes.len().min(4_096))?;
    let format = head.windows(4).position(|four| four == b"fmt ")?;
    let rate = head.get(format.checked_add(16)?..format.checked_add(20)?)?;
    Some(i64::from(u32::from_le_bytes(rate.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wav(rate: u32, data: usize) -> Vec<u8> {
        let mut wav = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0".to_vec();
        wav.extend(16_000_u32.to_le_bytes());
        wav.extend(rate.to_le_bytes());
        wav.extend(b"\x02\0\x10\0data\0\0\0\0");
        wav.resize(wav.len() + data, 0);
        wav
    }

    #[test]
    fn sound_is_as_long_as_its_header_and_its_bytes_say() {
        for (bytes, expected) in [
            (wav(32_000, 320_000), 11),
            (wav(48_000, 48_000 * 60), 61),
            // A header cannot hide an hour of sound.
            (wav(u32::MAX, 1_000_000), 1),
            (wav(0, 1_000_000), 501),
            (wav(1, 1_000_000), 501),
            (vec![0; 20_000], 10),
            (b"RIFF".to_vec(), 1),
            (vec![], 0),
        ] {
            assert_eq!(seconds(&bytes), expected);
        }
    }
}
