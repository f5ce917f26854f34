//! Tensors of a GPU as addresses, and kernels that are launched on them.
//!
//! All work of a process goes through one stream per device, in the order in which it is launched: a tensor may be dropped
//! as soon as the kernels that read it are launched, and nothing here waits.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
};
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::sys::{
    cuMemHostRegister_v2, cuMemHostUnregister, cuMemcpyDtoHAsync_v2, cuMemcpyHtoDAsync_v2,
};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, DevicePtr, DeviceRepr, PinnedHostSlice};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use half::bf16;

use crate::Result;
pub use crate::ops::copy::cuda::elements;

/// The kernels of a `kernel.cu`, by the name of its op, or of a `hopper.cu`, by that name and [`HOPPER`].
struct Module {
    name: &'static str,
    ptx: &'static str,
    /// And the capability that it is for.
    machine_code: Option<(&'static [u8], (i32, i32))>,
}

const MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

const HOPPER: &str = "_hopper";

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

type Modules = HashMap<(DeviceId, &'static str), Arc<CudaModule>>;

/// The modules that a device has loaded, by the names of their ops.
static LOADED: LazyLock<RwLock<Modules>> = LazyLock::new(RwLock::default);

/// Loads the kernels of all ops, at the same time: where the driver has to compile them, that takes some seconds. `waiting`
/// is called once if it takes more than one.
pub fn load_all(device: &CudaDevice, waiting: impl FnOnce()) -> Result<()> {
    let (sender, results) = mpsc::channel();
    std::thread::scope(|scope| {
        let is_hopper = is_hopper(device)?;
        for module in MODULES.iter().filter(|module| is_hopper || !module.name.ends_with(HOPPER)) {
            let sender = sender.clone();
            scope.spawn(move || {
                // Who has gone has met another fault.
                let _ = sender.send(load(device, module));
            });
        }
        drop(sender);
        let mut waiting = Some(waiting);
        let since = Instant::now();
        loop {
            match results.recv_timeout(Duration::from_secs(1).saturating_sub(since.elapsed())) {
                Ok(result) => drop(result?),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        waiting.take().expect("the loop ends once")();
        results.iter().try_for_each(|result| result.map(drop))
    })
}

fn load(device: &CudaDevice, module: &Module) -> Result<Arc<CudaModule>> {
    let (context, found) = (device.cuda_stream().context().clone(), capability(device)?);
    // Machine code runs on cards of its generation that are not older.
    let runs = |of: (i32, i32)| found.0 == of.0 && found.1 >= of.1;
    let made = module.machine_code.filter(|(_, of)| runs(*of));
    let made = made.and_then(|(code, _)| context.load_module(Ptx::from_binary(code.to_vec())).ok());
    let made = match made {
        Some(made) => made,
        None => context.load_module(module.ptx.into()).w()?,
    };
    let mut loaded = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    Ok(loaded.entry((device.id(), module.name)).or_insert(made).clone())
}

/// Major and minor.
pub fn capability(device: &CudaDevice) -> Result<(i32, i32)> {
    let context = device.cuda_stream().context().clone();
    let part = |attribute| context.attribute(attribute).w();
    Ok((part(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?, part(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
}

/// Whether a GPU can run what `hopper.cu` is compiled to, which no later one can.
pub fn is_hopper(device: &CudaDevice) -> Result<bool> {
    Ok(capability(device)? == (9, 0))
}

/// A kernel of `src/ops/<op>/kernel.cu`, or with an op's name and [`HOPPER`] of its `hopper.cu`, for blocks with `shared` bytes
/// of dynamic shared memory.
pub fn kernel(device: &CudaDevice, op: &'static str, name: &str, shared: usize) -> Result<CudaFunction> {
    let known =
        |kernels: &HashMap<DeviceId, HashMap<String, CudaFunction>>| kernels.get(&device.id())?.get(name).cloned();
    let found = known(&KERNELS.read().unwrap_or_else(PoisonError::into_inner));
    let function = match found {
        Some(function) => function,
        None => {
            let loaded = LOADED.read().unwrap_or_else(PoisonError::into_inner).get(&(device.id(), op)).cloned();
            let module = match loaded {
                Some(module) => module,
                None => load(device, MODULES.iter().find(|it| it.name == op).expect("ops name their own kernels"))?,
            };
            let function = module.load_function(name).w()?;
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

/// Fills a contiguous tensor with zeros.
pub fn zero(tensor: &Tensor) -> Result<()> {
    let (stream, bytes) = (device(tensor).cuda_stream(), tensor.elem_count() * tensor.dtype().size_in_bytes());
    let start = address(tensor)?;
    stream.context().bind_to_thread().w()?;
    // SAFETY: the bytes are those of the tensor, and its work goes through this stream in order.
    unsafe { result::memset_d8_async(start, 0, bytes, stream.cu_stream()).w()? };
    Ok(())
}

/// Copies a few numbers from the host into a contiguous tensor, whose address does not change.
pub fn write(tensor: &Tensor, values: &[f64]) -> Result<()> {
    assert_eq!((tensor.dtype(), tensor.elem_count()), (DType::F64, values.len()), "as many numbers as the tensor has");
    let stream = device(tensor).cuda_stream();
    let start = address(tensor)?;
    stream.context().bind_to_thread().w()?;
    // SAFETY: the tensor has as many bytes, and its work goes through this stream in order. The driver has read what is not
    // pinned when the call returns.
    unsafe { result::memcpy_htod_async(start, values, stream.cu_stream()).w()? };
    Ok(())
}

/// By device and length, whatever was used least recently first.
type Staged = HashMap<(DeviceId, usize), VecDeque<PinnedHostSlice<u32>>>;

/// Memory of the host that GPUs copy from by themselves.
static STAGED: LazyLock<Mutex<Staged>> = LazyLock::new(Mutex::default);

/// Uploads of a length that may be under way at a time, and lengths that memory is kept for.
const UNDER_WAY: usize = 4;
const LENGTHS: usize = 16;

/// A copy of the host's numbers, which the GPU makes in the order of its work: nobody waits for it.
pub fn upload(values: &[u32], shape: impl Into<Shape>, device: &CudaDevice) -> Result<Tensor> {
    let stream = device.cuda_stream();
    // SAFETY: all of it is written by the copy below, before any work that is enqueued later.
    let mut copy = unsafe { device.alloc::<u32>(values.len())? };
    if !values.is_empty() {
        let mut staged = STAGED.lock().unwrap_or_else(PoisonError::into_inner);
        if staged.len() > LENGTHS {
            staged.clear();
        }
        let slots = staged.entry((device.id(), values.len())).or_default();
        let slot = if slots.len() < UNDER_WAY { None } else { slots.pop_front() };
        let mut slot = match slot {
            Some(slot) => slot,
            // SAFETY: all of it is written before it is read.
            None => unsafe { stream.context().alloc_pinned(values.len()).w()? },
        };
        slot.as_mut_slice().w()?.copy_from_slice(values);
        stream.memcpy_htod(&slot, &mut copy).w()?;
        slots.push_back(slot);
    }
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(copy, device.clone()));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// What kernels call a dtype in their names.
pub fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        DType::F32 => "f32",
        other => unreachable!("activations and weights are f32 or bf16, not {other:?}"),
    }
}

/// A tensor in memory of the host that a GPU copies from and to by itself.
#[derive(Debug)]
pub struct Pinned {
    tensor: Tensor,
    first: *mut c_void,
}

// SAFETY: the pointer is only an address to be unpinned by; the tensor answers for its memory.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeros in the shape and dtype of a tensor of a GPU.
    pub fn like(tensor: &Tensor) -> Result<Self> {
        device(tensor).cuda_stream().context().bind_to_thread().w()?;
        let tensor = Tensor::zeros(tensor.shape(), tensor.dtype(), &Device::Cpu)?;
        let first = with_bytes(&tensor, |bytes| bytes.as_ptr().cast_mut().cast::<c_void>());
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        if bytes > 0 {
            // SAFETY: the memory is the tensor's, which lives as long as it is pinned.
            unsafe { cuMemHostRegister_v2(first, bytes, 0) }.result().w()?;
        }
        Ok(Self { tensor, first })
    }

    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.tensor.elem_count() > 0 {
            // SAFETY: pinned by `like`, and not unpinned since. A fault leaves memory pinned, which harms nobody.
            let _ = unsafe { cuMemHostUnregister(self.first) };
        }
    }
}

/// The bytes of a contiguous tensor of the host, all of its storage.
fn with_bytes<R>(tensor: &Tensor, body: impl FnOnce(&[u8]) -> R) -> R {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => body(bytemuck::cast_slice(values)),
        Storage::Cpu(CpuStorage::BF16(values)) => body(bytemuck::cast_slice(values)),
        _ => unreachable!("activations and weights of the host are f32 or bf16"),
    }
}

/// Copies a tensor of a GPU to one of the host of the same size, and waits.
pub fn copy_to_host(from: &Tensor, to: &Tensor) -> Result<()> {
    let (device, from, n) = (device(from), address(from)?, from.elem_count() * from.dtype().size_in_bytes());
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().w()?;
    with_bytes(to, |bytes| {
        assert_eq!(bytes.len(), n, "sizes of a copy");
        // SAFETY: both sides are `n` bytes; the stream has finished with them when this returns, and nobody else uses `to`
        // meanwhile, as its owner lends it for this.
        unsafe { cuMemcpyDtoHAsync_v2(bytes.as_ptr().cast_mut().cast(), from, n, stream.cu_stream()) }.result().w()
    })?;
    Ok(stream.synchronize().w()?)
}

/// Copies a tensor of the host to one of a GPU of the same size, and waits.
pub fn copy_to_gpu(from: &Tensor, to: &Tensor) -> Result<()> {
    let (device, to, n) = (device(to), address(to)?, to.elem_count() * to.dtype().size_in_bytes());
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().w()?;
    with_bytes(from, |bytes| {
        assert_eq!(bytes.len(), n, "sizes of a copy");
        // SAFETY: both sides are `n` bytes, and the stream has read `from` when this returns.
        unsafe { cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), n, stream.cu_stream()) }.result().w()
    })?;
    Ok(stream.synchronize().w()?)
}
