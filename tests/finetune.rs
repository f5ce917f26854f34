//! Fine-tuning: what is learned and what is not, adapters, and the whole of it through the binary.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use binary::{succeed, titan};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value as Json, json};
use titan::autograd::{Parameter, Precision};
use titan::engine::{self, MicroBatch, Recompute, Stages};
use titan::models::args::{AttentionKind, AttnMaskType, AttnType, DecoderArgs, MoeArgs, ScoreFunc};
use titan::models::lora::Lora;
use titan::models::{self, Decoder};
use titan::ops::IGNORE_INDEX;

#[path = "common/binary.rs"]
mod binary;

const F32: Precision = Precision { storage: DType::F32, compute: DType::F32 };

fn args() -> DecoderArgs {
    DecoderArgs {
        dim: 32,
        n_layers: 3,
        n_heads: 4,
        n_kv_heads: Some(2),
        vocab_size: 50,
        multiple_of: 16,
        max_seq_len: 64,
        attn_type: AttnType::Varlen,
        attn_mask_type: AttnMaskType::BlockCausal,
        ..models::flavor("llama3", "debugmodel").unwrap()
    }
}

fn initialized(mut model: Decoder) -> Decoder {
    model.allocate(F32, &Device::Cpu, true).unwrap();
    model.parameters().chain(model.trained_parameters()).for_each(|p| models::initialize(p, 1).unwrap());
    model
}

