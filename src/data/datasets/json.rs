//! JSON lines: each line an object, whose fields hold a document.

use std::io::{self, BufRead, Read};

use serde_json::{Map, Value};

use super::Content;
use super::records::{Fields, MAX_RECORD_BYTES, Parsed, Place, Record, Records, unreadable};
use crate::data::chat::{Conversation, Instruction, parse_messages};
use crate::tools::files;
use crate::{Error, Result};

/// More blank lines than these bytes are no mistake of somebody who writes data, and reading on might never end.
const MAX_BLANK_BYTES: usize = 64 << 20;

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

    /// Reads a line, of which no more is kept than tells that it is too long. Returns how many bytes it has, its end
    /// included; none at the end of the file.
    fn read_line(&mut self) -> io::Result<usize> {
        self.line.clear();
        let most = MAX_RECORD_BYTES as u64 + 2;
        let mut read = self.reader.by_ref().take(most).read_until(b'\n', &mut self.line)?;
        if self.line.len() > MAX_RECORD_BYTES && !self.line.ends_with(b"\n") {
            read += self.reader.skip_until(b'\n')?;
        }
        Ok(read)
    }

    fn parse(&self) -> Parsed {
        let name = &self.name;
        let line = self.place.line;
        if self.line.len() > MAX_RECORD_BYTES {
            return Err(format!("{name}:{line}: a line of more than {} MiB", MAX_RECORD_BYTES >> 20));
        }
        if files::has_too_many_values(&self.line) {
            return Err(format!("{name}:{line}: more JSON values than a document has"));
        }
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
    Err(no_such_field(at, key, field, found.keys().map(String::as_str)))
}

fn text_of(at: &str, key: &str, field: &str, found: &mut Map<String, Value>) -> Result<String, String> {
    match take(at, key, field, found)? {
        Value::String(text) => Ok(text),
        other => Err(format!("{at}: field `{field}` is {}, not text", kind(&other))),
    }
}

/// One wording for all formats.
pub fn no_such_field<'a>(at: &str, key: &str, field: &str, there: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 30;
    let mut shown: Vec<String> = there.take(SHOWN + 1).map(|name| format!("`{name:.60}`")).collect();
    if shown.len() > SHOWN {
        shown[SHOWN] = "...".to_owned();
    }
    format!("{at}: no field `{field}`; data.{key} can be one of: {}", shown.join(", "))
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
        let mut blank = 0;
        loop {
            let read = self.read_line().map_err(unreadable(&self.name, self.place.line))?;
            if read == 0 {
                return Ok(None);
            }
            self.place.offset += read as u64;
            self.place.line += 1;
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some(self.parse()));
            }
            blank += read;
            if blank > MAX_BLANK_BYTES {
                let (name, line) = (&self.name, self.place.line);
                return Err(Error::Data(format!("{name}:{line}: {} MiB of blank lines", MAX_BLANK_BYTES >> 20)));
            }
        }
    }

    fn place(&self) -> Place {
        self.place
    }
}
