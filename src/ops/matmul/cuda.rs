//! Matrix products on a GPU, through cuBLASLt.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublaslt::sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
use candle_core::cuda_backend::cudarc::cublaslt::sys::cublasLtMatmulDescAttributes_t::{
    CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
};
use candle_core::cuda_backend::cudarc::cublaslt::sys::cublasLtMatmulPreferenceAttributes_t::{
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
};
use candle_core::cuda_backend::cudarc::cublaslt::sys::cublasLtMatrixLayoutAttribute_t::{
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
};
use candle_core::cuda_backend::cudarc::cublaslt::sys::{
    cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasStatus_t,
    cudaDataType_t,
};
use candle_core::cuda_backend::cudarc::cublaslt::{result, result::CublasError};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{DType, Tensor};

use crate::Result;
use crate::ops::gpu;

/// Scratch memory of all products of a device; what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// A row-major matrix in a GPU's memory, or a batch of them.
#[derive(Clone, Copy, Debug)]
pub struct Mat {
    address: u64,
    numbers: cudaDataType_t,
    /// As it is stored.
    rows: usize,
    cols: usize,
    row_stride: usize,
    /// Elements from one matrix of a batch to the next.
    batch_stride: usize,
    transposed: bool,
}

/// What the bytes of a matrix of 8-bit floats are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    E4m3,
    E5m2,
}

impl Mat {
    /// A contiguous tensor as `rows` rows.
    pub fn new(tensor: &Tensor, rows: usize) -> Result<Self> {
        let cols = tensor.elem_count() / rows.max(1);
        Self::strided(tensor, 0, rows, cols, cols)
    }

    /// `(rows, cols)` from element `start` of a contiguous tensor on, whose rows begin `row_stride` elements apart.
    pub fn strided(tensor: &Tensor, start: usize, rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        let numbers = match tensor.dtype() {
            DType::BF16 => cudaDataType_t::CUDA_R_16BF,
            DType::F32 => cudaDataType_t::CUDA_R_32F,
            other => unreachable!("activations and weights are f32 or bf16, not {other:?}"),
        };
        Self::of(tensor, numbers, start, [rows, cols], row_stride)
    }

    /// A contiguous tensor of bytes as `rows` rows of 8-bit floats.
    pub fn of_codes(tensor: &Tensor, rows: usize, codes: Codes) -> Result<Self> {
        assert_eq!(tensor.dtype(), DType::U8, "8-bit floats are bytes");
        let numbers = match codes {
            Codes::E4m3 => cudaDataType_t::CUDA_R_8F_E4M3,
            Codes::E5m2 => cudaDataType_t::CUDA_R_8F_E5M2,
        };
        let cols = tensor.elem_count() / rows.max(1);
        Self::of(tensor, numbers, 0, [rows, cols], cols)
    }

    fn of(
        tensor: &Tensor,
        numbers: cudaDataType_t,
        start: usize,
        [rows, cols]: [usize; 2],
        row_stride: usize,
    ) -> Result<Self> {
        let end = start + rows.saturating_sub(1) * row_stride + cols;
        assert!(rows == 0 || end <= tensor.elem_count(), "matrix outside its tensor");
        let address = gpu::address(tensor)? + (start * tensor.dtype().size_in_bytes()) as u64;
        Ok(Self { address, numbers, rows, cols, row_stride, batch_stride: 0, transposed: false })
    }

    /// The first of a batch of matrices that begin `stride` elements apart; the caller answers for the others.
    pub fn batched(self, stride: usize) -> Self {
        Self { batch_stride: stride, ..self }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn dims(&self) -> [usize; 2] {
        if self.transposed { [self.cols, self.rows] } else { [self.rows, self.cols] }
    }

    /// What the address is a multiple of, as far as it matters.
    fn alignment(&self) -> u32 {
        1 << self.address.trailing_zeros().min(8)
    }
}

/// What a product does with what its destination holds, and its factor.
#[derive(Clone, Copy, Debug)]
pub enum Store {
    Overwrite(f32),
    Add(f32),
}

/// `dst = factor · a b`, or `dst += factor · a b`, with sums of f32 (never TF32).
pub fn multiply(device: &CudaDevice, a: Mat, b: Mat, dst: Mat, store: Store) -> Result<()> {
    multiply_batch(device, a, b, dst, store, 1)
}

/// As [`multiply`], for `batch` products at once.
pub fn multiply_batch(device: &CudaDevice, a: Mat, b: Mat, dst: Mat, store: Store, batch: usize) -> Result<()> {
    let (factor, add) = match store {
        Store::Overwrite(factor) => (factor, 0.0),
        Store::Add(factor) => (factor, 1.0),
    };
    let done = run(device, a, b, dst, dst, [factor, add], batch, None)?;
    assert!(done, "products of f32 and bf16 are done, or there was an error");
    Ok(())
}

/// `dst = a b + c`, where `c` lies in memory as `dst` does, but elsewhere.
pub fn multiply_and_add(device: &CudaDevice, a: Mat, b: Mat, c: Mat, dst: Mat) -> Result<()> {
    assert_eq!(
        (c.dims(), c.numbers, c.row_stride),
        (dst.dims(), dst.numbers, dst.row_stride),
        "what a product is added to"
    );
    run(device, a, b, c, dst, [1.0, 1.0], 1, None)?;
    Ok(())
}

/// A product of 8-bit floats: `dst = a b`, and `c` if there is one, which lies in memory as `dst` does. Sums go over the rows
/// of `a` and those of the transpose of `b`.
pub struct Float8Product<'a> {
    pub a: Mat,
    pub b: Mat,
    pub c: Option<Mat>,
    pub dst: Mat,
    pub scales: Option<Scales<'a>>,
    /// Sums may lose some of their last bits, and take less time.
    pub fast: bool,
}