fn row(ids: &[u32]) -> Tensor {
    Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(what: &str, ours: &[f32], expected: &[f32], tolerance: f32) {
    let scale = expected.iter().fold(1e-6f32, |max, x| max.max(x.abs()));
    for (a, b) in ours.iter().zip(expected) {
        assert!((a - b).abs() <= tolerance * scale, "{what}: {a}, expected {b}");
    }
}

/// Two conversations in a row, and something behind them that nobody learns.
#[test]
fn prompts_carry_no_weight_and_conversations_do_not_see_each_other() {
    const PROMPT: [u32; 5] = [1, 2, 3, 4, 5];
    const NOT_LEARNED: [u32; 3] = [30, 31, 32];
    let conversations: [(Vec<u32>, Vec<u32>); 2] =
        [(PROMPT.into(), vec![10, 11, 12]), (vec![6, 7], vec![13, 14, 15, 16])];
    let example = |(prompt, answer): &(Vec<u32>, Vec<u32>)| {
        let tokens = [&prompt[..], answer].concat();
        let ignored = vec![IGNORE_INDEX; prompt.len() - 1];
        (tokens[..tokens.len() - 1].to_vec(), [ignored, answer.clone()].concat())
    };
    let (mut inputs, mut labels, mut starts) = (vec![], vec![], vec![]);
    for (i, l) in conversations.iter().map(example).chain([(NOT_LEARNED.to_vec(), vec![IGNORE_INDEX; 3])]) {
        starts.extend(vec![inputs.len() as u32; i.len()]);
        inputs.extend(i);
        labels.extend(l);
    }

    let packed = initialized(Decoder::new(&args(), Some(0)).unwrap());
    let batch = MicroBatch { document_starts: Some(starts), ..MicroBatch::new(row(&inputs), row(&labels)) };
    let loss: f32 = engine::forward_backward(&packed, &batch, 1.0, Recompute::None).unwrap().to_scalar().unwrap();
    assert_eq!(engine::evaluate(&packed, &batch).unwrap(), loss);

    let embedding = packed.parameters().next().unwrap().grad().unwrap();
    let is_moved = |id: u32| numbers(&embedding.get(id as usize).unwrap()).iter().any(|g| *g != 0.0);
    assert!(PROMPT.iter().all(|id| is_moved(*id)), "answers depend on their prompts");
    assert!(!NOT_LEARNED.iter().any(|id| is_moved(*id)), "what nothing is learned from has no gradient");
    assert!(!is_moved(12), "the last token of an answer is only predicted");

    // Each conversation by itself, weighted by its share of the seven tokens that are learned.
    let apart = initialized(Decoder::new(&args(), Some(0)).unwrap());
    let mut sum = 0.0;
    for (conversation, share) in conversations.iter().zip([3.0 / 7.0, 4.0 / 7.0]) {
        let (inputs, labels) = example(conversation);
        let batch = MicroBatch::new(row(&inputs), row(&labels));
        let own = engine::forward_backward(&apart, &batch, share, Recompute::All).unwrap();
        sum += own.to_scalar::<f32>().unwrap();
    }
    // Positions differ, but rotary attention knows only distances: equal up to rounding.
    assert!((loss - sum).abs() < 1e-5 * loss, "{loss}, apart {sum}");
    for (ours, expected) in packed.parameters().zip(apart.parameters()) {
        assert_close(ours.fqn(), &numbers(&ours.grad().unwrap()), &numbers(&expected.grad().unwrap()), 1e-4);
    }
}

/// As a validation set of conversations is, beside training on text.
#[test]
fn conversations_are_masked_whatever_the_model_does_with_other_documents() {
    let loss = |attn_mask_type| {
        let model = initialized(Decoder::new(&DecoderArgs { attn_mask_type, ..args() }, Some(0)).unwrap());
        let tokens = row(&(0..40).map(|i| i * 7 % 49 + 1).collect::<Vec<_>>());
        let starts = (0..40).map(|i| i / 10 * 10).collect();
        let batch = MicroBatch { document_starts: Some(starts), ..MicroBatch::new(tokens.clone(), tokens) };
        engine::evaluate(&model, &batch).unwrap()
    };
    assert_eq!(loss(AttnMaskType::Causal), loss(AttnMaskType::BlockCausal));
}

fn adapted(targets: &[&str]) -> Decoder {
    let mut model = Decoder::new(&args(), Some(0)).unwrap();
    let targets = targets.iter().map(|target| target.to_string()).collect();
    model.adapt(&Lora { rank: Some(4), alpha: 6.0, targets, dropout: 0.2 }, 5).unwrap();
    let model = initialized(model);
    // B is zero at first; then nothing could be seen.
    for (i, b) in model.trained_parameters().filter(|p| p.fqn().contains("lora_b")).enumerate() {
        let values = (0..b.numel()).map(|j| ((i + 3 * j) % 7) as f32 * 0.02 - 0.06).collect();
        b.set(&Tensor::from_vec(values, b.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    model
}

#[test]
fn a_new_adapter_changes_nothing_and_a_merged_one_computes_the_same() {
    let tokens = row(&(0..40).map(|i| i * 7 % 50).collect::<Vec<_>>());
    let mut model = Decoder::new(&args(), Some(0)).unwrap();
    model.adapt(&Lora { rank: Some(4), ..Lora::default() }, 5).unwrap();
    let base = numbers(&initialized(Decoder::new(&args(), Some(0)).unwrap()).logits(&tokens).unwrap());
    assert_eq!(numbers(&initialized(model).logits(&tokens).unwrap()), base);

    let mut model = adapted(&["all-linear"]);
    let before = numbers(&model.logits(&tokens).unwrap());
    assert_ne!(before, base);
    model.merge().unwrap();
    assert!(model.adapters().is_none());
    assert_close("logits", &numbers(&model.logits(&tokens).unwrap()), &before, 1e-5);
}

#[test]
fn only_adapters_have_gradients_and_memory_for_them_also_when_stages_are_computed_again() {
    let tokens = row(&(0..40).map(|i| i * 7 % 50).collect::<Vec<_>>());
    let batch = MicroBatch::new(tokens.clone(), tokens);
    let gradients = |recompute| {
        let model = adapted(&["wq", "layers.[01].feed_forward.*"]);
        model.drop_out(Some(3));
        engine::forward_backward(&model, &batch, 1.0, recompute).unwrap();
        assert!(model.stages().iter().all(|stage| stage.buffers().grads.is_none()));
        let gradient = |p: &std::sync::Arc<Parameter>| (p.fqn().to_owned(), numbers(&p.grad().unwrap()));
        model.trained_parameters().map(gradient).collect::<BTreeMap<_, _>>()
    };
    let all = gradients(Recompute::None);
    // Of each of three layers wq, of two w1, w2 and w3; A and B each.
    assert_eq!(all.len(), 2 * (3 + 2 * 3), "{:?}", all.keys());
    assert!(all.values().all(|gradient| gradient.iter().any(|g| *g != 0.0)));
    assert_eq!(gradients(Recompute::All), all);
}

/// A small model of every family. Tokens go to all experts: a choice that changes would break a difference.
fn families() -> Vec<(&'static str, DecoderArgs)> {
    let small = |name: &str, flavor: &str| {
        let args = models::flavor(name, flavor).unwrap();
        let moe_args = args.moe_args.clone().map(|moe| MoeArgs { num_experts: 3, top_k: 3, ..moe });
        let (hidden_dim, moe_inter_dim) = (Some(40), Some(24));
        let sizes = DecoderArgs { n_layers: 2, n_heads: 4, vocab_size: 50, max_seq_len: 16, ..args };
        DecoderArgs { dim: 32, hidden_dim, inter_dim: hidden_dim, moe_inter_dim, moe_args, ..sizes }
    };
    let grouped = |args| DecoderArgs { n_kv_heads: Some(2), head_dim: Some(8), ..args };
    let latent = |q_lora_rank| DecoderArgs {
        q_lora_rank,
        kv_lora_rank: Some(10),
        qk_nope_head_dim: 6,
        qk_rope_head_dim: 4,
        v_head_dim: 8,
        ..small("deepseek_v3", "debugmodel")
    };
    let experts = MoeArgs {
        num_experts: 3,
        num_shared_experts: 0,
        top_k: 3,
        score_func: ScoreFunc::Softmax,
        route_norm: true,
        score_before_experts: false,
        use_bias: true,
        swiglu_limit: Some(7.0),
        ..Default::default()
    };
    let gpt_oss = DecoderArgs {
        attention_bias: true,
        attention_out_bias: true,
        attention_sinks: true,
        attention_pattern: vec![AttentionKind::Sliding, AttentionKind::Full],
        sliding_window: Some(5),
        moe_args: Some(experts),
        ..small("decoder", "debugmodel")
    };
    vec![
        ("llama3", grouped(small("llama3", "debugmodel"))),
        ("llama4", DecoderArgs { every_n_layers_nope: Some(2), ..grouped(small("llama4", "debugmodel")) }),
        ("qwen3", grouped(small("qwen3", "debugmodel"))),
        ("qwen3 with experts", grouped(small("qwen3", "debugmodel_moe"))),
        ("deepseek_v3", latent(0)),
        ("deepseek_v3 with latent queries", latent(12)),
        ("gpt-oss", grouped(gpt_oss)),
    ]
}

/// With adapters on all that takes one.
fn adapted_family(args: &DecoderArgs) -> Decoder {
    let mut model = Decoder::new(args, Some(0)).unwrap();
    model.adapt(&Lora { rank: Some(4), ..Lora::default() }, 5).unwrap();
    let model = initialized(model);
    // Noise on everything: neither B nor a norm's weight shall be a constant.
    for (i, parameter) in model.parameters().chain(model.trained_parameters()).enumerate() {
        let noise = (0..parameter.numel()).map(|j| (((i * 7919 + j) * 2_654_435_761) % 1000) as f32 / 2500.0 - 0.2);
        let noise = Tensor::from_iter(noise, &Device::Cpu).unwrap().reshape(parameter.shape()).unwrap();
        parameter.set(&(parameter.weights().unwrap() + noise).unwrap()).unwrap();
    }
    model
}

/// Along a gradient of its own, the loss rises by the gradient's length.
#[test]
fn gradients_of_adapters_are_those_of_differences_in_every_family() {
    for (name, args) in families() {
        let model = adapted_family(&args);
        let tokens = |step: u32| row(&(0..16).map(|i| i * i * step % 50).collect::<Vec<_>>());
        let batch = MicroBatch::new(tokens(7), tokens(11));
        engine::forward_backward(&model, &batch, 1.0, Recompute::EveryNth(2)).unwrap();
        for parameter in model.trained_parameters() {
            let grad = numbers(&parameter.grad().unwrap());
            let length = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(length > 0.0, "{name}: {} has no gradient", parameter.fqn());
            let step = (0.002 / length).min(0.05);
            let weights = numbers(&parameter.weights().unwrap());
            let loss_at = |by: f64| {
                let moved = weights.iter().zip(&grad).map(|(w, g)| w + (by / length) as f32 * g);
                let moved = Tensor::from_iter(moved, &Device::Cpu).unwrap();
                parameter.set(&moved).unwrap();
                f64::from(engine::evaluate(&model, &batch).unwrap())
            };
            let rise = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            parameter.set(&Tensor::from_vec(weights.clone(), weights.len(), &Device::Cpu).unwrap()).unwrap();
            let what = format!("{name}: {}: {length} by backward, {rise} by differences", parameter.fqn());
            // Losses are f32: what they lose to rounding, over the step.
            assert!((rise - length).abs() <= 0.02 * length + 2e-6 / step, "{what}");
        }
    }
}

#[test]
fn generation_is_the_same_with_adapters_and_after_they_are_merged_in_every_family() {
    let tokens = row(&(0..16).map(|i| i * 7 % 50).collect::<Vec<_>>());
    for (name, args) in families() {
        let mut model = adapted_family(&args);
        let expected = model.logits(&tokens).unwrap();
        for state in ["adapted", "merged"] {
            assert_close(
                &format!("{name}, {state}"),
                &numbers(&model.logits(&tokens).unwrap()),
                &numbers(&expected),
                2e-5,
            );
            let mut cache = model.cache();
            for (start, n) in [(0, 9), (9, 1), (10, 5), (15, 1)] {
                let logits = model.next_logits(&tokens.narrow(1, start, n).unwrap(), &mut cache).unwrap();
                let expected = expected.narrow(1, start + n - 1, 1).unwrap();
                let what = format!("{name}, {state}, after {} tokens", start + n);
                assert_close(&what, &numbers(&logits), &numbers(&expected), 2e-5);
            }
            model.merge().unwrap();
        }
    }
}

#[test]
fn routed_experts_take_no_adapters_and_a_target_that_names_them_is_told_so() {
    for (name, args) in families() {
        let model = adapted_family(&args);
        assert!(model.trained_parameters().all(|p| !p.fqn().contains(".experts.") && !p.fqn().contains("router")));
        let mut model = Decoder::new(&args, Some(0)).unwrap();
        let reason = match args.moe_args.is_some() && args.moe_enabled {
            true => "names weights of routed experts, which take no adapters",
            false => "is no linear layer in this model's blocks",
        };
        let known = if args.kv_lora_rank.is_some() { "\"wkv_b\"" } else { "\"wq\"" };
        for target in ["layers.1.moe.experts.w?", "experts"] {
            let lora = Lora { rank: Some(4), targets: vec![target.to_owned()], ..Lora::default() };
            let refusal = model.adapt(&lora, 0).unwrap_err().to_string();
            assert!(refusal.contains(reason) && refusal.contains(known), "{name}: {refusal}");
        }
    }
}

/// Losses in full precision, by step.
fn losses(dump_folder: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(dump_folder.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Json>(line).unwrap());
    lines.filter_map(|line| line["loss"].as_f64()).collect()
}

const QUESTIONS: [(&str, &str); 4] = [
    ("Who has a cat?", "Lily has a cat."),
    ("Who has a dog?", "Tom has a brown dog, and it runs."),
    ("Where is the bird?", "In the big tree."),
    ("What is red?", "The ball."),
];

/// A job on conversations for a model small enough to learn them by heart in seconds.
fn job(folder: &Path) -> PathBuf {
    let lines = QUESTIONS.map(|(question, answer)| {
        let messages = json!([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]);
        format!("{}\n", json!({ "messages": messages }))
    });
    std::fs::write(folder.join("chat.jsonl"), lines.concat()).unwrap();
    let text = format!(
        r#"
[job]
dump_folder = "{0}/outputs"
[model]
name = "llama3"
[model.args]
dim = 64
n_layers = 2
n_heads = 4
multiple_of = 16
[metrics]
log_freq = 1
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 4
[training]
dataset = "chat"
dataset_path = "{0}/chat.jsonl"
local_batch_size = 2
global_batch_size = 4
seq_len = 96
steps = 40
mixed_precision_param = "float32"
[data]
shuffle = true
[checkpoint]
enable = true
interval = 9
[debug]
seed = 3
"#,
        folder.display()
    );
    let path = folder.join("job.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn train(job: &Path, flags: &[&str]) -> Command {
    let mut command = titan(&["train", "--config", job.to_str().unwrap()]);
    command.args(flags);
    command
}

fn chat(checkpoint: &Path, lines: &str) -> String {
    let mut command = titan(&["generate", "--chat", "--temperature", "0", "--max-new-tokens", "30"]);
    command.arg("--checkpoint").arg(checkpoint).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn conversations_are_learned_by_heart_and_answered_in_a_chat() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let output = succeed(&mut train(&job, &[]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("The tokenizer has no chat template") && said.contains("block_causal"), "{said}");
    let outputs = folder.path().join("outputs");
    let losses = losses(&outputs);
    assert!(losses[39] < 0.05, "{losses:?}");

    let checkpoint = outputs.join("checkpoint/step-40");
    let ask = |i: usize| QUESTIONS[i].0.to_owned() + "\n";
    let answer = |i: usize| QUESTIONS[i].1.to_owned() + "\n";
    for i in 0..QUESTIONS.len() {
        assert_eq!(chat(&checkpoint, &ask(i)), answer(i));
    }
    // Nothing is answered after /exit, nor to an empty line.
    assert_eq!(chat(&checkpoint, &format!("\n{}/exit\n{}", ask(2), ask(1))), answer(2));
}

#[test]
fn every_learned_token_weighs_the_same_however_batches_are_cut() {
    let losses_of = |flags: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let flags = [&["--training.steps", "6", "--training.seq_len", "40", "--data.no-shuffle"], flags].concat();
        succeed(&mut train(&job(folder.path()), &flags));
        losses(&folder.path().join("outputs"))
    };
    // Rows of one conversation each, of different length.
    let at_once = losses_of(&["--training.local_batch_size", "4"]);
    let one_by_one = losses_of(&["--training.local_batch_size", "1"]);
    for (a, b) in at_once.iter().zip(&one_by_one) {
        assert!((a - b).abs() < 1e-4 * a, "{at_once:?}\n{one_by_one:?}");
    }
}

#[test]
fn adapters_are_all_that_is_saved_and_a_resumed_run_goes_on_bit_for_bit() {
    let folders = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let base = tempfile::tempdir().unwrap();
    let stories = ["--training.dataset", "c4_test", "--training.dataset_path", "none", "--training.steps", "3"];
    succeed(&mut train(&job(base.path()), &stories));
    let base = base.path().join("outputs/checkpoint/step-3");
    let base = base.to_str().unwrap();
    let lora = |steps| {
        let flags = ["--model.lora.rank", "8", "--model.lora.dropout", "0.1", "--checkpoint.initial_load_path", base];
        [&flags[..], &["--checkpoint.export_dtype", "bfloat16", "--training.steps", steps]].concat()
    };
    let [unbroken, broken] = folders.each_ref().map(|folder| folder.path().join("outputs"));
    succeed(&mut train(&job(folders[0].path()), &lora("30")));
    // The schedule knows the number of steps, so the broken run is stopped by taking its last checkpoints away.
    let broken_job = job(folders[1].path());
    succeed(&mut train(&broken_job, &lora("30")));
    for step in ["step-27", "step-30"] {
        std::fs::remove_dir_all(broken.join("checkpoint").join(step)).unwrap();
    }
    succeed(&mut train(&broken_job, &lora("30")));
    let read = |folder: &Path, name: &str| std::fs::read(folder.join("checkpoint/step-30").join(name)).unwrap();
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(read(&unbroken, name) == read(&broken, name), "{name}");
    }
    assert!(losses(&unbroken)[29] < 0.7 * losses(&unbroken)[0], "{:?}", losses(&unbroken));

    let step = unbroken.join("checkpoint/step-30");
    let names = |file: &Path| -> Vec<String> {
        candle_core::safetensors::load(file, &Device::Cpu).unwrap().into_keys().collect()
    };
    // wq, wk, wv, wo, w1, w2, w3 of two layers; A and B each.
    let saved = names(&step.join("model.safetensors"));
    assert!(saved.len() == 28 && saved.iter().all(|name| name.contains(".lora_")), "{saved:?}");
    let merged = unbroken.join("checkpoint/step-30-bfloat16");
    assert!(names(&merged.join("model.safetensors")).iter().all(|name| !name.contains("lora")));

    let text = |checkpoint: &Path| {
        let checkpoint = checkpoint.to_str().unwrap();
        let flags = ["generate", "--prompt", "Tom has", "--temperature", "0", "--max-new-tokens", "8"];
        String::from_utf8(succeed(titan(&flags).args(["--checkpoint", checkpoint])).stdout).unwrap()
    };
    assert_eq!(text(&step), text(&merged));
    let converted = folders[0].path().join("converted");
    let flags = ["convert", "--to-hf", step.to_str().unwrap(), "--dtype", "bfloat16", "--to"];
    succeed(titan(&flags).arg(&converted));
    assert_eq!(text(&converted), text(&merged));
    assert_ne!(text(&step), text(Path::new(base)));

    let refusal = |flags: &[&str]| {
        let output = train(&job(folders[0].path()), flags).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refusal(&["--training.steps", "31"]).contains("holds adapters, but this run trains no adapters"));
    let weights = Path::new(base).join("model.safetensors");
    let other = folders[0].path().join("other.safetensors");
    std::fs::write(&other, std::fs::read(&weights).unwrap().iter().rev().copied().collect::<Vec<_>>()).unwrap();
    std::fs::copy(&other, &weights).unwrap();
    let output = titan(&["generate", "--checkpoint", step.to_str().unwrap()]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("does not hold the weights that the adapters were trained for"), "{message}");
}

#[test]
fn models_are_listed_and_unknown_ones_refused_by_name() {
    let output = succeed(&mut titan(&["models", "llama4/debugmodel"]));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("llama4/debugmodel: ") && text.contains("of which a token meets"), "{text}");
    assert!(text.contains("layers 1, 3, 5 (3 alike)"), "{text}");
    let output = succeed(&mut titan(&["models", "configs/llama3_8b_lora.toml"]));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("configs/llama3_8b_lora.toml (llama3/8B): 8,030,261,248 parameters"), "{text}");
    assert!(text.contains("parameters more in adapters, which alone are trained"), "{text}");
    let output = titan(&["models", "llama4/9B"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("there is no flavor \"9B\"") && message.contains("17bx16e"), "{message}");
}
