//! Tables for people, from the JSON that control answers.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A column: its head, and the pointer (RFC 6901) into each item.
pub(crate) type Column = (&'static str, &'static str);

/// Prints a row for each item, or `none` if there is no item. Columns of numbers stand to the right.
pub(crate) fn print(
    out: &mut dyn Write,
    items: &[Value],
    columns: &[Column],
    none: &str,
) -> io::Result<()> {
    if items.is_empty() {
        return writeln!(out, "{none}");
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|(head, _)| *head));
    for item in items {
        table.add_row(columns.iter().map(|(_, pointer)| cell(item.pointer(pointer), pointer)));
    }
    for (position, (_, pointer)) in columns.iter().enumerate() {
        let is_number =
            items.iter().any(|item| item.pointer(pointer).is_some_and(Value::is_number));
        if let Some(column) = table.column_mut(position).filter(|_| is_number) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim())?;
    }
    Ok(())
}

/// A value in few words; times, which end in `_ms`, as seconds since 1970 would say nothing, in UTC.
fn cell(value: Option<&Value>, pointer: &str) -> String {
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => plain(text),
        Some(Value::Number(number)) if pointer.ends_with("_ms") => {
            number.as_u64().map_or_else(|| number.to_string(), utc)
        }
        Some(Value::Number(number)) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(real) => format!("{real:.3}"),
            None => number.to_string(),
        },
        Some(Value::Array(items)) => {
            let items: Vec<String> = items.iter().map(|item| cell(Some(item), "")).collect();
            if items.is_empty() { "-".to_owned() } else { items.join(" ") }
        }
        Some(Value::Object(members)) if members.is_empty() => "-".to_owned(),
        Some(other) => plain(&other.to_string()),
    }
}

/// A line break, or worse, in a name that somebody gave must not spoil the table.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Such as `2026-11-30T18:29:25Z`.
fn utc(ms: u64) -> String {
    let seconds = i64::try_from(ms / 1_000).unwrap_or(i64::MAX);
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok();
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_else(|| ms.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_go() {
        let items = [
            json!({"name": "a\u{1b}[31m", "n": 5, "at_ms": 951_782_400_000_u64, "of": [0, 2]}),
            json!({"name": "long name", "n": 12345, "at_ms": 1_780_165_765_999_u64, "of": []}),
        ];
        let mut out = Vec::new();
        let columns =
            [("NAME", "/name"), ("N", "/n"), ("AT", "/at_ms"), ("OF", "/of"), ("X", "/x")];
        print(&mut out, &items, &columns, "nothing").unwrap();
        let expected = "\
NAME           N                    AT  OF   X
a [31m         5  2000-02-29T00:00:00Z  0 2  -
long name  12345  2026-05-30T18:29:25Z  -    -
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        let mut out = Vec::new();
        print(&mut out, &[], &columns, "nothing").unwrap();
        assert_eq!(out, b"nothing\n");
    }
}
