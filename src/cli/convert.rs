use std::path::PathBuf;
use std::time::Duration;

use candle_core::DType;
use clap::builder::NonEmptyStringValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use tracing::warn;

use crate::components::checkpoint::{Export, HuggingFaceModel, Merged, Parameter, Parameters, SHARD_BYTES};
use crate::config::{self, ExportDtype, JobConfig, ModelArgs};
use crate::generate::Pretrained;
use crate::models::hf::Family;
use crate::models::{self, Decoder};
use crate::tools::logging;
use crate::{Error, Result};

/// Turn a Hugging Face checkpoint into one of titan's, or the other way round.
///
/// Tensors are converted piece by piece, so that a model larger than memory needs only disk space. What is written
/// appears under its name once it is whole.
///
/// A model of the hub, with `config.json`, tokenizer and safetensors, becomes a checkpoint that `titan generate
/// --checkpoint` takes, and that training starts from with `checkpoint.initial_load_path`:
///
///   titan convert --from-hf Qwen3-0.6B --to outputs/qwen3-0.6b
///
/// A checkpoint of titan's becomes a folder that `transformers` loads with `AutoModelForCausalLM.from_pretrained`:
///
///   titan convert --to-hf outputs/checkpoint/step-1000 --to my-model --dtype bfloat16
///
/// Of a checkpoint that holds adapters only, the model with its adapters merged.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// A folder of Hugging Face's, to be read.
    #[arg(long, alias = "from_hf", value_name = "DIR", required_unless_present = "to_hf")]
    from_hf: Option<PathBuf>,
    /// A checkpoint folder of titan's, to be read; `step-N` and `latest` are looked up in ./outputs/checkpoint.
    #[arg(long, alias = "to_hf", value_name = "CHECKPOINT", conflicts_with = "from_hf", value_parser = NonEmptyStringValueParser::new())]
    to_hf: Option<String>,
    /// The folder to write. It must not exist yet.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Number type of the weights that are written. Default: that of those that are read, bfloat16 for 8-bit ones.
    #[arg(long, value_enum, alias = "export_dtype")]
    dtype: Option<ExportDtype>,
    /// Weights are split into files of at most this size, such as 500MB or 5GB.
    #[arg(long, alias = "max_shard_size", value_name = "SIZE", default_value_t = Size(SHARD_BYTES))]
    max_shard_size: Size,
}

pub fn run(args: Args) -> Result<()> {
    if args.to.exists() {
        return Err(Error::Usage(format!("{} exists already\n   = name a folder that does not", args.to.display())));
    }
    let model = match (&args.from_hf, &args.to_hf) {
        (Some(path), _) => Pretrained::open_hugging_face(path)?,
        (None, Some(checkpoint)) => {
            let job = JobConfig::default();
            Pretrained::open(checkpoint, &job.job.dump_folder, &job.checkpoint.folder)?
        }
        (None, None) => unreachable!("clap requires one of them"),
    };
    // Documents are told apart in training only; any token will do to describe the model.
    let mut decoder = Decoder::new(&model.args, Some(0))?;
    let parameters: Box<dyn Parameters + '_> = match &model.adapters {
        None => Box::new(model.weights.fit(&decoder.base_shapes())?),
        Some((lora, base)) => {
            decoder.adapt(lora, 0)?;
            Box::new(Merged::new(&decoder, base, &model.weights)?)
        }
    };
    let shapes = decoder.base_shapes();
    let dtype: Option<DType> = args.dtype.map(Into::into);
    let bar = progress_bar(&shapes, dtype, &*parameters);
    let tokenizer = if model.tokenizer_files.is_empty() { None } else { Some(model.tokenizer()?) };
    if tokenizer.is_none() {
        warn!("{} holds no tokenizer: {} will have none either", model.path.display(), args.to.display());
    }
    let tokenizer_files: Vec<_> =
        model.tokenizer_files.iter().map(|file| (file.name.clone(), file.bytes.clone())).collect();
    let export = Export {
        shapes: &shapes,
        parameters: &*parameters,
        dtype,
        tokenizer_files: &tokenizer_files,
        max_shard_bytes: args.max_shard_size.0,
        progress: &|bytes| bar.inc(bytes),
    };
    let converted = if args.from_hf.is_some() {
        export.write(&args.to, 0, &job(&model).to_toml())
    } else {
        let model = HuggingFaceModel {
            family: Family::of(&model.name, &model.args)?,
            args: &model.args,
            dtype: dtype.unwrap_or(parameters.dtype("tok_embeddings.weight")),
            bos_id: tokenizer.as_ref().and_then(|tokenizer| tokenizer.bos_id()),
            eos_id: tokenizer.as_ref().and_then(|tokenizer| tokenizer.eos_id()),
        };
        export.write_hugging_face(&args.to, &model)
    };
    bar.finish_and_clear();
    converted?;
    say!("{}", args.to.display());
    Ok(())
}

/// The job that a converted model could have come from.
fn job(model: &Pretrained) -> JobConfig {
    let mut job = JobConfig::default();
    job.model.name = model.name.clone();
    job.model.flavor = models::FLAVOR_OF_CONFIG_JSON.to_owned();
    job.model.args = ModelArgs::all(&model.args);
    job.training.mixed_precision_param = match model.compute {
        DType::F32 => config::Dtype::Float32,
        _ => config::Dtype::Bfloat16,
    };
    job
}

fn progress_bar(shapes: &[Parameter], dtype: Option<DType>, parameters: &dyn Parameters) -> ProgressBar {
    let bytes = |(name, shape): &Parameter| {
        shape.iter().product::<usize>() * dtype.unwrap_or(parameters.dtype(name)).size_in_bytes()
    };
    let style = "[{bar:24}] {percent}%  {bytes} of {total_bytes}, {bytes_per_sec}  {eta} left";
    let bar = ProgressBar::new(shapes.iter().map(bytes).sum::<usize>() as u64)
        .with_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
    bar.enable_steady_tick(Duration::from_millis(200));
    logging::bars().add(bar)
}

/// Bytes, as a number with a unit of thousands.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Size(u64);

const UNITS: [(&str, u64); 4] = [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000)];

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.trim().to_uppercase();
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| Some((upper.strip_suffix(name)?, *unit)))
            .unwrap_or((upper.strip_suffix('B').unwrap_or(&upper), 1));
        let number: f64 =
            number.trim().parse().map_err(|_| "must be a number of bytes such as 500MB or 5GB".to_owned())?;
        let bytes = number * unit as f64;
        if (1.0..1e18).contains(&bytes) { Ok(Self(bytes as u64)) } else { Err("must be at least one byte".to_owned()) }
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match UNITS.iter().find(|(_, unit)| self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units_and_nothing_else() {
        for (text, bytes) in [("5GB", 5_000_000_000), ("500 mb", 500_000_000), ("1.5KB", 1500), ("12B", 12), ("7", 7)] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "GB", "0", "-1GB", "5 GiB", "nan", "inf"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!([SHARD_BYTES, 1500, 12].map(|bytes| Size(bytes).to_string()), ["5GB", "1500B", "12B"]);
    }
}
