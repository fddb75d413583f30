//! A directory of manifests and a control plane over it.

use std::{fs, path::PathBuf};

use mesh_common::api::mesh::v1::{StatusRequest, StatusResponse, management_client::ManagementClient};
use mesh_control::{Config, ControlPlane};
use tempfile::TempDir;
use tokio::time::{Duration, Instant, sleep};

use crate::{
    client::{TOKEN, TOKEN_B},
    subscriber::Subscriber,
};

/// Nothing here should take this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) control: ControlPlane,
    pub(crate) config: Config,
    /// Authority and tokens.
    pub(crate) state: TempDir,
}

/// Options on the loopback address, with the two tokens.
pub(crate) fn config(manifests: impl Into<PathBuf>) -> (Config, TempDir) {
    let state = tempfile::tempdir().unwrap();
    fs::write(state.path().join("join-tokens"), format!("* {TOKEN}\nnode-b {TOKEN_B}\n")).unwrap();
    (Config::on_loopback(manifests, state.path()), state)
}

impl World {
    pub(crate) async fn start(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let manifests = dir.path().to_owned();
        Self::over(dir, manifests).await
    }

    /// Over a directory of manifests that is `dir` or in it.
    pub(crate) async fn over(dir: TempDir, manifests: impl Into<PathBuf>) -> Self {
        let (config, state) = config(manifests);
        Self::with(dir, config, state).await
    }

    pub(crate) async fn with(dir: TempDir, config: Config, state: TempDir) -> Self {
        let control = ControlPlane::start(config.clone()).await.unwrap();
        Self { dir, control, config, state }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).unwrap();
    }

    /// A subscriber to everything that has received all there is.
    pub(crate) async fn subscriber(&self) -> Subscriber {
        let mut subscriber = Subscriber::connect(self).await;
        subscriber.sync().await;
        subscriber
    }

    pub(crate) async fn status(&self) -> StatusResponse {
        let url = format!("http://{}", self.control.management_address());
        ManagementClient::connect(url).await.unwrap().status(StatusRequest {}).await.unwrap().into_inner()
    }

    /// The status once it is as wanted.
    pub(crate) async fn status_when(&self, wanted: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status().await;
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "still {status:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Reported faults as (file name, document, field, reason), once there are any.
    pub(crate) async fn faults(&self) -> Vec<(String, u32, String, String)> {
        let status = self.status_when(|status| !status.file_errors.is_empty()).await;
        let root = format!("{}/", self.dir.path().display());
        let fault = |e: mesh_common::api::mesh::v1::FileError| {
            (e.file.replace(&root, ""), e.document, e.field, e.reason)
        };
        status.file_errors.into_iter().map(fault).collect()
    }
}
