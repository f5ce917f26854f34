//! Rules that no single key can break: values that exclude each other, and capabilities that a value would need.

use std::path::{Path, PathBuf};

use super::JobConfig;
use super::activation_checkpoint::AcMode;
use super::diagnostic::{Fault, nearest};
use super::model::FLOAT8_CONVERTERS;
use super::schema::{GROUPED, MX};
use crate::data::datasets::NAMES as DATASETS;
use crate::models::args::DecoderArgs;
use crate::models::{self, Clash};

/// Families that TorchTitan has and titan does not have yet.
const FAMILIES_TO_COME: [&str; 1] = ["flux"];

/// Datasets that are nowhere until `dataset_path` says where.
const DATASETS_OF_FILES: [&str; 6] = ["text", "json", "parquet", "tokens", "chat", "instruct"];

/// The faults of a job whose values are all right one by one.
pub(super) fn job(config: &JobConfig) -> Vec<Fault> {
    let mut faults = Vec::new();
    faults.extend(model_name(config));
    faults.extend(empty_paths(config));
    faults.extend(batch_size(config));
    faults.extend(dataset_name("training", &config.training.dataset));
    faults.extend(dataset_path("training", &config.training.dataset, config.training.dataset_path.is_some()));
    if config.validation.enable {
        faults.extend(dataset_name("validation", &config.validation.dataset));
        faults.extend(dataset_path("validation", &config.validation.dataset, config.validation.dataset_path.is_some()));
    }
    faults.extend(converters(config));
    faults.extend(lora(config));
    faults.extend(parallelism(config));
    faults.extend(activation_checkpoint(config));
    faults.extend(profiling(config));
    checkpoint(config, &mut faults);
    faults
}

