//! A parquet file whose pages are measured before they are unpacked: a page says itself how large it will be, and a few
//! bytes can say anything.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::Compression;
use parquet::bloom_filter::Sbbf;
use parquet::column::page::PageReader;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length, RowGroupReader};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use crate::{Error, Result};

/// Writers put about a thousand texts into a page, and this is a thousand of half a megabyte. Two pages, and what one of
/// them is unpacked from, are in memory at once.
const MAX_PAGE_BYTES: u64 = 448 << 20;

/// Of texts that repeat. Writers stop at some ten thousand.
const MAX_DICTIONARY: u64 = 4 << 20;

pub struct ParquetFile {
    pub name: String,
    file: File,
    metadata: ParquetMetaData,
}

impl ParquetFile {
    pub fn open(file: File, name: &str) -> Result<Self> {
        let metadata = ParquetMetaDataReader::new()
            .parse_and_finish(&file)
            .map_err(|error| Error::Data(format!("{name}: not a complete parquet file: {error}")))?;
        Ok(Self { name: name.to_owned(), file, metadata })
    }

    pub fn metadata(&self) -> &ParquetMetaData {
        &self.metadata
    }

    /// The row group that row `row` is in, and the first row of that; behind the last ones, if there is none.
    pub fn row_group_of(&self, row: u64) -> (usize, u64) {
        let groups = self.metadata.row_groups();
        let mut first = 0;
        for (i, group) in groups.iter().enumerate() {
            let end = first + group.num_rows().max(0) as u64;
            if row < end {
                return (i, first);
            }
            first = end;
        }
        (groups.len(), first)
    }

    /// A row group that `n_columns` will be read of, at the same time; `None` behind the last.
    pub fn row_group(&self, index: usize, n_columns: usize) -> Option<RowGroup<'_>> {
        let metadata = self.metadata.row_groups().get(index)?;
        Some(RowGroup { file: &self.file, metadata, max_page_bytes: MAX_PAGE_BYTES / n_columns as u64 })
    }

    /// The file broke off after `row` rows.
    pub fn unreadable(&self, row: u64, error: ParquetError) -> Error {
        Error::Data(format!("{}: row {}: cannot be read any further: {error}", self.name, row + 1))
    }
}

pub struct RowGroup<'a> {
    file: &'a File,
    metadata: &'a RowGroupMetaData,
    max_page_bytes: u64,
}

impl RowGroupReader for RowGroup<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.metadata
    }

    fn num_columns(&self) -> usize {
        self.metadata.num_columns()
    }

    fn get_column_page_reader(&self, i: usize) -> Result<Box<dyn PageReader>, ParquetError> {
        let column = self.metadata.column(i);
        let (compression, max_bytes) = (column.compression(), self.max_page_bytes);
        let pages = Pages { file: self.file.try_clone()?, compression, max_bytes };
        let n_rows = usize::try_from(self.metadata.num_rows())?;
        Ok(Box::new(SerializedPageReader::new(Arc::new(pages), column, n_rows, None)?))
    }

    fn get_column_bloom_filter(&self, _: usize) -> Option<&Sbbf> {
        None
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>, ParquetError> {
        RowIter::from_row_group(projection, self)
    }
}

/// The file, as the pages of a column are read from it: their headers by [`Read`], what they pack as [`Bytes`].
struct Pages {
    file: File,
    compression: Compression,
    max_bytes: u64,
}

impl Length for Pages {
    fn len(&self) -> u64 {
        Length::len(&self.file)
    }
}

impl ChunkReader for Pages {
    type T = Header;

    fn get_read(&self, start: u64) -> Result<Header, ParquetError> {
        Ok(Header { bytes: self.file.get_read(start)?, max_bytes: Some(self.max_bytes) })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let max_bytes = self.max_bytes;
        within(length as u64, max_bytes)?;
        let packed = self.file.get_bytes(start, length)?;
        // These two are unpacked whatever the header says, to so many times their size.
        match self.compression {
            Compression::GZIP(_) if length as u64 > max_bytes / 1032 => {
                let mut unpacked = flate2::read::MultiGzDecoder::new(&packed[..]).take(max_bytes + 1);
                within(io::copy(&mut unpacked, &mut io::sink())?, max_bytes)?;
            }
            Compression::LZ4 => within(length as u64 * 255, max_bytes)?,
            _ => {}
        }
        Ok(packed)
    }
}

