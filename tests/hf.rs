//! Hugging Face checkpoints, computed by PyTorch: loaded, saved, converted, and exported again bit for bit.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use titan::autograd::Precision;
use titan::components::checkpoint::{
    Assets, CheckpointManager, Parameter, Parameters, Progress, State, TrainState, Weights, Why,
};
use titan::config::{self, ExportDtype};
use titan::generate::Pretrained;
use titan::models::args::DecoderArgs;
use titan::models::hf;
use titan::models::{self, Decoder};

const LLAMA3: &str = "hf_llama3";
const LLAMA4: &str = "hf_llama4";
const LLAMA4_INTERLEAVED: &str = "hf_llama4_interleaved";
/// As Meta's are: layers without rotary positions, with tuned temperature, among layers that attend in chunks.
const LLAMA4_SCOUT: &str = "hf_llama4_scout";
const DEEPSEEK: &str = "hf_deepseek_v3";
const CASES: [&str; 15] = [
    LLAMA3,
    LLAMA4,
    LLAMA4_INTERLEAVED,
    LLAMA4_SCOUT,
    "hf_qwen3_tied",
    "hf_qwen3_moe",
    DEEPSEEK,
    "hf_deepseek_v2",
    "hf_mistral",
    "hf_smollm",
    "hf_mixtral",
    "hf_olmo2",
    "hf_gemma2",
    "hf_gemma3",
    "hf_gpt_oss",
];

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn model_name(case: &str) -> String {
    json_file(&golden(case).join("case.json"))["model"].as_str().unwrap().to_owned()
}

/// The case's model in titan's arguments, as a job would state them.
fn args(case: &str) -> DecoderArgs {
    let case_json = json_file(&golden(case).join("case.json"));
    let Some(config) = case_json["config"].as_object() else {
        return hf::args_from_config(&json_file(&golden(case).join("config.json"))).unwrap().1;
    };
    let mut args = serde_json::to_value(models::family(&model_name(case)).unwrap()).unwrap();
    args.as_object_mut().unwrap().extend(config.clone());
    serde_json::from_value(args).unwrap()
}

fn parameters(args: &DecoderArgs) -> Vec<Parameter> {
    Decoder::new(args, None).unwrap().state_shapes()
}

fn load(weights: &Weights, expected: &[Parameter]) -> titan::Result<Vec<(String, Tensor)>> {
    let mut loaded = Vec::new();
    weights.load(expected, |name, tensor| {
        loaded.push((name.to_owned(), tensor));
        Ok(())
    })?;
    Ok(loaded)
}

fn open(path: &Path, case: &str, args: &DecoderArgs) -> titan::Result<Weights> {
    Weights::open_hugging_face(path, &model_name(case), args, false)
}

/// The case's model, loaded as `checkpoint.initial_load_in_hf` does.
fn loaded(case: &str) -> Vec<(String, Tensor)> {
    let args = args(case);
    load(&open(&golden(case), case, &args).unwrap(), &parameters(&args)).unwrap()
}

/// Exports a model as a run's last step does, and gives the folder.
fn export(case: &str, export_dtype: ExportDtype, model: &[(String, Tensor)]) -> (tempfile::TempDir, PathBuf) {
    let dump_folder = tempfile::tempdir().unwrap();
    let settings = config::Checkpoint { enable: true, last_save_in_hf: true, export_dtype, ..Default::default() };
    let assets = Assets {
        hf_assets_path: "nowhere".into(),
        model_name: model_name(case),
        args: args(case),
        config_toml: String::new(),
        tokenizer_files: vec![("tokenizer.json".into(), b"{}".to_vec())],
        bos_id: Some(0),
        eos_id: Some(1),
    };
    let progress = Progress {
        train_state: TrainState { step: 5, n_tokens_seen: 0, seed: 0 },
        lr_scheduler: json!(null),
        dataloader: json!(null),
        optimizer_steps: 0,
        loss_guard: json!(null),
    };
    let mut manager = CheckpointManager::open(settings, dump_folder.path(), assets).unwrap();
    manager.save(5, Why::Last, &State { model, optimizer: &[], progress: &progress }).unwrap();
    let path = dump_folder.path().join("checkpoint/step-5-hf");
    (dump_folder, path)
}

