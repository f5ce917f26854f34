//! JSON lines: each line an object, whose fields hold a document.

use std::io::BufRead;

use serde_json::{Map, Value};

use super::Content;
use super::records::{Fields, Parsed, Place, Record, Records, unreadable};
use crate::data::chat::{Conversation, Instruction, parse_messages};
use crate::{Error, Result};

pub struct JsonLines {
    reader: Box<dyn BufRead + Send>,
    name: String,
    fields: Fields,
    place: Place,
    line: Vec<u8>,
}

impl JsonLines {
    pub fn new(reader: Box<dyn BufRead + Send>, name: &str, fields: &Fields, place: Place) -> Self {
        Self { reader, name: name.to_owned(), fields: fields.clone(), place, line: Vec::new() }
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
        let Value::Object(found) = value else {
            let wanted = self.fields.names().into_iter().map(|(_, name)| name).collect::<Vec<_>>().join("`, `");
            return Err(format!("{name}:{line}: is {}, not an object with a field `{wanted}`", kind(&value)));
        };
        self.fields.content(format!("{name}:{line}"), found)
    }
}

impl Fields {
    /// What the fields of a record hold. `at`: where it stands.
    pub fn content(&self, at: String, mut found: Map<String, Value>) -> Parsed {
        Ok(match self {
            Self::Text(field) => Content::Text(Record::document(text_of(&at, "text_field", field, &mut found)?)),
            Self::Chat { messages: field } => {
                let messages = take(&at, "messages_field", field, &mut found)?;
                let messages = parse_messages(messages).map_err(|fault| format!("{at}: field `{field}` {fault}"))?;
                Content::Chat(Conversation { messages, at })
            }
            Self::Instruct { prompt, completion } => {
                let prompt = text_of(&at, "prompt_field", prompt, &mut found)?;
                let completion = text_of(&at, "completion_field", completion, &mut found)?;
                Content::Instruct(Instruction { prompt, completion })
            }
        })
    }

    /// The keys of `[data]`, and the fields that they name.
    pub fn names(&self) -> Vec<(&'static str, &str)> {
        match self {
            Self::Text(text) => vec![("text_field", text)],
            Self::Chat { messages } => vec![("messages_field", messages)],
            Self::Instruct { prompt, completion } => {
                vec![("prompt_field", prompt), ("completion_field", completion)]
            }
        }
    }
}

/// The value of `field`, which the config calls `data.{key}`.
fn take(at: &str, key: &str, field: &str, found: &mut Map<String, Value>) -> Result<Value, String> {
    if let Some(value) = found.get_mut(field) {
        return Ok(value.take());
    }
    let there = found.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    Err(no_such_field(at, key, field, &there))
}

fn text_of(at: &str, key: &str, field: &str, found: &mut Map<String, Value>) -> Result<String, String> {
    match take(at, key, field, found)? {
        Value::String(text) => Ok(text),
        other => Err(format!("{at}: field `{field}` is {}, not text", kind(&other))),
    }
}

/// One wording for all formats.
pub fn no_such_field(at: &str, key: &str, field: &str, there: &str) -> String {
    format!("{at}: no field `{field}`; data.{key} can be one of: {there}")
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
