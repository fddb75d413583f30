//! The maps, with their types.

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap};
use mesh_common::abi::{
    Backend, CounterKey, Counters, Load, Page, Pointer, Reason, ServiceKey, WorkloadIdentity, map,
};

use super::adopt::Contents;
use super::ledger::{Reused, Write};
use super::pins::Pins;

/// Handles of the pinned maps.
pub struct Maps {
    services: HashMap<MapData, ServiceKey, Pointer>,
    pages: Array<MapData, Page>,
    backends: Array<MapData, Backend>,
    loads: Array<MapData, Load>,
    workloads: HashMap<MapData, u64, WorkloadIdentity>,
    counters: PerCpuHashMap<MapData, CounterKey, Counters>,
    reasons: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// Opens what is pinned.
    pub fn open(pins: &Pins) -> Result<Self> {
        let open = |name| open(pins, name);
        Ok(Self {
            services: open(map::SERVICES)?.try_into()?,
            pages: open(map::PAGES)?.try_into()?,
            backends: open(map::BACKENDS)?.try_into()?,
            loads: open(map::LOADS)?.try_into()?,
            workloads: open(map::WORKLOADS)?.try_into()?,
            counters: open(map::COUNTERS)?.try_into()?,
            reasons: open(map::REASONS)?.try_into()?,
        })
    }

    /// Does one write of a plan.
    pub fn write(&mut self, write: &Write) -> Result<(), MapError> {
        match write {
            Write::Backend(number, slot) => self.backends.set(*number, slot, 0),
            Write::NoLoad(number) => self.loads.set(*number, Load::default(), 0),
            Write::Page(number, page) => self.pages.set(*number, **page, 0),
            Write::Publish(key, pointer) => self.services.insert(key, pointer, 0),
            Write::Remove(key) => gone(self.services.remove(key)),
        }
    }

    /// Writes a backend slot free.
    pub fn free(&mut self, number: u32, slot: Backend) -> Result<(), MapError> {
        self.backends.set(number, slot, 0)
    }

    /// Puts a cgroup under a workload's name.
    pub fn enroll(&mut self, cgroup: u64, workload: WorkloadIdentity) -> Result<(), MapError> {
        self.workloads.insert(cgroup, workload, 0)
    }

    /// Takes a cgroup out.
    pub fn dismiss(&mut self, cgroup: u64) -> Result<(), MapError> {
        gone(self.workloads.remove(&cgroup))
    }

    /// Cgroups and their workloads.
    pub fn enrolled(&self) -> Result<Vec<(u64, WorkloadIdentity)>, MapError> {
        self.workloads.iter().collect()
    }

    /// What holds the services.
    pub fn contents(&self) -> Result<Contents<'_>, MapError> {
        Ok(Contents {
            services: self.services.iter().collect::<Result<_, _>>()?,
            page: Box::new(|number| self.pages.get(&number, 0).ok()),
            backend: Box::new(|number| self.backends.get(&number, 0).ok()),
        })
    }

    /// All backend slots, whether in use or not.
    pub fn slots(&self) -> Result<Vec<Backend>, MapError> {
        self.backends.iter().collect()
    }

    /// Open connections of a backend.
    pub fn open_connections(&self, backend: u32) -> Result<u64, MapError> {
        self.loads.get(&backend, 0).map(|load| load.open)
    }

    /// All counters, summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<(CounterKey, Counters)>, MapError> {
        let sum = |entry: Result<(CounterKey, aya::maps::PerCpuValues<Counters>), MapError>| {
            let (key, values) = entry?;
            let mut sum = Counters::default();
            values.iter().for_each(|value| sum.add(value));
            Ok((key, sum))
        };
        self.counters.iter().map(sum).collect()
    }

    /// Removes the counters that `unwanted` names; how many.
    pub fn prune(&mut self, unwanted: impl Fn(&CounterKey) -> bool) -> Result<usize, MapError> {
        let keys: Vec<CounterKey> = self
            .counters
            .keys()
            .filter(|key| key.as_ref().map_or(true, &unwanted))
            .collect::<Result<_, _>>()?;
        for key in &keys {
            gone(self.counters.remove(key))?;
        }
        Ok(keys.len())
    }

    /// Removes the counters of numbers that get another owner.
    pub fn forget(&mut self, reused: &Reused) -> Result<(), MapError> {
        if reused.backends.is_empty() && reused.services.is_empty() {
            return Ok(());
        }
        let of = |key: &CounterKey| {
            (key.backend != 0 && reused.backends.contains(&key.backend))
                || reused.services.contains(&key.service)
        };
        self.prune(of).map(|_| ())
    }

    /// How often each reason was met.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, MapError> {
        Reason::ALL
            .into_iter()
            .map(|reason| Ok((reason, self.reasons.get(&(reason as u32), 0)?.iter().sum())))
            .collect()
    }

    /// What is counted.
    pub fn counted(&self) -> Result<Vec<CounterKey>, MapError> {
        self.counters.keys().collect()
    }
}

/// Opens a map by its name.
pub(super) fn open(pins: &Pins, name: &str) -> Result<Map> {
    let path = pins.map(name);
    let data = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
    Ok(Map::from_map_data(data)?)
}

/// What is not there need not be removed.
pub(super) fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}
