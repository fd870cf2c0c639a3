//! RFC 6962 Merkle trees over SHA-256, that only grow.
//!
//! Promises: a `Tree` needs no more than its frontier to go on, so that a writer which has lost everything can extend a
//! log from 64 hashes at most. Refuses: hashing anything but the bytes it is given; what a leaf means is the caller's.

use sha2::{Digest, Sha256};

/// A node or root of a tree.
pub type Hash = [u8; 32];

/// RFC 6962 prefix of leaves: a leaf can never pass for a node.
const LEAF: u8 = 0;
/// RFC 6962 prefix of inner nodes.
const NODE: u8 = 1;

/// The leaf of a record, over the record's bytes as they are stored.
pub fn leaf_hash(record: &[u8]) -> Hash {
    Sha256::new().chain_update([LEAF]).chain_update(record).finalize().into()
}

/// The parent of two nodes.
fn node_hash(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([NODE]).chain_update(left).chain_update(right).finalize().into()
}

/// A frontier that no tree of that size has.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a tree of {size} leaves has a frontier of {expected} hashes, found {found}")]
pub struct FrontierError {
    /// The size that was named.
    pub size: u64,
    /// One hash for each bit that is set in the size.
    pub expected: u32,
    /// The hashes that were given.
    pub found: usize,
}

/// A tree, as its size and the roots of the perfect subtrees that make it up, left to right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    size: u64,
    frontier: Vec<Hash>,
}

impl Tree {
    /// The empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// The tree of that size and frontier.
    ///
    /// # Errors
    /// If the frontier has not one hash for each bit set in the size.
    pub fn from_frontier(size: u64, frontier: Vec<Hash>) -> Result<Self, FrontierError> {
        let expected = size.count_ones();
        if usize::try_from(expected).is_ok_and(|n| n == frontier.len()) {
            Ok(Self { size, frontier })
        } else {
            Err(FrontierError { size, expected, found: frontier.len() })
        }
    }

    /// Adds a leaf, as [`leaf_hash`] gave it.
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

    /// Leaves in the tree.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The RFC 6962 root; SHA-256 of nothing for the empty tree.
    pub fn root(&self) -> Hash {
        let mut subtrees = self.frontier.iter().rev();
        match subtrees.next() {
            None => Sha256::digest([]).into(),
            Some(last) => subtrees.fold(*last, |right, left| node_hash(left, &right)),
        }
    }

    /// Roots of the perfect subtrees, left to right: what [`Tree::from_frontier`] takes.
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

/// The root over these leaves.
pub fn root_of(leaves: &[Hash]) -> Hash {
    leaves.iter().copied().collect::<Tree>().root()
}

/// The hashes that lead from leaf `index` to the root over `leaves`, nearest first (RFC 6962, 2.1.1). `None` if there is
/// no such leaf.
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

/// Whether `proof` leads from this leaf at `index` to `root`, in a tree of `size` leaves.
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
