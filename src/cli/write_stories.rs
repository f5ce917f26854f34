use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::data::stories;
use crate::tools::files::NewFile;
use crate::{Error, Result};

/// Write simple English stories, the text that titan ships.
#[derive(clap::Args)]
pub struct Args {
    /// JSON lines with a field `text`; packed where the name ends in .gz or .zst.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// How many stories.
    #[arg(long, default_value_t = 1000)]
    count: u64,

    /// Another seed, other stories.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub fn run(args: Args) -> Result<()> {
    write(&args).map_err(Error::io("cannot write stories", &args.output))?;
    say!("{}: {} stories", args.output.display(), args.count);
    Ok(())
}

fn write(args: &Args) -> io::Result<()> {
    let mut out = Output::create(&args.output)?;
    for index in 0..args.count {
        writeln!(out, "{}", json!({ "text": stories::document(args.seed, index) }))?;
    }
    out.finish()
}

/// A file that may be packed, as small as it gets.
enum Output {
    Plain(BufWriter<NewFile>),
    Gzip(flate2::write::GzEncoder<NewFile>),
    Zstd(zstd::Encoder<'static, NewFile>),
}

impl Output {
    fn create(path: &Path) -> io::Result<Self> {
        let file = NewFile::create(path)?;
        Ok(match path.extension().and_then(|e| e.to_str()) {
            Some("gz") => Self::Gzip(flate2::write::GzEncoder::new(file, flate2::Compression::best())),
            Some("zst") => Self::Zstd(zstd::Encoder::new(file, 19)?),
            _ => Self::Plain(BufWriter::new(file)),
        })
    }

    fn finish(self) -> io::Result<()> {
        let file = match self {
            Self::Plain(out) => out.into_inner()?,
            Self::Gzip(out) => out.finish()?,
            Self::Zstd(out) => out.finish()?,
        };
        file.keep()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(bytes),
            Self::Gzip(out) => out.write(bytes),
            Self::Zstd(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.flush(),
            Self::Gzip(out) => out.flush(),
            Self::Zstd(out) => out.flush(),
        }
    }
}
