//! Loads the programs onto the pinned maps and attaches them, or puts them in the place of those that are attached.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use mesh_common::abi::map;
use tracing::{info, warn};

use super::adopt::adopt;
use super::guard::Guard;
use super::maps::Maps;
use super::migrate::{self, Former};
use super::moves::{self, Move, Pinned};
use super::object::{self, INBOUND, MapKind, MapSpec, PROGRAMS};
use super::pins::Pins;
use super::sys;
use crate::config::{DatapathConfig, KernelLog};

/// How long a new agent waits for the one before it to go.
const HANDOVER: Duration = Duration::from_secs(10);

/// How often the kernel is asked to load a program: its verifier gives up with EAGAIN when the thread gets a signal.
const LOAD_ATTEMPTS: usize = 5;

/// Programs that the kernel has accepted, on maps that are pinned.
pub struct Loaded {
    ebpf: Ebpf,
    pins: Pins,
    cgroup: File,
    /// Maps that the programs in force still write to, until they are exchanged.
    formers: Vec<Former>,
    /// The map of backends was made now.
    begins: bool,
    /// Held as long as this agent is the one that writes.
    _lock: File,
}

/// A program in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Its name.
    pub name: &'static str,
    /// Whether it took the place of one that was attached.
    pub replaced: bool,
    /// Its id in the kernel.
    pub id: u32,
}

/// Makes or adopts the maps and loads the programs; nothing that is in force changes yet.
pub fn load(config: &DatapathConfig) -> Result<Loaded> {
    let object = object::bytes()
        .ok_or_else(|| anyhow!("this agent was built without its kernel programs; run `cargo xtask build-ebpf`, then build it again"))?;
    let cgroup = File::open(&config.cgroup_root)
        .with_context(|| format!("--cgroup-root: opening {}", config.cgroup_root.display()))?;
    let pins = Pins::create(&config.pin_path).with_context(|| {
        format!("--pin-path: making {} (is a bpffs mounted there?)", config.pin_path.display())
    })?;
    let lock = lock(&config.pin_path)?;
    let specs = object::maps(&config.sizes);
    let mut pinned = Vec::with_capacity(specs.len());
    for spec in specs {
        remove_if_there(&pins.next_map(spec.name))?;
        pinned.push((spec, migrate::look(&pins.map(spec.name), &spec)?));
    }
    let moves = moves::plan(&pinned)?;
    fits(&pins, &moves)?;
    let mut loader = EbpfLoader::new();
    let level = level(config.kernel_log);
    loader.override_global(aya_log::LEVEL, &level, true);
    for (spec, planned) in &moves {
        if spec.kind != MapKind::SocketStorage {
            loader.map_max_entries(spec.name, spec.entries);
        }
        let path = if *planned == Move::Keep { pins.map(spec.name) } else { pins.next_map(spec.name) };
        loader.map_pin_path(spec.name, path);
    }
    let ebpf = loader.load(object).context("loading the kernel programs' maps");
    let moved = ebpf.and_then(|mut ebpf| {
        load_programs(&mut ebpf)?;
        let formers = copy(&pins, &moves)?;
        Ok((ebpf, formers))
    });
    let (ebpf, formers) = match moved {
        Ok(moved) => moved,
        Err(error) => {
            // Nothing has changed but for these.
            specs.iter().try_for_each(|spec| remove_if_there(&pins.next_map(spec.name)))?;
            return Err(error);
        }
    };
    for (spec, _) in moves.iter().filter(|(_, planned)| *planned != Move::Keep) {
        let next = pins.next_map(spec.name);
        fs::rename(&next, pins.map(spec.name)).with_context(|| format!("renaming {}", next.display()))?;
    }
    let begins = pinned.iter().zip(&moves).any(|((spec, state), (_, planned))| {
        spec.name == map::BACKENDS && (*state == Pinned::Absent || *planned == Move::Empty)
    });
    Ok(Loaded { ebpf, pins, cgroup, formers, begins, _lock: lock })
}

