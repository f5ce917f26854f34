//! Job configs as users write them: what is accepted, what is refused and in which words.

use std::ffi::OsString;
use std::path::Path;

use assert_cmd::Command;
use proptest::prelude::*;
use serde_json::Value as Json;
use titan::config::{self, JobConfig, Loaded, ModelArgs};
use titan::models::args::{DecoderArgs, MoeArgs};

/// `titan config`, with the job file on a path that is the same in every message.
fn titan_config(job: &str, flags: &[&str]) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("job.toml"), job).unwrap();
    let mut titan = Command::new(env!("CARGO_BIN_EXE_titan"));
    let output = titan.current_dir(&folder).args(["config", "--config", "job.toml"]).args(flags).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn load(job: &str, flags: &str) -> titan::Result<Loaded> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("job.toml");
    std::fs::write(&path, job).unwrap();
    let argv = ["titan"].into_iter().chain(flags.split_whitespace()).map(OsString::from);
    let (rest, overrides) = config::split_overrides(argv);
    assert_eq!(rest.len(), 1, "not an override: {rest:?}");
    config::load(Some(&path), &overrides)
}

struct Mistake {
    job: &'static str,
    flags: &'static [&'static str],
    /// Parts of the message, in their order.
    says: &'static [&'static str],
}

const fn file(job: &'static str, says: &'static [&'static str]) -> Mistake {
    Mistake { job, flags: &[], says }
}

const fn flags(flags: &'static [&'static str], says: &'static [&'static str]) -> Mistake {
    Mistake { job: "", flags, says }
}

