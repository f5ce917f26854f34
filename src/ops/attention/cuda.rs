use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
use candle_core::{CudaDevice, DType, Tensor};

use super::{AttentionMask, BOUND, Saved, Scores, Starts, bounds};
use crate::ops::copy;
use crate::ops::gpu::{self, launch, suffix};
use crate::{Error, Result};

const OP: &str = "attention";

/// How a kernel of bf16 divides its work: a block has `rows` of its own, and reads the others in tiles of `tile`, of which it
/// holds up to `stages`.
struct Blocks {
    rows: usize,
    warps: usize,
    tile: usize,
    stages: usize,
}

impl Blocks {
    const fn new(rows: usize, warps: usize, tile: usize, stages: usize) -> Self {
        Self { rows, warps, tile, stages }
    }

    /// Bytes of `n_own` tiles of its own and `stages` times two that pass by, `aside` bytes more for each row of the latter;
    /// `aligned` divides all of them.
    fn shared(&self, width: usize, n_own: usize, stages: usize, aside: usize, aligned: usize) -> usize {
        n_own * self.rows * width * 2 + stages * (self.tile * (4 * width + aside)).next_multiple_of(aligned)
    }

    /// Stages that a GPU has room for.
    fn stages(&self, device: &CudaDevice, shared: impl Fn(usize) -> usize) -> Result<usize> {
        let context = device.cuda_stream().context().clone();
        let room = context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).w()? as usize;
        Ok(if shared(self.stages) <= room { self.stages } else { 1 })
    }
}

/// The kernels of a width, as `kernel.cu` instantiates them.
struct Widths {
    width: usize,
    forward: Blocks,
    keys: Blocks,
    queries: Blocks,
    /// Rows of all tiles in f32.
    rows_f32: usize,
}

const WIDTHS: [Widths; 7] = [
    widths(16, Blocks::new(128, 4, 64, 2), Blocks::new(128, 4, 64, 2), Blocks::new(128, 4, 64, 2), 64),
    widths(32, Blocks::new(128, 4, 64, 2), Blocks::new(128, 4, 64, 2), Blocks::new(128, 4, 64, 2), 64),
    widths(64, Blocks::new(128, 4, 64, 2), Blocks::new(128, 4, 64, 2), Blocks::new(128, 4, 64, 2), 64),
    widths(96, Blocks::new(128, 4, 64, 1), Blocks::new(128, 8, 64, 2), Blocks::new(128, 4, 64, 2), 32),
    widths(128, Blocks::new(128, 4, 64, 1), Blocks::new(128, 8, 64, 2), Blocks::new(128, 4, 64, 1), 32),
    widths(192, Blocks::new(128, 8, 64, 1), Blocks::new(64, 4, 64, 1), Blocks::new(64, 4, 64, 1), 16),
    widths(256, Blocks::new(64, 4, 64, 1), Blocks::new(64, 4, 32, 1), Blocks::new(64, 4, 32, 1), 16),
];

/// As [`WIDTHS`], of `hopper.cu`.
const HOPPER: [Widths; 2] = [
    widths(64, Blocks::new(64, 4, 128, 2), Blocks::new(64, 4, 64, 2), Blocks::new(64, 4, 64, 2), 0),
    widths(128, Blocks::new(128, 8, 128, 2), Blocks::new(64, 4, 64, 2), Blocks::new(64, 4, 64, 2), 0),
];

/// The kernels for a width and dtype: where they are, what their names end in, and what the bytes of their stages are multiples
/// of.
struct Kernels {
    widths: &'static Widths,
    module: &'static str,
    suffix: &'static str,
    aligned: usize,
}

const fn widths(width: usize, forward: Blocks, keys: Blocks, queries: Blocks, rows_f32: usize) -> Widths {
    Widths { width, forward, keys, queries, rows_f32 }
}

/// From this width on, the gradients of keys and of values take a kernel each.
const APART: usize = 192;
const THREADS_F32: usize = 256;

/// Whether heads of `hd` numbers can be trained as they are.
pub fn trains(hd: usize) -> bool {
    width(hd) == hd && hd <= WIDTHS[WIDTHS.len() - 1].width
}

/// The width that heads are padded to: rows are copied 16 bytes at a time.
pub fn width(hd: usize) -> usize {
    hd.next_multiple_of(8)
}

/// [`Starts`] on a GPU.
#[derive(Debug)]
pub struct OnGpu {
    /// `(b, sq)`.
    starts: Tensor,
    /// `(b, sq / BOUND, 3)`: see [`bounds`].
    bounds: Tensor,
}

