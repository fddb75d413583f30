use std::os::unix::fs::symlink;

use super::*;
use crate::fixtures::Directory;

/// A tree of cgroups and processes, made of plain files.
struct Machine {
    places: Places,
    _root: Directory,
}

impl Machine {
    fn new() -> Self {
        let root = Directory::new();
        for part in ["cgroups", "proc", "namespaces"] {
            fs::create_dir(root.path().join(part)).unwrap();
        }
        fs::write(root.path().join("namespaces/home"), "").unwrap();
        let home = Inode::of(&fs::metadata(root.path().join("namespaces/home")).unwrap());
        let places =
            Places { cgroups: root.path().join("cgroups"), processes: root.path().join("proc"), home };
        Self { places, _root: root }
    }

    fn cgroup(&self, path: &str, processes: &[u32]) {
        let at = self.places.cgroups.join(path);
        fs::create_dir_all(&at).unwrap();
        let lines: String = processes.iter().map(|process| format!("{process}\n")).collect();
        fs::write(at.join("cgroup.procs"), lines).unwrap();
    }

    fn process(&self, process: u32, started: u64, namespace: &str) {
        let at = self.places.processes.join(process.to_string());
        fs::create_dir_all(at.join("ns")).unwrap();
        let file = self.places.processes.with_file_name("namespaces").join(namespace);
        fs::write(&file, "").unwrap();
        drop(fs::remove_file(at.join("ns/net")));
        symlink(file, at.join("ns/net")).unwrap();
        let zeros = vec!["0"; 18].join(" ");
        fs::write(at.join("stat"), format!("{process} (a) b) S {zeros} {started} 0")).unwrap();
    }

    fn look(&self) -> Look {
        self.places.look(&[PathBuf::from("pod")])
    }

    fn found(&self) -> u32 {
        match self.look() {
            Look::Inside(found) => found.process,
            other @ (Look::Nobody | Look::Host | Look::Hidden) => panic!("{other:?}"),
        }
    }
}

#[test]
fn processes_are_below_the_cgroup_of_the_pod() {
    let machine = Machine::new();
    machine.cgroup("pod", &[]);
    assert!(matches!(machine.look(), Look::Nobody));
    machine.process(7, 100, "pod");
    machine.cgroup("pod/container/init.scope", &[7]);
    assert_eq!(machine.found(), 7);
}

#[test]
fn the_nodes_own_namespace_is_none_of_the_pods() {
    let machine = Machine::new();
    machine.process(7, 100, "home");
    machine.cgroup("pod", &[7]);
    assert!(matches!(machine.look(), Look::Host));
}

#[test]
fn processes_of_another_process_namespace_are_told_apart_from_none() {
    let machine = Machine::new();
    machine.cgroup("pod", &[0, 0]);
    assert!(matches!(machine.look(), Look::Hidden));
}

#[test]
fn what_a_process_has_made_for_itself_is_not_the_pods() {
    let machine = Machine::new();
    machine.process(7, 300, "sandbox-of-a-browser");
    machine.process(8, 100, "pod");
    machine.process(9, 500, "pod");
    for order in [[7, 8, 9], [9, 8, 7], [9, 7, 8]] {
        machine.cgroup("pod/a", &order);
        assert_eq!(machine.found(), 8);
    }
    // A process in the node's namespace that made itself another one.
    machine.process(8, 100, "home");
    machine.process(9, 200, "home");
    assert!(matches!(machine.look(), Look::Host));
}

#[test]
fn an_end_and_another_namespace_are_noticed() {
    let machine = Machine::new();
    machine.process(7, 100, "pod");
    machine.cgroup("pod", &[7]);
    let Look::Inside(found) = machine.look() else { panic!() };
    assert!(machine.places.holds(found.process, found.inode));
    machine.process(7, 100, "another");
    assert!(!machine.places.holds(found.process, found.inode));
    fs::remove_dir_all(machine.places.processes.join("7")).unwrap();
    assert!(!machine.places.holds(found.process, found.inode));
    assert!(matches!(machine.look(), Look::Nobody));
}

#[test]
fn a_workload_cannot_make_the_look_endless() {
    let machine = Machine::new();
    machine.cgroup("pod", &vec![1_000_000; 50_000]);
    for child in 0..2 * CGROUPS {
        machine.cgroup(&format!("pod/{child}"), &[]);
    }
    assert_eq!(machine.places.members(&[PathBuf::from("pod")]).len(), PROCESSES);
    assert!(matches!(machine.look(), Look::Nobody));
}

#[test]
fn the_own_processes_are_at_home() {
    let places = Places::new(PathBuf::from("/sys/fs/cgroup")).unwrap();
    assert!(places.holds(std::process::id(), places.home));
}
