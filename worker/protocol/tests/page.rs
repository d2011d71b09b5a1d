//! The page for engines names every frame and every refusal that there is.

use protocol::frame::{HEADER_BYTES, Kind, VERSION};
use protocol::refusal::Refusal;

const PAGE: &str = include_str!("../README.md");

/// The first cells of the table under a heading, without backticks.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let section = PAGE.split(heading).nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let table = section.lines().filter(|line| line.starts_with("| ")).skip(1);
    let cells = |line: &'static str| line.split('|').map(|cell| cell.trim().trim_matches('`'));
    table.map(|line| cells(line).skip(1).collect()).collect()
}

#[test]
fn every_frame_has_its_row() {
    let rows: Vec<_> =
        rows("## Frames").iter().map(|row| format!("{} {}", row[0], row[1])).collect();
    let all: Vec<_> = Kind::ALL.map(|kind| format!("{} {kind:?}", kind as u16)).into();
    assert_eq!(rows, all);
    assert!(PAGE.contains(&format!("version u16 = {VERSION}")));
    assert!(PAGE.contains(&format!("A header of {HEADER_BYTES} bytes")));
}

#[test]
fn every_refusal_has_its_row() {
    // Serde names them all when it is given none of them.
    let error = serde_json::from_str::<Refusal>(r#"{"code": ""}"#).unwrap_err().to_string();
    let mut all: Vec<_> = error.split('`').skip(3).step_by(2).collect();
    let mut rows: Vec<_> = rows("## Refusals").iter().map(|row| row[0]).collect();
    all.sort_unstable();
    rows.sort_unstable();
    assert_eq!(rows, all);
    assert!(all.contains(&"group"));
}
