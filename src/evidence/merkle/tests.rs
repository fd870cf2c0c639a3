use proptest::prelude::*;

use super::*;

/// RFC 6962, 2.1, word for word: slow and recursive.
fn reference(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => Sha256::digest([]).into(),
        [leaf] => *leaf,
        _ => {
            let mut k = 1;
            while k * 2 < leaves.len() {
                k *= 2;
            }
            let (left, right) = leaves.split_at(k);
            node_hash(&reference(left), &reference(right))
        }
    }
}

fn leaves(n: usize) -> Vec<Hash> {
    (0..n).map(|i| leaf_hash(&i.to_be_bytes())).collect()
}

#[test]
fn roots_of_the_certificate_transparency_test_tree() {
    // Leaves and roots of the reference vectors that the Certificate Transparency implementations share.
    let inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
    let roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ];
    let mut tree = Tree::new();
    assert_eq!(hex::encode(tree.root()), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    for (input, root) in inputs.iter().zip(roots) {
        tree.push(leaf_hash(&hex::decode(input).unwrap()));
        assert_eq!(hex::encode(tree.root()), root, "size {}", tree.size());
    }
}

#[test]
fn every_small_tree_is_the_reference_and_proves_its_leaves() {
    for n in 0..70 {
        let all = leaves(n);
        let root = reference(&all);
        assert_eq!(root_of(&all), root);
        for (i, leaf) in all.iter().enumerate() {
            let proof = inclusion_proof(&all, i).unwrap();
            assert!(verify_inclusion(*leaf, i as u64, n as u64, &proof, &root), "leaf {i} of {n}");
            for j in (0..n).filter(|j| *j != i) {
                assert!(!verify_inclusion(*leaf, j as u64, n as u64, &proof, &root), "leaf {i} of {n} at {j}");
            }
        }
        assert_eq!(inclusion_proof(&all, n), None);
    }
}

#[test]
fn a_frontier_of_the_wrong_length_is_refused() {
    let tree: Tree = leaves(6).into_iter().collect();
    assert_eq!(tree.frontier().len(), 2);
    assert_eq!(Tree::from_frontier(7, tree.frontier().to_vec()), Err(FrontierError { size: 7, expected: 3, found: 2 }));
    assert!(Tree::from_frontier(0, vec![[0; 32]]).is_err());
}

proptest! {
    #[test]
    fn a_tree_goes_on_from_its_frontier(n in 0_usize..600, cut in 0_usize..600) {
        let all = leaves(n);
        let (before, after) = all.split_at(cut.min(n));
        let first: Tree = before.iter().copied().collect();
        let mut resumed = Tree::from_frontier(first.size(), first.frontier().to_vec()).unwrap();
        after.iter().for_each(|leaf| resumed.push(*leaf));
        prop_assert_eq!(resumed.size(), n as u64);
        prop_assert_eq!(resumed.root(), reference(&all));
    }

    #[test]
    fn a_proof_that_was_tampered_with_fails(n in 2_usize..200, at in any::<prop::sample::Index>(), bit in 0_usize..256, step in any::<prop::sample::Index>()) {
        let all = leaves(n);
        let index = at.index(n);
        let mut proof = inclusion_proof(&all, index).unwrap();
        let step = step.index(proof.len());
        proof[step][bit / 8] ^= 1 << (bit % 8);
        prop_assert!(!verify_inclusion(all[index], index as u64, n as u64, &proof, &root_of(&all)));
        let mut long = inclusion_proof(&all, index).unwrap();
        long.push([7; 32]);
        prop_assert!(!verify_inclusion(all[index], index as u64, n as u64, &long, &root_of(&all)));
    }
}
