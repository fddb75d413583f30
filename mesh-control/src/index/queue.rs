//! What is to be computed again: in order, and each only once.

use std::{
    collections::{HashSet, VecDeque},
    hash::Hash,
};

#[derive(Debug)]
pub(super) struct Queue<T> {
    order: VecDeque<T>,
    waiting: HashSet<T>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { order: VecDeque::new(), waiting: HashSet::new() }
    }
}

impl<T: Clone + Eq + Hash> Queue<T> {
    pub(super) fn push(&mut self, item: T) {
        if self.waiting.insert(item.clone()) {
            self.order.push_back(item);
        }
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let item = self.order.pop_front()?;
        self.waiting.remove(&item);
        Some(item)
    }
}
