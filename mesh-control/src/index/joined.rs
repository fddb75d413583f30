//! Which workloads peers reach through the node proxies: those on nodes whose agent has joined, unless they opt out.

use std::{collections::BTreeMap, sync::Arc};

use super::Index;
use crate::manifest::{Labels, Meta};

/// Label of pods, entries and namespaces; `none` keeps them out of the mesh.
const MODE: &str = "istio.io/dataplane-mode";

/// Nodes whose agent has joined; true where a Node resource was known since, which then stands for the node.
pub(crate) type Joined = BTreeMap<Arc<str>, bool>;

impl Index {
    /// An agent joins for a node; false if one had already.
    pub(crate) fn join(&mut self, node: &str) -> bool {
        if self.inputs.joined.contains_key(node) {
            return false;
        }
        let listed = self.inputs.nodes.contains_key(node);
        self.inputs.joined.insert(node.into(), listed);
        self.mark_placed(node);
        true
    }

    /// The node's agent is gone for good; false if none had joined.
    pub(crate) fn forget(&mut self, node: &str) -> bool {
        let joined = self.inputs.joined.remove(node).is_some();
        if joined {
            self.mark_placed(node);
        }
        joined
    }

    /// What is remembered from before a restart; to be called once, before the first objects.
    pub(crate) fn remember(&mut self, joined: Joined) {
        self.inputs.joined = joined;
    }

    /// Forgets nodes whose resource was deleted while nobody looked.
    pub(crate) fn forget_deleted(&mut self) {
        let gone = self
            .inputs
            .joined
            .iter()
            .filter(|(name, listed)| **listed && !self.inputs.nodes.contains_key(*name));
        let gone: Vec<_> = gone.map(|(name, _)| Arc::clone(name)).collect();
        for name in gone {
            self.forget(&name);
        }
    }

    pub(crate) fn joined(&self) -> &Joined {
        &self.inputs.joined
    }

    /// A Node resource is there, or was deleted.
    pub(super) fn note_node(&mut self, name: &str, present: bool) {
        if !present {
            self.forget(name);
        } else if let Some(listed) = self.inputs.joined.get_mut(name) {
            *listed = true;
        }
    }

    pub(super) fn take_namespace(&mut self, name: &Arc<str>, meta: Option<&Meta>) {
        let out = meta.is_some_and(|meta| meta.labels.get(MODE).is_some_and(|mode| mode == "none"));
        let changed =
            if out { self.inputs.outside.insert(Arc::clone(name)) } else { self.inputs.outside.remove(name) };
        if changed {
            self.inputs
                .selection
                .inside(Some(name))
                .into_iter()
                .for_each(|origin| self.workloads.push(origin));
        }
    }

    /// Its own label decides, else that of its namespace.
    pub(super) fn is_meshed(&self, node: &str, namespace: &str, labels: &Labels) -> bool {
        let out = match labels.get(MODE) {
            Some(mode) => mode == "none",
            None => self.inputs.outside.contains(namespace),
        };
        !out && self.inputs.joined.contains_key(node)
    }
}
