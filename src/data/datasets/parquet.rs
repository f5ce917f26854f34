//! Parquet: each row a document, one text column of it, read without arrow.

use std::fs::File;

use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::RowGroupReader;

use super::Content;
use super::json::no_such_field;
use super::parquet_file::ParquetFile;
use super::records::{MAX_RECORD_BYTES, Parsed, Place, Record, Records};
use crate::{Error, Result};

pub struct ParquetColumn {
    file: ParquetFile,
    column_index: usize,
    row_group: usize,
    /// The text column of `row_group`, once it is being read.
    column: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Rows before the next record.
    row: u64,
}

impl ParquetColumn {
    pub fn open(file: File, name: &str, text_field: &str, place: Place) -> Result<Self> {
        let file = ParquetFile::open(file, name)?;
        let columns = file.metadata().file_metadata().schema_descr().columns();
        let Some(column_index) = columns.iter().position(|column| column.path().string() == text_field) else {
            let there: Vec<String> = columns.iter().map(|column| column.path().string()).collect();
            let there = there.iter().map(String::as_str);
            return Err(Error::Data(no_such_field(name, "text_field", text_field, there)));
        };
        let column = &columns[column_index];
        if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 {
            let physical = column.physical_type();
            let list = if column.max_rep_level() > 0 { "a list of " } else { "" };
            return Err(Error::Data(format!("{name}: column `{text_field}` is {list}{physical}, not text")));
        }
        let (row_group, row) = file.row_group_of(place.offset);
        let mut this = Self { file, column_index, row_group, column: None, row };
        let skipped = place.offset.saturating_sub(row) as usize;
        if let Some(column) = this.column()? {
            column.skip_records(skipped).map_err(|error| this.file.unreadable(row, error))?;
            this.row += skipped as u64;
        }
        Ok(this)
    }

    /// The text of the row before the next record.
    fn parse(&self, text: Option<ByteArray>) -> Parsed {
        let at = || format!("{}: row {}", self.file.name, self.row);
        match text {
            None => Err(format!("{}: the text is null", at())),
            Some(text) if text.len() > MAX_RECORD_BYTES => {
                Err(format!("{}: a text of more than {} MiB", at(), MAX_RECORD_BYTES >> 20))
            }
            Some(text) => match String::from_utf8(text.data().to_vec()) {
                Ok(text) => Ok(Content::Text(Record::document(text))),
                Err(_) => Err(format!("{}: not valid UTF-8", at())),
            },
        }
    }

    /// `None` behind the last row group.
    fn column(&mut self) -> Result<Option<&mut ColumnReaderImpl<ByteArrayType>>> {
        if self.column.is_none()
            && let Some(group) = self.file.row_group(self.row_group, 1)
        {
            let column = group.get_column_reader(self.column_index);
            match column.map_err(|error| self.file.unreadable(self.row, error))? {
                ColumnReader::ByteArrayColumnReader(reader) => self.column = Some(reader),
                _ => unreachable!("the column's type was checked when the file was opened"),
            }
        }
        Ok(self.column.as_mut())
    }
}

impl Records for ParquetColumn {
    fn next(&mut self) -> Result<Option<Parsed>> {
        // One at a time: many rows may have the same large text, and each may be all that keeps a page in memory.
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        while let Some(column) = self.column()? {
            let read = column.read_records(1, Some(&mut levels), None, &mut values);
            let (rows, ..) = read.map_err(|error| self.file.unreadable(self.row, error))?;
            if rows > 0 {
                self.row += 1;
                return Ok(Some(self.parse(values.pop())));
            }
            self.column = None;
            self.row_group += 1;
        }
        Ok(None)
    }

    fn place(&self) -> Place {
        Place { offset: self.row, line: self.row }
    }
}