/// Two threads, since the verifier takes most of the time that an agent needs to start.
fn load_programs(ebpf: &mut Ebpf) -> Result<()> {
    let mut programs: Vec<(&str, &mut Program)> = ebpf.programs_mut().collect();
    let wanted = PROGRAMS.iter().chain(&[INBOUND]);
    if let Some(missing) = wanted.copied().find(|wanted| !programs.iter().any(|(name, _)| name == wanted)) {
        bail!("the object has no program {missing}");
    }
    // Those of IPv4 and those of IPv6 are alike in size.
    programs.sort_by_key(|(name, _)| name.ends_with('6'));
    let half = programs.iter().take_while(|(name, _)| !name.ends_with('6')).count();
    let (one, other) = programs.split_at_mut(half);
    std::thread::scope(|scope| {
        let other =
            scope.spawn(|| other.iter_mut().try_for_each(|(name, program)| load_program(name, program)));
        one.iter_mut().try_for_each(|(name, program)| load_program(name, program))?;
        other.join().map_err(|_panic| anyhow!("loading the kernel programs failed"))?
    })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "aya knows 28 types of programs, this object has four")]
fn load_program(name: &str, program: &mut Program) -> Result<()> {
    let mut load = || match program {
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    let mut outcome = load();
    for _ in 1..LOAD_ATTEMPTS {
        match outcome {
            Err(ProgramError::LoadError { ref io_error, .. }) if io_error.kind() == ErrorKind::WouldBlock => {
                outcome = load();
            }
            Ok(()) | Err(_) => break,
        }
    }
    outcome.with_context(|| format!("the kernel refused program {name}"))
}

/// Fills the maps that take the place of others.
fn copy(pins: &Pins, moves: &[(MapSpec, Move)]) -> Result<Vec<Former>> {
    let mut formers = Vec::new();
    for (spec, planned) in moves {
        match planned {
            Move::Keep => {}
            Move::Copy { value } => {
                let former = Former::copy(&pins.map(spec.name), &pins.next_map(spec.name), spec, *value)
                    .with_context(|| format!("copying map {} to its new layout", spec.name))?;
                info!(map = spec.name, entries = spec.entries, "copied a map to its new layout");
                formers.push(former);
            }
            Move::Empty => {
                warn!(map = spec.name, "a map begins empty: its old contents have another form");
            }
        }
    }
    Ok(formers)
}

impl Loaded {
    /// The maps.
    pub fn maps(&self) -> Result<Maps> {
        Maps::open(&self.pins)
    }

    /// Whether the map of backends was made now, and is empty.
    pub fn begins(&self) -> bool {
        self.begins
    }

    /// The program for the network namespaces of pods.
    pub fn guard(&self) -> Result<Guard> {
        let program =
            self.ebpf.program(INBOUND).with_context(|| format!("the object has no program {INBOUND}"))?;
        Guard::new(program.fd()?, &self.pins)
    }

    /// Where everything is pinned.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The object, for its log.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Puts the programs in force: each in the place of its predecessor, or attached anew. What undoes a rewrite comes
    /// before what rewrites.
    pub fn attach(&mut self) -> Result<Vec<Attached>> {
        let cgroup_id = self.cgroup.metadata().context("reading the cgroup root")?.ino();
        // Whoever comes in is judged by what `connection` notes: the two must not be on different maps.
        self.guard()?.renew()?;
        let mut attached = Vec::with_capacity(PROGRAMS.len());
        for name in PROGRAMS {
            let pin = self.pins.link(name);
            let program =
                self.ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
            let id =
                program.info().map(|info| info.id()).with_context(|| format!("asking for program {name}"))?;
            let replaced =
                replace(program, &pin, cgroup_id).with_context(|| format!("replacing program {name}"))?;
            if !replaced {
                attach(program, &self.cgroup, &pin).with_context(|| format!("attaching program {name}"))?;
            }
            attached.push(Attached { name, replaced, id });
        }
        for former in self.formers.drain(..) {
            former.settle().context("adding what was counted while the programs were exchanged")?;
        }
        Ok(attached)
    }
}

/// Whether the pinned link of this cgroup now runs `program`.
fn replace(program: &Program, pin: &Path, cgroup_id: u64) -> Result<bool> {
    if !pin.exists() {
        return Ok(false);
    }
    let link = sys::object(pin).with_context(|| format!("opening {}", pin.display()))?;
    if sys::cgroup_of(link.as_fd())? != cgroup_id {
        warn!(pin = %pin.display(), "the pinned link belongs to another cgroup; it is attached anew");
        fs::remove_file(pin)?;
        return Ok(false);
    }
    sys::replace_program(link.as_fd(), program.fd()?.as_fd())?;
    Ok(true)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "aya knows 28 types of programs, this object has three")]
