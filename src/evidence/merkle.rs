//! Append-only RFC 6962 Merkle trees over SHA-256.
//!
//! Guarantees: a `Tree` needs only its frontier to grow. So a writer that has lost everything else can extend a log from at most 64 hashes.
//! Non-goals: the meaning of leaves. A tree hashes the bytes that it is given.

use sha2::{Digest, Sha256};

/// A node or root of a tree.
pub type Hash = [u8; 32];

/// The RFC 6962 prefix of leaves, with which a leaf can never pass for a node.
const LEAF: u8 = 0;
/// The RFC 6962 prefix of inner nodes.
const NODE: u8 = 1;

/// Returns the leaf of a record, over the record's bytes as they are stored.
pub fn leaf_hash(record: &[u8]) -> Hash {
    Sha256::new().chain_update([LEAF]).chain_update(record).finalize().into()
}

/// Returns the parent of two nodes.
fn node_hash(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([NODE]).chain_update(left).chain_update(right).finalize().into()
}

/// A frontier that does not fit the size of its tree.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a tree of {size} leaves has a frontier of {expected} hashes, found {found}")]
pub struct FrontierError {
    /// The given size.
    pub size: u64,
    /// The expected number of hashes: one for each bit that is set in the size.
    pub expected: u32,
    /// The number of given hashes.
    pub found: usize,
}

/// A tree: its size, and the roots of the perfect subtrees that it consists of, left to right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    size: u64,
    frontier: Vec<Hash>,
}

impl Tree {
    /// Returns the empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the tree with this size and frontier.
    ///
    /// # Errors
    /// Returns an error if the frontier does not have one hash for each bit that is set in the size.
    pub fn from_frontier(size: u64, frontier: Vec<Hash>) -> Result<Self, FrontierError> {
        let expected = size.count_ones();
        if usize::try_from(expected).is_ok_and(|n| n == frontier.len()) {
            Ok(Self { size, frontier })
        } else {
            Err(FrontierError { size, expected, found: frontier.len() })
        }
    }

    /// Adds a leaf that [`leaf_hash`] returned.
    pub fn push(&mut self, leaf: Hash) {
        let mut root = leaf;
        // The size's trailing ones are the perfect subtrees that this leaf completes, smallest last.
        for _ in 0..self.size.trailing_ones() {
            if let Some(left) = self.frontier.pop() {
                root = node_hash(&left, &root);
            }
        }
        self.frontier.push(root);
        self.size = self.size.saturating_add(1);
    }

    /// Returns the number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the RFC 6962 root. That of the empty tree is the SHA-256 of nothing.
    pub fn root(&self) -> Hash {
        let mut subtrees = self.frontier.iter().rev();
        match subtrees.next() {
            None => Sha256::digest([]).into(),
            Some(last) => subtrees.fold(*last, |right, left| node_hash(left, &right)),
        }
    }

    /// Returns the roots of the perfect subtrees, left to right, as [`Tree::from_frontier`] takes them.
    pub fn frontier(&self) -> &[Hash] {
        &self.frontier
    }
}

impl FromIterator<Hash> for Tree {
    fn from_iter<I: IntoIterator<Item = Hash>>(leaves: I) -> Self {
        let mut tree = Self::new();
        leaves.into_iter().for_each(|leaf| tree.push(leaf));
        tree
    }
}

/// Returns the root over these leaves.
pub fn root_of(leaves: &[Hash]) -> Hash {
    leaves.iter().copied().collect::<Tree>().root()
}

/// Returns the hashes that lead from leaf `index` to the root over `leaves`, nearest first (RFC 6962, 2.1.1). `None` if there is no such
/// leaf.
pub fn inclusion_proof(leaves: &[Hash], index: usize) -> Option<Vec<Hash>> {
    if index >= leaves.len() {
        return None;
    }
    let (mut rest, mut index, mut path) = (leaves, index, Vec::new());
    while rest.len() > 1 {
        let (left, right) = rest.split_at_checked(rest.len().next_power_of_two() / 2)?;
        if let Some(inner) = index.checked_sub(left.len()) {
            path.push(root_of(left));
            (rest, index) = (right, inner);
        } else {
            path.push(root_of(right));
            rest = left;
        }
    }
    path.reverse();
    Some(path)
}

/// Checks whether `proof` leads from this leaf at `index` to `root`, in a tree of `size` leaves.
pub fn verify_inclusion(leaf: Hash, index: u64, size: u64, proof: &[Hash], root: &Hash) -> bool {
    if index >= size {
        return false;
    }
    let (mut node, mut index, mut last) = (leaf, index, size - 1);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if index % 2 == 1 || index == last {
            node = node_hash(sibling, &node);
            // A right-most node without a sibling at this height moves up until it has one.
            while index.is_multiple_of(2) && index != 0 {
                index /= 2;
                last /= 2;
            }
        } else {
            node = node_hash(&node, sibling);
        }
        index /= 2;
        last /= 2;
    }
    last == 0 && node == *root
}

#[cfg(test)]
mod tests;
