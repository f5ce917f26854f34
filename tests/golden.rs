//! The decoder against numbers that PyTorch computed in float32 (`golden/README.md` says how, and with which tolerances).

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value as Json;
use titan::autograd::{Init, Precision, Value};
use titan::components::checkpoint::Weights;
use titan::components::optimizer::Optimizer;
use titan::engine::{self, MicroBatch, Pass, Recompute, Stages};
use titan::models::args::DecoderArgs;
use titan::models::{self, Decoder};
use titan::ops::{Adam, StepRules};

#[path = "common/devices.rs"]
mod devices;
use devices::devices;

const F32: Precision = Precision { storage: DType::F32, compute: DType::F32 };

/// A golden file: where cargo says at run time that the repository lies, else where it lay at compile time. A test that was
/// carried to another machine is told by `CARGO_MANIFEST_DIR`.
fn golden(name: &str) -> PathBuf {
    let repo = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    repo.join("tests/golden").join(name)
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(golden(name)).unwrap()
}

fn json(name: &str) -> Json {
    serde_json::from_slice(&read(name)).unwrap()
}

fn f64s(json: &Json) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The arguments that TorchTitan's `config` means: what it leaves out is the family's.
fn decoder_args(family: &str, config: &Json) -> DecoderArgs {
    let mut args = serde_json::to_value(models::family(family).unwrap()).unwrap();
    args.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    serde_json::from_value(args).unwrap()
}

/// The largest difference over the largest expected magnitude.
fn relative_error(ours: &Tensor, expected: &Tensor) -> f64 {
    let ours = &ours.to_device(&Device::Cpu).unwrap();
    assert_eq!(ours.dims(), expected.dims());
    let max = |t: Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    f64::from(max((ours - expected).unwrap())) / f64::from(max(expected.clone())).max(1e-30)
}

struct Case {
    name: &'static str,
    json: Json,
    tensors: HashMap<String, Tensor>,
    model: Decoder,
    device: Device,
}

impl Case {
    fn load(name: &'static str, device: &Device) -> Self {
        let json = json(&format!("{name}.json"));
        let tensors =
            candle_core::safetensors::load_buffer(&read(&format!("{name}.safetensors")), &Device::Cpu).unwrap();
        let args = decoder_args(json["model"].as_str().unwrap(), &json["config"]);
        let eos_id = json["eos_id"].as_u64().map(|id| id as u32);
        let mut model = Decoder::new(&args, eos_id).unwrap();
        model.allocate(F32, device, true).unwrap();
        for (fqn, _) in model.state_shapes() {
            model.set(&fqn, &tensors[&format!("init.{fqn}")]).unwrap();
        }
        Self { name, json, tensors, model, device: device.clone() }
    }

    fn tokens(&self, name: &str) -> Tensor {
        self.tensors[name].to_dtype(DType::U32).unwrap().to_device(&self.device).unwrap()
    }

    fn tolerance(&self, name: &str) -> f64 {
        self.json["tolerance"][name].as_f64().unwrap()
    }

    /// Runs the micro-batches of a step; returns the loss.
    fn forward_backward(&self, step: usize, recompute: Recompute) -> f64 {
        let (tokens, labels) = (self.tokens(&format!("tokens.{step}")), self.tokens(&format!("labels.{step}")));
        let batch = self.json["batch"].as_u64().unwrap() as usize;
        let grad_accum = self.json["grad_accum"].as_u64().unwrap() as usize;
        let run = |i: usize| {
            let rows = |t: &Tensor| t.narrow(0, i * batch, batch).unwrap();
            let scale = 1.0 / grad_accum as f64;
            engine::forward_backward(&self.model, &MicroBatch::new(rows(&tokens), rows(&labels)), scale, recompute)
                .unwrap()
        };
        (0..grad_accum).map(|i| f64::from(run(i).to_scalar::<f32>().unwrap())).sum()
    }

