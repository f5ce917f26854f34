//! GPUs of this machine: opened once, with a pool that keeps its memory.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUgraphMem_attribute_enum::{
    self, CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH, CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT, CU_GRAPH_MEM_ATTR_USED_MEM_HIGH,
};
use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute_enum::{
    self, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH,
    CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use candle_core::cuda_backend::cudarc::driver::sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUmemoryPool, cuDeviceGetGraphMemAttribute,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DriverError, result};
use candle_core::{CudaDevice, Device};
use tracing::info;

use super::device::{DeviceFacts, MemoryUse, gpu_peak_flops};
use super::memory::Mark;
use crate::ops::{gpu_capability as capability, load_kernels, measured_gpu_peak_flops};
use crate::{Error, Result};

/// What titan's kernels are compiled for at least.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// What has tensor cores for 8-bit floats.
const FLOAT8_CAPABILITY: (i32, i32) = (8, 9);

/// GPU number `index`, the same for all that ask: candle takes a device that is opened twice for two.
///
/// # Errors
/// [`Error::Device`] if there is no such GPU, or it is too old.
pub fn open(index: usize) -> Result<Device> {
    static GPUS: LazyLock<Mutex<BTreeMap<usize, Device>>> = LazyLock::new(Mutex::default);
    let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = gpus.get(&index) {
        return Ok(gpu.clone());
    }
    let gpu =
        open_anew(index).map_err(|error| Error::Device(format!("GPU {index} cannot be used: {}", plain(&error))))?;
    gpus.insert(index, gpu.clone());
    Ok(gpu)
}

/// The message alone: candle's errors end with where they were raised.
fn plain(error: &Error) -> String {
    error.to_string().lines().next().unwrap_or_default().replace("internal tensor error: ", "")
}

fn open_anew(index: usize) -> Result<Device> {
    let device = CudaDevice::new_with_stream(index)?;
    let context = device.cuda_stream().context().clone();
    let found = capability(&device)?;
    if found < LEAST_CAPABILITY {
        return Err(Error::Device(format!(
            "its compute capability is {}.{}, and titan's kernels need {}.{}",
            found.0, found.1, LEAST_CAPABILITY.0, LEAST_CAPABILITY.1
        )));
    }
    // SAFETY: all work of this device goes through one stream, in order, so that nothing is freed or written while it is in
    // use elsewhere.
    unsafe { device.disable_event_tracking() };
    if context.has_async_alloc() {
        // What a step frees, the next takes again.
        set_attribute(index, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX).map_err(candle_core::Error::wrap)?;
    }
    load_kernels(&device, || {
        info!("The driver compiles titan's kernels for this GPU; it keeps them for the next time")
    })?;
    Ok(Device::Cuda(device))
}

/// Why a GPU cannot multiply matrices of 8-bit floats; `None` if it can.
pub fn lack_of_float8(device: &CudaDevice) -> Result<Option<String>> {
    let found = capability(device)?;
    Ok((found < FLOAT8_CAPABILITY).then(|| format!("this GPU's is {}.{}", found.0, found.1)))
}

/// The name, memory and peak of an open GPU. A peak that no data sheet gives is measured, which takes a moment.
pub fn facts(index: usize) -> Result<DeviceFacts> {
    let Device::Cuda(device) = open(index)? else { unreachable!("a GPU was opened") };
    let context = device.cuda_stream().context().clone();
    let name = context.name().map_err(candle_core::Error::wrap)?;
    let peak_flops = match gpu_peak_flops(&name) {
        Some(peak) => peak,
        None => measured_gpu_peak_flops(&device)?,
    };
    let total_memory_bytes = context.total_mem().map_err(candle_core::Error::wrap)? as u64;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(DeviceFacts { name, cores, total_memory_bytes, peak_flops, gpu: Some(index) })
}

