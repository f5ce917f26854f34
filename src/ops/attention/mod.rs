//! Attention with a streaming softmax: no matrix of scores is ever held whole.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod decode;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::ops::host::floats;
use crate::ops::narrow::with_width;
#[cfg(feature = "cuda")]
use crate::ops::rope;
use crate::ops::{RopeTable, linear};
use crate::tools::profiler;

/// Which keys each query sees: those from its own lower bound up to its own position.
///
/// Causal, chunked and document masks, and any of them together, are all such bounds, one number per query.
#[derive(Clone, Debug, Default)]
pub struct AttentionMask {
    /// `None`: every query sees everything before it.
    starts: Option<Arc<Starts>>,
}

/// Lower bounds of queries.
#[derive(Debug)]
struct Starts {
    /// `b · s` of them, row-major.
    values: Vec<u32>,
    /// The same on a GPU, for all layers.
    #[cfg(feature = "cuda")]
    on_gpu: OnceLock<cuda::OnGpu>,
}

/// Queries that a GPU plans for together.
#[cfg(any(feature = "cuda", test))]
const BOUND: usize = 64;

/// What each `BOUND` queries of a row see: the smallest of their lower bounds, the largest, and the smallest of theirs and those
/// of all later queries. So blocks of keys are passed over that none sees, and not looked into where all are seen by all.
#[cfg(any(feature = "cuda", test))]
fn bounds(starts: &[u32], n_queries: usize) -> Vec<u32> {
    let of_row = |row: &[u32]| {
        let of = |starts: &[u32]| starts.iter().fold((u32::MAX, 0), |(least, most), s| (least.min(*s), most.max(*s)));
        let mut bounds: Vec<[u32; 3]> = row.chunks(BOUND).map(of).map(|(least, most)| [least, most, least]).collect();
        for i in (1..bounds.len()).rev() {
            bounds[i - 1][2] = bounds[i - 1][2].min(bounds[i][2]);
        }
        bounds.into_flattened()
    };
    starts.chunks(n_queries).flat_map(of_row).collect()
}

impl AttentionMask {
    /// Every token sees itself and all before it.
    pub fn causal() -> Self {
        Self::default()
    }

    /// Besides, tokens see only their own document: a document begins after each `eos_id`, which belongs to the
    /// document that it ends. `tokens` holds rows of `seq_len`.
    pub fn within_documents(self, tokens: &[u32], seq_len: usize, eos_id: u32) -> Self {
        let starts = tokens.chunks(seq_len).flat_map(|row| {
            let mut start = 0;
            row.iter().enumerate().map(move |(position, token)| {
                let own = start;
                if *token == eos_id {
                    start = position as u32 + 1;
                }
                own
            })
        });
        self.raised_to(starts.collect())
    }

    /// Besides, tokens see only the last `size` positions up to their own, in `rows` rows of queries at `positions`.
    pub fn within_window(self, size: usize, rows: usize, positions: std::ops::Range<usize>) -> Self {
        if positions.end <= size {
            return self;
        }
        let row = positions.map(|position| (position + 1).saturating_sub(size) as u32);
        self.raised_to(std::iter::repeat_n(row, rows).flatten().collect())
    }

    /// Besides, tokens see only their own block of `block_size` positions, in `rows` rows of queries at `positions`.
    pub fn within_blocks(self, block_size: usize, rows: usize, positions: std::ops::Range<usize>) -> Self {
        if positions.end <= block_size {
            return self;
        }
        let row = positions.map(|position| (position / block_size * block_size) as u32);
        self.raised_to(std::iter::repeat_n(row, rows).flatten().collect())
    }

