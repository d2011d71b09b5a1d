//! Settings from one table: the table gives schema, defaults and validation, so that the three agree. Knows no policy.

use serde_json::{Map, Value, json};

use crate::types::Error;

/// Something wrong with settings; each world of the contract has a record of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issue {
    /// JSON pointer to the value; empty for the whole.
    pub path: String,
    /// What was found there, and what was expected.
    pub message: String,
}

/// One setting of a policy.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its name in the JSON object.
    pub name: &'static str,
    /// What it may be, and what it is when it is not given.
    pub kind: Kind,
    /// What it does, with its unit.
    pub about: &'static str,
}

/// What a setting may be.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// A number between two others, both included.
    Number {
        /// Least.
        min: f64,
        /// Greatest.
        max: f64,
        /// When not given.
        default: f64,
    },
    /// A whole number between two others, both included.
    Integer {
        /// Least.
        min: u32,
        /// Greatest.
        max: u32,
        /// When not given.
        default: u32,
    },
    /// One of some words; the first when not given.
    Choice(&'static [&'static str]),
    /// Numbers of at least 0 by name; none when not given.
    Weights,
    /// Yes or no.
    Flag {
        /// When not given.
        default: bool,
    },
}

/// Settings that passed: every field of the table has a value.
#[derive(Debug, Clone)]
pub struct Settings {
    values: Map<String, Value>,
}

impl Settings {
    /// Reads a JSON object. Names that the table lacks are refused: a misspelt setting would
    /// otherwise be ignored in silence.
    ///
    /// # Errors
    /// Everything that is wrong, in the order of the table.
    pub fn read(table: &[Field], text: &str) -> Result<Self, Vec<Issue>> {
        let whole = |message: String| vec![Issue { path: String::new(), message }];
        let given: Value = serde_json::from_str(text)
            .map_err(|error| whole(format!("expected a JSON object, got no JSON: {error}")))?;
        let Value::Object(given) = given else {
            return Err(whole(format!("expected a JSON object, got {given}")));
        };
        let mut issues = Vec::new();
        let mut values = Map::new();
        for field in table {
            let value = given.get(field.name).cloned().unwrap_or_else(|| field.kind.default());
            if let Some(message) = field.kind.problem(&value) {
                issues.push(Issue { path: format!("/{}", field.name), message });
            }
            values.insert(field.name.to_owned(), value);
        }
        let unknown = given.keys().filter(|name| table.iter().all(|field| field.name != **name));
        issues.extend(unknown.map(|name| {
            let names: Vec<&str> = table.iter().map(|field| field.name).collect();
            let message = format!("unknown setting, expected one of {}", names.join(", "));
            Issue { path: format!("/{name}"), message }
        }));
        if issues.is_empty() { Ok(Self { values }) } else { Err(issues) }
    }

    /// For `decide`, whose settings have passed `validate` before.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] with the first issue.
    pub fn accepted(table: &[Field], text: &str) -> Result<Self, Error> {
        Self::read(table, text).map_err(|issues| {
            let first = issues.first();
            let text = first.map(|issue| format!("settings{}: {}", issue.path, issue.message));
            Error::InvalidInput(text.unwrap_or_default())
        })
    }

    /// A number of the table.
    #[must_use]
    pub fn number(&self, name: &str) -> f64 {
        self.values.get(name).and_then(Value::as_f64).unwrap_or_default()
    }

    /// A whole number of the table.
    #[must_use]
    pub fn integer(&self, name: &str) -> usize {
        let value = self.values.get(name).and_then(Value::as_u64).unwrap_or_default();
        usize::try_from(value).unwrap_or(usize::MAX)
    }

    /// A word of the table.
    #[must_use]
    pub fn choice(&self, name: &str) -> &str {
        self.values.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// A number of at least 0 by its name; absent when not given.
    #[must_use]
    pub fn weight(&self, name: &str, of: &str) -> Option<f64> {
        self.values.get(name)?.get(of)?.as_f64()
    }

    /// A flag of the table.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        self.values.get(name).and_then(Value::as_bool).unwrap_or_default()
    }
}

impl Kind {
    fn default(self) -> Value {
        match self {
            Self::Number { default, .. } => json!(default),
            Self::Integer { default, .. } => json!(default),
            Self::Choice(words) => json!(words.first()),
            Self::Weights => json!({}),
            Self::Flag { default } => json!(default),
        }
    }

