use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use crate::autograd::{Precision, StageBuilder};
use crate::components::metrics::grouped;
use crate::config::{self, ModelArgs, Training};
use crate::engine::Stages;
use crate::models::args::DecoderArgs;
use crate::models::layer::Span;
use crate::models::{self, Decoder, hf};
use crate::tools::device::GIB;
use crate::trainer;
use crate::{Error, Result};

/// List the models that titan knows, or show how one is built.
///
/// `titan models` lists all, `titan models llama3` a family, `titan models llama3/8B` shows the layers of one with the shape
/// of each weight, and `titan models configs/own_architecture.toml` the model that a job file states. Nothing is allocated,
/// so that the largest shows as fast as the smallest.
#[derive(clap::Args)]
pub struct Args {
    /// A family, a model as FAMILY/FLAVOR, or a job config, a TOML file.
    #[arg(value_name = "MODEL")]
    model: Option<String>,
    /// Tokens per sequence: attention costs more in longer ones [default: 2048, or the job's training.seq_len].
    #[arg(long, alias = "seq_len", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    seq_len: Option<u32>,
}

/// Where neither a job nor the command line says it.
const SEQ_LEN: usize = 2048;

pub fn run(args: Args) -> Result<()> {
    let asked = args.seq_len.map(|n| n as usize);
    let seq_len = asked.unwrap_or(SEQ_LEN);
    let job = args
        .model
        .as_deref()
        .map(Path::new)
        .filter(|path| path.is_file() || path.extension().is_some_and(|it| it == "toml"));
    if let Some(path) = job {
        return super::print(structure_of_job(path, asked)?);
    }
    let text = match args.model.as_deref().map(|model| model.split_once('/').unwrap_or((model, ""))) {
        None => list(models::FAMILIES.iter().copied(), seq_len)?,
        Some((family, flavor)) => {
            let families: Vec<&str> = models::FAMILIES.iter().map(|(name, _)| *name).collect();
            let known = models::FAMILIES.iter().find(|(name, _)| *name == models::family_name(family));
            let (_, flavors) = known.ok_or_else(|| unknown("family", family, &families))?;
            match flavor {
                "" => list(std::iter::once((family, *flavors)), seq_len)?,
                _ => {
                    let args = models::flavor(family, flavor).ok_or_else(|| unknown("flavor", flavor, flavors))?;
                    structure(
                        &format!("{family}/{flavor}"),
                        &describe(&args)?,
                        precision(&Training::default()),
                        seq_len,
                    )?
                }
            }
        }
    };
    super::print(text)
}

/// The model of a job as it is trained: with its vocabulary, its adapters and its number types.
fn structure_of_job(path: &Path, seq_len: Option<usize>) -> Result<String> {
    let job = config::load(Some(path), &[])?.config;
    let mut model = describe(&trainer::model_args(&job)?)?;
    model.adapt(&job.model.lora, 0)?;
    let name = format!("{} ({}/{})", path.display(), job.model.name, job.model.flavor);
    structure(&name, &model, precision(&job.training), seq_len.unwrap_or(job.training.seq_len))
}

fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    Error::Usage(format!("there is no {what} {name:?}\n  = there are: {}", known.join(", ")))
}

/// A model, described but not allocated. That needs no tokenizer, so any end of text will do.
fn describe(args: &DecoderArgs) -> Result<Decoder> {
    Decoder::new(args, Some(0))
}

fn list<'a>(families: impl Iterator<Item = (&'a str, &'a [&'a str])>, seq_len: usize) -> Result<String> {
    let precision = precision(&Training::default());
    let mut text = String::new();
    for (family, flavors) in families {
        let heads = ["parameters", "active", "FLOP/token", "to train"];
        let _ = writeln!(text, "{family:<26}{:>12}{:>12}{:>12}{:>14}", heads[0], heads[1], heads[2], heads[3]);
        for flavor in flavors {
            let args = models::flavor(family, flavor).expect("families list their own flavors");
            let model = describe(&args)?;
            let _ = writeln!(
                text,
                "  {flavor:<24}{:>12}{:>12}{:>12}{:>14}",
                parameters(model.n_params()),
                parameters(model.n_active_params()),
                flops(model.flops_per_token(seq_len)),
                training_memory(&model, precision)
            );
        }
        text += "\n";
    }
    let _ = writeln!(
        text,
        "active: parameters that a token meets. FLOP/token: to train on one, in sequences of {seq_len} (--seq-len).\n{}\n\
         `titan models FAMILY/FLAVOR` shows the layers of one.",
        what_is_counted(precision)
    );
    Ok(text)
}

fn structure(name: &str, model: &Decoder, precision: Precision, seq_len: usize) -> Result<String> {
    let args = model.args();
    let mut text = format!(
        "{name}: {} parameters, {} of which a token meets; {}FLOP to train on a token in sequences of {seq_len}; {} to \
         train\n\n",
        grouped(model.n_params() as f64, 0),
        grouped(model.n_active_params() as f64, 0),
        flops(model.flops_per_token(seq_len)),
        training_memory(model, precision)
    );
    if model.adapters().is_some() {
        let trained: usize = model.trained_parameters().map(|parameter| parameter.numel()).sum();
        let _ = writeln!(text, "{} parameters more in adapters, which alone are trained\n", grouped(trained as f64, 0));
    }
    text += "[model.args]\n";
    let (tables, values): (Vec<_>, Vec<_>) =
        ModelArgs::all(args).0.into_iter().partition(|(_, value)| value.is_table());
    for (key, value) in values.into_iter().chain(tables) {
        let _ = writeln!(text, "{key} = {value}");
    }
    text += "\n";

    let stages = model.stages();
    let [first, blocks @ .., head] = stages else { unreachable!("a model has an embedding and a head") };
    text += &stage_lines(first.name(), first);
    // Layers alike, in the order of the first of each kind.
    let mut kinds: Vec<(Vec<usize>, &StageBuilder)> = Vec::new();
    let mut places = BTreeMap::new();
    for (layer, block) in blocks.iter().enumerate() {
        let place = *places.entry((weights_of(block), manner(args, layer))).or_insert(kinds.len());
        match kinds.get_mut(place) {
            Some((layers, _)) => layers.push(layer),
            None => kinds.push((vec![layer], block)),
        }
    }
    for (layers, block) in kinds {
        let times = if layers.len() == 1 { String::new() } else { format!(" ({} alike)", layers.len()) };
        text += &stage_lines(&format!("layers {}{times}{}", ranges(&layers), manner(args, layers[0])), block);
    }
    text += &stage_lines(head.name(), head);
    let _ = writeln!(text, "{}", what_is_counted(precision));
    Ok(text)
}