/// Name, type, shape and bytes of every tensor of the text model.
fn bits(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for name in files(path).iter().filter(|name| name.starts_with("model") && name.ends_with(".safetensors")) {
        let bytes = fs::read(path.join(name)).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            if !name.starts_with("vision_model.") && !name.starts_with("multi_modal_projector.") {
                let facts = (view.dtype().to_string(), view.shape().to_vec(), view.data().to_vec());
                assert!(all.insert(name.to_owned(), facts).is_none(), "{name} is there twice");
            }
        }
    }
    all
}

fn files(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A copy of the case's folder with a tokenizer of the words `t1`, `t2`, ...; any other word is token 0.
fn with_tokenizer(case: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden(case).join(name), folder.path().join(name)).unwrap();
    }
    let mut vocab: BTreeMap<String, u32> = (1..128).map(|id| (format!("t{id}"), id)).collect();
    vocab.insert("[UNK]".into(), 0);
    fs::write(folder.path().join("vocab.json"), serde_json::to_vec(&vocab).unwrap()).unwrap();
    folder
}

fn titan(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("titan").unwrap();
    command.args(arguments);
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Tokens, `(2, 32)`, and the logits that transformers computes.
fn expected(case: &str) -> (Tensor, Tensor) {
    let tensors = candle_core::safetensors::load(golden(case).join("expected.safetensors"), &Device::Cpu).unwrap();
    (tensors["tokens"].to_dtype(DType::U32).unwrap(), tensors["logits"].clone())
}

/// The largest difference over the largest expected magnitude.
fn relative_error(ours: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(ours.dims(), expected.dims());
    let max = |t: Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    max((ours - expected).unwrap()) / max(expected.clone())
}

#[test]
fn loading_and_exporting_gives_the_same_names_and_bits() {
    for case in CASES {
        let model = loaded(case);
        let has_bias = bits(&golden(case)).keys().any(|name| name.ends_with("e_score_correction_bias"));
        for (name, bias) in model.iter().filter(|(name, _)| name.ends_with("expert_bias") && !has_bias) {
            assert!(bias.to_vec1::<f32>().unwrap().iter().all(|bias| *bias == 0.0), "{name}");
        }
        let (_dump_folder, path) = export(case, ExportDtype::Float32, &model);
        assert_eq!(bits(&path), bits(&golden(case)), "{case}");
    }
}

#[test]
fn the_exported_config_describes_the_model_it_came_from() {
    for case in CASES {
        let args = args(case);
        let (_dump_folder, path) = export(case, ExportDtype::Float32, &loaded(case));
        let (family, described) = hf::args_from_config(&json_file(&path.join("config.json"))).unwrap();
        let (_, golden) = hf::args_from_config(&json_file(&golden(case).join("config.json"))).unwrap();
        assert_eq!(family.name(), model_name(case));
        for source in [&args, &DecoderArgs { max_seq_len: described.max_seq_len, ..golden.clone() }] {
            assert_eq!(hf::different_structure(source, &described), Vec::<String>::new(), "{case}");
        }
        assert_eq!(hf::different_constants(&golden, &described), Vec::<String>::new(), "{case}");
        open(&path, case, &args).unwrap();
    }
}

/// Through the prompt, and then token by token with what generation caches.
#[test]
fn a_folder_alone_computes_the_logits_of_transformers() {
    for case in CASES {
        let model = Pretrained::open_hugging_face(&golden(case)).unwrap();
        let (tokens, expected) = expected(case);
        let mut decoder = Decoder::new(&model.args, None).unwrap();
        decoder.allocate(Precision { storage: DType::F32, compute: DType::F32 }, &Device::Cpu, false).unwrap();
        model.weights.load(&decoder.state_shapes(), |name, tensor| decoder.set(name, &tensor)).unwrap();

        let error = relative_error(&decoder.logits(&tokens).unwrap(), &expected);
        assert!(error < 1e-5, "{case}: {error:e}");
        let mut cache = decoder.cache();
        for (start, end) in [(0, 20), (20, 21), (21, 22), (22, 32)] {
            let logits = decoder.next_logits(&tokens.narrow(1, start, end - start).unwrap(), &mut cache).unwrap();
            let error = relative_error(&logits, &expected.narrow(1, end - 1, 1).unwrap().squeeze(1).unwrap());
            assert!(error < 1e-5, "{case} at {end}: {error:e}");
        }
    }
}

#[test]
fn generate_takes_a_folder_and_goes_on_as_transformers_would() {
    for case in CASES {
        let folder = with_tokenizer(case);
        let (tokens, logits) = expected(case);
        let ids = tokens.to_vec2::<u32>().unwrap().remove(1);
        let prompt: Vec<String> = ids.iter().map(|id| format!("t{id}")).collect();
        let next = logits.get(1).unwrap().get(31).unwrap().argmax(0).unwrap().to_scalar::<u32>().unwrap();
        let word = if next == 0 { "[UNK]".to_owned() } else { format!("t{next}") };
        let prompt = prompt.join(" ");
        let arguments = ["generate", "--checkpoint", text(folder.path()), "--prompt", &prompt, "--temperature", "0"];
        let output = titan(&arguments).args(["--max-new-tokens", "1"]).assert().success().get_output().stdout.clone();
        assert_eq!(String::from_utf8(output).unwrap().trim_end(), format!("{prompt}{word}"), "{case}");
    }
}

/// From `config.json` and weights, through a step too small to change a bit.
#[test]
fn a_run_that_learns_nothing_exports_the_folder_it_started_from() {
    for case in CASES {
        let folder = with_tokenizer(case);
        let dump_folder = folder.path().join("outputs");
        let name = model_name(case);
        let arguments = [
            ["--model.name", &name],
            ["--model.flavor", "hf"],
            ["--model.hf_assets_path", text(folder.path())],
            ["--job.dump_folder", text(&dump_folder)],
            ["--training.steps", "1"],
            ["--training.seq_len", "16"],
            ["--training.local_batch_size", "2"],
            ["--training.mixed_precision_param", "float32"],
            ["--optimizer.lr", "1e-30"],
        ];
        titan(&["train", "--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.last_save_in_hf"])
            .args(arguments.concat())
            .assert()
            .success();
        // What balances the experts' load moves by steps of its own.
        let weights = |path: &Path| {
            let mut bits = bits(path);
            bits.retain(|name, _| !name.ends_with("e_score_correction_bias"));
            bits
        };
        assert_eq!(weights(&dump_folder.join("checkpoint/step-1-hf")), weights(&golden(case)), "{case}");
        let arguments = ["generate", "--checkpoint", "step-1", "--dump-folder", text(&dump_folder)];
        titan(&arguments).args(["--prompt", "t1", "--max-new-tokens", "2"]).assert().success();
    }
}

#[test]
fn converting_there_and_back_gives_every_bit_in_shards_of_the_size_asked_for() {
    for case in CASES {
        let folder = with_tokenizer(case);
        let (ours, theirs) = (folder.path().join("titan"), folder.path().join("theirs"));
        titan(&["convert", "--from-hf", text(folder.path()), "--to", text(&ours)]).assert().success();
        titan(&["convert", "--to-hf", "titan", "--to", "theirs", "--max-shard-size", "100KB"])
            .current_dir(folder.path())
            .assert()
            .success();
        assert_eq!(bits(&theirs), bits(&golden(case)), "{case}");
        let index = json_file(&theirs.join("model.safetensors.index.json"));
        let shards: Vec<_> = files(&theirs).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
        assert!(
            shards.len() > 1 && shards[0] == format!("model-00001-of-{:05}.safetensors", shards.len()),
            "{shards:?}"
        );
        assert_eq!(index["weight_map"].as_object().unwrap().len(), bits(&theirs).len());
        assert_eq!(fs::read(theirs.join("vocab.json")).unwrap(), fs::read(folder.path().join("vocab.json")).unwrap());
        assert!(theirs.join("generation_config.json").is_file());

        // Shards are found without an index too, and 16 bits are half of 32.
        fs::remove_file(theirs.join("model.safetensors.index.json")).unwrap();
        let again = folder.path().join("again");
        titan(&["convert", "--from-hf", text(&theirs), "--to", text(&again), "--dtype", "bfloat16"]).assert().success();
        let Pretrained { weights, args, .. } = Pretrained::open(text(&again), Path::new(""), "").unwrap();
        let parameters = parameters(&args);
        let fitted = weights.fit(&parameters).unwrap();
        for (name, _) in &parameters {
            let dtype = if name.ends_with("expert_bias") { DType::F32 } else { DType::BF16 };
            assert_eq!(fitted.dtype(name), dtype, "{name}");
        }
    }
}

#[test]
fn convert_refuses_to_write_over_anything_and_leaves_nothing_half_done() {
    let folder = with_tokenizer(LLAMA3);
    let path = text(folder.path());
    titan(&["convert", "--from-hf", path, "--to", path])
        .assert()
        .code(2)
        .stderr(predicates::str::contains("exists already"));
    titan(&["convert", "--to", path]).assert().code(2);

    let weights = folder.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    let to = folder.path().join("to");
    titan(&["convert", "--from-hf", path, "--to", text(&to)])
        .assert()
        .code(1)
        .stderr(predicates::str::contains("model.safetensors is no safetensors file: its header describes"));
    assert_eq!(files(folder.path()), ["config.json", "model.safetensors", "vocab.json"]);
}

#[test]
fn an_export_in_bfloat16_loads_as_the_rounded_weights() {
    let case = DEEPSEEK;
    let model = loaded(case);
    let (_dump_folder, path) = export(case, ExportDtype::Bfloat16, &model);
    assert_eq!(json_file(&path.join("config.json"))["torch_dtype"], "bfloat16");
    let args = args(case);
    let loaded: HashMap<_, _> =
        load(&open(&path, case, &args).unwrap(), &parameters(&args)).unwrap().into_iter().collect();
    for (name, tensor) in model {
        // Small steps add up in it, which transformers keeps in float32 too.
        if name.ends_with("expert_bias") {
            assert_eq!(loaded[&name].to_vec1::<f32>().unwrap(), tensor.to_vec1::<f32>().unwrap());
            continue;
        }
        let rounded = tensor.to_dtype(DType::BF16).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
        assert_eq!(values(&loaded[&name]), values(&rounded), "{name}");
    }
}

/// The case's checkpoint with renamed or replaced tensors: name, type, shape, bytes.
fn rewritten(case: &str, change: impl Fn(&mut BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(golden(case).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors =
        file.iter().map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())));
    let mut tensors = tensors.collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

#[test]
fn text_only_names_load_too() {
    let folder = rewritten(LLAMA4, |tensors| {
        let names: Vec<_> = tensors.keys().cloned().collect();
        for name in names {
            let tensor = tensors.remove(&name).unwrap();
            if let Some(name) = name.strip_prefix("language_model.") {
                tensors.insert(name.to_owned(), tensor);
            }
        }
    });
    let args = args(LLAMA4);
    let model = load(&open(folder.path(), LLAMA4, &args).unwrap(), &parameters(&args)).unwrap();
    assert_eq!(model.len(), parameters(&args).len());
}

#[test]
fn experts_in_one_tensor_load_as_those_apart() {
    for case in ["hf_qwen3_moe", DEEPSEEK] {
        let folder = rewritten(case, |tensors| {
            let args = args(case);
            let n_experts = args.moe_args.as_ref().unwrap().num_experts;
            for layer in (0..args.n_layers).filter(|layer| args.is_moe_layer(*layer)) {
                let prefix = format!("model.layers.{layer}.mlp.experts");
                let mut take = |projections: &[&str]| {
                    let names = (0..n_experts).flat_map(|e| projections.iter().map(move |p| (e, p)));
                    let taken = names.map(|(e, p)| tensors.remove(&format!("{prefix}.{e}.{p}.weight")).unwrap());
                    let taken: Vec<_> = taken.collect();
                    let [rows, cols] = taken[0].1[..] else { panic!("a matrix") };
                    let data = taken.iter().flat_map(|(_, _, data)| data.clone()).collect();
                    (Dtype::F32, vec![n_experts, projections.len() * rows, cols], data)
                };
                let (gate_up, down) = (take(&["gate_proj", "up_proj"]), take(&["down_proj"]));
                tensors.insert(format!("{prefix}.gate_up_proj"), gate_up);
                tensors.insert(format!("{prefix}.down_proj"), down);
            }
        });
        let args = args(case);
        let fused: BTreeMap<_, _> =
            load(&open(folder.path(), case, &args).unwrap(), &parameters(&args)).unwrap().into_iter().collect();
        let apart: BTreeMap<_, _> = loaded(case).into_iter().collect();
        for ((name, fused), (_, apart)) in fused.iter().zip(&apart) {
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!((fused.dims(), values(fused)), (apart.dims(), values(apart)), "{name}");
        }
    }
}

/// Of 8 bits and a scale for each block of 16 x 16 in one matrix, whose sizes are no multiples of that.
#[test]
fn eight_bit_weights_are_dequantized_where_the_config_or_the_job_says_so() {
    const NAME: &str = "model.layers.1.self_attn.q_b_proj.weight";
    let (rows, cols) = (60, 24);
    // 1.0 in the format of 4 bits of exponent and 3 of mantissa, and 1.5.
    let bytes: Vec<u8> = (0..rows * cols).map(|i| if i % 3 == 0 { 0x3c } else { 0x38 }).collect();
    let quantized = |scales: usize| {
        rewritten(DEEPSEEK, |tensors| {
            tensors.insert(NAME.into(), (Dtype::F8_E4M3, vec![rows, cols], bytes.clone()));
            let data = (1..=scales).flat_map(|scale| (scale as f32).to_le_bytes()).collect();
            tensors.insert(format!("{NAME}_scale_inv"), (Dtype::F32, vec![scales / 2, 2], data));
        })
    };
    let args = args(DEEPSEEK);
    let folder = quantized(8);
    let refusal = load(&open(folder.path(), DEEPSEEK, &args).unwrap(), &parameters(&args)).unwrap_err().to_string();
    assert!(refusal.contains("set checkpoint.initial_load_in_hf_quantized = true"), "{refusal}");

    let mut config = json_file(&golden(DEEPSEEK).join("config.json"));
    config["quantization_config"] = json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16] });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let weights: HashMap<_, _> =
        load(&open(folder.path(), DEEPSEEK, &args).unwrap(), &parameters(&args)).unwrap().into_iter().collect();
    let weight = weights["layers.1.attention.wq_b.weight"].to_vec2::<f32>().unwrap();
    for (i, weight) in weight.concat().into_iter().enumerate() {
        let (row, col) = (i / cols, i % cols);
        let scale = (row / 16 * 2 + col / 16 + 1) as f32;
        assert_eq!(weight, scale * if i % 3 == 0 { 1.5 } else { 1.0 }, "row {row}, column {col}");
    }

    // Without a config the blocks are DeepSeek's own, of 128 x 128, which these scales do not fit.
    fs::remove_file(folder.path().join("config.json")).unwrap();
    let weights = Weights::open_hugging_face(folder.path(), &model_name(DEEPSEEK), &args, true).unwrap();
    let refusal = load(&weights, &parameters(&args)).unwrap_err().to_string();
    assert!(refusal.contains("_scale_inv: F32 [4, 2], blocks of [128, 128] need [1, 1]"), "{refusal}");
}

