//! How the proxy ends: first it takes nothing new, then what is left is reset.

use tokio::sync::watch;

/// What the listeners of a pod do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// They serve.
    Serving,
    /// They take nothing new, and tell peers so; what is open goes on.
    Draining,
    /// What is open is reset.
    Over,
}

/// Who sees the phase. A pod that has gone, its sender dropped, is over.
#[derive(Debug, Clone)]
pub struct Drain(watch::Receiver<Phase>);

impl Drain {
    /// Serving, until the sender says otherwise.
    pub fn new() -> (watch::Sender<Phase>, Self) {
        let (sender, receiver) = watch::channel(Phase::Serving);
        (sender, Self(receiver))
    }

    /// Whether nothing new is taken.
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining || self.0.has_changed().is_err()
    }

    /// Waits until `phase`, or a later one. May be dropped and called again.
    pub async fn reached(&mut self, phase: Phase) {
        // An error says that the sender has gone.
        drop(self.0.wait_for(|now| *now >= phase).await.map(drop));
    }
}
