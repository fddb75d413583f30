//! Policies for tests: made by hand, and at random from a seed.

use std::net::IpAddr;

use super::{Account, Action, Attempt, Block, Clause, Match, Policy, Principal, Rule, Scope, SourceIp, Text};

/// A policy of one rule of one clause of these matches.
pub(super) fn policy(action: Action, matches: &[Match]) -> Policy {
    let clauses = [Clause { matches: matches.into() }];
    of_rules(action, &[Rule { clauses: clauses.into() }])
}

/// A policy of these rules.
pub(super) fn of_rules(action: Action, rules: &[Rule]) -> Policy {
    Policy {
        namespace: "shop".into(),
        name: "one".into(),
        scope: Scope::Namespace,
        action,
        dry_run: false,
        http: false,
        rules: rules.into(),
    }
}

/// `ADDRESS/LENGTH`.
pub(super) fn block(text: &str) -> Block {
    let (address, length) = text.split_once('/').unwrap();
    Block::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
}

/// A small generator of numbers (splitmix64), so that a failure comes back with its seed.
pub(super) struct Dice(pub(super) u64);

const TEXTS: [&str; 4] = ["a", "b", "cluster.local/ns/a/sa/x", "cluster.local/ns/b"];
const NAMES: [&str; 3] = ["a", "b", "c"];
const BLOCKS: [&str; 9] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.1.0/24",
    "10.1.1.1/32",
    "::/0",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "2001:db8:1::7/128",
];
const ADDRESSES: [&str; 9] = [
    "10.1.1.1",
    "10.1.1.2",
    "10.1.2.1",
    "10.2.0.1",
    "11.0.0.1",
    "2001:db8:1::7",
    "2001:db8:1::8",
    "2001:db8:2::7",
    "2001:db9::7",
];
const PORTS: [u16; 3] = [80, 443, 9000];

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    fn list<T>(&mut self, most: usize, mut one: impl FnMut(&mut Self) -> T) -> Box<[T]> {
        (0..self.below(most + 1)).map(|_| one(self)).collect()
    }

    /// Mostly empty: a match that says everything holds for nothing.
    fn rare<T>(&mut self, one: impl FnMut(&mut Self) -> T) -> Box<[T]> {
        if self.below(4) == 0 { self.list(2, one) } else { Box::default() }
    }

    fn text(&mut self) -> Text {
        let text = self.of(&TEXTS).into();
        match self.below(4) {
            0 => Text::Exact(text),
            1 => Text::Prefix(text),
            2 => Text::Suffix(text),
            _ => Text::Present,
        }
    }

    fn account(&mut self) -> Account {
        Account { namespace: self.of(&NAMES).into(), name: "x".into() }
    }

    fn one_match(&mut self) -> Match {
        let block = |dice: &mut Self| block(dice.of(&BLOCKS));
        let port = |dice: &mut Self| dice.of(&PORTS);
        Match {
            namespaces: self.rare(Self::text),
            not_namespaces: self.rare(Self::text),
            principals: self.rare(Self::text),
            not_principals: self.rare(Self::text),
            source_ips: self.rare(block),
            not_source_ips: self.rare(block),
            destination_ips: self.rare(block),
            not_destination_ips: self.rare(block),
            destination_ports: self.rare(port),
            not_destination_ports: self.rare(port),
            service_accounts: self.rare(Self::account),
            not_service_accounts: self.rare(Self::account),
        }
    }

    /// Some policies, of which some are of a dry run.
    pub(super) fn policies(&mut self) -> Vec<Policy> {
        let clause = |dice: &mut Self| Clause { matches: dice.list(2, Self::one_match) };
        let rule = |dice: &mut Self| Rule { clauses: dice.list(2, clause) };
        let one = |dice: &mut Self| Policy {
            dry_run: dice.below(6) == 0,
            ..of_rules(dice.of(&[Action::Allow, Action::Deny]), &dice.list(2, rule))
        };
        self.list(3, one).into()
    }

    /// An address that the policies may or may not mention.
    pub(super) fn address(&mut self) -> IpAddr {
        self.of(&ADDRESSES).parse().unwrap()
    }

    /// A connection.
    pub(super) fn attempt(&mut self) -> Attempt<'static> {
        let source = (self.below(3) > 0).then(|| Principal {
            trust_domain: self.of(&["cluster.local", "other"]),
            namespace: self.of(&NAMES),
            service_account: self.of(&["x", "y"]),
        });
        Attempt {
            source,
            source_ip: SourceIp::One(self.address()),
            destination_ip: self.address(),
            port: self.of(&[80, 443, 9000, 1, 65535]),
        }
    }
}