/// 1 and 1.5 in turn along the inputs, times 2 to the power of the output.
#[test]
fn four_bit_experts_are_dequantized_as_their_names_say() {
    let case = "hf_gpt_oss";
    let name = "model.layers.1.mlp.experts.gate_up_proj";
    let args = args(case);
    let (n, hidden) = (args.moe_args.as_ref().unwrap().num_experts, args.moe_hidden_dim());
    let scales = vec![n, 2 * hidden, args.dim / 32];
    let blocks = [&scales[..], &[16]].concat();
    let quantized = |blocks: Vec<usize>| {
        let folder = rewritten(case, |tensors| {
            tensors.remove(name).unwrap();
            let bytes = vec![0x32; blocks.iter().product()];
            tensors.insert(format!("{name}_blocks"), (Dtype::U8, blocks.clone(), bytes));
            let exponents = (0..n).flat_map(|_| (0..2 * hidden).map(|output| 127 + output as u8)).collect();
            tensors.insert(format!("{name}_scales"), (Dtype::U8, scales.clone(), exponents));
        });
        let mut config = json_file(&golden(case).join("config.json"));
        config["quantization_config"] = json!({ "quant_method": "mxfp4" });
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        folder
    };
    let folder = quantized(blocks);
    let parameters = parameters(&args);
    let weights = open(folder.path(), case, &args).unwrap();
    let loaded: HashMap<_, _> = load(&weights, &parameters).unwrap().into_iter().collect();
    for (which, w) in ["w1", "w3"].iter().enumerate() {
        let name = format!("layers.1.moe.experts.{w}");
        for expert in loaded[&name].to_vec3::<f32>().unwrap() {
            for (row, weights) in expert.iter().enumerate() {
                let power = 2f32.powi((2 * row + which) as i32);
                let expected: Vec<f32> = (0..args.dim).map(|input| power * [1.0, 1.5][input % 2]).collect();
                assert_eq!(*weights, expected, "{w} {row}");
            }
        }
        assert_eq!(weights.fit(&parameters).unwrap().dtype(&name), DType::BF16);
    }

    let folder = quantized(vec![n, hidden, args.dim / 32, 32]);
    let refusal = load(&open(folder.path(), case, &args).unwrap(), &parameters).unwrap_err().to_string();
    assert!(refusal.contains("gate_up_proj_blocks: U8 [4, 24, 1, 32], the model's are U8 [4, 48, 1, 16]"), "{refusal}");
}

