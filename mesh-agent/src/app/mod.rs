//! Wires the subsystems together.

mod certificates;
mod denials;
mod figures;
mod memory;
mod owner;
mod pods;
mod proxies;
mod record;
mod saving;
mod views;

use std::future::pending;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch as latest};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use self::owner::Owner;
use self::proxies::Proxies;
use self::record::Record;
use crate::config::{Config, KernelLog, LogFormat, RunArgs, UninstallArgs};
use crate::datapath::{Datapath, pins};
use crate::identity::access::Access;
use crate::identity::{self, Announced, Store};
use crate::pods::mesh::Mesh;
use crate::policy::Policies;
use crate::snapshot::{Interner, disk};
use crate::workloads::watch;
use crate::xds::{self, Applied, XdsEvent};
use crate::{admin, preflight};

/// How often what failed is tried again and freed numbers are given back.
const TICK: Duration = Duration::from_millis(250);
/// How often counters are looked through.
const HOUSEKEEPING: Duration = Duration::from_secs(10);
/// How often the log of the kernel programs is read.
const KERNEL_LOG: Duration = Duration::from_millis(100);
/// How often is looked whether there is something to save.
const SAVE: Duration = Duration::from_secs(1);

/// `mesh-agent run`: until it is told to stop.
pub fn run(args: RunArgs) -> Result<ExitCode> {
    let config = args.validate()?;
    log_to_stderr(config.log_format);
    let report = preflight::check(&config);
    if !report.ok() {
        eprint!("{report}");
        return Ok(ExitCode::FAILURE);
    }
    memory::keep_little();
    match memory::allow_descriptors() {
        Ok(descriptors) => info!(descriptors, "a proxied connection takes two of them"),
        Err(error) => warn!(%error, "the limit of descriptors stays as it was"),
    }
    // Connections have threads of their own; the owner is the thread that calls this.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(serve(config))?;
    Ok(ExitCode::SUCCESS)
}

