use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use candle_core::{DType, Device, Tensor};

use super::{Adapter, Float8};
use crate::Result;

/// The distribution of a parameter's initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Constant(f64),
    /// Zero mean, redrawn until it falls into `[-limit, limit]` (an absolute bound; infinite for a plain normal).
    Normal {
        std: f64,
        limit: f64,
    },
    /// From `[-limit, limit)`.
    Uniform {
        limit: f64,
    },
}

/// Which numbers a stage holds its parameters in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Of the weights that the optimizer updates, and of its state.
    pub storage: DType,
    /// Of the copy that forward and backward read.
    pub compute: DType,
}

impl Precision {
    /// That of weights which no optimizer updates: only what forward and backward read is kept.
    pub fn frozen(self) -> Self {
        Self { storage: self.compute, ..self }
    }

    /// That of weights which are only looked up, by ops that read them in full precision: they have no copy.
    pub fn of_lookups(self) -> Self {
        Self { compute: self.storage, ..self }
    }

    /// What training takes for each parameter: weight, gradient (f32), two moments, and the copy in the compute dtype.
    pub fn training_bytes(self) -> usize {
        3 * self.storage.size_in_bytes() + DType::F32.size_in_bytes() + self.copy_bytes()
    }

    /// What a frozen parameter takes.
    pub fn frozen_bytes(self) -> usize {
        self.compute.size_in_bytes()
    }

    fn copy_bytes(self) -> usize {
        if self.compute == self.storage { 0 } else { self.compute.size_in_bytes() }
    }
}

/// The memory of a stage: flat buffers that every parameter of the stage is a window of, so that norm, clipping,
/// reduction and optimizer pass once over each.
#[derive(Debug)]
pub struct StageBuffers {
    /// What the optimizer updates, `(numel,)` in the storage dtype; in the host's memory where the run offloads it.
    pub weights: Tensor,
    /// What forward and backward read, `(numel,)` in the compute dtype. Shares memory with `weights` if dtypes and devices
    /// are equal.
    pub compute: Tensor,
    /// Where backward adds gradients, `(numel,)` f32; `None` where the weights are frozen, or the model only runs forward.
    pub grads: Option<Tensor>,
}

/// Lays out the parameters of one stage. Building a model takes no memory for weights: parameters are described and
/// counted first, and usable after [`StageBuilder::allocate`].
#[derive(Debug, Default)]
pub struct StageBuilder {
    name: String,
    numel: usize,
    parameters: Vec<Arc<Parameter>>,
    buffers: Arc<OnceLock<StageBuffers>>,
}

impl StageBuilder {
    /// An empty stage, called `name` in profiles.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Appends a parameter to the stage's layout.
    pub fn parameter(&mut self, fqn: impl Into<String>, shape: &[usize], init: Init) -> Arc<Parameter> {
        let parameter = Arc::new(Parameter {
            fqn: fqn.into(),
            shape: shape.to_vec(),
            init,
            offset: self.numel,
            buffers: self.buffers.clone(),
            adapter: RwLock::default(),
            float8: OnceLock::new(),
        });
        self.numel += parameter.numel();
        self.parameters.push(parameter.clone());
        parameter
    }

    pub fn parameters(&self) -> &[Arc<Parameter>] {
        &self.parameters
    }

    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Takes the memory, zeroed. Weights are then written with [`Parameter::set`].
    pub fn allocate(&self, precision: Precision, device: &Device, with_grads: bool) -> Result<()> {
        self.allocate_apart(precision, device, device, with_grads)
    }

    /// As [`StageBuilder::allocate`], with what the optimizer updates in the memory of another device.
    pub fn allocate_apart(
        &self,
        precision: Precision,
        device: &Device,
        of_optimizer: &Device,
        with_grads: bool,
    ) -> Result<()> {
        let weights = Tensor::zeros(self.numel, precision.storage, of_optimizer)?;
        let compute = if precision.compute == precision.storage && device.same_device(of_optimizer) {
            weights.clone()
        } else {
            Tensor::zeros(self.numel, precision.compute, device)?
        };
        let grads = with_grads.then(|| Tensor::zeros(self.numel, DType::F32, device)).transpose()?;
        self.buffers.set(StageBuffers { weights, compute, grads }).expect("a stage is allocated once");
        Ok(())
    }

    /// The stage's memory.
    pub fn buffers(&self) -> &StageBuffers {
        self.buffers.get().expect("a stage is allocated before it is used")
    }

    /// The gradients of a stage that is trained, `(numel,)` f32.
    pub fn grads(&self) -> &Tensor {
        self.buffers().grads.as_ref().expect("a model that trains has gradients")
    }
}

