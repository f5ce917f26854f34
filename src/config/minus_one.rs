//! Keys whose -1 means "automatic": `None` in code. For `#[serde(with = "minus_one")]`.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub fn serialize<S: Serializer>(value: &Option<usize>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => value.serialize(serializer),
        None => serializer.serialize_i64(-1),
    }
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    match i64::deserialize(deserializer)? {
        -1 => Ok(None),
        value => usize::try_from(value).map(Some).map_err(D::Error::custom),
    }
}

/// The schema of keys for which 0 has no meaning.
pub struct OrAtLeastOne;

impl JsonSchema for OrAtLeastOne {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "OrAtLeastOne".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "const": -1 }, { "type": "integer", "minimum": 1, "maximum": 1_000_000_000 }] })
    }
}
