//! Running other programs: every failure names the command line.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A cargo command in the repository, free of the toolchain choice that `cargo xtask` was started with.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(super::paths::root());
    forget_outer_cargo(&mut command);
    command
}

/// Removes what an outer cargo and rustup put into the environment for themselves: an inner cargo that is another
/// version must not see it.
pub(crate) fn forget_outer_cargo(command: &mut Command) {
    for name in
        ["CARGO", "RUSTUP_TOOLCHAIN", "RUST_RECURSION_COUNT", "CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH"]
    {
        command.env_remove(name);
    }
    let package = std::env::vars_os().map(|(name, _)| name);
    for name in package.filter(|name| name.to_string_lossy().starts_with("CARGO_PKG_")) {
        command.env_remove(name);
    }
}

/// The command as a person would type it (without quoting).
pub(crate) fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Runs with output on the terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Runs, and returns standard output; standard error is part of the message on failure.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{}`", line(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", line(command), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs with output on the terminal and hands each line of standard output to `seen`. Returns whether it succeeded.
pub(crate) fn watch(command: &mut Command, seen: impl FnMut(&str)) -> Result<bool> {
    watch_as("", command, seen)
}

/// As [`watch`], with each line after `prefix` on the terminal: for several commands at once.
pub(crate) fn watch_as(prefix: &str, command: &mut Command, mut seen: impl FnMut(&str)) -> Result<bool> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", line(command)))?;
    let stdout = child.stdout.take().context("no pipe to the child")?;
    for text in BufReader::new(stdout).split(b'\n') {
        let text = text.context("cannot read from the child")?;
        let text = String::from_utf8_lossy(&text);
        let text = text.trim_end_matches('\r');
        // A closed terminal must not end the run before its verdict.
        drop(writeln!(std::io::stdout(), "{prefix}{text}"));
        seen(text);
    }
    Ok(child.wait().context("cannot wait for the child")?.success())
}

/// Says what is being done, does it, and says how long it took.
pub(crate) fn timed<T>(what: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("xtask: {what} …");
    let start = Instant::now();
    let done = action().with_context(|| what.to_owned())?;
    println!("xtask: {what}: {}", seconds(start.elapsed()));
    Ok(done)
}

/// A duration for reading.
pub(crate) fn seconds(time: Duration) -> String {
    let whole = time.as_secs();
    if whole < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {:02} s", whole / 60, whole % 60)
    }
}
