//! Problems in JSON, read field by field. An error names the field and quotes its value.

use serde_json::Value;

use crate::describe_json;

/// What was expected, and what was found.
pub(crate) type Refusal = (String, String);

/// The fields of a problem that have not been read yet.
pub(crate) struct Fields<'a>(Vec<(&'a str, &'a Value)>);

impl<'a> Fields<'a> {
    pub(crate) fn of(json: &'a Value) -> Result<Fields<'a>, Refusal> {
        let fields = json.as_object().ok_or_else(|| ("a JSON object".to_owned(), describe_json(json)))?;
        Ok(Fields(fields.iter().map(|(name, value)| (name.as_str(), value)).collect()))
    }

    /// Whether there is a field with a value.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(other, value)| *other == name && !value.is_null())
    }

    /// Takes a field; `null` counts as absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<&'a Value> {
        let at = self.0.iter().position(|(other, _)| *other == name)?;
        let (_, value) = self.0.remove(at);
        (!value.is_null()).then_some(value)
    }

    /// Takes a field and reads it.
    pub(crate) fn read<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T, Refusal> {
        let value = self.take(name);
        let refusal = || (format!("{expected} as {name}"), value.map_or("none".to_owned(), describe_json));
        value.and_then(read).ok_or_else(refusal)
    }

    /// Checks that no field is left; `known` names the fields of a problem.
    pub(crate) fn end(self, known: &str) -> Result<(), Refusal> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err((format!("only the fields {known}"), crate::quote(name))),
        }
    }
}

/// Reads a list; `None` unless every element can be read.
pub(crate) fn list<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(read).collect()
}
