//! Buffers that are borrowed for as long as bytes are on their way: an idle connection has none.

use std::cell::RefCell;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::proxy::tls::{HEADER, MAX_PLAINTEXT, OVERHEAD};

/// Room for a record. Full records lie in their slots without a gap, so that one write takes them all.
pub(super) const SLOT: usize = MAX_PLAINTEXT + OVERHEAD;
/// Slots of a large buffer, together what TCP sends in one piece (64 KiB). With more, a write waits within for what paces the tunnel (BBR),
/// and whoever is to go on with what has come gets it late; with fewer, system calls cost more.
const SLOTS: usize = 4;
/// A record that another implementation has padded is so much longer.
const PADDING: usize = 256;
/// Buffers that a thread keeps for the next connection, of each size.
const KEPT: usize = 4;
/// Most pieces in one write: records may be short.
const PIECES: usize = 16;

/// How much a connection moves at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// One record.
    Small,
    /// Four.
    Large,
}

impl Size {
    fn slots(self) -> usize {
        match self {
            Self::Small => 1,
            Self::Large => SLOTS,
        }
    }
}

/// Memory that connections may hold together, of a pod or of a node.
#[derive(Debug)]
pub struct Budget {
    large: AtomicUsize,
    limit: usize,
    early: AtomicUsize,
    early_limit: usize,
    refused: Arc<AtomicU64>,
}

/// So much more, as a divisor of the limit, may hold what applications have said early.
const EARLY: usize = 8;

impl Budget {
    /// At most `bytes` in large buffers. Each connection gets small ones in any case, or it could not end.
    pub fn new(bytes: usize) -> Arc<Self> {
        Self::counting(bytes, Arc::default())
    }

    /// As [`Self::new`]; `refused` is added to when a connection has to do with a small one.
    pub fn counting(bytes: usize, refused: Arc<AtomicU64>) -> Arc<Self> {
        Arc::new(Self {
            large: AtomicUsize::new(0),
            limit: bytes / (SLOT * SLOTS),
            early: AtomicUsize::new(0),
            early_limit: bytes / EARLY,
            refused,
        })
    }

    /// How often a connection had to do with a small buffer.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Bytes in large buffers now, and of what was said early.
    pub fn held(&self) -> usize {
        self.large.load(Ordering::Relaxed) * SLOT * SLOTS + self.early.load(Ordering::Relaxed)
    }

    /// Room for so many bytes that an application says early; none: they wait in its socket.
    pub(in crate::proxy) fn early(self: &Arc<Self>, bytes: usize) -> Option<EarlyRoom> {
        let room = EarlyRoom { budget: Arc::clone(self), bytes };
        if self.early.fetch_add(bytes, Ordering::Relaxed) + bytes > self.early_limit {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(room)
    }

    /// A buffer, of this size if there is room.
    pub(super) fn take(self: &Arc<Self>, size: Size) -> Buffer {
        self.take_for(0, size)
    }

    /// As [`Self::take`], but of the size that so many bytes need in any case.
    pub(super) fn take_for(self: &Arc<Self>, bytes: usize, size: Size) -> Buffer {
        let needed = bytes > SLOT;
        let mut size = if needed { Size::Large } else { size };
        if size == Size::Large && self.large.fetch_add(1, Ordering::Relaxed) >= self.limit && !needed {
            self.large.fetch_sub(1, Ordering::Relaxed);
            self.refused.fetch_add(1, Ordering::Relaxed);
            size = Size::Small;
        }
        let kept = KEEP.with_borrow_mut(|keep| keep.of(size).pop());
        let bytes = kept.unwrap_or_else(|| vec![0; size.slots() * SLOT + PADDING].into_boxed_slice());
        Buffer { bytes, size, budget: Arc::clone(self) }
    }
}

/// Room for what an application has said early.
#[derive(Debug)]
pub(in crate::proxy) struct EarlyRoom {
    budget: Arc<Budget>,
    bytes: usize,
}

impl EarlyRoom {
    /// No more than so many are needed.
    pub(in crate::proxy) fn shrink(&mut self, bytes: usize) {
        let spare = self.bytes.saturating_sub(bytes);
        self.budget.early.fetch_sub(spare, Ordering::Relaxed);
        self.bytes -= spare;
    }

    /// With the room of another, which was taken from the same budget.
    pub(in crate::proxy) fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for EarlyRoom {
    fn drop(&mut self) {
        self.budget.early.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Keep {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
}

impl Keep {
    fn of(&mut self, size: Size) -> &mut Vec<Box<[u8]>> {
        match size {
            Size::Small => &mut self.small,
            Size::Large => &mut self.large,
        }
    }
}

thread_local! {
    static KEEP: RefCell<Keep> = RefCell::default();
}

/// A borrowed buffer.
pub(super) struct Buffer {
    pub(super) bytes: Box<[u8]>,
    pub(super) size: Size,
    budget: Arc<Budget>,
}

impl Buffer {
    /// How much data its slots take.
    pub(super) fn room(&self) -> usize {
        self.size.slots() * (MAX_PLAINTEXT - 1)
    }

    /// Where the data of each slot goes: behind the record's header and the message's type.
    pub(super) fn data(&mut self) -> ([IoSliceMut<'_>; SLOTS], usize) {
        let slots = self.size.slots();
        let mut chunks = self.bytes.chunks_exact_mut(SLOT);
        let slices = std::array::from_fn(|_| match chunks.next() {
            Some(slot) => IoSliceMut::new(&mut slot[HEADER + 1..HEADER + MAX_PLAINTEXT]),
            None => IoSliceMut::new(&mut []),
        });
        (slices, slots)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.size == Size::Large {
            self.budget.large.fetch_sub(1, Ordering::Relaxed);
        }
        let bytes = std::mem::take(&mut self.bytes);
        // At the end of a thread there is nobody to keep it for.
        let _end_of_thread = KEEP.try_with(|keep| {
            let mut keep = keep.borrow_mut();
            let kept = keep.of(self.size);
            if kept.len() < KEPT {
                kept.push(bytes);
            }
        });
    }
}

/// Pieces of a buffer that are to be written one after the other.
#[derive(Debug)]
pub(super) struct Pieces {
    ranges: [(u32, u32); PIECES],
    first: usize,
    end: usize,
}

impl Pieces {
    pub(super) fn new() -> Self {
        Self { ranges: [(0, 0); PIECES], first: 0, end: 0 }
    }

    pub(super) fn is_full(&self) -> bool {
        self.end == PIECES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first == self.end
    }

    pub(super) fn push(&mut self, range: Range<usize>) {
        self.ranges[self.end] = (range.start as u32, range.end as u32);
        self.end += 1;
    }

    pub(super) fn slices<'a>(&self, bytes: &'a [u8]) -> ([IoSlice<'a>; PIECES], usize) {
        let mut left = self.ranges[self.first..self.end].iter();
        let slices = std::array::from_fn(|_| match left.next() {
            Some((start, end)) => IoSlice::new(&bytes[*start as usize..*end as usize]),
            None => IoSlice::new(&[]),
        });
        (slices, self.end - self.first)
    }

    /// So many bytes were written.
    pub(super) fn advance(&mut self, mut written: usize) {
        for (start, end) in &mut self.ranges[self.first..self.end] {
            let length = (*end - *start) as usize;
            if written < length {
                *start += written as u32;
                break;
            }
            written -= length;
            self.first += 1;
        }
        if self.is_empty() {
            (self.first, self.end) = (0, 0);
        }
    }
}