#[test]
fn a_model_of_another_kind_is_refused_before_its_weights_are_read() {
    let case = LLAMA4;
    let refusal = |args: &DecoderArgs, change: &dyn Fn(&mut Value)| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = json_file(&golden(case).join("config.json"));
        change(&mut config);
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        open(folder.path(), case, args).err().unwrap().to_string()
    };
    let same = args(case);
    let message = refusal(&same, &|config| config["text_config"]["use_qk_norm"] = json!(true));
    assert!(message.contains("config.json") && message.contains("qk_unit_norm: false here, true there"), "{message}");
    let message = refusal(&same, &|config| config["text_config"]["hidden_act"] = json!("gelu"));
    assert!(message.contains("config.json") && message.contains("hidden_act: \"gelu\""), "{message}");
    let other = DecoderArgs { n_heads: 8, n_kv_heads: Some(4), ..same.clone() };
    let message = refusal(&other, &|_| ());
    assert!(message.contains("n_heads: 8 here, 4 there"), "{message}");
    let message = refusal(&same, &|config| config["model_type"] = json!("mamba"));
    assert!(message.contains("model_type `mamba` is not known"), "{message}");
}

#[test]
fn hugging_face_names_without_their_key_set_are_recognised() {
    let weights = Weights::open(&golden(LLAMA3)).unwrap();
    let message = load(&weights, &parameters(&args(LLAMA3))).unwrap_err().to_string();
    assert!(message.contains("not of this model: lm_head.weight"), "{message}");
    assert!(message.contains("set checkpoint.initial_load_in_hf = true"), "{message}");
}

