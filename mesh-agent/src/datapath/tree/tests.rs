use super::*;

fn slots(range: std::ops::Range<u32>) -> Vec<Slot> {
    range.map(|backend| (backend, 1)).collect()
}

fn grown(tree: &Tree, leaves: Vec<Vec<Slot>>, free: &mut std::ops::Range<u32>) -> (Tree, Growth) {
    tree.next(leaves, Header::default(), || free.next()).expect("enough pages")
}

#[test]
fn entries_that_stay_keep_their_leaf() {
    let mut free = 0..100;
    let (tree, _) = grown(&Tree::default(), Tree::default().rearranged(&slots(0..130)), &mut free);
    let mut fewer = slots(0..130);
    fewer.remove(70);
    fewer.push((500, 1));
    let (next, growth) = grown(&tree, tree.rearranged(&fewer), &mut free);
    assert_eq!(next.leaves[0], tree.leaves[0]);
    assert_eq!(next.leaves[2], tree.leaves[2]);
    assert!(next.leaves[1].slots.contains(&(500, 1)), "the gap is filled");
    assert_eq!(growth.writes.len(), 2, "the leaf and the root");
    assert_eq!(growth.released, [tree.leaves[1].page, tree.root]);
}

#[test]
fn one_page_is_its_root() {
    let mut free = 0..100;
    let (tree, growth) = grown(&Tree::default(), Tree::default().rearranged(&slots(0..64)), &mut free);
    assert_eq!((tree.leaves.len(), growth.writes.len()), (0, 1));
    assert_eq!(tree.pages().collect::<Vec<_>>(), [tree.root]);
    let (next, growth) = grown(&tree, tree.rearranged(&slots(0..65)), &mut free);
    assert_eq!((next.leaves.len(), growth.writes.len()), (2, 3));
    assert_eq!(growth.released, [tree.root]);
}

#[test]
fn without_pages_nothing_happens() {
    let leaves = Tree::default().rearranged(&slots(0..130));
    assert!(Tree::default().next(leaves, Header::default(), || None).is_none());
}

#[test]
fn an_emptied_leaf_is_replaced_by_the_last() {
    let mut free = 0..100;
    let (tree, _) = grown(&Tree::default(), Tree::default().rearranged(&slots(0..192)), &mut free);
    let kept: Vec<Slot> = slots(64..192);
    let (next, _) = grown(&tree, tree.rearranged(&kept), &mut free);
    assert_eq!(next.leaves.len(), 2);
    assert_eq!(next.leaves[1], tree.leaves[1], "the leaf between stays where it is");
    assert_eq!(next.leaves.iter().map(|leaf| leaf.slots.len()).sum::<usize>(), 128);
}

#[test]
fn the_third_level_begins_beyond_4096() {
    let mut free = 0..1000;
    let (tree, growth) = grown(&Tree::default(), Tree::default().rearranged(&slots(0..4_097)), &mut free);
    assert_eq!((tree.leaves.len(), tree.middle.len()), (65, 2));
    assert_eq!(
        growth.writes.last().map(|(page, content)| (*page, content.header.depth)),
        Some((tree.root, 3))
    );
}