fn model_name(config: &JobConfig) -> Option<Fault> {
    let meant =
        |word, names: &[&str]| nearest(word, names.iter().copied()).map(|name| format!("did you mean {name:?}?"));
    let (name, flavor) = (config.model.name.as_str(), config.model.flavor.as_str());

    let Some((_, flavors)) = models::FAMILIES.iter().find(|(family, _)| *family == models::family_name(name)) else {
        let names: Vec<_> = models::FAMILIES.iter().map(|(family, _)| *family).collect();
        let hint = if FAMILIES_TO_COME.contains(&name) {
            Some("titan does not have this family yet".to_owned())
        } else {
            meant(name, &names)
        };
        let fault = Fault::new(format!("`model.name` cannot be {name:?}"), &["model.name"]);
        return Some(fault.hint(hint).note(format!("allowed: {}", quoted(&names))));
    };
    (!flavors.contains(&flavor) && flavor != models::FLAVOR_OF_CONFIG_JSON).then(|| {
        Fault::new(format!("`model.flavor` cannot be {flavor:?}"), &["model.flavor", "model.name"])
            .hint(meant(flavor, flavors))
            .note(format!("flavors of {name}: {}", quoted(flavors)))
            .note("[model.args] makes any other size of the nearest flavor; \"hf\" takes that of a Hugging Face folder")
    })
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

/// Paths that must name something.
fn empty_paths(config: &JobConfig) -> impl Iterator<Item = Fault> {
    let text = |path: &Option<String>| path.as_ref().map(PathBuf::from);
    let paths = [
        ("job.save_config_file", config.job.save_config_file.clone()),
        ("model.hf_assets_path", Some(config.model.hf_assets_path.clone())),
        ("model.tokenizer_path", config.model.tokenizer_path.clone()),
        ("training.dataset_path", text(&config.training.dataset_path)),
        ("validation.dataset_path", text(&config.validation.dataset_path)),
        ("checkpoint.initial_load_path", config.checkpoint.initial_load_path.clone()),
    ];
    let empty = paths.into_iter().filter(|(_, path)| path.as_ref().is_some_and(|path| path.as_os_str().is_empty()));
    empty.map(|(key, _)| Fault::new(format!("`{key}` cannot be empty"), &[key]).note("name a path"))
}

fn batch_size(config: &JobConfig) -> Option<Fault> {
    let (local, global) = (config.training.local_batch_size, config.training.global_batch_size?);
    let below = global / local * local;
    (below != global).then(|| {
        let nearest = match below {
            0 => local.to_string(),
            _ => format!("{below}, {}", below.saturating_add(local)),
        };
        Fault::new(
            format!("`training.global_batch_size` {global} does not divide into equal batches"),
            &["training.global_batch_size", "training.local_batch_size"],
        )
        .note(format!("must be a multiple of `training.local_batch_size` = {local}; nearest: {nearest}"))
    })
}

fn dataset_name(section: &str, dataset: &str) -> Option<Fault> {
    let key = format!("{section}.dataset");
    (!dataset.contains('/') && !DATASETS.contains(&dataset)).then(|| {
        let fault = Fault::new(format!("`{key}` cannot be {dataset:?}"), &[&key])
            .hint(nearest(dataset, DATASETS.iter().copied()).map(|name| format!("did you mean {name:?}?")))
            .note(format!("allowed: {}, and `user/name` of the Hugging Face hub", quoted(&DATASETS)));
        match Path::new(dataset).exists() {
            true => fault.note(format!("a path belongs into `{section}.dataset_path`; this says what it holds")),
            false => fault,
        }
    })
}

fn dataset_path(section: &str, dataset: &str, has_path: bool) -> Option<Fault> {
    (DATASETS_OF_FILES.contains(&dataset) && !has_path).then(|| {
        Fault::new(
            format!("`{section}.dataset` {dataset:?} needs `{section}.dataset_path`"),
            &[&format!("{section}.dataset"), &format!("{section}.dataset_path")],
        )
        .note("a file, a folder or a glob, such as \"data/*.txt\"")
    })
}

/// Converters that are not there, yet or at all.
fn converters(config: &JobConfig) -> impl Iterator<Item = Fault> {
    let key = "model.converters";
    let unknown = config.model.converters.iter().filter(|name| !FLOAT8_CONVERTERS.contains(&name.as_str()));
    unknown.map(move |name| {
        let hint = match name.as_str() {
            "quantize.linear.mx" | "mx" => Some(MX.to_owned()),
            "quantize.grouped_mm.float8" | "quantize.grouped_mm.mx" => Some(GROUPED.to_owned()),
            _ => nearest(name, FLOAT8_CONVERTERS).map(|name| format!("did you mean {name:?}?")),
        };
        let fault = Fault::new(format!("`{key}` cannot have {name:?}"), &[key]).hint(hint);
        fault.note(format!("allowed: {}", quoted(&FLOAT8_CONVERTERS)))
    })
}

/// Adapters are of no use without the weights that they adapt.
fn lora(config: &JobConfig) -> Option<Fault> {
    let keys = &config.checkpoint;
    let has_base = keys.enable && (keys.initial_load_path.is_some() || keys.initial_load_in_hf);
    (config.model.lora.rank.is_some() && !(has_base && keys.initial_load_model_only)).then(|| {
        Fault::new(
            "`model.lora.rank` needs weights to adapt",
            &[
                "model.lora.rank",
                "checkpoint.enable",
                "checkpoint.initial_load_path",
                "checkpoint.initial_load_model_only",
            ],
        )
        .note(
            "in [checkpoint], set `enable = true`, and `initial_load_path` to a step of another run, or \
             `initial_load_in_hf = true` for Hugging Face weights",
        )
    })
}

fn parallelism(config: &JobConfig) -> Option<Fault> {
    let degree = config.parallelism.data_parallel_shard_degree.filter(|&degree| degree > 1)?;
    let key = "parallelism.data_parallel_shard_degree";
    let fault = Fault::new(format!("`{key}` cannot be {degree}"), &[key]);
    Some(fault.hint("titan trains on one device so far".to_owned()).note("leave it at -1, or set it to 1"))
}

fn activation_checkpoint(config: &JobConfig) -> Option<Fault> {
    let section = &config.activation_checkpoint;
    if section.mode == AcMode::MemoryBudget {
        return Some(
            Fault::new("`activation_checkpoint.mode` cannot be \"memory_budget\"", &["activation_checkpoint.mode"])
                .hint("titan does not plan by a memory budget yet".to_owned())
                .note("allowed: \"selective\", \"full\", \"none\""),
        );
    }
    let option = &section.selective_ac_option;
    (option != "op" && section.selective_every().is_none_or(|n| n == 0)).then(|| {
        let key = "activation_checkpoint.selective_ac_option";
        Fault::new(format!("`{key}` cannot be {option:?}"), &[key])
            .note("allowed: \"op\", or the distance of recomputed layers in quotes, such as \"2\"")
    })
}

fn profiling(config: &JobConfig) -> Option<Fault> {
    let (freq, active) = (config.profiling.profile_freq, config.profiling.profiler_active);
    (active > freq).then(|| {
        Fault::new(
            format!("`profiling.profiler_active` {active} is more than `profiling.profile_freq` {freq}"),
            &["profiling.profiler_active", "profiling.profile_freq"],
        )
        .note("a trace covers the last `profiler_active` of every `profile_freq` steps")
    })
}

fn checkpoint(config: &JobConfig, faults: &mut Vec<Fault>) {
    let checkpoint = &config.checkpoint;
    if checkpoint.keep_latest_k == 1 {
        faults.push(
            Fault::new("`checkpoint.keep_latest_k` cannot be 1", &["checkpoint.keep_latest_k"])
                .note("a fault while the next one is saved would leave none; allowed: 0 (keep all), 2 and more"),
        );
    }
    if checkpoint.last_save_in_hf && !checkpoint.last_save_model_only {
        faults.push(
            Fault::new(
                "`checkpoint.last_save_in_hf` needs `checkpoint.last_save_model_only`",
                &["checkpoint.last_save_in_hf", "checkpoint.last_save_model_only"],
            )
            .note(
                "Hugging Face's format holds weights alone; the resumable checkpoint of the last step stays beside it",
            ),
        );
    }
    if checkpoint.initial_load_in_hf && !checkpoint.initial_load_model_only {
        faults.push(
            Fault::new(
                "`checkpoint.initial_load_in_hf` needs `checkpoint.initial_load_model_only`",
                &["checkpoint.initial_load_in_hf", "checkpoint.initial_load_model_only"],
            )
            .note("Hugging Face's format holds weights alone"),
        );
    }
    if checkpoint.create_seed_checkpoint && !checkpoint.enable {
        faults.push(
            Fault::new(
                "`checkpoint.create_seed_checkpoint` needs `checkpoint.enable`",
                &["checkpoint.create_seed_checkpoint", "checkpoint.enable"],
            )
            .note("add `enable = true` to [checkpoint]"),
        );
    }
    if checkpoint.create_seed_checkpoint && checkpoint.load_only {
        faults.push(Fault::new(
            "`checkpoint.create_seed_checkpoint` writes a checkpoint, and `checkpoint.load_only` forbids it",
            &["checkpoint.create_seed_checkpoint", "checkpoint.load_only"],
        ));
    }
}

/// The faults of a model's arguments.
pub(super) fn decoder(args: &DecoderArgs) -> Vec<Fault> {
    let fault = |clash: Clash| {
        let keys: Vec<String> = clash.keys.iter().map(|key| format!("model.args.{key}")).collect();
        Fault::new(clash.what, &keys.iter().map(String::as_str).collect::<Vec<_>>()).note(clash.remedy)
    };
    args.clashes().into_iter().map(fault).collect()
}