fn attach(program: &mut Program, cgroup: &File, pin: &Path) -> Result<()> {
    // Links allow several programs on a cgroup, and the kernel refuses the flag that says so.
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    let link: FdLink = match program {
        Program::CgroupSock(program) => {
            let id = program.attach(cgroup, MODE)?;
            program.take_link(id)?.try_into()?
        }
        Program::CgroupSockAddr(program) => {
            let id = program.attach(cgroup, MODE)?;
            program.take_link(id)?.try_into()?
        }
        Program::SockOps(program) => {
            let id = program.attach(cgroup, MODE)?;
            program.take_link(id)?.try_into()?
        }
        _ => bail!("a type that is not expected"),
    };
    link.pin(pin).with_context(|| format!("pinning {}", pin.display()))?;
    Ok(())
}

/// Refuses sizes that are smaller than what is in use, before anything has changed.
fn fits(pins: &Pins, moves: &[(MapSpec, Move)]) -> Result<()> {
    let copied =
        |name: &str| moves.iter().find(|(spec, m)| spec.name == name && matches!(m, Move::Copy { .. }));
    for (name, flag) in [
        (map::SERVICES, "--max-services"),
        (map::WORKLOADS, "--max-workloads"),
        (map::COUNTERS, "--max-counters"),
        (map::PEERS, "--max-peers"),
        (map::VERDICTS, "--max-verdicts"),
        (map::PLAIN_VERDICTS, "--max-verdicts"),
    ] {
        if let Some((spec, _)) = copied(name) {
            let count = migrate::count(&pins.map(name), spec)?;
            if count > spec.entries as usize {
                bail!(
                    "{flag}: {} entries of {name} are fewer than the {count} in use; {REMEDY}",
                    spec.entries
                );
            }
        }
    }
    if ![map::PAGES, map::BACKENDS, map::ROTATION].into_iter().any(|name| copied(name).is_some()) {
        return Ok(());
    }
    let maps = Maps::open(pins)?;
    let (ports, _) = adopt(&maps.contents()?);
    let pages = ports.values().flat_map(|port| port.tree.pages().collect::<Vec<_>>()).max();
    let backends = ports.values().flat_map(|port| port.backends.iter().map(|backend| backend.number)).max();
    let numbers = ports.values().map(|port| port.number).max();
    for (name, flag, highest) in [
        (map::PAGES, "--max-pages", pages),
        (map::BACKENDS, "--max-backends", backends),
        (map::ROTATION, "--max-services", numbers),
    ] {
        let size = moves.iter().find(|(spec, _)| spec.name == name).map_or(0, |(spec, _)| spec.entries);
        if let Some(highest) = highest
            && highest >= size
        {
            bail!(
                "{flag}: {size} entries of {name} are fewer than are in use (up to number {highest}); {REMEDY}"
            );
        }
    }
    Ok(())
}

const REMEDY: &str = "use a larger size, or `mesh-agent uninstall` first";

fn lock(pin_path: &Path) -> Result<File> {
    let folder = File::open(pin_path).with_context(|| format!("opening {}", pin_path.display()))?;
    let start = Instant::now();
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(folder),
            Err(fs::TryLockError::WouldBlock) if start.elapsed() < HANDOVER => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(fs::TryLockError::WouldBlock) => {
                bail!("--pin-path: another agent is running on {}", pin_path.display())
            }
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", pin_path.display()));
            }
        }
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// As aya-log counts levels; 0 is none, and the verifier then removes the calls.
fn level(log: KernelLog) -> u8 {
    match log {
        KernelLog::Off => 0,
        KernelLog::Error => 1,
        KernelLog::Warn => 2,
        KernelLog::Info => 3,
        KernelLog::Debug => 4,
        KernelLog::Trace => 5,
    }
}