/// A trainable tensor: a window of its stage's buffers. Frozen, it may have an adapter that is trained in its place.
#[derive(Debug)]
pub struct Parameter {
    fqn: String,
    shape: Vec<usize>,
    init: Init,
    offset: usize,
    buffers: Arc<OnceLock<StageBuffers>>,
    adapter: RwLock<Option<Arc<Adapter>>>,
    float8: OnceLock<Float8>,
}

impl Parameter {
    /// The field path, as in `layers.0.attention.wq.weight`.
    pub fn fqn(&self) -> &str {
        &self.fqn
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn init(&self) -> Init {
        self.init
    }

    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The weights as forward and backward read them, in the compute dtype.
    pub fn compute(&self) -> Result<Tensor> {
        self.window(&self.buffers().compute)
    }

    /// The weights as the optimizer updates them, in the storage dtype.
    pub fn weights(&self) -> Result<Tensor> {
        self.window(&self.buffers().weights)
    }

    /// The weights for ops that read them in full precision: what the optimizer updates, or where that is on another device,
    /// what products read.
    pub fn precise(&self) -> Result<Tensor> {
        let StageBuffers { weights, compute, .. } = self.buffers();
        self.window(if weights.device().same_device(compute.device()) { weights } else { compute })
    }

    /// The adapter that products with this weight add to it.
    pub fn adapter(&self) -> Option<Arc<Adapter>> {
        self.adapter.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_adapter(&self, adapter: Option<Arc<Adapter>>) {
        *self.adapter.write().unwrap_or_else(PoisonError::into_inner) = adapter;
    }

    /// How products with this weight are computed in 8-bit floats, if they are.
    pub fn float8(&self) -> Option<Float8> {
        self.float8.get().copied()
    }

    /// From here on, products with this weight are computed in 8-bit floats. Both of its sizes are multiples of 16.
    pub fn set_float8(&self, float8: Float8) {
        assert!(self.shape.len() == 2 && self.shape.iter().all(|size| size.is_multiple_of(16)), "{:?}", self.shape);
        self.float8.set(float8).expect("a weight is converted once");
    }

    /// Whether products with this weight are of its own numbers alone.
    pub fn is_plain(&self) -> bool {
        self.adapter().is_none() && self.float8().is_none()
    }

    /// The matrices `parts` as one, where they lie one behind the other in their stage and products with them are plain: what
    /// it multiplies by, and adds gradients to, is theirs.
    pub fn stacked(parts: &[&Arc<Self>]) -> Option<Self> {
        let first = parts[0];
        let mut end = first.offset;
        for part in parts {
            let follows = Arc::ptr_eq(&part.buffers, &first.buffers) && part.offset == end;
            if !(follows && part.is_plain() && part.shape[1..] == first.shape[1..]) {
                return None;
            }
            end += part.numel();
        }
        Some(Self {
            fqn: first.fqn.clone(),
            shape: [&[parts.iter().map(|part| part.shape[0]).sum()], &first.shape[1..]].concat(),
            init: first.init,
            offset: first.offset,
            buffers: first.buffers.clone(),
            adapter: RwLock::default(),
            float8: OnceLock::new(),
        })
    }

    /// Where backward adds the gradient, f32; `None` for a frozen weight, whose gradient need not be computed.
    pub fn accumulator(&self) -> Result<Option<Tensor>> {
        self.buffers().grads.as_ref().map(|grads| self.window(grads)).transpose()
    }

    /// The gradient of a weight that is trained, f32.
    pub fn grad(&self) -> Result<Tensor> {
        self.window(self.buffers().grads.as_ref().expect("gradients are asked for where they were allocated"))
    }

    /// This parameter's part of one of the stage's flat buffers (or of a buffer laid out like them).
    pub fn window(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.narrow(0, self.offset, self.numel())?.reshape(self.shape.as_slice())?)
    }

    /// Overwrites the weights, and the compute copy with them.
    ///
    /// # Errors
    /// If the shape of `values` is another.
    pub fn set(&self, values: &Tensor) -> Result<()> {
        let buffers = self.buffers();
        let mut flat = values.reshape(self.shape.as_slice())?.flatten_all()?;
        for buffer in [&buffers.weights, &buffers.compute] {
            // Moved once, and cast where it is then.
            flat = flat.to_device(buffer.device())?;
            buffer.slice_set(&flat.to_dtype(buffer.dtype())?, 0, self.offset)?;
        }
        Ok(())
    }

    fn buffers(&self) -> &StageBuffers {
        self.buffers.get().expect("a parameter is used after its stage is allocated")
    }
}
