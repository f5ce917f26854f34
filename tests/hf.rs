//! Hugging Face checkpoints, computed by PyTorch: loaded, saved, and exported again bit for bit.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use titan::components::checkpoint::{Assets, CheckpointManager, Parameter, Progress, State, TrainState, Weights, Why};
use titan::config::{self, ExportDtype};
use titan::models::args::DecoderArgs;
use titan::models::hf::{self, Family};

const CASES: [(&str, &str); 3] =
    [("hf_llama3", "llama3"), ("hf_llama4", "llama4"), ("hf_llama4_interleaved", "llama4")];

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The case's model in titan's arguments.
fn args(case: &str) -> DecoderArgs {
    serde_json::from_value(json_file(&golden(case).join("case.json"))["config"].clone()).unwrap()
}

/// Every parameter of the model, written out independently of the mapping.
fn parameters(args: &DecoderArgs) -> Vec<Parameter> {
    let (d, v) = (args.dim, args.vocab_size);
    let kv = d / args.n_heads * args.n_kv_heads.unwrap();
    let mut all = vec![("tok_embeddings.weight".to_owned(), vec![v, d])];
    for layer in 0..args.n_layers {
        let mut add = |name: &str, shape: &[usize]| all.push((format!("layers.{layer}.{name}"), shape.to_vec()));
        add("attention_norm.weight", &[d]);
        add("ffn_norm.weight", &[d]);
        for (name, rows) in [("wq", d), ("wk", kv), ("wv", kv), ("wo", d)] {
            add(&format!("attention.{name}.weight"), &[rows, d]);
        }
        let mut add_feed_forward = |name: &str, h: usize| {
            add(&format!("{name}.w1.weight"), &[h, d]);
            add(&format!("{name}.w2.weight"), &[d, h]);
            add(&format!("{name}.w3.weight"), &[h, d]);
        };
        if !args.is_moe_layer(layer) {
            add_feed_forward("feed_forward", args.ffn_hidden_dim());
            continue;
        }
        let (e, h) = (args.moe_args.as_ref().unwrap().num_experts, args.moe_hidden_dim());
        add_feed_forward("moe.shared_experts", h);
        add("moe.router.gate.weight", &[e, d]);
        add("moe.expert_bias", &[e]);
        add("moe.experts.w1", &[e, h, d]);
        add("moe.experts.w2", &[e, d, h]);
        add("moe.experts.w3", &[e, h, d]);
    }
    all.push(("norm.weight".to_owned(), vec![d]));
    all.push(("output.weight".to_owned(), vec![v, d]));
    all
}

fn load(weights: &Weights, expected: &[Parameter]) -> titan::Result<Vec<(String, Tensor)>> {
    let mut loaded = Vec::new();
    weights.load(expected, |name, tensor| {
        loaded.push((name.to_owned(), tensor));
        Ok(())
    })?;
    Ok(loaded)
}

fn open(path: &Path, model_name: &str, args: &DecoderArgs) -> titan::Result<Weights> {
    Weights::open_hugging_face(path, Family::of(model_name)?, args, false)
}

/// Exports `model` from a run's last step, and gives the folder.
fn export(
    model_name: &str,
    args: &DecoderArgs,
    export_dtype: ExportDtype,
    model: &[(String, Tensor)],
) -> (tempfile::TempDir, PathBuf) {
    let dump_folder = tempfile::tempdir().unwrap();
    let settings = config::Checkpoint { enable: true, last_save_in_hf: true, export_dtype, ..Default::default() };
    let assets = Assets {
        hf_assets_path: "nowhere".into(),
        model_name: model_name.into(),
        args: args.clone(),
        config_toml: String::new(),
        tokenizer_files: vec![("tokenizer.json".into(), b"{}".to_vec())],
        bos_id: Some(0),
        eos_id: Some(1),
    };
    let progress = Progress {
        train_state: TrainState { step: 5, n_tokens_seen: 0, seed: 0 },
        lr_scheduler: json!(null),
        dataloader: json!(null),
    };
    let mut manager = CheckpointManager::open(settings, dump_folder.path(), assets).unwrap();
    manager.save(5, Why::Last, &State { model, optimizer: &[], progress: &progress }).unwrap();
    let path = dump_folder.path().join("checkpoint/step-5-hf");
    (dump_folder, path)
}

/// Name, type, shape and bytes of every tensor of the text model.
fn bits(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .filter(|(name, _)| !name.starts_with("vision_model.") && !name.starts_with("multi_modal_projector."))
        .map(|(name, view)| (name.to_owned(), (view.dtype().to_string(), view.shape().to_vec(), view.data().to_vec())))
        .collect()
}