impl Starts {
    fn on(&self, device: &CudaDevice, n_queries: usize) -> Result<&OnGpu> {
        if self.on_gpu.get().is_none() {
            let starts = gpu::upload(&self.values, self.values.len(), device)?;
            let bounds = bounds(&self.values, n_queries);
            let bounds = gpu::upload(&bounds, bounds.len(), device)?;
            // Another thread may have been faster, with the same.
            let _ = self.on_gpu.set(OnGpu { starts, bounds });
        }
        let on_gpu = self.on_gpu.get().expect("set above");
        assert!(gpu::device(&on_gpu.starts).id() == device.id(), "a mask belongs to one GPU");
        Ok(on_gpu)
    }
}

/// What all kernels are told.
struct Plan<'a> {
    device: &'a CudaDevice,
    b: usize,
    sq: usize,
    sk: usize,
    h: usize,
    kv: usize,
    hd: usize,
    starts: Option<&'a Tensor>,
    bounds: Option<&'a Tensor>,
    /// `(h)`, f32.
    sinks: Option<Tensor>,
    /// The cap is `factor * tanh(score * scale / cap)`, the argument of which is passed as that of `exp2`; 0: there is none.
    inner: f32,
    /// On scores, in powers of 2.
    factor: f32,
}

impl<'a> Plan<'a> {
    fn new(q: &'a Tensor, k: &Tensor, mask: &'a AttentionMask, scores: &Scores) -> Result<Self> {
        let ((b, sq, h, hd), (_, sk, kv, _)) = (q.dims4()?, k.dims4()?);
        assert!(h % kv == 0 && sq <= sk, "query heads share key heads evenly, and queries are the last positions");
        assert!(hd % 8 == 0, "heads are as wide as `width` says");
        let device = gpu::device(q);
        let log2_e = std::f32::consts::LOG2_E;
        let (inner, factor) = match scores.softcap {
            Some(cap) => (2.0 * log2_e * scores.scale / cap, cap * log2_e),
            None => (0.0, scores.scale * log2_e),
        };
        let sinks = scores.sinks.as_ref().map(|sinks| gpu::elements(&sinks.weights()?, DType::F32)).transpose()?;
        let on_gpu = mask.starts.as_ref().map(|starts| starts.on(device, sq)).transpose()?;
        let (starts, bounds) = (on_gpu.map(|it| &it.starts), on_gpu.map(|it| &it.bounds));
        Ok(Self { device, b, sq, sk, h, kv, hd, starts, bounds, sinks, inner, factor })
    }

    /// The kernels that heads are narrow enough for.
    fn kernels(&self, dtype: DType) -> Result<Kernels> {
        let widths = WIDTHS.iter().find(|it| self.hd <= it.width).ok_or_else(|| {
            let widest = WIDTHS[WIDTHS.len() - 1].width;
            Error::Device(format!("heads of {} numbers cannot be trained on a GPU: at most {widest}", self.hd))
        })?;
        let hopper = HOPPER.iter().find(|it| it.width == widths.width && dtype == DType::BF16);
        Ok(match hopper {
            Some(widths) if gpu::is_hopper(self.device)? => {
                Kernels { widths, module: "attention_hopper", suffix: "hopper", aligned: 1024 }
            }
            _ => Kernels { widths, module: OP, suffix: suffix(dtype), aligned: 1 },
        })
    }

    /// Blocks for each of `tiles` of `heads`, which read two rows of numbers for each of `others` of a row of the batch.
    fn grid(&self, heads: usize, tiles: usize, others: usize) -> [usize; 3] {
        let rows = rows_at_once(self.b, heads * tiles, 2 * others * self.hd * size_of::<half::bf16>());
        [rows * heads, tiles, self.b / rows]
    }

    fn sizes(&self) -> [i32; 5] {
        [self.sq, self.sk, self.h, self.kv, self.hd].map(|size| size as i32)
    }
}

/// What any second-level cache holds beside what passes by, and blocks of unequal length that keep a GPU busy to their end.
/// So little in tests that they launch some of a batch at a time.
const CACHED_BYTES: usize = if cfg!(test) { 1 << 10 } else { 32 << 20 };
const BLOCKS_AT_ONCE: usize = if cfg!(test) { 4 } else { 1024 };

/// Rows of a batch whose blocks are launched together, the longest of all of them first: few enough that what they read again
/// and again stays in the cache, and enough that some are left when the longest end.
fn rows_at_once(b: usize, blocks_of_row: usize, bytes_of_row: usize) -> usize {
    let mut rows = b;
    for fewer in (1..b).rev().filter(|rows| b.is_multiple_of(*rows)) {
        if rows * bytes_of_row <= CACHED_BYTES || fewer * blocks_of_row < BLOCKS_AT_ONCE {
            break;
        }
        rows = fewer;
    }
    rows
}

