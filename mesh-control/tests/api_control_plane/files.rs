//! The directory: bad files, editors' ways of saving, links, directories, duplicates.

use std::{fs, os::unix::fs::symlink};

use mesh_control::{Config, ControlPlane};

use crate::{manifests::*, subscriber::Told, world::World};

#[tokio::test]
async fn a_bad_file_is_reported_and_its_good_content_stays() {
    let world = World::start(&[("web.yaml", &web()), ("a.yaml", &pod("a", "10.0.0.1"))]).await;
    let mut subscriber = world.subscriber().await;
    world.write(
        "web.yaml",
        &file(&[
            service("new", "clusterIP: 10.96.0.7, ports: [{port: 1}]"),
            web().replace("port: 80", "port: 80000"),
        ]),
    );
    let faults = world.faults().await;
    assert_eq!(faults.len(), 1);
    assert_eq!(
        (faults[0].0.as_str(), faults[0].1, faults[0].2.as_str()),
        ("web.yaml", 2, "spec.ports[0].port")
    );
    assert!(faults[0].3.contains("80000"), "{}", faults[0].3);
    // Nothing of the file is applied, its other document neither.
    subscriber.nothing().await;

    world.write("web.yaml", &web().replace("10.96.0.1", "10.96.0.3"));
    assert_eq!(subscriber.next().await.put, [WEB]);
    world.status_when(|status| status.file_errors.is_empty()).await;
}

#[tokio::test]
async fn a_file_that_was_emptied_keeps_what_it_held() {
    let world = World::start(&[("web.yaml", &web())]).await;
    let mut subscriber = world.subscriber().await;
    world.write("web.yaml", "\n");
    let faults = world.faults().await;
    assert_eq!(faults.len(), 1);
    assert!(faults[0].3.contains("is empty"), "{}", faults[0].3);
    subscriber.nothing().await;
    world.write("web.yaml", &web().replace("10.96.0.1", "10.96.0.3"));
    assert_eq!(subscriber.next().await.put, [WEB]);
    world.status_when(|status| status.file_errors.is_empty()).await;
}

#[tokio::test]
async fn a_bad_file_at_the_start_does_not_keep_the_others_out() {
    let world = World::start(&[("bad.yaml", "kind: ["), ("web.yaml", &web())]).await;
    assert_eq!(world.subscriber().await.held.len(), 1);
    let (file, document, _, reason) = world.faults().await.remove(0);
    assert_eq!((file.as_str(), document), ("bad.yaml", 1));
    assert!(reason.contains("line"), "{reason}");
    world.remove("bad.yaml");
    world.status_when(|status| status.file_errors.is_empty()).await;
}

