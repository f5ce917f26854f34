//! The records of one file, whatever its format, from any place in it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use super::json::JsonLines;
use super::parquet::ParquetColumn;
use super::parquet_rows::ParquetRows;
use super::text::TextPieces;
use super::{Content, Format};
use crate::tools::panics::caught;
use crate::{Error, Result};

/// A longer record is malformed: whole in memory, it and its tokens could take all there is. Books have a tenth of it.
pub const MAX_RECORD_BYTES: usize = 32 << 20;

const BUFFER_BYTES: usize = 256 * 1024;

/// Which fields of a record make a document, and of what kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Fields {
    Text(String),
    Chat { messages: String },
    Instruct { prompt: String, completion: String },
}

/// A text, and whether a document begins and ends with it. All but the pieces of a plain text file do both.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub text: String,
    pub begins: bool,
    pub ends: bool,
}

impl Record {
    pub fn document(text: String) -> Self {
        Self { text, begins: true, ends: true }
    }
}

/// What a record holds, or what is wrong with it, opening with file and line; the records after it can still be read.
pub type Parsed = Result<Content, String>;

/// Where a record begins.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Place {
    /// Bytes of decompressed text before it; for parquet, rows.
    pub offset: u64,
    /// Lines or rows before it.
    pub line: u64,
}

/// Reads one file's records in order.
pub trait Records: Send {
    /// `None` at the end of the file.
    ///
    /// # Errors
    /// The file cannot be read any further. A malformed record is no such error but an inner one.
    fn next(&mut self) -> Result<Option<Parsed>>;

    /// Where the next record begins.
    fn place(&self) -> Place;
}

/// Opens a file at the place of a record; `name` is what messages call the file.
pub fn open(path: &Path, name: &str, format: Format, fields: &Fields, place: Place) -> Result<Box<dyn Records>> {
    let file = || File::open(path).map_err(Error::io("cannot open", path));
    let text = || text_at(BufReader::with_capacity(BUFFER_BYTES, file()?), name, place);
    Ok(match format {
        Format::Text => Box::new(TextPieces::new(text()?, name, place)),
        Format::Json => Box::new(JsonLines::new(text()?, name, fields, place)),
        Format::Parquet => {
            let file = file()?;
            let records = guarded(name, || -> Result<Box<dyn Records>> {
                Ok(match fields {
                    Fields::Text(column) => Box::new(ParquetColumn::open(file, name, column, place)?),
                    Fields::Chat { .. } | Fields::Instruct { .. } => {
                        Box::new(ParquetRows::open(file, name, fields, place)?)
                    }
                })
            })?;
            Box::new(Guarded { name: name.to_owned(), records })
        }
        Format::Shipped(bytes) => {
            let fields = Fields::Text("text".to_owned());
            Box::new(JsonLines::new(text_at(Cursor::new(bytes), name, place)?, name, &fields, place))
        }
    })
}

/// Records whose reader panics on some damaged files, as the parquet crate does.
struct Guarded {
    name: String,
    records: Box<dyn Records>,
}

impl Records for Guarded {
    fn next(&mut self) -> Result<Option<Parsed>> {
        guarded(&self.name, || self.records.next())
    }

    fn place(&self) -> Place {
        self.records.place()
    }
}

fn guarded<T>(name: &str, read: impl FnOnce() -> Result<T>) -> Result<T> {
    caught(|| Ok(read())).map_err(|fault| Error::Data(format!("{name}: cannot be read any further: {fault}")))?
}

/// A file's text, decompressed where it is gzip or zstd, from an offset into that text on.
fn text_at(
    mut file: impl BufRead + Seek + Send + 'static,
    name: &str,
    place: Place,
) -> Result<Box<dyn BufRead + Send>> {
    let mut reader = match file.fill_buf().map_err(unreadable(name, 0))? {
        // A gzip file may be several, one after another: the plain decoder would stop after the first.
        [0x1f, 0x8b, ..] => buffered(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => buffered(zstd::Decoder::with_buffer(file).map_err(unreadable(name, 0))?),
        _ => {
            file.seek(SeekFrom::Start(place.offset)).map_err(unreadable(name, place.line))?;
            return Ok(Box::new(file));
        }
    };
    io::copy(&mut reader.by_ref().take(place.offset), &mut io::sink()).map_err(unreadable(name, 0))?;
    Ok(reader)
}

fn buffered(reader: impl Read + Send + 'static) -> Box<dyn BufRead + Send> {
    Box::new(BufReader::with_capacity(BUFFER_BYTES, reader))
}

/// For `map_err`: the file broke off after `line` lines.
pub fn unreadable(name: &str, line: u64) -> impl FnOnce(io::Error) -> Error {
    let at = format!("{name}:{}", line + 1);
    move |source| Error::Data(format!("{at}: cannot be read any further: {source}; is the file complete?"))
}
