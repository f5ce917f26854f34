//! What a job file may hold, read off the config structs: their JSON schema for editors, and its digest, a tree of
//! [`Key`]s, for everything that checks, reads and prints values.
//!
//! A field's doc comment is its key's text. Beside schemars' own attributes two extensions say what becomes of a key:
//! `x-no-effect` (accepted and named in the log, with this reason) and `x-not-yet` (only the default is accepted; the
//! text says why). A third, `x-infinite`, lets a number be `inf`.

use std::fmt;
use std::sync::LazyLock;

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use super::JobConfig;

pub(super) const FAULT_TOLERANCE: &str = "fault tolerance is off";
pub(super) const GROUPED: &str = "titan does not quantize routed experts yet";
pub(super) const MEMORY_BUDGET: &str = "the mode \"memory_budget\" is off";
pub(super) const MX: &str = "titan does not compute in MX formats yet";
pub(super) const ONE_DEVICE: &str = "titan trains on one device so far";
pub(super) const PYTHON: &str = "it concerns Python";
pub(super) const PYTHON_CODE: &str = "titan runs no Python";
pub(super) const NO_FLOAT8: &str = "`model.converters` does not name \"quantize.linear.float8\"";
pub(super) const TORCH: &str = "it concerns PyTorch's inner workings";

/// A key of a table.
pub(super) struct Key {
    pub name: String,
    pub doc: String,
    pub shape: Shape,
    /// None for a section, and for `[model.args]`, whose defaults depend on the flavor.
    pub default: Option<Value>,
    pub no_effect: Option<String>,
    pub not_yet: Option<String>,
}

/// What a value may be.
pub(super) enum Shape {
    Table(Vec<Key>),
    Bool,
    Integer(Bounds),
    Float(Bounds),
    Text,
    Words(Vec<String>),
    List(Box<Shape>),
    Any(Vec<Shape>),
}

#[derive(Clone, Copy, PartialEq)]
pub(super) struct Bounds {
    min: f64,
    max: f64,
    above: f64,
    below: f64,
    /// Whether infinity is a value; else only what float32 can tell from it, and from 0, is.
    infinite: bool,
}

/// The keys of a whole job file: its sections.
pub(super) static SECTIONS: LazyLock<Vec<Key>> = LazyLock::new(keys_of::<JobConfig>);

/// The JSON schema of job files.
pub fn json_schema() -> Schema {
    schema_of::<JobConfig>()
}

/// The keys of the table that a `T` is.
pub(super) fn keys_of<T: JsonSchema>() -> Vec<Key> {
    keys(schema_of::<T>().as_value())
}

/// The key at a dotted path of names.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    let mut keys = SECTIONS.as_slice();
    let mut found = None;
    for name in path.split('.') {
        let key = keys.iter().find(|key| key.name == name)?;
        keys = key.shape.keys().unwrap_or_default();
        found = Some(key);
    }
    found
}

fn schema_of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft07()
        .with(|settings| settings.inline_subschemas = true)
        .with_transform(RecursiveTransform(none_for_null))
        .into_generator()
        .into_root_schema_for::<T>()
}

/// TOML has no null: optional values take the string "none". A section's default is the sum of its keys'.
fn none_for_null(schema: &mut Schema) {
    let Some(schema) = schema.as_object_mut() else { return };
    if schema.contains_key("properties") {
        schema.remove("default");
    }
    if schema.get("default").is_some_and(Value::is_null) {
        schema.insert("default".into(), "none".into());
    }
    let none = json!({ "const": "none" });
    if let Some(alternatives) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        for alternative in alternatives.iter_mut().filter(|it| it["type"] == "null") {
            *alternative = none.clone();
        }
    }
    if let Some(Value::Array(types)) = schema.get("type")
        && types.iter().any(|it| it == "null")
    {
        let own_type = types[0].clone();
        let is_note = |name: &String| ["description", "default"].contains(&name.as_str()) || name.starts_with("x-");
        let (notes, mut rest): (Map<_, _>, Map<_, _>) =
            std::mem::take(schema).into_iter().partition(|(name, _)| is_note(name));
        rest.insert("type".into(), own_type);
        if let Some(Value::Array(words)) = rest.get_mut("enum") {
            words.retain(|word| !word.is_null());
        }
        *schema = notes;
        schema.insert("anyOf".into(), json!([rest, none]));
    }
}

fn keys(schema: &Value) -> Vec<Key> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let key = |(name, schema): (&String, &Value)| Key {
        name: name.clone(),
        doc: text(&schema["description"]).unwrap_or_default(),
        shape: shape(schema),
        default: schema.get("default").cloned(),
        no_effect: text(&schema["x-no-effect"]),
        not_yet: text(&schema["x-not-yet"]),
    };
    schema["properties"].as_object().into_iter().flatten().map(key).collect()
}

