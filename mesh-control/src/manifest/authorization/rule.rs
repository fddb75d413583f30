//! A rule: sources, operations and conditions, each of which must hold where it is given.

use serde::Deserialize;

use super::{Account, Block, Condition, Pattern, Port};
use crate::manifest::{check::Checks, value::nullable};

/// Without anything in it, it matches every connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Rule {
    from: Option<Vec<From>>,
    to: Option<Vec<To>>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) when: Vec<Condition>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct From {
    #[serde(deserialize_with = "nullable")]
    source: Source,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct To {
    #[serde(deserialize_with = "nullable")]
    operation: Operation,
}

/// Declares a struct of lists, of which some are for HTTP proxies only.
macro_rules! lists {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty,)* } http { $($http:ident = $wire:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
        pub(crate) struct $name {
            $(#[serde(deserialize_with = "nullable")] pub(crate) $field: Vec<$kind>,)*
            $(#[serde(deserialize_with = "nullable")] $http: Vec<Pattern>,)*
        }

        impl $name {
            /// The fields in use that only an HTTP proxy can judge.
            fn http(&self) -> impl Iterator<Item = &str> {
                [$((!self.$http.is_empty()).then_some($wire),)*].into_iter().flatten()
            }
        }
    };
}

lists! {
    /// Whom a connection comes from: all fields that are given must hold, each by one of its values.
    Source {
        principals: Pattern,
        not_principals: Pattern,
        namespaces: Pattern,
        not_namespaces: Pattern,
        ip_blocks: Block,
        not_ip_blocks: Block,
        service_accounts: Account,
        not_service_accounts: Account,
    } http {
        request_principals = "requestPrincipals",
        not_request_principals = "notRequestPrincipals",
        remote_ip_blocks = "remoteIpBlocks",
        not_remote_ip_blocks = "notRemoteIpBlocks",
        trust_domains = "trustDomains",
        not_trust_domains = "notTrustDomains",
    }
}

lists! {
    /// What it is for.
    Operation { ports: Port, not_ports: Port, } http {
        hosts = "hosts",
        not_hosts = "notHosts",
        methods = "methods",
        not_methods = "notMethods",
        paths = "paths",
        not_paths = "notPaths",
    }
}

impl Rule {
    pub(crate) fn sources(&self) -> impl Iterator<Item = &Source> {
        self.from.iter().flatten().map(|from| &from.source)
    }

    pub(crate) fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.to.iter().flatten().map(|to| &to.operation)
    }

    /// What in it only an HTTP proxy can judge.
    pub(crate) fn http(&self) -> Vec<&str> {
        let sources = self.sources().flat_map(Source::http);
        let operations = self.operations().flat_map(Operation::http);
        let conditions = self.when.iter().filter_map(Condition::http);
        sources.chain(operations).chain(conditions).collect()
    }

    /// Istio refuses empty lists and members, too: read as "nothing", they would match nobody, and as "any", everybody.
    pub(super) fn check(&self, at: &str, checks: &mut Checks) {
        const EMPTY: &str = "is empty: leave it out, or say what is meant";
        if self.from.as_ref().is_some_and(Vec::is_empty) {
            checks.refuse(format!("{at}.from"), EMPTY);
        }
        if self.to.as_ref().is_some_and(Vec::is_empty) {
            checks.refuse(format!("{at}.to"), EMPTY);
        }
        for (i, source) in self.sources().enumerate() {
            let field = format!("{at}.from[{i}].source");
            checks.require(*source != Source::default(), &field, EMPTY);
            let accounts = source.service_accounts.len() + source.not_service_accounts.len();
            let others = source.principals.len()
                + source.not_principals.len()
                + source.namespaces.len()
                + source.not_namespaces.len();
            let reason = "cannot stand beside principals or namespaces";
            checks.require(accounts == 0 || others == 0, format!("{field}.serviceAccounts"), reason);
            for (name, patterns) in
                [("principals", &source.principals), ("notPrincipals", &source.not_principals)]
            {
                for (i, pattern) in patterns.iter().enumerate().filter(|(_, p)| p.names_scheme()) {
                    let reason =
                        format!("{pattern} matches nobody: principals are written without spiffe://");
                    checks.note(format!("{field}.{name}[{i}]"), reason);
                }
            }
        }
        for (i, operation) in self.operations().enumerate() {
            checks.require(*operation != Operation::default(), format!("{at}.to[{i}].operation"), EMPTY);
        }
    }
}