#[tokio::test]
async fn text_that_is_none_is_reported() {
    let world = World::start(&[("web.yaml", &web())]).await;
    let mut subscriber = world.subscriber().await;
    fs::write(world.path("web.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    let (file, document, _, reason) = world.faults().await.remove(0);
    assert_eq!((file.as_str(), document), ("web.yaml", 0));
    assert!(reason.contains("UTF-8"), "{reason}");
    subscriber.nothing().await;
}

#[tokio::test]
async fn a_file_renamed_over_another_is_a_change_and_a_rename_alone_is_none() {
    let world = World::start(&[("web.yaml", &web())]).await;
    let mut subscriber = world.subscriber().await;
    world.write(".web.yaml.tmp", &web().replace("10.96.0.1", "10.96.0.2"));
    subscriber.nothing().await;
    fs::rename(world.path(".web.yaml.tmp"), world.path("web.yaml")).unwrap();
    assert_eq!(subscriber.next().await.put, [WEB]);
    fs::rename(world.path("web.yaml"), world.path("renamed.yaml")).unwrap();
    subscriber.nothing().await;
    assert_eq!(world.status().await.file_errors, []);
}

#[tokio::test]
async fn a_writer_that_takes_its_time_is_waited_for() {
    use std::io::Write as _;
    let world = World::start(&[("web.yaml", &web())]).await;
    let mut subscriber = world.subscriber().await;
    let text = file(&[web().replace("10.96.0.1", "10.96.0.2"), pod("a", "10.0.0.1")]);
    let (head, tail) = text.split_at(text.len() / 2);
    let mut open = fs::File::create(world.path("web.yaml")).unwrap();
    open.write_all(head.as_bytes()).unwrap();
    subscriber.nothing().await;
    open.write_all(tail.as_bytes()).unwrap();
    drop(open);
    assert_eq!(subscriber.next().await.put, [pod_uid("a"), WEB.to_owned()]);
    assert_eq!(world.status().await.file_errors, []);
}

#[tokio::test]
async fn a_mounted_config_map_is_swapped_as_kubernetes_does() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let publish = |version: &str, text: &str| {
        fs::create_dir(root.join(version)).unwrap();
        fs::write(root.join(version).join("web.yaml"), text).unwrap();
        symlink(version, root.join("..data_tmp")).unwrap();
        fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
    };
    publish("..1", &web());
    symlink("..data/web.yaml", root.join("web.yaml")).unwrap();
    let control = ControlPlane::start(Config::on_loopback(root)).await.unwrap();
    let world = World { dir, control };
    let mut subscriber = world.subscriber().await;
    assert_eq!(subscriber.held.len(), 1);
    let root = world.dir.path();
    let publish = |version: &str, text: &str| {
        fs::create_dir(root.join(version)).unwrap();
        fs::write(root.join(version).join("web.yaml"), text).unwrap();
        symlink(version, root.join("..data_tmp")).unwrap();
        fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
    };
    publish("..2", &web().replace("10.96.0.1", "10.96.0.2"));
    fs::remove_dir_all(root.join("..1")).unwrap();
    assert_eq!(subscriber.next().await.put, [WEB]);
    assert_eq!(subscriber.service(WEB).0.addresses[0].address, [10, 96, 0, 2]);
    subscriber.nothing().await;
}

#[tokio::test]
async fn directories_below_are_read_moved_and_removed() {
    let world = World::start(&[]).await;
    let mut subscriber = world.subscriber().await;
    fs::create_dir_all(world.path("a/b")).unwrap();
    world.write("a/b/web.yaml", &web());
    assert_eq!(subscriber.next().await.put, [WEB]);
    fs::rename(world.path("a"), world.path("c")).unwrap();
    subscriber.nothing().await;
    // The moved directory is still watched, at its new place.
    world.write("c/b/web.yaml", &web().replace("10.96.0.1", "10.96.0.2"));
    assert_eq!(subscriber.next().await.put, [WEB]);
    fs::remove_dir_all(world.path("c")).unwrap();
    assert_eq!(subscriber.next().await, Told { put: vec![], removed: vec![WEB.to_owned()] });
}

#[tokio::test]
async fn a_lost_directory_keeps_its_content_and_is_found_again() {
    let parent = tempfile::tempdir().unwrap();
    let root = parent.path().join("manifests");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("web.yaml"), web()).unwrap();
    let control = ControlPlane::start(Config::on_loopback(&root)).await.unwrap();
    let world = World { dir: parent, control };
    let mut subscriber = world.subscriber().await;
    fs::rename(&root, world.path("away")).unwrap();
    let (file, _, _, reason) = world.faults().await.remove(0);
    assert_eq!(file, "manifests");
    assert!(reason.contains("stays in force"), "{reason}");
    subscriber.nothing().await;
    fs::create_dir(&root).unwrap();
    fs::write(root.join("web.yaml"), web().replace("10.96.0.1", "10.96.0.2")).unwrap();
    assert_eq!(subscriber.next().await.put, [WEB]);
    world.status_when(|status| status.file_errors.is_empty()).await;
    fs::write(root.join("web.yaml"), web().replace("10.96.0.1", "10.96.0.3")).unwrap();
    assert_eq!(subscriber.next().await.put, [WEB]);
}

