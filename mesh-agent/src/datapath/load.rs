//! Loads the programs onto the pinned maps and attaches them, or puts them in the place of those that are attached.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, Program};
use aya::{Ebpf, EbpfLoader};
use mesh_common::abi::map;
use tracing::{info, warn};

use super::adopt::adopt;
use super::maps::Maps;
use super::migrate::{self, Pinned};
use super::object::{self, MapKind, MapSpec, PROGRAMS};
use super::pins::Pins;
use super::sys;
use crate::config::{DatapathConfig, KernelLog};

/// How long a new agent waits for the one before it to go.
const HANDOVER: Duration = Duration::from_secs(10);

/// Programs that the kernel has accepted, on maps that are pinned.
pub struct Loaded {
    ebpf: Ebpf,
    pins: Pins,
    cgroup: File,
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
    let mut moving = Vec::new();
    let mut loader = EbpfLoader::new();
    let level = level(config.kernel_log);
    loader.override_global(aya_log::LEVEL, &level, true);
    for spec in &specs {
        let path = pins.map(spec.name);
        if spec.kind != MapKind::SocketStorage {
            loader.map_max_entries(spec.name, spec.entries);
        }
        let path = match migrate::look(&path, spec)? {
            Pinned::Absent | Pinned::Same => path,
            Pinned::Differs { alike, value, entries } => {
                moving.push((*spec, alike && spec.kind != MapKind::SocketStorage, value, entries));
                let next = pins.next_map(spec.name);
                remove_if_there(&next)?;
                next
            }
        };
        loader.map_pin_path(spec.name, path);
    }
    fits(&pins, &moving, &specs)?;
    let ebpf = loader.load(object).context("loading the kernel programs' maps")?;
    let mut loaded = Loaded { ebpf, pins, cgroup, _lock: lock };
    loaded.load_programs()?;
    for (spec, alike, value, _) in moving {
        loaded.move_map(&spec, alike, value)?;
    }
    Ok(loaded)
}

impl Loaded {
    /// The maps.
    pub fn maps(&self) -> Result<Maps> {
        Maps::open(&self.pins)
    }

    /// Where everything is pinned.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The object, for its log.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "aya knows 28 types of programs, this object has three"
    )]
    fn load_programs(&mut self) -> Result<()> {
        for name in PROGRAMS {
            let program =
                self.ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
            match program {
                Program::CgroupSock(program) => program.load(),
                Program::CgroupSockAddr(program) => program.load(),
                Program::SockOps(program) => program.load(),
                _ => bail!("program {name} is of a type that is not expected"),
            }
            .with_context(|| format!("the kernel refused program {name}"))?;
        }
        Ok(())
    }

    /// Fills the map that follows one of another layout, and gives it its name.
    fn move_map(&self, spec: &MapSpec, alike: bool, value: u32) -> Result<()> {
        let (old, next) = (self.pins.map(spec.name), self.pins.next_map(spec.name));
        if alike {
            let copied = migrate::copy(&old, &next, spec, value)
                .with_context(|| format!("migrating map {} to its new layout", spec.name))?;
            info!(map = spec.name, copied, "migrated a map to its new layout");
        } else {
            warn!(map = spec.name, "a map begins empty: its old contents have another form");
        }
        fs::rename(&next, &old).with_context(|| format!("renaming {}", next.display()))
    }

    /// Puts the programs in force: each in the place of its predecessor, or attached anew. What undoes a rewrite comes
    /// before what rewrites.
    pub fn attach(&mut self) -> Result<Vec<Attached>> {
        let cgroup_id = self.cgroup.metadata().context("reading the cgroup root")?.ino();
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
fn fits(pins: &Pins, moving: &[(MapSpec, bool, u32, u32)], specs: &[MapSpec]) -> Result<()> {
    let arrays = [map::PAGES, map::BACKENDS, map::ROTATION];
    if !moving
        .iter()
        .any(|(spec, alike, _, entries)| *alike && arrays.contains(&spec.name) && spec.entries < *entries)
    {
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
        let size = specs.iter().find(|spec| spec.name == name).map_or(0, |spec| spec.entries);
        if let Some(highest) = highest
            && highest >= size
        {
            bail!(
                "{flag}: {size} entries of {name} are fewer than are in use (up to number {highest}); use a larger size, or `mesh-agent uninstall` first"
            );
        }
    }
    Ok(())
}

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