const MISTAKES: &[Mistake] = &[
    // Names
    file(
        "[training]\nseq_length = 2048",
        &[
            "unknown key `training.seq_length`",
            "job.toml:2:1",
            "^^^^^^^^^^ did you mean `seq_len`?",
            "local_batch_size, ",
        ],
    ),
    file("[optimizer]\nLR = 1", &["unknown key `optimizer.LR`", "did you mean `lr`?"]),
    file("[training]\nbatch-size = 4", &["did you mean `local_batch_size`?"]),
    file(
        "[optimzer]\nlr = 1\n[model]\n",
        &["unknown section [optimzer]", "job.toml:1:2", "did you mean [optimizer]?", "= sections: job,"],
    ),
    file("[float8]\n", &["did you mean [quantize.linear.float8] or [quantize.grouped_mm.float8]?"]),
    file("steps = 5", &["unknown key `steps`", "did you mean `training.steps` or `validation.steps`?"]),
    file("[model]\ndim = 512", &["unknown key `model.dim`", "did you mean `model.args.dim`?"]),
    file("[model.args.moe_args]\nnum_expert = 4", &["`model.args.moe_args.num_expert`", "did you mean `num_experts`?"]),
    flags(
        &["--training.stpes", "5"],
        &["unknown key `training.stpes`", "--> flag --training.stpes", "did you mean `steps`?"],
    ),
    flags(&["--trainig.steps", "5"], &["unknown section [trainig]", "did you mean [training]?"]),
    flags(&["--checkpoint.no-enabled"], &["unknown key `checkpoint.no_enabled`", "keys of [checkpoint]: enable,"]),
    // Types
    file(
        "[training]\nsteps = \"100\"",
        &[
            "`training.steps` cannot be \"100\"",
            "job.toml:2:9",
            "write it without quotes: 100",
            "an integer of at least 1",
        ],
    ),
    file("[training]\nsteps = 1.5", &["`training.steps` cannot be 1.5", "allowed: an integer"]),
    file(
        "[training]\ndataset = 4",
        &["`training.dataset` cannot be 4", "write it in quotes: \"4\"", "allowed: a string"],
    ),
    file("[checkpoint]\nenable = 1", &["`checkpoint.enable` cannot be 1", "allowed: true, false"]),
    file(
        "[compile]\ncomponents = \"model\"",
        &[
            "`compile.components` cannot be \"model\"",
            "write it as a list: [\"model\"]",
            "a list, each item \"model\", \"loss\"",
        ],
    ),
    file("training = 5", &["`training` cannot be 5", "a table of dataset, "]),
    file("[[training]]\nsteps = 5", &["`training` cannot be [a table]"]),
    flags(
        &["--optimizer.lr", "fast"],
        &["`optimizer.lr` cannot be \"fast\"", "--> flag --optimizer.lr", "a number above 0"],
    ),
    flags(&["--training.steps"], &["`training.steps` needs a value", "an integer of at least 1"]),
    flags(&["--checkpoint.enable=maybe"], &["`checkpoint.enable` cannot be \"maybe\"", "allowed: true, false"]),
    // Values
    file(
        "[lr_scheduler]\ndecay_type = \"cosin\"",
        &[
            "`lr_scheduler.decay_type` cannot be \"cosin\"",
            "did you mean \"cosine\"?",
            "\"linear\", \"sqrt\", \"cosine\"",
        ],
    ),
    file("[optimizer]\nname = \"adamw\"", &["did you mean \"AdamW\"?"]),
    file(
        "[checkpoint]\nexclude_from_loading = [\"model\",\n  \"optimiser\"]",
        &["job.toml:3:3", "did you mean \"optimizer\"?"],
    ),
    file("[optimizer]\nlr = 0", &["`optimizer.lr` cannot be 0", "a number above 0"]),
    file("[optimizer]\nbeta2 = 1", &["`optimizer.beta2` cannot be 1", "of at least 0 and below 1"]),
    file(
        "[lr_scheduler]\ndecay_ratio = 1.5",
        &["`lr_scheduler.decay_ratio` cannot be 1.5", "a number of at least 0 and at most 1, or \"none\""],
    ),
    file("[training]\nmax_norm = nan", &["`training.max_norm` cannot be nan"]),
    file(
        "[training]\nglobal_batch_size = 0",
        &["`training.global_batch_size` cannot be 0", "-1, or an integer of at least 1"],
    ),
    file("[training]\nsteps = 99999999999999999999", &["`training.steps` cannot be 99999999999999999999"]),
    file("[checkpoint]\nload_step = -2", &["`checkpoint.load_step` cannot be -2", "an integer of at least -1"]),
    file("[validation]\nenable = true\nfreq = 0", &["`validation.freq` cannot be 0"]),
    file("[model]\nname = \"lama3\"", &["`model.name` cannot be \"lama3\"", "did you mean \"llama3\"?"]),
    file(
        "[model]\nname = \"flux\"",
        &["titan does not have this family yet", "\"llama3\", ", "\"qwen3\", \"deepseek_v3\", \"decoder\""],
    ),
    file(
        "[model]\nflavor = \"8b\"",
        &["`model.flavor` cannot be \"8b\"", "did you mean \"8B\"?", "flavors of llama3: "],
    ),
    file(
        "[activation_checkpoint]\nselective_ac_option = \"0\"",
        &["`activation_checkpoint.selective_ac_option` cannot be \"0\"", "\"op\""],
    ),
    file(
        "[checkpoint]\nkeep_latest_k = 1",
        &["`checkpoint.keep_latest_k` cannot be 1", "allowed: 0 (keep all), 2 and more"],
    ),
    // Combinations
    file(
        "[profiling]\nprofiler_active = 5\nprofile_freq = 3",
        &[
            "`profiling.profiler_active` 5 is more than `profiling.profile_freq` 3",
            "job.toml:2:19",
            "last `profiler_active` of",
        ],
    ),
    file("[training]\nlocal_batch_size = 8\nglobal_batch_size = 100", &["job.toml:3:21", "= 8; nearest: 96, 104"]),
    Mistake {
        job: "[training]\nlocal_batch_size = 8",
        flags: &["--training.global-batch-size=3"],
        says: &["`training.global_batch_size` 3", "--> flag --training.global-batch-size", "nearest: 8"],
    },
    file("[training]\ndataset = \"json\"", &["`training.dataset` \"json\" needs `training.dataset_path`"]),
    file(
        "[checkpoint]\nlast_save_in_hf = true\nlast_save_model_only = false",
        &["needs `checkpoint.last_save_model_only`", "job.toml:2:19"],
    ),
    file(
        "[checkpoint]\ninitial_load_in_hf = true\ninitial_load_model_only = false",
        &["needs `checkpoint.initial_load_model_only`"],
    ),
    file("[checkpoint]\ncreate_seed_checkpoint = true", &["needs `checkpoint.enable`"]),
    // Not there yet
    flags(
        &["--parallelism.tensor-parallel-degree", "4"],
        &["cannot be 4", "without tensor parallelism", "leave it at 1"],
    ),
    file("[parallelism]\ndata_parallel_shard_degree = 8", &["cannot be 8", "titan trains on one device so far"]),
    file(
        "[model]\nconverters = [\"float8\", \"quantize.linear.mx\"]",
        &[
            "`model.converters` cannot have \"quantize.linear.mx\"",
            "job.toml:2:14",
            "titan does not compute in MX formats yet",
            "allowed: \"quantize.linear.float8\", \"float8\"",
        ],
    ),
    file(
        "[model]\nconverters = [\"quantize.grouped_mm.float8\"]",
        &["cannot have \"quantize.grouped_mm.float8\"", "titan does not quantize routed experts yet"],
    ),
    file("[model]\nconverters = [\"float_8\"]", &["cannot have \"float_8\"", "did you mean \"float8\"?"]),
    file(
        "[quantize.linear.float8]\nrecipe_name = \"row_wise\"",
        &["did you mean \"rowwise\"?", "\"tensorwise\", \"rowwise\", \"rowwise_with_gw_hp\""],
    ),
    file("[metrics]\nenable_wandb = true", &["`metrics.enable_wandb` cannot be true", "`wandb sync`"]),
    file(
        "[activation_checkpoint]\nmode = \"memory_budget\"",
        &["cannot be \"memory_budget\"", "\"selective\", \"full\", \"none\""],
    ),
    file("[experimental]\ncustom_import = \"my.module\"", &["titan runs no Python"]),
    // Not even TOML
    file("[training]\nsteps = \nseq_len = 4\nstpes = 5", &["unknown key `training.stpes`", "did you mean"]),
    file("[training\nsteps = 5", &["this is not TOML", "job.toml:1:10"]),
    file("[training]\nsteps = 5\nsteps = 6", &["this is not TOML: duplicate key", "job.toml:3:1"]),
];

