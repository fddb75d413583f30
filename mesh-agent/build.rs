//! Embeds the kernel programs, if `cargo xtask build-ebpf` has built them; without them the agent builds and says so.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap_or_default()).join("../target/bpf");
    // Watching the folder, which exists from now on, rebuilds the agent when the object appears or changes.
    fs::create_dir_all(&folder)?;
    println!("cargo::rerun-if-changed={}", folder.display());
    let out = Path::new(&env::var("OUT_DIR").unwrap_or_default()).join("mesh.o");
    match fs::read(folder.join("mesh.o")) {
        Ok(object) => fs::write(out, object),
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::write(out, b""),
        Err(error) => Err(error),
    }
}
