//! JSON lines: each line an object, one of its fields the text of a document.

use std::io::BufRead;

use serde_json::Value;

use super::records::{Parsed, Place, Record, Records, unreadable};
use crate::{Error, Result};

pub struct JsonLines {
    reader: Box<dyn BufRead + Send>,
    name: String,
    text_field: String,
    place: Place,
    line: Vec<u8>,
}

impl JsonLines {
    pub fn new(reader: Box<dyn BufRead + Send>, name: &str, text_field: &str, place: Place) -> Self {
        Self { reader, name: name.to_owned(), text_field: text_field.to_owned(), place, line: Vec::new() }
    }

    /// An array would be read whole, however large, for want of lines.
    fn refuse_array(&mut self) -> Result<()> {
        let head = self.reader.fill_buf().map_err(unreadable(&self.name, 0))?;
        if head.trim_ascii_start().starts_with(b"[") {
            let name = &self.name;
            return Err(Error::Data(format!(
                "{name}: is one JSON array, not one JSON object per line; `jq -c '.[]' {name}` writes it so"
            )));
        }
        Ok(())
    }

    fn parse(&self) -> Parsed {
        let name = &self.name;
        let line = self.place.line;
        let text = self.line.strip_prefix(b"\xef\xbb\xbf").filter(|_| line == 1).unwrap_or(&self.line);
        // A line that is cut off ends where it is cut, not with a line break inside a string.
        let value = serde_json::from_slice(text.trim_ascii_end()).map_err(|error| {
            let full = error.to_string();
            let reason = full.split(" at line ").next().unwrap_or(&full);
            format!("{name}:{line}:{}: not valid JSON: {reason}", error.column())
        })?;
        let Value::Object(mut fields) = value else {
            return Err(format!(
                "{name}:{line}: is {}, not an object with a field `{}`",
                kind(&value),
                self.text_field
            ));
        };
        match fields.get_mut(&self.text_field).map(Value::take) {
            Some(Value::String(text)) => Ok(Record::document(text)),
            Some(other) => Err(format!("{name}:{line}: field `{}` is {}, not text", self.text_field, kind(&other))),
            None => {
                let there = fields.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
                Err(no_such_field(&format!("{name}:{line}"), &self.text_field, &there))
            }
        }
    }
}

/// One wording for all formats.
pub fn no_such_field(at: &str, text_field: &str, there: &str) -> String {
    format!("{at}: no field `{text_field}`; data.text_field can be one of: {there}")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Records for JsonLines {
    fn next(&mut self) -> Result<Option<Parsed>> {
        if self.place.offset == 0 {
            self.refuse_array()?;
        }
        loop {
            self.line.clear();
            let read =
                self.reader.read_until(b'\n', &mut self.line).map_err(unreadable(&self.name, self.place.line))?;
            if read == 0 {
                return Ok(None);
            }
            self.place.offset += read as u64;
            self.place.line += 1;
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some(self.parse()));
            }
        }
    }

    fn place(&self) -> Place {
        self.place
    }
}
