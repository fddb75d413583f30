//! The descent that the kernel programs make, in trees that no agent would write.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_common::abi::{ENTRIES, Page, descend, maglev_position, random_position, round_robin_position};

fuzz_target!(|input: (Vec<(u8, Vec<(u32, u32)>)>, u64, u32)| {
    let (shapes, client, stride) = input;
    let pages: Vec<Page> = shapes.iter().map(|(depth, entries)| page(*depth, entries)).collect();
    let Some(root) = pages.first() else { return };
    let total = root.header.total;
    let turn = (client >> 32) as u32;
    for position in [
        random_position(turn, total),
        round_robin_position(client, stride, total),
        maglev_position(client, total),
    ] {
        assert!(total == 0 || position < total, "{position} of {total}");
        let found = descend(root, position, |number| pages.get(number as usize));
        let known = |child| pages.iter().flat_map(|page| page.entries).any(|entry| entry.child == child);
        assert!(found.is_none_or(known), "{found:?} is in no page");
    }
});

fn page(depth: u8, entries: &[(u32, u32)]) -> Page {
    let mut page = Page::default();
    page.header.depth = depth;
    for (place, (child, upto)) in page.entries.iter_mut().zip(entries.iter().take(ENTRIES)) {
        place.child = *child;
        place.upto = *upto;
    }
    page.header.total = entries.iter().take(ENTRIES).map(|(_, upto)| *upto).max().unwrap_or(0);
    page
}