    /// Besides, each query sees nothing before its own lower bound, `b · s` of them, row-major.
    pub fn raised_to(self, mut starts: Vec<u32>) -> Self {
        if let Some(own) = &self.starts {
            starts.iter_mut().zip(&own.values).for_each(|(start, own)| *start = (*start).max(*own));
        }
        let starts = Starts {
            values: starts,
            #[cfg(feature = "cuda")]
            on_gpu: OnceLock::new(),
        };
        Self { starts: Some(Arc::new(starts)) }
    }

    /// The first key that query `query` of row `row` sees.
    fn start(&self, row: usize, query: usize, n_queries: usize) -> usize {
        self.starts.as_ref().map_or(0, |starts| starts.values[row * n_queries + query] as usize)
    }
}

/// How scores are made, and what competes with them.
#[derive(Clone, Debug)]
pub struct Scores {
    /// Factor on `q kᵀ`.
    pub scale: f32,
    /// Scores become `softcap · tanh(scores / softcap)`.
    pub softcap: Option<f32>,
    /// One score per query head that takes its share of the softmax, and gives nothing to the result: `(h)`.
    pub sinks: Option<Arc<Parameter>>,
}

impl Scores {
    /// `scale · q kᵀ`.
    pub fn scaled(scale: f32) -> Self {
        Self { scale, softcap: None, sinks: None }
    }

    /// Whether there is nothing to them but the scale.
    fn is_plain(&self) -> bool {
        self.softcap.is_none() && self.sinks.is_none()
    }

    /// The score of each head's sink: one that takes nothing where there are none.
    fn sink_values(&self, heads: usize) -> Result<Vec<f32>> {
        match &self.sinks {
            Some(sinks) => Ok(floats(&sinks.weights()?)?.to_vec()),
            None => Ok(vec![f32::NEG_INFINITY; heads]),
        }
    }
}

/// `softmax(scale · q kᵀ) v` for each query head, over the keys that `mask` lets it see; query head `i` reads key/value
/// head `i / (h / kv)`. Scores may be capped, and compete with a sink, as `scores` says. Scores, softmax statistics and
/// sums are f32; the result has `q`'s dtype.
///
/// The `sq` queries stand at the last `sq` of the `sk` positions (`sq < sk` when keys are cached). Saves one logsumexp
/// per query; backward recomputes the probabilities from it, block by block.
///
/// # Shapes
/// `q`: `(b, sq, h, hd)`. `k`: `(b, sk, kv, hd)`. `v`: `(b, sk, kv, vd)`. Returns `(b, sq, h, vd)`.
///
/// # Source
/// Dao, arXiv:2307.08691, algorithms 1 and 2; softcap: Gemma 2, arXiv:2408.00118; sinks: GPT-OSS, arXiv:2508.10925.
pub fn attention(q: &Value, k: &Value, v: &Value, mask: &AttentionMask, scores: &Scores) -> Result<Value> {
    let _span = profiler::span("attention").shapes(&[q.tensor().dims(), k.tensor().dims(), v.tensor().dims()]);
    let has_gradient = [q, k, v].iter().any(|input| input.is_tracked());
    let (hd, vd) = (q.tensor().dims4()?.3, v.tensor().dims4()?.3);
    // Zeros at the end of queries and keys add nothing to scores, and those of values nothing to the rest of the result.
    let width = on_device!(q.tensor(), width(hd.max(vd)));
    let (q_wide, k_wide) = (with_width(q.tensor(), width)?, with_width(k.tensor(), width)?);
    let v_wide = with_width(v.tensor(), width)?;
    if !has_gradient {
        let y = on_device!(q_wide, without_gradient(&q_wide, &k_wide, &v_wide, mask, scores))?;
        return Ok(Value::constant(with_width(&y, vd)?));
    }
    let (y, logsumexp) = on_device!(q_wide, forward(&q_wide, &k_wide, &v_wide, mask, scores))?;
    let (saved_y, mask, scores) = (y.clone(), mask.clone(), scores.clone());
    Ok(Value::record("attention", with_width(&y, vd)?, [q, k, v], move |dy| {
        let saved = Saved { q: &q_wide, k: &k_wide, v: &v_wide, y: &saved_y, logsumexp: &logsumexp };
        let (dq, dk, dv) = on_device!(q_wide, backward(saved, &with_width(&dy, width)?, &mask, &scores))?;
        Ok([Some(with_width(&dq, hd)?), Some(with_width(&dk, hd)?), Some(with_width(&dv, vd)?)])
    }))
}

