use std::collections::HashMap;
use std::net::IpAddr;

use super::super::sample::{Dice, block, policy};
use super::super::{Action, Attempt, Block, Match, Policy, SourceIp, evaluate};
use super::*;

#[test]
fn what_enforced_policies_name_is_listed_in_both_forms() {
    let named = Match {
        destination_ports: [80].into(),
        not_destination_ports: [443].into(),
        source_ips: [block("10.0.0.0/8")].into(),
        not_source_ips: [block("10.1.0.0/16")].into(),
        ..Match::default()
    };
    let rehearsed = Policy {
        dry_run: true,
        ..policy(
            Action::Deny,
            &[Match {
                destination_ports: [9].into(),
                destination_ips: [block("10.0.0.1/32")].into(),
                ..Match::default()
            }],
        )
    };
    let mentions = Mentions::of([policy(Action::Allow, &[named]), rehearsed].iter());
    assert_eq!(mentions.ports, [80, 443].into());
    assert_eq!(mentions.source_blocks, [block("10.0.0.0/8"), block("10.1.0.0/16")].into());
    assert!(mentions.source_ips() && !mentions.destination_ips);
    let not = Match { not_destination_ips: [block("10.0.0.1/32")].into(), ..Match::default() };
    assert!(Mentions::of([policy(Action::Deny, &[not])].iter()).destination_ips);
}

#[test]
fn there_may_be_no_other_port() {
    let mut mentions = Mentions { ports: (1..=u16::MAX).collect(), ..Mentions::default() };
    assert_eq!(mentions.other_port(), None);
    mentions.ports.remove(&77);
    assert_eq!(mentions.other_port(), Some(77));
}

/// All outcomes for one source without an identity, by port (0: any other) and block.
fn table(policies: &[Policy], attempt: &Attempt<'_>) -> HashMap<(u16, Block), bool> {
    let mentions = Mentions::of(policies.iter());
    let mut table = HashMap::new();
    let other = mentions.other_port().map(|port| (0, port));
    for (key, port) in mentions.ports.iter().map(|port| (*port, *port)).chain(other) {
        for block in mentions.source_blocks.iter().chain(&[Block::V4, Block::V6]) {
            let attempt = Attempt { source_ip: SourceIp::Block(*block), port, ..*attempt };
            table.insert((key, *block), evaluate(policies.iter(), &attempt).allows());
        }
    }
    table
}

fn look_up(table: &HashMap<(u16, Block), bool>, port: u16, source: IpAddr) -> bool {
    let key = if table.keys().any(|(known, _)| *known == port) { port } else { 0 };
    let blocks = table.iter().filter(|((port, block), _)| *port == key && block.contains(source));
    *blocks.max_by_key(|((_, block), _)| block.length()).unwrap().1
}

#[test]
fn a_table_says_what_evaluation_says() {
    let (mut allowed, mut denied, mut by_block) = (0, 0, 0);
    for seed in 0..2_000 {
        let mut dice = Dice(seed);
        let policies = dice.policies();
        for _ in 0..20 {
            let attempt = dice.attempt();
            let SourceIp::One(source) = attempt.source_ip else { panic!("a block") };
            let direct = evaluate(policies.iter(), &attempt).allows();
            let table = table(&policies, &attempt);
            assert_eq!(look_up(&table, attempt.port, source), direct, "{seed}: {attempt:?} {policies:#?}");
            *(if direct { &mut allowed } else { &mut denied }) += 1;
            let at_port: Vec<bool> = table.values().copied().collect();
            by_block += u32::from(at_port.iter().any(|one| *one != at_port[0]));
        }
    }
    // The dice must not make the claim empty.
    assert!(allowed > 4_000 && denied > 4_000 && by_block > 1_000, "{allowed} {denied} {by_block}");
}