    fn check_forward(&self) {
        let tokens = self.tokens("tokens.1");
        let sequence = self.model.context(&tokens, None).unwrap();
        let mut x = self.model.embed(&tokens).unwrap();
        for layer in 0..self.model.n_blocks() {
            x = self.model.block(layer, &Value::constant(x), &sequence, Pass::Evaluation).unwrap().tensor().clone();
            let error = relative_error(&x, &self.tensors[&format!("block.{layer}")]);
            assert!(error < self.tolerance("logits_rel"), "{}: block {layer} is off by {error:e}", self.name);
        }
        let error = relative_error(&self.model.logits(&tokens).unwrap(), &self.tensors["logits"]);
        assert!(error < self.tolerance("logits_rel"), "{}: logits are off by {error:e}", self.name);
    }

    fn check_gradients(&self, recompute: Recompute) {
        self.forward_backward(1, recompute);
        for parameter in self.model.parameters() {
            let fqn = parameter.fqn();
            let grad = parameter.grad().unwrap();
            let error = relative_error(&grad, &self.tensors[&format!("grad.{fqn}")]);
            assert!(error < self.tolerance("grad_rel"), "{}: grad of {fqn} is off by {error:e}", self.name);
            grad.zero_set().unwrap();
        }
        self.model.expert_loads().values().for_each(|load| {
            // As if nothing had been counted.
            load.rebalance(false).unwrap();
        });
    }

    fn check_steps(&self) {
        let number = |name: &str| self.json["optimizer"][name].as_f64().unwrap();
        let adam = Adam {
            beta1: number("beta1"),
            beta2: number("beta2"),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            decoupled: true,
        };
        let mut optimizer = Optimizer::new(adam, self.model.stages()).unwrap();
        let device = self.model.stages()[0].buffers().weights.device();
        let (losses, norms, lrs) = (f64s(&self.json["loss"]), f64s(&self.json["grad_norm"]), f64s(&self.json["lr"]));
        for step in 1..=3 {
            let loss = self.forward_backward(step, Recompute::EveryNth(2));
            let error = (loss / losses[step - 1] - 1.0).abs();
            assert!(error < self.tolerance("loss_rel"), "{}: loss of step {step} is off by {error:e}", self.name);

            for (layer, load) in self.model.expert_loads() {
                let expected = f64s(&self.json["tokens_per_expert"][layer.to_string()][step - 1]);
                load.rebalance(true).unwrap();
                let counted: Vec<f64> = load.tokens_per_expert().unwrap().iter().map(|n| *n as f64).collect();
                assert_eq!(counted, expected, "{}: tokens per expert of layer {layer}, step {step}", self.name);
            }
            let rules = StepRules { lr: lrs[step - 1], max_norm: number("max_norm"), max_loss: f64::INFINITY };
            let loss = Tensor::new(loss as f32, device).unwrap();
            let outcome = optimizer.step(self.model.stages(), &loss, &rules).unwrap();
            assert!(outcome.applied);
            let error = (outcome.norm / norms[step - 1] - 1.0).abs();
            assert!(
                error < self.tolerance("grad_norm_rel"),
                "{}: grad_norm of step {step} is off by {error:e}",
                self.name
            );

            for (fqn, ours) in self.model.state().unwrap() {
                let expected = &self.tensors[&format!("step{step}.{fqn}")];
                let difference = (ours.to_device(&Device::Cpu).unwrap() - expected)
                    .unwrap()
                    .abs()
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .max(0)
                    .unwrap();
                let difference = f64::from(difference.to_scalar::<f32>().unwrap());
                let what = if fqn.ends_with("expert_bias") { "expert_bias_abs" } else { "params_abs" };
                assert!(difference < self.tolerance(what), "{}: {fqn} after step {step}: {difference:e}", self.name);
            }
        }
    }
}

fn check(name: &'static str) {
    for device in devices() {
        let case = Case::load(name, &device);
        case.check_forward();
        for recompute in [Recompute::None, Recompute::EveryNth(2), Recompute::All] {
            case.check_gradients(recompute);
        }
        case.check_steps();
    }
}

#[test]
fn llama3_trains_like_pytorch() {
    check("llama3_base");
}

#[test]
fn llama3_with_grouped_heads_and_document_masks_trains_like_pytorch() {
    check("llama3_gqa_doc");
}

#[test]
fn llama4_trains_like_pytorch() {
    check("llama4_base");
}

#[test]
fn llama4_with_two_experts_per_token_trains_like_pytorch() {
    check("llama4_gqa_top2");
}