/// What the rows of `a` and the columns of `b` are multiplied by, f32.
pub struct Scales<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    /// Each by its own, else all by the first.
    pub by_line: bool,
}

/// False where the library has no such product on this device, for these sizes and addresses: then nothing is done.
pub fn multiply_float8(device: &CudaDevice, product: Float8Product) -> Result<bool> {
    let Float8Product { a, b, c, dst, scales, fast } = product;
    let kind = match &scales {
        None => ScaleKind::None,
        Some(Scales { by_line: false, .. }) => ScaleKind::One,
        Some(Scales { a: of_rows, b: of_columns, .. }) => {
            assert_eq!([of_rows.elem_count(), of_columns.elem_count()], dst.dims(), "a scale for each line");
            ScaleKind::EachLine
        }
    };
    let address = |of: &Tensor| gpu::address(of);
    let addresses = scales.map(|scales| Ok::<_, crate::Error>([address(scales.a)?, address(scales.b)?])).transpose()?;
    let float8 = Some((Float8Kind { scales: kind, fast }, addresses.unwrap_or_default()));
    let add = if c.is_some() { 1.0 } else { 0.0 };
    run(device, a, b, c.unwrap_or(dst), dst, [1.0, add], 1, float8)
}

/// `dst = factors[0] · a b + factors[1] · c`. `float8`: of what kind, and the addresses of the scales of `a` and `b`.
#[expect(clippy::too_many_arguments, reason = "those of a product")]
fn run(
    device: &CudaDevice,
    a: Mat,
    b: Mat,
    c: Mat,
    dst: Mat,
    factors: [f32; 2],
    batch: usize,
    float8: Option<(Float8Kind, [u64; 2])>,
) -> Result<bool> {
    let ([m, k], [k_b, n]) = (a.dims(), b.dims());
    assert_eq!((k, [m, n], false), (k_b, dst.dims(), dst.transposed), "sizes of a product");
    assert!(float8.is_some() || a.numbers == b.numbers, "operands of a product have one dtype");
    assert!(k > 0, "products of nothing are not asked for");
    if m * n * batch == 0 {
        return Ok(true);
    }
    // cuBLAS counts by columns, in which our rows are the columns of the transposes: dstᵀ = bᵀ aᵀ.
    let [factor, add] = factors;
    let alignment = c.alignment().min(dst.alignment());
    let (kind, scales) = float8.unzip();
    let [of_a, of_b] = scales.unwrap_or_default();
    let key = Key {
        first: Shape::of(&b),
        second: Shape::of(&a),
        dst: Shape { alignment, ..Shape::of(&dst) },
        batch,
        float8: kind,
    };
    with_library(device, |library| {
        let Some(plan) = library.plan(&key, [of_b, of_a])? else { return Ok(false) };
        gpu::count_launch();
        let stream = device.cuda_stream();
        let pointer = |address: u64| address as *const c_void;
        let (algorithm, dst_pointer) = (&raw const plan.algorithm, dst.address as *mut c_void);
        let workspace = library.workspace.device_ptr(&stream).0 as *mut c_void;
        // SAFETY: descriptors live as long as the library; `Mat::strided` keeps every access inside its tensor, and the
        // stream runs this after what wrote the operands and before what frees them.
        unsafe {
            result::matmul(
                library.handle,
                plan.product,
                (&raw const factor).cast(),
                (&raw const add).cast(),
                pointer(b.address),
                plan.first,
                pointer(a.address),
                plan.second,
                pointer(c.address),
                plan.dst,
                dst_pointer,
                plan.dst,
                algorithm,
                workspace,
                WORKSPACE_BYTES,
                stream.cu_stream().cast(),
            )?
        }
        Ok(true)
    })
}

