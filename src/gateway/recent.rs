//! Maps of bounded size that keep what was used most recently.
//!
//! Guarantees: a map that is full forgets the entry that was not used for the longest time, and no other.
//!
//! Non-goals: entries that expire; entries that must not be forgotten.

use std::hash::Hash;

use moka::{policy::EvictionPolicy, sync::Cache};

/// Returns a map of at most about `most` entries. Moka removes what is too much soon after an insertion.
pub fn recent<K, V>(most: usize) -> Cache<K, V>
where
    K: Eq + Hash + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    let most = u64::try_from(most).unwrap_or(u64::MAX);
    Cache::builder().max_capacity(most).eviction_policy(EvictionPolicy::lru()).build()
}

/// Inserts a key, and returns whether the map did not have it.
pub fn first<K>(seen: &Cache<K, ()>, key: K) -> bool
where
    K: Eq + Hash + Send + Sync + 'static,
{
    seen.entry(key).or_insert(()).is_fresh()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_is_forgotten_and_not_everything() {
        let map = recent(10);
        for key in 0..10 {
            map.insert(key, ());
        }
        map.run_pending_tasks();
        for key in 0..9 {
            assert!(map.get(&key).is_some(), "{key}");
        }
        map.insert(10, ());
        map.run_pending_tasks();
        let kept: Vec<i32> = (0..=10).filter(|key| map.contains_key(key)).collect();
        assert_eq!(kept, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]);
    }

    #[test]
    fn a_key_is_first_once() {
        let seen = recent(10);
        assert_eq!([1, 1, 2, 1].map(|key| first(&seen, key)), [true, false, true, false]);
    }
}