#[test]
fn llama4_with_interleaved_rotary_layers_trains_like_pytorch() {
    check("llama4_irope");
}

#[test]
fn llama4_with_softmax_scores_after_experts_trains_like_pytorch() {
    check("llama4_softmax_after");
}

#[test]
fn qwen3_with_document_masks_trains_like_pytorch() {
    check("qwen3_dense");
}

#[test]
fn qwen3_with_one_table_for_embedding_and_output_trains_like_pytorch() {
    check("qwen3_dense_tied");
}

#[test]
fn deepseek_v3_trains_like_pytorch() {
    check("deepseek_v3_base");
}

#[test]
fn deepseek_v3_with_yarn_and_latent_queries_trains_like_pytorch() {
    check("deepseek_v3_yarn");
}

#[test]
fn parameters_and_flops_of_every_flavor_are_exact() {
    let table = json("flops.json");
    for (family, flavors) in models::FAMILIES.iter().filter(|(family, _)| table.get(family).is_some()) {
        assert_eq!(table[family].as_object().unwrap().len(), flavors.len(), "flavors of {family}");
        for flavor in *flavors {
            let expected = &table[family][flavor];
            let args = models::flavor(family, flavor).unwrap();
            assert_eq!(args, decoder_args(family, &expected["config"]), "{family}/{flavor}");
            let model = Decoder::new(&args, Some(0)).unwrap();
            assert_eq!(model.n_params() as u64, expected["nparams"].as_u64().unwrap(), "{family}/{flavor}");
            for (seq_len, flops) in expected["flops_per_token"].as_object().unwrap() {
                let ours = model.flops_per_token(seq_len.parse().unwrap());
                assert_eq!(ours, flops.as_u64().unwrap(), "{family}/{flavor} at {seq_len}");
            }
        }
    }
}

#[test]
fn every_parameter_has_the_distribution_it_should() {
    let table = json("init_moments.json");
    for (name, expected) in table["init"].as_object().unwrap() {
        let (family, flavor) = name.split_once('.').unwrap();
        let Some(args) = models::flavor(family, flavor) else { continue };
        let model = Decoder::new(&args, Some(0)).unwrap();
        assert_eq!(model.parameters().count(), expected.as_object().unwrap().len(), "{name}");
        for parameter in model.parameters() {
            let expected = &expected[parameter.fqn()];
            assert_eq!(parameter.numel() as u64, expected["numel"].as_u64().unwrap());
            let (mean, std) = (expected["mean"].as_f64().unwrap(), expected["std"].as_f64().unwrap());
            let limit = expected["high"].as_f64().unwrap_or(f64::INFINITY);
            match parameter.init() {
                Init::Constant(value) => assert_eq!((value, 0.0), (mean, std), "{name} {}", parameter.fqn()),
                Init::Normal { std: ours, limit: bound } => {
                    assert!((ours / std - 1.0).abs() < 1e-12, "{name} {}: {ours}", parameter.fqn());
                    assert!(bound == limit || (bound / limit - 1.0).abs() < 1e-12, "{name} {}", parameter.fqn());
                    assert_eq!(mean, 0.0);
                }
                Init::Uniform { .. } => panic!("{name} {}: only adapters begin so", parameter.fqn()),
            }
        }
    }
}

#[test]
fn checkpoints_of_hugging_face_give_the_logits_of_transformers() {
    for name in ["hf_llama3", "hf_llama4", "hf_llama4_interleaved"] {
        let case = json(&format!("{name}/case.json"));
        let args = decoder_args(case["model"].as_str().unwrap(), &case["config"]);
        let mut model = Decoder::new(&args, None).unwrap();
        model.allocate(F32, &Device::Cpu, false).unwrap();
        let folder = golden(name);
        let weights = Weights::open_hugging_face(&folder, case["model"].as_str().unwrap(), &args, false).unwrap();
        weights.load(&model.state_shapes(), |name, tensor| model.set(name, &tensor)).unwrap();

        let expected = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
        let logits = model.logits(&expected["tokens"].to_dtype(DType::U32).unwrap()).unwrap();
        let error = relative_error(&logits, &expected["logits"]);
        assert!(error < case["tolerance"]["logits_rel"].as_f64().unwrap(), "{name}: logits are off by {error:e}");
    }
}