/// [`attention`] of the queries, keys and values that `weights` make of `x`, the first two rotated by `rope` if there is one. A
/// GPU makes all three by one product where their weights lie one behind the other.
///
/// # Shapes
/// `x`: `(b, s, dim)`. `weights`: `(h · head_dim, dim)`, and two of `(kv · head_dim, dim)`. Returns `(b, s, h, head_dim)`.
pub fn projected_attention(
    x: &Value,
    weights: [&Arc<Parameter>; 3],
    head_dim: usize,
    rope: Option<&RopeTable>,
    mask: &AttentionMask,
    scores: &Scores,
) -> Result<Value> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(_), Some(weight)) = (x.tensor().device(), Parameter::stacked(&weights))
        && cuda::trains(head_dim)
    {
        let heads = weights.map(|weight| weight.shape()[0] / head_dim);
        return projected_attention_at_once(x, weight, heads, rope, mask, scores);
    }
    let (b, s, _) = x.tensor().dims3()?;
    let heads = |weight: &Arc<Parameter>| linear(x, weight)?.reshape(&[b, s, weight.shape()[0] / head_dim, head_dim]);
    let [mut q, mut k, v] = [heads(weights[0])?, heads(weights[1])?, heads(weights[2])?];
    if let Some(table) = rope {
        (q, k) = (super::rope(&q, table)?, super::rope(&k, table)?);
    }
    attention(&q, &k, &v, mask, scores)
}

#[cfg(feature = "cuda")]
fn projected_attention_at_once(
    x: &Value,
    weight: Parameter,
    heads: [usize; 3],
    rope: Option<&RopeTable>,
    mask: &AttentionMask,
    scores: &Scores,
) -> Result<Value> {
    let _span = profiler::span("projected_attention").shapes(&[x.tensor().dims(), weight.shape()]);
    let (b, s, _) = x.tensor().dims3()?;
    let all: usize = heads.iter().sum();
    let [h, kv, _] = heads;
    // Queries, keys and values of a position lie one behind the other, and so do their gradients.
    let parts = move |all: &Tensor| -> Result<[Tensor; 3]> {
        Ok([all.narrow(2, 0, h)?, all.narrow(2, h, kv)?, all.narrow(2, h + kv, kv)?])
    };
    let qkv = linear::forward(x.tensor(), &weight)?.reshape((b, s, all, ()))?;
    if let Some(table) = rope {
        rope::cuda::rotate_in_place(&qkv, h + kv, table, 1.0)?;
    }
    let [q, k, v] = parts(&qkv)?;
    let (y, logsumexp) = cuda::forward_of([&q, &k, &v], mask, scores)?;
    let (saved_x, saved_y, rope, mask, scores) =
        (x.tensor().clone(), y.clone(), rope.cloned(), mask.clone(), scores.clone());
    Ok(Value::record_sum("projected_attention", y, [x], move |dy, sum| {
        let gradients = cuda::uninit_like(&qkv)?;
        let [dq, dk, dv] = parts(&gradients)?;
        let saved = Saved { q: &q, k: &k, v: &v, y: &saved_y, logsumexp: &logsumexp };
        cuda::backward_into([&dq, &dk, &dv], saved, &dy, &mask, &scores)?;
        if let Some(table) = &rope {
            rope::cuda::rotate_in_place(&gradients, h + kv, table, -1.0)?;
        }
        Ok([Some(linear::backward(&saved_x, &weight, &gradients, sum.as_ref())?)])
    }))
}

