use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::data::tokenizer::train;
use crate::{Error, Result};

/// Train a byte-level BPE tokenizer on your own text.
#[derive(clap::Args)]
pub struct Args {
    /// Files or globs: plain text, or JSON lines where the name ends in .json or .jsonl; each may also be .gz or .zst.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<String>,

    /// Number of ids, the two special tokens and the 256 bytes included.
    #[arg(long, alias = "vocab_size", default_value_t = 2048)]
    vocab_size: usize,

    /// Folder for tokenizer.json and tokenizer_config.json.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// The field of a JSON line that holds its text.
    #[arg(long, alias = "text_field", default_value = "text")]
    text_field: String,
}

/// How much text is encoded to measure bytes per token.
const SAMPLE_BYTES: usize = 4 << 20;

/// Plain text is fed in pieces of about this size, each ending with a line.
const PIECE_BYTES: usize = 64 << 10;

pub fn run(args: Args) -> Result<()> {
    let paths = expand(&args.files)?;
    let mut sample = Vec::new();
    let mut sample_bytes = 0;
    let texts = paths.iter().flat_map(|path| Texts::open(path, &args.text_field)).inspect(|text| {
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
        return Err(Error::Data(format!("no text in {}", args.files.join(", "))));
    }
    train::save(&tokenizer, &args.output)?;
    println!(
        "{}: vocabulary of {}, {:.2} bytes per token",
        args.output.display(),
        tokenizer.vocab_size(),
        sample_bytes as f64 / n_tokens as f64
    );
    if tokenizer.vocab_size() < args.vocab_size {
        println!("the text has too few different pairs for a vocabulary of {}", args.vocab_size);
    }
    Ok(())
}

/// The files that `patterns` name, in order.
fn expand(patterns: &[String]) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for pattern in patterns {
        let found = paths.len();
        if Path::new(pattern).is_file() {
            paths.push(pattern.into());
            continue;
        }
        let matches = glob::glob(pattern).map_err(|e| Error::Usage(format!("`{pattern}` is no glob: {e}")))?;
        paths.extend(matches.flatten().filter(|path| path.is_file()));
        if paths.len() == found {
            return Err(Error::Usage(format!("no file matches `{pattern}`")));
        }
    }
    Ok(paths)
}

/// The texts of one file. After an error it ends.
struct Texts {
    path: PathBuf,
    /// The field to take, where the file holds JSON lines.
    json_field: Option<String>,
    reader: Box<dyn BufRead + Send>,
    line: usize,
    done: bool,
}

impl Texts {
    fn open(path: &Path, field: &str) -> impl Iterator<Item = Result<String>> + Send + use<> {
        let texts = Self::try_open(path, field).map_err(Error::io("cannot open", path));
        let (texts, fault) = match texts {
            Ok(texts) => (Some(texts), None),
            Err(fault) => (None, Some(Err(fault))),
        };
        fault.into_iter().chain(texts.into_iter().flatten())
    }

    fn try_open(path: &Path, field: &str) -> std::io::Result<Self> {
        let file = BufReader::with_capacity(256 << 10, File::open(path)?);
        let packed = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let (reader, inner): (Box<dyn Read + Send>, PathBuf) = match packed {
            // One .gz may hold several members, one after another.
            "gz" => (Box::new(flate2::bufread::MultiGzDecoder::new(file)), path.with_extension("")),
            "zst" => (Box::new(zstd::Decoder::with_buffer(file)?), path.with_extension("")),
            _ => (Box::new(file), path.to_owned()),
        };
        let is_json = inner.extension().is_some_and(|e| e == "json" || e == "jsonl");
        Ok(Self {
            path: path.to_owned(),
            json_field: is_json.then(|| field.to_owned()),
            reader: Box::new(BufReader::with_capacity(256 << 10, reader)),
            line: 0,
            done: false,
        })
    }

    /// The next record or piece; `None` at the end.
    fn read(&mut self) -> Result<Option<String>> {
        let min_bytes = if self.json_field.is_some() { 1 } else { PIECE_BYTES };
        let mut bytes = Vec::new();
        while bytes.len() < min_bytes {
            self.line += 1;
            let n = self.reader.read_until(b'\n', &mut bytes).map_err(Error::io("cannot read", &self.path))?;
            if n == 0 {
                break;
            }
            if self.json_field.is_some() && bytes.trim_ascii().is_empty() {
                bytes.clear();
            }
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        let bad = |what: String| Error::Data(format!("{}:{}: {what}", self.path.display(), self.line));
        match &self.json_field {
            None => String::from_utf8(bytes).map(Some).map_err(|e| bad(format!("not UTF-8: {e}"))),
            Some(field) => {
                let record: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
                let text = record.get(field).and_then(|text| text.as_str());
                text.map(|text| Some(text.to_owned())).ok_or_else(|| bad(format!("no text in field `{field}`")))
            }
        }
    }
}

impl Iterator for Texts {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let text = self.read().transpose();
        self.done = !matches!(text, Some(Ok(_)));
        text
    }
}
