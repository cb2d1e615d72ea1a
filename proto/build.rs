//! Generates the wire types into `OUT_DIR`, without protoc.
use std::{env, error::Error, fs, path::PathBuf};

use protox::prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    for folder in ["secondwind", "vllm", "kserve"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    let files = [
        "secondwind/v1/cluster.proto",
        "secondwind/v1/inference.proto",
        "secondwind/v1/peer.proto",
        "vllm/inference.proto",
        "vllm/control.proto",
        "kserve/grpc_service.proto",
    ];
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