/// What the choice of an algorithm depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    first: Shape,
    second: Shape,
    dst: Shape,
    batch: usize,
    float8: Option<Float8Kind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Float8Kind {
    scales: ScaleKind,
    fast: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ScaleKind {
    None,
    One,
    EachLine,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shape {
    numbers: cudaDataType_t,
    rows: usize,
    cols: usize,
    row_stride: usize,
    batch_stride: usize,
    transposed: bool,
    alignment: u32,
}

impl Shape {
    fn of(mat: &Mat) -> Self {
        let Mat { numbers, rows, cols, row_stride, batch_stride, transposed, .. } = *mat;
        Self { numbers, rows, cols, row_stride, batch_stride, transposed, alignment: mat.alignment() }
    }
}

/// cuBLASLt of one device.
struct Library {
    handle: cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    /// `None`: of 8-bit floats, and there is no algorithm.
    plans: HashMap<Key, Option<Plan>>,
}

// SAFETY: the library's objects may be used from any thread, by one at a time: they are behind a mutex.
unsafe impl Send for Library {}

/// A product whose algorithm is chosen.
#[derive(Clone, Copy)]
struct Plan {
    product: cublasLtMatmulDesc_t,
    first: cublasLtMatrixLayout_t,
    second: cublasLtMatrixLayout_t,
    dst: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
}

/// Kept until the process ends.
static LIBRARIES: LazyLock<Mutex<HashMap<DeviceId, Library>>> = LazyLock::new(Mutex::default);

fn with_library<R>(device: &CudaDevice, body: impl FnOnce(&mut Library) -> Result<R, CublasError>) -> Result<R> {
    let fault = |error: CublasError| candle_core::Error::Msg(format!("cuBLASLt: {error}")).bt();
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let library = match libraries.entry(device.id()) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::hash_map::Entry::Vacant(entry) => {
            device.cuda_stream().context().bind_to_thread().map_err(candle_core::Error::wrap)?;
            // SAFETY: scratch memory is written before it is read.
            let workspace = unsafe { device.alloc::<u8>(WORKSPACE_BYTES)? };
            entry.insert(Library { handle: result::create_handle().map_err(fault)?, workspace, plans: HashMap::new() })
        }
    };
    device.cuda_stream().context().bind_to_thread().map_err(candle_core::Error::wrap)?;
    Ok(body(library).map_err(fault)?)
}

impl Library {
    /// The way to do a product, with the addresses of its scales; `None` where it is of 8-bit floats and there is no way.
    fn plan(&mut self, key: &Key, scales: [u64; 2]) -> Result<Option<Plan>, CublasError> {
        let plan = match self.plans.get(key) {
            Some(plan) => *plan,
            None => {
                let plan = match self.new_plan(key, scales) {
                    Err(_) if key.float8.is_some() => None,
                    plan => Some(plan?),
                };
                self.plans.insert(key.clone(), plan);
                plan
            }
        };
        if let (Some(plan), Some(kind)) = (&plan, key.float8) {
            set_scales(plan.product, kind.scales, scales)?;
        }
        Ok(plan)
    }

    fn new_plan(&self, key: &Key, scales: [u64; 2]) -> Result<Plan, CublasError> {
        let product = result::create_matmul_desc(CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F)?;
        for (attribute, is_transposed) in
            [(CUBLASLT_MATMUL_DESC_TRANSA, key.first.transposed), (CUBLASLT_MATMUL_DESC_TRANSB, key.second.transposed)]
        {
            let value = i32::from(is_transposed);
            // SAFETY: the descriptor is alive, and the attribute is a number of 4 bytes.
            unsafe {
                result::set_matmul_desc_attribute(product, attribute, (&raw const value).cast(), size_of_val(&value))?
            };
        }
        if let Some(kind) = key.float8 {
            set_attribute(product, FAST_ACCUM, i8::from(kind.fast))?;
            if kind.scales == ScaleKind::EachLine {
                set_attribute(product, A_SCALE_MODE, SCALE_OUTER_VEC_32F)?;
                set_attribute(product, B_SCALE_MODE, SCALE_OUTER_VEC_32F)?;
            }
            set_scales(product, kind.scales, scales)?;
        }
        let (first, second, dst) =
            (layout(&key.first, key.batch)?, layout(&key.second, key.batch)?, layout(&key.dst, key.batch)?);
        let preference = result::create_matmul_pref()?;
        let workspace = WORKSPACE_BYTES;
        let alignments = [
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.first.alignment),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.second.alignment),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.dst.alignment),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.dst.alignment),
        ];
        // SAFETY: the preference is alive until it is destroyed here; attributes have the sizes of their values; the
        // descriptors above are alive.
        let chosen = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of_val(&workspace),
            )?;
            for (attribute, bytes) in alignments {
                let value = (&raw const bytes).cast();
                result::set_matmul_pref_attribute(preference, attribute, value, size_of_val(&bytes))?;
            }
            let chosen = result::get_matmul_algo_heuristic(self.handle, product, first, second, dst, dst, preference);
            result::destroy_matmul_pref(preference)?;
            chosen?
        };
        Ok(Plan { product, first, second, dst, algorithm: chosen.algo })
    }
}

