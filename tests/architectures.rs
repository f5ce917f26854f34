//! Decoders that a job file states: their gradients, their caches, and a whole run of one.

use std::path::Path;

use binary::{succeed, titan};
use candle_core::{DType, Device, Tensor};
use titan::autograd::{Parameter, Precision};
use titan::config;
use titan::engine::{self, MicroBatch, Recompute};
use titan::models::args::DecoderArgs;
use titan::models::{self, Decoder, initialize};

#[path = "common/binary.rs"]
mod binary;

/// Everything that has a choice, in a few combinations; the first four are like models that there are.
const ARCHITECTURES: &[(&str, &str)] = &[
    (
        "Gemma 2 and 3",
        r#"
        rope_layout = "halves"
        head_dim = 12
        norm_position = "both"
        zero_centered_norms = true
        qk_norm = true
        enable_weight_tying = true
        attention_pattern = ["sliding", "full"]
        sliding_window = 5
        local_rope_theta = 100.0
        feed_forward_pattern = ["geglu"]
        query_pre_attn_scalar = 20.0
        attention_softcap = 2.0
        logit_softcap = 3.0
        embedding_multiplier = 4.0
        "#,
    ),
    (
        "GPT-OSS",
        r#"
        rope_layout = "halves"
        attention_pattern = ["sliding", "full"]
        sliding_window = 5
        attention_sinks = true
        attention_bias = true
        attention_out_bias = true
        feed_forward_pattern = ["moe"]
        moe_inter_dim = 24
        rope_factor = 4.0
        original_seq_len = 8
        beta_fast = 2.0
        yarn_truncate = false
        [model.args.moe_args]
        num_experts = 3
        num_shared_experts = 0
        top_k = 3 # all of them: a choice that changes would break a difference
        score_func = "softmax"
        route_norm = true
        score_before_experts = false
        use_bias = true
        swiglu_limit = 7.0
        "#,
    ),
    (
        "OLMo 2",
        r#"
        norm_position = "after"
        qk_norm = true
        qk_norm_over = "projection"
        "#,
    ),
    (
        "SmolLM 3",
        r#"
        enable_weight_tying = true
        rope_pattern = [true, true, false]
        "#,
    ),
    (
        "Llama 4",
        r#"
        rope_pattern = [true, true, false]
        attention_pattern = ["chunked", "chunked", "full"]
        fixed_attn_block_size = 6
        qk_unit_norm = true
        attn_temperature_tuning = true
        floor_scale = 3
        attn_scale = 0.5
        "#,
    ),
    (
        "latents without positions",
        r#"
        kv_lora_rank = 10
        qk_nope_head_dim = 6
        qk_rope_head_dim = 4
        v_head_dim = 8
        latent_pattern = [true, true, false]
        rope_pattern = [true, false, true]
        attn_temperature_tuning = true
        floor_scale = 5
        "#,
    ),
    (
        "latents among grouped heads",
        r#"
        norm_type = "layer_norm"
        kv_lora_rank = 10
        q_lora_rank = 14
        qk_nope_head_dim = 6
        qk_rope_head_dim = 4
        v_head_dim = 8
        latent_pattern = [false, true]
        attention_softcap = 2.0
        attention_sinks = true
        attention_pattern = ["chunked", "full", "full"]
        fixed_attn_block_size = 6
        feed_forward_pattern = ["relu_squared", "swiglu"]
        mlp_bias = true
        residual_multiplier = 0.3
        "#,
    ),
];

/// The arguments of an architecture, in sizes small enough for differences.
fn args(toml: &str) -> DecoderArgs {
    let sizes =
        "dim = 32\nn_layers = 3\nn_heads = 4\nn_kv_heads = 2\nvocab_size = 61\nhidden_dim = 40\nmax_seq_len = 16";
    let job = format!("[model]\nname = \"decoder\"\n[model.args]\n{sizes}\n{toml}");
    let config = config::parse("job.toml", &job).unwrap_or_else(|error| panic!("{error}")).config;
    config.model.args.apply(&models::flavor("decoder", "debugmodel").unwrap()).unwrap()
}

/// A model in f32 whose every parameter has noise of its own, so that none of them is without effect.
fn model(args: &DecoderArgs) -> Decoder {
    let mut model = Decoder::new(args, None).unwrap();
    let precision = Precision { storage: DType::F32, compute: DType::F32 };
    model.allocate(precision, &Device::Cpu, true).unwrap();
    for (i, parameter) in model.parameters().enumerate() {
        initialize(parameter, 1).unwrap();
        let n = parameter.numel();
        let noise: Vec<f32> = (0..n).map(|j| (((i * 7919 + j) * 2_654_435_761) % 1000) as f32 / 2500.0 - 0.2).collect();
        let noise = Tensor::from_vec(noise, parameter.shape(), &Device::Cpu).unwrap();
        parameter.set(&(parameter.weights().unwrap() + noise).unwrap()).unwrap();
    }
    model
}

fn tokens(rows: usize, seq_len: usize, step: u32) -> Tensor {
    let ids = (0..(rows * seq_len) as u32).map(|i| i * i * step % 61).collect();
    Tensor::from_vec(ids, (rows, seq_len), &Device::Cpu).unwrap()
}

