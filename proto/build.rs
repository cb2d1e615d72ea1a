//! Generates the wire types into `OUT_DIR`, without protoc.
use std::{env, error::Error, fs, path::PathBuf};

use protox::prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=secondwind");
    let files = [
        "secondwind/v1/cluster.proto",
        "secondwind/v1/inference.proto",
        "secondwind/v1/peer.proto",
    ];
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("secondwind.v1.bin");
    fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
