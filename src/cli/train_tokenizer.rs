use std::path::PathBuf;

use crate::data::DatasetSpec;
use crate::data::datasets::{self, Content, Position, Stop};
use crate::data::tokenizer::train;
use crate::{Error, Result};

/// Train a byte-level BPE tokenizer on your own text.
#[derive(clap::Args)]
pub struct Args {
    /// Files, folders or globs: JSON lines and parquet by their ending, else plain text; each may be packed (.gz, .zst).
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,

    /// Number of ids, the two special tokens and the 256 bytes included.
    #[arg(long, alias = "vocab_size", default_value_t = 2048)]
    vocab_size: usize,

    /// Folder for tokenizer.json and tokenizer_config.json.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// The field of a JSON line, or the column, that holds the text.
    #[arg(long, alias = "text_field", default_value = "text")]
    text_field: String,
}

/// How much text is encoded to measure bytes per token.
const SAMPLE_BYTES: usize = 4 << 20;

pub fn run(args: Args) -> Result<()> {
    let mut texts: Box<dyn Iterator<Item = Result<String>> + Send> = Box::new(std::iter::empty());
    for path in &args.paths {
        texts = Box::new(texts.chain(read(path, &args.text_field)?));
    }
    let mut sample = Vec::new();
    let mut sample_bytes = 0;
    let texts = texts.inspect(|text| {
        if let Ok(text) = text
            && sample_bytes < SAMPLE_BYTES
        {
            sample_bytes += text.len();
            sample.push(text.clone());
        }
    });
    let tokenizer = train::train(texts, args.vocab_size)?;

    let mut n_tokens = 0;
    for text in &sample {
        n_tokens += tokenizer.encode(text, false, false)?.len();
    }
    if n_tokens == 0 {
        return Err(Error::Data(format!("no text in {}", args.paths.join(", "))));
    }
    train::save(&tokenizer, &args.output)?;
    say!(
        "{}: vocabulary of {}, {:.2} bytes per token",
        args.output.display(),
        tokenizer.vocab_size(),
        sample_bytes as f64 / n_tokens as f64
    );
    if tokenizer.vocab_size() < args.vocab_size {
        let vocab_size = args.vocab_size;
        say!("the text has too few different pairs for a vocabulary of {vocab_size}");
    }
    Ok(())
}

/// The texts at `path`, in order.
fn read(path: &str, text_field: &str) -> Result<impl Iterator<Item = Result<String>> + Send + use<>> {
    let unpacked = path.trim_end_matches(".gz").trim_end_matches(".zst");
    let format = match unpacked.rsplit_once('.').map(|(_, ending)| ending) {
        Some("json" | "jsonl" | "ndjson") => "json",
        Some("parquet") => "parquet",
        _ => "text",
    };
    let spec = DatasetSpec {
        dataset: format.into(),
        dataset_path: Some(path.into()),
        text_field: text_field.into(),
        ..DatasetSpec::default()
    };
    let dataset = datasets::open(&spec, None, 1, &|_| unreachable!("files are not on the hub"))?;
    let documents = dataset.pass(Position::default(), None, &Stop::default());
    Ok(documents.filter_map(|document| match document.map(|document| document.content) {
        Ok(Content::Text(record)) => Some(Ok(record.text)),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    }))
}