#[test]
fn every_mistake_gets_its_message() {
    for Mistake { job, flags, says } in MISTAKES {
        let (code, stdout, stderr) = titan_config(job, flags);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{job:?} {flags:?}");
        let mut rest = stderr.as_str();
        for part in *says {
            let at = rest.find(part).unwrap_or_else(|| panic!("no {part:?} (in this place) in\n{stderr}"));
            rest = &rest[at + part.len()..];
        }
    }
}

#[test]
fn all_mistakes_of_file_and_flags_are_told_at_once_in_their_order() {
    let job = "[training]\nstpes = 100\nseq_len = 0\n[checkpoint]\nkeep_latest_k = 1\n[optimizer]\nlr = \"high\"\n";
    let (_, _, stderr) =
        titan_config(job, &["--training.local_batch_size=3", "--training.global_batch_size=7", "--model.nmae", "x"]);
    let titles: Vec<_> = stderr.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
    let expected = [
        "unknown key `training.stpes`",
        "`training.seq_len` cannot be 0",
        "`checkpoint.keep_latest_k` cannot be 1",
        "`optimizer.lr` cannot be \"high\"",
        "unknown key `model.nmae`",
        "`training.global_batch_size` 7 does not divide into equal batches",
    ];
    assert_eq!(titles, expected);
}

#[test]
fn a_value_that_cannot_be_read_brings_no_second_message() {
    let (_, _, stderr) = titan_config("[training]\nlocal_batch_size = 0\nglobal_batch_size = 100", &[]);
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
}

#[test]
fn a_missing_file_suggests_the_one_beside_it() {
    let (code, _, stderr) = titan_config("", &[]);
    assert_eq!(code, Some(0), "{stderr}");
    let mut titan = Command::new(env!("CARGO_BIN_EXE_titan"));
    let output = titan.args(["config", "--config", "configs/colab_a10.toml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("configs/colab_a10.toml") && stderr.contains("did you mean configs/colab_a100.toml?"),
        "{stderr}"
    );
}

#[test]
fn subcommands_without_a_job_refuse_overrides() {
    let folder = tempfile::tempdir().unwrap();
    let mut titan = Command::new(env!("CARGO_BIN_EXE_titan"));
    titan.current_dir(&folder).args(["--training.steps", "5", "write-stories", "--output", "stories.jsonl"]);
    let output = titan.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("takes no job config keys: --training.steps"));
    assert!(!folder.path().join("stories.jsonl").exists());
}

