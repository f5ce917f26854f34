//! Tensors of a GPU as addresses, and kernels that are launched on them.
//!
//! All work of a process goes through one stream per device, in the order in which it is launched: a tensor may be dropped
//! as soon as the kernels that read it are launched, and nothing here waits.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};
use candle_core::{DType, Device, Shape, Storage, Tensor};
use half::bf16;

use crate::Result;
pub use crate::ops::copy::cuda::elements;

/// The PTX of each `kernel.cu`, by the name of its op.
const MODULES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// Shared memory that a block gets without being asked for.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;

/// Threads of a block where nothing speaks for another number.
pub const THREADS: usize = 256;

/// Blocks of [`THREADS`] for a thread per group of numbers. Kernels count groups in 32 bits.
pub fn blocks(groups: usize) -> [usize; 3] {
    assert!(u32::try_from(groups).is_ok(), "{groups} groups are more than a kernel can count");
    [groups.div_ceil(THREADS), 1, 1]
}

/// Launches a kernel: `launch!(device, "op", "name", grid: [x, y, z], block: threads, shared: bytes; arguments)`.
///
/// The arguments are [`Argument`]s. That a kernel gets what it declares, and stays inside the tensors that it gets, is the
/// promise of the caller, which states it beside the sizes that it passes.
macro_rules! launch {
    ($device:expr, $op:expr, $kernel:expr, grid: $grid:expr, block: $block:expr; $($argument:expr),* $(,)?) => {
        $crate::ops::gpu::launch!($device, $op, $kernel, grid: $grid, block: $block, shared: 0; $($argument),*)
    };
    (
        $device:expr, $op:expr, $kernel:expr,
        grid: $grid:expr, block: $block:expr, shared: $shared:expr; $($argument:expr),* $(,)?
    ) => {{
        use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
        let device: &candle_core::CudaDevice = $device;
        let shared: usize = $shared;
        let [x, y, z]: [usize; 3] = $grid;
        if x * y * z > 0 {
            let kernel = $crate::ops::gpu::kernel(device, $op, $kernel, shared)?;
            let stream = device.cuda_stream();
            let mut launch = stream.launch_builder(&kernel);
            // Each lives until the launch, though the next has its name.
            $(
                let argument = $crate::ops::gpu::Argument::raw($argument)?;
                launch.arg(&argument);
            )*
            let config = candle_core::cuda_backend::cudarc::driver::LaunchConfig {
                grid_dim: (x as u32, y as u32, z as u32),
                block_dim: ($block as u32, 1, 1),
                shared_mem_bytes: shared as u32,
            };
            // SAFETY: the kernel's parameters are these arguments, and it stays inside their tensors: see the macro's words.
            let launched = unsafe { launch.launch(config) };
            candle_core::cuda_backend::WrapErr::w(launched)?;
            $crate::ops::gpu::count_launch();
        }
    }};
}
pub(in crate::ops) use launch;

/// What a kernel takes: a tensor as the address of its first element, or null; a `usize` or `isize` as 64 bits with a sign; other
/// numbers as they are.
pub trait Argument {
    type Raw: DeviceRepr;

    /// # Errors
    /// If a tensor is not contiguous.
    fn raw(self) -> Result<Self::Raw>;
}

impl Argument for &Tensor {
    type Raw = u64;

    fn raw(self) -> Result<u64> {
        address(self)
    }
}

impl Argument for Option<&Tensor> {
    type Raw = u64;

    fn raw(self) -> Result<u64> {
        self.map_or(Ok(0), address)
    }
}

impl Argument for isize {
    type Raw = i64;

    fn raw(self) -> Result<i64> {
        Ok(self as i64)
    }
}

impl Argument for usize {
    type Raw = i64;

    fn raw(self) -> Result<i64> {
        Ok(self as i64)
    }
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Argument for $type {
            type Raw = $type;

            fn raw(self) -> Result<$type> {
                Ok(self)
            }
        }
    )*};
}
number!(u64, i32, u32, f32, f64);

