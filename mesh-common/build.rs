//! Compiles the `.proto` files with `protox`, so that no `protoc` is needed.

#[cfg(feature = "api")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    const FILES: [&str; 6] = [
        "envoy/service/discovery/v3/ads.proto",
        "istio/authorization.proto",
        "istio/ca.proto",
        "istio/workload.proto",
        "mesh/v1/extension.proto",
        "mesh/v1/management.proto",
    ];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().build_client(true).build_server(true).compile_fds(descriptors)?;
    Ok(())
}

#[cfg(not(feature = "api"))]
fn main() {}
