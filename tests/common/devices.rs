use candle_core::Device;

/// The host, and the first GPU where this program can use one.
pub fn devices() -> Vec<Device> {
    let gpu = cfg!(feature = "cuda").then(|| titan::tools::device::gpu(0));
    let gpu = gpu.and_then(|gpu| gpu.inspect_err(|error| eprintln!("passing over the GPU: {error}")).ok());
    [Device::Cpu].into_iter().chain(gpu).collect()
}
