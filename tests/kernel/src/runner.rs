//! Runs tests one after the other and says `ok NAME` or `FAILED NAME: why`, then counts.

use std::any::Any;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::loader::{self, Scene};
use crate::programs;
use crate::sandbox::Sandbox;

/// A test and its name, `hook::what it claims`.
#[derive(Clone, Copy)]
pub struct Test {
    /// The name.
    pub name: &'static str,
    /// The test.
    pub run: fn(&mut Sandbox) -> Result<()>,
}

/// Runs the tests whose name contains `filter`. The last line, `kernel tests: N passed, M failed`, is the verdict: in a
/// virtual machine nothing else tells success from a crash.
pub fn run(filter: &str) -> ExitCode {
    let (mut passed, mut failed) = (0, 0);
    let mut tell = |name: &str, start: Instant, result: Result<()>| match result {
        Ok(()) => {
            println!("ok {name} ({} ms)", start.elapsed().as_millis());
            passed += 1;
        }
        Err(error) => {
            println!("FAILED {name}: {}", shortened(&format!("{error:#}").replace('\n', " ")));
            failed += 1;
        }
    };
    let start = Instant::now();
    // One agent waits ten seconds for another: long enough for all the rest.
    let waiting = loader::WAITING.name.contains(filter).then(|| std::thread::spawn(loader::WAITING.run));
    match programs::load() {
        Ok(mut ebpf) => {
            tell("load::every_program", start, programs::describe(&ebpf));
            for test in crate::all().into_iter().filter(|test| test.name.contains(filter)) {
                let run = || (test.run)(&mut Sandbox::enter(test.name, &mut ebpf)?);
                tell(test.name, Instant::now(), alone(test.name, run));
            }
        }
        Err(error) => tell("load::every_program", start, Err(error)),
    }
    for test in loader::tests().into_iter().filter(|test| test.name.contains(filter)) {
        tell(test.name, Instant::now(), alone(test.name, || (test.run)(&mut Scene::enter(test.name)?)));
    }
    if let Some(waiting) = waiting {
        tell(loader::WAITING.name, start, waiting.join().unwrap_or_else(|panic| Err(panicked(&*panic))));
    }
    println!("kernel tests: {passed} passed, {failed} failed");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The verifier explains itself at length, and says what it refuses last.
fn shortened(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let (first, last) = (300, 1200);
    if characters.len() <= first + last {
        return text.to_owned();
    }
    let part = |range: &[char]| range.iter().collect::<String>();
    format!("{} [...] {}", part(&characters[..first]), part(&characters[characters.len() - last..]))
}

/// On a thread of its own, since a network namespace belongs to a thread. A panic is a failure.
fn alone(name: &str, run: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, run)?;
        thread.join().unwrap_or_else(|panic| Err(panicked(&*panic)))
    })
}

fn panicked(panic: &(dyn Any + Send)) -> anyhow::Error {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    anyhow!("panicked: {}", text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default())
}

/// Waits until `condition` holds, for ten seconds at most (a virtual machine is slow).
pub fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition()? {
        if Instant::now() > end {
            return Err(anyhow!("not within ten seconds: {what}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