/// A page's header, or the error that the page is too large.
struct Header {
    bytes: BufReader<File>,
    /// Until it is checked.
    max_bytes: Option<u64>,
}

impl Read for Header {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // At the first byte: a reader may be made and not be read, where no header begins.
        if let Some(max_bytes) = self.max_bytes.take() {
            check(self.bytes.fill_buf()?, max_bytes)?;
        }
        self.bytes.read(buffer)
    }
}

/// In Thrift's compact protocol, the next field of a struct, a number of 32 bits.
const NEXT_I32: u8 = 0x15;
const DICTIONARY_PAGE: u64 = 2;

/// A header is a struct of the page's kind, its bytes unpacked and packed, a checksum or not, and a struct for its kind,
/// which begins with the number of values.
fn check(mut header: &[u8], max_bytes: u64) -> io::Result<()> {
    fn number(bytes: &mut &[u8]) -> Option<u64> {
        let rest = bytes.strip_prefix(&[NEXT_I32])?;
        let (varint, rest) = rest.split_at(1 + rest.iter().position(|byte| *byte < 0x80)?);
        *bytes = rest;
        let zigzag = varint.iter().rev().fold(0_u64, |sum, byte| sum << 7 | u64::from(byte & 0x7f));
        Some(zigzag >> 1)
    }
    let (kind, unpacked, _packed) = (number(&mut header), number(&mut header), number(&mut header));
    let _checksum = number(&mut header);
    let n_values = header.split_first().and_then(|(_struct, mut rest)| number(&mut rest));
    match (kind, unpacked, n_values) {
        (Some(DICTIONARY_PAGE), _, Some(n_values)) if n_values > MAX_DICTIONARY => {
            Err(io::Error::other(format!("a dictionary of {n_values} texts, more than {MAX_DICTIONARY}")))
        }
        (Some(_), Some(unpacked), Some(_)) => within(unpacked, max_bytes),
        _ => Err(io::Error::other("no page begins where one should")),
    }
}

fn within(page_bytes: u64, max_bytes: u64) -> io::Result<()> {
    match page_bytes <= max_bytes {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "a page of more than {} MiB; write the file anew, with fewer rows in a row group",
            max_bytes >> 20
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_pages_are_held_to_the_bounds() {
        let header = |kind: u64, unpacked: u64, n_values: u64, checksum: bool| {
            let field = |number: u64| {
                let mut zigzag = number << 1;
                let mut bytes = vec![NEXT_I32];
                while zigzag >= 0x80 {
                    bytes.push(zigzag as u8 | 0x80);
                    zigzag >>= 7;
                }
                bytes.push(zigzag as u8);
                bytes
            };
            let checksum = if checksum { field(1 << 30) } else { Vec::new() };
            [field(kind), field(unpacked), field(100), checksum, vec![0x2c], field(n_values), vec![0; 9]].concat()
        };
        for checksum in [false, true] {
            check(&header(0, MAX_PAGE_BYTES, 1 << 30, checksum), MAX_PAGE_BYTES).unwrap();
            check(&header(DICTIONARY_PAGE, 1000, 100, checksum), MAX_PAGE_BYTES).unwrap();
            check(&header(0, MAX_PAGE_BYTES + 1, 9, checksum), MAX_PAGE_BYTES).unwrap_err();
            check(&header(DICTIONARY_PAGE, 1000, MAX_DICTIONARY + 1, checksum), MAX_PAGE_BYTES).unwrap_err();
        }
        check(b"", MAX_PAGE_BYTES).unwrap_err();
        check(&[NEXT_I32; 3], MAX_PAGE_BYTES).unwrap_err();
        check(&[0xff; 20], MAX_PAGE_BYTES).unwrap_err();
    }
}