#[test]
fn every_shipped_config_is_accepted() {
    let mut count = 0;
    for entry in std::fs::read_dir("configs").unwrap() {
        let path = entry.unwrap().path();
        if let Err(error) = config::load(Some(&path), &[]) {
            panic!("{error}");
        }
        count += 1;
    }
    assert!(count > 0);
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let loaded = load("[training]\nsteps = 10\nseq_len = 64", "--training.steps 20 --training.steps=30").unwrap();
    let training = &loaded.config.training;
    assert_eq!((training.steps, training.seq_len, training.local_batch_size), (30, 64, 8));
}

#[test]
fn every_value_is_printed_with_its_origin() {
    let (code, stdout, _) = titan_config("[training]\n\nsteps = 10\nseq_len = 64", &["--training.steps", "20"]);
    assert_eq!(code, Some(0));
    let line = |key: &str| stdout.lines().find(|line| line.starts_with(key)).unwrap();
    assert!(line("steps = 20").ends_with("# --training.steps"), "{stdout}");
    assert!(line("seq_len = 64").ends_with("# job.toml:4"), "{stdout}");
    assert!(line("gc_freq = 50").ends_with("# default"), "{stdout}");
    assert!(line("config_file = \"job.toml\"").ends_with("# --config"), "{stdout}");
}

#[test]
fn flags_take_every_kind_of_value() {
    let flags = "--checkpoint.no-enable --debug.deterministic --checkpoint.exclude-from-loading model,data_loader \
                 --checkpoint.load-step -1 --training.max_norm=inf --lr_scheduler.decay_ratio None \
                 --job.description='quoted' --activation_checkpoint.selective_ac_option 3 \
                 --parallelism.module_fqns_per_model_part=[[\"a\"],[\"b\"]] --quantize.linear.mx.filter_fqns= \
                 --model.args.moe_args.num_experts=16 --model.args.rope_scaling_args none";
    let config =
        load("[checkpoint]\nenable = true\nload_step = 5\n[lr_scheduler]\ndecay_ratio = 0.5", flags).unwrap().config;
    use config::CheckpointState::{Dataloader, Model};
    assert!(!config.checkpoint.enable && config.debug.deterministic);
    assert_eq!(config.checkpoint.exclude_from_loading, [Model, Dataloader]);
    assert_eq!((config.checkpoint.load_step, config.lr_scheduler.decay_ratio), (None, None));
    assert_eq!(config.training.max_norm, f64::INFINITY);
    assert_eq!(config.job.description, "quoted");
    assert_eq!(config.activation_checkpoint.selective_every(), Some(3));
    assert_eq!(config.parallelism.module_fqns_per_model_part, Some(vec![vec!["a".into()], vec!["b".into()]]));
    assert_eq!(config.quantize.linear.mx.filter_fqns, Vec::<String>::new());
    assert_eq!(config.model.args.0.to_string(), "rope_scaling_args = \"none\"\n\n[moe_args]\nnum_experts = 16\n");
}

#[test]
fn defaults_are_those_of_torchtitan() {
    let mut expected: toml::Table = include_str!("config/defaults.toml").parse().unwrap();
    let mut actual: toml::Table = JobConfig::default().to_toml().parse().unwrap();
    assert!(actual.remove("data").is_some());
    assert!(actual["model"].as_table_mut().unwrap().remove("lora").is_some());
    // titan ships a tokenizer elsewhere.
    for (table, path) in [(&mut expected, "./tests/assets/tokenizer"), (&mut actual, "./assets/tokenizer")] {
        assert_eq!(table["model"].as_table_mut().unwrap().remove("hf_assets_path"), Some(path.into()));
    }
    // `[quantize]` groups keys two levels deep; elsewhere a section's tables are its keys.
    assert_eq!(sorted(actual), sorted(expected));
}