/// `mesh-agent check`: what is missing on this machine, if anything.
pub fn check(args: RunArgs) -> Result<ExitCode> {
    let report = preflight::check(&args.validate()?);
    print!("{report}");
    Ok(if report.ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `mesh-agent uninstall`: removes links, programs, maps and the saved snapshot.
pub fn uninstall(args: &UninstallArgs) -> Result<ExitCode> {
    let _lock =
        pins::idle(&args.pin_path).with_context(|| format!("--pin-path: {}", args.pin_path.display()))?;
    let removed =
        pins::remove(&args.pin_path).with_context(|| format!("--pin-path: {}", args.pin_path.display()))?;
    for path in &removed {
        println!("removed {}", path.display());
    }
    let saved = disk::remove(&args.state_dir)
        .with_context(|| format!("--state-dir: {}", args.state_dir.display()))?;
    if saved {
        println!("removed {}", disk::path(&args.state_dir).display());
    }
    if removed.is_empty() && !saved {
        println!("nothing to remove");
    }
    Ok(ExitCode::SUCCESS)
}

async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut datapath = Datapath::prepare(&config.datapath)?;
    // After the lock on the pin path, so that a successor may wait for its predecessor; before anything is in force.
    let socket = admin::bind(&config.admin.socket)
        .with_context(|| format!("--admin-socket: {}", config.admin.socket.display()))?;
    let port = TcpListener::bind(config.admin.metrics_address)
        .await
        .with_context(|| format!("--metrics-address: {}", config.admin.metrics_address))?;
    let mut tasks = JoinSet::new();
    if config.datapath.kernel_log != KernelLog::Off {
        tasks.spawn(read_kernel_log(aya_log::EbpfLogger::init(datapath.ebpf())?));
    }
    let (wanted, report) = (latest::Sender::default(), latest::Sender::default());
    let identities = match config.xds {
        Some(_) => Announced::new(&config.node.name, wanted.clone(), report.subscribe()),
        None => Announced::without_authority(&config.node.name),
    };
    let policies = Policies::new(&config.node.name, config.datapath.sizes.verdicts as usize);
    let mesh = Arc::new(Mesh::new(config.proxy.endpoint_grace));
    let mut owner = Owner::new(datapath, &config.node, identities, policies, mesh);
    owner.adopt_policies().context("reading the verdicts of policy")?;
    let mut interner = Interner::new(&config.node.name);
    let (journal, saved) = saving::load(&config.state_dir, &mut interner);
    if let Some(saved) = saved {
        owner.restore(saved, Instant::now());
    }
    let mut record = Record::start(journal).context("starting the threads of the journal")?;
    // Only now, so that programs never meet fewer services than were in force before.
    owner.datapath.attach()?;

    let (cgroup_events, mut cgroups) = mpsc::channel(1024);
    let watched = watch::start(&config.datapath.cgroup_root, cgroup_events)
        .with_context(|| format!("watching {}", config.datapath.cgroup_root.display()))?;
    watched.initial.into_iter().for_each(|event| owner.cgroup(event));

    let (xds_events, mut updates) = mpsc::channel(4);
    let certificates = Arc::new(Store::default());
    let mut servers = Vec::new();
    match config.xds.clone() {
        Some(xds) => {
            let access = |server| Arc::new(Access::new(server, &xds.node, Arc::clone(&certificates)));
            let (control_plane, authority) = (access(xds.server.clone()), access(xds.authority.clone()));
            servers.extend([Arc::clone(&control_plane), Arc::clone(&authority)]);
            let node = xds.node.name.as_str().into();
            tasks.spawn(identity::run(
                authority,
                node,
                Arc::clone(&certificates),
                wanted.subscribe(),
                report,
            ));
            tasks.spawn(xds::run(control_plane, xds.node, interner, xds_events));
        }
        None => {
            warn!("no --control-plane: serving what is saved and what the kernel holds");
            tasks.spawn(async move {
                let _open = xds_events;
                pending::<()>().await;
            });
        }
    }
    let mut proxies = Proxies::start(&mut owner, &config, certificates, &mut tasks)?;
    let (asking, mut questions) = mpsc::channel(16);
    tasks.spawn(admin::serve_admin(socket, asking.clone()));
    tasks.spawn(admin::serve_metrics(port, asking));

    let view = views::Context {
        config: config.clone(),
        watch: watched.stats,
        servers,
        proxies: proxies.figures(),
        swept: proxies.sweeper(),
        untold: proxies.untold(),
    };
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut housekeeping = interval(HOUSEKEEPING);
    housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut save = interval(SAVE);
    save.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pace = saving::Pace::new(Instant::now());
    let (counted_events, mut counted) = mpsc::channel(1);
    let (saved_events, mut saved) = mpsc::channel::<saving::Saved>(1);
    loop {
        proxies.sync(&mut owner);
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            event = cgroups.recv() => match event {
                Some(event) => owner.cgroup(event),
                None => bail!("the watch of the cgroup tree ended; the kernel programs stay in force"),
            },
            Some(event) = updates.recv() => hear(&mut owner, &mut record, event).await,
            heard = proxies.next() => owner.heard(heard),
            Some(done) = tasks.join_next() => match done {
                Ok(()) => bail!("a part of the agent ended; the kernel programs stay in force"),
                Err(error) => bail!("a part of the agent failed; the kernel programs stay in force: {error}"),
            },
            Some(outcome) = saved.recv() => {
                pace.finished(outcome.took, Instant::now());
                match outcome.ok {
                    true => record.covered(outcome.sequence),
                    false => owner.not_saved(),
                }
            }
            _ = tick.tick() => owner.tick(Instant::now()),
            Some(counts) = counted.recv() => owner.datapath.set_counted(counts),
            _ = housekeeping.tick() => {
                owner.datapath.prune_counters();
                proxies.sweep(owner.is_complete());
                let (count, done) = (owner.datapath.count(), counted_events.clone());
                tokio::task::spawn_blocking(move || {
                    match count() {
                        Ok(counts) => drop(done.blocking_send(counts)),
                        Err(error) => warn!(%error, "the maps cannot be counted"),
                    }
                    memory::give_back();
                });
            }
            _ = save.tick(), if pace.is_due(Instant::now()) => if let Some(held) = owner.take_unsaved() {
                pace.started();
                let held = held.with_sequence(record.sequence());
                let (folder, node, done) = (config.state_dir.clone(), config.node.name.clone(), saved_events.clone());
                tokio::task::spawn_blocking(move || {
                    let outcome = saving::save(&folder, &node, held);
                    memory::give_back();
                    done.blocking_send(outcome)
                });
            },
            // Last, so that whoever asks without end starves nobody.
            Some(question) = questions.recv() => views::answer(&mut owner, &record, &view, question),
        }
    }
    proxies.stop(config.proxy.drain_timeout).await;
    if pace.is_running() && saved.recv().await.is_some_and(|outcome| !outcome.ok) {
        owner.not_saved();
    }
    if let Some(held) = owner.take_unsaved() {
        let held = held.with_sequence(record.sequence());
        disk::save(&config.state_dir, &config.node.name, &held).context("saving the snapshot")?;
    }
    info!("stopped; the kernel programs stay in force (`mesh-agent uninstall` removes them)");
    Ok(())
}

/// Written first, then in force: see [`record`].
async fn hear(owner: &mut Owner, record: &mut Record, event: XdsEvent) {
    match event {
        XdsEvent::Versions { reply } => {
            let (versions, safe) = (owner.versions(), record.all());
            tokio::spawn(async move {
                // What is said to be held is as good as acknowledged.
                drop(safe.await);
                // The client may have gone meanwhile; it asks again.
                let _gone = reply.send(versions);
            });
        }
        XdsEvent::Connected => owner.connection = Ok(()),
        XdsEvent::Disconnected { reason } => owner.disconnected(reason),
        XdsEvent::Delta { delta, rejected, synced, applied } => {
            let saved = record.write(owner.news(&delta)).await;
            let before = owner.source;
            let refused = owner.apply(delta, &rejected, synced, Instant::now());
            if owner.source != before {
                // The first answer is through: its messages were as large as what is kept of them.
                drop(tokio::task::spawn_blocking(|| {
                    memory::give_back();
                    if let Err(error) = memory::forget_start() {
                        debug!(%error, "the pages that were needed to start are kept");
                    }
                }));
            }
            let _gone = applied.send(Applied { refused, saved });
        }
        XdsEvent::Policies { update, synced, applied } => {
            let saved = record.write(owner.policy_news(&update, synced)).await;
            owner.apply_policies(update, synced);
            let _gone = applied.send(Applied { refused: Vec::new(), saved });
        }
    }
}

/// Somebody is debugging: looking often enough is simpler than being woken.
async fn read_kernel_log(mut logger: aya_log::EbpfLogger<&'static dyn log::Log>) {
    let mut look = interval(KERNEL_LOG);
    loop {
        look.tick().await;
        logger.flush();
    }
}

fn log_to_stderr(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "info".into());
    let colours = std::io::stderr().is_terminal();
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}
