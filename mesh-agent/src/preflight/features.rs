//! Asks the kernel for each feature of the programs by loading a tiny one that uses it.

use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported};

/// Name of each feature, and whether the kernel has it.
pub(super) fn probe() -> Vec<(&'static str, Result<bool, String>)> {
    let maps = [
        ("map hash", MapType::Hash),
        ("map array", MapType::Array),
        ("map lru_hash", MapType::LruHash),
        ("map percpu_hash", MapType::PerCpuHash),
        ("map percpu_array", MapType::PerCpuArray),
        ("map sk_storage", MapType::SkStorage),
        ("map lpm_trie", MapType::LpmTrie),
        ("map ringbuf", MapType::RingBuf),
    ];
    let programs = [
        ("program cgroup/sock_create", ProgramType::CgroupSock),
        ("program cgroup/sock_addr", ProgramType::CgroupSockAddr),
        ("program sock_ops", ProgramType::SockOps),
        ("program sk_lookup", ProgramType::SkLookup),
    ];
    let helpers = [
        (
            "bpf_sk_storage_get in cgroup/sock_create",
            ProgramType::CgroupSock,
            BpfHelper::BPF_FUNC_sk_storage_get,
        ),
        (
            "bpf_sk_storage_get in cgroup/sock_addr",
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_sk_storage_get,
        ),
        ("bpf_sk_storage_get in sock_ops", ProgramType::SockOps, BpfHelper::BPF_FUNC_sk_storage_get),
        (
            "bpf_get_current_ancestor_cgroup_id in cgroup/sock_create",
            ProgramType::CgroupSock,
            BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id,
        ),
        ("bpf_set_retval in cgroup/sock_addr", ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval),
        (
            "bpf_get_netns_cookie in cgroup/sock_addr",
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_get_netns_cookie,
        ),
        ("bpf_get_netns_cookie in sock_ops", ProgramType::SockOps, BpfHelper::BPF_FUNC_get_netns_cookie),
        ("bpf_ringbuf_output in sk_lookup", ProgramType::SkLookup, BpfHelper::BPF_FUNC_ringbuf_output),
        (
            "bpf_get_socket_cookie in cgroup/sock_addr",
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_get_socket_cookie,
        ),
    ];
    let maps = maps.map(|(name, kind)| (name, is_map_supported(kind).map_err(|error| chain(&error))));
    let programs =
        programs.map(|(name, kind)| (name, is_program_supported(kind).map_err(|error| chain(&error))));
    let helpers = helpers
        .map(|(name, kind, helper)| (name, is_helper_supported(kind, helper).map_err(|error| chain(&error))));
    maps.into_iter().chain(programs).chain(helpers).collect()
}

/// An error and its causes: aya's own words only name the call.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut text: Vec<String> = causes.map(ToString::to_string).collect();
    text.dedup();
    text.join(": ")
}
