//! Writes a log in the layout of C2SP tlog-tiles, which any reader or auditor of that format can use.
//!
//! Guarantees: the files of a log follow from its records alone, byte for byte. Each file is returned as soon as nothing changes it any
//! more.
//! Non-goals: storage.

use super::{
    merkle::{Hash, leaf_hash, root_of},
    record::EncodeError,
};

/// The number of hashes in a full tile, and of entries in a full bundle.
const WIDTH: usize = 256;

/// A file of the log: its path and its bytes.
pub type File = (String, Vec<u8>);

/// One level of tiles.
#[derive(Clone, Debug, Default)]
struct Level {
    /// The number of full tiles so far.
    whole: u64,
    /// The hashes of the next tile.
    hashes: Vec<Hash>,
}

/// The tiles that are not full yet.
#[derive(Clone, Debug, Default)]
pub struct Tiles {
    bundle: Vec<u8>,
    levels: Vec<Level>,
}

impl Tiles {
    /// Adds a record. Returns the files that are full with it.
    ///
    /// # Errors
    /// Returns an error if the record is longer than an entry can be.
    pub fn push(&mut self, record: &[u8]) -> Result<Vec<File>, EncodeError> {
        let length = u16::try_from(record.len()).map_err(|_| EncodeError::Long(record.len()))?;
        self.bundle.extend(length.to_be_bytes());
        self.bundle.extend(record);
        let bundles = self.levels.first().map_or(0, |level| level.whole);
        let mut whole = Vec::new();
        self.hash(0, leaf_hash(record), &mut whole);
        if !whole.is_empty() {
            whole.push((format!("tile/entries/{}", number(bundles)), std::mem::take(&mut self.bundle)));
        }
        Ok(whole)
    }

    fn hash(&mut self, at: usize, hash: Hash, whole: &mut Vec<File>) {
        if self.levels.len() <= at {
            self.levels.push(Level::default());
        }
        let Some(level) = self.levels.get_mut(at) else { return };
        level.hashes.push(hash);
        if level.hashes.len() < WIDTH {
            return;
        }
        let hashes = std::mem::take(&mut level.hashes);
        whole.push((format!("tile/{at}/{}", number(level.whole)), hashes.concat()));
        level.whole = level.whole.saturating_add(1);
        self.hash(at.saturating_add(1), root_of(&hashes), whole);
    }

    /// Returns the files that are not full, as they are at the end of the log.
    pub fn finish(self) -> Vec<File> {
        let mut files = Vec::new();
        for (at, level) in self.levels.iter().enumerate().filter(|(_, level)| !level.hashes.is_empty()) {
            let partial = format!("{}.p/{}", number(level.whole), level.hashes.len());
            if at == 0 {
                files.push((format!("tile/entries/{partial}"), self.bundle.clone()));
            }
            files.push((format!("tile/{at}/{partial}"), level.hashes.concat()));
        }
        files
    }
}

/// Returns a tile's number as it is in a path: `x001/x234/067` for 1 234 067.
fn number(of: u64) -> String {
    let (mut path, mut rest) = (format!("{:03}", of % 1000), of / 1000);
    while rest > 0 {
        path = format!("x{:03}/{path}", rest % 1000);
        rest /= 1000;
    }
    path
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::evidence::merkle::Tree;

    fn files(count: u64) -> BTreeMap<String, Vec<u8>> {
        let mut tiles = Tiles::default();
        let mut files: Vec<File> =
            (0..count).flat_map(|n| tiles.push(format!("record {n}").as_bytes()).unwrap()).collect();
        files.extend(tiles.finish());
        let all: BTreeMap<_, _> = files.iter().cloned().collect();
        assert_eq!(all.len(), files.len(), "a file was given twice");
        all
    }

    #[test]
    fn paths_are_those_of_the_specification() {
        assert_eq!(number(0), "000");
        assert_eq!(number(1_234_067), "x001/x234/067");
        let paths = |count| files(count).into_keys().collect::<Vec<_>>();
        assert!(paths(0).is_empty());
        assert_eq!(paths(1), ["tile/0/000.p/1", "tile/entries/000.p/1"]);
        assert_eq!(paths(256), ["tile/0/000", "tile/1/000.p/1", "tile/entries/000"]);
        assert_eq!(
            paths(513),
            [
                "tile/0/000",
                "tile/0/001",
                "tile/0/002.p/1",
                "tile/1/000.p/2",
                "tile/entries/000",
                "tile/entries/001",
                "tile/entries/002.p/1"
            ]
        );
        let large = files(256 * 256 + 1);
        assert_eq!(large["tile/1/000"].len(), 256 * 32);
        assert_eq!(large["tile/2/000.p/1"].len(), 32);
        assert!(!large.contains_key("tile/1/001.p/0"));
    }

    #[test]
    fn an_entry_has_its_length_before_it() {
        assert_eq!(files(2)["tile/entries/000.p/2"], b"\0\x08record 0\0\x08record 1");
        assert!(Tiles::default().push(&[0; 65_535]).is_ok());
        assert!(Tiles::default().push(&[0; 65_536]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// The tree over the hashes of level 0 is the log's tree.
        #[test]
        fn tiles_have_the_hashes_of_the_tree(count in 1..2000_u64) {
            let files = files(count);
            let tree: Tree = (0..count).map(|n| leaf_hash(format!("record {n}").as_bytes())).collect();
            let level = |at: usize| -> Vec<Hash> {
                let start = format!("tile/{at}/");
                let tiles = files.iter().filter(|(path, _)| path.starts_with(&start));
                tiles.flat_map(|(_, bytes)| bytes.chunks(32).map(|hash| hash.try_into().unwrap()).collect::<Vec<_>>()).collect()
            };
            prop_assert_eq!(root_of(&level(0)), tree.root());
            let whole: Vec<Hash> = level(0).chunks_exact(256).map(root_of).collect();
            prop_assert_eq!(level(1), whole);
        }
    }
}