fn shape(schema: &Value) -> Shape {
    let strings = |values: &[Value]| values.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    if let Some(alternatives) = schema.get("anyOf").or(schema.get("oneOf")).and_then(Value::as_array) {
        let shapes: Vec<_> = alternatives.iter().map(shape).collect();
        let words =
            shapes.iter().map(|shape| if let Shape::Words(words) = shape { Some(words.as_slice()) } else { None });
        return match words.collect::<Option<Vec<_>>>() {
            Some(words) => Shape::Words(words.concat()),
            None => Shape::Any(shapes),
        };
    }
    if let Some(words) = schema["enum"].as_array() {
        return Shape::Words(strings(words));
    }
    match &schema["const"] {
        Value::Null => {}
        Value::Number(only) => {
            let only = only.as_f64().unwrap_or(f64::NAN);
            return Shape::Integer(Bounds { min: only, max: only, ..Bounds::NONE });
        }
        only => return Shape::Words(strings(std::slice::from_ref(only))),
    }
    match schema["type"].as_str() {
        Some("boolean") => Shape::Bool,
        Some("integer") => Shape::Integer(Bounds::read(schema)),
        Some("number") => Shape::Float(Bounds::read(schema)),
        Some("array") => Shape::List(Box::new(shape(&schema["items"]))),
        Some("object") => Shape::Table(keys(schema)),
        _ => Shape::Text,
    }
}

impl Shape {
    /// The keys, if the value may be a table.
    pub fn keys(&self) -> Option<&[Key]> {
        match self {
            Self::Table(keys) => Some(keys),
            Self::Any(shapes) => shapes.iter().find_map(Self::keys),
            _ => None,
        }
    }

    /// The words among which a string must be. Empty if there are none, or if any string will do.
    pub fn words(&self) -> Vec<&str> {
        match self {
            Self::Words(words) => words.iter().map(String::as_str).collect(),
            Self::Any(shapes) if !self.takes_text() => shapes.iter().flat_map(Self::words).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether a number would do but for its size.
    pub fn refuses_for_float32(&self, number: &str) -> bool {
        match self {
            Self::Float(bounds) => {
                number.parse().is_ok_and(|value| bounds.contain(value) && !bounds.fits_float32(value))
            }
            Self::Any(shapes) => shapes.iter().any(|shape| shape.refuses_for_float32(number)),
            _ => false,
        }
    }

    /// Whether any string will do.
    pub fn takes_text(&self) -> bool {
        match self {
            Self::Text => true,
            Self::Any(shapes) => shapes.iter().any(Self::takes_text),
            _ => false,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(keys) => write!(f, "a table of {}", names(keys)),
            Self::Bool => write!(f, "true, false"),
            Self::Integer(Bounds { min, max, .. }) if min == max => write!(f, "{min}"),
            Self::Integer(bounds) => write!(f, "an integer{bounds}"),
            Self::Float(bounds) => write!(f, "a number{bounds}"),
            Self::Text => write!(f, "a string"),
            Self::Words(words) => {
                let quoted: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
                write!(f, "{}", quoted.join(", "))
            }
            Self::List(item) => write!(f, "a list, each item {item}"),
            Self::Any(shapes) => {
                let each: Vec<_> = shapes.iter().map(Shape::to_string).collect();
                write!(f, "{}", each.join(", or "))
            }
        }
    }
}

/// The names of keys, with commas.
pub(super) fn names(keys: &[Key]) -> String {
    keys.iter().map(|key| key.name.as_str()).collect::<Vec<_>>().join(", ")
}

impl Bounds {
    const NONE: Self = Self {
        min: f64::NEG_INFINITY,
        max: f64::INFINITY,
        above: f64::NEG_INFINITY,
        below: f64::INFINITY,
        infinite: false,
    };

    fn read(schema: &Value) -> Self {
        let or = |name: &str, none: f64| schema[name].as_f64().unwrap_or(none);
        Self {
            min: or("minimum", Self::NONE.min),
            max: or("maximum", Self::NONE.max),
            above: or("exclusiveMinimum", Self::NONE.above),
            below: or("exclusiveMaximum", Self::NONE.below),
            infinite: schema["x-infinite"] == true,
        }
    }

    /// Never true of NaN.
    pub fn contain(&self, value: f64) -> bool {
        let above = self.above == Self::NONE.above || value > self.above;
        let below = self.below == Self::NONE.below || value < self.below;
        value >= self.min && value <= self.max && above && below
    }

    /// Whether the value is a number to compute with in float32, where it is to be one.
    pub fn fits_float32(&self, value: f64) -> bool {
        let float32 = value as f32;
        value == 0.0 || float32.is_normal() || self.infinite && value.is_infinite()
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = [
            (self.min, Self::NONE.min, "of at least"),
            (self.above, Self::NONE.above, "above"),
            (self.max, Self::NONE.max, "at most"),
            (self.below, Self::NONE.below, "below"),
        ];
        let limits = limits.iter().filter(|(limit, none, _)| limit != none);
        let limits: Vec<_> = limits.map(|(limit, _, word)| format!(" {word} {limit}")).collect();
        write!(f, "{}", limits.join(" and"))
    }
}
