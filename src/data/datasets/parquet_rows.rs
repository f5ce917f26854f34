//! Parquet rows whose columns nest, as the messages of a conversation do: read as the objects that JSON lines hold.

use std::fs::File;
use std::sync::Arc;

use parquet::record::Field;
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type};
use serde_json::{Map, Value};

use super::json::no_such_field;
use super::parquet_file::ParquetFile;
use super::records::{Fields, MAX_RECORD_BYTES, Parsed, Place, Records};
use crate::data::chat::bytes_of;
use crate::{Error, Result};

pub struct ParquetRows {
    file: ParquetFile,
    fields: Fields,
    /// The columns that `fields` names, with all below them.
    columns: SchemaDescPtr,
    row_group: usize,
    /// Those of `row_group`, once it is being read.
    rows: Option<ReaderIter>,
    /// Rows before the next record.
    row: u64,
}

impl ParquetRows {
    pub fn open(file: File, name: &str, fields: &Fields, place: Place) -> Result<Self> {
        let file = ParquetFile::open(file, name)?;
        let root = file.metadata().file_metadata().schema();
        let mut columns = Vec::new();
        for (key, wanted) in fields.names() {
            let Some(column) = root.get_fields().iter().find(|column| column.name() == wanted) else {
                let there = root.get_fields().iter().map(|column| column.name());
                return Err(Error::Data(no_such_field(name, key, wanted, there)));
            };
            columns.push(column.clone());
        }
        let columns = Type::group_type_builder(root.name())
            .with_fields(columns)
            .build()
            .map_err(|error| file.unreadable(0, error))?;
        let columns = Arc::new(SchemaDescriptor::new(Arc::new(columns)));
        let (row_group, row) = file.row_group_of(place.offset);
        let mut this = Self { file, fields: fields.clone(), columns, row_group, rows: None, row };
        while this.row < place.offset && this.next()?.is_some() {}
        Ok(this)
    }
}

impl Records for ParquetRows {
    fn next(&mut self) -> Result<Option<Parsed>> {
        while let Some(group) = self.file.row_group(self.row_group, self.columns.num_columns()) {
            if self.rows.is_none() {
                // One at a time, as in `ParquetColumn`.
                let rows = TreeBuilder::new().with_batch_size(1).as_iter(self.columns.clone(), &group);
                self.rows = Some(rows.map_err(|error| self.file.unreadable(self.row, error))?);
            }
            let Some(row) = self.rows.as_mut().and_then(Iterator::next) else {
                self.rows = None;
                self.row_group += 1;
                continue;
            };
            let columns = row.map_err(|error| self.file.unreadable(self.row, error))?.into_columns();
            self.row += 1;
            let found: Map<_, _> = columns.into_iter().map(|(name, field)| (name, value(&field))).collect();
            let at = format!("{}: row {}", self.file.name, self.row);
            return Ok(Some(match bytes_of(&found) > MAX_RECORD_BYTES {
                true => Err(format!("{at}: a record of more than {} MiB", MAX_RECORD_BYTES >> 20)),
                false => self.fields.content(at, found),
            }));
        }
        Ok(None)
    }

    fn place(&self) -> Place {
        Place { offset: self.row, line: self.row }
    }
}

/// As JSON lines would have it: what is null in an object is not there.
fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::Double(number) => (*number).into(),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Into::into),
        Field::Group(row) => {
            let present = row.get_column_iter().filter(|(_, field)| **field != Field::Null);
            present.map(|(name, field)| (name.clone(), value(field))).collect()
        }
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        // Numbers and times of other widths, and maps, are in no template's messages.
        other => other.to_string().into(),
    }
}
