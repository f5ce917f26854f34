//! Reading values against the [`schema`](super::schema): what fits becomes part of the table, what does not a fault.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::diagnostic::{Document, Fault, Origin, Origins, nearest};
use super::model::overlay;
use super::overrides::Override;
use super::schema::{self, Key, Shape, names};

/// What was read so far.
#[derive(Default)]
pub(super) struct Reader {
    /// The values that fit. Later ones overlay earlier ones.
    pub table: toml::Table,
    pub origins: Origins,
    pub faults: Vec<Fault>,
}

/// Turns a place in the text at hand into an origin.
type Locate<'a> = &'a dyn Fn(Range<usize>) -> Origin;

impl Reader {
    /// Returns whether the text is TOML; if it is not, what could be understood is read all the same.
    pub fn document(&mut self, document: &Document) -> bool {
        let (table, errors) = DeTable::parse_recoverable(&document.text);
        let end = document.text.len();
        for error in &errors {
            let span = error.span().unwrap_or(end..end);
            self.faults.push(Fault::new(format!("this is not TOML: {}", error.message()), &[]).at(Origin::File(span)));
        }
        let read = self.section("", &schema::SECTIONS, table.get_ref(), &Origin::File);
        overlay(&mut self.table, &read);
        errors.is_empty()
    }

    pub fn flag(&mut self, given: &Override) {
        let origin = Origin::Flag(given.flag.clone());
        let locate: Locate = &|_| origin.clone();
        let mut keys = schema::SECTIONS.as_slice();
        let mut path = String::new();
        for name in given.key.split('.') {
            let Some(key) = keys.iter().find(|key| key.name == name) else {
                let is_table = join(&path, name) != given.key;
                return self.unknown(&path, keys, name, is_table, origin.clone());
            };
            path = join(&path, name);
            if path == given.key {
                let Some(text) = &given.value else {
                    let fault = Fault::new(format!("`{path}` needs a value"), &[&path]).at(origin.clone());
                    return self.faults.push(fault.note(format!("allowed: {}", key.shape)));
                };
                let value = self.value(&path, key, &parse_flag(&key.shape, text), locate);
                let nested = value.map(|value| {
                    path.rsplit('.')
                        .fold(value, |value, name| toml::Table::from_iter([(name.to_owned(), value)]).into())
                });
                if let Some(toml::Value::Table(nested)) = nested {
                    overlay(&mut self.table, &nested);
                }
                return;
            }
            keys = key.shape.keys().unwrap_or_default();
        }
    }

    fn section(&mut self, path: &str, keys: &[Key], found: &DeTable, locate: Locate) -> toml::Table {
        let mut table = toml::Table::new();
        for (name, value) in found {
            match keys.iter().find(|key| key.name == *name.get_ref()) {
                Some(key) => {
                    if let Some(value) = self.value(&join(path, name.get_ref()), key, value, locate) {
                        table.insert(key.name.clone(), value);
                    }
                }
                None => self.unknown(path, keys, name.get_ref(), value.get_ref().is_table(), locate(name.span())),
            }
        }
        table
    }

    /// The value of a key, if it fits.
    fn value(&mut self, path: &str, key: &Key, found: &Spanned<DeValue>, locate: Locate) -> Option<toml::Value> {
        if let (Some(keys), DeValue::Table(table)) = (key.shape.keys(), found.get_ref()) {
            return Some(self.section(path, keys, table, locate).into());
        }
        let origin = locate(found.span());
        let Some(value) = convert(&key.shape, found.get_ref()) else {
            self.misfit(path, &key.shape, found, locate);
            return None;
        };
        if let (Some(reason), Some(default)) = (&key.not_yet, &key.default)
            && serde_json::to_value(&value).ok().as_ref() != Some(default)
        {
            let fault = Fault::new(format!("`{path}` cannot be {}", show(found.get_ref())), &[path]).at(origin);
            self.faults.push(fault.hint(reason.clone()).note(format!("leave it at {default}")));
            return None;
        }
        self.origins.insert(path.to_owned(), origin);
        Some(value)
    }

