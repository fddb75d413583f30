//! Workloads are cgroups: pods of every kind, services of the host, and how fast they are enrolled.

use std::time::{Duration, Instant};

use anyhow::Context;
use mesh_harness::cgroup::{Driver, Qos};
use mesh_harness::pod::Place;
use mesh_harness::{Service, needs, peer, until};
use mesh_tests::Mesh;
use serde_json::Value;

/// The enrolled workload of this name, once it has a cgroup.
fn enrolled(mesh: &Mesh, name: &str) -> anyhow::Result<Value> {
    mesh.agents[0].wait_for_workloads(&[name])?;
    let workloads = mesh.agents[0].workloads()?;
    workloads.into_iter().find(|workload| workload["name"] == name).context("it has gone again")
}

fn connections_of(mesh: &Mesh, source: &str) -> anyhow::Result<u64> {
    let stats = mesh.agents[0].stats()?;
    let counted = stats["connections"].as_array().cloned().unwrap_or_default();
    let of = |row: &Value| (row["source"] == source).then(|| row["connections"].as_u64().unwrap_or(0));
    Ok(counted.iter().filter_map(of).sum())
}

#[test]
fn pods_of_both_drivers_and_all_classes_are_enrolled() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let mut pods = Vec::new();
    for driver in [Driver::Systemd, Driver::Cgroupfs] {
        for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            let mut plan = mesh.nodes[0].plan(&format!("{driver:?}-{qos:?}").to_lowercase());
            plan.place = Place::Kubernetes(driver, qos);
            mesh.cluster.manifests().put_pods([&plan])?;
            pods.push(plan.start()?);
        }
    }
    for pod in &pods {
        let workload = enrolled(&mesh, &pod.name)?;
        assert_eq!(workload["namespace"], "default");
        let ids: Vec<_> = workload["cgroups"].as_array().unwrap().iter().map(|c| c["id"].as_u64()).collect();
        let (container, parent) = (pod.cgroup().path(), pod.cgroup().path().parent().unwrap());
        let id = |path| std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::ino(&m)).ok();
        assert!(ids.contains(&id(container)) || ids.contains(&id(parent)), "{workload}");
    }
    Ok(())
}

#[test]
fn a_workload_that_was_announced_is_enrolled_within_ten_milliseconds() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let plans: Vec<_> = (0..20).map(|i| mesh.nodes[0].plan(&format!("late{i}"))).collect();
    mesh.cluster.manifests().put_pods(&plans)?;
    until("all are announced", Duration::from_secs(10), || {
        let known = mesh.agents[0].workloads()?.len();
        anyhow::ensure!(known >= plans.len(), "{known} are known");
        Ok(())
    })?;
    let networks = plans.iter().map(|plan| plan.network()).collect::<Result<Vec<_>, _>>()?;
    let (mut times, mut pods) = (Vec::new(), Vec::new());
    for (plan, network) in plans.into_iter().zip(networks) {
        let name = plan.name.clone();
        let pod = plan.start_with(network)?;
        let created = Instant::now();
        until("it is enrolled", Duration::from_secs(5), || {
            let workloads = mesh.agents[0].workloads()?;
            let it = workloads.iter().find(|workload| workload["name"] == name.as_str());
            let cgroups = it.and_then(|it| it["cgroups"].as_array()).map_or(0, Vec::len);
            anyhow::ensure!(cgroups > 0, "not yet");
            Ok(())
        })?;
        times.push(created.elapsed());
        pods.push(pod);
    }
    times.sort_unstable();
    // The waiting itself asks every 5 ms.
    assert!(times[times.len() / 2] < Duration::from_millis(10), "{times:?}");
    assert!(times[times.len() - 1] < Duration::from_millis(30), "{times:?}");
    Ok(())
}

#[test]
fn the_first_connect_of_a_new_container_is_counted_as_its_own() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a")])?;
    let address = mesh.serve_all(&Service::new("web", [10, 96, 0, 1]).tcp(80, 8080), &servers)?;
    let plan = mesh.nodes[0].plan("newcomer");
    mesh.cluster.manifests().put_pods([&plan])?;
    until("it is announced", Duration::from_secs(10), || {
        let known = mesh.agents[0].workloads()?.iter().any(|workload| workload["name"] == "newcomer");
        anyhow::ensure!(known, "not yet");
        Ok(())
    })?;
    let network = plan.network()?;
    let pod = plan.start_with(network)?;
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(peer::connect(&pod, &address).count(3).run()?.answered, 3);
    let uid = enrolled(&mesh, "newcomer")?["uid"].as_str().unwrap().to_owned();
    assert_eq!(uid, "Kubernetes//Pod/default/newcomer");
    assert_eq!(connections_of(&mesh, &uid)?, 3, "{}", mesh.agents[0].stats()?);
    Ok(())
}

#[test]
fn a_workload_entry_names_any_cgroup() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a")])?;
    let address = mesh.serve_all(&Service::new("web", [10, 96, 0, 1]).tcp(80, 8080), &servers)?;
    let cron = mesh.nodes[0].host_workload("cron", "system.slice/cron.service")?;
    mesh.cluster.manifests().put("cron", &[cron.workload_entry()])?;
    let workload = enrolled(&mesh, "cron")?;
    assert_eq!(workload["cgroups"][0]["id"], cron.cgroup().id()?, "{workload}");
    assert_eq!(peer::connect(&cron, &address).count(7).run()?.answered, 7);
    let uid = workload["uid"].as_str().unwrap();
    assert_eq!(uid, "Kubernetes/networking.istio.io/WorkloadEntry/default/cron");
    assert_eq!(connections_of(&mesh, uid)?, 7, "{}", mesh.agents[0].stats()?);
    Ok(())
}

#[test]
fn a_pod_that_is_gone_is_no_longer_enrolled() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let pod = mesh.client(0, "brief")?;
    let pod_cgroup = pod.cgroup().path().parent().unwrap().to_owned();
    drop(pod);
    std::fs::remove_dir(pod_cgroup)?;
    until("its cgroup is forgotten", Duration::from_secs(5), || {
        let workloads = mesh.agents[0].workloads()?;
        let it = workloads.iter().find(|workload| workload["name"] == "brief");
        let cgroups = it.and_then(|it| it["cgroups"].as_array()).map_or(0, Vec::len);
        anyhow::ensure!(cgroups == 0, "{workloads:?}");
        Ok(())
    })
}
