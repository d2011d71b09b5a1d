//! The contract of policies: what its folder says of itself.

use std::path::Path;

use wit_parser::{Resolve, WorldItem, WorldKey};

/// Each world exports its description and its decision, and brings nothing in but our own types.
#[test]
fn worlds_export_a_decision_and_import_nothing() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit/v0.1");
    let mut resolve = Resolve::new();
    let (package, _) = resolve.push_dir(folder).unwrap();
    let name = &resolve.packages[package].name;
    assert_eq!(name.to_string(), "moeplane:policy@0.1.0");
    let mut worlds = Vec::new();
    for (world, &id) in &resolve.packages[package].worlds {
        let interface = |key: &WorldKey| {
            let WorldKey::Interface(id) = key else { panic!("{world} has a bare {key:?}") };
            resolve.interfaces[*id].name.clone().unwrap()
        };
        let of = &resolve.worlds[id];
        let imports: Vec<String> = of.imports.keys().map(interface).collect();
        assert_eq!(imports, ["types"], "{world} imports");
        let types = of.imports.values().next().unwrap();
        let WorldItem::Interface { id: types, .. } = types else { panic!("{types:?}") };
        assert!(
            resolve.interfaces[*types].functions.is_empty(),
            "the types of {world} can be called"
        );
        let exports: Vec<String> = of.exports.keys().map(interface).collect();
        worlds.push((world.clone(), exports));
        for (key, item) in of.exports.iter().skip(1) {
            let WorldItem::Interface { id, .. } = item else { panic!("{key:?}") };
            let functions: Vec<&String> = resolve.interfaces[*id].functions.keys().collect();
            assert_eq!(functions, ["decide"], "{world}");
        }
    }
    worlds.sort();
    let expected = [("placement", "placer"), ("routing", "splitter"), ("tactics", "chooser")];
    let expected = expected
        .map(|(world, decision)| (world.to_owned(), vec!["meta".to_owned(), decision.to_owned()]));
    assert_eq!(worlds, expected);
}
