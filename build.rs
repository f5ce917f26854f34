//! Compiles the kernels of the `cuda` feature: one PTX per `src/ops/*/kernel.cu`, for compute capability 8.0 and up, and one per
//! `src/ops/*/hopper.cu`, for 9.0 alone. The driver translates PTX for the card at hand when a kernel is first used.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    use std::path::Path;

    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=src/ops");
    let out = std::env::var("OUT_DIR").expect("cargo names a folder for outputs");
    let mut folders: Vec<_> = std::fs::read_dir("src/ops").expect("src/ops").flatten().map(|it| it.path()).collect();
    folders.sort();
    let shared = std::iter::once(Path::new("src/ops").to_path_buf()).chain(folders.iter().cloned());
    let files = shared.filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten().map(|it| it.path());
    let headers: Vec<_> = files.filter(|file| file.extension().is_some_and(|end| end == "cuh")).collect();
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
        modules += &format!("({module:?}, include_str!({:?})),\n", ptx_folder.join(name).with_extension("ptx"));
    }
    let table = format!("&[\n{modules}]");
    std::fs::write(Path::new(&out).join("modules.rs"), table).expect("the folder for outputs can be written");
}