/// Attributes of a product by their numbers: those of the library's 12.9 are not all known to cudarc where titan is built
/// with an older CUDA, and the library that it runs with may be newer.
const A_SCALE_POINTER: c_int = 17;
const B_SCALE_POINTER: c_int = 18;
const FAST_ACCUM: c_int = 25;
const A_SCALE_MODE: c_int = 31;
const B_SCALE_MODE: c_int = 32;

/// The mode of a scale for each row of one operand and each column of the other.
const SCALE_OUTER_VEC_32F: i32 = 3;

unsafe extern "C" {
    /// As cudarc has it, but for the type of `attribute` and of the result.
    fn cublasLtMatmulDescSetAttribute(
        product: cublasLtMatmulDesc_t,
        attribute: c_int,
        value: *const c_void,
        bytes: usize,
    ) -> c_int;
}

/// `Err` where the library does not know the attribute, or the value.
fn set_attribute<T: Copy>(product: cublasLtMatmulDesc_t, attribute: c_int, value: T) -> Result<(), CublasError> {
    // SAFETY: the descriptor is alive, and callers give the attributes above values of their sizes.
    let status =
        unsafe { cublasLtMatmulDescSetAttribute(product, attribute, (&raw const value).cast(), size_of::<T>()) };
    if status == 0 { Ok(()) } else { Err(CublasError(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE)) }
}

/// `scales`: addresses, of the library's first operand and of its second.
fn set_scales(product: cublasLtMatmulDesc_t, kind: ScaleKind, scales: [u64; 2]) -> Result<(), CublasError> {
    if kind == ScaleKind::None {
        return Ok(());
    }
    set_attribute(product, A_SCALE_POINTER, scales[0])?;
    set_attribute(product, B_SCALE_POINTER, scales[1])
}

/// Our rows are the library's columns.
fn layout(shape: &Shape, batch: usize) -> Result<cublasLtMatrixLayout_t, CublasError> {
    let layout =
        result::create_matrix_layout(shape.numbers, shape.cols as u64, shape.rows as u64, shape.row_stride as i64)?;
    if batch > 1 {
        let (count, stride) = (batch as i32, shape.batch_stride as i64);
        // SAFETY: the layout is alive, and the attributes are numbers of 4 and 8 bytes.
        unsafe {
            let count_value = (&raw const count).cast();
            result::set_matrix_layout_attribute(
                layout,
                CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                count_value,
                size_of_val(&count),
            )?;
            result::set_matrix_layout_attribute(
                layout,
                CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                (&raw const stride).cast(),
                size_of_val(&stride),
            )?;
        }
    }
    Ok(layout)
}

/// `x wᵀ` for `(…, in)` and `(out, in)`, in dtype `dtype`.
pub fn product_with_transpose(x: &Tensor, weight: &Tensor, dtype: DType) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let device = gpu::device(x);
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = outer;
    let x = gpu::elements(x, weight.dtype())?;
    let rows = x.elem_count() / inner;
    let y = gpu::uninit(shape, dtype, device)?;
    multiply(device, Mat::new(&x, rows)?, Mat::new(weight, outer)?.t(), Mat::new(&y, rows)?, Store::Overwrite(1.0))?;
    Ok(y)
}

/// The rate of the best of several square products of bf16, in floating-point operations per second.
pub fn measured_peak_flops(device: &CudaDevice) -> Result<f64> {
    const SIZE: usize = 4096;
    const RUNS: usize = 8;
    let values = Tensor::ones((SIZE, SIZE), DType::BF16, &candle_core::Device::Cuda(device.clone()))?;
    let dst = gpu::uninit((SIZE, SIZE), DType::BF16, device)?;
    let (values, dst) = (Mat::new(&values, SIZE)?, Mat::new(&dst, SIZE)?);
    let mut best_s = f64::INFINITY;
    for _ in 0..RUNS {
        let wait = || device.cuda_stream().synchronize().map_err(candle_core::Error::wrap);
        wait()?;
        let start = std::time::Instant::now();
        multiply(device, values, values, dst, Store::Overwrite(1.0))?;
        wait()?;
        best_s = best_s.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (SIZE as f64).powi(3) / best_s)
}