/// What the pool of GPU `index` has handed out, and what it holds, with what recorded steps take on top; 0 where the driver
/// does not say.
pub fn memory_use(index: usize) -> MemoryUse {
    let get = |attribute| attribute_of(index, attribute).unwrap_or(0);
    let of_graphs = |attribute| graph_attribute_of(index, attribute).unwrap_or(0);
    let used = get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    let with_graphs = used + of_graphs(CU_GRAPH_MEM_ATTR_USED_MEM_HIGH);
    let reserved = get(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT) + of_graphs(CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH);
    MemoryUse {
        current_bytes: used + of_graphs(CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT),
        peak_bytes: get(CU_MEMPOOL_ATTR_USED_MEM_HIGH).max(HIGHEST.load(Ordering::Relaxed)).max(with_graphs),
        peak_reserved_bytes: get(CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH).max(reserved),
    }
}

/// The most that was used before [`mark`] began to count anew.
static HIGHEST: AtomicU64 = AtomicU64::new(0);

/// What the pool of an open GPU has handed out, and the most since the last call.
pub fn mark(device: &CudaDevice) -> Mark {
    let index = device.cuda_stream().context().ordinal();
    let get = |attribute| attribute_of(index, attribute).unwrap_or(0);
    let (held, peak) = (get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT), get(CU_MEMPOOL_ATTR_USED_MEM_HIGH));
    HIGHEST.fetch_max(peak, Ordering::Relaxed);
    // If the driver refuses, peaks are those of the run.
    let _ = set_attribute(index, CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0);
    Mark { held, peak }
}

fn pool(index: usize) -> Result<CUmemoryPool, DriverError> {
    let device = result::device::get(index as i32)?;
    // SAFETY: the device exists, as `get` has found it; its default pool lives as long as it.
    unsafe { result::device::get_default_mem_pool(device) }
}

fn attribute_of(index: usize, attribute: CUmemPool_attribute_enum) -> Result<u64, DriverError> {
    let mut value = 0u64;
    // SAFETY: the pool lives, and the attributes that are asked for are 64 bits wide.
    unsafe { result::mem_pool::get_attribute(pool(index)?, attribute, (&raw mut value).cast::<c_void>())? };
    Ok(value)
}

fn graph_attribute_of(index: usize, attribute: CUgraphMem_attribute_enum) -> Result<u64, DriverError> {
    let (device, mut value) = (result::device::get(index as i32)?, 0u64);
    // SAFETY: the device exists, and these attributes are 64 bits wide.
    unsafe { cuDeviceGetGraphMemAttribute(device, attribute, (&raw mut value).cast::<c_void>()) }.result()?;
    Ok(value)
}

fn set_attribute(index: usize, attribute: CUmemPool_attribute_enum, mut value: u64) -> Result<(), DriverError> {
    // SAFETY: as in `attribute_of`.
    unsafe { result::mem_pool::set_attribute(pool(index)?, attribute, (&raw mut value).cast::<c_void>()) }
}

/// Work of a GPU that was recorded once, and is done again by one launch: kernels with the arguments that they had, on the
/// memory that they had. What was allocated meanwhile is allocated anew with each launch.
pub struct Graph(CudaGraph);

impl Graph {
    /// Records what `body` launches, none of which runs. All that it allocates must be dropped when it returns, and it may
    /// neither wait for the GPU nor drop what was there before.
    pub fn record(device: &CudaDevice, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(candle_core::Error::wrap)?;
        let recorded = body();
        // Ended in any case, lest the stream stay unusable.
        let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        recorded?;
        let graph = graph.map_err(candle_core::Error::wrap)?;
        Ok(Self(graph.ok_or_else(|| Error::Device("nothing was recorded of the step".into()))?))
    }

    pub fn launch(&self) -> Result<()> {
        Ok(self.0.launch().map_err(candle_core::Error::wrap)?)
    }
}

/// Gives memory that is not in use back to the driver.
pub fn trim_pool(device: &CudaDevice) -> Result<()> {
    let index = device.cuda_stream().context().ordinal();
    device.cuda_stream().synchronize().map_err(candle_core::Error::wrap)?;
    // SAFETY: as in `attribute_of`.
    unsafe { result::mem_pool::trim_to(pool(index).map_err(candle_core::Error::wrap)?, 0) }
        .map_err(candle_core::Error::wrap)?;
    Ok(())
}
