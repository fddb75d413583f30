//! The kernel programs' own log.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use ::log::{Log, Metadata, Record};
use anyhow::{Context, Result, ensure};
use aya_log::EbpfLogger;
use mesh_agent::config::{DatapathConfig, KernelLog};
use mesh_agent::datapath::Datapath;
use mesh_common::abi::{Algorithm, Reason};

use super::Test;
use super::scene::{SIZES, Scene, frontend, put};
use crate::traffic::{VIP4, refused};

/// The tests.
pub(super) const TESTS: &[Test] =
    &[Test { name: "log::a_refused_connection_is_logged_when_asked_for", run: logged }];

/// Lines as they come.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if let Ok(mut lines) = self.0.lock() {
            lines.push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

fn logged(scene: &mut Scene) -> Result<()> {
    let vip: SocketAddr = (VIP4, 80).into();
    let mut silent = scene.start(SIZES, &[("shop", frontend(vip, Algorithm::RoundRobin, &[]))])?;
    let without = verified(&mut silent)?;
    drop(silent);
    let mut agent =
        Datapath::prepare(&DatapathConfig { kernel_log: KernelLog::Debug, ..scene.config(SIZES) })
            .context("with a log")?;
    for (program, with) in verified(&mut agent)? {
        let without = without.get(&program).copied().unwrap_or_default();
        println!("verified {program}: {without} instructions without a log, {with} with one");
    }
    put(&mut agent, &[("shop", frontend(vip, Algorithm::RoundRobin, &[]))])?;
    agent.attach()?;
    let lines = Lines::default();
    let mut logger = EbpfLogger::init_with_logger(agent.ebpf(), lines.clone())?;
    refused(TcpStream::connect(vip))?;
    logger.flush();
    let lines = lines.0.lock().map_err(|_poisoned| anyhow::anyhow!("a logger panicked"))?.clone();
    let expected = format!("refused, reason {}", Reason::NoBackends as u32);
    ensure!(lines == [expected.clone()], "logged {lines:?} instead of {expected:?}");
    Ok(())
}

/// Instructions that the verifier walked; 0 where the kernel does not say.
fn verified(agent: &mut Datapath) -> Result<BTreeMap<String, u32>> {
    let of = |(name, program): (&str, &aya::programs::Program)| {
        Ok((name.to_owned(), program.info()?.verified_instruction_count().unwrap_or(0)))
    };
    agent.ebpf().programs().map(of).collect()
}