    fn misfit(&mut self, path: &str, shape: &Shape, found: &Spanned<DeValue>, locate: Locate) {
        if let (Shape::List(item), DeValue::Array(items)) = (shape, found.get_ref()) {
            for found in items.iter().filter(|found| convert(item, found.get_ref()).is_none()) {
                self.misfit(path, item, found, locate);
            }
            return;
        }
        let hint = match found.get_ref() {
            DeValue::String(text) if DeValue::parse(text).is_ok_and(|it| convert(shape, it.get_ref()).is_some()) => {
                Some(format!("write it without quotes: {text}"))
            }
            DeValue::String(text) if matches!(shape, Shape::List(_)) => {
                Some(format!("write it as a list: {}", show(parse_flag(shape, text).get_ref())))
            }
            DeValue::String(text) if text.contains('\0') => Some("it has a NUL character".to_owned()),
            DeValue::String(text) => nearest(text, shape.words()).map(|word| format!("did you mean {word:?}?")),
            DeValue::Float(number) if shape.refuses_for_float32(number.as_str()) => {
                Some("it is out of the range of float32".to_owned())
            }
            DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) if shape.takes_text() => {
                Some(format!("write it in quotes: \"{}\"", show(found.get_ref())))
            }
            _ => None,
        };
        let fault = Fault::new(format!("`{path}` cannot be {}", show(found.get_ref())), &[path]);
        self.faults.push(fault.at(locate(found.span())).hint(hint).note(format!("allowed: {shape}")));
    }

    fn unknown(&mut self, path: &str, keys: &[Key], name: &str, is_table: bool, origin: Origin) {
        let shown = |name: &str| if is_table { format!("[{name}]") } else { format!("`{name}`") };
        let here = join(path, short(name));
        let fits = |key: &&Key| key.shape.keys().is_some() == is_table;
        let own = || nearest(name, keys.iter().filter(fits).map(|key| key.name.as_str()));
        let meant = elsewhere(name, is_table)
            .or_else(|| own().map(|near| vec![if is_table { join(path, near) } else { near.to_owned() }]));
        let hint = meant.map(|paths| paths.iter().map(|path| shown(path)).collect::<Vec<_>>().join(" or "));
        let kind = if is_table { "section" } else { "key" };
        let place = if path.is_empty() { "sections".to_owned() } else { format!("keys of [{path}]") };
        self.faults.push(
            Fault::new(format!("unknown {kind} {}", shown(&here)), &[&here])
                .at(origin)
                .hint(hint.map(|hint| format!("did you mean {hint}?")))
                .note(format!("{place}: {}", names(keys))),
        );
    }
}

/// Keys, or sections, of exactly this name that are somewhere else, unless they are too many to be meant.
fn elsewhere(name: &str, is_table: bool) -> Option<Vec<String>> {
    fn collect(name: &str, is_table: bool, keys: &[Key], path: &str, found: &mut Vec<String>) {
        for key in keys {
            let here = join(path, &key.name);
            if key.name == name && key.shape.keys().is_some() == is_table {
                found.push(here.clone());
            }
            collect(name, is_table, key.shape.keys().unwrap_or_default(), &here, found);
        }
    }
    let mut found = Vec::new();
    collect(name, is_table, &schema::SECTIONS, "", &mut found);
    (1..=2).contains(&found.len()).then_some(found)
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// `None` if the value does not fit. Integers fit where numbers are wanted.
fn convert(shape: &Shape, value: &DeValue) -> Option<toml::Value> {
    match (shape, value) {
        (Shape::Bool, DeValue::Boolean(value)) => Some((*value).into()),
        (Shape::Integer(bounds), DeValue::Integer(value)) => {
            let value = i64::from_str_radix(value.as_str(), value.radix()).ok()?;
            bounds.contain(value as f64).then(|| value.into())
        }
        (Shape::Float(bounds), DeValue::Integer(value)) => {
            let value = i64::from_str_radix(value.as_str(), value.radix()).ok()? as f64;
            bounds.contain(value).then(|| value.into())
        }
        (Shape::Float(bounds), DeValue::Float(value)) => {
            let text = value.as_str();
            let value: f64 = text.parse().ok()?;
            let overflows = value.is_infinite() && !text.contains("inf");
            (bounds.contain(value) && bounds.fits_float32(value) && !overflows).then(|| value.into())
        }
        // No file has a name with a NUL, nor anything else that a job names.
        (Shape::Text, DeValue::String(value)) => (!value.contains('\0')).then(|| value.as_ref().into()),
        (Shape::Words(words), DeValue::String(value)) => {
            let wanted = if value == "None" { "none" } else { value.as_ref() };
            words.iter().find(|word| *word == wanted).map(|word| word.as_str().into())
        }
        (Shape::List(item), DeValue::Array(items)) => {
            items.iter().map(|value| convert(item, value.get_ref())).collect::<Option<Vec<_>>>().map(Into::into)
        }
        (Shape::Any(shapes), value) => shapes.iter().find_map(|shape| convert(shape, value)),
        _ => None,
    }
}

/// Reads the argument of a flag as its key wants it: strings need no quotes, and lists no brackets.
fn parse_flag<'a>(shape: &Shape, text: &'a str) -> Spanned<DeValue<'a>> {
    let value = match (shape, DeValue::parse(text).map(Spanned::into_inner)) {
        (Shape::List(_), _) if text.is_empty() => DeValue::Array(DeArray::default()),
        (Shape::List(_), Ok(list @ DeValue::Array(_))) => list,
        (Shape::List(item), _) => DeValue::Array(text.split(',').map(|text| parse_flag(item, text.trim())).collect()),
        (shape, Ok(literal)) if literal.is_str() || !shape.takes_text() => literal,
        _ => DeValue::String(text.into()),
    };
    Spanned::new(0..text.len(), value)
}

/// A value as a message names it.
fn show(value: &DeValue) -> String {
    match value {
        DeValue::String(text) if text.chars().count() > SHOWN => format!("{:?}...", short(text)),
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => short(&number.to_string()).into(),
        DeValue::Float(number) => short(&number.to_string()).into(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(date) => format!("the date {date}"),
        DeValue::Array(items) => {
            let shown = items.iter().take(10).map(|item| show(item.get_ref()));
            let more = (items.len() > 10).then(|| "...".to_owned());
            format!("[{}]", shown.chain(more).collect::<Vec<_>>().join(", "))
        }
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// Characters of a name or value that a message shows.
const SHOWN: usize = 60;

fn short(text: &str) -> &str {
    text.char_indices().nth(SHOWN).map_or(text, |(end, _)| &text[..end])
}
