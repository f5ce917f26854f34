use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use crate::data::datasets::{self, Dtype, Sidecar};
use crate::data::loader::default_workers;
use crate::data::pipeline::Plan;
use crate::data::shards::{Counts, ShardWriter, tokenize};
use crate::data::tokenizer::Tokenizer;
use crate::data::{DatasetSpec, Encode, hub};
use crate::{Error, Result};

/// Write text as token shards, so that training need not tokenize.
///
/// They hold every document with BOS before and EOS behind it, one after another: training on them with
/// `dataset = "tokens"` sees what training on the text would.
#[derive(clap::Args)]
pub struct Args {
    /// What to read: text, json, parquet, c4, c4_test, c4_validation, or `user/name` of the hub.
    #[arg(long, default_value = "c4_test")]
    dataset: String,

    /// A file, a folder or a glob.
    #[arg(long)]
    dataset_path: Option<String>,

    /// Field or column that holds the text.
    #[arg(long, default_value = "text")]
    text_field: String,

    /// How many malformed records may be skipped.
    #[arg(long, default_value_t = 0)]
    max_bad_records: usize,

    /// Folder of the tokenizer.
    #[arg(long, value_name = "DIR")]
    tokenizer: PathBuf,

    /// Folder for the shards.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// About how many tokens a shard holds.
    #[arg(long, default_value_t = 100_000_000)]
    shard_tokens: u64,

    /// How a token id is stored. Default: u16 where it can hold the vocabulary.
    #[arg(long)]
    dtype: Option<Dtype>,

    /// Threads that tokenize. Default: one for each core but one.
    #[arg(long)]
    num_workers: Option<usize>,
}

pub fn run(args: Args) -> Result<()> {
    if args.dataset == "tokens" {
        return Err(Error::Usage("the dataset `tokens` is tokenized already".to_owned()));
    }
    if ["chat", "instruct"].contains(&args.dataset.as_str()) {
        return Err(Error::Usage(format!(
            "shards cannot hold the dataset `{}`: they do not say which tokens are learned; train on it as it is",
            args.dataset
        )));
    }
    let tokenizer = Tokenizer::from_dir(&args.tokenizer)?;
    let spec = DatasetSpec {
        dataset: args.dataset,
        dataset_path: args.dataset_path,
        text_field: args.text_field,
        max_bad_records: args.max_bad_records,
        ..DatasetSpec::default()
    };
    let dataset = datasets::open(&spec, None, 1, &hub::open_dataset)?;
    let sidecar = Sidecar { vocab_size: tokenizer.vocab_size(), eos_id: tokenizer.eos_id(), dtype: args.dtype };
    let name = spec.dataset.replace('/', "_");
    let writer = ShardWriter::new(&args.output, &name, sidecar, args.shard_tokens)?;
    let n_workers = args.num_workers.unwrap_or_else(default_workers);
    let encoder: Arc<dyn Encode> = Arc::new(tokenizer);
    let plan = Plan { dataset, encoder: Some(encoder), shuffle: None, repeat: false, n_workers };

    // How much a hub dataset will be is not known.
    let files = plan.dataset.files();
    let style = "[{bar:24}] {percent}%  {msg}  {eta} left";
    let bar = match files.bytes() {
        Some(bytes) => ProgressBar::new(bytes)
            .with_style(ProgressStyle::with_template(style).expect("the template is well-formed")),
        None => ProgressBar::new_spinner(),
    };
    bar.enable_steady_tick(Duration::from_millis(200));
    let start = Instant::now();
    let describe = |counts: &Counts| {
        let rate = counts.text_bytes as f64 / 1e6 / start.elapsed().as_secs_f64();
        format!("{} documents, {} tokens, {rate:.1} MB/s", HumanCount(counts.documents), HumanCount(counts.tokens))
    };
    let mut n = 0;
    let counts = tokenize(&plan, writer, |counts, position| {
        n += 1;
        if n % 64 == 0 {
            bar.set_message(describe(counts));
            bar.set_position(files.bytes_before(position));
        }
    });
    bar.finish_and_clear();
    let counts = counts?;
    let plural = if counts.shards == 1 { "" } else { "s" };
    say!("{}, {} shard{plural} in {}", describe(&counts), counts.shards, args.output.display());
    Ok(())
}
