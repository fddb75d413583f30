//! Numbers that stand for policies in verdicts.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::NOT_ARRIVED;

/// How many policies that are gone can still be named: what the kernel says of them comes late.
const REMEMBERED: usize = 1024;

/// Each content of each policy has its own number, so that what an older one decided is not told of a newer one.
#[derive(Debug)]
pub(super) struct Numbers {
    last: u32,
    names: HashMap<u32, Arc<str>>,
    retired: VecDeque<u32>,
}

impl Numbers {
    /// The number of [`NOT_ARRIVED`].
    pub(super) const NOT_ARRIVED: u32 = 1;

    pub(super) fn new() -> Self {
        let names = HashMap::from([(Self::NOT_ARRIVED, NOT_ARRIVED.into())]);
        Self { last: Self::NOT_ARRIVED, names, retired: VecDeque::new() }
    }

    /// From now on only numbers above `number`, which an agent before this one used.
    pub(super) fn skip(&mut self, number: u32) {
        self.last = self.last.max(number);
    }

    pub(super) fn give(&mut self, name: &Arc<str>) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1).max(Self::NOT_ARRIVED + 1);
            if !self.names.contains_key(&self.last) {
                self.names.insert(self.last, Arc::clone(name));
                return self.last;
            }
        }
    }

    /// The number will not stand in new verdicts.
    pub(super) fn retire(&mut self, number: u32) {
        self.retired.push_back(number);
        if self.retired.len() > REMEMBERED {
            self.retired.pop_front().and_then(|oldest| self.names.remove(&oldest));
        }
    }

    pub(super) fn name(&self, number: u32) -> Option<&Arc<str>> {
        self.names.get(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_not_given_again_while_it_can_be_told() {
        let mut numbers = Numbers::new();
        let first = numbers.give(&"a/b".into());
        numbers.retire(first);
        let next = numbers.give(&"c/d".into());
        assert_ne!(first, next);
        assert_eq!(numbers.name(first).map(|name| &**name), Some("a/b"));
        for _ in 0..REMEMBERED {
            let number = numbers.give(&"e/f".into());
            numbers.retire(number);
        }
        assert_eq!(numbers.name(first), None);
        assert_eq!(numbers.names.len(), REMEMBERED + 2);
    }

    #[test]
    fn numbers_go_on_after_those_of_an_agent_before() {
        let mut numbers = Numbers::new();
        numbers.skip(700);
        assert_eq!(numbers.give(&"a/b".into()), 701);
        numbers.skip(u32::MAX);
        assert_eq!(numbers.give(&"a/b".into()), 2, "the first is never given");
        assert_eq!(numbers.name(1).map(|name| &**name), Some(NOT_ARRIVED));
    }
}