/// Numbers from one position to the next in each of these `(b, s, heads, hd)`, all that kernels are told of where they lie.
fn positions_apart(tensors: &[&Tensor]) -> Result<i32> {
    let of = |x: &Tensor| -> Result<usize> {
        let (_, s, heads, hd) = x.dims4()?;
        let apart = if x.is_contiguous() { heads * hd } else { x.stride()[1] };
        let mut strides = x.dims().iter().zip(x.stride()).zip([s * apart, apart, hd, 1]);
        assert!(
            strides.all(|((size, stride), expected)| *size == 1 || *stride == expected),
            "only positions lie apart"
        );
        assert!(apart.is_multiple_of(8) && gpu::first(x)?.is_multiple_of(16), "rows begin where 16 bytes do");
        Ok(apart)
    };
    let apart = of(tensors[0])?;
    for tensor in tensors {
        assert_eq!(of(tensor)?, apart, "tensors that lie alike");
    }
    Ok(apart as i32)
}

/// The result, and the logsumexp of each query, `(b, h, sq)`, of base 2.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, mask: &AttentionMask, scores: &Scores) -> Result<(Tensor, Tensor)> {
    let [q, k, v] = contiguous([q, k, v])?;
    forward_of([&q, &k, &v], mask, scores)
}

fn contiguous([q, k, v]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
    let dtype = q.dtype();
    Ok([gpu::elements(q, dtype)?, gpu::elements(k, dtype)?, gpu::elements(v, dtype)?])
}

/// As [`forward`], of tensors in which positions may lie apart.
pub fn forward_of([q, k, v]: [&Tensor; 3], mask: &AttentionMask, scores: &Scores) -> Result<(Tensor, Tensor)> {
    let dtype = q.dtype();
    let plan = Plan::new(q, k, mask, scores)?;
    let [q_stride, k_stride] = [positions_apart(&[q])?, positions_apart(&[k, v])?];
    let y = gpu::uninit(q.shape(), dtype, plan.device)?;
    let [q, k, v] = addresses([q, k, v])?;
    let logsumexp = gpu::uninit((plan.b, plan.h, plan.sq), DType::F32, plan.device)?;
    let Kernels { widths: Widths { width, forward, rows_f32, .. }, module, suffix, aligned } = plan.kernels(dtype)?;
    let (rows, threads, shared) = match dtype {
        DType::BF16 => (forward.rows, 32 * forward.warps, forward.shared(*width, 1, forward.stages, 0, aligned)),
        _ => (*rows_f32, THREADS_F32, shared_f32(*width, *rows_f32, 2)),
    };
    let [sq, sk, h, kv, hd] = plan.sizes();
    // Blocks for all queries of all heads, each of which stays inside these sizes.
    launch!(
        plan.device, module, &format!("attention_forward_{suffix}_{width}"),
        grid: plan.grid(plan.h, plan.sq.div_ceil(rows), plan.kv * plan.sk), block: threads, shared: shared;
        q, k, v, plan.starts, plan.bounds, plan.sinks.as_ref(), &y, &logsumexp,
        sq, sk, h, kv, hd, q_stride, k_stride, plan.inner, plan.factor,
    );
    Ok((y, logsumexp))
}

/// `n_tiles` tiles of inputs, and one of scores.
fn shared_f32(width: usize, rows: usize, n_tiles: usize) -> usize {
    (n_tiles * rows * (width + 4) + rows * (rows + 4)) * 4
}

/// The gradients of q, k and v; that of sinks is added to their accumulator.
pub fn backward(saved: Saved, dy: &Tensor, mask: &AttentionMask, scores: &Scores) -> Result<(Tensor, Tensor, Tensor)> {
    let [q, k, v] = contiguous([saved.q, saved.k, saved.v])?;
    let (dq, dk, dv) = (uninit_like(&q)?, uninit_like(&k)?, uninit_like(&v)?);
    backward_into([&dq, &dk, &dv], Saved { q: &q, k: &k, v: &v, ..saved }, dy, mask, scores)?;
    Ok((dq, dk, dv))
}

pub fn uninit_like(tensor: &Tensor) -> Result<Tensor> {
    gpu::uninit(tensor.shape(), tensor.dtype(), gpu::device(tensor))
}

