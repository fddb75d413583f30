//! One subscription of one stream to one type, as a pure state machine.
//!
//! It holds a position in the catalog's log, not the resources; what is due is worked out when the client can take it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use crate::{
    catalog::{Contents, Logged, Revision, Served},
    index::Name,
};

/// Most resources and removals of a response.
const MAX_ITEMS: usize = 1_000;
/// Most bytes of resources in a response, well below the 4 MiB that gRPC clients accept by default.
const MAX_BYTES: usize = 2 << 20;
/// Most log entries looked at under one lock.
const MAX_SCAN: usize = 16_384;
/// Responses that may await their acknowledgement.
const MAX_IN_FLIGHT: usize = 1_024;
/// Names that a client may subscribe to.
const MAX_NAMES: usize = 262_144;
/// Most bytes of a name that a client says, well above those of any name that is served.
const MAX_NAME: usize = 1_024;
/// Refusals that are remembered one by one.
const MAX_REFUSALS: usize = 64;

/// A client's message, as far as the session is concerned.
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) subscribe: Vec<String>,
    pub(crate) unsubscribe: Vec<String>,
    /// Counts only in the first request.
    pub(crate) initial: HashMap<String, String>,
    pub(crate) nonce: String,
    /// Why the response was refused.
    pub(crate) refusal: Option<String>,
}

/// What a message meant for an earlier response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It answered none that is known.
    None,
    Acknowledged,
    Refused,
}

/// A message that ends the stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadNames {
    #[error("subscribes to more than {MAX_NAMES} names; subscribe to \"*\" instead")]
    TooMany,
    #[error("a name of {0} bytes; names have at most {MAX_NAME}")]
    TooLong(usize),
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Nothing is due.
    Idle,
    /// More is to be looked at.
    Again,
    Send(Response),
    /// Removals that the client missed are forgotten: it must start anew.
    TooFarBehind,
}

#[derive(Debug, Default)]
pub(crate) struct Response {
    pub(crate) nonce: String,
    pub(crate) revision: Revision,
    pub(crate) resources: Vec<Arc<Served>>,
    pub(crate) removed: Vec<Name>,
    /// With this one the client knows all that there was when it was made.
    pub(crate) complete: bool,
}

impl Request {
    fn names(&self) -> impl Iterator<Item = &String> {
        self.subscribe.iter().chain(&self.unsubscribe).chain(self.initial.keys())
    }
}

impl Response {
    fn items(&self) -> usize {
        self.resources.len() + self.removed.len()
    }
}

/// What the client must be told on its other subscription before it is told that something is gone.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gate {
    /// Nothing.
    Open,
    /// All that there was by then: a workload names a policy until the client knows better.
    Behind {
        /// Where the other log ends.
        end: Revision,
        /// Where the client stands in it.
        at: Revision,
    },
}

/// A response that awaits its answer: it covered what changed after `from` up to `to`.
#[derive(Debug)]
struct InFlight {
    nonce: u64,
    from: Revision,
    to: Revision,
    /// Where its resources stood before; kept only while refusals are open.
    replaced: Vec<Revision>,
}