/// All values by their path.
fn sorted(table: toml::Table) -> std::collections::BTreeMap<String, toml::Value> {
    let mut flat = std::collections::BTreeMap::new();
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => {
                flat.extend(sorted(inner).into_iter().map(|(inner, value)| (format!("{key}.{inner}"), value)))
            }
            value => drop(flat.insert(key, value)),
        }
    }
    flat
}

#[test]
fn torchtitans_own_defaults_are_accepted_as_a_job_file() {
    let loaded = config::parse("defaults.toml", include_str!("config/defaults.toml")).unwrap();
    let mut expected = JobConfig::default();
    expected.model.hf_assets_path = "./tests/assets/tokenizer".into();
    assert_eq!(loaded.config, expected);
}

#[test]
fn a_printed_config_loads_again_as_the_same() {
    let flags = "--debug.seed 42 --optimizer.eps=1e-15 --training.global_batch_size 16 --model.args.moe_args none \
                 --model.args.dim 512 --model.args.rope_scaling_args.scaling_factor=2 --training.max_norm=inf";
    let loaded = load(include_str!("../configs/colab_a100.toml"), flags).unwrap();
    let again = config::parse("config.toml", &loaded.config.to_toml()).unwrap();
    assert_eq!(again.config, loaded.config);
    assert_eq!(config::parse("with origins", &loaded.to_toml_with_origins()).unwrap().config, loaded.config);
    assert_eq!(config::parse("with docs", &loaded.to_toml_with_docs()).unwrap().config, loaded.config);
}

#[test]
fn colab_a100_is_the_users_file_with_comments() {
    let ours: toml::Table = include_str!("../configs/colab_a100.toml").parse().unwrap();
    let users: toml::Table = include_str!("config/colab_a100.toml").parse().unwrap();
    assert_eq!(ours, users);
}

#[test]
fn colab_a100_is_accepted_and_what_has_no_effect_is_named_once() {
    let loaded = config::load(Some(Path::new("configs/colab_a100.toml")), &[]).unwrap();
    let [notice] = loaded.notices.as_slice() else { panic!("{:?}", loaded.notices) };
    for key in ["training.mixed_precision_reduce", "compile.backend", "quantize.linear.mx.filter_fqns"] {
        assert_eq!(notice.matches(&format!("`{key}`")).count(), 1, "{notice}");
    }
    assert!(!notice.contains("training.steps"), "{notice}");
}

#[test]
fn float8_is_accepted_and_its_keys_have_an_effect_only_with_its_converter() {
    let job = "[quantize.linear.float8]\nrecipe_name = \"rowwise\"\nfilter_fqns = [\"output\"]\nemulate = true\n\
               enable_fsdp_float8_all_gather = true";
    for name in ["quantize.linear.float8", "float8"] {
        let loaded = load(job, &format!("--model.converters={name}")).unwrap();
        assert!(loaded.config.model.converts_to_float8());
        assert_eq!(loaded.config.quantize.linear.float8.recipe_name, Some(config::Float8Recipe::Rowwise));
        let expected =
            "no effect: `quantize.linear.float8.enable_fsdp_float8_all_gather` (titan trains on one device so far)";
        assert_eq!(loaded.notices, [expected]);
    }
    let loaded = load(job, "").unwrap();
    assert!(!loaded.config.model.converts_to_float8());
    let [notice] = loaded.notices.as_slice() else { panic!("{:?}", loaded.notices) };
    for part in ["`quantize.linear.float8.recipe_name`", "`model.converters` does not name"] {
        assert!(notice.contains(part), "{notice}");
    }
}

#[test]
fn tokenizer_path_is_taken_for_hf_assets_path_and_said_to_be_deprecated() {
    let loaded = load("[model]\ntokenizer_path = \"old/place\"", "").unwrap();
    assert_eq!(loaded.config.model.hf_assets_path, Path::new("old/place"));
    assert!(loaded.notices[0].contains("`model.tokenizer_path` is deprecated"), "{:?}", loaded.notices);
    assert!(
        loaded
            .to_toml_with_origins()
            .lines()
            .any(|line| line.starts_with("hf_assets_path") && line.ends_with("job.toml:2"))
    );
    let Err(error) = load("[model]\ntokenizer_path = \"\"", "") else { panic!("an empty path names nothing") };
    assert!(error.to_string().contains("`model.tokenizer_path` cannot be empty"), "{error}");
}