/// Kernels and matrix products launched since the process began.
static LAUNCHES: AtomicU64 = AtomicU64::new(0);

/// Kernels and matrix products launched since the process began, those of the tensor library left out.
pub fn launches() -> u64 {
    LAUNCHES.load(Ordering::Relaxed)
}

/// Counts a launch.
pub fn count_launch() {
    LAUNCHES.fetch_add(1, Ordering::Relaxed);
}

/// Kernels by name, of each device.
static KERNELS: LazyLock<RwLock<HashMap<DeviceId, HashMap<String, CudaFunction>>>> = LazyLock::new(RwLock::default);

/// A kernel of `src/ops/<op>/kernel.cu`, for blocks with `shared` bytes of dynamic shared memory.
pub fn kernel(device: &CudaDevice, op: &'static str, name: &str, shared: usize) -> Result<CudaFunction> {
    let known =
        |kernels: &HashMap<DeviceId, HashMap<String, CudaFunction>>| kernels.get(&device.id())?.get(name).cloned();
    let found = known(&KERNELS.read().unwrap_or_else(PoisonError::into_inner));
    let function = match found {
        Some(function) => function,
        None => {
            let (_, ptx) = MODULES.iter().find(|(module, _)| *module == op).expect("an op names its own kernels");
            let function = device.get_or_load_custom_func(name, op, ptx)?.into_cuda_function();
            let mut kernels = KERNELS.write().unwrap_or_else(PoisonError::into_inner);
            kernels.entry(device.id()).or_default().insert(name.to_owned(), function.clone());
            function
        }
    };
    if shared > DEFAULT_SHARED_BYTES {
        function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32).w()?;
    }
    Ok(function)
}

/// The device of a tensor that is on a GPU.
pub fn device(tensor: &Tensor) -> &CudaDevice {
    match tensor.device() {
        Device::Cuda(device) => device,
        _ => unreachable!("this module is for tensors of a GPU"),
    }
}

/// The address of the first element of a contiguous tensor.
pub fn address(tensor: &Tensor) -> Result<u64> {
    if !tensor.is_contiguous() {
        let found = format!("a kernel takes contiguous tensors, not {:?} by {:?}", tensor.dims(), tensor.stride());
        return Err(candle_core::Error::Msg(found).bt().into());
    }
    first(tensor)
}

/// The address of the first element of a tensor with any strides.
pub fn first(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("a kernel takes tensors of its GPU") };
    let stream = storage.device.cuda_stream();
    let start = match tensor.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        DType::U32 => storage.as_cuda_slice::<u32>()?.device_ptr(&stream).0,
        DType::F64 => storage.as_cuda_slice::<f64>()?.device_ptr(&stream).0,
        DType::I64 => storage.as_cuda_slice::<i64>()?.device_ptr(&stream).0,
        DType::U8 => storage.as_cuda_slice::<u8>()?.device_ptr(&stream).0,
        other => unreachable!("no kernel takes {other:?}"),
    };
    Ok(start + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

/// Whether rows of `dim` numbers can be moved 8 at a time in each of these contiguous tensors: `dim` is a multiple of 8,
/// and the addresses of 16. Weights are windows of a buffer, which begin anywhere.
pub fn by_eights(dim: usize, tensors: &[&Tensor]) -> Result<bool> {
    let mut aligned = dim.is_multiple_of(8);
    for tensor in tensors {
        aligned = aligned && address(tensor)?.is_multiple_of(16);
    }
    Ok(aligned)
}

/// A new tensor for a kernel to write, all of it.
pub fn uninit(shape: impl Into<Shape>, dtype: DType, device: &CudaDevice) -> Result<Tensor> {
    // SAFETY: what is read before it is written would be a fault of the kernel that the tensor is made for; any bits are
    // numbers.
    Ok(unsafe { Tensor::empty(shape, dtype, &Device::Cuda(device.clone()))? })
}

/// What kernels call a dtype in their names.
pub fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        DType::F32 => "f32",
        other => unreachable!("activations and weights are f32 or bf16, not {other:?}"),
    }
}
