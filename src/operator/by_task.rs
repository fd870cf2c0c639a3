//! What a watch shows of the objects of each task, by the UID of the task.
//!
//! Guarantees: a list takes the place of what was there once it is complete. A task without objects takes no memory.
//!
//! Non-goals: whole objects, which the stores have; locks.

use std::collections::{BTreeMap, HashMap};

use kube::runtime::watcher;

type Index<K, V> = HashMap<String, BTreeMap<K, V>>;

/// What an object says: the UID of its task, its key, and its value, or `None` if the index does not have such an object.
pub(super) type Entry<K, V> = (String, K, Option<V>);

/// The values of each task's objects.
pub(super) struct ByTask<K, V> {
    pub(super) by_task: Index<K, V>,
    /// The objects of a list that is not complete yet.
    arriving: Index<K, V>,
}

impl<K, V> Default for ByTask<K, V> {
    fn default() -> Self {
        Self { by_task: HashMap::new(), arriving: HashMap::new() }
    }
}

impl<K: Clone + Ord, V: Clone> ByTask<K, V> {
    /// Returns the values of the task with this UID.
    pub(super) fn of(&self, task_uid: &str) -> BTreeMap<K, V> {
        self.by_task.get(task_uid).cloned().unwrap_or_default()
    }

    /// Applies what an object says, outside of a list.
    pub(super) fn set(&mut self, entry: Entry<K, V>) {
        set(&mut self.by_task, entry);
    }

    /// Applies an event of the watch, as a store does. `entry` returns what an object says.
    pub(super) fn follow<O>(&mut self, event: &watcher::Event<O>, entry: impl Fn(&O) -> Option<Entry<K, V>>) {
        match event {
            watcher::Event::Init => self.arriving.clear(),
            watcher::Event::InitApply(object) => entry(object).into_iter().for_each(|one| set(&mut self.arriving, one)),
            watcher::Event::InitDone => self.by_task = std::mem::take(&mut self.arriving),
            watcher::Event::Apply(object) => entry(object).into_iter().for_each(|one| self.set(one)),
            watcher::Event::Delete(object) => {
                entry(object).into_iter().for_each(|(task, key, _)| self.set((task, key, None)));
            }
        }
    }
}

fn set<K: Ord, V>(index: &mut Index<K, V>, (task, key, value): Entry<K, V>) {
    if let Some(value) = value {
        index.entry(task).or_default().insert(key, value);
    } else if let Some(values) = index.get_mut(&task) {
        values.remove(&key);
        if values.is_empty() {
            index.remove(&task);
        }
    }
}
