//! How ops are held to their references.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};

use crate::Result;
use crate::autograd::{Init, Parameter, Precision, StageBuilder, Value};

/// Uniform numbers in [-1, 1), always the same for a name.
pub fn random(name: &str, n: usize) -> Vec<f32> {
    let seed = name.bytes().fold(n as u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

pub fn random_tensor(name: &str, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(random(name, shape.iter().product()), shape, &Device::Cpu)?)
}

/// The devices that ops are tested on: the host, and the first GPU where this program can use one.
pub fn devices() -> &'static [Device] {
    static DEVICES: LazyLock<Vec<Device>> = LazyLock::new(|| {
        let gpu = cfg!(feature = "cuda").then(|| crate::tools::device::gpu(0));
        let gpu = gpu.and_then(|gpu| gpu.inspect_err(|error| eprintln!("passing over the GPU: {error}")).ok());
        [Device::Cpu].into_iter().chain(gpu).collect()
    });
    &DEVICES
}

pub fn on_threads<R: Send>(n: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(body)
}

/// A path of the repository: where cargo says at run time that it lies, else where it lay at compile time. A test that was
/// carried to another machine is told by `CARGO_MANIFEST_DIR`.
pub fn repo(path: &str) -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from).join(path)
}

/// A file of `tests/golden`.
pub fn golden(name: &str) -> Vec<u8> {
    std::fs::read(repo("tests/golden").join(name)).unwrap()
}

/// Parameters holding `values`, in a stage of their own on the host.
pub fn parameters(values: &[Tensor], compute: DType) -> Result<Vec<Arc<Parameter>>> {
    parameters_on(&Device::Cpu, values, compute)
}

/// As [`parameters`], on another device.
pub fn parameters_on(device: &Device, values: &[Tensor], compute: DType) -> Result<Vec<Arc<Parameter>>> {
    let mut stage = StageBuilder::default();
    for (i, values) in values.iter().enumerate() {
        stage.parameter(format!("p{i}"), values.dims(), Init::Constant(0.0));
    }
    stage.allocate(Precision { storage: DType::F32, compute }, device, true)?;
    for (parameter, values) in stage.parameters().iter().zip(values) {
        parameter.set(values)?;
    }
    Ok(stage.parameters().to_vec())
}

/// The largest difference, relative to the largest expected magnitude.
pub fn assert_close(what: &str, ours: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(ours.dims(), expected.dims(), "{what}: shape");
    let ours = ours.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let expected = expected.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let scale = expected.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    for (i, (a, b)) in ours.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "{what}[{i}]: {a}, expected {b} within {tolerance} of {scale}");
    }
    Ok(())
}

/// One op on given inputs, to be compared with its reference: the result, the gradients of every input and parameter,
/// and each input gradient against finite differences of the reference.
pub struct Case {
    name: &'static str,
    compute: DType,
    inputs: Vec<Tensor>,
    parameters: Vec<Tensor>,
}

impl Case {
    pub fn new(name: &'static str) -> Self {
        Self { name, compute: DType::F32, inputs: vec![], parameters: vec![] }
    }

    pub fn compute(mut self, dtype: DType) -> Self {
        self.compute = dtype;
        self
    }

    pub fn input(mut self, input: Tensor) -> Self {
        self.inputs.push(input);
        self
    }

    pub fn parameter(mut self, name: &str, shape: &[usize]) -> Self {
        self.parameters.push(random_tensor(name, shape).unwrap());
        self
    }

    pub fn check(
        self,
        ours: impl Fn(&[Value]) -> Result<Value>,
        reference: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        self.check_with_parameters(|v, _| ours(v), |t, _| reference(t))
    }

    pub fn check_with_parameters(
        self,
        ours: impl Fn(&[Value], &[Arc<Parameter>]) -> Result<Value>,
        reference: impl Fn(&[Tensor], &[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let low = self.compute == DType::BF16 || self.inputs.iter().any(|t| t.dtype() == DType::BF16);
        let tolerance = if low { 2e-2 } else { 2e-6 };
        // In low precision, parameters are compared by the values that the op reads.
        let stored = self.parameters.iter().map(|p| p.to_dtype(self.compute)).collect::<Result<Vec<_>, _>>()?;
        let wide = |t: &Tensor| Ok(Var::from_tensor(&t.to_dtype(DType::F64)?.contiguous()?)?);
        let inputs = self.inputs.iter().map(wide).collect::<Result<Vec<_>>>()?;
        let weights = stored.iter().map(wide).collect::<Result<Vec<_>>>()?;
        let tensors = |vars: &[Var]| vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>();

        let expected = reference(&tensors(&inputs), &tensors(&weights))?;
        let dy = random_tensor("dy", expected.dims())?;
        let product = |y: Tensor| -> Result<Tensor> { Ok((y * dy.to_dtype(DType::F64)?)?.sum_all()?) };
        let gradients = product(expected.clone())?.backward()?;

        for (device, (i, input)) in
            devices().iter().flat_map(|device| inputs.iter().enumerate().map(move |i| (device, i)))
        {
            let parameters = parameters_on(device, &self.parameters, self.compute)?;
            let values = self.inputs.iter().enumerate().map(|(j, t)| {
                let t = t.to_device(device)?;
                Ok(if i == j { Value::input(t) } else { Value::constant(t) })
            });
            let values: Vec<Value> = values.collect::<Result<_>>()?;
            let y = ours(&values, &parameters)?;
            assert_close(self.name, y.tensor(), &expected, tolerance)?;
            let dtype = y.tensor().dtype();
            let dx = y.backward(dy.to_dtype(dtype)?.to_device(device)?)?;
            assert_eq!(dx.dtype(), self.inputs[i].dtype(), "{}: a gradient has its input's dtype", self.name);
            let what = format!("{} on {:?}: gradient of input {i}", self.name, device.location());
            assert_close(&what, &dx, gradients.get(input).expect("the reference uses every input"), tolerance)?;

            let direction = random_tensor("direction", input.dims())?.to_dtype(DType::F64)?;
            let step = 1e-6;
            let moved = |by: f64| -> Result<f64> {
                let mut inputs = tensors(&inputs);
                inputs[i] = (&inputs[i] + (&direction * by)?)?;
                Ok(product(reference(&inputs, &tensors(&weights))?)?.to_scalar()?)
            };
            let difference = (moved(step)? - moved(-step)?) / (2.0 * step);
            let derivative = (dx.to_device(&Device::Cpu)?.to_dtype(DType::F64)? * &direction)?;
            let scale = derivative.abs()?.sum_all()?.to_scalar::<f64>()?.max(1e-3);
            let derivative = derivative.sum_all()?.to_scalar::<f64>()?;
            assert!(
                (derivative - difference).abs() <= tolerance * scale,
                "{what}: {derivative}, by differences {difference}"
            );

            for (p, (parameter, weight)) in parameters.iter().zip(&weights).enumerate() {
                let what = format!("{}: gradient of parameter {p}", self.name);
                assert_close(&what, &parameter.grad()?, gradients.get(weight).expect("used"), tolerance)?;
            }
        }
        Ok(())
    }
}