/// As [`backward`], of tensors in which positions may lie apart, as they do in those that the gradients go to.
pub fn backward_into(
    [dq, dk, dv]: [&Tensor; 3],
    Saved { q, k, v, y, logsumexp }: Saved,
    dy: &Tensor,
    mask: &AttentionMask,
    scores: &Scores,
) -> Result<()> {
    let dtype = q.dtype();
    let dy = gpu::elements(dy, dtype)?;
    let plan = Plan::new(q, k, mask, scores)?;
    let Plan { device, b, starts, bounds, inner, factor, .. } = plan;
    let [q_stride, k_stride] = [positions_apart(&[q, dq])?, positions_apart(&[k, v, dk, dv])?];
    assert!(gpu::by_eights(plan.hd, &[y, &dy])?, "results begin where 16 bytes do");
    let ([dq, dk, dv], [q, k, v]) = (addresses([dq, dk, dv])?, addresses([q, k, v])?);
    let padded = plan.sq.next_multiple_of(BOUND);
    let stats = gpu::uninit((b, plan.h, padded, 2), DType::F32, device)?;
    let [sq, sk, h, kv, hd] = plan.sizes();

    // As many lanes per query as take it whole, 8 numbers each.
    let lanes = (plan.hd / 8).next_power_of_two();
    launch!(
        device, OP, &format!("attention_stats_{}", suffix(dtype)),
        grid: [(b * padded * plan.h * lanes).div_ceil(256), 1, 1], block: 256;
        y, &dy, logsumexp, &stats, b, sq, h, hd, lanes as i32,
    );
    let grad = scores.sinks.as_ref().map(|sinks| sinks.accumulator()).transpose()?.flatten();
    if let (Some(sinks), Some(grad)) = (&plan.sinks, grad) {
        // One block per head; the statistics of all of them.
        launch!(
            device, OP, "attention_sinks", grid: [plan.h, 1, 1], block: 256;
            sinks, &stats, &grad, b as i32, padded as i32,
        );
    }

    let Kernels { widths: Widths { width, keys, queries, rows_f32, .. }, module, suffix, aligned } =
        plan.kernels(dtype)?;
    let is_bf16 = dtype == DType::BF16;
    let parts: &[&str] = if is_bf16 && *width >= APART { &["dk", "dv"] } else { &["keys"] };
    for part in parts {
        let shared = |stages| keys.shared(*width, if *part == "dv" { 1 } else { 2 }, stages, 8, aligned);
        let stages = keys.stages(device, shared)?;
        let (rows, threads, shared) = match is_bf16 {
            true => (keys.rows, 32 * keys.warps, shared(stages)),
            false => (*rows_f32, THREADS_F32, shared_f32(*width, *rows_f32, 4)),
        };
        // Blocks for all keys of all key heads.
        launch!(
            device, module, &format!("attention_backward_{part}_{suffix}_{width}"),
            grid: plan.grid(plan.kv, plan.sk.div_ceil(rows), plan.h * plan.sq), block: threads, shared: shared;
            q, k, v, &dy, &stats, starts, bounds, dk, dv, sq, sk, h, kv, hd, q_stride, k_stride, inner, factor,
            scores.scale, stages as i32,
        );
    }
    let shared = |stages| queries.shared(*width, 2, stages, 0, aligned);
    let stages = queries.stages(device, shared)?;
    let (rows, threads, shared) = match is_bf16 {
        true => (queries.rows, 32 * queries.warps, shared(stages)),
        false => (*rows_f32, THREADS_F32, shared_f32(*width, *rows_f32, 4)),
    };
    // Blocks for all queries of all heads.
    launch!(
        device, module, &format!("attention_backward_queries_{suffix}_{width}"),
        grid: plan.grid(plan.h, plan.sq.div_ceil(rows), plan.kv * plan.sk), block: threads, shared: shared;
        q, k, v, &dy, &stats, starts, bounds, dq, sq, sk, h, kv, hd, q_stride, k_stride, inner, factor, scores.scale,
        stages as i32,
    );
    Ok(())
}

fn addresses([q, k, v]: [&Tensor; 3]) -> Result<[u64; 3]> {
    Ok([gpu::first(q)?, gpu::first(k)?, gpu::first(v)?])
}

/// Queries that share a key head, up to which their keys are split over blocks instead of queries.
const FEW: usize = 32;
/// Blocks that keep any GPU busy.
const MANY_BLOCKS: usize = 512;
/// Threads of a block, each of which has a key at a time; bytes of each that are staged, twice.
const THREADS_DECODE: usize = 128;
const STAGED: usize = 128;
const STAGED_BYTES: usize = 2 * THREADS_DECODE * (STAGED + 16);
/// Shared memory of a block, and memory for what blocks hand on.
const MOST_SHARED: usize = 96 << 10;
const MOST_PARTS: usize = 256 << 20;