impl Gate {
    fn lets(self, until: Revision) -> bool {
        match self {
            Self::Open => true,
            Self::Behind { at, .. } => at >= until,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Session {
    subscribed: bool,
    wildcard: bool,
    names: BTreeSet<Name>,
    /// Names to be answered whether or not they changed.
    asked: BTreeSet<Name>,
    /// Versions that the client held when it came, until each is settled.
    initial: HashMap<String, String>,
    /// `initial` was compared with what is in force.
    compared: bool,
    /// Names that the client holds, but that are gone.
    orphans: BTreeSet<Name>,
    /// Policies that are gone or hold for fewer workloads, each until the client stands there among the addresses.
    held_back: BTreeMap<Name, Revision>,
    cursor: Revision,
    /// Where it stood before it asked for everything, until it is there again: what it had by name may have gone since.
    stood: Revision,
    /// The first request was answered.
    answered: bool,
    next_nonce: u64,
    in_flight: VecDeque<InFlight>,
    /// What refused responses covered, until newer content of it is acknowledged.
    refusals: Vec<(Revision, Revision)>,
}

impl Session {
    /// Takes a message in.
    pub(crate) fn request(&mut self, request: Request) -> Result<Answer, BadNames> {
        if let Some(name) = request.names().find(|name| name.len() > MAX_NAME) {
            return Err(BadNames::TooLong(name.len()));
        }
        let answer = self.answer(&request);
        let first = !self.subscribed;
        if first {
            self.subscribed = true;
            self.initial = request.initial;
            // The first request of a stream asks for everything unless it names something.
            self.wildcard = request.subscribe.is_empty();
        }
        for name in &request.subscribe {
            if name == "*" {
                if !self.wildcard {
                    self.stood = self.stood.max(self.cursor);
                    (self.wildcard, self.cursor) = (true, 0);
                }
            } else {
                self.ask(name.as_str().into());
            }
        }
        let all = self.wildcard && !request.unsubscribe.iter().any(|name| name == "*");
        if first && !all {
            // Who returns and asks for something, not for everything, asks for what he holds, too.
            let held: Vec<Name> = self.initial.keys().map(|name| name.as_str().into()).collect();
            held.into_iter().filter(|name| &**name != "*").for_each(|name| self.ask(name));
        }
        for name in &request.unsubscribe {
            if name == "*" {
                self.wildcard = false;
            } else {
                self.names.remove(name.as_str());
                self.asked.remove(name.as_str());
            }
        }
        if !self.wildcard && (first || !request.unsubscribe.is_empty()) {
            // Who does not ask for something does not hold it, and is sent it anew when he asks.
            self.initial.retain(|name, _| self.names.contains(name.as_str()));
        }
        if self.names.len() > MAX_NAMES { Err(BadNames::TooMany) } else { Ok(answer) }
    }

    fn ask(&mut self, name: Name) {
        self.names.insert(Arc::clone(&name));
        self.asked.insert(name);
    }

    fn answer(&mut self, request: &Request) -> Answer {
        let nonce = request.nonce.parse::<u64>().ok();
        let Some(at) = self.in_flight.iter().position(|sent| Some(sent.nonce) == nonce) else {
            return Answer::None;
        };
        // Responses are answered in order, so those before it are answered, too.
        let Some(sent) = self.in_flight.drain(..=at).next_back() else { return Answer::None };
        if request.refusal.is_some() {
            if self.refusals.len() >= MAX_REFUSALS {
                self.refusals.remove(0);
            }
            self.refusals.push((sent.from, sent.to));
            return Answer::Refused;
        }
        self.refusals.retain(|(from, to)| !sent.replaced.iter().any(|at| from < at && at <= to));
        Answer::Acknowledged
    }

    /// True when [`Session::next`] may have something, given the catalog's revision.
    pub(crate) fn is_due(&self, revision: Revision, gate: Gate) -> bool {
        let released = self.held_back.values().any(|until| gate.lets(*until));
        let behind = self.is_behind(revision) || !self.orphans.is_empty() || released;
        self.subscribed && self.in_flight.len() < MAX_IN_FLIGHT && behind
    }

    /// True when the client has not been told of everything that is new, whether or not it can be now.
    pub(crate) fn is_behind(&self, revision: Revision) -> bool {
        self.subscribed && (!self.answered || self.cursor < revision || !self.asked.is_empty())
    }

    /// Where the client stands: it was told of all changes before, and of what has gone.
    pub(crate) fn position(&self) -> Revision {
        if self.orphans.is_empty() { self.cursor } else { 0 }
    }

    /// Up to here everything was answered.
    pub(crate) fn acknowledged(&self) -> Revision {
        self.in_flight.front().map_or(self.cursor, |sent| sent.from)
    }

    /// The first request was answered, and whatever was sent was accepted.
    pub(crate) fn is_settled(&self) -> bool {
        self.answered && self.in_flight.is_empty() && self.refusals.is_empty()
    }

    /// What is kept of the client, in pieces.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn weight(&self) -> usize {
        let sent = self.in_flight.iter().map(|sent| 1 + sent.replaced.len()).sum::<usize>();
        let names = self.names.len() + self.asked.len() + self.initial.len();
        sent + names + self.orphans.len() + self.held_back.len() + self.refusals.len()
    }

    /// Works out what is due.
    pub(crate) fn next(&mut self, contents: &Contents, gate: Gate) -> Next {
        if !self.is_due(contents.revision(), gate) {
            return Next::Idle;
        }
        if !self.compared {
            self.compare(contents);
        }
        let from = self.cursor;
        let mut response = Response::default();
        let mut bytes = 0;
        self.take_asked(contents, gate, &mut response, &mut bytes);
        if self.take_changes(contents, gate, &mut response, &mut bytes).is_none() {
            return Next::TooFarBehind;
        }
        let at_end = self.cursor == contents.revision() && self.asked.is_empty();
        if at_end {
            // What has gone is told last, so that what came in its place is there before.
            self.take_orphans(contents, gate, &mut response);
            self.take_released(contents, gate, &mut response, &mut bytes);
        }
        let ended =
            at_end && self.orphans.is_empty() && !self.held_back.values().any(|until| gate.lets(*until));
        if response.items() == 0 && (!ended || self.answered) {
            return if ended { Next::Idle } else { Next::Again };
        }
        self.answered = true;
        self.next_nonce += 1;
        let mut replaced: Vec<Revision> = Vec::new();
        if !self.refusals.is_empty() {
            replaced.extend(response.resources.iter().map(|served| served.previous));
            replaced.extend(response.removed.iter().filter_map(|name| contents.place_before(name)));
        }
        self.in_flight.push_back(InFlight { nonce: self.next_nonce, from, to: self.cursor, replaced });
        response.nonce = self.next_nonce.to_string();
        response.revision = self.cursor;
        response.complete = ended && self.held_back.is_empty();
        Next::Send(response)
    }

    /// Sorts out what the client held when it came: what is gone is to be removed.
    fn compare(&mut self, contents: &Contents) {
        let gone = self.initial.keys().filter(|name| contents.get(name).is_none());
        self.orphans = gone.map(|name| name.as_str().into()).collect();
        self.orphans.iter().for_each(|name| drop(self.initial.remove(&**name)));
        // What arrives by name is looked up; only changes from now on come from the log.
        if !self.wildcard {
            self.cursor = contents.revision();
        }
        self.compared = true;
    }

    fn take_orphans(&mut self, contents: &Contents, gate: Gate, response: &mut Response) {
        while response.items() < MAX_ITEMS
            && let Some(name) = self.orphans.pop_first()
        {
            if let Gate::Behind { end, .. } = gate {
                self.held_back.insert(name, end);
                continue;
            }
            // It may have come back in the meantime, and then comes with the log.
            if contents.get(&name).is_none() {
                self.asked.remove(&name);
                response.removed.push(name);
            }
        }
    }

    /// What was held back and need not be any longer, as it is now.
    fn take_released(&mut self, contents: &Contents, gate: Gate, response: &mut Response, bytes: &mut usize) {
        let released: Vec<_> = self
            .held_back
            .iter()
            .filter(|(_, until)| gate.lets(**until))
            .map(|(name, _)| Arc::clone(name))
            .collect();
        for name in released {
            if response.items() >= MAX_ITEMS || *bytes >= MAX_BYTES {
                return;
            }
            self.held_back.remove(&name);
            match contents.get(&name) {
                Some(served) => {
                    *bytes += served.resource.bytes.len();
                    response.resources.push(Arc::clone(served));
                }
                None => response.removed.push(name),
            }
        }
    }

    fn take_asked(&mut self, contents: &Contents, gate: Gate, response: &mut Response, bytes: &mut usize) {
        while response.items() < MAX_ITEMS
            && *bytes < MAX_BYTES
            && let Some(name) = self.asked.pop_first()
        {
            let had = self.initial.contains_key(&*name);
            match contents.get(&name) {
                // What the client holds and is to be told later is told then, and once.
                _ if self.orphans.contains(&name) || self.held_back.contains_key(&name) => {}
                // It stands in the log before us and comes from there, or it is the very content that the client has.
                _ if contents.place(&name) > Some(self.cursor) => {}
                Some(served) if self.holds(served) => {}
                Some(served) => match gate {
                    // What the client came with may hold for more workloads, wherever it has that from.
                    Gate::Behind { end, .. }
                        if !served.resource.wide && served.has_narrowed_since(0, had) =>
                    {
                        self.held_back.insert(name, end);
                    }
                    Gate::Open | Gate::Behind { .. } => {
                        *bytes += served.resource.bytes.len();
                        response.resources.push(Arc::clone(served));
                    }
                },
                None => response.removed.push(name),
            }
        }
    }

    /// Moves on in the log, to its end if the response has room; `None` when the log has a gap.
    fn take_changes(
        &mut self,
        contents: &Contents,
        gate: Gate,
        response: &mut Response,
        bytes: &mut usize,
    ) -> Option<()> {
        let mut ended = true;
        let from = self.cursor;
        for (scanned, (revision, logged)) in contents.after(from)?.enumerate() {
            if response.items() >= MAX_ITEMS || *bytes >= MAX_BYTES || scanned >= MAX_SCAN {
                ended = false;
                break;
            }
            match logged {
                Logged::Live(served) => {
                    let name = &served.resource.name;
                    let wanted = self.wildcard || self.names.contains(name);
                    let had = self.initial.contains_key(&**name);
                    if !wanted || self.holds(served) {
                        self.held_back.remove(name);
                    } else if let Gate::Behind { end, .. } = gate
                        && !served.resource.wide
                        && (served.has_narrowed_since(from, had) || self.held_back.contains_key(name))
                    {
                        // Until then what the client has holds for workloads that do not name it yet.
                        self.held_back.insert(Arc::clone(name), end);
                    } else {
                        self.held_back.remove(name);
                        *bytes += served.resource.bytes.len();
                        response.resources.push(Arc::clone(served));
                    }
                }
                Logged::Gone { name, born, .. } => {
                    let wanted = self.wildcard || self.names.contains(name);
                    let wanted = wanted && !self.orphans.contains(name);
                    let held = self.initial.remove(&**name).is_some();
                    // Who was never told of a name need not be told that it is gone.
                    let known = *born <= from || (*born <= self.stood && self.stood < revision);
                    if held || (wanted && (known || self.names.contains(name))) {
                        match gate {
                            Gate::Open => response.removed.push(Arc::clone(name)),
                            Gate::Behind { end, .. } => drop(self.held_back.insert(Arc::clone(name), end)),
                        }
                    }
                }
            }
            self.cursor = revision;
        }
        if ended {
            self.cursor = contents.revision();
            (self.initial, self.stood) = (HashMap::new(), 0);
        }
        Some(())
    }

    /// The client came with this very content.
    fn holds(&mut self, served: &Served) -> bool {
        let version = self.initial.remove(&*served.resource.name);
        version.is_some_and(|version| version == served.version())
    }
}

#[cfg(test)]
mod tests;