    /// What is wrong with `value`: what was found and what was expected.
    fn problem(self, value: &Value) -> Option<String> {
        let (good, expected) = match self {
            Self::Number { min, max, .. } => (
                value.as_f64().is_some_and(|n| (min..=max).contains(&n)),
                format!("a number from {min} to {max}"),
            ),
            Self::Integer { min, max, .. } => (
                value.as_u64().is_some_and(|n| (u64::from(min)..=u64::from(max)).contains(&n)),
                format!("a whole number from {min} to {max}"),
            ),
            Self::Choice(words) => (
                value.as_str().is_some_and(|word| words.contains(&word)),
                format!("one of {}", words.join(", ")),
            ),
            Self::Weights => {
                let weight = |w: &Value| w.as_f64().is_some_and(|w| w >= 0.0);
                let good = value.as_object().is_some_and(|names| names.values().all(weight));
                (good, "an object of numbers of at least 0".to_owned())
            }
            Self::Flag { .. } => (value.is_boolean(), "true or false".to_owned()),
        };
        (!good).then(|| format!("got {value}, expected {expected}"))
    }

    fn schema(self, about: &str) -> Value {
        let mut schema = match self {
            Self::Number { min, max, .. } => {
                json!({"type": "number", "minimum": min, "maximum": max})
            }
            Self::Integer { min, max, .. } => {
                json!({"type": "integer", "minimum": min, "maximum": max})
            }
            Self::Choice(words) => json!({"enum": words}),
            Self::Weights => {
                json!({"type": "object", "additionalProperties": {"type": "number", "minimum": 0}})
            }
            Self::Flag { .. } => json!({"type": "boolean"}),
        };
        schema["default"] = self.default();
        schema["description"] = json!(about);
        schema
    }
}

/// The JSON Schema of a table.
#[must_use]
pub fn schema(table: &[Field]) -> String {
    let properties: Map<String, Value> =
        table.iter().map(|f| (f.name.to_owned(), f.kind.schema(f.about))).collect();
    json!({"type": "object", "additionalProperties": false, "properties": properties}).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Field] = &[
        Field {
            name: "steps",
            kind: Kind::Integer { min: 1, max: 9, default: 4 },
            about: "steps of a layer",
        },
        Field {
            name: "zone",
            kind: Kind::Number { min: 1.0, max: 2.0, default: 1.1 },
            about: "largest over mean",
        },
        Field { name: "phase", kind: Kind::Choice(&["all", "decode"]), about: "which" },
        Field { name: "repair", kind: Kind::Flag { default: true }, about: "duplicates" },
        Field { name: "mix", kind: Kind::Weights, about: "workloads" },
    ];

    #[test]
    fn what_is_not_given_is_the_default() {
        let settings = Settings::read(TABLE, r#"{"steps":2,"mix":{"books":0.5}}"#).unwrap();
        let weights = ["books", "laws"].map(|name| settings.weight("mix", name));
        assert_eq!(weights, [Some(0.5), None]);
        assert_eq!((settings.integer("steps"), settings.number("zone")), (2, 1.1));
        assert_eq!((settings.choice("phase"), settings.flag("repair")), ("all", true));
        let schema: Value = serde_json::from_str(&schema(TABLE)).unwrap();
        assert_eq!(schema["properties"]["steps"]["maximum"], 9);
        assert_eq!(schema["properties"]["repair"]["default"], true);
        assert_eq!(schema["properties"]["phase"]["default"], "all");
    }

    #[test]
    fn every_issue_names_value_and_expectation() {
        let text = r#"{"steps":0,"zone":"x","phase":"none","repair":1,"mix":{"a":-1},"stepps":2}"#;
        let issues = Settings::read(TABLE, text).unwrap_err();
        let paths: Vec<&str> = issues.iter().map(|issue| issue.path.as_str()).collect();
        assert_eq!(paths, ["/steps", "/zone", "/phase", "/repair", "/mix", "/stepps"]);
        assert_eq!(issues[0].message, "got 0, expected a whole number from 1 to 9");
        assert!(issues[5].message.contains("steps, zone"), "{}", issues[5].message);
        for text in ["", "[]", "7"] {
            assert!(Settings::read(TABLE, text).unwrap_err()[0].message.contains("JSON object"));
        }
        let refused = Settings::accepted(TABLE, r#"{"zone":3}"#).unwrap_err();
        assert_eq!(
            refused,
            Error::InvalidInput("settings/zone: got 3, expected a number from 1 to 2".to_owned())
        );
    }
}