/// What forward leaves for backward.
struct Saved<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    y: &'a Tensor,
    /// Of each query, `(b, h, sq)` f32; of which base, forward and backward agree on.
    logsumexp: &'a Tensor,
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device, Tensor};

    use super::*;
    use crate::models::args::{RopeArgs, RopeLayout, Stretch};
    use crate::ops::rope::tests::reference as rotated;
    use crate::ops::testing::{Case, assert_close, devices, on_threads, parameters_on, random_tensor};

    /// Scores as a matrix, masked by `-inf`, softmax, product: in the dtype of its inputs.
    fn reference(t: &[Tensor], mask: &AttentionMask, scale: f64) -> Result<Tensor> {
        reference_of(t, mask, scale, None, None)
    }

    fn reference_of(
        t: &[Tensor],
        mask: &AttentionMask,
        scale: f64,
        softcap: Option<f64>,
        sinks: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (b, sq, h, _) = t[0].dims4()?;
        let (_, sk, kv, _) = t[1].dims4()?;
        let allowed: Vec<f64> = (0..b * sq * sk)
            .map(|i| {
                let (row, query, key) = (i / (sq * sk), i / sk % sq, i % sk);
                let sees = key >= mask.start(row, query, sq) && key <= sk - sq + query;
                if sees { 0.0 } else { f64::NEG_INFINITY }
            })
            .collect();
        let allowed = Tensor::from_vec(allowed, (b, 1, sq, sk), &Device::Cpu)?;
        let heads = |t: &Tensor| -> Result<Tensor> {
            let (b, s, n, hd) = t.dims4()?;
            let repeated = t.transpose(1, 2)?.unsqueeze(2)?.broadcast_as((b, n, h / n, s, hd))?;
            Ok(repeated.reshape((b, h, s, hd))?)
        };
        assert_eq!(h % kv, 0);
        let (q, k, v) = (heads(&t[0])?, heads(&t[1])?, heads(&t[2])?);
        let scores = (q.matmul(&k.t()?)? * scale)?;
        let scores = match softcap {
            Some(cap) => ((scores / cap)?.tanh()? * cap)?,
            None => scores,
        };
        let mut scores = scores.broadcast_add(&allowed)?;
        if let Some(sinks) = sinks {
            let sinks = sinks.reshape((1, h, 1, 1))?.broadcast_as((b, h, sq, 1))?;
            scores = Tensor::cat(&[scores, sinks], D::Minus1)?;
        }
        let probabilities = candle_nn::ops::softmax(&scores, D::Minus1)?.narrow(D::Minus1, 0, sk)?.contiguous()?;
        Ok(probabilities.matmul(&v)?.transpose(1, 2)?.contiguous()?)
    }

    fn check(dtype: DType, sizes: [usize; 6], mask: &AttentionMask) -> Result<()> {
        check_with_values_of(sizes[5], dtype, sizes, mask)
    }

    fn check_with_values_of(
        vd: usize,
        dtype: DType,
        [b, sq, sk, h, kv, hd]: [usize; 6],
        mask: &AttentionMask,
    ) -> Result<()> {
        let scale = 0.3;
        Case::new("attention")
            .input(random_tensor("q", &[b, sq, h, hd])?.to_dtype(dtype)?)
            .input(random_tensor("k", &[b, sk, kv, hd])?.to_dtype(dtype)?)
            .input(random_tensor("v", &[b, sk, kv, vd])?.to_dtype(dtype)?)
            .check(
                |x| attention(&x[0], &x[1], &x[2], mask, &Scores::scaled(scale)),
                |t| reference(t, mask, f64::from(scale)),
            )
    }

    #[test]
    fn attention_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            check(dtype, [2, 33, 33, 3, 3, 8], &AttentionMask::causal())?;
            check(dtype, [1, 1, 1, 1, 1, 2], &AttentionMask::causal())?;
            check(dtype, [1, 70, 201, 4, 2, 16], &AttentionMask::causal())?;
            check(dtype, [2, 150, 150, 6, 2, 10], &AttentionMask::causal())?;
            check(dtype, [1, 290, 290, 2, 1, 40], &AttentionMask::causal())?;
            check(dtype, [1, 65, 577, 1, 1, 64], &AttentionMask::causal())?;
        }
        Ok(())
    }

    /// Weights one behind the other, as a GPU multiplies by them at once, and apart.
    #[test]
    fn attention_of_products_matches_its_reference() -> Result<()> {
        let (b, s, dim) = (2, 70, 12);
        let mask = AttentionMask::causal().within_window(40, b, 0..s);
        for (dtype, [h, kv, hd], is_rotated, order) in [
            (DType::F32, [4, 2, 16], true, [0, 1, 2]),
            (DType::BF16, [4, 2, 16], true, [0, 1, 2]),
            (DType::BF16, [3, 3, 24], false, [0, 1, 2]),
            (DType::F32, [2, 1, 10], true, [0, 1, 2]),
            (DType::F32, [4, 2, 16], true, [1, 0, 2]),
        ] {
            let args = RopeArgs { dim: hd, theta: 100.0, layout: RopeLayout::Pairs, stretch: Stretch::None };
            let table = |device: &Device| RopeTable::new(&args, s, device);
            let mut case = Case::new("projected_attention").compute(dtype).input(random_tensor("x", &[b, s, dim])?);
            for i in order {
                case = case.parameter(["wq", "wk", "wv"][i], &[[h, kv, kv][i] * hd, dim]);
            }
            let at = |i: usize| order.iter().position(|it| *it == i).unwrap();
            case.check_with_parameters(
                |x, p| {
                    let rope = is_rotated.then(|| table(x[0].tensor().device())).transpose()?;
                    let weights = [0, 1, 2].map(|i| &p[at(i)]);
                    projected_attention(&x[0], weights, hd, rope.as_ref(), &mask, &Scores::scaled(0.3))
                },
                |t, p| {
                    let heads = |i: usize| -> Result<Tensor> {
                        let x = t[0].broadcast_matmul(&p[at(i)].t()?)?.reshape((b, s, (), hd))?;
                        Ok(if is_rotated && i < 2 { rotated(&x, &table(&Device::Cpu)?)? } else { x })
                    };
                    reference(&[heads(0)?, heads(1)?, heads(2)?], &mask, 0.3)
                },
            )?;
        }
        Ok(())
    }

    #[test]
    fn values_may_be_narrower_or_wider_than_keys() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            check_with_values_of(10, dtype, [2, 70, 70, 3, 3, 20], &AttentionMask::causal())?;
            check_with_values_of(24, dtype, [1, 3, 40, 4, 2, 16], &AttentionMask::causal())?;
        }
        Ok(())
    }

    #[test]
    fn capped_scores_and_sinks_match_their_reference() -> Result<()> {
        let (b, sq, sk, h, kv, hd) = (2, 70, 150, 4, 2, 10);
        let window = AttentionMask::causal().within_window(60, b, sk - sq..sk);
        for dtype in [DType::F32, DType::BF16] {
            for (softcap, has_sinks) in [(Some(0.7), false), (None, true), (Some(0.7), true)] {
                let mut case = Case::new("attention of other scores");
                for (name, shape) in [("q", [b, sq, h, hd]), ("k", [b, sk, kv, hd]), ("v", [b, sk, kv, hd])] {
                    case = case.input(random_tensor(name, &shape)?.to_dtype(dtype)?);
                }
                case = if has_sinks { case.parameter("sinks", &[h]) } else { case };
                case.check_with_parameters(
                    |x, p| {
                        let sinks = p.first().cloned();
                        let scores = Scores { scale: 0.3, softcap: softcap.map(|cap| cap as f32), sinks };
                        attention(&x[0], &x[1], &x[2], &window, &scores)
                    },
                    |t, p| reference_of(t, &window, 0.3, softcap, p.first()),
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_window_slides_with_the_queries() {
        let mask = AttentionMask::causal().within_window(3, 2, 1..6);
        assert_eq!(mask.starts.unwrap().values, [0, 0, 1, 2, 3, 0, 0, 1, 2, 3]);
    }

    /// Without gradients, queries few enough that keys are read where they lie, and heads wider than any that is trained.
    #[test]
    fn attention_of_few_queries_matches_its_reference() -> Result<()> {
        let blocks = |b, sq, sk| AttentionMask::causal().within_blocks(700, b, sk - sq..sk);
        for (device, dtype) in on_each_device([DType::F32, DType::BF16]) {
            for [b, sq, sk, h, kv, hd] in [
                [1, 1, 1, 1, 1, 2],
                [1, 1, 3001, 8, 2, 64],
                [2, 3, 1500, 6, 3, 40],
                [1, 2, 1100, 16, 1, 576],
                [2, 5, 900, 2, 2, 264],
                [1, 37, 70, 2, 2, 264],
            ] {
                // Keys and values in a cache that has room for more.
                let input = |name, shape: [usize; 4], len| -> Result<Tensor> {
                    Ok(random_tensor(name, &shape)?.to_dtype(dtype)?.to_device(device)?.narrow(1, 0, len)?)
                };
                let room = usize::next_power_of_two(sk);
                let inputs = [
                    input("q", [b, sq, h, hd], sq)?,
                    input("k", [b, room, kv, hd], sk)?,
                    input("v", [b, room, kv, hd], sk)?,
                ];
                assert_eq!(decode::suits(&inputs[0], &inputs[1])?, sq < 37);
                let sinks = random_tensor("sinks", &[h])?;
                let parameter = parameters_on(device, std::slice::from_ref(&sinks), DType::F32)?.remove(0);
                let other = Scores { scale: 0.3, softcap: Some(0.7), sinks: Some(parameter) };
                let wide = |t: &Tensor| t.contiguous()?.to_device(&Device::Cpu)?.to_dtype(DType::F64);
                let wide = inputs.iter().map(wide).collect::<Result<Vec<_>, _>>()?;
                let sinks = sinks.to_dtype(DType::F64)?;
                for mask in [AttentionMask::causal(), blocks(b, sq, sk)] {
                    let run_with = |scores: &Scores| -> Result<Tensor> {
                        let [q, k, v] = inputs.each_ref().map(|t| Value::constant(t.clone()));
                        Ok(attention(&q, &k, &v, &mask, scores)?.tensor().to_device(&Device::Cpu)?)
                    };
                    let run = || run_with(&Scores::scaled(0.3));
                    // Scores of wide heads are sums of more products.
                    let tolerance = if dtype == DType::BF16 { 1e-2 } else { 2e-6 * (hd as f64 / 64.0).max(1.0) };
                    assert_close("attention", &run()?, &reference(&wide, &mask, 0.3)?, tolerance)?;
                    let expected = reference_of(&wide, &mask, 0.3, Some(0.7), Some(&sinks))?;
                    assert_close("attention of other scores", &run_with(&other)?, &expected, tolerance)?;
                    let bits = || -> Result<Vec<f32>> { Ok(run()?.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?) };
                    assert_eq!(on_threads(1, bits)?, on_threads(3, bits)?);
                }
            }
        }
        Ok(())
    }

    fn on_each_device(dtypes: [DType; 2]) -> impl Iterator<Item = (&'static Device, DType)> {
        devices().iter().flat_map(move |device| dtypes.map(|dtype| (device, dtype)))
    }

    /// Kernels of a GPU differ by the width of a head.
    #[test]
    fn heads_of_any_width_match_their_reference() -> Result<()> {
        let (b, sq, sk) = (2, 140, 205);
        let window = AttentionMask::causal().within_window(50, b, sk - sq..sk);
        for dtype in [DType::F32, DType::BF16] {
            for hd in [16, 32, 56, 96, 128, 136, 256] {
                check(dtype, [b, sq, sk, 4, 2, hd], &window)?;
            }
        }
        Ok(())
    }

    #[test]
    fn queries_may_see_less_than_those_before_them_and_keys_may_be_seen_by_none() -> Result<()> {
        let (b, sq, sk) = (2, 330, 400);
        let start = |i: usize| if i / 64 % 2 == 1 { sk - sq + i - i % 9 } else { i / 3 };
        let starts = (0..b * sq).map(|i| start(i % sq) as u32).collect();
        let mask = AttentionMask::causal().raised_to(starts);
        let late = AttentionMask::causal().within_window(20, 1, 430..500);
        for dtype in [DType::F32, DType::BF16] {
            check(dtype, [b, sq, sk, 2, 1, 16], &mask)?;
            check(dtype, [b, sq, sk, 2, 1, 192], &mask)?;
            check(dtype, [1, 70, 500, 2, 2, 64], &late)?;
        }
        Ok(())
    }

    #[test]
    fn bounds_tell_what_queries_see_together() {
        let starts: Vec<u32> =
            (0..130).map(|i| if i < 64 { 7 + i } else { 5 }).chain((0..130).map(|i| i / 60)).collect();
        let of_first_row = [[7, 70, 5], [5, 5, 5], [5, 5, 5]];
        let of_second_row = [[0, 1, 0], [1, 2, 1], [2, 2, 2]];
        assert_eq!(bounds(&starts, 130), [of_first_row, of_second_row].concat().concat());
    }

    #[test]
    fn masks_of_documents_and_blocks_hide_what_they_should() -> Result<()> {
        let (b, s) = (2, 150);
        let tokens: Vec<u32> = (0..b * s).map(|i| u32::from((i * i) % 41 == 3)).collect();
        let documents = AttentionMask::causal().within_documents(&tokens, s, 1);
        let both = documents.clone().within_blocks(64, b, 0..s);
        for mask in [&documents, &both, &AttentionMask::causal().within_blocks(7, b, 0..s)] {
            check(DType::F32, [b, s, s, 4, 2, 8], mask)?;
            check(DType::BF16, [b, s, s, 4, 2, 8], mask)?;
        }
        let long = AttentionMask::causal().within_blocks(100, 1, 0..600);
        check(DType::BF16, [1, 600, 600, 1, 1, 16], &long)?;
        assert_eq!(both.start(0, 149, s), documents.start(0, 149, s).max(128));
        Ok(())
    }

    #[test]
    fn an_end_of_text_belongs_to_the_document_it_ends() {
        let mask = AttentionMask::causal().within_documents(&[5, 1, 6, 7, 5, 5, 5, 1], 4, 1);
        assert_eq!(mask.starts.unwrap().values, [0, 0, 2, 2, 0, 0, 0, 0]);
    }

    #[test]
    fn attention_is_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        for (device, dtype) in on_each_device([DType::F32, DType::BF16]) {
            let run = || -> Result<Vec<f32>> {
                let input = |name, heads| -> Result<Tensor> {
                    Ok(random_tensor(name, &[2, 340, heads, 8])?.to_dtype(dtype)?.to_device(device)?)
                };
                let q = Value::input(input("q", 4)?);
                let k = Value::constant(input("k", 2)?);
                let y = attention(&q, &k, &k, &AttentionMask::causal(), &Scores::scaled(0.4))?;
                let dx = y.backward(input("dy", 4)?)?.to_device(&Device::Cpu)?;
                Ok(dx.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
            };
            assert_eq!(on_threads(1, run)?, on_threads(3, run)?);
        }
        Ok(())
    }
}
