//! Components that control's tests upload, in `tests/data/policy-registry`: both call themselves `hostile`.

use std::path::{Path, PathBuf};

use policy_host::example;

use crate::make::Guest;

/// One that changes nothing; and one that does so in the example by which it is tried when it is loaded, and traps at any other
/// question.
fn fixtures() -> [(PathBuf, Vec<u8>); 2] {
    let folder =
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/policy-registry"));
    let harmless = Guest::placement();
    let now_ms = example::placement("{}").context.now_ms;
    // The request begins with the time.
    let live = format!("(i64.ne (i64.load (local.get 0)) (i64.const {now_ms}))");
    let decide = format!("(if {live} (then unreachable)) {}", harmless.decide);
    let traps = Guest { decide, ..Guest::placement() };
    [("harmless.wasm", harmless), ("traps_live.wasm", traps)]
        .map(|(name, guest)| (folder.join(name), guest.build()))
}

#[test]
fn the_components_that_are_checked_in_are_made_here() {
    for (path, expected) in fixtures() {
        let is = std::fs::read(&path).unwrap_or_default();
        assert!(
            is == expected,
            "{} is another: cargo test -p policy-host --features compiler -- --ignored write_fixtures",
            path.display()
        );
    }
}

#[test]
#[ignore = "writes them"]
fn write_fixtures() {
    for (path, component) in fixtures() {
        std::fs::write(path, component).unwrap();
    }
}