fn norm(t: &Tensor) -> f64 {
    f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

/// Along a gradient of its own, the loss rises by the gradient's length.
#[test]
fn gradients_of_every_architecture_are_those_of_differences() {
    for (name, toml) in ARCHITECTURES {
        let model = model(&args(toml));
        let batch = MicroBatch::new(tokens(2, 16, 7), tokens(2, 16, 11));
        engine::forward_backward(&model, &batch, 1.0, Recompute::EveryNth(2)).unwrap();
        for parameter in model.parameters() {
            let grad = parameter.grad().unwrap().copy().unwrap();
            let length = norm(&grad);
            assert!(length > 0.0, "{name}: {} has no gradient", parameter.fqn());
            let step = (0.002 / length).min(0.05);
            let weights = parameter.weights().unwrap().copy().unwrap();
            let loss_at = |by: f64| {
                parameter.set(&(&weights + (&grad * (by / length)).unwrap()).unwrap()).unwrap();
                f64::from(engine::evaluate(&model, &batch).unwrap())
            };
            let rise = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            parameter.set(&weights).unwrap();
            let what = format!("{name}: {}: {length} by backward, {rise} by differences", parameter.fqn());
            // Losses are f32: what they lose to rounding, over the step.
            assert!((rise - length).abs() <= 0.02 * length + 2e-6 / step, "{what}");
        }
    }
}

#[test]
fn tokens_that_come_one_by_one_have_the_logits_of_the_whole_sequence() {
    for (name, toml) in ARCHITECTURES {
        let model = model(&args(toml));
        let tokens = tokens(2, 16, 7);
        let expected = model.logits(&tokens).unwrap();
        let mut cache = model.cache();
        let mut end = 0;
        for n in [3, 1, 1, 5, 1, 1, 4] {
            let logits = model.next_logits(&tokens.narrow(1, end, n).unwrap(), &mut cache).unwrap();
            end += n;
            let whole = expected.narrow(1, end - 1, 1).unwrap().squeeze(1).unwrap();
            let error = norm(&(&logits - &whole).unwrap()) / norm(&whole);
            assert!(error < 1e-5, "{name}: the logits after {end} tokens are off by {error:e}");
        }
    }
}

#[test]
fn a_tied_table_is_stored_once_and_written_into_no_checkpoint_twice() {
    let tied: Vec<String> = model(&args(ARCHITECTURES[0].1)).state_shapes().into_iter().map(|(name, _)| name).collect();
    assert!(tied.contains(&"tok_embeddings.weight".to_owned()) && !tied.contains(&"output.weight".to_owned()));
    let is_there = |parameter: &&std::sync::Arc<Parameter>| parameter.fqn() == "output.weight";
    assert_eq!(model(&args(ARCHITECTURES[2].1)).parameters().filter(is_there).count(), 1);
}

fn train(folder: &Path, job: &str) {
    succeed(titan(&["train", "--config", job]).arg(format!("--job.dump_folder={}", folder.join("outputs").display())));
}

fn losses(folder: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(folder.join("outputs/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
fn an_architecture_of_a_job_file_alone_trains_goes_on_and_generates() {
    let job = |folder: &Path| {
        let text = r#"
            [model]
            name = "decoder"
            [model.args]
            dim = 48
            n_layers = 4
            n_heads = 4
            n_kv_heads = 2
            hidden_dim = 96
            moe_inter_dim = 32
            norm_position = "both"
            zero_centered_norms = true
            enable_weight_tying = true
            attention_pattern = ["sliding", "full"]
            sliding_window = 24
            rope_pattern = [true, true, true, false]
            feed_forward_pattern = ["geglu", "moe"]
            attention_sinks = true
            attention_bias = true
            logit_softcap = 20.0
            moe_args = { num_experts = 4, top_k = 2, score_func = "softmax", use_bias = true }
            [metrics]
            log_freq = 1
            [optimizer]
            lr = 1e-2
            [lr_scheduler]
            warmup_steps = 2
            [training]
            local_batch_size = 2
            seq_len = 64
            steps = 24
            [checkpoint]
            enable = true
            interval = 12
            [debug]
            seed = 5
        "#;
        let path = folder.join("job.toml");
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (unbroken, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (unbroken, broken) = (unbroken.path(), broken.path());
    train(unbroken, &job(unbroken));
    let expected = losses(unbroken);
    assert!(expected[23] < expected[0] - 1.0, "{expected:?}");

    // A second run of the same folder goes on from the checkpoint in the middle.
    train(broken, &job(broken));
    std::fs::remove_dir_all(broken.join("outputs/checkpoint/step-24")).unwrap();
    train(broken, &job(broken));
    assert_eq!(losses(broken), expected);

    let checkpoint = unbroken.join("outputs/checkpoint/step-24");
    let output = succeed(
        titan(&["generate", "--prompt", "Once upon a time", "--max-new-tokens", "20", "--seed", "1", "--checkpoint"])
            .arg(checkpoint),
    );
    assert!(String::from_utf8_lossy(&output.stdout).len() > "Once upon a time".len());
}
