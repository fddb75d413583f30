//! A policy that was understood.

use super::Block;

/// What a policy says. The order of its rules is that of the message: denials name them by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Namespace, without a slash.
    pub namespace: Box<str>,
    /// Name within the namespace.
    pub name: Box<str>,
    /// Whom it is for.
    pub scope: Scope,
    /// What it does where it matches.
    pub action: Action,
    /// Never decides; only what it would have done is told.
    pub dry_run: bool,
    /// It had conditions on HTTP, which are not among the rules: what comes without TLS is to go through the node proxy as well.
    pub http: bool,
    /// It matches where one of them does; without any it matches nothing.
    pub rules: Box<[Rule]>,
}

/// Whom a policy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every workload.
    Global,
    /// Every workload of its namespace.
    Namespace,
    /// The workloads that name it.
    Selector,
}

/// What a policy does where it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Lets in. Where such a policy applies, only what one of them matches is let in.
    Allow,
    /// Refuses, whatever else there is.
    Deny,
}

/// All clauses must hold; without any the rule matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// The clauses.
    pub clauses: Box<[Clause]>,
}

/// One of the matches must hold, or there are none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clause {
    /// The matches.
    pub matches: Box<[Match]>,
}

/// Every list that is not empty must hold: one of its values, and none of those of its `not` form. With all of them empty it
/// holds for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// Namespaces of the source.
    pub namespaces: Box<[Text]>,
    /// Namespaces that the source must not be of.
    pub not_namespaces: Box<[Text]>,
    /// Identities of the source, `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
    pub principals: Box<[Text]>,
    /// Identities that the source must not have.
    pub not_principals: Box<[Text]>,
    /// Blocks with the source's address.
    pub source_ips: Box<[Block]>,
    /// Blocks without the source's address.
    pub not_source_ips: Box<[Block]>,
    /// Blocks with the workload's address.
    pub destination_ips: Box<[Block]>,
    /// Blocks without the workload's address.
    pub not_destination_ips: Box<[Block]>,
    /// Ports of the workload.
    pub destination_ports: Box<[u16]>,
    /// Ports of the workload that are not meant.
    pub not_destination_ports: Box<[u16]>,
    /// Service accounts of the source, of whatever trust domain.
    pub service_accounts: Box<[Account]>,
    /// Service accounts that the source must not have.
    pub not_service_accounts: Box<[Account]>,
}

impl Match {
    /// Whether it says nothing, and so holds for nothing.
    pub fn is_empty(&self) -> bool {
        // By name, so that a new field cannot be forgotten here.
        let Self {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
            service_accounts,
            not_service_accounts,
        } = self;
        [namespaces, not_namespaces, principals, not_principals].iter().all(|list| list.is_empty())
            && [source_ips, not_source_ips, destination_ips, not_destination_ips]
                .iter()
                .all(|list| list.is_empty())
            && [destination_ports, not_destination_ports].iter().all(|list| list.is_empty())
            && [service_accounts, not_service_accounts].iter().all(|list| list.is_empty())
    }
}

/// What a text is compared with; never an empty one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// It is this.
    Exact(Box<str>),
    /// It begins so.
    Prefix(Box<str>),
    /// It ends so.
    Suffix(Box<str>),
    /// There is one.
    Present,
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its name.
    pub name: Box<str>,
}