/// As [`forward`], where no gradient is wanted. Heads may be wider here.
pub fn without_gradient(q: &Tensor, k: &Tensor, v: &Tensor, mask: &AttentionMask, scores: &Scores) -> Result<Tensor> {
    let ((_, sq, h, hd), kv) = (q.dims4()?, k.dim(2)?);
    if sq * (h / kv) > FEW && hd <= WIDTHS[WIDTHS.len() - 1].width {
        return Ok(forward(q, k, v, mask, scores)?.0);
    }
    let q = gpu::elements(q, q.dtype())?;
    let (k, k_batch) = rows_of_batch(k)?;
    let (v, v_batch) = rows_of_batch(&copy::cast(v, k.dtype())?)?;
    let plan = Plan::new(&q, &k, mask, scores)?;
    let Plan { device, b, sk, kv, .. } = plan;
    let y = gpu::uninit(q.shape(), q.dtype(), device)?;
    let first_key = mask.starts.as_ref().and_then(|it| it.values.iter().min().copied()).unwrap_or(0) as usize;
    let all_rows = plan.h / kv * plan.sq;

    // Results depend on how keys are split, which depends on sizes and the mask alone.
    let per_block = [4, 8].into_iter().find(|n| all_rows <= *n).unwrap_or(16);
    let queries_bytes =
        per_block * (hd * k.dtype().size_in_bytes()).next_multiple_of(STAGED) / k.dtype().size_in_bytes() * 4;
    let room =
        MOST_SHARED.saturating_sub(STAGED_BYTES + queries_bytes) / (per_block * 4) / THREADS_DECODE * THREADS_DECODE;
    let blocks_of_keys = b * kv * all_rows.div_ceil(per_block);
    let splits = MANY_BLOCKS.div_ceil(blocks_of_keys);
    let span = (sk - first_key).div_ceil(splits).next_multiple_of(THREADS_DECODE).min(room.clamp(THREADS_DECODE, 1024));
    let splits = (sk - first_key).div_ceil(span);
    let shared = STAGED_BYTES + queries_bytes + span * per_block * 4;

    let most_rows = (MOST_PARTS / (b * kv * splits * hd * 4)).max(per_block).min(all_rows);
    let [sq, sk, h, kv, hd] = plan.sizes();
    for first_row in (0..all_rows).step_by(most_rows) {
        let rows = most_rows.min(all_rows - first_row);
        let parts = b * plan.kv * rows * splits;
        let (stats, sums) =
            (gpu::uninit((parts, 2), DType::F32, device)?, gpu::uninit((parts, plan.hd), DType::F32, device)?);
        // Blocks for all keys from the first one on, and `rows` queries of each key head; keys of a row of the batch lie as
        // `rows_of_batch` says.
        launch!(
            device, OP, &format!("attention_decode_{}_{per_block}", suffix(k.dtype())),
            grid: [splits, b * plan.kv, rows.div_ceil(per_block)], block: THREADS_DECODE, shared: shared;
            &q, i32::from(q.dtype() == DType::BF16), gpu::first(&k)?, gpu::first(&v)?, plan.starts, &stats, &sums,
            first_row as i32, rows as i32, sq, sk, h, kv, hd, k_batch, v_batch, first_key as i32, span as i32,
            plan.inner, plan.factor,
        );
        // A block for each of those queries. Its loop is compiled to read weights by fours, unused ones too.
        launch!(
            device, OP, &format!("attention_join_{}", suffix(q.dtype())),
            grid: [rows, b * plan.kv, 1], block: 128, shared: splits.next_multiple_of(4) * 4;
            &stats, &sums, plan.sinks.as_ref(), &y, first_row as i32, rows as i32, splits as i32, sq, sk, h, kv, hd,
        );
    }
    Ok(y)
}

/// `(b, s, heads, hd)` such that only the rows of the batch may lie apart, as they do in a cache that has room for more, and
/// how far apart they are.
fn rows_of_batch(x: &Tensor) -> Result<(Tensor, usize)> {
    let (_, _, heads, hd) = x.dims4()?;
    let x = match x.stride() {
        [_, s, n, 1] if *s == heads * hd && *n == hd && gpu::first(x)?.is_multiple_of(16) => x.clone(),
        _ => gpu::elements(x, x.dtype())?,
    };
    let apart = x.stride()[0];
    Ok((x, apart))
}
