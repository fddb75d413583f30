//! Whom this node trusts: the roots in force, and word of their change. One writer, many readers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::RootCertStore;
use tokio::sync::watch;

/// The roots of the last answer of the certificate authority.
#[derive(Debug, Default)]
pub struct Trust {
    now: watch::Sender<Roots>,
    /// Of the roots in force, for who only wants to know whether they are those that it knows.
    generation: AtomicU64,
}

/// The roots as they were at a time.
#[derive(Debug, Clone)]
pub struct Roots {
    /// Ready for use.
    pub store: Arc<RootCertStore>,
    /// How many there were before.
    pub generation: u64,
}

impl Default for Roots {
    /// Nobody is trusted before an authority has answered.
    fn default() -> Self {
        Self { store: Arc::new(RootCertStore::empty()), generation: 0 }
    }
}

impl Trust {
    /// Puts other roots in force.
    pub fn set(&self, store: Arc<RootCertStore>) {
        self.now.send_modify(|now| {
            *now = Roots { store, generation: now.generation + 1 };
            // Before anybody is woken: who looks then must not take the former ones for current.
            self.generation.store(now.generation, Ordering::Release);
        });
    }

    /// Those in force.
    pub fn now(&self) -> Roots {
        self.now.borrow().clone()
    }

    /// Of those in force.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Wakes whoever waits when others come into force.
    pub fn changed(&self) -> watch::Receiver<Roots> {
        self.now.subscribe()
    }
}
