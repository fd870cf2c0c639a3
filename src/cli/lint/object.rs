//! The objects of Belay's kinds that files hold.
//!
//! Guarantees: an object that cannot be read is still known by its kind, namespace and name.
//!
//! Non-goals: checks.

use super::document::Node;
use crate::api::{AgentTask, PolicyPack, ToolContract};

/// A document, or an item of a list.
pub(super) struct Entry<'n> {
    pub(super) file: usize,
    pub(super) node: &'n Node,
    pub(super) prefix: String,
}

/// An object of one of Belay's kinds.
pub(super) struct Object<'n> {
    pub(super) entry: Entry<'n>,
    pub(super) kind: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) typed: Option<Typed>,
}

/// An object of the type of its kind.
pub(super) enum Typed {
    Task(Box<AgentTask>),
    Contract(Box<ToolContract>),
    Pack(Box<PolicyPack>),
}

/// The typed kinds, to select objects by their type.
pub(super) trait Kinded: Sized {
    fn of(typed: &Typed) -> Option<&Self>;
}
impl Kinded for AgentTask {
    fn of(typed: &Typed) -> Option<&Self> {
        if let Typed::Task(task) = typed { Some(task) } else { None }
    }
}
impl Kinded for ToolContract {
    fn of(typed: &Typed) -> Option<&Self> {
        if let Typed::Contract(contract) = typed { Some(contract) } else { None }
    }
}
impl Kinded for PolicyPack {
    fn of(typed: &Typed) -> Option<&Self> {
        if let Typed::Pack(pack) = typed { Some(pack) } else { None }
    }
}

/// Returns the objects of one type.
pub(super) fn typed<'o, 'n, T: Kinded>(objects: &'o [Object<'n>]) -> Vec<(&'o Object<'n>, &'o T)> {
    objects.iter().filter_map(|object| Some((object, T::of(object.typed.as_ref()?)?))).collect()
}