#[test]
fn weights_of_another_size_are_listed() {
    let case = LLAMA4_INTERLEAVED;
    let args = DecoderArgs { n_layers: 3, vocab_size: 64, ..args(case) };
    let folder = rewritten(case, |_| ());
    let message = load(&open(folder.path(), case, &args).unwrap(), &parameters(&args)).unwrap_err().to_string();
    for words in [
        "language_model.lm_head.weight: shape [128, 32], the model's is [64, 32]",
        "missing: language_model.model.layers.2.feed_forward.gate_proj.weight",
    ] {
        assert!(message.contains(words), "{message}");
    }
}

/// A checkpoint of 3 GB of zeros, which take no room on most file systems: `config.json` and weights.
fn write_three_gigabytes(folder: &Path) {
    let config = json!({
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 65536, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536, "intermediate_size": 6144, "torch_dtype": "bfloat16"
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (family, args) = hf::args_from_config(&config).unwrap();
    let shapes: HashMap<String, Vec<usize>> = parameters(&args).into_iter().collect();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for mapping in hf::mappings(family, &args, hf::ExpertTensors::Apart) {
        let shape = mapping.file_shape(&shapes[&mapping.parameters[0]]);
        for file in &mapping.files {
            let start = end;
            end += 2 * shape.iter().product::<usize>() as u64;
            header.insert(file.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
        }
    }
    assert!(end > 3_000_000_000, "{end}");
    let header = serde_json::to_vec(&header).unwrap();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(&header);
    let path = folder.join("model.safetensors");
    fs::write(&path, &bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(bytes.len() as u64 + end).unwrap();
}

/// The most memory that any finished child process held.
fn peak_of_children_bytes() -> u64 {
    // SAFETY: all zeros are a valid `rusage`, and the call fills the one it is given.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage), 0);
        usage
    };
    // In kilobytes, on Linux.
    usage.ru_maxrss as u64 * 1024
}

/// Run alone, in release: `cargo test --release --test hf -- --ignored --nocapture three_gigabytes`.
#[test]
#[ignore = "writes 6 GB"]
fn three_gigabytes_convert_there_and_back_in_less_than_one_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    let [from, ours, theirs] = ["from", "ours", "theirs"].map(|name| folder.path().join(name));
    fs::create_dir(&from).unwrap();
    write_three_gigabytes(&from);
    titan(&["convert", "--from-hf", text(&from), "--to", text(&ours), "--dtype", "bfloat16"]).assert().success();
    println!("from Hugging Face: peak {:.2} GiB", peak_of_children_bytes() as f64 / (1u64 << 30) as f64);
    titan(&["convert", "--to-hf", text(&ours), "--to", text(&theirs), "--max-shard-size", "1GB"]).assert().success();
    println!("and back: peak {:.2} GiB", peak_of_children_bytes() as f64 / (1u64 << 30) as f64);
    assert!(peak_of_children_bytes() < 1 << 30);
}
