//! Parquet: each row a document, one text column of it, read without arrow.

use std::collections::VecDeque;
use std::fs::File;

use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::Content;
use super::json::no_such_field;
use super::records::{MAX_RECORD_BYTES, Parsed, Place, Record, Records};
use crate::{Error, Result};

const ROWS_AT_ONCE: usize = 256;

pub struct ParquetColumn {
    name: String,
    file: SerializedFileReader<File>,
    column_index: usize,
    max_definition_level: i16,
    row_group: usize,
    /// The text column of `row_group`, once it is being read.
    column: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Rows before the next record.
    row: u64,
    ahead: VecDeque<Parsed>,
}

/// The row group that row `row` is in, and the first row of that; behind the last ones, if there is none.
pub fn row_group_of(file: &SerializedFileReader<File>, row: u64) -> (usize, u64) {
    let groups = file.metadata().row_groups();
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

impl ParquetColumn {
    pub fn open(file: File, name: &str, text_field: &str, place: Place) -> Result<Self> {
        let file = SerializedFileReader::new(file)
            .map_err(|error| Error::Data(format!("{name}: not a complete parquet file: {error}")))?;

        let schema = file.metadata().file_metadata().schema_descr();
        let columns = schema.columns();
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
        let max_definition_level = column.max_def_level();
        let mut this = Self {
            name: name.to_owned(),
            file,
            column_index,
            max_definition_level,
            row_group: 0,
            column: None,
            row: 0,
            ahead: VecDeque::new(),
        };
        this.skip_to(place.offset)?;
        Ok(this)
    }

    fn skip_to(&mut self, row: u64) -> Result<()> {
        (self.row_group, self.row) = row_group_of(&self.file, row);
        if self.row < row && self.row_group < self.file.num_row_groups() {
            let skip = (row - self.row) as usize;
            let fault = self.fault();
            self.column()?.skip_records(skip).map_err(fault)?;
            self.row = row;
        }
        Ok(())
    }

    fn column(&mut self) -> Result<&mut ColumnReaderImpl<ByteArrayType>> {
        if self.column.is_none() {
            let group = self.file.get_row_group(self.row_group).map_err(self.fault())?;
            match group.get_column_reader(self.column_index).map_err(self.fault())? {
                ColumnReader::ByteArrayColumnReader(reader) => self.column = Some(reader),
                _ => unreachable!("the column's type was checked when the file was opened"),
            }
        }
        Ok(self.column.as_mut().expect("set above"))
    }

    /// Reads the next rows into `ahead`; none are left where that stays empty.
    fn read_ahead(&mut self) -> Result<()> {
        while self.ahead.is_empty() && self.row_group < self.file.num_row_groups() {
            let (mut levels, mut values) = (Vec::new(), Vec::new());
            let fault = self.fault();
            let column = self.column()?;
            let (rows, ..) = column.read_records(ROWS_AT_ONCE, Some(&mut levels), None, &mut values).map_err(fault)?;
            if rows == 0 {
                self.column = None;
                self.row_group += 1;
            }
            let mut values = values.into_iter();
            for i in 0..rows {
                let at = || format!("{}: row {}", self.name, self.row + i as u64 + 1);
                // A column that cannot be null has no levels.
                let is_null = levels.get(i).is_some_and(|&level| level < self.max_definition_level);
                let value = if is_null { None } else { values.next() };
                self.ahead.push_back(match value {
                    None => Err(format!("{}: the text is null", at())),
                    Some(value) if value.len() > MAX_RECORD_BYTES => {
                        Err(format!("{}: a text of more than {} MiB", at(), MAX_RECORD_BYTES >> 20))
                    }
                    Some(value) => match String::from_utf8(value.data().to_vec()) {
                        Ok(text) => Ok(Content::Text(Record::document(text))),
                        Err(_) => Err(format!("{}: not valid UTF-8", at())),
                    },
                });
            }
        }
        Ok(())
    }

    fn fault(&self) -> impl FnOnce(parquet::errors::ParquetError) -> Error + use<> {
        let at = format!("{}: row {}", self.name, self.row + 1);
        move |error| Error::Data(format!("{at}: cannot be read any further: {error}"))
    }
}

impl Records for ParquetColumn {
    fn next(&mut self) -> Result<Option<Parsed>> {
        if self.ahead.is_empty() {
            self.read_ahead()?;
        }
        let record = self.ahead.pop_front();
        self.row += u64::from(record.is_some());
        Ok(record)
    }

    fn place(&self) -> Place {
        Place { offset: self.row, line: self.row }
    }
}