#[tokio::test]
async fn of_two_definitions_the_first_stays_in_force() {
    let world = World::start(&[("b.yaml", &web())]).await;
    let mut subscriber = world.subscriber().await;
    world.write("a.yaml", &web().replace("10.96.0.1", "10.96.0.2"));
    let (file, document, field, reason) = world.faults().await.remove(0);
    assert_eq!((file.as_str(), document, field.as_str()), ("a.yaml", 1, "metadata.name"));
    assert!(reason.contains("b.yaml"), "{reason}");
    subscriber.nothing().await;
    world.remove("b.yaml");
    assert_eq!(subscriber.next().await.put, [WEB]);
    assert_eq!(subscriber.service(WEB).0.addresses[0].address, [10, 96, 0, 2]);
}

#[tokio::test]
async fn an_address_has_one_service_for_each_port_and_protocol() {
    let taken = "clusterIP: 10.96.0.1, ports: [{name: a, port: 80}, {name: b, port: 81}, {name: c, port: 80, protocol: UDP}]";
    let world = World::start(&[("a.yaml", &web()), ("b.yaml", &service("late", taken))]).await;
    let mut subscriber = world.subscriber().await;
    let late = "shop/late.shop.svc.cluster.local";
    let (service, extension) = subscriber.service(late);
    assert_eq!(service.ports.iter().map(|p| p.service_port).collect::<Vec<_>>(), [81]);
    assert_eq!(extension.udp_ports.len(), 1);
    let (file, document, field, reason) = world.faults().await.remove(0);
    assert_eq!((file.as_str(), document, field.as_str()), ("b.yaml", 1, "spec.ports[0].port"));
    assert!(reason.contains("80/TCP") && reason.contains(WEB), "{reason}");
    world.remove("a.yaml");
    assert_eq!(subscriber.next().await, Told { put: vec![late.to_owned()], removed: vec![WEB.to_owned()] });
    assert_eq!(subscriber.service(late).0.ports.len(), 2);
    world.status_when(|status| status.file_errors.is_empty()).await;
}

#[tokio::test]
async fn a_missing_directory_is_named_with_its_option() {
    let error = ControlPlane::start(Config::on_loopback("/nowhere/manifests")).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("--manifests /nowhere/manifests") && text.contains("No such file"), "{text}");
}

#[tokio::test]
async fn foreign_kinds_are_told_and_do_no_harm() {
    let text = file(&["apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n".to_owned(), web()]);
    let world = World::start(&[("all.yaml", &text)]).await;
    assert_eq!(world.subscriber().await.held.len(), 1);
    let (_, document, field, reason) = world.faults().await.remove(0);
    assert_eq!((document, field.as_str()), (1, "kind"));
    assert!(reason.contains("skipped"), "{reason}");
}

#[tokio::test]
async fn a_manifest_that_became_invalid_outlives_a_restart() {
    let World { dir, control } =
        World::start(&[("web.yaml", &web()), ("pod.yaml", &pod("a", "10.0.0.1"))]).await;
    control.stop().await.unwrap();
    // Nobody was there to see it: one is invalid now, one is withdrawn.
    fs::write(dir.path().join("web.yaml"), "kind: [").unwrap();
    fs::remove_file(dir.path().join("pod.yaml")).unwrap();
    let control = ControlPlane::start(Config::on_loopback(dir.path())).await.unwrap();
    let world = World { dir, control };
    let mut subscriber = world.subscriber().await;
    assert_eq!(subscriber.held.keys().collect::<Vec<_>>(), [WEB]);
    assert_eq!(world.faults().await.len(), 1);
    // Withdrawn now, it does not come back.
    world.remove("web.yaml");
    assert_eq!(subscriber.next().await, Told { put: vec![], removed: vec![WEB.to_owned()] });
    let World { dir, control } = world;
    control.stop().await.unwrap();
    fs::write(dir.path().join("web.yaml"), "kind: [").unwrap();
    let control = ControlPlane::start(Config::on_loopback(dir.path())).await.unwrap();
    let world = World { dir, control };
    assert_eq!(world.subscriber().await.held.len(), 0);
}

#[tokio::test]
async fn a_state_directory_that_cannot_be_is_named_with_its_option() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let config = Config { state_dir: dir.path().join("file/state"), ..Config::on_loopback(dir.path()) };
    let text = format!("{:#}", ControlPlane::start(config).await.unwrap_err());
    assert!(text.contains("--state-dir") && text.contains("Not a directory"), "{text}");
}
