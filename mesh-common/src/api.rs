//! Messages on the wires between agent, control plane and `meshctl`, generated from `proto/`.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated from the .proto files, which hold the documentation"
)]

/// Envoy's delta ADS.
pub mod envoy {
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                tonic::include_proto!("envoy.service.discovery.v3");
            }
        }
    }
}

/// `google.rpc.Status`.
pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

/// Istio's workload, policy and certificate APIs.
pub mod istio {
    pub mod v1 {
        pub mod auth {
            tonic::include_proto!("istio.v1.auth");
        }
    }
    pub mod security {
        tonic::include_proto!("istio.security");
    }
    pub mod workload {
        tonic::include_proto!("istio.workload");
    }
}

/// This mesh's own messages.
pub mod mesh {
    pub mod v1 {
        tonic::include_proto!("mesh.v1");
    }
}

/// End of `system_version_info` in a response of our control plane after which the client knows everything. The field is
/// free text to everybody else, and other control planes leave it out.
pub const COMPLETE: &str = ";complete";
/// How `system_version_info` ends on a response of our control plane that is not the last it has to say for now.
pub const MORE: &str = ";more";
/// Type URL of [`istio::workload::Address`] on ADS.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`istio::security::Authorization`] on ADS.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of [`mesh::v1::ServiceExtension`].
pub const SERVICE_EXTENSION_TYPE: &str = "type.googleapis.com/mesh.v1.ServiceExtension";
/// Type URL of [`mesh::v1::WorkloadExtension`].
pub const WORKLOAD_EXTENSION_TYPE: &str = "type.googleapis.com/mesh.v1.WorkloadExtension";
/// Name of [`mesh::v1::ServiceExtension`] in `Service.extensions`.
pub const SERVICE_EXTENSION: &str = "mesh.dev/service";
/// Name of [`mesh::v1::WorkloadExtension`] in `Workload.extensions`.
pub const WORKLOAD_EXTENSION: &str = "mesh.dev/workload";
