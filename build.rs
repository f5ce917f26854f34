//! Compiles the kernels of the `cuda` feature: one PTX per `src/ops/*/kernel.cu`, for compute capability 8.0 and up, and one per
//! `src/ops/*/hopper.cu`, for 9.0 alone; and of these machine code for the card that the build is for, which is the one at hand
//! or CUDA_COMPUTE_CAP's. For others the driver translates PTX when a program first starts, which takes it seconds.

#[cfg(feature = "cuda")]
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    for variable in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=src/ops");
    let out = std::env::var("OUT_DIR").expect("cargo names a folder for outputs");
    let mut folders: Vec<_> = std::fs::read_dir("src/ops").expect("src/ops").flatten().map(|it| it.path()).collect();
    folders.sort();
    let shared = std::iter::once(Path::new("src/ops").to_path_buf()).chain(folders.iter().cloned());
    let files = shared.filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten().map(|it| it.path());
    let headers: Vec<_> = files.filter(|file| file.extension().is_some_and(|end| end == "cuh")).collect();
    let card = cudaforge::detect_compute_cap().ok().map(|card| card.base()).filter(|card| *card >= 80);
    let assembler = assembler();
    let mut modules = String::new();
    let sources = folders.iter().flat_map(|folder| [("kernel", "80"), ("hopper", "90a")].map(|it| (folder, it)));
    for (folder, (name, capability)) in sources {
        let source = folder.join(name).with_extension("cu");
        if !source.exists() {
            continue;
        }
        let op = folder.file_name().and_then(|name| name.to_str()).expect("ops have plain names");
        let module = if name == "kernel" { op.to_owned() } else { format!("{op}_{name}") };
        // A folder for each, as outputs are named after their sources.
        let ptx_folder = Path::new(&out).join(&module);
        std::fs::create_dir_all(&ptx_folder).expect("the folder for outputs can be written");
        let compiled = cudaforge::KernelBuilder::new()
            .compute_cap_arch(capability)
            .source_files([&source])
            .watch(&headers)
            .out_dir(&ptx_folder)
            .args(["-std=c++17", "-O3", "-Isrc/ops"])
            .build_ptx();
        if let Err(error) = compiled {
            panic!("the kernels of {module} do not compile: {error}");
        }
        let ptx = ptx_folder.join(name).with_extension("ptx");
        let architecture = match card {
            Some(90) if name == "hopper" => Some("sm_90a".into()),
            Some(card) if name == "kernel" => Some(format!("sm_{card}")),
            _ => None,
        };
        let code = architecture.zip(assembler.as_ref()).and_then(|(card, assembler)| assemble(assembler, &ptx, &card));
        let machine_code = match code.zip(card) {
            Some((code, card)) => format!("Some((include_bytes!({code:?}), ({}, {})))", card / 10, card % 10),
            None => "None".into(),
        };
        modules +=
            &format!("Module {{ name: {module:?}, ptx: include_str!({ptx:?}), machine_code: {machine_code} }},\n");
    }
    let table = format!("&[\n{modules}]");
    std::fs::write(Path::new(&out).join("modules.rs"), table).expect("the folder for outputs can be written");
}

/// What makes machine code of PTX: beside nvcc, or where CUDA_HOME says.
#[cfg(feature = "cuda")]
fn assembler() -> Option<PathBuf> {
    let beside_nvcc = cudaforge::CudaToolkit::detect().ok().map(|toolkit| toolkit.nvcc_path.with_file_name("ptxas"));
    let of_home = std::env::var("CUDA_HOME").ok().map(|home| Path::new(&home).join("bin/ptxas"));
    [beside_nvcc, of_home].into_iter().flatten().find(|path| path.exists())
}

/// Machine code beside its PTX; `None`, and a warning, where the assembler does not know the card.
#[cfg(feature = "cuda")]
fn assemble(assembler: &Path, ptx: &Path, architecture: &str) -> Option<PathBuf> {
    let code = ptx.with_extension(format!("{architecture}.cubin"));
    let made = |path: &Path| path.metadata().and_then(|it| it.modified()).ok();
    if made(&code) > made(ptx) {
        return Some(code);
    }
    let mut command = std::process::Command::new(assembler);
    match command.args(["-O3", "--gpu-name", architecture, "-o"]).args([&code, ptx]).status() {
        Ok(status) if status.success() => Some(code),
        _ => {
            println!("cargo::warning={} cannot be assembled for {architecture}; the driver will", ptx.display());
            None
        }
    }
}