#[test]
fn loading_and_exporting_gives_the_same_names_and_bits() {
    for (case, model_name) in CASES {
        let args = args(case);
        let model = load(&open(&golden(case), model_name, &args).unwrap(), &parameters(&args)).unwrap();
        assert_eq!(model.len(), parameters(&args).len(), "{case}");
        for (name, bias) in model.iter().filter(|(name, _)| name.ends_with("expert_bias")) {
            assert_eq!(bias.to_vec1::<f32>().unwrap(), [0.0; 4], "{name}");
        }
        let (_dump_folder, path) = export(model_name, &args, ExportDtype::Float32, &model);
        assert_eq!(bits(&path), bits(&golden(case)), "{case}");
    }
}

#[test]
fn the_exported_config_describes_the_model_it_came_from() {
    for (case, model_name) in CASES {
        let args = args(case);
        let model = load(&open(&golden(case), model_name, &args).unwrap(), &parameters(&args)).unwrap();
        let (_dump_folder, path) = export(model_name, &args, ExportDtype::Float32, &model);
        let (family, described) = hf::args_from_config(&json_file(&path.join("config.json"))).unwrap();
        let (_, golden) = hf::args_from_config(&json_file(&golden(case).join("config.json"))).unwrap();
        assert_eq!(family, Family::of(model_name).unwrap());
        assert_eq!(described, DecoderArgs { max_seq_len: described.max_seq_len, ..golden }, "{case}");
        assert_eq!(parameters(&described), parameters(&args), "{case}");
        assert_eq!(described.rope_scaling_args, args.rope_scaling_args);
        assert_eq!(described.moe_args, args.moe_args);
        open(&path, model_name, &args).unwrap();
    }
}

#[test]
fn an_export_in_bfloat16_loads_as_the_rounded_weights() {
    let (case, model_name) = CASES[2];
    let args = args(case);
    let model = load(&open(&golden(case), model_name, &args).unwrap(), &parameters(&args)).unwrap();
    let (_dump_folder, path) = export(model_name, &args, ExportDtype::Bfloat16, &model);
    assert_eq!(json_file(&path.join("config.json"))["torch_dtype"], "bfloat16");
    let loaded: HashMap<_, _> =
        load(&open(&path, model_name, &args).unwrap(), &parameters(&args)).unwrap().into_iter().collect();
    for (name, tensor) in model.iter().filter(|(name, _)| !name.ends_with("expert_bias")) {
        let rounded = tensor.to_dtype(DType::BF16).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
        assert_eq!(values(&loaded[name]), values(&rounded), "{name}");
    }
}

#[test]
fn text_only_names_load_too() {
    let (case, model_name) = CASES[1];
    let args = args(case);
    let folder = tempfile::tempdir().unwrap();
    let tensors =
        candle_core::safetensors::load(golden(case).join("model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let renamed: HashMap<String, Tensor> = tensors
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("language_model.")?.to_owned(), tensor)))
        .collect();
    candle_core::safetensors::save(&renamed, folder.path().join("model.safetensors")).unwrap();
    let model = load(&open(folder.path(), model_name, &args).unwrap(), &parameters(&args)).unwrap();
    assert_eq!(model.len(), parameters(&args).len());
}

#[test]
fn a_model_of_another_kind_is_refused_before_its_weights_are_read() {
    let (case, model_name) = CASES[1];
    let refusal = |args: &DecoderArgs, change: &dyn Fn(&mut Value)| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = json_file(&golden(case).join("config.json"));
        change(&mut config);
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        open(folder.path(), model_name, args).err().unwrap().to_string()
    };
    let same = args(case);
    let message = refusal(&same, &|config| config["text_config"]["use_qk_norm"] = json!(true));
    assert!(message.contains("config.json") && message.contains("use_qk_norm: true"), "{message}");
    let other = DecoderArgs { n_heads: 8, n_kv_heads: Some(4), ..same.clone() };
    let message = refusal(&other, &|_| ());
    assert!(message.contains("n_heads: 8 here, 4 there"), "{message}");
    let message = refusal(&same, &|config| config["model_type"] = json!("mixtral"));
    assert!(message.contains("model_type `mixtral` is not known"), "{message}");
}

#[test]
fn hugging_face_names_without_their_key_set_are_recognised() {
    let (case, _) = CASES[0];
    let weights = Weights::open(&golden(case)).unwrap();
    let message = load(&weights, &parameters(&args(case))).unwrap_err().to_string();
    assert!(message.contains("missing: tok_embeddings.weight"), "{message}");
    assert!(message.contains("set checkpoint.initial_load_in_hf = true"), "{message}");
}

#[test]
fn weights_of_another_size_are_listed() {
    let (case, model_name) = CASES[2];
    let args = DecoderArgs { n_layers: 4, vocab_size: 64, ..args(case) };
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden(case).join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let message = load(&open(folder.path(), model_name, &args).unwrap(), &parameters(&args)).unwrap_err().to_string();
    for words in [
        "language_model.lm_head.weight: shape [128, 32], the model's is [64, 32]",
        "missing: language_model.model.layers.3.feed_forward.experts.gate_up_proj",
    ] {
        assert!(message.contains(words), "{message}");
    }
}
