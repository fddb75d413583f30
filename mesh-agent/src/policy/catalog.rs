//! The policies that are held, and which of them apply to a workload.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use mesh_common::policy::{Policy, Scope};

use crate::snapshot::{Authorization, Content, Reach};

/// Why a connection is let in or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// A rule says so.
    Rule,
    /// No ALLOW policy applies, and no DENY matches.
    NoAllow,
    /// ALLOW policies apply, and none matches.
    NoMatch,
    /// The workload names a policy that has not come.
    Awaited,
    /// A policy that applies is not understood.
    NotUnderstood,
    /// No policies have come at all.
    NotArrived,
}

impl Cause {
    /// Its name in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rule => "rule",
            Self::NoAllow => "no-allow",
            Self::NoMatch => "no-match",
            Self::Awaited => "awaited",
            Self::NotUnderstood => "not-understood",
            Self::NotArrived => "not-arrived",
        }
    }
}

/// A policy and its number.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) number: u32,
    pub(super) authorization: Arc<Authorization>,
}

impl Entry {
    pub(super) fn name(&self) -> &Arc<str> {
        &self.authorization.name
    }

    pub(super) fn policy(&self) -> Option<&Policy> {
        self.authorization.understood()
    }

    fn place(&self) -> Place<'_> {
        let of = |scope, namespace| match scope {
            Scope::Global => Place::Global,
            Scope::Namespace => Place::Namespace(namespace),
            Scope::Selector => Place::Named,
        };
        match &self.authorization.content {
            Content::Understood(policy) => of(policy.scope, &policy.namespace),
            Content::Refused { reach: Reach::Known { scope, namespace }, .. } => of(*scope, namespace),
            Content::Refused { reach: Reach::Unknown { namespace }, .. } => {
                Place::Unknown(namespace.as_deref())
            }
        }
    }
}

/// Whom a policy is for.
enum Place<'a> {
    Global,
    Namespace(&'a str),
    Named,
    Unknown(Option<&'a str>),
}

/// Why nothing can be allowed.
#[derive(Debug)]
pub(super) enum Hindrance<'a> {
    NotArrived,
    NotUnderstood(&'a Arc<Entry>),
    Awaited(&'a Arc<str>),
}

/// Whom a change concerns.
#[derive(Debug, Default)]
pub(super) struct Touched {
    all: bool,
    namespaces: BTreeSet<Box<str>>,
    names: BTreeSet<Arc<str>>,
}

impl Touched {
    pub(super) fn everybody(&mut self) {
        self.all = true;
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.all && self.namespaces.is_empty() && self.names.is_empty()
    }

    pub(super) fn concerns(&self, namespace: &str, named: &[Arc<str>]) -> bool {
        self.all
            || self.namespaces.contains(namespace)
            || (!self.names.is_empty() && named.iter().any(|name| self.names.contains(name)))
    }

    fn add(&mut self, entry: &Entry) {
        // By name in any case: a workload may name what applies to it already, and may have waited for it.
        self.names.insert(Arc::clone(entry.name()));
        match entry.place() {
            Place::Global | Place::Unknown(_) => self.all = true,
            Place::Namespace(namespace) => {
                self.namespaces.insert(namespace.into());
            }
            Place::Named => {}
        }
    }
}

type Sorted = BTreeMap<Arc<str>, Arc<Entry>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    complete: bool,
    entries: HashMap<Arc<str>, Arc<Entry>>,
    global: Sorted,
    by_namespace: HashMap<Box<str>, Sorted>,
    /// Those that are for nobody knows whom.
    unknown: Sorted,
    /// Namespaces in which workloads are known.
    namespaces: HashSet<Arc<str>>,
}

impl Catalog {
    /// All policies have been named once.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(super) fn set_complete(&mut self) {
        self.complete = true;
    }

    pub(super) fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.get(name)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.values()
    }

    /// Puts a policy in the place of the one of its name, which is returned.
    pub(super) fn put(&mut self, entry: Arc<Entry>, touched: &mut Touched) -> Option<Arc<Entry>> {
        let old = self.take(&Arc::clone(entry.name()), touched);
        touched.add(&entry);
        let name = Arc::clone(entry.name());
        match entry.place() {
            Place::Global => self.global.insert(Arc::clone(&name), Arc::clone(&entry)),
            Place::Unknown(_) => self.unknown.insert(Arc::clone(&name), Arc::clone(&entry)),
            Place::Namespace(namespace) => {
                let list = self.by_namespace.entry(namespace.into()).or_default();
                list.insert(Arc::clone(&name), Arc::clone(&entry))
            }
            Place::Named => None,
        };
        self.entries.insert(name, entry);
        old
    }

    pub(super) fn take(&mut self, name: &str, touched: &mut Touched) -> Option<Arc<Entry>> {
        let old = self.entries.remove(name)?;
        touched.add(&old);
        match old.place() {
            Place::Global => drop(self.global.remove(name)),
            Place::Unknown(_) => drop(self.unknown.remove(name)),
            Place::Namespace(namespace) => {
                if let Some(list) = self.by_namespace.get_mut(namespace) {
                    list.remove(name);
                    if list.is_empty() {
                        self.by_namespace.remove(namespace);
                    }
                }
            }
            Place::Named => {}
        }
        Some(old)
    }

    /// Workloads are known in that namespace, or no more. Whether this may change what applies to others.
    pub(super) fn namespace(&mut self, namespace: &Arc<str>, known: bool) -> bool {
        let changed = match known {
            true => self.namespaces.insert(Arc::clone(namespace)),
            false => self.namespaces.remove(namespace),
        };
        changed && !self.unknown.is_empty()
    }

    /// Why nothing can be allowed to reach a workload of that namespace that names these.
    pub(super) fn hindrance<'a>(&'a self, namespace: &str, named: &'a [Arc<str>]) -> Option<Hindrance<'a>> {
        if !self.complete {
            return Some(Hindrance::NotArrived);
        }
        let unknown = self.unknown.values().find(|entry| match entry.place() {
            Place::Unknown(Some(of)) => of == namespace || !self.namespaces.contains(of),
            Place::Unknown(None) | Place::Global | Place::Namespace(_) | Place::Named => true,
        });
        let refused = || self.applicable(namespace, named).find(|entry| entry.policy().is_none());
        if let Some(entry) = unknown.or_else(refused) {
            return Some(Hindrance::NotUnderstood(entry));
        }
        named.iter().find(|name| !self.entries.contains_key(*name)).map(Hindrance::Awaited)
    }

    /// The policies whose scope is known and that apply to such a workload, each once.
    pub(super) fn applicable<'a>(
        &'a self,
        namespace: &str,
        named: &'a [Arc<str>],
    ) -> impl Iterator<Item = &'a Arc<Entry>> + use<'a> {
        let own = self.by_namespace.get(namespace);
        let listed = named.iter().filter_map(|name| self.entries.get(name)).filter(move |entry| {
            let already = own.is_some_and(|own| own.contains_key(entry.name()));
            !already && !self.global.contains_key(entry.name())
        });
        self.global.values().chain(own.into_iter().flat_map(BTreeMap::values)).chain(listed)
    }
}