#[test]
fn the_schema_tells_editors_each_keys_text_default_and_values() {
    let mut titan = Command::new(env!("CARGO_BIN_EXE_titan"));
    let output = titan.args(["config", "--schema"]).output().unwrap();
    let schema: Json = serde_json::from_slice(&output.stdout).unwrap();
    let decay = &schema["properties"]["lr_scheduler"]["properties"]["decay_ratio"];
    assert_eq!(decay["default"], "none");
    assert!(decay["description"].as_str().unwrap().contains("it falls from the end of warmup on"));
    assert_eq!(decay["anyOf"][0]["maximum"], 1);

    fn undocumented(schema: &Json, path: &str, found: &mut Vec<String>) {
        for (name, key) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            if key["description"].as_str().is_none_or(str::is_empty) {
                found.push(path.clone());
            }
            undocumented(key, &path, found);
        }
    }
    let mut found = Vec::new();
    undocumented(&schema, "", &mut found);
    assert_eq!(found, Vec::<String>::new());
}

/// A `config` of a golden file as `[model.args]`, "none" for null.
fn as_model_args(config: &Json) -> String {
    fn write(table: &Json, header: &str, text: &mut String) {
        *text += &format!("[{header}]\n");
        let (tables, values): (Vec<_>, Vec<_>) = table.as_object().unwrap().iter().partition(|(_, it)| it.is_object());
        for (key, value) in values {
            *text += &if value.is_null() { format!("{key} = \"none\"\n") } else { format!("{key} = {value}\n") };
        }
        tables.iter().for_each(|(key, table)| write(table, &format!("{header}.{key}"), text));
    }
    let mut text = String::new();
    write(config, "model.args", &mut text);
    text
}

#[test]
fn golden_configs_are_model_args_and_come_out_as_they_went_in() {
    let read = |name: &str| -> Json {
        serde_json::from_slice(&std::fs::read(format!("tests/golden/{name}.json")).unwrap()).unwrap()
    };
    let cases = [
        "llama3_base",
        "llama3_gqa_doc",
        "llama4_base",
        "llama4_gqa_top2",
        "llama4_irope",
        "llama4_softmax_after",
        "qwen3_dense",
        "qwen3_dense_tied",
        "deepseek_v3_base",
        "deepseek_v3_yarn",
    ];
    let of_case = |case: Json| (case["model"].as_str().unwrap().to_owned(), case["config"].clone());
    let mut configs: Vec<_> = cases.iter().map(|name| of_case(read(name))).collect();
    for (family, flavors) in read("flops").as_object().unwrap() {
        configs.extend(flavors.as_object().unwrap().values().map(|it| (family.clone(), it["config"].clone())));
    }
    for (family, golden) in configs {
        let job = format!("[model]\nname = {family:?}\n{}", as_model_args(&golden));
        let args = config::parse("golden", &job).unwrap().config.model.args;
        // What the golden config leaves out must stay, and what it sets to null must go.
        let base = DecoderArgs { every_n_layers_nope: Some(3), n_kv_heads: Some(1), ..DecoderArgs::default() };
        let applied = serde_json::to_value(args.apply(&base).unwrap()).unwrap();
        let mut expected = serde_json::to_value(&base).unwrap();
        if golden.get("moe_args").is_some() {
            expected["moe_args"] = serde_json::to_value(MoeArgs::default()).unwrap();
        }
        for (key, value) in golden.as_object().unwrap() {
            match (expected[key].as_object_mut(), value.as_object()) {
                (Some(expected), Some(value)) => expected.extend(value.clone()),
                _ => expected[key] = value.clone(),
            }
        }
        assert_eq!(with_numbers_as_floats(applied), with_numbers_as_floats(expected), "{family}");
    }
}

/// Numbers as floats: a golden config may write 32 where an argument is 32.0.
fn with_numbers_as_floats(json: Json) -> Json {
    match json {
        Json::Number(number) => number.as_f64().into(),
        Json::Object(table) => table.into_iter().map(|(key, value)| (key, with_numbers_as_floats(value))).collect(),
        other => other,
    }
}