/// The name of each weight within its layer, and its shape.
fn weights_of(stage: &StageBuilder) -> Vec<(String, Vec<usize>)> {
    let prefix = format!("{}.", stage.name());
    let name = |fqn: &str| fqn.strip_prefix(&prefix).unwrap_or(fqn).to_owned();
    stage.parameters().iter().map(|p| (name(p.fqn()), p.shape().to_vec())).collect()
}

/// What sets the attention of a layer apart.
fn manner(args: &DecoderArgs, layer: usize) -> String {
    let layer = args.layer(layer);
    let span = match layer.span {
        Span::Full => String::new(),
        Span::Sliding(size) => format!(", {size} positions back"),
        Span::Chunked(size) => format!(", in chunks of {size}"),
    };
    span + if layer.rope.is_some() { "" } else { ", without rotary positions" }
}

fn stage_lines(title: &str, stage: &StageBuilder) -> String {
    let mut text = format!("{title:<62}{:>16}\n", grouped(stage.numel() as f64, 0));
    for (name, shape) in weights_of(stage) {
        let numel: usize = shape.iter().product();
        let _ = writeln!(text, "  {name:<36}{:<24}{:>16}", format!("{shape:?}"), grouped(numel as f64, 0));
    }
    text + "\n"
}

/// `0, 2-4, 6`: of a few numbers that do not follow one another each, of many the first, second and last.
fn ranges(layers: &[usize]) -> String {
    let runs: Vec<String> = layers
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| if run.len() == 1 { run[0].to_string() } else { format!("{}-{}", run[0], run[run.len() - 1]) })
        .collect();
    match &runs[..] {
        [first, second, .., last] if runs.len() > 8 => format!("{first}, {second}, ..., {last}"),
        _ => runs.join(", "),
    }
}

fn precision(training: &Training) -> Precision {
    Precision { storage: training.dtype.into(), compute: training.mixed_precision_param.into() }
}

fn training_memory(model: &Decoder, precision: Precision) -> String {
    let gib = model.training_bytes(precision) / GIB;
    format!("{} GiB", grouped(gib, if gib < 10.0 { 2 } else { 0 }))
}

fn what_is_counted(precision: Precision) -> String {
    let Precision { storage, compute } = precision;
    let copy = match storage == compute {
        true => String::new(),
        false => format!(
            ", and the {} copy that is\ncomputed with (an embedding that is not the output layer too has none)",
            hf::dtype_name(compute)
        ),
    };
    format!(
        "to train: {} bytes per parameter, for weights and optimizer state in {}, gradients in float32{copy}; {} where it is \
         frozen.\nActivations come on top, by batch and sequence.",
        precision.training_bytes(),
        hf::dtype_name(storage),
        precision.frozen_bytes()
    )
}

/// 8030261248 as `8.03 B`.
fn parameters(number: usize) -> String {
    short(number as f64, ["", " k", " M", " B", " T"])
}

fn flops(number: u64) -> String {
    short(number as f64, ["", " k", " M", " G", " T"])
}

/// With three digits or four, and a unit for the power of a thousand.
fn short(number: f64, units: [&str; 5]) -> String {
    let power = ((number.max(1.0).log10() / 3.0) as usize).min(4);
    let value = number / 1000f64.powi(power as i32);
    format!("{value:.*}{}", if value < 100.0 { 2 } else { 1 }, units[power])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_named_shortly() {
        assert_eq!(ranges(&[0]), "0");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        assert_eq!(ranges(&(0..24).map(|i| 2 * i).collect::<Vec<_>>()), "0, 2, ..., 46");
    }

    #[test]
    fn every_model_can_be_listed_and_shown() -> Result<()> {
        for (family, flavors) in models::FAMILIES {
            let text = list(std::iter::once((*family, *flavors)), 2048)?;
            for flavor in *flavors {
                assert!(text.contains(&format!("  {flavor} ")), "{text}");
                let args = models::flavor(family, flavor).expect("a known flavor");
                let model = describe(&args)?;
                let shown = structure(flavor, &model, precision(&Training::default()), 2048)?;
                // What is shown adds up to the model: each kind of layer, as often as it is there.
                let mut sum = 0;
                for line in shown.lines().skip_while(|line| !line.starts_with("tok_embeddings")) {
                    let number = |text: &str| text.replace(',', "").parse::<usize>().ok();
                    if let (Some(n), false) = (line.split_whitespace().last().and_then(number), line.starts_with("  "))
                    {
                        let alike = line.split_once('(').and_then(|(_, rest)| number(rest.split_once(" alike")?.0));
                        sum += n * alike.unwrap_or(1);
                    }
                }
                assert_eq!(sum, model.n_params(), "{shown}");
            }
        }
        Ok(())
    }
}
