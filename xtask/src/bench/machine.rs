//! The machine on which something was measured.

use std::fs;

/// Kernel, processor, cores, memory, in one line.
pub(crate) fn describe() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = after(&read("/proc/meminfo"), "MemTotal");
    let kibibytes: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
    format!(
        "Linux {}, {} cores of {}, {} GiB",
        read("/proc/sys/kernel/osrelease").trim(),
        cores,
        after(&read("/proc/cpuinfo"), "model name"),
        kibibytes >> 20
    )
}