#[test]
fn nested_model_args_start_from_the_flavors_or_from_defaults() {
    let args = |flags| load("", flags).unwrap().config.model.args;
    let dense = DecoderArgs::default();
    let sparse = DecoderArgs {
        moe_args: Some(MoeArgs { top_k: 2, load_balance_coeff: None, ..MoeArgs::default() }),
        ..DecoderArgs::default()
    };
    let sixteen = args("--model.args.moe_args.num_experts=16");
    assert_eq!(ModelArgs::all(&sparse).apply(&DecoderArgs::default()).unwrap(), sparse);
    assert_eq!(sixteen.apply(&dense).unwrap().moe_args, Some(MoeArgs { num_experts: 16, ..MoeArgs::default() }));
    let kept = MoeArgs { num_experts: 16, ..sparse.moe_args.clone().unwrap() };
    assert_eq!(sixteen.apply(&sparse).unwrap().moe_args, Some(kept));
    assert_eq!(args("--model.args.moe_args none").apply(&sparse).unwrap(), dense);
    assert!(args("--model.args.vocab_size 99").sets("vocab_size") && !sixteen.sets("vocab_size"));
}

#[test]
fn model_args_that_contradict_each_other_are_refused_at_their_line() {
    let refusal = |job: &str| {
        let error = load(job, "").err().unwrap().to_string();
        let lines = error.lines().filter(|line| line.starts_with("error") || line.contains("-->"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let all = refusal("[model.args]\nn_heads = 30\nn_kv_heads = 4\nmoe_args.top_k = 9");
    assert_eq!(all.len(), 6, "{all:?}");
    assert!(all[0].contains("`dim` 256 does not divide into 30 heads") && all[1].ends_with("job.toml:2:11"), "{all:?}");
    assert!(all[2].contains("30 query heads cannot share 4") && all[3].ends_with("job.toml:3:14"), "{all:?}");
    assert!(all[4].contains("9 of 8 experts") && all[5].ends_with("job.toml:4:18"), "{all:?}");
    let odd = refusal("[model.args]\ndim = 36\nn_heads = 4");
    assert!(odd[0].contains("heads of 9 numbers"), "{odd:?}");
}

#[test]
fn document_masks_without_their_attention_are_noticed() {
    let loaded = load("[model.args]\nattn_mask_type = \"block_causal\"", "").unwrap();
    assert!(loaded.notices[0].contains("`model.args.attn_mask_type`"), "{:?}", loaded.notices);
}

proptest! {
    #[test]
    fn random_text_never_panics(text in "\\PC*|(\\[|\\]|=|\"|\n|\r|\t|[a-z_.0-9]{1,6}){0,60}") {
        let _ = config::parse("random", &text);
    }

    #[test]
    fn mutated_job_files_never_panic(start in 0.0..1.0f64, length in 0usize..40, with in "[\\[\\]=\"'#\\\\\n{},.é\u{0}a-z0-9 -]{0,8}") {
        let mut text = include_str!("config/colab_a100.toml").to_owned();
        let start = (start * text.len() as f64) as usize;
        text.replace_range(start..(start + length).min(text.len()), &with);
        let _ = config::parse("mutated", &text);
    }

    #[test]
    fn random_values_of_every_key_never_panic(key in 0usize..150, value in "-?[0-9]{1,20}|[a-z\"\\[\\],.{}=-]{0,6}|none|inf|nan|-1") {
        let keys: Vec<_> = sorted(JobConfig::default().to_toml().parse().unwrap()).into_keys().collect();
        let flag = format!("--{}={value}", keys[key % keys.len()]);
        let (_, overrides) = config::split_overrides(["titan".into(), flag.into()]);
        let loaded = config::load(None, &overrides);
        if let Ok(loaded) = loaded {
            prop_assert_eq!(config::parse("again", &loaded.config.to_toml()).unwrap().config, loaded.config);
        }
    }

    #[test]
    fn random_model_args_never_panic(dim in 1u64.., n_heads in 1u64.., n_kv_heads in 1u64.., top_k in 1u64..) {
        let flags = format!("--model.args.dim={dim} --model.args.n_heads={n_heads} --model.args.n_kv_heads={n_kv_heads} --model.args.moe_args.top_k={top_k}");
        let _ = load("", &flags);
    }
}
